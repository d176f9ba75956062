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

ETA_MIN, ETA_MAX = 1e-6, 3e-4  # learning rates of the coordinate optimisation
WEIGHT_DECAY = 0.01
OPTIMISATION_STEPS = 20


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
    draw: Callable[[], Tensor],
    *,
    points: Tensor | None,
    iterations: int,
    alpha: float,
) -> Tensor:
    """The field (H, W, 2) after ``iterations`` of propagation and random search from ``start``.

    ``draw()`` gives uniform numbers (H, W, 2), once per iteration. ``points`` (N, 2): target points
    at which the result will be read bilinearly; only pixels that can reach them are searched, and
    only there the result means something. None searches everywhere.
    """
    height, width = start.shape[:2]
    distance = reach(points, height, width).flatten().to(start.device)
    rows = torch.arange(height, device=start.device)
    cols = torch.arange(width, device=start.device)
    ys = torch.linspace(-1, 1, height, device=start.device) if height > 1 else rows.float() - 1
    xs = torch.linspace(-1, 1, width, device=start.device) if width > 1 else cols.float() - 1
    grid = torch.stack([xs.expand(height, -1), ys[:, None].expand(-1, width)], -1).reshape(-1, 2)

    number = (rows[:, None] * width + cols).flatten()
    neighbours = torch.stack(
        [
            number,
            (rows[:, None] * width + _reflect(cols - 1, width)).flatten(),
            (_reflect(rows - 1, height)[:, None] * width + cols).flatten(),
            (rows[:, None] * width + _reflect(cols + 1, width)).flatten(),
            (_reflect(rows + 1, height)[:, None] * width + cols).flatten(),
        ],
        1,
    )
    active = torch.nonzero(distance <= iterations - 1).flatten()
    side = field.at_targets(grid[active], size)
    current = start.reshape(-1, 2).clone()
    for iteration in range(iterations):
        chosen = torch.nonzero(distance[active] <= iterations - 1 - iteration).flatten()
        pixels = active[chosen]
        jump = (draw().reshape(-1, 2)[pixels] - 0.5) * (2 * alpha)
        best, score = _propagate(field, volume, current, neighbours[pixels], side, chosen)
        tried = best + jump
        better = field.score(volume, tried, side, chosen) > score
        best = torch.where(better[:, None], tried, best)
        first = start.reshape(-1, 2)[pixels]
        current = current.index_copy(0, pixels, best.clamp(first - alpha, first + alpha))
    return current.reshape(height, width, 2)


def _propagate(
    field: MatchingField,
    volume: Tensor,
    current: Tensor,
    neighbours: Tensor,
    side: TargetSide,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:
    """The best of each pixel's own and its four neighbours' positions, and its score. The first of
    equal ones wins; a neighbour that repeats an earlier candidate is not scored again."""
    candidates = current[neighbours]  # (n, 5, 2)
    fresh = torch.ones(candidates.shape[:2], dtype=torch.bool, device=candidates.device)
    for k in range(1, 5):
        same = (candidates[:, k : k + 1] == candidates[:, :k]).all(-1).any(1)
        fresh[:, k] = ~same
    at, which = torch.nonzero(fresh, as_tuple=True)
    scores = candidates.new_full(fresh.shape, -math.inf)
    scores[at, which] = field.score(volume, candidates[at, which], side, chosen[at])
    score = scores.amax(1)
    best = (scores == score[:, None]).byte().argmax(1)  # the first of equal ones
    return candidates[torch.arange(len(candidates), device=best.device), best], score


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
            t = max(step - 1, 0)
            rate = (1 + math.cos(math.pi * t / OPTIMISATION_STEPS)) / 2
            optimiser.param_groups[0]["lr"] = ETA_MIN + (ETA_MAX - ETA_MIN) * rate
            scores = field.score(volume, positions, side, rows)
            likely = torch.sigmoid(scores).log() if official else F.logsigmoid(scores)
            (positions.grad,) = torch.autograd.grad(-likely.mean(), positions)
            optimiser.step()
            with torch.no_grad():
                positions.copy_(positions.clamp(low, high))
    return positions.detach()
