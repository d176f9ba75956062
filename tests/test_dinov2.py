"""DINOv2 transformers: the forward pass against torch's own layers, and both layouts of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf.dinov2 import ARCHITECTURES, DinoV2, build_dinov2
from nemf.errors import NemfError, WeightsNotFound

TINY = "dinov2_tiny"
WIDTH = 24


@pytest.fixture(autouse=True)
def _no_weights_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMF_WEIGHTS", raising=False)


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Everything random, norms and scales included."""
    generator = torch.Generator().manual_seed(seed)
    state = build_dinov2(TINY, init="random", seed=seed).state_dict()
    for key, value in state.items():
        if value.ndim == 1:
            state[key] = torch.randn(value.shape, generator=generator) * 0.3 + 0.5
    return state


def in_transformers_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the keys of ``transformers.Dinov2Model``."""
    converted = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, WIDTH),
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for k in range(3):
        here, there = f"blocks.{k}", f"encoder.layer.{k}"
        for kind in ("weight", "bias"):
            parts = state[f"{here}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                converted[f"{there}.attention.attention.{name}.{kind}"] = part
            converted[f"{there}.attention.output.dense.{kind}"] = state[f"{here}.attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                converted[f"{there}.{name}.{kind}"] = state[f"{here}.{name}.{kind}"]
        for i in (1, 2):
            converted[f"{there}.layer_scale{i}.lambda1"] = state[f"{here}.ls{i}.gamma"]
    return converted


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def naive_features(state: dict[str, Tensor], images: Tensor, normed: bool) -> Tensor:
    """Patches as products, blocks as torch's encoder layers with the scales multiplied in."""
    rows, cols = images.shape[2] // 14, images.shape[3] // 14
    tiles = F.unfold(images, 14, stride=14)
    x = state["patch_embed.proj.weight"].flatten(1) @ tiles
    x = (x + state["patch_embed.proj.bias"][:, None]).transpose(1, 2)
    grid = state["pos_embed"][0, 1:].T.view(1, WIDTH, 37, 37)
    grid = F.interpolate(grid, (rows, cols), mode="bicubic").flatten(2).transpose(1, 2)
    first = state["cls_token"] + state["pos_embed"][:, :1]
    x = torch.cat([first.expand(len(x), -1, -1), x + grid], 1)
    for k in range(3):
        part = {key.partition(f"blocks.{k}.")[2]: value for key, value in state.items()}
        layer = nn.TransformerEncoderLayer(
            *(WIDTH, 2, 4 * WIDTH, 0.0, "gelu", 1e-6), batch_first=True, norm_first=True
        ).eval()
        ls1, ls2 = part["ls1.gamma"], part["ls2.gamma"]
        renamed = {
            "self_attn.in_proj_weight": part["attn.qkv.weight"],
            "self_attn.in_proj_bias": part["attn.qkv.bias"],
            "self_attn.out_proj.weight": ls1[:, None] * part["attn.proj.weight"],
            "self_attn.out_proj.bias": ls1 * part["attn.proj.bias"],
            "linear1.weight": part["mlp.fc1.weight"],
            "linear1.bias": part["mlp.fc1.bias"],
            "linear2.weight": ls2[:, None] * part["mlp.fc2.weight"],
            "linear2.bias": ls2 * part["mlp.fc2.bias"],
        }
        renamed |= {
            f"{n}.{k}": part[f"{n}.{k}"] for n in ("norm1", "norm2") for k in ("weight", "bias")
        }
        layer.load_state_dict(renamed)
        with torch.no_grad():
            x = layer(x)
    if normed:
        mean, var = x.mean(2, keepdim=True), x.var(2, keepdim=True, unbiased=False)
        x = (x - mean) / torch.sqrt(var + 1e-6) * state["norm.weight"] + state["norm.bias"]
    return x[:, 1:].transpose(1, 2).reshape(len(x), WIDTH, rows, cols)


# -- forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normed", [False, True])
def test_features_equal_torchs_own_layers(normed: bool, tmp_path: Path) -> None:
    state = random_state()
    model = build_dinov2(TINY, save(state, tmp_path / "w.pth"))
    images = torch.randn(2, 3, 56, 84, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    got = model.features(images, normed=normed)
    assert torch.equal(images, before)
    assert got.shape == (2, WIDTH, 4, 6)
    torch.testing.assert_close(got, naive_features(state, images, normed), rtol=1e-4, atol=1e-4)


def test_positions_are_resized_to_the_very_grid(tmp_path: Path) -> None:
    """A ramp stays about a ramp (torch's bicubic kernel is not exact there): cell i of n reads
    position (i + 1/2) 37 / n - 1/2. So both ends are alike, which no other factor gives."""
    state = random_state()
    ramp = torch.arange(37.0).expand(37, 37)
    state["pos_embed"][0, 1:, 0] = ramp.flatten()
    state["pos_embed"][0, 1:, 1] = ramp.T.flatten()
    model = build_dinov2(TINY, save(state, tmp_path / "w.pth"))
    assert torch.equal(model._positions(37, 37)[0, 0], ramp)
    for rows, cols in ((60, 60), (20, 60)):
        across, down = model._positions(rows, cols)[0, :2]
        for read, n in ((across[7, 5:-5], cols), (down[5:-5, 7], rows)):
            expected = ((np.arange(n) + 0.5) * 37 / n - 0.5)[5:-5]
            np.testing.assert_allclose(read, expected, atol=0.2)
            np.testing.assert_allclose(read + read.flip(0), 36, atol=1e-4)


def test_sides_must_be_whole_patches() -> None:
    model = build_dinov2(TINY, init="random")
    with pytest.raises(ValueError, match="multiples of 14 px, not 28 x 30"):
        model.features(torch.zeros(1, 3, 28, 30), normed=True)


def test_published_sizes() -> None:
    """Parameters as the official code counts them, without the mask token."""
    counts = {}
    for name in ARCHITECTURES:
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in DinoV2(name).parameters())
    assert counts["dinov2_vits14"] == 22_056_576 - 384
    assert counts["dinov2_vitb14"] == 86_580_480 - 768
    assert counts["dinov2_vitl14"] == 304_368_640 - 1024


def test_agrees_with_the_transformers_library(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="the transformers library is not installed"
    )
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, image_size=518
    )
    config.save_pretrained(tmp_path)
    file = save(in_transformers_layout(random_state()), tmp_path / "pytorch_model.bin")
    theirs = transformers.Dinov2Model.from_pretrained(tmp_path, local_files_only=True).eval()
    ours = build_dinov2(TINY, file)
    images = torch.randn(1, 3, 140, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = theirs(images, output_hidden_states=True)
    for normed, expected in ((True, answer.last_hidden_state), (False, answer.hidden_states[-1])):
        got = ours.features(images, normed=normed).flatten(2).transpose(1, 2)
        torch.testing.assert_close(got, expected[:, 1:], rtol=1e-4, atol=1e-4)
    tensors = [p for block in theirs.encoder.layer[1:] for p in block.parameters()]
    tuned = save({"dino": tensors}, tmp_path / "weights.pt")
    again = build_dinov2(TINY, init="random", finetuned_weights=tuned).state_dict()
    for key, value in ours.state_dict().items():
        if key.startswith(("blocks.1.", "blocks.2.")):
            assert torch.equal(again[key], value)


# -- weights --------------------------------------------------------------------------------------


def test_both_layouts_are_read(tmp_path: Path) -> None:
    state = random_state()
    official = save(state | {"mask_token": torch.zeros(1, WIDTH)}, tmp_path / "hub.pth")
    converted = in_transformers_layout(state)
    assert "encoder.layer.2.attention.attention.key.bias" in converted
    assert not set(converted) & set(state)
    for content in (converted, {f"dinov2.{k}": v for k, v in converted.items()}):
        path = save(content, tmp_path / "pytorch_model.bin")
        a, b = build_dinov2(TINY, official), build_dinov2(TINY, path)
        assert not a.is_random
        for key, value in a.state_dict().items():
            assert torch.equal(value, state[key])
            assert torch.equal(value, b.state_dict()[key])
    assert not any(p.requires_grad for p in a.parameters())
    assert not a.training


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    state = random_state()
    registers = state | {"register_tokens": torch.zeros(1, 4, WIDTH)}
    cases = {
        r"does not hold dinov2_tiny: 1 missing \(norm.bias\)$": {
            k: v for k, v in state.items() if k != "norm.bias"
        },
        r"1 unexpected \(register_tokens\). Models with register tokens are not": registers,
        r"1 misshapen \(norm.bias \(3,\) for \(24,\)\)": state | {"norm.bias": torch.zeros(3)},
        r"damaged: 1 not finite \(norm.bias\)": state | {"norm.bias": torch.full((24,), torch.nan)},
    }
    converted = in_transformers_layout(state)
    del converted["encoder.layer.0.attention.attention.key.bias"]
    cases[r"missing \(blocks.0.attn.qkv.bias\).*unexpected \(blocks.0.attn.query.bias"] = converted
    for message, content in cases.items():
        with pytest.raises(NemfError, match=message) as refused:
            build_dinov2(TINY, save(content, tmp_path / "w.pth"))
        assert str(tmp_path / "w.pth") in str(refused.value)
    with pytest.raises(NemfError, match="missing"):
        build_dinov2("dinov2_vits14", save(state, tmp_path / "w.pth"))


def test_where_weights_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsNotFound, match=r"no weights for dinov2_tiny.*--weights \(or set"):
        build_dinov2(TINY)
    monkeypatch.setenv("NEMF_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsNotFound, match=str(tmp_path)):
        build_dinov2(TINY)
    state = random_state()
    save(state, tmp_path / f"{TINY}_pretrain.pth")
    assert torch.equal(build_dinov2(TINY).cls_token, state["cls_token"])
    save(state, tmp_path / f"{TINY}_other.pth")
    with pytest.raises(NemfError, match=r"several files .*_other.pth, .*_pretrain.pth"):
        build_dinov2(TINY)
    monkeypatch.setenv("NEMF_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(NemfError, match="nowhere is not a folder"):
        build_dinov2(TINY)


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = build_dinov2(TINY, init="random"), build_dinov2(TINY, init="random")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.cls_token, build_dinov2(TINY, init="random", seed=1).cls_token)
    assert a.is_random


def test_contradictions() -> None:
    with pytest.raises(NemfError, match="unknown transformer 'dinov2_vitg14': choose one of"):
        build_dinov2("dinov2_vitg14", init="random")
    with pytest.raises(NemfError, match="not both"):
        build_dinov2(TINY, "w.pth", "random")
    with pytest.raises(NemfError, match="not 'zeros'"):
        build_dinov2(TINY, init="zeros")  # type: ignore[arg-type]


# -- fine-tuned blocks ----------------------------------------------------------------------------

ORDER = [
    *("norm1.weight", "norm1.bias"),
    *("attention.attention.query.weight", "attention.attention.query.bias"),
    *("attention.attention.key.weight", "attention.attention.key.bias"),
    *("attention.attention.value.weight", "attention.attention.value.bias"),
    *("attention.output.dense.weight", "attention.output.dense.bias", "layer_scale1.lambda1"),
    *("norm2.weight", "norm2.bias"),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "layer_scale2.lambda1"),
]


def nameless(state: dict[str, Tensor]) -> list[Tensor]:
    converted = in_transformers_layout(state)
    return [nn.Parameter(converted[f"encoder.layer.{k}.{name}"]) for k in (1, 2) for name in ORDER]


def test_the_last_two_blocks_are_replaced(tmp_path: Path) -> None:
    base, tuned = random_state(0), random_state(1)
    path = save(base, tmp_path / "w.pth")
    tensors = nameless(tuned)
    assert len(tensors) == 36
    file = save({"dino": tensors}, tmp_path / "best_weights.pt")
    model = build_dinov2(TINY, path, finetuned_weights=file)
    for key, value in model.state_dict().items():
        source = tuned if key.startswith(("blocks.1.", "blocks.2.")) else base
        assert torch.equal(value, source[key]), key
    assert not any(p.requires_grad for p in model.parameters())


def test_fine_tuned_files_that_do_not_fit(tmp_path: Path) -> None:
    tensors = nameless(random_state())
    for content in (
        *({"dino": tensors[:-1]}, {"dino": dict(enumerate(tensors))}, {"head": tensors}),
        *(tensors, {"dino": [*tensors[:-1], 3]}),
    ):
        file = save(content, tmp_path / "weights.pt")
        with pytest.raises(NemfError, match=r"weights.pt: holds no list 'dino' of 36 tensors"):
            build_dinov2(TINY, init="random", finetuned_weights=file)
    swapped = [*tensors[18:], *tensors[:18]]
    swapped[2], swapped[13] = swapped[13], swapped[2]
    file = save({"dino": swapped}, tmp_path / "weights.pt")
    with pytest.raises(NemfError, match="does not hold the last two blocks of dinov2_tiny"):
        build_dinov2(TINY, init="random", finetuned_weights=file)
    with pytest.raises(NemfError, match="there is no such weights file"):
        build_dinov2(TINY, init="random", finetuned_weights=tmp_path / "absent.pt")
