"""DHPF: its gates, a literal restatement of scores and transfer, official checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

import nemf
from baselines.dhpf import DHPF, DHPFFeatures
from baselines.hyperpixels import CellGrid, inner_products
from nemf.backbones import build_backbone, squashed_frame
from nemf.errors import NemfError, WeightsNotFound
from nemf.pairs import Image
from tests.conftest import tiny_pixels
from tests.test_cats import texture
from tests.test_chm import literal_resize
from tests.test_hpf import naive_hough

TINY: dict[str, Any] = {"backbone": "resnet_small", "input_size": 96}
CHANNELS = [24, 24, 24, 48, 48, 96, 96]  # of the taps of resnet_small


def uneven(matcher: DHPF) -> DHPF:
    """``matcher`` with batch norms that do something."""
    generator = torch.Generator().manual_seed(3)
    for part in (matcher.reduction_ffns, matcher.gumbel_ffns):
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value in (module.weight, module.bias, module.running_mean):
                    value.data += 0.3 * torch.randn(value.shape, generator=generator)
                module.running_var += torch.rand(module.running_var.shape, generator=generator)
    return matcher


@pytest.fixture(scope="module")
def tiny() -> DHPF:
    return uneven(DHPF(**TINY, init="random")).eval()


@pytest.fixture(scope="module")
def whole() -> DHPF:
    """At the paper's 240 px, 60 cells a side."""
    return DHPF("resnet_small", init="random").eval()


@pytest.fixture
def gated(tiny: DHPF) -> DHPF:
    """A copy whose gates may be set."""
    return copy.deepcopy(tiny)


def encoded(matcher: DHPF, *pixels: np.ndarray) -> list[DHPFFeatures]:
    return matcher.encode([Image.from_pixels(p) for p in pixels], "query")


def answer(matcher: DHPF, query: np.ndarray, reference: np.ndarray, points: Any) -> np.ndarray:
    return nemf.match(matcher, query, reference, points).points.numpy()


# -- a literal restatement ------------------------------------------------------------------------


def affine(x: np.ndarray, norm: nn.BatchNorm2d) -> np.ndarray:
    """A batch norm of (C, ...) by its running statistics."""
    of = {k: v.double().numpy() for k, v in norm.state_dict().items()}
    shape = (-1, *[1] * (x.ndim - 1))
    scale = of["weight"] / np.sqrt(of["running_var"] + 1e-5)
    return (x - of["running_mean"].reshape(shape)) * scale.reshape(shape) + of["bias"].reshape(
        shape
    )


def mixed(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """A 1x1 convolution of (C, ...)."""
    return np.tensordot(conv.weight[:, :, 0, 0].detach().double().numpy(), x, 1)


def raw_taps(matcher: DHPF, pixels: np.ndarray) -> list[np.ndarray]:
    frame = squashed_frame(Image.from_pixels(pixels), matcher.input_size)
    with torch.no_grad():
        taps = matcher.backbone.taps(frame, range(len(CHANNELS)))
    return [tap[0].double().numpy() for tap in taps]


def literal_votes(matcher: DHPF, query: list, reference: list) -> tuple[list[int], np.ndarray]:
    """The open gates and the votes (cells, cells) of raw taps, in float64, step by step."""
    n = math.ceil(matcher.input_size / 4)

    def features(k: int, tap: np.ndarray) -> np.ndarray:
        conv, norm, _ = matcher.reduction_ffns[k]
        x = np.maximum(affine(mixed(tap, conv), norm), 0)
        return literal_resize(literal_resize(x, 1, n), 2, n).reshape(len(x), -1)

    chosen = []
    for k, (a, b) in enumerate(zip(query, reference, strict=True)):
        into, norm, _, out = matcher.gumbel_ffns[k]
        pooled = a.mean((1, 2)) + b.mean((1, 2))
        leave, use = mixed(np.maximum(affine(mixed(pooled, into), norm), 0), out)
        if use > leave:
            chosen.append(k)
    products, a_square, b_square = 0, 0, 0
    for k in chosen or [0]:
        a, b = features(k, query[k]), features(k, reference[k])
        products = products + a.T @ b
        a_square, b_square = a_square + (a**2).sum(0), b_square + (b**2).sum(0)
    norms = np.sqrt(a_square)[:, None] * np.sqrt(b_square)
    return chosen, np.maximum(products / (norms + 0.001), 0) ** 2


def boxes(n: int) -> np.ndarray:
    """(n * n, 4) xyxy px: 11 px wide, every 4 px."""
    centres = [(4 * x, 4 * y) for y in range(n) for x in range(n)]
    return np.array([(x - 5, y - 5, x + 5, y + 5) for x, y in centres], np.float32)


def literal_scores(votes: np.ndarray, n: int, side: int) -> np.ndarray:
    scores = naive_hough(votes, boxes(n), boxes(n), (side, side), (side, side))
    rows, columns = scores.max(1, keepdims=True), scores.max(0, keepdims=True)
    rows, columns = (np.where(m == 0, 1e-30, m) for m in (rows, columns))
    return scores * (scores / rows) * (scores / columns)


def literal_transfer(scores: np.ndarray, points: np.ndarray, n: int) -> np.ndarray:
    """Every covering box moves to its best box, the point with its upper left corner; the mean."""
    at = boxes(n)
    moved = []
    for x, y in points:
        found = []
        for cell, (x1, y1, x2, y2) in enumerate(at):
            if x1 <= x <= x2 and y1 <= y <= y2:
                best = at[scores[cell].argmax()]
                found.append([best[0] + x - x1, best[1] + y - y1])
        moved.append(np.mean(found, 0) if found else [np.nan, np.nan])
    return np.array(moved)


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_follow_the_specification(tiny: DHPF, seed: int) -> None:
    query, reference = texture(seed, 80, 112), texture(seed + 5, 112, 96)
    chosen, votes = literal_votes(tiny, raw_taps(tiny, query), raw_taps(tiny, reference))
    assert 0 < len(chosen) < len(CHANNELS)
    q, r = encoded(tiny, query, reference)
    assert tiny.selected(q, r) == chosen
    with torch.no_grad():
        found = tiny.votes(q, r).numpy(), tiny.scores(q, r).numpy()
    np.testing.assert_allclose(found[0], votes, rtol=1e-3, atol=1e-5 * votes.max())
    expected = literal_scores(votes, 24, 96)
    np.testing.assert_allclose(found[1], expected, rtol=1e-3, atol=1e-4 * expected.max())


def test_answers_follow_the_specification(tiny: DHPF) -> None:
    query, reference = texture(2, 80, 112), texture(3, 112, 96)
    q, r = encoded(tiny, query, reference)
    with torch.no_grad():
        scores = tiny.scores(q, r).numpy()
    points = np.array([[0, 0], [111, 79], [60.5, 33.25], [20, 70], [3.3, 41]])
    frame = points * [96 / 112, 96 / 80]
    expected = literal_transfer(scores, frame, 24) * [96 / 96, 112 / 96]
    np.testing.assert_allclose(answer(tiny, query, reference, points), expected, atol=1e-3)


def test_the_grid_of_the_paper(whole: DHPF) -> None:
    grid = whole.grid
    assert (grid.rows, grid.cols, grid.jump_px, grid.field_px) == (60, 60, 4, 11)
    assert grid.size == (240, 240)
    (features,) = encoded(whole, texture(0, 100, 120))
    sides = [level.shape[1] for level in features.reduced]
    assert sides == [60, 60, 60, 30, 30, 15, 15]
    assert [len(level) for level in features.reduced] == [c // 8 for c in CHANNELS]
    assert features.squares.shape == (7, 3600)


def test_inner_products_are_those_of_the_resized_levels() -> None:
    """Of any levels, also several at the finest resolution, on images of two sizes."""
    rng = np.random.default_rng(0)
    sizes = [((4, 5), (6, 3)), ((8, 10), (12, 6)), ((8, 10), (12, 6))]
    query, reference = ([rng.normal(size=(3, *pair[k])) for pair in sizes] for k in (0, 1))

    def dense(levels: list[np.ndarray], rows: int, cols: int) -> np.ndarray:
        grown = [literal_resize(literal_resize(x, 1, rows), 2, cols) for x in levels]
        return np.concatenate(grown).reshape(9, -1)

    grids = CellGrid(8, 10, 4, 11, (32, 40)), CellGrid(12, 6, 4, 11, (48, 24))
    found = inner_products(
        *([torch.from_numpy(x).float() for x in side] for side in (query, reference)),
        *(*grids, (8, 10), (12, 6)),
    )
    expected = dense(query, 8, 10).T @ dense(reference, 12, 6)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_short_features_count_less(whole: DHPF) -> None:
    """The 0.001 that is added to the product of the lengths."""
    q, r = encoded(whole, texture(0, 100, 120), texture(1, 100, 120))
    votes = whole.votes(q, r)
    for features in (q, r):
        features.squares.mul_(1e-4)
        for level in features.reduced:
            level.mul_(1e-2)
    layers = whole.selected(q, r)
    lengths = torch.outer(*(x.squares[layers].sum(0).sqrt() for x in (q, r)))
    expected = (votes.sqrt() * (1e4 * lengths + 1e-3) / 1e4 / (lengths + 1e-3)).square()
    torch.testing.assert_close(whole.votes(q, r), expected, rtol=1e-3, atol=1e-7)
    assert (expected < 0.98 * votes)[votes > 0].float().mean() > 0.1


# -- gates ----------------------------------------------------------------------------------------


@torch.no_grad()
def set_gate(matcher: DHPF, layer: int, use: float) -> None:
    """The gate of a layer answers ``use`` against 0, whatever it sees."""
    _, norm, _, out = matcher.gumbel_ffns[layer]
    norm.weight.zero_()
    norm.bias.fill_(1 / 32)
    out.weight.zero_()
    out.weight[1] = use


@pytest.mark.parametrize("layers", [[0], [3], [2, 5, 6], [1, 2, 3, 4]])
def test_open_layers_take_part_and_no_others(gated: DHPF, layers: list[int]) -> None:
    for k in range(len(CHANNELS)):
        set_gate(gated, k, 1.0 if k in layers else -1.0)
    q, r = encoded(gated, texture(0, 96, 96), texture(1, 96, 96))
    assert gated.selected(q, r) == layers
    before = gated.votes(q, r)
    torch.testing.assert_close(gated.votes(q, r), before, rtol=0, atol=0)
    for features in (q, r):
        for k in set(range(len(CHANNELS))) - set(layers):
            features.reduced[k].add_(1)
            features.squares[k].add_(1)
    torch.testing.assert_close(gated.votes(q, r), before, rtol=0, atol=0)
    q.reduced[layers[-1]].add_(1)
    assert not torch.equal(gated.votes(q, r), before)


def test_without_an_open_gate_the_first_layer_serves(gated: DHPF) -> None:
    for k in range(len(CHANNELS)):
        set_gate(gated, k, 0.0)  # a draw keeps a gate shut
    q, r = encoded(gated, texture(0, 96, 96), texture(1, 96, 96))
    assert gated.selected(q, r) == []
    alone = gated.votes(q, r)
    set_gate(gated, 0, 1.0)
    assert gated.selected(q, r) == [0]
    torch.testing.assert_close(gated.votes(q, r), alone, rtol=0, atol=0)


def test_a_gate_sees_the_sum_of_both_images(gated: DHPF) -> None:
    """Open where the mean brightness of the stem's features, added up, exceeds a threshold."""
    images = texture(0, 96, 96), np.clip(texture(0, 96, 96).astype(int) * 3, 0, 255)
    dark, bright = encoded(gated, *(x.astype(np.uint8) for x in images))
    low, high = (features.pooled[0].sum().item() for features in (dark, bright))
    if low > high:
        (dark, low), (bright, high) = (bright, high), (dark, low)
    into, norm, _, out = gated.gumbel_ffns[0]
    with torch.no_grad():
        into.weight.fill_(1)
        norm.reset_running_stats()
        norm.weight.fill_(1)
        out.weight.zero_()
        out.weight[1] = 1
        seen = []
        for threshold in ((3 * low + high) / 2, (low + 3 * high) / 2):
            norm.bias.fill_(-threshold)
            pairs = ((dark, dark), (dark, bright), (bright, dark), (bright, bright))
            seen.append([0 in gated.selected(*pair) for pair in pairs])
    assert seen == [[False, True, True, True], [False, False, False, True]]


# -- what the answer must be ----------------------------------------------------------------------


def test_a_shifted_image_is_followed(whole: DHPF) -> None:
    """By eight cells: what is at x in the query is at x - 32 in the reference."""
    wide = texture(0, 240, 304)
    points = [[100, 60], [150, 130.5], [190, 200]]
    found = answer(whole, wide[:, :240], wide[:, 32:272], points)
    np.testing.assert_allclose(found - points, [[-32, 0]] * 3, atol=4)


def test_answers_are_in_pixels_of_the_original_images(whole: DHPF) -> None:
    query = texture(1, 240, 240)
    stretched = np.asarray(PIL.Image.fromarray(query).resize((480, 360)))
    points = np.array([[60.0, 70.0], [128.0, 200.0]])
    np.testing.assert_allclose(answer(whole, query, stretched, points), points * [2, 1.5], atol=12)
    np.testing.assert_allclose(answer(whole, stretched, query, points * [2, 1.5]), points, atol=8)


def test_no_cell_no_answer(tiny: DHPF) -> None:
    found = answer(tiny, texture(0, 96, 96), texture(1, 96, 96), [[50, 110], [-20, 3], [95, 95]])
    assert np.isnan(found[:2]).all()
    assert np.isfinite(found[2]).all()


def test_a_batch_is_its_pairs(tiny: DHPF) -> None:
    images = [Image.from_pixels(texture(k, 64 + 16 * k, 96)) for k in range(4)]
    points = [torch.rand(5, 2) * 60 for _ in range(3)]
    together = tiny.encode(images, "query")
    alone = [tiny.encode([image], "reference")[0] for image in images]
    found = tiny.match(together[:3], together[1:], points)
    for k in range(3):
        (one,) = tiny.match([alone[k]], [alone[k + 1]], [points[k]])
        torch.testing.assert_close(found[k].points, one.points, rtol=0, atol=0)


@pytest.mark.parametrize("value", [0, 255])
def test_images_without_content_are_answered(tiny: DHPF, value: int) -> None:
    blank, other = np.full((50, 60, 3), value, np.uint8), tiny_pixels(0, 40, 50)
    for pair in ((blank, other), (other, blank), (blank, blank)):
        assert np.isfinite(answer(tiny, *pair, [[0, 0], [30, 20]])).all()


def test_features_that_are_not_finite_are_an_error(gated: DHPF) -> None:
    gated.backbone.conv1.weight.data[0, 0, 0, 0] = float("nan")
    image = Image.from_pixels(tiny_pixels(0, 40, 50))
    with pytest.raises(NemfError, match=f"{image.hash[:12]} are not finite"):
        gated.encode([image], "query")


# -- weights --------------------------------------------------------------------------------------


def learned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the official files hold of a state dict."""
    return {k: v for k, v in state.items() if not k.startswith("backbone.")}


@pytest.fixture
def saved(tiny: DHPF, tmp_path: Path) -> Callable[..., Path]:
    """``saved(change)`` writes the matcher as an official file after ``change(state)``."""

    def save(change: Callable[[dict[str, Tensor]], Any] = lambda state: None) -> Path:
        state = learned(tiny.state_dict())
        change(state)
        torch.save(state, tmp_path / "best.pt")
        return tmp_path / "best.pt"

    return save


@pytest.fixture
def trunk_file(tiny: DHPF, tmp_path: Path) -> Path:
    torch.save(tiny.backbone.state_dict(), tmp_path / "trunk.pth")
    return tmp_path / "trunk.pth"


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("resnet101", [64] + [256] * 3 + [512] * 4 + [1024] * 23 + [2048] * 3),
        ("resnet50", [64] + [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3),
    ],
)
def test_the_official_keys(backbone: str, channels: list[int]) -> None:
    state = learned(DHPF(backbone, init="random").state_dict())
    expected: dict[str, tuple[int, ...]] = {}
    for i, c in enumerate(channels):
        expected[f"reduction_ffns.{i}.0.weight"] = (c // 8, c, 1, 1)
        expected[f"gumbel_ffns.{i}.0.weight"] = (32, c, 1, 1)
        expected[f"gumbel_ffns.{i}.3.weight"] = (2, 32, 1, 1)
        for norm, width in ((f"reduction_ffns.{i}.1", c // 8), (f"gumbel_ffns.{i}.1", 32)):
            for name in ("weight", "bias", "running_mean", "running_var"):
                expected[f"{norm}.{name}"] = (width,)
            expected[f"{norm}.num_batches_tracked"] = ()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_an_official_file_is_taken_with_an_imagenet_trunk(
    tiny: DHPF, saved: Callable[..., Path], trunk_file: Path
) -> None:
    twin = nemf.build_matcher(
        "dhpf", weights=saved(), backbone_weights=trunk_file, input_size=96
    )  # the backbone is read from the file
    assert twin.weights_hash == tiny.weights_hash
    assert not twin.random_weights
    assert not any(p.requires_grad for p in twin.backbone.parameters())
    pair = tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]]
    np.testing.assert_array_equal(answer(twin, *pair), answer(tiny, *pair))


def test_an_official_file_without_a_trunk_around(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEMF_WEIGHTS", raising=False)
    monkeypatch.delenv("NEMF_DOWNLOAD", raising=False)
    with pytest.raises(WeightsNotFound, match="no weights for resnet_small"):
        DHPF(weights=saved())


def test_a_checkpoint_of_ours_comes_back(tiny: DHPF, tmp_path: Path, trunk_file: Path) -> None:
    torch.save({"state_dict": tiny.state_dict()}, tmp_path / "ours.pth")
    twin = DHPF(weights=tmp_path / "ours.pth", input_size=96)
    assert twin.weights_hash == tiny.weights_hash
    with pytest.raises(NemfError, match=r"ours\.pth holds a trunk of its own"):
        DHPF(weights=tmp_path / "ours.pth", backbone_weights=trunk_file)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda s: s.pop("gumbel_ffns.2.3.weight"),
            r"this DHPF on resnet_small: 1 missing \(gumbel_ffns.2.3.weight\)",
        ),
        (lambda s: s.pop("reduction_ffns.4.0.weight"), r"1 missing \(reduction_ffns.4.0.weight\)"),
        (lambda s: s.update({"fuse.weight": torch.ones(2)}), r"1 unexpected \(fuse.weight\)"),
        (
            lambda s: s.update({"reduction_ffns.0.1.bias": torch.ones(6)}),
            r"1 misshapen \(reduction_ffns.0.1.bias \(6,\) for \(3,\)",
        ),
        (
            lambda s: s.update({"gumbel_ffns.0.1.bias": torch.full((32,), float("inf"))}),
            r"damaged: 1 not finite \(gumbel_ffns.0.1.bias\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_explained(
    saved: Callable[..., Path],
    trunk_file: Path,
    change: Callable[[dict[str, Tensor]], Any],
    complaint: str,
) -> None:
    with pytest.raises(NemfError, match=rf"best\.pt.*{complaint}"):
        DHPF(**TINY, weights=saved(change), backbone_weights=trunk_file)


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"backbone": "resnet18"}, "was made with resnet_small, not resnet18: leave backbone out"),
        ({"backbone": "resnet_tiny"}, "unknown backbone 'resnet_tiny'"),
        ({"init": "random"}, "not both"),
        ({"input_size": 8}, "input_size must be at least 32 px"),
    ],
)
def test_keywords_that_disagree(
    saved: Callable[..., Path], keywords: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=complaint):
        DHPF(weights=saved(), **keywords)


def test_random_weights_are_the_same_every_time(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    a, b = (DHPF(**TINY, init="random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.weights_hash == b.weights_hash
    assert a.weights_hash != DHPF(**TINY, init="random", init_seed=1).weights_hash
    trunk = build_backbone("resnet_small", init="random", upto=6, seed=5)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    headless = DHPF(**TINY, init="head", backbone_weights=tmp_path / "trunk.pth")
    assert torch.equal(headless.backbone.conv1.weight, trunk.conv1.weight)
    assert headless.random_weights
