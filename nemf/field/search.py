"""Search in the matching field: PatchMatch over the target's pixels, then coordinate optimisation.

All coordinates are normalised (align_corners=True). A ``field`` (H, W, 2) holds, for every target
pixel, the source position it is matched to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from nemf.field.field import MatchingField, TargetSide

# Numbers (N, 2) in [0, 1) for an iteration, the pairs (N,) and the pixels (N,) in their targets.
Uniform = Callable[[int, Tensor, Tensor], Tensor]

PIXELS_AT_ONCE = 65_536  # bounds the memory of a dense search
ETA_MIN, ETA_MAX = 1e-6, 3e-4  # learning rates of the coordinate optimisation
WEIGHT_DECAY = 0.01
OPTIMISATION_STEPS = 20


def counted_uniform(seeds: Sequence[int]) -> Uniform:
    """Numbers for :func:`patch_match` that depend on the pair's seed, iteration and pixel only: the
    24 highest bits of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) at a counter. Alike on every
    device; what one pixel gets does not depend on which others are searched."""
    table = torch.tensor([_signed(seed) for seed in seeds])

    def uniform(iteration: int, pairs: Tensor, pixels: Tensor) -> Tensor:
        axes = torch.arange(2, device=pixels.device)
        z = (iteration * 2**40 + 2 * pixels[:, None] + axes) * _signed(0x9E3779B97F4A7C15)
        z = z + table.to(pixels.device)[pairs][:, None]
        z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
        return _shifted(z ^ _shifted(z, 31), 40).float() / 2**24

    return uniform


def _signed(bits: int) -> int:
    """The int64 of the lowest 64 bits."""
    bits %= 2**64
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(z: Tensor, by: int) -> Tensor:
    """int64 shifted right with zeros coming in, as an unsigned number is."""
    return (z >> by) & (2 ** (64 - by) - 1)


def initial_field(positions: Tensor, height: int, width: int) -> Tensor:
    """(H, W, 2): ``positions`` (1, 2, h, w), the soft-argmax on the grid, resized to the target's
    pixels (bilinear, align_corners=True)."""
    resized = F.interpolate(positions, (height, width), mode="bilinear", align_corners=True)
    return resized[0].permute(1, 2, 0).contiguous()


def reach(points: Tensor | None, height: int, width: int) -> Tensor:
    """int (H, W): L1 distance of every pixel to the pixels that ``points`` (N, 2) normalised are
    read from; all zero for None (dense search).

    Information travels one pixel (L1) an iteration, so in iteration i of n only pixels within
    n - 1 - i can still change what is read: searching those gives the same answers.
    """
    if points is None:
        return torch.zeros(height, width, dtype=torch.int32)
    away = np.ones((height, width), bool)
    size = torch.tensor([max(width - 1, 0), max(height - 1, 0)], dtype=torch.float64)
    low = ((points.detach().cpu().double() + 1) / 2 * size).floor().long()
    for dx in (0, 1):
        for dy in (0, 1):
            x = (low[:, 0] + dx).clamp(0, width - 1).numpy()
            y = (low[:, 1] + dy).clamp(0, height - 1).numpy()
            away[y, x] = False
    return torch.from_numpy(distance_transform_cdt(away, "taxicab").astype(np.int32))


@torch.no_grad()
def patch_match(
    field: MatchingField,
    volume: Tensor,
    size: int,
    starts: Sequence[Tensor],
    uniform: Uniform,
    *,
    points: Sequence[Tensor | None],
    iterations: int,
    alpha: float,
) -> list[Tensor]:
    """Per pair the field (H, W, 2) after ``iterations`` of propagation and random search from its
    start. ``volume`` holds the pairs' below each other.

    ``uniform`` is called once per iteration. ``points``, per pair (N, 2): target points at which
    the result will be read bilinearly; only pixels that can reach them are searched, and only there
    the result means something. None searches everywhere.
    """
    canvases = [start.shape[:2] for start in starts]
    pixels = _Pixels(canvases, points, iterations - 1, volume.device)
    memory = _Memory(len(pixels.number), volume.device)
    parts = max(1, math.ceil(len(pixels.number) / PIXELS_AT_ONCE))
    sides = pixels.target_sides(field, slice(None), size) if parts == 1 else None
    start = current = torch.cat([x.reshape(-1, 2) for x in starts])
    for iteration in range(iterations):
        near = torch.nonzero(pixels.distance <= iterations - 1 - iteration).flatten()
        jumps = uniform(iteration, pixels.pair[near], pixels.within(near)) - 0.5
        moved = []
        for rows, jump in zip(near.tensor_split(parts), jumps.tensor_split(parts), strict=True):
            side, of = sides, rows
            if side is None:
                side = pixels.target_sides(field, rows, size)
                of = torch.arange(len(rows), device=rows.device)
            candidates = current[pixels.around[rows]]
            scores = _scores(field, volume, candidates, side, of, memory, rows)
            score = scores.amax(1)
            best = (scores == score[:, None]).byte().argmax(1)  # the first of equal ones
            best = candidates[torch.arange(len(rows), device=best.device), best]
            tried = best + jump * (2 * alpha)
            tried_score = field.score(volume, tried, side, of)
            memory.keep(rows, candidates, scores, tried, tried_score)
            best = torch.where((tried_score > score)[:, None], tried, best)
            begun = start[pixels.number[rows]]
            moved.append(best.clamp(begun - alpha, begun + alpha))
        current = current.index_copy(0, pixels.number[near], torch.cat(moved))
    sizes = [height * width for height, width in canvases]
    fields = zip(current.split(sizes), canvases, strict=True)
    return [found.view(*canvas, 2) for found, canvas in fields]


class _Pixels:
    """The target pixels of all pairs that take part in a search, all pixels numbered pair by pair
    and row by row.

    ``number``, ``pair``, ``distance`` (N,): of each, the last to what is read (:func:`reach`);
    ``around`` (N, 5): the numbers of each pixel, its left, upper, right and lower neighbour.
    """

    def __init__(
        self,
        canvases: Sequence[tuple[int, int]],
        points: Sequence[Tensor | None],
        furthest: int,
        device: torch.device,
    ) -> None:
        numbers, pairs, distances, around = [], [], [], []
        self.canvases, first = canvases, 0
        for pair, ((height, width), read) in enumerate(zip(canvases, points, strict=True)):
            distance = reach(read, height, width).flatten()
            inside = torch.nonzero(distance <= furthest).flatten()
            numbers.append(inside + first)
            pairs.append(torch.full_like(inside, pair))
            distances.append(distance[inside])
            around.append(_neighbourhood(inside, height, width) + first)
            first += height * width
        self.number, self.pair, self.distance, self.around = (
            torch.cat(x).to(device) for x in (numbers, pairs, distances, around)
        )
        areas = torch.tensor([0] + [height * width for height, width in canvases])
        self.first = areas.cumsum(0)[:-1].to(device)

    def within(self, rows: Tensor | slice) -> Tensor:
        """(M,): the numbers of the pixels ``rows`` in their own target."""
        return self.number[rows] - self.first[self.pair[rows]]

    def target_sides(self, field: MatchingField, rows: Tensor | slice, size: int) -> TargetSide:
        """The target half of queries at the pixels ``rows``."""
        device = self.number.device
        widths = torch.tensor([width for _, width in self.canvases], device=device)
        pair, pixel = self.pair[rows], self.within(rows)
        # The exact steps of linspace, which [-1] is for a single row or column.
        axes = [
            [torch.linspace(-1, 1, canvas[k], device=device) for canvas in self.canvases]
            for k in (1, 0)
        ]
        xy = torch.empty(len(pixel), 2, device=device)
        for k, at in enumerate((pixel % widths[pair], pixel // widths[pair])):
            lengths = torch.tensor([0] + [len(axis) for axis in axes[k]], device=device)
            xy[:, k] = torch.cat(axes[k])[at + lengths.cumsum(0)[pair]]
        return field.at_targets(xy, size, pair)


class _Memory:
    """The six positions that each pixel scored last, and their scores. A position that comes again
    at the same pixel, as most do, has the same score."""

    def __init__(self, n_pixels: int, device: torch.device) -> None:
        self.keys = torch.zeros(n_pixels, 6, dtype=torch.int64, device=device)
        self.scores = torch.full((n_pixels, 6), -math.inf, device=device)

    def recall(self, rows: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, 5) of ``candidates`` (N, 5, 2) at the pixels ``rows``, -inf where unknown, and
        bool (N, 5): which must be scored, unknown and no repetition of an earlier candidate."""
        keys = _keys(candidates)
        same = keys[:, :, None] == self.keys[rows][:, None]
        scores = torch.where(same, self.scores[rows][:, None], -math.inf).amax(2)
        fresh = scores == -math.inf
        for k in range(1, 5):
            fresh[:, k] &= (keys[:, k : k + 1] != keys[:, :k]).all(1)
        return scores, fresh

    def keep(
        self, rows: Tensor, candidates: Tensor, scores: Tensor, tried: Tensor, tried_score: Tensor
    ) -> None:
        self.keys[rows] = torch.cat([_keys(candidates), _keys(tried)[:, None]], 1)
        self.scores[rows] = torch.cat([scores, tried_score[:, None]], 1)


def _keys(positions: Tensor) -> Tensor:
    """int64 (...): the bits of float32 ``positions`` (..., 2), equal for equal positions only."""
    return positions.contiguous().view(torch.int64)[..., 0]


def _scores(
    field: MatchingField,
    volume: Tensor,
    candidates: Tensor,
    side: TargetSide,
    of: Tensor,
    memory: _Memory,
    rows: Tensor,
) -> Tensor:
    """(N, 5): the scores of each pixel's own and its four neighbours' positions (N, 5, 2); of equal
    ones only the first's, -inf for the others."""
    scores, fresh = memory.recall(rows, candidates)
    at, which = torch.nonzero(fresh, as_tuple=True)
    scores[at, which] = field.score(volume, candidates[at, which], side, of[at])
    return scores


def _neighbourhood(pixels: Tensor, height: int, width: int) -> Tensor:
    """(N, 5): the numbers of each pixel, its left, upper, right and lower neighbour."""
    row, col = pixels // width, pixels % width
    left, right = _reflect(col - 1, width), _reflect(col + 1, width)
    above, below = _reflect(row - 1, height), _reflect(row + 1, height)
    around = [pixels, row * width + left, above * width + col, row * width + right]
    return torch.stack([*around, below * width + col], 1)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Border handling of reflect padding by one: -1 becomes 1, size becomes size - 2."""
    if size == 1:
        return torch.zeros_like(index)
    return torch.where(index < 0, 1, torch.where(index >= size, size - 2, index))


def read_field(found: Tensor, points: Tensor) -> Tensor:
    """(N, 2): ``found`` (H, W, 2) read at ``points`` (N, 2), bilinear, zero padding."""
    sampled = F.grid_sample(
        found.permute(2, 0, 1)[None], points[None, None], align_corners=True, padding_mode="zeros"
    )
    return sampled[0, :, 0].T


def learning_rate(step: int) -> float:
    """Of the coordinate optimisation's ``step``, from 0: a cosine that lags by one step."""
    t = max(step - 1, 0)
    return ETA_MIN + (ETA_MAX - ETA_MIN) * (1 + math.cos(math.pi * t / OPTIMISATION_STEPS)) / 2


def optimise(
    field: MatchingField,
    volume: Tensor,
    size: int,
    start: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    official: bool,
    pairs: Tensor | None = None,
) -> Tensor:
    """(N, 2): source positions after gradient steps on -log sigmoid(score) from ``start`` (N, 2),
    at most ``alpha`` away from it on either axis. ``pairs`` (N,): the pair of each, by default all
    of one; every pair is optimised as if it were alone.

    AdamW with weight decay on the coordinates, and a schedule that lags by one step, as published.
    ``official`` takes the logarithm of the sigmoid literally: its gradient vanishes above a score
    of about 16.6 and is NaN below about -88 (that keypoint is then NaN); otherwise it is stable.
    """
    with torch.no_grad():
        side = field.at_targets(targets, size, pairs)
    rows = torch.arange(len(targets), device=targets.device)
    if pairs is None:
        pairs = torch.zeros_like(rows)
    weights = 1 / torch.bincount(pairs)[pairs]  # the loss of a pair is its keypoints' mean
    positions = start.detach().clone().requires_grad_(True)
    low, high = start - alpha, start + alpha
    optimiser = torch.optim.AdamW([positions], lr=ETA_MAX, weight_decay=WEIGHT_DECAY)
    with torch.enable_grad():
        for step in range(OPTIMISATION_STEPS):
            optimiser.param_groups[0]["lr"] = learning_rate(step)
            scores = field.score(volume, positions, side, rows)
            likely = torch.sigmoid(scores).log() if official else F.logsigmoid(scores)
            (positions.grad,) = torch.autograd.grad(-(likely * weights).sum(), positions)
            optimiser.step()
            with torch.no_grad():
                positions.copy_(positions.clamp(low, high))
    return positions.detach()
