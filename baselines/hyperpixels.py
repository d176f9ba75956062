"""What HPF and its descendants share: hyperpixel features, votes of offsets, keypoint transfer.

Source: Min et al., Hyperpixel Flow (ICCV 2019), and its official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemf.backbones import ResNet, normalise, tap_table
from nemf.geometry import fit_ratio
from nemf.pairs import Image, Size

LONGEST_PX = 300
HOUGH_CELLS = 8192  # the offset space is cut into about so many square bins
SMOOTHING_BINS = 7
SMOOTHING_SIGMA = SMOOTHING_BINS / 2 / 2.354


@dataclass(frozen=True)
class CellGrid:
    """A rectangle of feature cells on an image of ``size`` (height, width) px.

    Row r, column c of ``rows`` x ``cols`` is cell (``first_row`` + r, ``first_col`` + c) of the
    feature map; its centre is that times ``jump_px``, its closed box reaches ``field_px`` // 2 to
    each side. Cells are numbered row by row.
    """

    rows: int
    cols: int
    jump_px: int
    field_px: int
    size: Size
    first_row: int = 0
    first_col: int = 0

    def pruned(self) -> CellGrid:
        """Without the cells whose box sticks out of the image by more than a jump (its right and
        lower edge by a jump or more). What is left may be empty, with 0 rows or columns."""
        first_row, rows = self._kept(self.rows, self.size[0])
        first_col, cols = self._kept(self.cols, self.size[1])
        return CellGrid(rows, cols, self.jump_px, self.field_px, self.size, first_row, first_col)

    def _kept(self, count: int, extent_px: int) -> tuple[int, int]:
        centres, reach = np.arange(count) * self.jump_px, self.field_px // 2
        low, high = centres - reach >= -self.jump_px, centres + reach < extent_px + self.jump_px
        kept = np.flatnonzero(low & high)
        return (int(kept[0]), len(kept)) if len(kept) else (0, 0)

    def centres_px(self) -> Tensor:
        """float32 (rows * cols, 2): (x, y) of every cell's centre."""
        y = torch.arange(self.first_row, self.first_row + self.rows) * self.jump_px
        x = torch.arange(self.first_col, self.first_col + self.cols) * self.jump_px
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2).float()

    def covering(self, points: Tensor) -> Tensor:
        """bool (N, rows * cols): which cells' boxes hold which of ``points`` (N, 2) px."""
        centres, reach = self.centres_px().to(points.device), self.field_px // 2
        low, high = centres - reach, centres + reach
        point = points[:, None]
        return ((point >= low) & (point <= high)).all(2)


@dataclass(frozen=True, eq=False)
class Hyperpixels:
    """An image's hyperpixel features before they are brought to one size.

    ``levels``: float32 (C, h, w) tensors, layers of equal jump stacked, the first at the resolution
    of the smallest id. ``norms`` float32 (grid.rows * grid.cols): lengths of the concatenated
    feature vectors at the cells of ``grid``. ``ratio``: pixels of the grid's frame per
    original pixel.
    """

    levels: list[Tensor]
    norms: Tensor
    grid: CellGrid
    ratio: float


def frame(image: Image, device: torch.device, *, enlarge: bool) -> tuple[Tensor, float]:
    """What is encoded: the normalised canvas (1, 3, h, w) with its longer side brought down to 300
    px (with ``enlarge`` also up), bilinear without antialiasing, and the ratio of the resize."""
    pixels = normalise(image.on_canvas()).to(device)
    ratio = LONGEST_PX / max(image.canvas) if enlarge else fit_ratio(image.canvas, LONGEST_PX)
    if ratio != 1:
        size = (max(int(image.canvas[0] * ratio), 1), max(int(image.canvas[1] * ratio), 1))
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    return pixels, ratio


def hyperpixels(
    backbone: ResNet, layers: Sequence[int], pixels: Tensor, ratio: float, *, prune: bool
) -> Hyperpixels:
    """The hyperpixels ``layers`` of a :func:`frame`; ``prune``: without the cells of its margin."""
    taps = backbone.taps(pixels, layers)
    finest = taps[0].shape[2:]
    table = [tap_table(backbone.name)[k] for k in layers]
    grid = CellGrid(*finest, table[0].jump_px, table[0].field_px, tuple(pixels.shape[2:]))
    if prune:
        grid = grid.pruned()
    squares = sum(
        F.interpolate(tap, finest, mode="bilinear", align_corners=True).square().sum((0, 1))
        for tap in taps
    )
    by_jump: dict[int, list[Tensor]] = {}
    for tap, layer in zip(taps, table, strict=True):
        by_jump.setdefault(layer.jump_px, []).append(tap[0])
    return Hyperpixels(
        levels=[torch.cat(same) for same in by_jump.values()],
        norms=_crop(squares, grid).sqrt().flatten(),
        grid=grid,
        ratio=ratio,
    )


def likeness(query: Hyperpixels, reference: Hyperpixels, device: torch.device) -> Tensor:
    """max(0, cosine) of all pairs of cells, float32 (query cells, reference cells): that of the
    resized, concatenated features."""
    levels = [[level.to(device) for level in side.levels] for side in (query, reference)]
    finest = [tuple(side[0].shape[1:]) for side in levels]
    total = inner_products(*levels, query.grid, reference.grid, *finest)
    tiny = torch.finfo(torch.float32).tiny  # an all-zero feature resembles nothing
    total /= query.norms.to(device).clamp_min(tiny)[:, None]
    total /= reference.norms.to(device).clamp_min(tiny)
    return total.clamp_(min=0)


def inner_products(
    query: Sequence[Tensor],
    reference: Sequence[Tensor],
    q: CellGrid,
    r: CellGrid,
    finest_q: Size,
    finest_r: Size,
) -> Tensor:
    """Inner products of the features of all cells of ``q`` and of ``r``, float32 (cells, cells).

    ``query``, ``reference``: the levels of both, float32 (C, h, w) each, of as many channels in
    both; a feature is what they are, resized to ``finest_q`` and ``finest_r`` (bilinear,
    align_corners=True) and concatenated. As resizing is linear, the products of coarse levels are
    taken at their own resolution and then resized on both sides, a tenth of the work for HPF's
    layers.
    """
    shape = (q.rows * q.cols, r.rows * r.cols)
    total = query[0].new_zeros(shape)
    for a, b in zip(query, reference, strict=True):
        if a.shape[1:] == finest_q and b.shape[1:] == finest_r:
            total.addmm_(_crop(a, q).flatten(1).T, _crop(b, r).flatten(1))
            continue
        gram = a.flatten(1).T @ b.flatten(1)
        gram = gram.view(-1, *b.shape[1:])
        up_y, up_x = _resizers(b.shape[1:], finest_r, r, b.device)
        gram = up_y @ gram @ up_x.T
        up_y, up_x = _resizers(a.shape[1:], finest_q, q, a.device)
        gram = up_x @ gram.view(*a.shape[1:], shape[1])
        total.view(q.rows, -1).addmm_(up_y, gram.view(a.shape[1], -1))
    return total


def transfer(
    points: Tensor,
    query: Hyperpixels,
    reference: Hyperpixels,
    votes: Callable[[], Tensor],
) -> Tensor:
    """Where ``points`` (N, 2) px of the original query image go, float32 (N, 2) px of the original
    reference image.

    Every query cell moves to the reference cell of highest :func:`regularised_hough` confidence; a
    point moves with the mean of the cells that cover it, NaN if there is none. ``votes()``, float32
    (query cells, reference cells), is called only if there is a cell to move.
    """

    def best(cells: Tensor) -> Tensor:
        return regularised_hough(votes(), query.grid, reference.grid, cells).argmax(1)

    moved = carry(points * query.ratio, query.grid, reference.grid, best)
    return moved / reference.ratio


def carry(
    points: Tensor,
    query: CellGrid,
    reference: CellGrid,
    best: Callable[[Tensor], Tensor],
) -> Tensor:
    """Where ``points`` (N, 2) px of the query's frame go with the cells over them, float32 (N, 2)
    px of the reference's frame; NaN where there is no such cell.

    A point moves by the mean offset of the cells that cover it. ``best(cells)``: which reference
    cells (M,) the query ``cells`` (M,) move to; called only if there is a cell to move.
    """
    cover = query.covering(points)
    used = cover.any(0).nonzero()[:, 0]
    if not len(used) or not reference.rows * reference.cols:
        return torch.full_like(points, float("nan"))
    centres = query.centres_px().to(points.device)
    offsets = reference.centres_px().to(points.device)[best(used)] - centres[used]
    cover = cover[:, used].float()
    return points + cover @ offsets / cover.sum(1, keepdim=True)  # 0 / 0 = NaN for no cell


def regularised_hough(
    votes: Tensor, query: CellGrid, reference: CellGrid, rows: Tensor | None = None
) -> Tensor:
    """Confidence of cell pairs: their vote times the smoothed votes of all pairs of like offset.

    ``votes`` float32 (query cells, reference cells), not negative. Offsets fall into square bins of
    side sqrt((Wq + Wr)(Hq + Hr) / 8192) px; the histogram is smoothed by a 7x7 Gaussian of sigma
    7/2/2.354 bins, zeros outside. Returns float32 (len(rows), reference cells) for the query cells
    ``rows`` (all if None). Raises ValueError if the votes do not fit the grids.
    Source: Min et al., Hyperpixel Flow, section 4.2.
    """
    shape = (query.rows, query.cols, reference.rows, reference.cols)
    if votes.shape != (shape[0] * shape[1], shape[2] * shape[3]):
        raise ValueError(f"votes {tuple(votes.shape)} do not fit grids of {shape[:2]}, {shape[2:]}")
    if query.jump_px != reference.jump_px:
        raise ValueError(f"grids of different jumps: {query.jump_px} and {reference.jump_px}")
    # All pairs of one displacement in cells share a bin, so the votes are first summed along the
    # diagonals, columns then rows; only that small table is binned.
    cells = votes.view(shape)
    by_col = votes.new_zeros(query.rows, reference.rows, query.cols + reference.cols - 1)
    for c in range(query.cols):
        start = query.cols - 1 - c
        by_col[:, :, start : start + reference.cols] += cells[:, c]
    table = votes.new_zeros(query.rows + reference.rows - 1, by_col.shape[2])
    for r in range(query.rows):
        start = query.rows - 1 - r
        table[start : start + reference.rows] += by_col[r]

    bin_y, bin_x, n_bins = offset_bins(query, reference)
    bin_y, bin_x = bin_y.to(votes.device), bin_x.to(votes.device)
    into_y = F.one_hot(bin_y, n_bins[0]).to(votes.dtype)
    into_x = F.one_hot(bin_x, n_bins[1]).to(votes.dtype)
    histogram = into_y.T @ table @ into_x
    smooth = F.conv2d(histogram[None, None], _gaussian(votes), padding=SMOOTHING_BINS // 2)[0, 0]
    agreement = smooth[bin_y][:, bin_x]
    # Row (r, c) of the confidence sees the window of the table that starts at its displacements.
    windows = agreement.unfold(0, reference.rows, 1).unfold(1, reference.cols, 1)
    if rows is None:
        return votes * windows.flip(0, 1).reshape(votes.shape)
    r, c = rows // query.cols, rows % query.cols
    return votes[rows] * windows[query.rows - 1 - r, query.cols - 1 - c].flatten(1)


def offset_bins(query: CellGrid, reference: CellGrid) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Bins of displacements: int64 (query.rows + reference.rows - 1) along y, the same along x for
    columns, and how many bins there are (y, x).

    Entry k is for a reference cell k - (query.rows - 1) rows below the query cell, counted within
    the grids. Float32 as in the official code, so that offsets on a bin's edge fall alike.
    """
    heights, widths = query.size[0] + reference.size[0], query.size[1] + reference.size[1]
    side = math.sqrt(widths * heights / HOUGH_CELLS)
    cells = [
        (query.rows, reference.rows, reference.first_row - query.first_row, query.size[0]),
        (query.cols, reference.cols, reference.first_col - query.first_col, query.size[1]),
    ]
    bins = []
    for n_query, n_reference, shift, extent_px in cells:
        steps = np.arange(1 - n_query, n_reference) + shift
        offset_px = (extent_px + steps * query.jump_px).astype(np.float32)
        bins.append(torch.from_numpy((offset_px / np.float32(side)).astype(np.int64)))
    return bins[0], bins[1], (int(heights / side) + 1, int(widths / side) + 1)


def _gaussian(like: Tensor) -> Tensor:
    """(1, 1, 7, 7) kernel of sum 1."""
    x = torch.arange(SMOOTHING_BINS, dtype=like.dtype, device=like.device) - SMOOTHING_BINS // 2
    profile = torch.exp(-x.square() / (2 * SMOOTHING_SIGMA**2))
    kernel = torch.outer(profile, profile)
    return (kernel / kernel.sum())[None, None]


def _crop(maps: Tensor, grid: CellGrid) -> Tensor:
    """The cells of ``grid`` out of (..., h, w)."""
    rows = slice(grid.first_row, grid.first_row + grid.rows)
    return maps[..., rows, grid.first_col : grid.first_col + grid.cols]


def _resizers(
    size: Size, finest: Size, grid: CellGrid, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Matrices (grid.rows, h) and (grid.cols, w) that resize (bilinear, align_corners=True) rows
    and columns of a level to the cells of ``grid`` on the finest level."""
    both = []
    spans = [(grid.first_row, grid.rows), (grid.first_col, grid.cols)]
    for coarse, fine, (first, count) in zip(size, finest, spans, strict=True):
        unit = torch.eye(coarse, device=device)[None]
        matrix = F.interpolate(unit, fine, mode="linear", align_corners=True)[0].T
        both.append(matrix[first : first + count])
    return both[0], both[1]
