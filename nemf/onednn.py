"""Layers by oneDNN on the CPU, where no gradient is wanted.

torch's own float32 products go to MKL, which keeps to AVX2 on processors that are not Intel's;
oneDNN uses what the processor has (with AVX-512 2.2 times as fast here) and differs by rounding
only. torch chooses it for tensors in its layout, so the same modules run either way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS_AT_ONCE = 1024  # so that a large product's copies in and out stay in the processor's cache


def takes(x: Tensor) -> bool:
    """Whether work on ``x`` may go to oneDNN: float32 on the CPU, no gradient, no autocast."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.layout == torch.strided
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def apply(layers: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``layers(*inputs)``, whose operations oneDNN must know (linear, convolution, batch norm,
    pooling, relu, gelu, +); in oneDNN's layout if it :func:`takes` the first input."""
    if not takes(inputs[0]):
        return layers(*inputs)
    return layers(*(x.to_mkldnn() for x in inputs)).to_dense()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` for ``x`` (..., features)."""
    rows = x.reshape(-1, x.shape[-1])
    if not takes(x) or len(rows) <= ROWS_AT_ONCE:
        return apply(layer, x)
    out = x.new_empty(len(rows), layer.out_features)
    for part, result in zip(rows.split(ROWS_AT_ONCE), out.split(ROWS_AT_ONCE), strict=True):
        result.copy_(apply(layer, part))
    return out.unflatten(0, x.shape[:-1])


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor, size: int, dim: int) -> Tensor:
    """``function(x)``, same shape out, for a function that treats the slices of ``dim`` one by one:
    ``size`` at a time if oneDNN :func:`takes` it, so that what is between stays in the cache."""
    if not takes(x):
        return function(x)
    out = torch.empty_like(x)
    for part, result in zip(x.split(size, dim), out.split(size, dim), strict=True):
        result.copy_(function(part))
    return out
