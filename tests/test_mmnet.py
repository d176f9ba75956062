"""MMNet: its parts and a literal restatement in NumPy, official checkpoints."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemf
from baselines.mmnet import FRAME, LocalAttention, MMNet, MultiScaleBlock
from nemf.backbones import ARCHITECTURES, Architecture, build_backbone, normalise
from nemf.errors import NemfError
from nemf.pairs import Image
from tests.conftest import tiny_pixels
from tests.test_cats import texture

DILATED = "resnet_dilated_for_tests"


@pytest.fixture(scope="module", autouse=True)
def _dilated() -> Any:
    """A small trunk of the kind of "fcn_resnet101"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, DILATED, Architecture(True, (1, 2, 2, 1), width=8, fcn=True))
        yield


def uneven(matcher: MMNet) -> MMNet:
    """``matcher`` with biases."""
    generator = torch.Generator().manual_seed(3)
    for module in matcher.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.data += 0.3 * torch.randn(module.bias.shape, generator=generator)
    return matcher


@pytest.fixture(scope="module")
def tiny() -> MMNet:
    return uneven(MMNet("resnet_small", init="random")).eval()


@pytest.fixture(scope="module")
def dilated(_dilated: None) -> MMNet:
    return uneven(MMNet(DILATED, init="random")).eval()


def answer(matcher: MMNet, query: np.ndarray, reference: np.ndarray, points: Any) -> np.ndarray:
    return nemf.match(matcher, query, reference, points).points.numpy()


# -- a literal restatement ------------------------------------------------------------------------


def values(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def literal_conv(x: np.ndarray, conv: nn.Conv2d, dilation: int = 1) -> np.ndarray:
    """A 1x1 or 3x3 convolution of (C, h, w), zeros outside, tap by tap."""
    weight = values(conv.weight)
    h, w = x.shape[1:]
    side = weight.shape[2]
    reach = side // 2 * dilation
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
    out = np.zeros((len(weight), h, w)) + values(conv.bias)[:, None, None]
    for i in range(side):
        for j in range(side):
            y, z = i * dilation, j * dilation
            out += np.tensordot(weight[:, :, i, j], padded[:, y : y + h, z : z + w], 1)
    return out


def literal_block(block: MultiScaleBlock, x: np.ndarray) -> np.ndarray:
    o = np.maximum(literal_conv(x, block.conv), 0)
    branches = ((block.conv1, 4), (block.conv2, 8), (block.conv3, 12))
    return o + sum(np.maximum(literal_conv(o, conv, rate), 0) for conv, rate in branches)


def literal_attention(part: LocalAttention, x: np.ndarray) -> np.ndarray:
    """Cell by cell, neighbours beyond the border taken from the border."""
    theta, phi, g = (literal_conv(x, c) for c in (part.conv_theta, part.conv_phi, part.conv_g))
    h, w = x.shape[1:]
    mixed = np.zeros_like(theta)
    for r in range(h):
        for c in range(w):
            around = [
                (min(max(r + i, 0), h - 1), min(max(c + j, 0), w - 1))
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
            ]
            t = theta[:, r, c]
            cosine = np.array(
                [phi[:, y, z] @ t / np.linalg.norm(phi[:, y, z]) for y, z in around]
            ) / np.linalg.norm(t)
            share = np.exp(cosine) / np.exp(cosine).sum()
            mixed[:, r, c] = sum(s * g[:, y, z] for s, (y, z) in zip(share, around, strict=True))
    return x + literal_conv(mixed, part.conv_back)


def literal_upsample(x: np.ndarray, up: nn.ConvTranspose2d) -> np.ndarray:
    """Transposed convolution, kernel 4, stride 2, padding 1: every value spreads its kernel."""
    weight = values(up.weight)  # (in, out, 4, 4)
    h, w = x.shape[1:]
    out = np.zeros((weight.shape[1], 2 * h + 2, 2 * w + 2))
    for r in range(h):
        for c in range(w):
            spread = np.tensordot(x[:, r, c], weight, 1)
            out[:, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4] += spread
    return out[:, 1:-1, 1:-1]


def literal_pyramid(matcher: MMNet, frame: Tensor, counts: list[int]) -> dict[int, np.ndarray]:
    """By stage, coarse to fine down to 1; ``counts``: blocks of stages 1, 2, ..."""
    part = matcher.get_submodule
    with torch.no_grad():
        taps = matcher.backbone.taps(frame, range(1, sum(counts) + 1))
    blocks = [np.maximum(values(tap[0]), 0) for tap in taps]
    found: dict[int, np.ndarray] = {}
    for stage in range(len(counts), 0, -1):
        first = sum(counts[: stage - 1])
        total = sum(
            literal_conv(
                literal_block(part(f"msblock{stage}_{b}"), blocks[first + b - 1]),
                part(f"conv{stage}_{b}_down"),
            )
            for b in range(1, counts[stage - 1] + 1)
        )
        level = literal_attention(part(f"wa_{stage}"), total)
        if found:
            coarser = found[stage + 1]
            if coarser.shape != level.shape:
                coarser = literal_upsample(coarser, part(f"feat_upsample_{stage + 1}"))
            level = literal_conv(np.concatenate([level, coarser]), part(f"conv{stage}_scale"))
        found[stage] = level
    return found


def literal_correlation(query: list[np.ndarray], reference: list[np.ndarray]) -> np.ndarray:
    """Coarse to fine; every coarse value serves the cells that it covers."""
    total = None
    for a, b in zip(query, reference, strict=True):
        products = np.einsum("chw,cuv->hwuv", a, b)
        if total is not None:
            places = zip(products.shape, total.shape, strict=True)
            products += total[np.ix_(*(np.arange(new) * old // new for new, old in places))]
        total = products
    return total


def literal_transfer(points: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """In the frame of 320 x 224 px; near the right and lower border the last cell alone."""
    h, w, *size = correlation.shape
    moved = []
    for x, y in points * [w / 320, h / 224]:
        col, row = int(x), int(y)
        fx, fy = x - col, y - row

        def down(c: int, row: int = row, fy: float = fy) -> np.ndarray:
            if row + 1 > h - 1:
                return correlation[row, c]
            return (1 - fy) * correlation[row, c] + fy * correlation[row + 1, c]

        mixed = down(col) if col + 1 > w - 1 else (1 - fx) * down(col) + fx * down(col + 1)
        best_row, best_col = np.unravel_index(mixed.argmax(), size)
        moved.append([best_col * 320 / size[1], best_row * 224 / size[0]])
    return np.array(moved)


def test_the_multi_scale_block() -> None:
    torch.manual_seed(0)
    block, x = MultiScaleBlock(5), torch.randn(2, 5, 15, 17)
    with torch.no_grad():
        found = block(x).numpy()
    for k in range(2):
        np.testing.assert_allclose(found[k], literal_block(block, values(x[k])), atol=1e-5)


def test_the_local_attention() -> None:
    torch.manual_seed(0)
    part, x = LocalAttention(21), torch.randn(2, 21, 5, 7)
    assert {k: tuple(v.shape) for k, v in part.state_dict().items()} == {
        **{f"conv_{name}.weight": (10, 21, 1, 1) for name in ("theta", "phi", "g")},
        **{f"conv_{name}.bias": (10,) for name in ("theta", "phi", "g")},
        **{"conv_back.weight": (21, 10, 1, 1), "conv_back.bias": (21,)},
    }
    with torch.no_grad():
        found = part(x).numpy()
    for k in range(2):
        np.testing.assert_allclose(found[k], literal_attention(part, values(x[k])), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "counts", "sizes"),
    [
        ("resnet_small", [2, 2, 2], [(4, 6), (8, 12), (16, 24)]),
        (DILATED, [1, 2, 2, 1], [(8, 12), (8, 12), (8, 12), (16, 24)]),
    ],
)
@pytest.mark.parametrize("level", [1, 2])
def test_the_pyramid_follows_the_specification(
    name: str, counts: list[int], sizes: list[tuple[int, int]], level: int
) -> None:
    matcher = uneven(MMNet(name, init="random", level=level)).eval()
    frame = normalise(texture(0, 64, 96))
    with torch.no_grad():
        found = matcher.pyramid(frame)
    literal = literal_pyramid(matcher, frame, counts)
    expected = [literal[stage] for stage in range(len(counts), level - 1, -1)]
    assert [tuple(x.shape[2:]) for x in found] == sizes[: len(expected)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[0].numpy(), b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def pyramids(seed: int, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(21, *size)).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("sizes", [[(2, 3), (4, 6), (8, 12)], [(4, 6), (4, 6), (8, 12)], [(4, 6)]])
def test_correlations_add_up(tiny: MMNet, sizes: list[tuple[int, int]]) -> None:
    query, reference = pyramids(0, sizes), pyramids(1, sizes)
    found = tiny.correlation(*([torch.from_numpy(x) for x in side] for side in (query, reference)))
    expected = literal_correlation(query, reference)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_points_read_their_rows(tiny: MMNet) -> None:
    correlation = np.random.default_rng(0).normal(size=(4, 5, 7, 10)).astype(np.float32)
    inside = np.random.default_rng(1).uniform(0, [320, 224], (60, 2))
    border = [[0, 0], [319.9, 223.9], [319.9, 40], [128, 200], [64, 56]]
    points = np.concatenate([inside, border]).astype(np.float32)
    found = tiny.transfer(torch.from_numpy(points), torch.from_numpy(correlation)).numpy()
    expected = literal_transfer(points.astype(np.float64), correlation)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert len(np.unique(found, axis=0)) > 10
    beyond = torch.tensor([[-5.0, -1], [400, 300]])
    kept = torch.tensor([[0.0, 0], [319, 223]])
    found = [tiny.transfer(p, torch.from_numpy(correlation)) for p in (beyond, kept)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_answers_follow_the_specification(tiny: MMNet) -> None:
    images = texture(2, 80, 112), texture(3, 112, 96)
    points = np.array([[0, 0], [111, 79], [60.5, 33.25], [20, 70], [3.3, 41]])
    levels = []
    for pixels in images:
        frame = F.interpolate(normalise(pixels), (224, 320), mode="bilinear", align_corners=False)
        literal = literal_pyramid(tiny, frame, [2, 2, 2])
        levels.append([literal[3], literal[2]])
    correlation = literal_correlation(*levels)
    moved = literal_transfer(points * [320 / 112, 224 / 80], correlation)
    expected = moved * [96 / 320, 112 / 224]
    np.testing.assert_allclose(answer(tiny, *images, points), expected, atol=1e-3)


# -- what the answer must be ----------------------------------------------------------------------


def test_what_is_kept_of_an_image(tiny: MMNet, dilated: MMNet) -> None:
    image = Image.from_pixels(texture(0, 64, 48))
    for matcher, sizes in ((tiny, [(14, 20), (28, 40)]), (dilated, [(28, 40)] * 3)):
        (features,) = matcher.encode([image], "query")
        assert [tuple(x.shape) for x in features.pyramid] == [(21, *size) for size in sizes]
        assert features.canvas == (64, 48)
    assert FRAME == (224, 320)


def test_answers_are_cells_of_the_reference_image(dilated: MMNet) -> None:
    points = np.random.default_rng(0).uniform(0, 60, (30, 2))
    found = answer(dilated, texture(0, 64, 64), texture(1, 112, 80), points)
    np.testing.assert_allclose(found, np.round(found / [2, 4]) * [2, 4], atol=1e-4)
    assert ((found >= 0) & (found <= [78, 108])).all()


def test_a_batch_is_its_pairs(dilated: MMNet) -> None:
    images = [Image.from_pixels(texture(k, 64 + 16 * k, 96)) for k in range(4)]
    points = [torch.rand(5, 2) * 60 for _ in range(3)]
    together = dilated.encode(images, "query")
    alone = [dilated.encode([image], "reference")[0] for image in images]
    found = dilated.match(together[:3], together[1:], points)
    for k in range(3):
        (one,) = dilated.match([alone[k]], [alone[k + 1]], [points[k]])
        torch.testing.assert_close(found[k].points, one.points, rtol=0, atol=0)


@pytest.mark.parametrize("value", [0, 255])
def test_images_without_content_are_answered(tiny: MMNet, value: int) -> None:
    blank, other = np.full((50, 60, 3), value, np.uint8), tiny_pixels(0, 40, 50)
    for pair in ((blank, other), (other, blank), (blank, blank)):
        assert np.isfinite(answer(tiny, *pair, [[0, 0], [30, 20]])).all()


def test_features_that_are_not_finite_are_an_error(tiny: MMNet) -> None:
    broken = copy.deepcopy(tiny)
    broken.backbone.conv1.weight.data[0, 0, 0, 0] = float("nan")
    image = Image.from_pixels(tiny_pixels(0, 40, 50))
    with pytest.raises(NemfError, match=f"{image.hash[:12]} are not finite"):
        broken.encode([image], "query")


# -- weights --------------------------------------------------------------------------------------


def unused() -> dict[str, Tensor]:
    """What official files hold beside, the largest in small."""
    found = {}
    for name in (*(f"conv{k}_kernel" for k in range(5)), "conv0_down"):
        found |= {f"{name}.weight": torch.ones(21, 21, 3, 3), f"{name}.bias": torch.ones(21)}
    for name in ("conv", "conv1", "conv2", "conv3"):
        found |= {f"msblock0.{name}.weight": torch.ones(32), f"msblock0.{name}.bias": torch.ones(3)}
    for name in ("feature_upsample_2", "feature_upsample_3", "feature_upsample_4"):
        found[f"{name}.weight"] = torch.ones(21, 21, 4, 4)
    for name in ("upsample_4", "upsample_8", "upsample_16"):
        found[f"{name}.weight"] = torch.full((3,), float("nan"))
    return found | {"backbone.fc.weight": torch.ones(9, 8), "backbone.fc.bias": torch.ones(9)}


@pytest.fixture
def saved(tiny: MMNet, tmp_path: Path) -> Callable[..., Path]:
    """``saved(change, matcher)`` writes a matcher as an official file after ``change(state)``."""

    def save(
        change: Callable[[dict[str, Tensor]], Any] = lambda state: None, matcher: MMNet = tiny
    ) -> Path:
        state = dict(matcher.state_dict()) | unused()
        change(state)
        torch.save(state, tmp_path / "ckp.pth")
        return tmp_path / "ckp.pth"

    return save


@pytest.mark.parametrize("backbone", ["resnet101", "fcn_resnet101"])
def test_the_official_keys(backbone: str) -> None:
    state = MMNet(backbone, init="random").state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items() if not k.startswith("backbone.")}
    expected: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, *shape: int) -> None:
        expected[f"{name}.weight"] = shape
        expected[f"{name}.bias"] = shape[:1]

    for stage, (count, channels) in enumerate([(3, 256), (4, 512), (23, 1024), (3, 2048)], 1):
        for b in range(1, count + 1):
            convolution(f"msblock{stage}_{b}.conv", 32, channels, 3, 3)
            for name in ("conv1", "conv2", "conv3"):
                convolution(f"msblock{stage}_{b}.{name}", 32, 32, 3, 3)
            convolution(f"conv{stage}_{b}_down", 21, 32, 1, 1)
        for name in ("theta", "phi", "g"):
            convolution(f"wa_{stage}.conv_{name}", 10, 21, 1, 1)
        convolution(f"wa_{stage}.conv_back", 21, 10, 1, 1)
        if stage < 4:
            convolution(f"conv{stage}_scale", 21, 42, 3, 3)
        if stage > 1:
            expected[f"feat_upsample_{stage}.weight"] = (21, 21, 4, 4)
    assert shapes == expected
    assert "backbone.layer4.2.bn3.running_var" in state
    stem = "backbone.conv1.6.weight" if backbone == "fcn_resnet101" else "backbone.conv1.weight"
    assert stem in state


@pytest.mark.parametrize("kind", ["tiny", "dilated"])
def test_an_official_file_is_taken(
    kind: str,
    saved: Callable[..., Path],
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its trunk is read from the tensors; what is unused is left out and named."""
    matcher = request.getfixturevalue(kind)
    file = saved(matcher=matcher)
    with caplog.at_level(logging.INFO, "baselines.mmnet"):
        twin = nemf.build_matcher("mmnet", weights=file)
    assert twin.backbone.name == matcher.backbone.name
    assert twin.weights_hash == matcher.weights_hash
    assert not twin.random_weights
    message = caplog.records[-1].getMessage()
    assert f"{file}: unused and left out: conv0_kernel, " in message
    assert message.endswith("upsample_4, upsample_8, upsample_16")
    pair = tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]]
    np.testing.assert_array_equal(answer(twin, *pair), answer(matcher, *pair))


def test_a_checkpoint_of_ours_comes_back(tiny: MMNet, tmp_path: Path) -> None:
    torch.save({"state_dict": tiny.state_dict()}, tmp_path / "ours.pth")
    twin = MMNet("resnet_small", weights=tmp_path / "ours.pth")
    assert twin.weights_hash == tiny.weights_hash


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda s: s.pop("msblock3_1.conv2.bias"),
            r"this MMNet on resnet_small: 1 missing \(msblock3_1.conv2.bias\)",
        ),
        (lambda s: s.pop("backbone.bn1.weight"), r"1 missing \(backbone.bn1.weight\)"),
        (lambda s: s.update({"fuse.weight": torch.ones(2)}), r"1 unexpected \(fuse.weight\)"),
        (
            lambda s: s.update({"backbone.layer9.weight": torch.ones(2)}),
            r"1 unexpected \(backbone.layer9.weight\)",
        ),
        (
            lambda s: s.update({"wa_2.conv_g.bias": torch.ones(11)}),
            r"1 misshapen \(wa_2.conv_g.bias \(11,\) for \(10,\)",
        ),
        (
            lambda s: s.update({"conv1_scale.bias": torch.full((21,), float("inf"))}),
            r"damaged: 1 not finite \(conv1_scale.bias\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_explained(
    saved: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    file = saved(change)
    with pytest.raises(NemfError, match=rf"ckp\.pth.*{complaint}"):
        MMNet("resnet_small", weights=file)


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"backbone": "resnet18"}, "was made with resnet_small, not resnet18: leave backbone out"),
        ({"init": "random"}, "not both"),
        ({"backbone_weights": "x.pth"}, "holds a trunk of its own"),
        ({"level": 4}, "level must be a stage of resnet_small, 1 to 3, not 4"),
        ({"level": 0}, "level must be a stage"),
    ],
)
def test_keywords_that_disagree(
    saved: Callable[..., Path], keywords: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=complaint):
        MMNet(weights=saved(), **keywords)


def test_random_weights_are_the_same_every_time(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    a, b = (MMNet("resnet_small", init="random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.weights_hash == b.weights_hash
    assert a.weights_hash != MMNet("resnet_small", init="random", init_seed=1).weights_hash
    trunk = build_backbone("resnet_small", init="random", upto=6, seed=5)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    headless = MMNet("resnet_small", init="head", backbone_weights=tmp_path / "trunk.pth")
    assert torch.equal(headless.backbone.conv1.weight, trunk.conv1.weight)
    assert not headless.backbone.is_random
    assert headless.random_weights
