"""CHM: its kernels, a literal restatement, its read-out, official checkpoints, its training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemf
from baselines.chm import CHM, HoughSpace4d, HoughSpace6d, offset_kinds
from nemf.backbones import ResNet, build_backbone, normalise
from nemf.errors import NemfError
from nemf.pairs import Image
from nemf.supervision import PairBatch, collate_pairs
from tests.conftest import tiny_pixels
from tests.test_cats import texture
from tests.test_convolution import by_taps

TINY: dict[str, Any] = {"backbone": "resnet_small", "input_size": 96}
KERNELS = ("psi", "iso", "full")


def uneven(matcher: CHM) -> CHM:
    """``matcher`` with kernels drawn at random and trunks that differ."""
    generator = torch.Generator().manual_seed(3)
    learner = matcher.learner
    with torch.no_grad():
        for weights in (*learner.chm6d.parameters(), learner.chm4d.weight, learner.chm4d.bias):
            weights += 0.3 * torch.randn(weights.shape, generator=generator)
        trunk = matcher.backbone.reference
        trunk.conv1.weight += 0.1 * torch.randn(trunk.conv1.weight.shape, generator=generator)
        trunk.bn1.running_mean += 0.1
    return matcher


@pytest.fixture(scope="module")
def tiny() -> CHM:
    return uneven(CHM(**TINY, init="random")).eval()


@pytest.fixture(scope="module")
def whole() -> CHM:
    """At the paper's 240 px, 15 and 30 cells."""
    return CHM("resnet_small", init="random").eval()


def answer(matcher: CHM, query: np.ndarray, reference: np.ndarray, points: Any) -> np.ndarray:
    return nemf.match(matcher, query, reference, points).points.numpy()


# -- kernels --------------------------------------------------------------------------------------


def literal_keys(kind: str) -> list[Any]:
    """The key of every offset (i, j | k, l) in {0 .. 4}^4, lexicographic, as specified."""
    keys = []
    for i, j, k, l in itertools.product(range(5), repeat=4):  # noqa: E741
        tail, head = (i - 2) ** 2 + (j - 2) ** 2, (k - 2) ** 2 + (l - 2) ** 2
        off = (i - k) ** 2 + (j - l) ** 2
        psi = (max(tail, head), min(tail, head), off)
        keys.append({"psi": psi, "iso": off, "full": (i, j, k, l)}[kind])
    return keys


@pytest.mark.parametrize(("kind", "count"), [("psi", 55), ("iso", 15), ("full", 625)])
def test_offsets_of_one_kind_share_a_weight(kind: Any, count: int) -> None:
    keys, kinds = literal_keys(kind), offset_kinds(kind).tolist()
    in_order = list(dict.fromkeys(keys))
    assert len(in_order) == count
    assert [in_order[number] for number in kinds] == keys


def test_the_first_kinds_of_psi() -> None:
    in_order = list(dict.fromkeys(literal_keys("psi")))
    assert in_order[:5] == [(8, 8, 0), (8, 5, 1), (8, 4, 4), (8, 5, 9), (8, 8, 16)]
    assert torch.bincount(offset_kinds("psi"))[:5].tolist() == [4, 16, 16, 16, 8]


@pytest.mark.parametrize("kind", KERNELS)
def test_a_weight_is_spread_over_its_offsets(kind: Any) -> None:
    space = HoughSpace4d(kind)
    space.weight.data = torch.rand(len(space.weight), generator=torch.manual_seed(0))
    kernel = space.kernel(space.weight).flatten()
    kinds = offset_kinds(kind)
    for number in range(len(space.weight)):
        mine = kernel[kinds == number]
        assert mine.sum().item() == pytest.approx(space.weight[number].item(), rel=1e-5)
        assert (mine == mine[0]).all()


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("psi", [[4], [0, 8], [2, 6], [1, 3, 5, 7]]),
        ("iso", [[0, 4, 8], [2, 6], [1, 3, 5, 7]]),
        ("full", [[k] for k in range(9)]),
    ],
)
def test_scale_offsets_share_a_vector(kind: Any, groups: list[list[int]]) -> None:
    space = HoughSpace6d(kind)
    vectors = torch.rand(len(groups), space.kernel.n_kinds, generator=torch.manual_seed(0))
    if kind == "full":
        space.param.data = vectors
    else:
        for own, vector in zip(space.param, vectors, strict=True):
            own.data = vector.clone()
    weight = space.weight().flatten(2).flatten(0, 1)
    for group, vector in zip(groups, vectors, strict=True):
        for k in group:
            torch.testing.assert_close(
                weight[k], space.kernel(vector).flatten() / len(group), rtol=1e-5, atol=1e-8
            )


# -- a literal restatement ------------------------------------------------------------------------


def literal_resize(volume: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear along one axis, the ends kept in their places."""
    old = volume.shape[axis]
    moved = np.moveaxis(volume, axis, 0)
    place = np.arange(size) * (old - 1) / (size - 1)
    low = np.minimum(place.astype(int), old - 2)
    part = (place - low).reshape(-1, *[1] * (volume.ndim - 1))
    return np.moveaxis(moved[low] * (1 - part) + moved[low + 1] * part, 0, axis)


def literal_scores(matcher: CHM, query: Tensor, reference: Tensor, cells: int) -> np.ndarray:
    """(Q, R) of raw layer3 features (1, C, h, w) in float64, step by step."""
    learner = copy.deepcopy(matcher.learner).double()
    sides = [round(cells * scale**0.5) for scale in (0.5, 1, 2)]

    def at_scales(features: Tensor) -> list[np.ndarray]:
        found = []
        for side, conv in zip(sides, learner.conv2ds, strict=True):
            resized = F.interpolate(
                features.double(), (side, side), mode="bilinear", align_corners=True
            )
            x = conv(resized)[0].detach().numpy()
            found.append(x / np.sqrt((x**2).sum(0)))
        return found

    volume = np.empty((3, 3, *[cells] * 4))
    for s, source in enumerate(at_scales(query)):
        for t, target in enumerate(at_scales(reference)):
            cosine = np.einsum("cij,ckl->ijkl", source, target)
            for axis in range(4):
                cosine = literal_resize(cosine, axis, cells)
            volume[s, t] = np.maximum(cosine, 0)
    with torch.no_grad():
        kernel6d, bias6d = learner.chm6d.weight().numpy(), learner.chm6d.bias.item()
        kernel4d = learner.chm4d.kernel(learner.chm4d.weight).numpy()
    votes = by_taps(volume[None, None], kernel6d[None, None])[0, 0] + bias6d
    votes = (1 / (1 + np.exp(-votes))).max((0, 1))
    for axis in range(4):
        votes = literal_resize(votes, axis, 2 * cells)
    votes = by_taps(votes[None, None], kernel4d[None, None])[0, 0] + learner.chm4d.bias.item()
    m = np.log1p(np.exp(votes)).reshape((2 * cells) ** 2, -1)
    return m * (m / m.max(1, keepdims=True)) * (m / m.max(0, keepdims=True))


def literal_transfer(
    scores: np.ndarray, points: np.ndarray, cells: int, reach: float, sigma: float
) -> np.ndarray:
    """Normalised points (N, 2) moved by (Q, R) scores, loops over the cells of the doubled grid."""
    n = 2 * cells
    axis = np.linspace(-1, 1, n)
    expected = []
    for row in scores:
        peak = divmod(int(row.argmax()), n)
        weighted = np.array(
            [
                row[y * n + x] * np.exp(-((y - peak[0]) ** 2 + (x - peak[1]) ** 2) / (2 * sigma**2))
                for y in range(n)
                for x in range(n)
            ]
        )
        share = np.exp(weighted - weighted.max())
        share = (share / share.sum()).reshape(n, n)
        expected.append([(share.sum(0) * axis).sum(), (share.sum(1) * axis).sum()])
    moved = []
    for x, y in points:
        near = np.array(
            [
                max(0, reach - np.sqrt((axis[c] - x) ** 2 + (axis[r] - y) ** 2 + 1e-5))
                for r in range(n)
                for c in range(n)
            ]
        )
        with np.errstate(invalid="ignore"):
            moved.append((near / near.sum()) @ np.array(expected))
    return np.array(moved)


def raw_features(matcher: CHM, pixels: np.ndarray, role: str) -> Tensor:
    size = matcher.input_size
    squashed = PIL.Image.fromarray(pixels).resize((size, size), PIL.Image.Resampling.BILINEAR)
    with torch.no_grad():
        trunk = getattr(matcher.backbone, role)
        return trunk.taps(normalise(np.asarray(squashed)), [6])[0].relu()


@pytest.mark.parametrize("kind", KERNELS)
def test_scores_follow_the_specification(kind: str) -> None:
    matcher = uneven(CHM(**TINY, kernel=kind, init="random")).eval()
    query, reference = texture(0, 80, 112), texture(1, 112, 96)
    raw = raw_features(matcher, query, "query"), raw_features(matcher, reference, "reference")
    expected = literal_scores(matcher, *raw, cells=6)
    (q,) = matcher.encode([Image.from_pixels(query)], "query")
    (r,) = matcher.encode([Image.from_pixels(reference)], "reference")
    with torch.no_grad():
        found = matcher.scores(q.levels[None], r.levels[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_answers_follow_the_specification(whole: CHM) -> None:
    """At the paper's size: a reach of 0.1, a deviation of 17 cells, in the frame of 240 px."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 9, (900, 900)).astype(np.float32)
    points = np.float32([[0, 0], [239, 239], [120.5, 33.25], [7.9, 200], [248, 3], [120, 256]])
    expected = literal_transfer(scores, points / 120 - 1, 15, reach=0.1, sigma=17) * 120 + 120
    found = whole.transfer(torch.from_numpy(points), torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.isfinite(found[:5]).all()
    assert np.isnan(found[5]).all()  # 16 px beyond the frame: no cell within 12 px


def test_with_fewer_cells_the_lengths_grow(tiny: CHM) -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 9, (144, 144)).astype(np.float32)
    points = rng.uniform(0, 95, (20, 2)).astype(np.float32)
    expected = literal_transfer(scores, points / 48 - 1, 6, reach=2.9 / 11, sigma=17 * 12 / 30)
    found = tiny.transfer(torch.from_numpy(points), torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(found, expected * 48 + 48, atol=2e-3)


def test_the_levels_are_the_paper_s_scales(whole: CHM) -> None:
    sides = []
    for conv in whole.learner.conv2ds:
        conv.register_forward_hook(lambda _, inputs, __: sides.append(tuple(inputs[0].shape[2:])))
    frame = torch.zeros(1, 3, 240, 240)
    try:
        with torch.no_grad():
            levels = whole.levels(frame, "query")
    finally:
        for conv in whole.learner.conv2ds:
            conv._forward_hooks.clear()
    assert sides == [(11, 11), (15, 15), (21, 21)]
    assert levels.shape == (1, 3, 24, 225)


# -- what the answer must be ----------------------------------------------------------------------


def test_a_shifted_image_is_followed(whole: CHM) -> None:
    """By two cells: what is at x in the query is at x - 32 in the reference."""
    wide = texture(0, 240, 304)
    points = [[100, 60], [150, 130.5], [200, 200]]
    found = answer(whole, wide[:, :240], wide[:, 32:272], points)
    np.testing.assert_allclose(found - points, [[-32, 0]] * 3, atol=8)


def test_answers_are_in_pixels_of_the_original_images(whole: CHM) -> None:
    query = texture(1, 240, 240)
    stretched = np.asarray(PIL.Image.fromarray(query).resize((480, 360)))
    points = np.array([[60.0, 70.0], [128.0, 200.0]])
    np.testing.assert_allclose(answer(whole, query, stretched, points), points * [2, 1.5], atol=12)
    np.testing.assert_allclose(answer(whole, stretched, query, points * [2, 1.5]), points, atol=8)


def test_each_role_has_a_trunk_of_its_own(tiny: CHM) -> None:
    image = Image.from_pixels(tiny_pixels(0, 60, 70))
    (query,), (reference,) = (tiny.encode([image], role) for role in ("query", "reference"))
    assert (query.levels - reference.levels).abs().max() > 0.01
    changed = copy.deepcopy(tiny)
    changed.backbone.reference.conv1.weight.data *= 0.5
    torch.testing.assert_close(changed.encode([image], "query")[0].levels, query.levels)
    assert not torch.equal(changed.encode([image], "reference")[0].levels, reference.levels)


@pytest.mark.parametrize("value", [0, 255])
def test_images_without_content_are_answered(tiny: CHM, value: int) -> None:
    blank, other = np.full((50, 60, 3), value, np.uint8), tiny_pixels(0, 40, 50)
    for pair in ((blank, other), (other, blank), (blank, blank)):
        assert np.isfinite(answer(tiny, *pair, [[0, 0], [30, 20]])).all()


def test_features_that_are_not_finite_are_an_error(tiny: CHM) -> None:
    broken = copy.deepcopy(tiny)
    broken.backbone.query.conv1.weight.data[0, 0, 0, 0] = float("nan")
    image = Image.from_pixels(tiny_pixels(0, 40, 50))
    with pytest.raises(NemfError, match=f"{image.hash[:12]} are not finite"):
        broken.encode([image], "query")


# -- weights --------------------------------------------------------------------------------------


def as_doubled_trunk(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as the official files hold it: one trunk, its tensors stacked on dimension 0."""
    official = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    for key, value in state.items():
        if key.startswith("backbone.query."):
            name = key.removeprefix("backbone.query.")
            other = state[f"backbone.reference.{name}"]
            both = value if value.ndim == 0 else torch.cat([value, other])
            official[f"backbone.{name}"] = both
    return official


def as_official(state: dict[str, Tensor], kernel: str) -> dict[str, Tensor]:
    """CHM's files, with more of the trunk than is used."""
    official = as_doubled_trunk(state)
    official["backbone.layer4.0.conv1.weight"] = torch.ones(8, 2, 1, 1)
    official |= {"backbone.fc.weight": torch.ones(5, 96), "backbone.fc.bias": torch.ones(5)}
    if kernel == "full":
        official["learner.chm6d.param"] = state["learner.chm6d.param"].view(3, 3, 5, 5, 5, 5)
        official["learner.chm4d.weight"] = state["learner.chm4d.weight"].view(1, 1, 5, 5, 5, 5)
    return official


@pytest.fixture
def saved(tiny: CHM, tmp_path: Path) -> Callable[..., Path]:
    """``saved(change, matcher)`` writes a matcher as an official file after ``change(state)``."""

    def save(
        change: Callable[[dict[str, Tensor]], Any] = lambda state: None,
        matcher: CHM = tiny,
        kernel: str = "psi",
    ) -> Path:
        state = as_official(matcher.state_dict(), kernel)
        change(state)
        torch.save(state, tmp_path / "pas.pt")
        return tmp_path / "pas.pt"

    return save


@pytest.mark.parametrize("kind", KERNELS)
def test_an_official_file_is_taken_with_its_kernel(kind: str, saved: Callable[..., Path]) -> None:
    matcher = uneven(CHM(**TINY, kernel=kind, init="random")).eval()
    file = saved(matcher=matcher, kernel=kind)
    twin = nemf.build_matcher("chm", **TINY, weights=file)
    assert twin.weights_hash == matcher.weights_hash
    assert not twin.random_weights
    pair = tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]]
    np.testing.assert_array_equal(answer(twin, *pair), answer(matcher, *pair))


def test_the_official_keys(tiny: CHM, saved: Callable[..., Path]) -> None:
    state = torch.load(saved(), weights_only=True)
    shapes = {k: tuple(v.shape) for k, v in state.items() if k.startswith("learner.")}
    assert shapes == {
        **{f"learner.conv2ds.{k}.weight": (24, 96, 3, 3) for k in range(3)},
        **{f"learner.chm6d.param.{k}": (55,) for k in range(4)},
        **{"learner.chm6d.bias": (1,), "learner.chm4d.weight": (55,), "learner.chm4d.bias": (1,)},
    }
    assert tuple(state["backbone.conv1.weight"].shape) == (48, 3, 7, 7)


def test_the_two_halves_are_the_two_groups_of_the_official_trunk(tiny: CHM, saved: Any) -> None:
    """The official trunk runs over both images at once, in grouped convolutions."""

    state = torch.load(saved(), weights_only=True)
    single = tiny.backbone.query
    grouped = ResNet("resnet_small", single.upto)
    for name, module in list(grouped.named_modules()):
        parent = grouped.get_submodule(name.rpartition(".")[0])
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Conv2d):
            twice = nn.Conv2d(
                2 * module.in_channels, 2 * module.out_channels, module.kernel_size,
                module.stride, module.padding, groups=2, bias=False,
            )  # fmt: skip
            setattr(parent, last, twice)
        elif isinstance(module, nn.BatchNorm2d):
            setattr(parent, last, nn.BatchNorm2d(2 * module.num_features))
    trunk = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    grouped.load_state_dict({k: v for k, v in trunk.items() if k in grouped.state_dict()})
    grouped.eval()
    frames = [normalise(tiny_pixels(k, 96, 96)) for k in (1, 2)]
    twin = CHM(**TINY, weights=saved())
    with torch.no_grad():
        (together,) = grouped.taps(torch.cat(frames, 1), [6])
        (query,) = twin.backbone.query.taps(frames[0], [6])
        (reference,) = twin.backbone.reference.taps(frames[1], [6])
    torch.testing.assert_close(together, torch.cat([query, reference], 1), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_ours_comes_back(tiny: CHM, tmp_path: Path) -> None:
    torch.save({"state_dict": tiny.state_dict()}, tmp_path / "ours.pth")
    twin = CHM(**TINY, weights=tmp_path / "ours.pth")
    assert twin.weights_hash == tiny.weights_hash


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda s: s.pop("learner.chm6d.param.2"),
            r"this CHM on resnet_small: 1 missing \(learner.chm6d.param.2",
        ),
        (
            lambda s: s.pop("backbone.layer1.0.bn1.running_var"),
            "2 missing .backbone.query.layer1.0.bn1.running_var, backbone.reference",
        ),
        (lambda s: s.update({"learner.extra": torch.ones(2)}), "1 unexpected .learner.extra"),
        (
            lambda s: s.update({"backbone.layer9.weight": torch.ones(2)}),
            "2 unexpected .backbone.query.layer9.weight",
        ),
        (
            lambda s: s.update({"backbone.bn1.weight": torch.ones(6)}),
            r"2 misshapen .backbone.query.bn1.weight \(3,\) for \(24,\)",
        ),
        (
            lambda s: s.update({"learner.chm4d.bias": torch.full((1,), float("inf"))}),
            r"damaged: 1 not finite \(learner.chm4d.bias\)",
        ),
        (lambda s: s.pop("learner.chm4d.weight"), "is no CHM checkpoint: .* has 0 values"),
        (
            lambda s: s.update({"learner.chm4d.weight": torch.ones(54)}),
            r"has 54 values, not 55 \(psi\), 15 \(iso\), 625 \(full\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_explained(
    saved: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=rf"pas\.pt.*{complaint}"):
        CHM(**TINY, weights=saved(change))


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"kernel": "iso"}, "has kernel 'psi', not 'iso': leave kernel out"),
        ({"kernel": "round"}, "kernel must be one of psi, iso, full, not 'round'"),
        ({"backbone": "resnet18"}, "does not hold this CHM on resnet18"),
        ({"init": "random"}, "not both"),
        ({"input_size": 8}, "input_size must be at least 32 px"),
    ],
)
def test_keywords_that_disagree_with_the_file(
    saved: Callable[..., Path], keywords: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=complaint):
        CHM(**TINY | {"weights": saved()} | keywords)


def test_both_trunks_begin_alike(tmp_path: Path) -> None:
    trunk = build_backbone("resnet_small", init="random", upto=6, seed=5)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    matcher = CHM(**TINY, init="head", backbone_weights=tmp_path / "trunk.pth")
    for loaded in (matcher.backbone.query, matcher.backbone.reference):
        assert torch.equal(loaded.conv1.weight, trunk.conv1.weight)
        assert not loaded.is_random
    assert matcher.backbone.query.conv1.weight is not matcher.backbone.reference.conv1.weight
    assert matcher.random_weights  # the head


@pytest.mark.parametrize("kind", KERNELS)
def test_the_kernels_begin_with_their_centre_alone(kind: Any) -> None:
    """Under "iso" its weight is shared by all parallel offsets, of scales too."""
    learner = CHM(**TINY, kernel=kind, init="random").learner
    weight, kernel = learner.chm6d.weight(), learner.chm4d.kernel(learner.chm4d.weight)
    assert weight.sum().item() == pytest.approx(8)
    assert kernel.sum().item() == pytest.approx(40)
    shares = {"psi": (1, 1), "full": (1, 1), "iso": (75, 25)}[kind]
    assert weight[1, 1, 2, 2, 2, 2].item() == pytest.approx(8 / shares[0])
    assert kernel[2, 2, 2, 2].item() == pytest.approx(40 / shares[1])


# -- training -------------------------------------------------------------------------------------


def batch_of(n_pairs: int, side: int = 96) -> PairBatch:
    """Pairs of which the target is the source, shifted by a cell; the first has fewer keypoints."""
    samples = []
    for k in range(n_pairs):
        wide = texture(20 + k, side, side + 16)
        src, trg = (normalise(np.ascontiguousarray(x))[0] for x in (wide[:, 16:], wide[:, :-16]))
        kps = np.random.default_rng(k).uniform(4, side - 24, (2 + k, 2)).astype(np.float32)
        points = torch.from_numpy(kps)
        samples.append((src, trg, points, points + torch.tensor([16.0, 0]), k))
    return collate_pairs(samples)


def test_the_loss_is_the_mean_squared_distance_of_the_answers(tiny: CHM) -> None:
    batch = batch_of(3)
    apart = []
    with torch.no_grad():
        loss = tiny.loss(batch)["loss_keypoints"].item()
        for i in range(3):
            query = tiny.levels(batch.src[i : i + 1], "query")
            reference = tiny.levels(batch.trg[i : i + 1], "reference")
            (scores,) = tiny.scores(query, reference)
            for k in range(2 + i):
                found = tiny.transfer(batch.src_kps[i, k : k + 1], scores)[0]
                apart.append(float(((found - batch.trg_kps[i, k]) / 48).square().sum()))
    assert len(apart) == 9
    assert loss == pytest.approx(np.mean(apart), rel=1e-5)
    assert tiny.supervised(batch)["loss_keypoints"].item() == 9


def test_training_learns_a_pair_by_heart() -> None:
    matcher = CHM(**TINY, init="random").train()
    batch = batch_of(2)
    optimiser = torch.optim.Adam([p for p in matcher.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for _ in range(25):
        loss = matcher.loss(batch)["loss_keypoints"]
        seen.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert seen[-1] < 0.3 * seen[0]
