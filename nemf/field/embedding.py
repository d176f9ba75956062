"""Cost embeddings: centre-pivot 4-D convolutions over correlation volumes.

Volumes are (B, C, hs, ws, ht, wt): source rows and columns, then target rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf import onednn
from nemf.aggregation import correlate

FEW_CHANNELS = 4  # up to so many, products of gathered windows beat oneDNN's convolutions


class CentrePivot(nn.Module):
    """A 4-D convolution cut down to its two central planes (Min & Cho, CVPR 2021; NeMF, sec. 4).

    ``query_conv`` (kernel 3) runs over the source axes at every target cell, ``supp_conv`` over the
    target axes at every source cell; the results are added. With ``stride`` 2 the other two axes
    are brought to size first: by max-pooling, or when ``transposed`` (which doubles all axes) by a
    bilinear resize (align_corners=True).
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, transposed: bool = False) -> None:
        super().__init__()
        self.c_in, self.stride, self.transposed = c_in, stride, transposed
        for name in ("query_conv", "supp_conv"):
            if transposed:
                conv: nn.Module = nn.ConvTranspose2d(
                    c_in, c_out, 3, stride, padding=1, output_padding=stride - 1
                )
            else:
                conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
            self.add_module(name, conv)

    def forward(self, volume: Tensor) -> Tensor:
        """(B, C, hs, ws, ht, wt) to (B, C', hs', ws', ht', wt')."""
        if self.stride == 1:
            return self.convolve(volume, volume)
        if self.transposed:
            return self.convolve(*(_doubled(volume, axes) for axes in (TARGET, SOURCE)))
        return self.convolve(*(pooled(volume, axes) for axes in (TARGET, SOURCE)))

    def convolve(self, for_query: Tensor, for_supp: Tensor) -> Tensor:
        """The sum of both convolutions, each of its own volume: ``for_query`` has the result's
        target axes already, ``for_supp`` its source axes."""
        if self.c_in <= FEW_CHANNELS and not self.transposed and onednn.takes(for_query):
            pairs = zip(for_query, for_supp, strict=True)
            return torch.stack([self._by_windows(query, supp) for query, supp in pairs])
        # Both are one operation: over the first pair of axes, and on the transposed volume.
        by_source = _planes(for_query, self.query_conv)
        by_target = _planes(for_supp.permute(0, 1, 4, 5, 2, 3), self.supp_conv)
        return by_source + by_target.permute(0, 1, 4, 5, 2, 3)

    def _by_windows(self, query: Tensor, supp: Tensor) -> Tensor:
        """The same for one pair (C, hs, ws, ht, wt): a matrix product per source row, with the
        windows of both convolutions below each other."""
        query_conv, supp_conv = self.query_conv, self.supp_conv
        weight = torch.cat([query_conv.weight.flatten(1), supp_conv.weight.flatten(1)], 1)
        bias = (query_conv.bias + supp_conv.bias)[:, None]
        rows, cols = supp.shape[1:3]
        out = query.new_empty(len(bias), rows, cols, *query.shape[3:])
        query = F.pad(query.flatten(3), (0, 0, 1, 1, 1, 1))
        supp = F.pad(supp, (1, 1, 1, 1))
        for row in range(rows):
            # (C, 3, 3, ws', target cells), then (C, 3, 3, ws', ht', wt')
            top = row * self.stride
            around = query[:, top : top + 3].unfold(2, 3, self.stride).permute(0, 1, 4, 2, 3)
            below = supp[:, row].unfold(2, 3, self.stride).unfold(3, 3, self.stride)
            below = below.permute(0, 4, 5, 1, 2, 3)
            windows = torch.cat([x.reshape(9 * self.c_in, -1) for x in (around, below)])
            out[:, row] = torch.addmm(bias, weight, windows).view_as(out[:, row])
        return out


SOURCE, TARGET = (2, 3), (4, 5)


def pooled(volume: Tensor, axes: tuple[int, int]) -> Tensor:
    """The maxima of 2x2 cells along two neighbouring ``axes``; an odd last row or column is pooled
    by itself."""
    for axis in axes:
        even = [slice(None)] * axis + [slice(0, None, 2)]
        odd = [slice(None)] * axis + [slice(1, None, 2)]
        first, second = volume[tuple(even)], volume[tuple(odd)]
        n = second.shape[axis]
        last = first.narrow(axis, n, first.shape[axis] - n)
        highest = torch.maximum(first.narrow(axis, 0, n), second)
        volume = torch.cat([highest, last], axis) if last.numel() else highest
    return volume


def _doubled(volume: Tensor, axes: tuple[int, int]) -> Tensor:
    """Resized (bilinear, align_corners=True) to twice the size along two neighbouring ``axes``."""
    moved = volume.movedim(axes, (4, 5))
    flat = moved.reshape(-1, 1, *moved.shape[4:])
    size = [2 * n for n in flat.shape[2:]]
    flat = F.interpolate(flat, size, mode="bilinear", align_corners=True)
    return flat.view(*moved.shape[:4], *size).movedim((4, 5), axes)


def _planes(volume: Tensor, conv: nn.Module) -> Tensor:
    """Convolves axes 2, 3 at every cell of axes 4, 5."""
    b, c, h, w, p, q = volume.shape
    planes = volume.permute(0, 4, 5, 1, 2, 3).reshape(b * p * q, c, h, w)
    out = conv(planes)
    return out.view(b, p, q, *out.shape[1:]).permute(0, 3, 4, 5, 1, 2)


class CostEmbedding(nn.Module):
    """Layers of centre-pivot convolution, group normalisation (over the channels of a group and all
    four axes) and ReLU. ``layers``: (channels in, channels out, stride, transposed) of each."""

    def __init__(self, layers: list[tuple[int, int, int, bool]], groups: int = 1) -> None:
        super().__init__()
        # The names are the official checkpoints'.
        self.embedder = nn.Module()
        self.embedder.conv4d = nn.ModuleList(
            nn.ModuleList([CentrePivot(*layer), nn.GroupNorm(groups, layer[1])]) for layer in layers
        )

    def forward(self, volume: Tensor) -> Tensor:
        for conv, norm in self.embedder.conv4d:
            volume = F.relu(norm(conv(volume)), inplace=True)
        return volume

    def of_features(self, source: Tensor, target: Tensor) -> Tensor:
        """The embedding of the correlation of unit features (B, C, hs, ws) and (B, C, ht, wt).

        Where the first layer pools, the correlation is pooled as it is computed and never whole
        (64 MB for 64 cells a side).
        """
        (first, norm), *others = self.embedder.conv4d
        if first.stride == 1 or first.transposed or len(source) > 1 or not onednn.takes(source):
            volume = correlate(source, target)
            return self(volume.view(-1, 1, *source.shape[2:], *target.shape[2:]))
        volume = F.relu(norm(first.convolve(*pooled_correlation(source, target))), inplace=True)
        for conv, norm in others:
            volume = F.relu(norm(conv(volume)), inplace=True)
        return volume


def pooled_correlation(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The correlation of unit features (1, C, hs, ws) and (1, C, ht, wt), :func:`pooled` along the
    target axes, and along the source axes, two source rows at a time."""
    cells = target.flatten(2)[0].T.contiguous()
    by_target, by_source = [], []
    for rows in source[0].permute(1, 2, 0).split(2):  # (2, ws, C)
        product = onednn.apply(lambda x: F.linear(x, cells), rows.reshape(-1, rows.shape[2]))
        volume = product.view(1, 1, *rows.shape[:2], *target.shape[2:])
        by_target.append(pooled(volume, TARGET))
        by_source.append(pooled(volume, SOURCE))
    return torch.cat(by_target, 2), torch.cat(by_source, 2)


def pyramid_embedding(size: int, feature_size: int, channels: int = 16) -> CostEmbedding:
    """The embedder that brings a correlation of ``size``^4 to ``channels`` of ``feature_size``^4.

    ValueError for sizes it cannot reach with two layers (a half, one, two or four times).
    """
    strides = {
        size == 4 * feature_size: (2, 2, False),
        size == 2 * feature_size: (2, 1, False),
        size == feature_size: (1, 1, False),
        2 * size == feature_size: (2, 1, True),
    }
    if True not in strides:
        raise ValueError(f"a level of {size} cells a side does not lead to {feature_size}")
    first, second, transposed = strides[True]
    return CostEmbedding([(1, 4, first, transposed), (4, channels, second, transposed)])
