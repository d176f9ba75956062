"""Hyperpixel Flow: naive restatements, the official code's answers, and the real benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines.hpf import HyperpixelFlow
from baselines.hyperpixels import CellGrid, Hyperpixels, offset_bins, regularised_hough
from nemf.backbones import normalise
from nemf.datasets.index import PairDataset
from nemf.datasets.pfwillow import PFWillow
from nemf.errors import NemfError
from nemf.matcher import build_matcher
from nemf.pairs import Image
from nemf.scoring import correct, errors_px, get_protocol, lengths_px
from tests.conftest import golden_module, willow_pck

SMALL = {"backbone": "resnet_small", "layers": (2, 4, 5, 6), "init": "random"}


@pytest.fixture(scope="module")
def small() -> HyperpixelFlow:
    return HyperpixelFlow(**SMALL).eval()


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3), smooth."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (1, 3, 6, 7)).astype(np.float32)
    fine = F.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic")
    return fine[0].permute(1, 2, 0).clamp(0, 255).byte().numpy()


def boxes_of(grid: CellGrid) -> np.ndarray:
    """(N, 4) xyxy, as the official code lists them."""
    centres, reach = grid.centres_px().numpy(), grid.field_px // 2
    return np.concatenate([centres - reach, centres + reach], 1)


def dense_features(matcher: HyperpixelFlow, frame: Tensor) -> Tensor:
    """(h, w, D): the taps of a normalised frame resized to the first and concatenated."""
    taps = matcher.backbone.taps(frame, matcher.layers)
    size = taps[0].shape[2:]
    taps = [F.interpolate(t, size, mode="bilinear", align_corners=True) for t in taps]
    return torch.cat(taps, 1)[0].permute(1, 2, 0)


def kept_cells(features: Tensor, jump: int, field: int, size: tuple[int, int]) -> tuple:
    """Boxes and features after margin pruning, by looking at every box."""
    boxes, kept = [], []
    for y in range(features.shape[0]):
        for x in range(features.shape[1]):
            box = (
                *(x * jump - field // 2, y * jump - field // 2),
                *(x * jump + field // 2, y * jump + field // 2),
            )
            low, high = min(box[:2]) >= -jump, box[2] < size[1] + jump and box[3] < size[0] + jump
            if low and high:
                boxes.append(box)
                kept.append(features[y, x])
    return np.array(boxes, np.float32).reshape(-1, 4), kept


def naive_hough(
    votes: np.ndarray, a: np.ndarray, b: np.ndarray, a_size: tuple, b_size: tuple
) -> np.ndarray:
    """Confidences by filling the histogram pair by pair; ``a``, ``b``: boxes."""
    wide, high = a_size[1] + b_size[1], a_size[0] + b_size[0]
    side = math.sqrt(wide * high / 8192)
    nx, ny = int(wide / side) + 1, int(high / side) + 1
    centre_a, centre_b = (a[:, :2] + a[:, 2:]) / 2, (b[:, :2] + b[:, 2:]) / 2
    offset = np.float32([a_size[1], a_size[0]]) - centre_a[:, None] + centre_b
    bins = np.trunc(offset / np.float32(side)).astype(int)
    bins = bins[..., 0] + bins[..., 1] * nx
    histogram = np.zeros(nx * ny)
    np.add.at(histogram, bins, votes)
    sigma = 7 / 2 / 2.354
    kernel = [
        [math.exp(-(x * x + y * y) / 2 / sigma**2) for x in range(-3, 4)] for y in range(-3, 4)
    ]
    kernel = np.array(kernel) / np.sum(kernel)
    padded = np.pad(histogram.reshape(ny, nx), 3)
    smooth = np.zeros((ny, nx))
    for y in range(ny):
        for x in range(nx):
            smooth[y, x] = (padded[y : y + 7, x : x + 7] * kernel).sum()
    return votes * smooth.ravel()[bins]


# -- grids ----------------------------------------------------------------------------------------


def test_pruning_by_hand() -> None:
    """Jump 4, field 11 (reach 5), 20x26: columns 1..6 span -1..29 < 30, rows 1..4 up to 21 < 24."""
    grid = CellGrid(5, 7, 4, 11, (20, 26)).pruned()
    assert (grid.first_col, grid.cols) == (1, 6)
    assert (grid.first_row, grid.rows) == (1, 4)
    assert boxes_of(grid)[0].tolist() == [-1, -1, 9, 9]
    assert boxes_of(grid)[1].tolist() == [3, -1, 13, 9]
    assert boxes_of(grid)[-1].tolist() == [19, 11, 29, 21]


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from([(4, 11), (4, 27), (4, 43), (8, 43), (8, 99), (16, 107)]),
)
def test_pruning_keeps_what_the_rule_keeps(height: int, width: int, cell: tuple) -> None:
    jump, field = cell
    shape = (-(-height // jump), -(-width // jump))
    grid = CellGrid(*shape, jump, field, (height, width)).pruned()
    expected, _ = kept_cells(torch.zeros(*shape, 1), jump, field, (height, width))
    assert np.array_equal(boxes_of(grid), expected)


def test_boxes_are_closed() -> None:
    grid = CellGrid(1, 3, 4, 11, (9, 20))  # boxes -5..5, -1..9, 3..13
    points = torch.tensor([[5, 0], [5.01, 0], [3, 5], [13, -5], [13.01, 0], [0, 5.5]])
    expected = [[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert grid.covering(points).int().tolist() == expected


# -- voting ---------------------------------------------------------------------------------------

grids = st.builds(
    lambda rows, cols, y, x, size, jump: CellGrid(rows, cols, jump, 11, size, y, x),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(0, 3),
    st.tuples(st.integers(32, 80), st.integers(32, 80)),
    st.just(4),
)


@settings(max_examples=25, deadline=None)
@given(grids, grids, st.integers(0, 2**16))
def test_hough_equals_pair_by_pair(query: CellGrid, reference: CellGrid, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (query.rows * query.cols, reference.rows * reference.cols)
    votes = rng.uniform(0, 1, shape).astype(np.float32)
    sizes = query.size, reference.size
    expected = naive_hough(votes, boxes_of(query), boxes_of(reference), *sizes)
    given_votes = torch.from_numpy(votes.copy())
    got = regularised_hough(given_votes, query, reference)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert np.array_equal(given_votes, votes)
    rows = torch.from_numpy(rng.permutation(shape[0])[: max(1, shape[0] // 2)])
    torch.testing.assert_close(regularised_hough(given_votes, query, reference, rows), got[rows])


def test_agreeing_votes_win() -> None:
    """The lone strongest vote loses to weaker ones that agree on an offset."""
    grid = CellGrid(3, 3, 20, 11, (60, 60))
    votes = torch.eye(9) * 0.8
    votes[4] = torch.tensor([0.0, 0, 0, 0, 0.8, 0, 0, 0, 0.9])
    assert int(votes[4].argmax()) == 8
    assert int(regularised_hough(votes, grid, grid)[4].argmax()) == 4


def test_hough_refuses_what_does_not_fit() -> None:
    grid = CellGrid(2, 3, 4, 11, (20, 20))
    with pytest.raises(ValueError, match="do not fit"):
        regularised_hough(torch.ones(6, 5), grid, grid)
    other = CellGrid(2, 3, 8, 11, (20, 20))
    with pytest.raises(ValueError, match="different jumps: 4 and 8"):
        regularised_hough(torch.ones(6, 6), grid, other)


# -- the whole method -----------------------------------------------------------------------------


def naive_answer(
    matcher: HyperpixelFlow, images: tuple[np.ndarray, np.ndarray], points: np.ndarray
) -> np.ndarray:
    """HPF as its specification reads, in one piece."""
    cells, ratios, sizes = [], [], []
    for pixels in images:
        frame, (height, width) = normalise(pixels), pixels.shape[:2]
        ratio = 300 / max(height, width) if max(height, width) > 300 else 1
        if ratio != 1:
            size = (int(height * ratio), int(width * ratio))
            frame = F.interpolate(frame, size, mode="bilinear", align_corners=False)
        sizes.append(frame.shape[2:])
        ratios.append(ratio)
        cells.append(kept_cells(dense_features(matcher, frame), 4, 43, sizes[-1]))
    (a, a_features), (b, b_features) = cells
    cosine = F.cosine_similarity(
        torch.stack(a_features)[:, None], torch.stack(b_features)[None], dim=2
    )
    votes = cosine.clamp(min=0).numpy() ** 3
    best = naive_hough(votes, a, b, *sizes).argmax(1)
    answers = []
    for point in points * ratios[0]:
        over = [
            s
            for s in range(len(a))
            if a[s, 0] <= point[0] <= a[s, 2] and a[s, 1] <= point[1] <= a[s, 3]
        ]
        moved = [b[best[s], :2] + (point - a[s, :2]) for s in over]
        answers.append(np.mean(moved, 0) / ratios[1] if over else [np.nan, np.nan])
    return np.array(answers)


def test_equals_the_method_in_one_piece(small: HyperpixelFlow) -> None:
    """The reference image is larger than 300 px, so it is resized; noise shows how."""
    noise = np.random.default_rng(1).integers(0, 256, (200, 310, 3), np.uint8)
    images = picture(0, 70, 84), noise
    points = np.random.default_rng(2).uniform(-8, 90, (25, 2)).astype(np.float32)
    expected = naive_answer(small, images, points)
    q, r = small.encode([Image.from_pixels(i) for i in images], "query")
    assert (q.ratio, r.ratio) == (1, 300 / 310)
    assert r.grid.size == (193, 300)
    (got,) = small.match([q], [r], [torch.from_numpy(points)])
    assert got.points.dtype == torch.float32
    assert 0 < np.isnan(expected).any(1).sum() < 20
    np.testing.assert_allclose(got.points, expected, atol=1e-3)


def test_votes_are_cubed_cosines_of_the_concatenated_features(small: HyperpixelFlow) -> None:
    images = picture(3, 75, 103), picture(4, 90, 66)
    q, r = small.encode([Image.from_pixels(i) for i in images], "query")
    units = []
    for pixels, features in zip(images, (q, r), strict=True):
        dense = dense_features(small, normalise(pixels))
        _, kept = kept_cells(dense, 4, 43, pixels.shape[:2])
        stacked = torch.stack(kept).double()
        np.testing.assert_allclose(features.norms, stacked.norm(dim=1), rtol=1e-5)
        units.append(stacked / stacked.norm(dim=1, keepdim=True))
    expected = (units[0] @ units[1].T).clamp(min=0) ** 3
    np.testing.assert_allclose(small.votes(q, r), expected, atol=1e-5)


def test_canvas_is_the_padded_image(small: HyperpixelFlow) -> None:
    pixels, canvas = picture(5, 90, 280), (100, 320)
    padded = np.zeros((*canvas, 3), np.uint8)
    padded[:90, :280] = pixels
    images = [Image(pixels, "a" * 64, canvas), Image.from_pixels(padded)]
    a, b = small.encode(images, "query")
    assert a.ratio == b.ratio == 300 / 320
    assert a.grid == b.grid
    assert all(torch.equal(x, y) for x, y in zip(a.levels, b.levels, strict=True))


def test_too_small_an_image_gives_no_answer(small: HyperpixelFlow) -> None:
    tiny, large = Image.from_pixels(picture(6, 12, 12)), Image.from_pixels(picture(7, 80, 80))
    q, r = small.encode([tiny, large], "query")
    points = torch.tensor([[5.0, 5.0]])
    assert small.match([q], [r], [points])[0].points.isnan().all()
    assert small.match([r], [q], [points + 30])[0].points.isnan().all()
    assert small.match([r], [r], [points + 30])[0].points.isfinite().all()


def test_images_whose_coarse_levels_coincide() -> None:
    """On 8x8 px two stages are 1x1 cell each; they still meet their own kind in a larger image."""
    matcher = HyperpixelFlow("resnet_small", (0, 3, 5), init="random").eval()
    images = [Image.from_pixels(picture(s, side, side)) for s, side in ((8, 8), (9, 80))]
    q, r = matcher.encode(images, "query")
    assert [level.shape[1:] for level in q.levels] == [(2, 2), (1, 1), (1, 1)]
    points = torch.tensor([[4.0, 4.0]])
    assert matcher.match([q], [r], [points])[0].points.isfinite().all()
    assert matcher.match([r], [q], [points * 5])[0].points.tolist() == [[4, 4]]


def test_extreme_shapes_are_encoded(small: HyperpixelFlow) -> None:
    sliver = Image.from_pixels(np.full((1, 700, 3), 9, np.uint8))
    (features,) = small.encode([sliver], "query")
    assert features.grid.size == (1, 300)


def test_a_zero_feature_resembles_nothing(small: HyperpixelFlow) -> None:
    grid = CellGrid(2, 2, 4, 11, (20, 20))
    level = torch.ones(3, 2, 2)
    level[:, 0, 0] = 0
    features = Hyperpixels([level], level.norm(dim=0).flatten(), grid, 1.0)
    votes = small.votes(features, features)
    assert votes[0].tolist() == votes[:, 0].tolist() == [0] * 4
    torch.testing.assert_close(votes[1:, 1:], torch.ones(3, 3))


def test_a_batch_equals_its_pairs_and_changes_nothing(small: HyperpixelFlow) -> None:
    images = [Image.from_pixels(picture(s, 70 + 5 * s, 80)) for s in range(4)]
    features = small.encode(images, "query")
    levels = [[level.clone() for level in f.levels] for f in features]
    points = [torch.rand(n, 2) * 60 + 5 for n in (3, 0, 5)]
    kept = [p.clone() for p in points]
    together = small.match(features[:3], features[1:], points)
    for i in range(3):
        q, r = small.encode([images[i]], "query"), small.encode([images[i + 1]], "reference")
        (alone,) = small.match(q, r, [points[i]])
        assert torch.equal(alone.points, together[i].points)
        assert alone.points.shape == points[i].shape
    for f, copies in zip(features, levels, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(f.levels, copies, strict=True))
    assert all(torch.equal(p, k) for p, k in zip(points, kept, strict=True))
    with pytest.raises(ValueError, match="zip"):
        small.match(features[:2], features[:3], points)


@pytest.mark.parametrize("layers", [(), (4, 2), (2, 9), "24"])
def test_refuses_layers(layers: object) -> None:
    with pytest.raises(NemfError, match="layers must be increasing ids from 0 to 6"):
        build_matcher("hpf", backbone="resnet_small", layers=layers, init="random")


def test_defaults_are_the_papers() -> None:
    with pytest.raises(NemfError, match="no weights for resnet101"):
        build_matcher("hpf")
    matcher = build_matcher("hpf", init="random")
    assert matcher.layers == (2, 17, 21, 22, 25, 26, 28)
    assert matcher.random_weights


# -- the official code's answers ------------------------------------------------------------------


@pytest.fixture(scope="module")
def fill(shared: Path) -> ModuleType:
    return golden_module(shared, "fill")


@pytest.fixture(scope="module")
def official(fill: ModuleType) -> HyperpixelFlow:
    matcher = HyperpixelFlow("resnet50", (2, 7, 11, 12, 13), init="random").eval()
    fill.fill(matcher.backbone)
    return matcher


@dataclass
class Golden:
    """``arrays`` of one golden file; ``doubled``: its images are pixel-doubled and padded;
    ``chosen``: the pairs to compare."""

    arrays: dict[str, np.ndarray]
    dataset: PairDataset
    doubled: bool
    chosen: range

    def images(self, i: int) -> list[Image]:
        pair = self.dataset[int(self.arrays["rows"][i])]
        images = []
        for record, (down, right) in ((pair.src, (23, 41)), (pair.trg, (58, 7))):
            pixels = self.dataset.pixels(record)
            if not self.doubled:
                images.append(Image.from_pixels(pixels))
                continue
            pixels = pixels.repeat(2, 0).repeat(2, 1)
            canvas = (pixels.shape[0] + down, pixels.shape[1] + right)
            images.append(Image(pixels, record.hash, canvas))
        return images

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("golden_A", 4), id="A-some"),
        pytest.param(("golden_A2", 1), id="A2"),
        pytest.param(("golden_A", 1), id="A-all", marks=pytest.mark.long),
    ],
)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    name, step = request.param
    with np.load(shared / "goldens" / "hpf" / f"{name}.npz") as file:
        arrays = dict(file)
    chosen = range(step - 1, len(arrays["rows"]), step)
    return Golden(arrays, PFWillow(shared / "data"), name == "golden_A2", chosen)


@pytest.fixture(scope="module")
def answers(golden: Golden, official: HyperpixelFlow) -> dict[int, np.ndarray]:
    """Our (N, 2) keypoints, original px, of every chosen pair."""
    found = {}
    for i in golden.chosen:
        q, r = official.encode(golden.images(i), "query")
        assert len(q.norms) == golden["src_nbox"][i]
        assert len(r.norms) == golden["trg_nbox"][i]
        points = torch.from_numpy(golden["src_kps_orig"][i].T.copy())
        cover = q.grid.covering(points * q.ratio)
        assert cover.sum(1).tolist() == golden["n_neighbours"][i].tolist()
        found[i] = official.match([q], [r], [points])[0].points.numpy()
    return found


@pytest.mark.real
def test_official_intermediates(golden: Golden, official: HyperpixelFlow) -> None:
    for i in range(3):
        images = golden.images(i)
        q, r = official.encode(images, "query")
        part = {k: golden[f"s{i}_{k}"] for k in ("ch", "pos", "r", "c", "votes", "conf", "binids")}
        assert (q.ratio, r.ratio) == pytest.approx(
            (golden["src_intratio"][i], golden["trg_intratio"][i]), rel=1e-7
        )
        assert np.array_equal(q.grid.size, golden["src_hw"][i])
        assert np.array_equal(r.grid.size, golden["trg_hw"][i])
        assert np.array_equal(boxes_of(q.grid), golden[f"s{i}_srcbox"])
        assert np.array_equal(boxes_of(r.grid), golden[f"s{i}_trgbox"])

        frame = normalise(images[0].on_canvas())
        if q.ratio != 1:
            frame = F.interpolate(frame, q.grid.size, mode="bilinear", align_corners=False)
        dense = dense_features(official, frame)
        dense = dense[q.grid.first_row :, q.grid.first_col :][: q.grid.rows, : q.grid.cols]
        sampled = dense.reshape(-1, dense.shape[2])[part["pos"]][:, part["ch"]]
        np.testing.assert_allclose(sampled, golden[f"s{i}_srcfeat"], rtol=1e-4, atol=1e-3)

        bin_y, bin_x, (ny, nx) = offset_bins(q.grid, r.grid)
        assert [nx, ny] == golden[f"s{i}_nbins_xy_cell"][:2].tolist()
        rows, cols = part["r"][:, None], part["c"]
        down = cols // r.grid.cols - rows // q.grid.cols + q.grid.rows - 1
        right = cols % r.grid.cols - rows % q.grid.cols + q.grid.cols - 1
        assert np.array_equal(bin_y.numpy()[down] * nx + bin_x.numpy()[right], part["binids"])

        votes = official.votes(q, r)
        np.testing.assert_allclose(votes[rows, cols], part["votes"], atol=1e-5)
        confidence = regularised_hough(votes, q.grid, r.grid)
        scale = golden[f"s{i}_conf"].max()
        np.testing.assert_allclose(confidence[rows, cols], part["conf"], atol=1e-5 * scale)


@pytest.mark.real
def test_official_keypoints(
    golden: Golden, official: HyperpixelFlow, answers: dict[int, np.ndarray]
) -> None:
    """Every keypoint within 1e-3 px, unless a cell over it decided a tie (relative margin of its
    two best < 1e-4) the other way; with the official decisions it is then within 1e-3 px too."""
    flipped = 0
    for i, answer in answers.items():
        expected = golden["prd_kps_orig"][i].T
        off = np.abs(answer - expected).max(1) >= 1e-3
        if not off.any():
            continue
        flipped += off.sum()
        q, r = official.encode(golden.images(i), "query")
        points = torch.from_numpy(golden["src_kps_orig"][i].T.copy())
        cover = q.grid.covering(points * q.ratio)
        cells = slice(*golden["argmax_offsets"][i : i + 2])
        theirs = torch.from_numpy(golden["argmax"][cells].astype(np.int64))
        margin = golden["top2_rel_margin"][cells]
        ours = regularised_hough(official.votes(q, r), q.grid, r.grid).argmax(1)
        moves = r.grid.centres_px()[theirs] - q.grid.centres_px()
        for k in np.flatnonzero(off):
            differing = cover[k] & (ours != theirs)
            assert differing.any()
            assert margin[differing.numpy()].max() < 1e-4
            with_theirs = (points[k] * q.ratio + moves[cover[k]].mean(0)) / r.ratio
            np.testing.assert_allclose(with_theirs, expected[k], atol=1e-3)
    assert flipped <= 0.01 * 10 * len(answers)


@pytest.mark.real
def test_official_scores(golden: Golden, answers: dict[int, np.ndarray]) -> None:
    """Our predictions under hpf-paper@1 have the official thresholds, distances and PCK."""
    protocol = get_protocol("hpf-paper@1")
    for i, answer in answers.items():
        true = golden["trg_kps_orig"][i].T
        heights, widths = (np.full(len(true), side) for side in golden.images(i)[1].canvas)
        factors = protocol.frame.factors(heights, widths)
        lengths = lengths_px(
            protocol.bases["pfwillow"],
            factors=factors,
            heights=heights,
            widths=widths,
            bbox=np.full((len(true), 4), np.nan),
            true=true,
            pair=np.zeros(len(true), int),
        )
        np.testing.assert_allclose(lengths, golden["pckthres"][i], rtol=1e-6)
        errors = errors_px(answer, true, factors)
        np.testing.assert_allclose(errors, golden["dist"][i], atol=0.1)
        got = [correct(errors, lengths, float(alpha)).mean() for alpha in golden["alphas"]]
        np.testing.assert_allclose(got, golden["pck"][i], atol=1e-6)


# -- the benchmark --------------------------------------------------------------------------------


@pytest.mark.real
def test_pck_on_pfwillow(shared: Path) -> None:
    """ResNet-18, canonical PCK at .05/.10/.15, all 900 pairs."""
    weights = shared / "weights" / "resnet18_imagenet_to_layer3.pth"
    matcher = HyperpixelFlow("resnet18", (4, 6), weights=weights).eval()
    got = willow_pck(matcher, shared)
    np.testing.assert_allclose(got, (30.0, 56.5, 72.8), atol=0.5)
