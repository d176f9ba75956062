"""Nearest neighbour: loops on handmade maps, exact shifts and frames, real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.nearest import NearestFeatures, NearestNeighbour
from nemf.datasets.pfwillow import PFWillow
from nemf.errors import NemfError
from nemf.matcher import build_matcher
from nemf.pairs import Image, Matches
from tests.conftest import willow_pck

SMALL = {"backbone": "resnet_small", "init": "random"}


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) noise: no two places look alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def ask(
    matcher: NearestNeighbour, query: np.ndarray | Image, reference: np.ndarray | Image, points
) -> Matches:
    images = [i if isinstance(i, Image) else Image.from_pixels(i) for i in (query, reference)]
    q, r = matcher.encode(images, "query")
    return matcher.match([q], [r], [torch.tensor(points, dtype=torch.float32)])[0]


def unit_map(seed: int, height: int, width: int, channels: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(channels, height, width, generator=generator), dim=0)


# -- geometry -------------------------------------------------------------------------------------


def test_follows_a_translation_by_whole_cells() -> None:
    """Interior cells of two crops see the same pixels, so they answer exactly."""
    big, (dx, dy) = picture(0, 352, 384), (48, 32)
    matcher = NearestNeighbour(**SMALL, layers=(4,), input_size=None).eval()
    query, reference = big[: 352 - dy, : 384 - dx], big[dy:, dx:]
    centres = np.array([[3.5 + 8 * 20, 3.5 + 8 * 20], [3.5 + 8 * 23, 3.5 + 8 * 17]])
    answer = ask(matcher, query, reference, centres).points.numpy()
    np.testing.assert_allclose(answer, centres - [dx, dy], atol=1e-4)


def test_cells_are_centred_in_their_tiles_of_the_original_image() -> None:
    """A 200x120 image squashed to 64x64, layer3.1: 4x4 cells of 50x30 px."""
    matcher = NearestNeighbour(**SMALL, input_size=64).eval()
    x, y = np.meshgrid(24.5 + 50 * np.arange(4), 14.5 + 30 * np.arange(4))
    centres = np.stack([x.ravel(), y.ravel()], 1)
    image = picture(1, 120, 200)
    answer = ask(matcher, image, image, centres)
    np.testing.assert_allclose(answer.points.numpy(), centres, atol=1e-4)
    np.testing.assert_allclose(answer.confidence.numpy(), 1, atol=1e-5)
    off_centre = ask(matcher, image, image, centres + [10, -6]).points.numpy()
    np.testing.assert_allclose(off_centre, centres, atol=1e-4)


@pytest.mark.parametrize("input_size", [None, 64])
def test_canvas_is_the_padded_image_in_the_same_coordinates(input_size: int | None) -> None:
    matcher = NearestNeighbour(**SMALL, input_size=input_size).eval()
    pixels, canvas = picture(2, 70, 90), (110, 100)
    padded = np.zeros((*canvas, 3), np.uint8)
    padded[:70, :90] = pixels
    a, b = matcher.encode([Image(pixels, "a" * 64, canvas), Image.from_pixels(padded)], "reference")
    assert torch.equal(a.map, b.map)
    assert (a.first_px, a.step_px) == (b.first_px, b.step_px)
    if input_size:
        assert a.step_px == (16 * 100 / 64, 16 * 110 / 64)


def test_layers_are_brought_to_the_finest_and_normalised_together() -> None:
    matcher = NearestNeighbour(**SMALL, layers=(1, 3, 6), input_size=None).eval()
    (features,) = matcher.encode([Image.from_pixels(picture(3, 64, 96))], "query")
    assert features.map.shape == (24 + 48 + 96, 16, 24)
    assert features.step_px == (4, 4)
    torch.testing.assert_close(features.map.square().sum(0), torch.ones(16, 24))


# -- matching against loops -----------------------------------------------------------------------


def oracle(
    query: NearestFeatures, reference: NearestFeatures, point: np.ndarray, window: int | None
) -> tuple[np.ndarray, float, bool]:
    """Answer in px, cosine of the best cell, and whether it maps back within a cell."""
    a, b = query.map.double().numpy(), reference.map.double().numpy()
    h, w = a.shape[1:]
    x, y = (point - query.first_px) / np.array(query.step_px)
    xc, yc = np.clip(x, 0, w - 1), np.clip(y, 0, h - 1)
    x0, y0 = min(int(xc), max(w - 2, 0)), min(int(yc), max(h - 2, 0))
    feature = np.zeros(len(a))
    for row, col in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        share = max(0, 1 - abs(xc - col)) * max(0, 1 - abs(yc - row))
        if share:
            feature += share * a[:, row, col]
    feature /= np.linalg.norm(feature)
    cosine = {(c, r): feature @ b[:, r, c] for r in range(b.shape[1]) for c in range(b.shape[2])}
    best = max(cosine, key=cosine.__getitem__)
    answer = np.array(best, float)
    if window:
        near = [k for k in cosine if max(abs(k[0] - best[0]), abs(k[1] - best[1])) <= window // 2]
        weight = np.array([np.exp((cosine[k] - cosine[best]) / 0.02) for k in near])
        answer = weight @ np.array(near, float) / weight.sum()
    back = {(c, r): b[:, best[1], best[0]] @ a[:, r, c] for r in range(h) for c in range(w)}
    home = max(back, key=back.__getitem__)
    mutual = abs(home[0] - x) <= 1 and abs(home[1] - y) <= 1
    return answer * reference.step_px + reference.first_px, cosine[best], mutual


@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("sizes", [((6, 7), (5, 9)), ((3, 1), (1, 4)), ((1, 1), (2, 2))])
def test_equals_loops(window: int | None, sizes: tuple) -> None:
    query = NearestFeatures(unit_map(0, *sizes[0]), (3.5, 2.5), (8.0, 6.0))
    reference = NearestFeatures(unit_map(1, *sizes[1]), (1.0, 2.0), (4.0, 5.0))
    points = np.random.default_rng(2).uniform(-5, 60, (30, 2)).astype(np.float32)
    expected = [oracle(query, reference, p, window) for p in points]
    for mutual in (False, True):
        matcher = NearestNeighbour(**SMALL, window=window, mutual=mutual).eval()
        (got,) = matcher.match([query], [reference], [torch.tensor(points)])
        np.testing.assert_allclose(got.points, [e[0] for e in expected], atol=2e-3)
        confidence = [e[1 + mutual] for e in expected]
        np.testing.assert_allclose(got.confidence, confidence, atol=1e-5)


def test_mutual_check_rejects_a_match_that_belongs_elsewhere() -> None:
    """Query cells a at 0 and b at 2; the reference shows only b, with a hint of a."""
    a, b, nothing = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    mixed = [0.28, 0.96, 0.0]
    query = NearestFeatures(torch.tensor([[a, nothing, b]]).permute(2, 0, 1), (0, 0), (1, 1))
    reference = NearestFeatures(torch.tensor([[nothing, mixed]]).permute(2, 0, 1), (0, 0), (1, 1))
    matcher = NearestNeighbour(**SMALL, mutual=True).eval()
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    (got,) = matcher.match([query], [reference], [points])
    assert got.points.tolist() == [[1, 0], [1, 0]]
    assert got.confidence.tolist() == [0, 1]


# -- contract -------------------------------------------------------------------------------------


def test_a_batch_equals_its_pairs_and_changes_nothing() -> None:
    matcher = NearestNeighbour(**SMALL, layers=(4, 6), input_size=96, window=3).eval()
    images = [Image.from_pixels(picture(s, 60 + 7 * s, 80)) for s in range(4)]
    copies = [i.pixels.copy() for i in images]
    features = matcher.encode(images, "query")
    maps = [f.map.clone() for f in features]
    points = [torch.rand(n, 2) * 50 for n in (3, 0, 5)]
    kept = [p.clone() for p in points]
    together = matcher.match(features[:3], features[1:], points)
    for i in range(3):
        q, r = matcher.encode([images[i]], "query"), matcher.encode([images[i + 1]], "reference")
        (alone,) = matcher.match(q, r, [points[i]])
        assert torch.equal(alone.points, together[i].points)
        assert alone.points.shape == points[i].shape
        assert alone.confidence.shape == (len(points[i]),)
        assert alone.points.dtype == torch.float32
    assert all(np.array_equal(i.pixels, c) for i, c in zip(images, copies, strict=True))
    assert all(torch.equal(f.map, m) for f, m in zip(features, maps, strict=True))
    assert all(torch.equal(p, k) for p, k in zip(points, kept, strict=True))
    with pytest.raises(ValueError, match="zip"):
        matcher.match(features[:2], features[:3], points)


def test_defaults_and_origin_of_weights() -> None:
    matcher = build_matcher("nearest", backbone="resnet_small", init="random")
    assert matcher.layers == (6,)
    assert matcher.random_weights
    assert not matcher.training
    assert build_matcher("nearest", backbone="resnet50", init="random").layers == (13,)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layers": (6, 4)}, "increasing ids"),
        ({"layers": 6}, "increasing ids"),
        ({"window": 4}, "odd number of cells or None, not 4"),
        ({"window": 0}, "odd number"),
        ({"input_size": 0}, "input_size must be at least 1"),
        ({"backbone": "vgg"}, "unknown backbone 'vgg'"),
        ({"size": 3}, "'size'"),
    ],
)
def test_refuses(keywords: dict, message: str) -> None:
    with pytest.raises(NemfError, match=message):
        build_matcher("nearest", **(SMALL | keywords))


# -- real photographs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18(shared: Path) -> dict:
    return {
        "backbone": "resnet18",
        "weights": shared / "weights" / "resnet18_imagenet_to_layer3.pth",
    }


@pytest.mark.real
@pytest.mark.parametrize(("layer", "jump_px"), [(4, 8), (6, 16)])
def test_cell_centres_show_no_bias_in_a_mirror(
    resnet18: dict, shared: Path, layer: int, jump_px: int
) -> None:
    """An image against its mirror image: a wrong centre would shift answers by twice its error."""
    dataset = PFWillow(shared / "data")
    matcher = NearestNeighbour(**resnet18, layers=(layer,), input_size=None, window=5).eval()
    shifts = []
    for record in dataset.images[:30]:
        height, width = (side // 16 * 16 for side in record.size)
        pixels = dataset.pixels(record)[:height, :width]
        x, y = np.meshgrid(np.linspace(0.3, 0.7, 7) * width, np.linspace(0.3, 0.7, 7) * height)
        points = np.stack([x.ravel(), y.ravel()], 1)
        answer = ask(matcher, pixels, np.ascontiguousarray(pixels[:, ::-1]), points).points.numpy()
        shifts.append(answer - np.stack([width - 1 - points[:, 0], points[:, 1]], 1))
    found = np.concatenate(shifts)
    found = found[np.abs(found).max(1) < 1.5 * jump_px]
    assert len(found) > 400
    assert np.abs(np.median(found, 0)).max() / 2 < 0.2 * jump_px


@pytest.mark.real
@pytest.mark.parametrize(
    ("keywords", "expected"),
    [({}, (24.5, 47.4, 58.4)), ({"layers": (4, 6), "window": 5}, (33.6, 50.3, 58.5))],
)
def test_pck_on_pfwillow(resnet18: dict, shared: Path, keywords: dict, expected: tuple) -> None:
    """Canonical PCK at .05/.10/.15, all 900 pairs. (Copying gives 12.2/27.0/41.7.)"""
    got = willow_pck(NearestNeighbour(**resnet18, **keywords).eval(), shared)
    np.testing.assert_allclose(got, expected, atol=0.5)
