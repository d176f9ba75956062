"""Cost embeddings: centre-pivot 4-D convolutions over correlation volumes.

Volumes are (B, C, hs, ws, ht, wt): source rows and columns, then target rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CentrePivot(nn.Module):
    """A 4-D convolution cut down to its two central planes (Min & Cho, CVPR 2021; NeMF, sec. 4).

    ``query_conv`` (kernel 3) runs over the source axes at every target cell, ``supp_conv`` over the
    target axes at every source cell; the results are added. With ``stride`` 2 the other two axes
    are brought to size first: by max-pooling, or when ``transposed`` (which doubles all axes) by a
    bilinear resize (align_corners=True).
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, transposed: bool = False) -> None:
        super().__init__()
        self.stride, self.transposed = stride, transposed
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
        # Both halves are one operation: over the first pair of axes, and on the transposed volume.
        swapped = volume.permute(0, 1, 4, 5, 2, 3)
        by_source = self._planes(volume, self.query_conv)
        by_target = self._planes(swapped, self.supp_conv)
        return by_source + by_target.permute(0, 1, 4, 5, 2, 3)

    def _planes(self, volume: Tensor, conv: nn.Module) -> Tensor:
        """Convolves axes 2, 3 at every cell of axes 4, 5, which are resized first."""
        b, c, h, w = volume.shape[:4]
        if self.stride > 1:
            rest = volume.reshape(b * c * h * w, 1, *volume.shape[4:])
            if self.transposed:
                size = [self.stride * n for n in rest.shape[2:]]
                rest = F.interpolate(rest, size, mode="bilinear", align_corners=True)
            else:
                rest = F.max_pool2d(rest, 2, 2, ceil_mode=True)
            volume = rest.reshape(b, c, h, w, *rest.shape[2:])
        p, q = volume.shape[4:]
        planes = volume.permute(0, 4, 5, 1, 2, 3).reshape(b * p * q, c, h, w)
        out = conv(planes)
        return out.reshape(b, p, q, *out.shape[1:]).permute(0, 3, 4, 5, 1, 2)


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
            volume = torch.relu(norm(conv(volume)))
        return volume


def pyramid_embedding(size: int, feature_size: int) -> CostEmbedding:
    """The embedder that brings a correlation of ``size``^4 to 16 channels of ``feature_size``^4.

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
    return CostEmbedding([(1, 4, first, transposed), (4, 16, second, transposed)])
