"""Search in the matching field: PatchMatch over the target's pixels, then coordinate optimisation.

All coordinates are normalised (align_corners=True). A ``field`` (H, W, 2) holds, for every target
pixel, the source position it is matched to.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from nemf.field.field import MatchingField, TargetSide

Uniform = Callable[[int, Tensor], Tensor]

PIXELS_AT_ONCE = 65_536  # bounds the memory of a dense search
ETA_MIN, ETA_MAX = 1e-6, 3e-4  # learning rates of the coordinate optimisation
WEIGHT_DECAY = 0.01
OPTIMISATION_STEPS = 20


def counted_uniform(seed: int) -> Uniform:
    """Numbers for :func:`patch_match` that depend on ``seed``, iteration and pixel only: the 24
    highest bits of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) at a counter. Alike on every
    device; what one pixel gets does not depend on which others are searched."""

    def uniform(iteration: int, pixels: Tensor) -> Tensor:
        axes = torch.arange(2, device=pixels.device)
        z = (iteration * 2**40 + 2 * pixels[:, None] + axes) * _signed(0x9E3779B97F4A7C15)
        z = z + _signed(seed)
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
    start: Tensor,
    uniform: Uniform,
    *,
    points: Tensor | None,
    iterations: int,
    alpha: float,
) -> Tensor:
    """The field (H, W, 2) after ``iterations`` of propagation and random search from ``start``.

    ``uniform(iteration, pixels)`` gives numbers (N, 2) in [0, 1) for the pixels of that number
    (N,), called once per iteration. ``points`` (N, 2): target points at which the result will be
    read bilinearly; only pixels that can reach them are searched, and only there the result means
    something. None searches everywhere.
    """
    height, width = start.shape[:2]
    distance = reach(points, height, width).flatten().to(start.device)
    active = torch.nonzero(distance <= iterations - 1).flatten()
    distance = distance[active]
    memory = _Memory(len(active), start.device)
    parts = max(1, math.ceil(len(active) / PIXELS_AT_ONCE))
    sides = _target_sides(field, active, (height, width), size) if parts == 1 else None
    start = start.reshape(-1, 2)
    current = start
    for iteration in range(iterations):
        near = torch.nonzero(distance <= iterations - 1 - iteration).flatten()
        jumps = (uniform(iteration, active[near]) - 0.5) * (2 * alpha)
        moved = []
        for rows, jump in zip(near.tensor_split(parts), jumps.tensor_split(parts), strict=True):
            pixels = active[rows]
            side, of = sides, rows
            if side is None:
                side = _target_sides(field, pixels, (height, width), size)
                of = torch.arange(len(pixels), device=pixels.device)
            candidates = current[_neighbourhood(pixels, height, width)]
            scores = _scores(field, volume, candidates, side, of, memory, rows)
            score = scores.amax(1)
            best = (scores == score[:, None]).byte().argmax(1)  # the first of equal ones
            best = candidates[torch.arange(len(pixels), device=best.device), best]
            tried = best + jump
            tried_score = field.score(volume, tried, side, of)
            memory.keep(rows, candidates, scores, tried, tried_score)
            best = torch.where((tried_score > score)[:, None], tried, best)
            moved.append(best.clamp(start[pixels] - alpha, start[pixels] + alpha))
        current = current.index_copy(0, active[near], torch.cat(moved))
    return current.reshape(height, width, 2)


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


def _target_sides(
    field: MatchingField, pixels: Tensor, canvas: tuple[int, int], size: int
) -> TargetSide:
    """The target half of queries at ``pixels`` (N,), numbered row by row on the canvas."""
    height, width = canvas
    x, y = (
        torch.linspace(-1, 1, n, device=pixels.device)[at]  # [-1] for a single row or column
        for n, at in ((width, pixels % width), (height, pixels // width))
    )
    return field.at_targets(torch.stack([x, y], -1), size)


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
) -> Tensor:
    """(N, 2): source positions after gradient steps on -log sigmoid(score) from ``start`` (N, 2),
    at most ``alpha`` away from it on either axis.

    AdamW with weight decay on the coordinates, and a schedule that lags by one step, as published.
    ``official`` takes the logarithm of the sigmoid literally: its gradient vanishes above a score
    of about 16.6 and is NaN below about -88 (that keypoint is then NaN); otherwise it is stable.
    """
    with torch.no_grad():
        side = field.at_targets(targets, size)
    rows = torch.arange(len(targets), device=targets.device)
    positions = start.detach().clone().requires_grad_(True)
    low, high = start - alpha, start + alpha
    optimiser = torch.optim.AdamW([positions], lr=ETA_MAX, weight_decay=WEIGHT_DECAY)
    with torch.enable_grad():
        for step in range(OPTIMISATION_STEPS):
            optimiser.param_groups[0]["lr"] = learning_rate(step)
            scores = field.score(volume, positions, side, rows)
            likely = torch.sigmoid(scores).log() if official else F.logsigmoid(scores)
            (positions.grad,) = torch.autograd.grad(-likely.mean(), positions)
            optimiser.step()
            with torch.no_grad():
                positions.copy_(positions.clamp(low, high))
    return positions.detach()
