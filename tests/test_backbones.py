"""ResNet trunks: geometry, taps against a functional restatement, and where weights come from."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemf import backbones
from nemf.backbones import (
    ARCHITECTURES,
    Architecture,
    ResNet,
    build_backbone,
    check_ids,
    normalise,
    published_weights,
    tap_table,
)
from nemf.errors import NemfError

SMALL = "resnet_small"


@pytest.fixture(autouse=True)
def _no_weights_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMF_WEIGHTS", raising=False)
    monkeypatch.delenv("NEMF_DOWNLOAD", raising=False)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def random_state(name: str = SMALL, upto: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Everything random, batch norms included."""
    generator = torch.Generator().manual_seed(seed)
    state = build_backbone(name, init="random", upto=upto, seed=seed).state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            state[key] = torch.rand(value.shape, generator=generator) + 0.5
        elif value.ndim == 1:
            state[key] = torch.randn(value.shape, generator=generator) * 0.3 + 0.2
    return state


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def naive_taps(state: dict[str, Tensor], name: str, images: Tensor) -> list[Tensor]:
    """All taps from the state dict alone."""

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int, dilation: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        reach = dilation if weight.shape[-1] == 3 else 1
        padding = weight.shape[-1] // 2 * reach
        x = F.conv2d(x, weight, stride=stride, padding=padding, dilation=reach)
        p = {k: state[f"{bn}.{k}"][:, None, None] for k in ("running_mean", "running_var")}
        x = (x - p["running_mean"]) / torch.sqrt(p["running_var"] + 1e-5)
        return x * state[f"{bn}.weight"][:, None, None] + state[f"{bn}.bias"][:, None, None]

    arch = ARCHITECTURES[name]
    if arch.fcn:
        x = conv_bn(images, "conv1.0", "conv1.1", 2).clamp(min=0)
        x = conv_bn(x, "conv1.3", "conv1.4", 1).clamp(min=0)
        x = conv_bn(x, "conv1.6", "bn1", 1).clamp(min=0)
    else:
        x = conv_bn(images, "conv1", "bn1", 2).clamp(min=0)
    x = F.max_pool2d(x, 3, 2, 1)
    found = [x]
    for stage, count in enumerate(arch.blocks, start=1):
        for b in range(count):
            at = f"layer{stage}.{b}"
            stride = 2 if stage > 1 and b == 0 else 1
            dilation = 1
            if arch.fcn and stage > 2:
                stride, dilation = 1, {3: (1, 2), 4: (2, 4)}[stage][min(b, 1)]
            strides = (1, stride, 1) if arch.bottleneck else (stride, 1)
            y = x
            for i, step in enumerate(strides, start=1):
                y = conv_bn(y, f"{at}.conv{i}", f"{at}.bn{i}", step, dilation)
                y = y.clamp(min=0) if i < len(strides) else y
            if f"{at}.downsample.0.weight" in state:
                x = conv_bn(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            found.append(x + y)
            x = found[-1].clamp(min=0)
    return found


# -- architecture and geometry --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_bottleneck_geometry_is_the_published_table(name: str) -> None:
    table = tap_table(name)[:10]
    if name == "resnet101":
        assert [t.jump_px for t in table] == [4, 4, 4, 4, 8, 8, 8, 8, 16, 16]
    assert [t.field_px for t in table] == [11, 19, 27, 35, 43, 59, 75, 91, 107, 139]


def test_basic_geometry_is_the_published_table() -> None:
    table = tap_table("resnet18")[:7]
    assert [t.jump_px for t in table] == [4, 4, 4, 8, 8, 16, 16]
    assert [t.field_px for t in table] == [11, 27, 43, 67, 99, 147, 211]


def test_dilated_geometry() -> None:
    """Stages three and four keep the second's jump; their 3x3 reach 2 and 4 cells, but for the
    first of each, which reach what the stage before does."""
    table = tap_table("fcn_resnet101")
    assert [t.jump_px for t in table] == [4] * 4 + [8] * 30
    fields = [t.field_px for t in table]
    assert fields[:10] == [15, 23, 31, 39, 47, 63, 79, 95, 111, 143]
    assert np.diff(fields[8:]).tolist() == [32] * 22 + [32, 64, 64]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("fcn_resnet101", [128] + [256] * 3 + [512] * 4 + [1024] * 23 + [2048] * 3),
        ("resnet18", [64] * 3 + [128] * 2 + [256] * 2 + [512] * 2),
        ("resnet50", [64] + [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3),
        ("resnet101", [64] + [256] * 3 + [512] * 4 + [1024] * 23 + [2048] * 3),
        ("resnet_small", [24] * 3 + [48] * 2 + [96] * 2),
    ],
)
def test_number_of_ids_and_channels(name: str, channels: list[int]) -> None:
    assert [t.channels for t in tap_table(name)] == channels


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 120), ("resnet50", 318), ("resnet101", 624), ("fcn_resnet101", 636)],
)
def test_as_many_tensors_as_torchvision_has_without_its_classifier(name: str, count: int) -> None:
    with torch.device("meta"):
        assert len(ResNet(name).state_dict()) == count


def test_key_names() -> None:
    with torch.device("meta"):
        keys = set(ResNet("resnet50").state_dict())
    assert {
        "conv1.weight",
        "bn1.num_batches_tracked",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.running_var",
        "layer2.3.conv3.weight",
        "layer4.2.bn3.bias",
    } <= keys
    assert "layer1.1.downsample.0.weight" not in keys


def test_small_trunk_is_small() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet(SMALL).parameters()) <= 400_000


@pytest.mark.parametrize(
    ("name", "k"), [(SMALL, 0), (SMALL, 2), (SMALL, 3), ("resnet50", 4), ("fcn_resnet101", 9)]
)
def test_receptive_field_is_what_a_cell_sees(name: str, k: int) -> None:
    """Averaging kernels, and one bright pixel at the rim of the field, then just outside."""
    with torch.device("meta"):
        model = ResNet(name, k)
    state = {}
    for key, meta in model.state_dict().items():
        fill = 1 / meta[0].numel() if meta.ndim == 4 else 1.0
        state[key] = torch.full(meta.shape, fill, dtype=torch.float64)
        if key.endswith(("running_mean", "bias")):
            state[key].zero_()
    model.load_state_dict(state, assign=True)
    model.eval()
    jump, reach = tap_table(name)[k].jump_px, tap_table(name)[k].field_px // 2
    row, col = -(-reach // jump) + 1, -(-reach // jump) + 2
    side = (col + 2) * jump + reach

    def cell(x: int, y: int) -> float:
        image = torch.ones(1, 3, side, side, dtype=torch.float64)
        image[..., y, x] = 1e6
        with torch.no_grad():
            return float(model.taps(image, [k])[0][0, 0, row, col])

    plain = cell(side - 1, side - 1)
    for sign in (-1, 1):
        assert cell(col * jump + sign * reach, row * jump) > plain
        assert cell(col * jump + sign * (reach + 1), row * jump) == plain
        assert cell(col * jump, row * jump + sign * reach) > plain
        assert cell(col * jump, row * jump + sign * (reach + 1)) == plain


@pytest.mark.parametrize("ids", [(), (3, 2), (2, 2), (-1,), (7,), (1.0,), 6, "6", None])
def test_refuses_ids(ids: object) -> None:
    with pytest.raises(NemfError, match="increasing ids from 0 to 6 of resnet_small"):
        check_ids(SMALL, ids)  # type: ignore[arg-type]


def test_unknown_backbone_lists_the_known() -> None:
    with pytest.raises(NemfError, match=r"'resnet34'.*resnet18, resnet50, resnet101, resnet_small"):
        build_backbone("resnet34", init="random", upto=1)


# -- taps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "last"), [(SMALL, 6), ("resnet50", 16), ("dilated", 6)])
def test_taps_equal_a_functional_restatement(
    name: str, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "dilated", Architecture(True, (1, 2, 2, 1), 8, fcn=True))
    state = random_state(name, last)
    model = build_backbone(name, save(state, tmp_path / "w.pth"), upto=last)
    images = torch.randn(2, 3, 49, 70, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    expected = naive_taps(state, name, images)
    got = model.taps(images, range(last + 1))
    assert torch.equal(images, before)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        tap = tap_table(name)[k]
        assert a.shape == (2, tap.channels, -(-49 // tap.jump_px), -(-70 // tap.jump_px))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert all((tap < 0).any() for tap in got[1:])


def test_taps_come_in_the_order_asked_and_alike_alone() -> None:
    model = build_backbone(SMALL, init="random", upto=6)
    images = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    every = model.taps(images, range(7))
    for ids in ([6, 0, 3], [2], [0]):
        for k, tap in zip(ids, model.taps(images, ids), strict=True):
            assert torch.equal(tap, every[k])


def test_runs_no_deeper_than_asked() -> None:
    model = build_backbone(SMALL, init="random", upto=6)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model.taps(torch.zeros(1, 3, 32, 32), [0, 3])
    assert "layer2.0" in ran
    assert not any(name.startswith(("layer2.1", "layer3")) for name in ran)


@pytest.mark.parametrize("ids", [[], [5], [-1]])
def test_taps_it_does_not_hold(ids: list[int]) -> None:
    model = build_backbone(SMALL, init="random", upto=4)
    with pytest.raises(ValueError, match="holds the taps 0 to 4"):
        model.taps(torch.zeros(1, 3, 32, 32), ids)


def test_frozen_for_good_but_only_when_built() -> None:
    model = build_backbone(SMALL, init="random", upto=6)
    torch.nn.ModuleList([model]).train()
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert all(m.training for m in ResNet(SMALL, 2).train().modules())


# -- weights --------------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = build_backbone(SMALL, init="random", upto=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    deeper = build_backbone(SMALL, init="random", upto=6).state_dict()
    other = build_backbone(SMALL, init="random", upto=4, seed=1).state_dict()
    for key, value in a.state_dict().items():
        assert torch.equal(value, deeper[key])
    assert not torch.equal(a.conv1.weight, other["conv1.weight"])
    assert a.is_random


def test_random_deep_trunk_keeps_moderate_sums() -> None:
    model = build_backbone("resnet101", init="random", upto=30)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    (tap,) = model.taps(images, [30])
    assert 0.1 < float(tap.std()) < 1000


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_loads_bare_or_wrapped(wrap, tmp_path: Path) -> None:
    state = random_state()
    del state["bn1.num_batches_tracked"]
    state["fc.weight"] = torch.zeros(3, 96)
    model = build_backbone(SMALL, save(wrap(state), tmp_path / "w.pth"), upto=6)
    assert not model.is_random
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[key])


def test_a_truncated_file_serves_what_it_holds(tmp_path: Path) -> None:
    state = {k: v for k, v in random_state().items() if not k.startswith("layer3")}
    path = save(state, tmp_path / "w.pth")
    assert build_backbone(SMALL, path, upto=4).upto == 4
    with pytest.raises(NemfError) as error:
        build_backbone(SMALL, str(path), upto=5)
    message = str(error.value)
    assert "\n" not in message
    assert f"{path} does not hold resnet_small up to layer id 5" in message
    # two convolutions, the shortcut's, and four tensors for each of their batch norms
    assert (
        "15 missing (layer3.0.conv1.weight, layer3.0.bn1.weight, layer3.0.bn1.bias, ...)" in message
    )
    assert "It looks like a resnet_small that ends earlier" in message


def test_a_file_of_another_architecture(tmp_path: Path) -> None:
    state = build_backbone("resnet50", init="random", upto=7).state_dict()
    path = save(state, tmp_path / "w.pth")
    with pytest.raises(NemfError) as error:
        build_backbone("resnet18", path, upto=2)
    message = str(error.value)
    assert "unexpected (layer1.0.conv3.weight" in message
    assert "misshapen (layer1.0.conv1.weight (64, 64, 1, 1) for (64, 64, 3, 3)" in message
    assert message.endswith("It looks like resnet50 or resnet101")


def test_a_file_of_no_known_architecture(tmp_path: Path) -> None:
    path = save({"trunk.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(NemfError, match=r"5 missing.*resembles none of resnet18"):
        build_backbone(SMALL, path, upto=0)


def test_a_stray_key_in_the_needed_part(tmp_path: Path) -> None:
    state = random_state()
    path = save(state | {"layer1.0.se.weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(NemfError, match=r"1 unexpected \(layer1.0.se.weight\)"):
        build_backbone(SMALL, path, upto=6)
    path = save(state | {"layer3.0.se.weight": torch.zeros(3)}, tmp_path / "v.pth")
    assert build_backbone(SMALL, path, upto=4).upto == 4


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    state = random_state()
    state["layer2.0.bn1.bias"][3] = float("nan")
    path = save(state, tmp_path / "w.pth")
    with pytest.raises(NemfError, match=r"damaged: 1 not finite \(layer2.0.bn1.bias\)"):
        build_backbone(SMALL, path, upto=6)


def test_a_classifier_comes_from_the_same_file(tmp_path: Path) -> None:
    fc = {"fc.weight": torch.randn(1000, 96), "fc.bias": torch.randn(1000)}
    path = save(random_state() | fc, tmp_path / "w.pth")
    model = build_backbone(SMALL, path, upto=6, classifier=True)
    assert torch.equal(model.fc.weight, fc["fc.weight"])
    assert torch.equal(model.fc.bias, fc["fc.bias"])
    assert not model.fc.weight.requires_grad
    assert not hasattr(build_backbone(SMALL, path, upto=6), "fc")
    bare = save(random_state(), tmp_path / "bare.pth")
    with pytest.raises(NemfError, match=r"id 6 and its classifier: 2 missing \(fc.weight, fc.bias"):
        build_backbone(SMALL, bare, upto=6, classifier=True)
    stray = save(random_state() | fc | {"fc.scale": torch.ones(1)}, tmp_path / "stray.pth")
    with pytest.raises(NemfError, match=r"1 unexpected \(fc.scale\)"):
        build_backbone(SMALL, stray, upto=6, classifier=True)
    with pytest.raises(ValueError, match="needs all of resnet_small, not only id 4"):
        build_backbone(SMALL, path, upto=4, classifier=True)


def test_a_random_classifier_leaves_the_trunk_as_it_is() -> None:
    bare = build_backbone(SMALL, init="random", upto=6).state_dict()
    model = build_backbone(SMALL, init="random", upto=6, classifier=True)
    assert model.fc.weight.shape == (1000, 96)
    assert float(model.fc.weight.std()) == pytest.approx(96**-0.5, rel=0.02)
    assert not model.fc.bias.any()
    assert all(torch.equal(value, bare[k]) for k, value in model.state_dict().items() if k in bare)


class _Trap:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("trap_went_off"),))


def test_files_that_are_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NemfError, match=r"absent.pth: there is no such"):
        build_backbone(SMALL, "absent.pth", upto=0)
    for name, content in {
        "empty.pth": b"",
        "text.pth": b"hello",
        "trap.pth": pickle.dumps({"conv1.weight": _Trap()}, protocol=2),
    }.items():
        Path(name).write_bytes(content)
        with pytest.raises(NemfError, match=rf"{name}: not a readable weights file") as error:
            build_backbone(SMALL, name, upto=0)
        assert "\n" not in str(error.value)
    assert not Path("trap_went_off").exists()
    whole = save(random_state(), tmp_path / "whole.pth").read_bytes()
    Path("half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(NemfError, match=r"half.pth: not a readable"):
        build_backbone(SMALL, "half.pth", upto=0)
    for name, content in {"list.pth": [1, 2], "numbers.pth": {"conv1.weight": 3}}.items():
        with pytest.raises(NemfError, match=rf"{name}: holds no state dict"):
            build_backbone(SMALL, save(content, tmp_path / name), upto=0)


def test_contradicting_or_unknown_init() -> None:
    with pytest.raises(NemfError, match="not both"):
        build_backbone(SMALL, "w.pth", "random", upto=0)
    with pytest.raises(NemfError, match="not 'zeros'"):
        build_backbone(SMALL, init="zeros", upto=0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_network")
def test_without_weights_every_way_is_named() -> None:
    with pytest.raises(NemfError) as error:
        build_backbone("resnet18", upto=2)
    for way in ("weights=FILE", "--weights (or set NEMF_WEIGHTS)", "--download", "init='random'"):
        assert way in str(error.value)
    with pytest.raises(NemfError) as error:
        build_backbone(SMALL, upto=2)
    assert "--download" not in str(error.value)


@pytest.mark.usefixtures("no_network")
def test_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMF_WEIGHTS", str(tmp_path))
    with pytest.raises(NemfError, match=f"no weights for {SMALL}: .*{tmp_path}"):
        build_backbone(SMALL, upto=6)
    state = random_state()
    shallow = {k: v for k, v in state.items() if not k.startswith("layer3")}
    save(shallow, tmp_path / f"{SMALL}_shallow.pth")
    save({"a": torch.zeros(1)}, tmp_path / "resnet18.pth")
    with pytest.raises(NemfError, match=r"no weights .*_shallow.pth does not hold .* id 6"):
        build_backbone(SMALL, upto=6)
    save(state, tmp_path / f"{SMALL}-deep.pth")
    model = build_backbone(SMALL, upto=6)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    with pytest.raises(NemfError, match=rf"several files .*{SMALL}-deep.pth, .*_shallow.pth"):
        build_backbone(SMALL, upto=4)


def test_weights_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMF_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(NemfError, match=r"nowhere is not a folder"):
        build_backbone(SMALL, upto=0)


# -- published weights ----------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the download site, publishing the small trunk's weights."""
    folder = tmp_path / "site"
    folder.mkdir()
    path = save(random_state(), folder / "w.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(folder / f"{SMALL}-{digest[:8]}.pth")
    published = Architecture(False, (2, 2, 2), width=24, published=path.name)
    monkeypatch.setitem(ARCHITECTURES, SMALL, published)
    monkeypatch.setattr(backbones, "PUBLISHED_URL", folder.as_uri() + "/")
    return path


def test_published_names_end_in_a_hash() -> None:
    assert {n: a.published for n, a in ARCHITECTURES.items()} == {
        "resnet18": "resnet18-f37072fd.pth",
        "resnet50": "resnet50-0676ba61.pth",
        "resnet101": "resnet101-63fe2227.pth",
        "fcn_resnet101": None,
        "resnet_small": None,
    }


def test_download_only_when_allowed(server: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(NemfError, match="downloading is off"):
        published_weights(SMALL, False, cache)
    assert not cache.exists()
    path = published_weights(SMALL, True, cache)
    assert path == cache / server.name
    assert path.read_bytes() == server.read_bytes()
    server.unlink()
    assert published_weights(SMALL, False, cache) == path


def test_a_wrong_download_leaves_nothing(server: Path, tmp_path: Path) -> None:
    server.write_bytes(b"something else")
    with pytest.raises(NemfError, match="could not be downloaded"):
        published_weights(SMALL, True, tmp_path / "cache")
    server.unlink()
    with pytest.raises(NemfError, match="could not be downloaded"):
        published_weights(SMALL, True, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_noticed(server: Path, tmp_path: Path) -> None:
    (tmp_path / server.name).write_bytes(b"half")
    with pytest.raises(NemfError, match="is damaged"):
        published_weights(SMALL, True, tmp_path)


def test_nothing_is_published_for_the_small_trunk(tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="no weights are published for resnet_small"):
        published_weights(SMALL, True, tmp_path)


@pytest.mark.parametrize("with_folder", [True, False])
def test_building_downloads_once(
    with_folder: bool, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMF_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "cache" / "weights"
    if with_folder:
        target = tmp_path / "folder"
        target.mkdir()
        monkeypatch.setenv("NEMF_WEIGHTS", str(target))
    with pytest.raises(NemfError, match="--download"):
        build_backbone(SMALL, upto=6)
    monkeypatch.setenv("NEMF_DOWNLOAD", "1")
    build_backbone(SMALL, upto=6)
    assert [p.name for p in target.iterdir()] == [server.name]
    server.unlink()
    monkeypatch.delenv("NEMF_DOWNLOAD")
    build_backbone(SMALL, upto=6)


@pytest.mark.real
def test_real_truncated_files(shared: Path) -> None:
    resnet18 = shared / "weights" / "resnet18_imagenet_to_layer3.pth"
    assert build_backbone("resnet18", resnet18, upto=6).upto == 6
    with pytest.raises(NemfError, match=r"missing \(layer4.0.conv1.weight"):
        build_backbone("resnet18", resnet18, upto=7)
    with pytest.raises(NemfError, match="It looks like resnet18"):
        build_backbone("resnet50", resnet18, upto=3)
    resnet50 = shared / "weights" / "resnet50_imagenet_to_layer2.pth"
    assert build_backbone("resnet50", resnet50, upto=7).upto == 7


# -- input ----------------------------------------------------------------------------------------


def test_normalise_by_hand() -> None:
    pixels = np.zeros((1, 2, 3), np.uint8)
    pixels[0, 1] = (255, 51, 0)
    expected = [
        [-0.485 / 0.229, (1 - 0.485) / 0.229],
        [-0.456 / 0.224, (0.2 - 0.456) / 0.224],
        [-0.406 / 0.225, -0.406 / 0.225],
    ]
    for array in (pixels, np.asfortranarray(pixels), pixels[:, ::-1][:, ::-1]):
        got = normalise(array)
        assert got.dtype == torch.float32
        assert got.shape == (1, 3, 1, 2)
        np.testing.assert_allclose(got[0, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("array", [np.zeros((2, 2, 3)), np.zeros((3, 2, 2), np.uint8)])
def test_normalise_refuses(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be"):
        normalise(array)
