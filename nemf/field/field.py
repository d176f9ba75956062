"""The matching field: a score for any pair of points, read from an embedded cost volume.

Convention: coordinates are normalised (x, y), -1 and 1 at the centres of the first and last cell
(align_corners=True); ``source`` and ``target`` as in the paper.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf import onednn
from nemf.aggregation import at_least_float32
from nemf.field.embedding import CostEmbedding

# On a CPU so many that a layer's activations stay in the processor's cache.
QUERIES_AT_ONCE = {"cpu": 1024, "cuda": 2**17}


class HarmonicEmbedding(nn.Module):
    """sin and cos of ten frequencies between 1 and 512 of z = 2 p + 3, and z itself: 42 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(1, 512, 10), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        """(..., 2) to (..., 42). No gradient passes."""
        z = 2 * points.detach() + 3
        angles = (z[..., None] * self.frequencies).flatten(-2)  # x's ten, then y's
        return torch.cat([angles.sin(), angles.cos(), z], -1)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc_0, self.fc_1 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc_1(self.fc_0(torch.relu(x)).relu_())


class _MLP(nn.Module):
    def __init__(self, channels: int, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.fc_p = nn.Linear(84, width)
        self.fc_c = nn.ModuleList(nn.Linear(channels, width) for _ in range(depth))
        self.blocks = nn.ModuleList(_ResidualBlock(width) for _ in range(depth))
        self.fc_out = nn.Linear(width, 1)

    def forward(self, x: Tensor, costs: Tensor) -> Tensor:
        """(N,) logits from the embedded points ``x`` (N, width) and ``costs`` (N, channels)."""
        return onednn.apply(self.layers, x, costs)[:, 0]

    def layers(self, x: Tensor, costs: Tensor) -> Tensor:
        for fc_c, block in zip(self.fc_c, self.blocks, strict=True):
            x = block(x + fc_c(costs))
        return self.fc_out(torch.relu(x))


class MatchingField(nn.Module):
    """Scores pairs of points from the refined costs of image pairs (NeMF, sec. 4.3).

    :meth:`embed` is done once per pair; :meth:`at_targets` once per set of target points;
    :meth:`score` per candidate. Volumes of several pairs lie below each other, (B * S * T,
    channels).
    """

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        self.channels = channels
        self.harmonic = HarmonicEmbedding()
        self.mlp = nn.ModuleList([_MLP(channels, width)])
        self.cost_embedding = CostEmbedding([(channels + 1, channels, 1, False)], groups=4)

    def embed(self, refined: Tensor) -> Tensor:
        """(B * S * T, channels): the volumes to look up, from ``refined`` (B, channels, S, T)."""
        size = round(refined.shape[2] ** 0.5)
        volume = torch.cat([refined, refined.mean(1, keepdim=True)], 1)
        volume = volume.unflatten(3, (size, size)).unflatten(2, (size, size))
        volume = at_least_float32(self.cost_embedding(volume))
        return volume.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()

    def at_targets(self, targets: Tensor, size: int, pairs: Tensor | None = None) -> TargetSide:
        """What scoring needs of ``targets`` (N, 2), the same for every candidate source. ``pairs``
        (N,): the pair that each belongs to, by default the first."""
        cells, weights = corners(targets, size)
        if pairs is not None:
            cells = cells + pairs[:, None] * size**4
        half = self.mlp[0].fc_p.weight[:, 42:]
        return TargetSide(cells, weights, F.linear(self.harmonic(targets), half), size)

    def score(self, volume: Tensor, sources: Tensor, side: TargetSide, rows: Tensor) -> Tensor:
        """(N,) logits of candidate ``sources`` (N, 2); candidate i belongs to target ``rows[i]``.

        ``volume`` from :meth:`embed`. Differentiable in ``sources`` through the
        lookup only, as in the official code.
        """
        step = QUERIES_AT_ONCE.get(sources.device.type, 2**16)
        pieces = zip(sources.split(step), rows.split(step), strict=True)
        parts = [self._score(volume, s, side, r) for s, r in pieces]
        return torch.cat(parts) if parts else sources.new_zeros(0)

    def _score(self, volume: Tensor, sources: Tensor, side: TargetSide, rows: Tensor) -> Tensor:
        mlp = self.mlp[0]
        cells, weights, embedded = (
            x.index_select(0, rows) for x in (side.cells, side.weights, side.embedded)
        )
        costs = look_up(volume, sources, cells, weights, side.size)
        start = F.linear(self.harmonic(sources), mlp.fc_p.weight[:, :42], mlp.fc_p.bias)
        return mlp(start + embedded, costs)


class TargetSide:
    """The target half of queries: ``cells`` (in the pair's volume) and ``weights`` (N, 4) of the
    corners around each target, ``embedded`` (N, width) its half of the first layer, ``size`` of
    the grid."""

    def __init__(self, cells: Tensor, weights: Tensor, embedded: Tensor, size: int) -> None:
        self.cells, self.weights, self.embedded, self.size = cells, weights, embedded, size


def corners(points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The four cells of a size x size grid around ``points`` (N, 2), row-major numbers (N, 4), and
    their bilinear weights (N, 4); weight 0 for cells outside of the grid (zero padding)."""
    cell = (points + 1) * ((size - 1) / 2)
    low = cell.detach().floor()
    offsets = points.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    at = low[:, None] + offsets  # (N, 4, 2)
    weights = (1 - (cell[:, None] - at).abs()).prod(-1)
    inside = ((at >= 0) & (at <= size - 1)).all(-1)
    column, row = at.clamp(0, size - 1).long().unbind(-1)
    return row * size + column, torch.where(inside, weights, 0.0)


def look_up(volume: Tensor, sources: Tensor, cells: Tensor, weights: Tensor, size: int) -> Tensor:
    """(N, channels): the volume read quadrilinearly, 16 corners a query.

    ``volume`` (B * S * T, channels); ``sources`` (N, 2); ``cells``, ``weights`` (N, 4) of the
    targets, cells counted on from the first row of their pair's volume.
    """
    source_cells, source_weights = corners(sources, size)
    index = (source_cells[:, :, None] * size**2 + cells[:, None]).flatten(1)
    weight = (source_weights[:, :, None] * weights[:, None]).flatten(1)
    return F.embedding_bag(index, volume, per_sample_weights=weight, mode="sum")
