"""DINOv2 nearest neighbour: every read-out against loops, both frames, and the whole method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.dinov2_nn import LETTERBOXED, SQUASHED, DinoFeatures, DinoNearest
from nemf.backbones import normalise
from nemf.dinov2 import build_dinov2
from nemf.errors import NemfError, WeightsNotFound
from nemf.matcher import build_matcher
from nemf.pairs import Image

TINY = {"backbone": "dinov2_tiny", "init": "random", "input_size": 112}
SIDE, CELLS = 112, 8


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) noise: no two places look alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def unit_map(seed: int, channels: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(channels, CELLS, CELLS, generator=generator), dim=0)


# -- read-outs against loops ----------------------------------------------------------------------


def softmax_mean(values: dict[tuple[int, int], float], temperature: float) -> np.ndarray:
    """Mean (column, row) weighted by the softmax of values by (row, column)."""
    top = max(values.values())
    weight = {k: np.exp((v - top) / temperature) for k, v in values.items()}
    total = sum(weight.values())
    return np.array([sum(w * k[axis] for k, w in weight.items()) / total for axis in (1, 0)])


def oracle(readout: str, a: np.ndarray, b: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Answer in px of the 112x112 input to a query in px of the same."""

    def cosines(feature: np.ndarray) -> dict[tuple[int, int], float]:
        return {(r, c): float(feature @ b[:, r, c]) for r in range(CELLS) for c in range(CELLS)}

    if readout in LETTERBOXED:
        col, row = (min(max(int(v / SIDE * CELLS), 0), CELLS - 1) for v in point)
        values = cosines(a[:, row, col])
        best = max(values, key=values.__getitem__)
        if readout == "sd-dino":
            return np.array([best[1] * 14 + 6.5, best[0] * 14 + 6.5])
        for k in values:
            if max(abs(k[0] - best[0]), abs(k[1] - best[1])) > 5:
                values[k] = 0.0
        return softmax_mean(values, 0.02) * 14 + 7

    x, y = np.clip(np.floor(point), 1e-4, SIDE - 1 - 1e-4) * (CELLS - 1) / (SIDE - 1)
    x0, y0 = int(x), int(y)
    corners = {
        (y0 + dy, x0 + dx): abs(1 - dx - (x - x0)) * abs(1 - dy - (y - y0))
        for dx in (0, 1)
        for dy in (0, 1)
    }
    if readout == "bilinear":
        answer = np.zeros(2)
        for (row, col), share in corners.items():
            values = cosines(a[:, row, col])
            best = max(values, key=values.__getitem__)
            answer += share * np.array([best[1], best[0]])
        return answer * (SIDE - 1) / (CELLS - 1)
    feature = sum(share * a[:, row, col] for (row, col), share in corners.items())
    values = cosines(feature / (np.linalg.norm(feature) + 1e-6))
    best = max(values, key=values.__getitem__)
    if readout == "nn":
        cell = np.array([best[1], best[0]], float)
    else:
        if readout == "kernelsoftmax":
            for k in values:
                squared = (k[0] - best[0]) ** 2 + (k[1] - best[1]) ** 2
                values[k] *= np.exp(-squared / (2 * 7**2))
        cell = softmax_mean(values, 0.03)
    return cell * (SIDE - 1) / (CELLS - 1)


@pytest.mark.parametrize("readout", LETTERBOXED + SQUASHED)
def test_readout_equals_loops(readout: str) -> None:
    matcher = DinoNearest(**TINY, readout=readout).eval()
    query, reference = (DinoFeatures(unit_map(s), (0, 0), (1, 1)) for s in (0, 1))
    points = np.random.default_rng(2).uniform(-3, SIDE + 2, (40, 2)).astype(np.float32)
    points[:4] = [[0, 0], [111, 111], [14, 28], [13.99, 27.99]]
    maps = query.map.double().numpy(), reference.map.double().numpy()
    expected = [oracle(readout, *maps, p) for p in points.astype(np.float64)]
    (got,) = matcher.match([query], [reference], [torch.from_numpy(points)])
    assert got.points.dtype == torch.float32
    np.testing.assert_allclose(got.points, expected, atol=2e-3)
    assert got.confidence.shape == (40,)
    assert (got.confidence <= 1 + 1e-5).all()


def test_what_lies_outside_the_window_still_counts() -> None:
    """GeoAware-SC sets cosines outside to 0, not to minus infinity: where the best is barely above
    0, the answer is drawn to the middle of the map."""
    matcher = DinoNearest(**TINY, readout="geoaware").eval()
    query = torch.zeros(2, CELLS, CELLS)
    query[0] = 1
    weak = torch.zeros(2, CELLS, CELLS)
    weak[0, 0, 0] = 0.001
    features = [DinoFeatures(m, (0, 0), (1, 1)) for m in (query, weak)]
    (got,) = matcher.match(features[:1], features[1:], [torch.tensor([[3.0, 3.0]])])
    assert float(got.points[0, 0]) == pytest.approx(3.5 * 14 + 7, abs=1)
    weak[0, 0, 0] = 1
    (got,) = matcher.match(features[:1], features[1:], [torch.tensor([[3.0, 3.0]])])
    assert got.points[0].tolist() == pytest.approx([7, 7], abs=1e-3)


# -- frames ---------------------------------------------------------------------------------------


def test_letterbox_by_hand() -> None:
    """60x90 to longer side 112: 75x112 (round 74.67), 18 black rows above."""
    matcher = DinoNearest(**TINY, readout="sd-dino").eval()
    pixels = picture(0, 60, 90)
    (features,) = matcher.encode([Image.from_pixels(pixels)], "query")
    assert features.first_px == (0, 18)
    assert features.factor == (112 / 90, 112 / 90)
    square = np.zeros((112, 112, 3), np.uint8)
    square[18:93] = PIL.Image.fromarray(pixels).resize((112, 75), PIL.Image.Resampling.LANCZOS)
    backbone = build_dinov2("dinov2_tiny", init="random")
    expected = backbone.features(normalise(square), normed=False)[0]
    torch.testing.assert_close(features.map, F.normalize(expected, dim=0))
    points = torch.tensor([[0.0, 0], [45, 30]])
    expected = [[0, 18], [45 * 112 / 90, 30 * 112 / 90 + 18]]
    np.testing.assert_allclose(features.to_input(points), expected, rtol=1e-6)
    torch.testing.assert_close(features.to_image(features.to_input(points)), points)


def test_squash_by_hand() -> None:
    """Corner pixels keep their place; features come after the last norm."""
    matcher = DinoNearest(**TINY, readout="nn").eval()
    pixels = picture(1, 40, 90)
    (features,) = matcher.encode([Image.from_pixels(pixels)], "query")
    corners = torch.tensor([[0.0, 0], [89, 39], [44.5, 19.5]])
    expected = [[0, 0], [111, 111], [55.5, 55.5]]
    np.testing.assert_allclose(features.to_input(corners), expected, rtol=1e-6)
    backbone = build_dinov2("dinov2_tiny", init="random")
    squashed = F.interpolate(normalise(pixels), (112, 112), mode="bilinear", antialias=True)
    expected = backbone.features(squashed, normed=True)[0]
    torch.testing.assert_close(features.map, expected / (expected.norm(dim=0) + 1e-6))


@pytest.mark.parametrize("readout", ["sd-dino", "nn"])
def test_canvas_is_the_padded_image(readout: str) -> None:
    matcher = DinoNearest(**TINY, readout=readout).eval()
    pixels, canvas = picture(2, 70, 90), (110, 100)
    padded = np.zeros((*canvas, 3), np.uint8)
    padded[:70, :90] = pixels
    a, b = matcher.encode([Image(pixels, "a" * 64, canvas), Image.from_pixels(padded)], "query")
    assert torch.equal(a.map, b.map)
    assert (a.first_px, a.factor) == (b.first_px, b.factor)


# -- the whole method -----------------------------------------------------------------------------


@pytest.mark.parametrize("readout", LETTERBOXED)
def test_an_image_finds_itself(readout: str) -> None:
    """To within a patch, of which 8 span the longer side."""
    matcher = DinoNearest(**TINY, readout=readout).eval()
    points = torch.tensor([[20.0, 30], [64, 48], [100, 70]])
    (features,) = matcher.encode([Image.from_pixels(picture(3, 96, 128))], "query")
    (got,) = matcher.match([features], [features], [points])
    assert ((got.points - points).abs() <= 16).all()


@pytest.mark.parametrize("readout", ["nn", "bilinear"])
def test_corners_find_themselves(readout: str) -> None:
    matcher = DinoNearest(**TINY, readout=readout).eval()
    corners = torch.tensor([[0.0, 0], [127, 0], [0, 95], [127, 95]])
    (features,) = matcher.encode([Image.from_pixels(picture(3, 96, 128))], "query")
    (got,) = matcher.match([features], [features], [corners])
    torch.testing.assert_close(got.points, corners, rtol=0, atol=1e-2)


def test_queries_of_the_visual_ai_readout_are_rounded_down() -> None:
    matcher = DinoNearest(**TINY, readout="bilinear").eval()
    features = matcher.encode([Image.from_pixels(picture(s, 50, 60)) for s in (4, 5)], "query")
    points = torch.tensor([[10.0, 20], [10.9, 20.9], [11, 20]])
    (got,) = matcher.match(features[:1], features[1:], [points])
    assert torch.equal(got.points[0], got.points[1])
    assert not torch.equal(got.points[0], got.points[2])


@pytest.mark.parametrize("size", [(1, 700), (1, 1), (300, 2)])
@pytest.mark.parametrize("readout", ["geoaware", "softmax"])
def test_extreme_shapes(readout: str, size: tuple[int, int]) -> None:
    matcher = DinoNearest(**TINY, readout=readout).eval()
    sliver = Image.from_pixels(picture(6, *size))
    other = Image.from_pixels(picture(7, 40, 50))
    q, r = matcher.encode([sliver, other], "query")
    points = torch.zeros(1, 2)
    assert matcher.match([q], [r], [points])[0].points.isfinite().all()
    assert matcher.match([r], [q], [points])[0].points.isfinite().all()


def test_fine_tuned_blocks_change_the_features(tmp_path: Path) -> None:
    donor = build_dinov2("dinov2_tiny", init="random", seed=1)
    tensors = []
    for block in donor.blocks[1:]:
        qkv = block.attn.qkv
        tensors += [block.norm1.weight, block.norm1.bias]
        for weight, bias in zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            tensors += [weight.clone(), bias.clone()]
        for module in (block.attn.proj, block.ls1, block.norm2, block.mlp.fc1, block.mlp.fc2):
            tensors += list(module.parameters())
        tensors += [block.ls2.gamma]
    path = tmp_path / "best_weights.pt"
    torch.save({"dino": tensors}, path)
    image = Image.from_pixels(picture(8, 50, 60))
    plain = DinoNearest(**TINY, readout="nn").eval()
    tuned = build_matcher("dinov2_nn", **TINY, readout="nn", finetuned_weights=path)
    assert plain.weights_hash != tuned.weights_hash
    a, b = (m.encode([image], "query")[0].map for m in (plain, tuned))
    assert not torch.allclose(a, b, atol=1e-2)
    with pytest.raises(NemfError, match="finetuned_weights go with readout nn, bilinear"):
        DinoNearest(**TINY, readout="geoaware", finetuned_weights=path)


def test_defaults_and_origin_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMF_WEIGHTS", raising=False)
    with pytest.raises(WeightsNotFound, match="no weights for dinov2_vitb14"):
        build_matcher("dinov2_nn")
    matcher = build_matcher("dinov2_nn", backbone="dinov2_tiny", init="random")
    assert (matcher.readout, matcher.input_size) == ("geoaware", 840)
    assert matcher.flow_resolution == "60"
    assert matcher.random_weights
    assert not matcher.training


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"readout": "argmax"}, "readout must be one of sd-dino, geoaware, nn, bilinear"),
        ({"input_size": 100}, "multiple of 14 px, at least two, not 100"),
        ({"input_size": 14}, "at least two, not 14"),
        ({"input_size": 0}, "at least two, not 0"),
        ({"backbone": "resnet18"}, "unknown transformer 'resnet18'"),
    ],
)
def test_refuses(keywords: dict, message: str) -> None:
    with pytest.raises(NemfError, match=message):
        build_matcher("dinov2_nn", **(TINY | keywords))
