"""Convolutions and resizing over more than three axes, as matching networks run them over
correlations.

As in all deep learning the kernel is not flipped: out[i] = sum_p weight[p] x[i + p - k // 2].
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNEL_BLOCK = 16  # a CPU computes so many output channels at once


def convolve(volume: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, O, *sizes): ``volume`` (B, C, *sizes) under ``weight`` (O, C, *kernel), stride 1, zeros
    outside, so that the sizes stay; ``bias`` (O,) is added once.

    Any number of axes from four on, kernels of odd sides; differentiable. Computed by torch's 3-D
    convolution over the last three axes: the taps along the leading axes are channels, of its input
    along the first of them, of its output (shifted and added afterwards) along the rest. Raises
    ValueError for shapes that do not belong together.
    """
    kernel = weight.shape[2:]
    if volume.ndim != weight.ndim or len(kernel) < 4 or volume.shape[1] != weight.shape[1]:
        raise ValueError(
            f"a volume {tuple(volume.shape)} (B, C, *sizes) and a weight {tuple(weight.shape)} "
            "(O, C, *kernel) do not belong together"
        )
    if any(side % 2 == 0 for side in kernel):
        raise ValueError(f"kernels must have odd sides, not {tuple(kernel)}")
    cut = _cut(weight)
    partial = _convolve_last(_gather(volume, kernel[:cut]), weight, cut)
    out = _scatter(partial, kernel[cut:-3], cut)
    if bias is not None:
        out = out + bias.view(-1, *[1] * len(kernel))
    return out


def doubled(volume: Tensor) -> Tensor:
    """``volume`` (..., h, w, u, v) at twice the size along each of these axes, (bi)linear between
    the centres of the outermost cells (align_corners=True)."""
    for _ in range(2):  # the last two axes, then the others in their place
        *outer, h, w, u, v = volume.shape
        planes = volume.reshape(-1, h * w, u, v)
        planes = F.interpolate(planes, (2 * u, 2 * v), mode="bilinear", align_corners=True)
        volume = planes.view(*outer, h, w, 2 * u, 2 * v)
        volume = volume.movedim((-2, -1), (-4, -3))
    return volume


def _cut(weight: Tensor) -> int:
    """How many leading axes have their taps among the input channels: where that costs the least,
    of several cuts the one that leaves the least to shift."""
    c_out, c_in, *kernel = weight.shape
    leading = kernel[:-3]
    costs = {}
    for cut in range(len(leading) + 1):
        blocks = math.ceil(c_out * math.prod(leading[cut:]) / CHANNEL_BLOCK)
        costs[cut] = c_in * math.prod(leading[:cut]) * blocks
    return max(cut for cut, cost in costs.items() if cost == min(costs.values()))


def _gather(volume: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """(B, *sizes[:-3], C, *kernel, *sizes[-3:]): the neighbours along the first axes."""
    n_leading = volume.ndim - 5
    margins = [0, 0] * (volume.ndim - 2 - len(kernel))
    for side in reversed(kernel):
        margins += [side // 2, side // 2]
    windows = F.pad(volume, margins)
    for axis, side in enumerate(kernel, start=2):
        windows = windows.unfold(axis, side, 1)  # the taps become the last axis
    windows = windows.movedim(1, 1 + n_leading)
    last = range(2 + n_leading, 5 + n_leading)
    return windows.movedim(list(last), [-3, -2, -1])


def _convolve_last(gathered: Tensor, weight: Tensor, cut: int) -> Tensor:
    """(B, *sizes[:-3], O, *kernel[cut:-3], *sizes[-3:])."""
    n_leading = weight.ndim - 5
    outer = weight.shape[2 + cut : -3]
    # (O * outer taps, C * inner taps, *kernel[-3:])
    matrix = weight.movedim(list(range(2 + cut, 2 + n_leading)), list(range(1, 1 + len(outer))))
    matrix = matrix.flatten(1 + len(outer), -4).flatten(0, len(outer))
    margins = [side // 2 for side in weight.shape[-3:]]
    out = []
    for part in gathered.unbind(1):  # what is gathered stays in the processor's cache
        images = part.flatten(n_leading, -4).flatten(0, n_leading - 1)
        found = F.conv3d(images, matrix, padding=margins)
        out.append(found.view(*part.shape[:n_leading], len(weight), *outer, *found.shape[-3:]))
    return torch.stack(out, 1)


def _scatter(partial: Tensor, kernel: tuple[int, ...], cut: int) -> Tensor:
    """(B, O, *sizes): the taps along the axes from ``cut`` on shifted into place and added."""
    channels = 1 + cut + len(kernel)
    for axis, side in enumerate(kernel, start=1 + cut):
        size, reach = partial.shape[axis], side // 2
        padded = F.pad(partial, [0, 0] * (partial.ndim - 1 - axis) + [reach, reach])
        taps = [padded.narrow(axis, tap, size).select(channels + 1, tap) for tap in range(side)]
        partial = reduce(torch.add, taps)
    return partial.movedim(channels, 1)
