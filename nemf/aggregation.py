"""Cost aggregation with transformers (Cho et al., CATs, NeurIPS 2021), as CATs and NeMF share it.

Notation: B pairs, L correlation levels, S source and T target positions of one square grid, both
numbered row by row (position = row * feature_size + column). Correlations are always
[..., source, target]. Everything here is differentiable and runs in float32 or float64; half
precision inputs of the functions are computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf import onednn

SOFTMAX_TEMPERATURE = 0.02
NORM_EPS = 1e-6
INIT_STD = 0.02
TOKENS_AT_ONCE = 1024  # of a block; their activations stay in the processor's cache


def unit(features: Tensor) -> Tensor:
    """``features`` (B, C, ...) divided by their length along C, f / sqrt(sum f^2 + 1e-6).

    A zero vector stays zero.
    """
    features = at_least_float32(features)
    return features / (features.square().sum(1, keepdim=True) + NORM_EPS).sqrt()


def correlate(src: Tensor, trg: Tensor) -> Tensor:
    """(B, S, T): inner products of :func:`unit` features (B, C, S) or (B, C, h, w), S = h * w, and
    the same with T. Negative values are kept. Autocast does not round it."""
    with torch.autocast(src.device.type, enabled=False):
        return src.flatten(2).transpose(1, 2) @ trg.flatten(2)


def mutual_filter(correlation: Tensor, eps: float = 0.0) -> Tensor:
    """Soft mutual-nearest-neighbour filter of ``correlation`` (..., S, T), float32 or float64.

    c * (c / max over T) * (c / max over S) (Rocco et al., NCNet, NeurIPS 2018); ``eps`` is added to
    the maxima (1e-5 there), a maximum of zero counts as 1e-30, negative maxima are divided by as
    they are.
    """
    c = at_least_float32(correlation)
    ratios = []
    for axis in (-1, -2):
        highest = c.amax(axis, keepdim=True) + eps
        ratios.append(c / torch.where(highest == 0, 1e-30, highest))
    return c * (ratios[0] * ratios[1])


def soft_argmax(
    cost: Tensor, x_normal: Tensor, y_normal: Tensor, beta: float = SOFTMAX_TEMPERATURE
) -> Tensor:
    """(B, 2, h, w): for every target cell the expected (x, y) of its source, normalised -1..1.

    :func:`expected_sources` of all cells of a target of the source's size, T = S = h * w.
    """
    expected = expected_sources(cost, x_normal, y_normal, beta)
    return expected.unflatten(2, (len(y_normal), len(x_normal)))


def expected_sources(
    cost: Tensor, x_normal: Tensor, y_normal: Tensor, beta: float = SOFTMAX_TEMPERATURE
) -> Tensor:
    """(B, 2, T): for every target cell the expected (x, y) of its source, normalised -1..1.

    ``cost`` (B, S, T), S = h * w; the expectation is over softmax(cost / beta) along S.
    ``x_normal``, ``y_normal`` (w,), (h,): the coordinate of each source column and row.
    """
    cost = at_least_float32(cost)
    h, w = len(y_normal), len(x_normal)
    weight = (cost / beta).softmax(1).unflatten(1, (h, w))  # (B, source row, source column, T)
    # Sums of products, not matrix products: autocast would round those to half precision.
    x = (weight.sum(1) * x_normal[:, None]).sum(1)
    y = (weight.sum(2) * y_normal[:, None]).sum(1)
    return torch.stack([x, y], 1)


def to_flow(points_norm: Tensor) -> Tensor:
    """(B, 2, h, w): normalised source positions of every target cell as displacements in cells.

    Convention: -1..1 runs between the centres of the first and last cell (align_corners=True);
    source cell = target cell + flow.
    """
    h, w = points_norm.shape[2:]
    col = torch.arange(w, dtype=points_norm.dtype, device=points_norm.device)
    row = torch.arange(h, dtype=points_norm.dtype, device=points_norm.device)
    x = (points_norm[:, 0] + 1) * (w - 1) / 2 - col
    y = (points_norm[:, 1] + 1) * (h - 1) / 2 - row[:, None]
    return torch.stack([x, y], 1)


def follow(points: Tensor, flow: Tensor, side_px: int, *, whole_pixels: bool = False) -> Tensor:
    """(N, 2): where ``points`` (N, 2) px of a square frame of ``side_px`` go by ``flow``
    (2, h, w), cells of :func:`to_flow`, in px of that frame.

    The cell in column c of jump j = side_px / w is centred on pixel c * j + (j - 1) / 2. Between
    the centres the flow is bilinear, beyond the outermost ones constant; it is read at the point
    itself, or, with ``whole_pixels``, at the point truncated to integers and clamped to the frame,
    which then moves.
    """
    if whole_pixels:
        points = points.trunc().clamp(0, side_px - 1)
    grid = ((2 * points + 1) / side_px - 1)[None, None]
    read = F.grid_sample(flow[None], grid, padding_mode="border", align_corners=False)
    return points + read[0, :, 0].T * (side_px / flow.shape[2])


class Attention(nn.Module):
    """Multi-head self-attention along one axis of tokens (B, L, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """``axis`` 2: the N positions attend to each other within a level; 1: the L levels within a
        position. Same shape out."""
        others = 3 - axis
        qkv = onednn.linear(self.qkv, x)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B, L, N, 3, heads, d)
        qkv = qkv.permute(3, 0, others, 4, axis, 5)  # (3, B, others, heads, along axis, d)
        q, k, v = qkv.reshape(3, -1, *qkv.shape[3:])
        y = F.scaled_dot_product_attention(q, k, v)  # (B * others, heads, along axis, d)
        y = y.transpose(1, 2).flatten(2).unflatten(0, (x.shape[0], x.shape[others]))
        y = onednn.linear(self.proj, y)
        return y if axis == 2 else y.transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between, on the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return onednn.apply(self._layers, x)

    def _layers(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention within levels, then across levels at each position, each with its MLP (pre-norm).

    The parameters' names and the norms' numbers are the official code's: norm4 precedes mlp2.
    A single level has nothing to attend to: attn and mlp alone are used.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, NORM_EPS)
        self.norm2 = nn.LayerNorm(width, NORM_EPS)
        self.norm3 = nn.LayerNorm(width, NORM_EPS)
        self.norm4 = nn.LayerNorm(width, NORM_EPS)
        self.attn = Attention(width, heads)
        self.attn_multiscale = Attention(width, heads)
        self.mlp = MLP(width, hidden)
        self.mlp2 = MLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, N, width), same shape out."""
        b, n_levels, n = x.shape[:3]
        if n_levels == 1:
            x = x + self.attn(self.norm1(x), axis=2)
            return x + self.mlp(self.norm2(x))
        levels = x.reshape(b * n_levels, 1, *x.shape[2:])
        x = onednn.in_parts(self._within_levels, levels, _share(n), dim=0).view(x.shape)
        return onednn.in_parts(self._across_levels, x, _share(b * n_levels), dim=2)

    def _within_levels(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), axis=2)
        return x + self.mlp2(self.norm4(x))

    def _across_levels(self, x: Tensor) -> Tensor:
        x = x + self.attn_multiscale(self.norm3(x), axis=1)
        return x + self.mlp(self.norm2(x))


def _share(tokens: int) -> int:
    """How many slices of so many tokens are treated at once."""
    return max(1, TOKENS_AT_ONCE // tokens)


class Aggregator(nn.Module):
    """Refines a stack of correlations by two passes of one transformer trunk: over the target
    positions, then, on the transposed result, over the source positions (CATs, sec. 3).

    ``n_levels``: levels with an appearance projection and a position code of their own; each serves
    ``repeat`` successive correlations (NeMF: 4 levels, 16 channels each), so L = n_levels * repeat.
    A token is a column of the correlation beside a projected feature: its width is
    feature_size ** 2 + proj_dim. ``norm`` is in the official checkpoints and in no computation.

    Raises ValueError where the width is odd or not a multiple of ``heads``.
    """

    def __init__(
        self,
        feature_size: int = 16,
        n_levels: int = 8,
        proj_dim: int = 128,
        depth: int = 1,
        heads: int = 6,
        mlp_ratio: float = 4,
        repeat: int = 1,
    ) -> None:
        super().__init__()
        positions = feature_size**2
        width = positions + proj_dim
        if width % 2 or width % heads:
            raise ValueError(
                f"tokens are feature_size ** 2 + proj_dim = {width} wide: that must be even and a "
                f"multiple of heads = {heads}"
            )
        self.repeat = repeat
        self.pos_embed_x = nn.Parameter(torch.zeros(1, n_levels, 1, feature_size, width // 2))
        self.pos_embed_y = nn.Parameter(torch.zeros(1, n_levels, feature_size, 1, width // 2))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.proj = nn.Linear(width, positions)
        self.norm = nn.LayerNorm(width, NORM_EPS).requires_grad_(False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights: matrices and position codes normal with deviation 0.02 cut at 2, biases
        zero, norms the identity. Without ``generator``, from torch's global one."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=INIT_STD, generator=generator)
            else:
                is_scale = "norm" in name and name.endswith("weight")
                parameter.fill_(1.0 if is_scale else 0.0)

    def forward(self, correlation: Tensor, projected_src: Tensor, projected_trg: Tensor) -> Tensor:
        """(B, L, S, T): the refined correlations, before any mean over the levels.

        ``correlation`` (B, L, S, T), after :func:`mutual_filter`; ``projected_src`` (B, n_levels,
        S, proj_dim) and ``projected_trg`` (B, n_levels, T, proj_dim), without repetition.
        """
        by_target = self._trunk(correlation.transpose(2, 3), projected_trg).transpose(2, 3)
        # The second residual is the input again, not the first pass's result.
        return self._trunk(by_target + correlation, projected_src) + correlation

    def position_code(self) -> Tensor:
        """(1, n_levels, positions, width): column code beside row code, for both passes."""
        size = self.pos_embed_x.shape[3]
        columns = self.pos_embed_x.expand(-1, -1, size, -1, -1)
        rows = self.pos_embed_y.expand(-1, -1, -1, size, -1)
        return torch.cat([columns, rows], 4).flatten(2, 3)

    def _trunk(self, costs: Tensor, projected: Tensor) -> Tensor:
        """(B, L, N, positions) from ``costs`` of the same shape and (B, n_levels, N, proj_dim)."""
        costs = costs.unflatten(1, (-1, self.repeat))
        projected = projected[:, :, None].expand(-1, -1, self.repeat, -1, -1)
        x = torch.cat([costs, projected], 4).add_(self.position_code()[:, :, None])
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        return onednn.linear(self.proj, x)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it was rounded more coarsely, as under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
