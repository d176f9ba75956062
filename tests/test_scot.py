"""SCOT: the transport and the class maps against NumPy, the whole method in one piece."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.hpf import HyperpixelFlow
from baselines.hyperpixels import CellGrid
from baselines.scot import SCOT, cell_weights, class_map, transport
from nemf.backbones import build_backbone, normalise
from nemf.errors import NemfError, WeightsNotFound
from nemf.matcher import build_matcher
from nemf.pairs import Image
from tests.conftest import willow_pck
from tests.test_hpf import boxes_of, dense_features, naive_hough, picture

SMALL = {"backbone": "resnet_small", "layers": (4, 6), "init": "random"}


@pytest.fixture(scope="module")
def small() -> SCOT:
    return SCOT(**SMALL).eval()


def naive_transport(cosine: np.ndarray, mu: np.ndarray, nu: np.ndarray, epsilon: float):
    """One Sinkhorn step with matrices, masses already normalised."""
    kernel = np.exp(-(1 - cosine) / epsilon)
    a = np.full((len(mu), 1), 1 / len(mu))
    b = nu[:, None] / (kernel.T @ a)
    a = mu[:, None] / (kernel @ b)
    return np.diag(a[:, 0]) @ kernel @ np.diag(b[:, 0])


# -- transport ------------------------------------------------------------------------------------


def test_transport_by_hand() -> None:
    """Kernel ((1, q), (q, 1)) with q = 1/e: both scalings are even, the plan is kernel / 2(1+q)."""
    q = math.exp(-1)
    plan = transport(torch.eye(2), torch.ones(2), torch.ones(2), epsilon=1)
    np.testing.assert_allclose(plan, np.array([[1, q], [q, 1]]) / (2 * (1 + q)), rtol=1e-6)


def test_a_heavier_cell_receives_more() -> None:
    """All cells alike: what a row sends is shared out by the weights of the references."""
    plan = transport(torch.full((2, 3), 0.7), torch.tensor([1.0, 3]), torch.tensor([1.0, 1, 2]))
    expected = np.outer([0.25, 0.75], [0.25, 0.25, 0.5])
    np.testing.assert_allclose(plan, expected, rtol=1e-6)


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([0.05, 0.1, 1.0]),
    st.integers(0, 2**16),
)
def test_transport_equals_matrices(n: int, m: int, epsilon: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cosine = rng.uniform(0, 1, (n, m)).astype(np.float32)
    masses = [rng.choice([0.5, 0.8, 0.9, 1.0], k).astype(np.float32) for k in (n, m)]
    given_cosine = torch.from_numpy(cosine.copy())
    plan = transport(given_cosine, *map(torch.from_numpy, masses), epsilon=epsilon)
    mu, nu = (mass.astype(np.float64) / mass.sum() for mass in masses)
    expected = naive_transport(cosine.astype(np.float64), mu, nu, epsilon)
    np.testing.assert_allclose(plan, expected, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(plan.sum(1), mu, rtol=1e-5)
    assert np.array_equal(given_cosine, cosine)


def test_one_step_leaves_the_columns_rough() -> None:
    """Both queries want the first reference; its column ends far from its share."""
    cosine = torch.tensor([[1.0, 0.9], [1.0, 0.2]])
    plan = transport(cosine, torch.ones(2), torch.ones(2))
    np.testing.assert_allclose(plan.sum(1), [0.5, 0.5], rtol=1e-6)
    assert abs(float(plan[:, 0].sum()) - 0.5) > 0.1


def test_epsilon_doubles_until_the_plan_is_a_number() -> None:
    """exp(-1 / 0.008) is 0 in float32, exp(-1 / 0.016) is not."""
    cosine = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    ones = torch.ones(2)
    plan = transport(cosine, ones, ones, epsilon=0.001)
    assert torch.equal(plan, transport(cosine, ones, ones, epsilon=0.016))
    np.testing.assert_allclose(plan.sum(1), [0.5, 0.5], rtol=1e-6)


def test_a_likeness_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        transport(torch.tensor([[1.0, math.nan]]), torch.ones(1), torch.ones(2))


# -- class maps -----------------------------------------------------------------------------------


def naive_resize(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(C, h, w) to (C, *size): bilinear, the corner cells keep their place."""
    for axis, new in ((1, size[0]), (2, size[1])):
        old = maps.shape[axis]
        at = np.linspace(0, old - 1, new) if new > 1 else np.zeros(1)
        low = np.minimum(at.astype(int), max(old - 2, 0))
        high = np.minimum(low + 1, old - 1)
        share = (at - low).reshape([-1 if k == axis else 1 for k in range(3)])
        maps = maps.take(low, axis) * (1 - share) + maps.take(high, axis) * share
    return maps


def naive_class_map(matcher: SCOT, pixels: torch.Tensor) -> np.ndarray:
    height, width = pixels.shape[2:]
    once = pixels[0].double().numpy()
    half_more = naive_resize(once, (int(1.5 * height), int(1.5 * width)))
    twice = naive_resize(half_more, (2 * height, 2 * width))
    weight = matcher.backbone.fc.weight.double().numpy()
    bias = matcher.backbone.fc.bias.double().numpy()
    total = np.zeros((height, width))
    for image in (once, half_more, twice):
        (tap,) = matcher.backbone.taps(torch.from_numpy(image).float()[None], [6])
        features = np.maximum(tap[0].double().numpy(), 0)
        logits = weight @ features.mean((1, 2)) + bias
        maps = []
        for k in np.argsort(logits)[-2:]:
            raw = np.tensordot(weight[k], features, 1)
            raw = naive_resize(raw[None], (height, width))[0]
            maps.append((raw - raw.min()) / raw.max())
        total += np.maximum(*maps)
    return total / (total.max() + 1e-5)


def test_class_map_equals_numpy(small: SCOT) -> None:
    pixels = normalise(picture(0, 61, 84))
    before = pixels.clone()
    got = class_map(small.backbone, pixels)
    assert torch.equal(pixels, before)
    assert got.shape == (61, 84)
    np.testing.assert_allclose(got, naive_class_map(small, pixels), atol=1e-4)


def test_the_bias_chooses_the_classes_but_is_not_in_the_map() -> None:
    matcher = SCOT(**SMALL).eval()
    pixels = normalise(picture(1, 48, 64))
    plain = class_map(matcher.backbone, pixels)
    matcher.backbone.fc.bias.fill_(5)
    assert torch.equal(class_map(matcher.backbone, pixels), plain)
    matcher.backbone.fc.bias[[3, 8]] = 100
    assert not torch.allclose(class_map(matcher.backbone, pixels), plain, atol=1e-2)
    np.testing.assert_allclose(
        class_map(matcher.backbone, pixels), naive_class_map(matcher, pixels), atol=1e-4
    )


def test_weights_by_hand() -> None:
    """Cells at (0, 0), (4, 0), (8, 0) and a row below; thresholds are exceeded, not met."""
    activation = torch.zeros(6, 10)
    activation[0, [0, 4, 8]] = torch.tensor([0.4, 0.41, 0.5])
    activation[4, [0, 4, 8]] = torch.tensor([0.6, 0.61, math.nan])
    mass = cell_weights(activation, CellGrid(2, 3, 4, 11, (6, 10)))
    np.testing.assert_allclose(mass, [0.5, 0.8, 0.8, 0.9, 1.0, 0.5])


def test_every_cell_of_any_frame_has_a_weight(small: SCOT) -> None:
    for height, width in ((300, 1), (7, 300), (299, 301)):
        pixels = np.full((height, width, 3), 99, np.uint8)
        (features,) = small.encode([Image.from_pixels(pixels)], "query")
        assert features.mass.shape == features.norms.shape
        assert set(features.mass.tolist()) <= {0.5, np.float32(0.8), np.float32(0.9), 1.0}


def test_class_maps_need_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = build_backbone("resnet_small", init="random", upto=6).state_dict()
    torch.save(state, tmp_path / "resnet_small.pth")
    trunk = {"backbone": "resnet_small", "layers": (4, 6)}
    with pytest.raises(NemfError, match=r"fc\.weight.*classmap=False does without") as refused:
        SCOT(**trunk, weights=tmp_path / "resnet_small.pth")
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("NEMF_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsNotFound, match="classmap=False does without"):
        SCOT(**trunk)
    matcher = SCOT(**trunk, classmap=False).eval()
    (features,) = matcher.encode([Image.from_pixels(picture(2, 40, 60))], "query")
    assert features.mass.unique().tolist() == [1]
    monkeypatch.setenv("NEMF_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(NemfError, match=r"not a folder: correct or unset it$"):
        SCOT(**trunk)


# -- the whole method -----------------------------------------------------------------------------


def naive_answer(
    matcher: SCOT, images: tuple[np.ndarray, np.ndarray], points: np.ndarray
) -> np.ndarray:
    """SCOT as its specification reads, in one piece; layer 4 has jump 8 and field 99."""
    boxes, features, masses, ratios, sizes = [], [], [], [], []
    for pixels in images:
        height, width = pixels.shape[:2]
        ratio = 300 / max(height, width)
        size = (int(height * ratio), int(width * ratio))
        pixels = F.interpolate(normalise(pixels), size, mode="bilinear", align_corners=False)
        dense = dense_features(matcher, pixels)
        y, x = np.mgrid[: dense.shape[0], : dense.shape[1]].reshape(2, -1) * 8
        boxes.append(np.stack([x - 49, y - 49, x + 49, y + 49], 1).astype(np.float32))
        features.append(dense.flatten(0, 1).double().numpy())
        seen = naive_class_map(matcher, pixels)[y, x]
        steps = [seen > 0.6, seen > 0.5, seen > 0.4]
        masses.append(np.select(steps, [1, 0.9, 0.8], 0.5))
        ratios.append(ratio)
        sizes.append(size)
    units = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in features]
    mu, nu = (mass / mass.sum() for mass in masses)
    plan = naive_transport(np.maximum(units[0] @ units[1].T, 0), mu, nu, 0.05)
    votes = (len(plan) * plan) ** matcher.exponent
    best = naive_hough(votes, *boxes, *sizes).argmax(1)
    answers = []
    for point in points * ratios[0]:
        over = (boxes[0][:, :2] <= point).all(1) & (point <= boxes[0][:, 2:]).all(1)
        moved = boxes[1][best[over], :2] + point - boxes[0][over, :2]
        answers.append(moved.mean(0) / ratios[1])
    return np.array(answers)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_equals_the_method_in_one_piece(exponent: float) -> None:
    """One image is enlarged, the other shrunk."""
    matcher = SCOT(**SMALL, exponent=exponent).eval()
    images = picture(0, 45, 90), picture(1, 400, 320)
    points = np.random.default_rng(2).uniform(0, [89, 44], (12, 2)).astype(np.float32)
    q, r = matcher.encode([Image.from_pixels(i) for i in images], "query")
    assert (q.ratio, r.ratio) == (300 / 90, 300 / 400)
    assert (q.grid.size, r.grid.size) == ((150, 300), (300, 240))
    assert len(boxes_of(q.grid)) == 19 * 38  # nothing is pruned
    assert len(set(q.mass.tolist()) | set(r.mass.tolist())) > 1
    (got,) = matcher.match([q], [r], [torch.from_numpy(points)])
    assert got.points.dtype == torch.float32
    np.testing.assert_allclose(got.points, naive_answer(matcher, images, points), atol=1e-2)


def test_the_size_of_an_image_does_not_matter(small: SCOT) -> None:
    """Pixel-doubled images below 300 px are brought to one size, so the answers double."""
    pixels = picture(3, 60, 100), picture(4, 75, 50)
    points = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)) * 50
    answers = []
    for factor in (1, 2):
        images = [Image.from_pixels(p.repeat(factor, 0).repeat(factor, 1)) for p in pixels]
        q, r = small.encode(images, "query")
        assert (q.grid.size, r.grid.size) == ((180, 300), (300, 200))
        answers.append(small.match([q], [r], [points * factor])[0].points / factor)
    assert float((answers[0] - answers[1]).abs().median()) < 1


def test_finds_itself_as_hpf_does() -> None:
    image = Image.from_pixels(np.random.default_rng(5).integers(0, 256, (210, 300, 3), np.uint8))
    points = torch.tensor([[60.0, 70], [150, 110], [222.5, 140.25]])
    for matcher in (SCOT(**SMALL).eval(), HyperpixelFlow(**SMALL).eval()):
        (features,) = matcher.encode([image], "query")
        (found,) = matcher.match([features], [features], [points])
        torch.testing.assert_close(found.points, points, rtol=0, atol=1e-3)


def test_where_nothing_differs_every_vote_is_the_same() -> None:
    matcher = SCOT(**SMALL, classmap=False).eval()
    (features,) = matcher.encode([Image.from_pixels(picture(6, 40, 50))], "query")
    alike = [level.zero_().add_(1) for level in features.levels]
    features.norms.fill_(math.sqrt(sum(len(level) for level in alike)))
    votes = matcher.votes(features, features)
    torch.testing.assert_close(votes, torch.full_like(votes, len(votes) ** -0.5))


def test_a_batch_equals_its_pairs_and_changes_nothing(small: SCOT) -> None:
    features = small.encode([Image.from_pixels(picture(s, 70 + 5 * s, 80)) for s in range(3)], "q")
    copies = [(f.mass.clone(), f.norms.clone(), [x.clone() for x in f.levels]) for f in features]
    points = [torch.rand(n, 2) * 60 for n in (3, 0)]
    together = small.match(features[:2], features[1:], points)
    for i in range(2):
        (alone,) = small.match([features[i]], [features[i + 1]], [points[i]])
        assert torch.equal(alone.points, together[i].points)
    for f, (mass, norms, levels) in zip(features, copies, strict=True):
        assert torch.equal(f.mass, mass)
        assert torch.equal(f.norms, norms)
        assert all(torch.equal(a, b) for a, b in zip(f.levels, levels, strict=True))
    with pytest.raises(ValueError, match="zip"):
        small.match(features[:2], features[:3], points)


@pytest.mark.parametrize("exponent", [0, -1, math.nan])
def test_refuses_exponents(exponent: float) -> None:
    with pytest.raises(NemfError, match="exponent must be positive"):
        build_matcher("scot", **SMALL, exponent=exponent)


def test_defaults_are_the_papers() -> None:
    matcher = build_matcher("scot", init="random")
    assert matcher.layers == (2, 22, 24, 25, 27, 28, 29)
    assert matcher.exponent == 0.5
    assert matcher.classmap
    assert matcher.backbone.fc.weight.shape == (1000, 2048)
    assert build_matcher("scot", init="random", classmap=False).backbone.upto == 29


# -- the benchmark --------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.long
def test_pck_on_pfwillow(shared: Path) -> None:
    """ResNet-18 without class maps, canonical PCK at .05/.10/.15, all 900 pairs. (HPF, same layers:
    30.0/56.5/72.8.)"""
    weights = shared / "weights" / "resnet18_imagenet_to_layer3.pth"
    matcher = SCOT("resnet18", (4, 6), weights=weights, classmap=False).eval()
    np.testing.assert_allclose(willow_pck(matcher, shared), (32.6, 60.8, 77.6), atol=0.5)
