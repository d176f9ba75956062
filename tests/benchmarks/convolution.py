"""Convolutions over four and six axes against the straightforward loop of 3-D convolutions.

``python -m tests.benchmarks.convolution [SHARE]`` measures the layers of NC-Net and CHM at their
sizes. The loop treats one place of the first axis (for six axes: one place of the first three) and
one tap at a time, as the official code of NC-Net does; only a SHARE (default 0.2) of its places is
run and extrapolated.
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from nemf.convolution import convolve
from tests.benchmarks.nemf_search import shortest

LAYERS = {
    "NC-Net, first layer": ((1, 1, 25, 25, 25, 25), (16, 1, 5, 5, 5, 5)),
    "NC-Net, second layer": ((1, 16, 25, 25, 25, 25), (16, 16, 5, 5, 5, 5)),
    "NC-Net, third layer": ((1, 16, 25, 25, 25, 25), (1, 16, 5, 5, 5, 5)),
    "CHM, scales and positions": ((1, 1, 3, 3, 15, 15, 15, 15), (1, 1, 3, 3, 5, 5, 5, 5)),
    "CHM, positions": ((1, 1, 30, 30, 30, 30), (1, 1, 5, 5, 5, 5)),
}


def looped(volume: Tensor, weight: Tensor, places: list[tuple[int, ...]]) -> Tensor:
    """(len(places), B, O, *sizes[-3:]): the convolution at ``places`` of all axes but the last
    three, a 3-D convolution for each place and tap inside the volume."""
    sizes, kernel = volume.shape[2:-3], weight.shape[2:-3]
    margin = [side // 2 for side in weight.shape[-3:]]
    out = []
    for place in places:
        total = volume.new_zeros(len(volume), len(weight), *volume.shape[-3:])
        for tap in itertools.product(*map(range, kernel)):
            there = [i + p - k // 2 for i, p, k in zip(place, tap, kernel, strict=True)]
            if all(0 <= i < n for i, n in zip(there, sizes, strict=True)):
                at = (slice(None), slice(None), *there)
                total += F.conv3d(
                    volume[at], weight[(slice(None), slice(None), *tap)], padding=margin
                )
        out.append(total)
    return torch.stack(out)


@torch.no_grad()
def main(share: float = 0.2) -> None:
    """Prints both times of every layer and their ratio."""
    print(f"{torch.get_num_threads()} threads")
    for name, (shape, kernel) in LAYERS.items():
        generator = torch.Generator().manual_seed(0)
        volume, weight = (torch.randn(x, generator=generator) for x in (shape, kernel))
        ours, found = shortest(lambda v=volume, w=weight: convolve(v, w), 2)
        every = list(itertools.product(*map(range, shape[2:-3])))
        count = max(round(share * len(every)), 1)
        step = len(every) / count
        places = [every[int(i * step)] for i in range(count)]
        theirs, expected = shortest(lambda v=volume, w=weight, p=places: looped(v, w, p), 1)
        theirs *= len(every) / count
        for place, value in zip(places, expected, strict=True):
            at = (slice(None), slice(None), *place)
            torch.testing.assert_close(found[at], value, rtol=1e-4, atol=1e-3)
        print(
            f"{name}: {ours:.3f} s, loop {theirs:.2f} s (from {count} of {len(every)} places), "
            f"ratio {theirs / ours:.1f}; same values"
        )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
