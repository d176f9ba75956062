"""The published search, taken literally, as a yardstick for the sparse one.

``python -m tests.benchmarks.nemf_search [HEIGHT WIDTH]`` compares both on random weights and
extrapolates the literal side from a measured part of its queries.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemf import onednn
from nemf.aggregation import soft_argmax
from nemf.field.nemf import Encoded, NeMF, NeMFFeatures
from nemf.field.search import initial_field, optimise, read_field
from nemf.geometry import to_norm
from nemf.pairs import Image

QUERIES_AT_ONCE = 100_000  # as published; the volume is embedded anew for each such part
# Floating point operations of the paper's configuration (two per multiply-add).
IMAGE_GFLOP = 20.4 + 0.25  # trunk, projections
PAIR_GFLOP = 9.81 + 0.77 + 254.5 + 9.81  # correlations, embedders, decoder, embedded volume
QUERY_GFLOP = 0.928e-3


def literal_scores(matcher: NeMF, encoded: Encoded, sources: Tensor, targets: Tensor) -> Tensor:
    """(N,) logits as published: the volume is embedded anew, all its channels x target cells are
    sampled at the source point, the result at the target point."""
    field, size = matcher.mlp_model, matcher.feature_size
    n, channels = len(sources), field.channels
    volume = field.embed(encoded.refined)  # (S * T, C)
    by_source = volume.view(size, size, size * size * channels).permute(2, 0, 1).contiguous()
    scores = []
    for start in range(0, n, 2_000):  # 2,000 x 16,384 floats are 131 MB
        s, t = sources[start : start + 2_000], targets[start : start + 2_000]
        at_source = F.grid_sample(by_source[None], s[None, None], align_corners=True)[0, :, 0]
        at_source = at_source.view(size, size, channels, len(s)).permute(3, 2, 0, 1)
        costs = F.grid_sample(at_source, t[:, None, None], align_corners=True)[:, :, 0, 0]
        mlp = field.mlp[0]
        code = torch.cat([field.harmonic(s), field.harmonic(t)], 1)
        scores.append(mlp.layers(mlp.fc_p(code), costs)[:, 0])
    return torch.cat(scores)


def literal_search(
    matcher: NeMF, encoded: Encoded, target: NeMFFeatures, uniform: list[Tensor]
) -> Tensor:
    """(H, W, 2): PatchMatch over every pixel, all six candidates scored every time."""
    height, width = target.canvas
    axis = torch.linspace(-1, 1, matcher.feature_size)
    positions = soft_argmax(encoded.refined.mean(1), axis, axis)
    start = current = initial_field(positions, height, width)
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).reshape(-1, 2)

    def score(candidates: Tensor) -> Tensor:
        parts = zip(
            candidates.reshape(-1, 2).split(QUERIES_AT_ONCE), grid.split(QUERIES_AT_ONCE),
            strict=True,
        )  # fmt: skip
        return torch.cat([literal_scores(matcher, encoded, c, g) for c, g in parts])

    for u in uniform:
        padded = F.pad(current.permute(2, 0, 1)[None], (1, 1, 1, 1), "reflect")[0].permute(1, 2, 0)
        around = [(1, 1), (1, 0), (0, 1), (1, 2), (2, 1)]  # own, left, up, right, down
        candidates = [padded[r : r + height, c : c + width] for r, c in around]
        scores = torch.stack([score(c) for c in candidates])
        best = (scores == scores.amax(0)).byte().argmax(0)
        kept = torch.stack(candidates).flatten(1, 2)[best, torch.arange(height * width)]
        tried = kept + (u.reshape(-1, 2) - 0.5) * (2 * matcher.alpha)
        better = score(tried) > scores.amax(0)
        current = torch.where(better[:, None], tried, kept).view(height, width, 2)
        current = current.clamp(start - matcher.alpha, start + matcher.alpha)
    return current


def picture(seed: int, height: int, width: int) -> Image:
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 12)).astype(np.float32))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)[0]
    return Image.from_pixels(smooth.permute(1, 2, 0).byte().numpy())


def uneven(matcher: NeMF) -> NeMF:
    """``matcher`` with its field's residual blocks, zero as they begin, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in matcher.mlp_model.mlp[0].blocks:
            block.fc_1.weight.copy_(torch.randn(256, 256, generator=generator) / 16)
    return matcher


@torch.no_grad()
def main(height: int, width: int, n_points: int = 10) -> None:
    """Prints the time of a whole pair, where it goes, and that of the literal algorithm."""
    matcher = uneven(NeMF(init="random").eval())
    field, size = matcher.mlp_model, matcher.feature_size
    images = picture(0, height, width), picture(1, height, width)
    rng = np.random.default_rng(2)
    points = torch.from_numpy(rng.uniform(2, [width - 3, height - 3], (n_points, 2))).float()

    def pair() -> None:
        (target,), (source,) = (matcher.encode([i], "query") for i in images)
        matcher.match([target], [source], [points])

    whole, _ = shortest(pair)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    encoding, (target, source) = shortest(lambda: [matcher.encode([i], "query")[0] for i in images])
    pairing, encoded = shortest(lambda: matcher.encode_pairs([source], [target]))
    targets = to_norm(points, target.canvas)
    searching, found = shortest(lambda: matcher.search(encoded, [target], [source], [targets])[0])
    begin, volume = read_field(found, targets), encoded.volume
    climbing, _ = shortest(
        lambda: optimise(field, volume, size, begin, targets, alpha=0.1, official=False)
    )
    queries = queries_of(matcher, lambda: matcher.search(encoded, [target], [source], [targets])[0])
    gflop = 2 * IMAGE_GFLOP + PAIR_GFLOP + queries * QUERY_GFLOP
    rows, square = torch.randn(1024, 256), torch.nn.Linear(256, 256)
    product, _ = shortest(lambda: onednn.linear(square, rows), 50)
    speed = 2 * 1024 * 256 * 256 / product / 1e9

    where = [torch.rand(QUERIES_AT_ONCE, 2) * 2 - 1 for _ in range(2)]
    begun = time.perf_counter()
    literal = literal_scores(matcher, encoded, *where)
    seconds = time.perf_counter() - begun
    side = field.at_targets(where[1], size)
    fast = field.score(volume, where[0], side, torch.arange(QUERIES_AT_ONCE))
    difference = float((literal - fast).abs().max())
    assert difference < 1e-4, difference
    total = 6 * matcher.iterations * height * width
    extrapolated = seconds * total / QUERIES_AT_ONCE

    print(f"{height}x{width}, {n_points} keypoints, {torch.get_num_threads()} threads")
    print(
        f"ours: {whole:.2f} s a pair (both images {encoding:.2f}, pair {pairing:.2f}, search "
        f"{searching:.2f}, optimisation {climbing:.2f}); peak memory {peak_gb:.2f} GB"
    )
    print(
        f"floor: {queries:,} queries, {gflop:.0f} GFLOP in all at {speed:.0f} GFLOP/s of a "
        f"256x256 product: {gflop / speed:.2f} s; ours is {whole * speed / gflop:.2f} times that"
    )
    print(
        f"literal search: {extrapolated:.0f} s, extrapolated from {QUERIES_AT_ONCE:,} of {total:,} "
        f"queries ({seconds:.1f} s); same scores within {difference:.1e}"
    )
    print(f"ratio (search of the literal side only): {extrapolated / whole:.0f}")


def shortest(work: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """The seconds of the fastest of some runs, after one to warm up, and what they return."""
    work()
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - begun)
    return min(taken), result


def queries_of(matcher: NeMF, work: Callable[[], Any]) -> int:
    """How many queries of the field ``work`` scores."""
    count = 0
    score = matcher.mlp_model.score

    def counting(volume: Tensor, sources: Tensor, *rest: Any) -> Tensor:
        nonlocal count
        count += len(sources)
        return score(volume, sources, *rest)

    matcher.mlp_model.score = counting  # type: ignore[method-assign]
    try:
        work()
    finally:
        del matcher.mlp_model.score
    return count


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:3] or (375, 500)))
