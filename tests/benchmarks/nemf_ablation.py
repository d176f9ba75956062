"""What each part of NeMF's answer adds: the encoder alone, more iterations, the gradient steps.

``python -m tests.benchmarks.nemf_ablation DATASET DATA WEIGHTS BACKBONE LAYERS [PAIRS]``, e.g.
``animalpose data outputs/training/nemf_animalpose/nemf_animalpose.pth resnet18 4,6 200``: PCK under
``canonical@1`` on pairs spread over the test split (default: all), seconds a pair, and the paired
difference from the whole method with its 95 % interval.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from experiments.feature_cache import FeatureCache
from experiments.jobs import open_dataset
from experiments.matcher_training import score_spread_pairs
from nemf.field.nemf import NeMF
from nemf.scoring import get_protocol
from reports.records import alpha_name
from reports.statistics import paired_difference

ALPHAS = (0.01, 0.03, 0.05, 0.1)
WHOLE = "20 iterations, gradient steps"
VARIANTS = {
    "encoder alone": {"iterations": 0, "optimise": False},
    "no search, gradient steps": {"iterations": 0},
    **{f"{n} iterations, no gradient steps": {"iterations": n, "optimise": False}
       for n in (1, 2, 5, 10, 20, 40)},
    WHOLE: {"iterations": 20},
}  # fmt: skip


@torch.no_grad()
def main(
    dataset: str, data: str, weights: str, backbone: str, layers: str, pairs: str = ""
) -> None:
    protocol, opened = get_protocol("canonical@1"), open_dataset(dataset, Path(data), "test")
    ids = tuple(int(k) for k in layers.split(","))
    shares, seconds = {}, {}
    for name, settings in VARIANTS.items():
        matcher = NeMF(backbone=backbone, layers=ids, weights=weights, **settings).eval()
        begun = time.perf_counter()
        cache = FeatureCache(matcher, opened, 2**31)
        frame = score_spread_pairs(cache, protocol, ALPHAS, int(pairs or 0) or None, 8).frame
        seconds[name] = (time.perf_counter() - begun) / len(frame)
        shares[name] = {a: (frame[alpha_name(a)] / frame["n"]).to_numpy() for a in ALPHAS}
        images = frame["image_a"].to_numpy(), frame["image_b"].to_numpy()
        values = " ".join(f"{100 * shares[name][a].mean():6.1f}" for a in ALPHAS)
        print(f"{name:36} {values}   {seconds[name]:.2f} s a pair", flush=True)
    print(f"\n{opened.title} test, {len(frame)} of {len(opened)} pairs, canonical@1, @ {ALPHAS}")
    print(f"difference from '{WHOLE}' in points [95 %]:")
    for name in VARIANTS:
        if name != WHOLE:
            cells = []
            for a in ALPHAS:
                found = paired_difference(shares[name][a], shares[WHOLE][a], *images)
                cells.append(
                    f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
                )
            print(f"{name:36} " + "  ".join(cells))


if __name__ == "__main__":
    main(*sys.argv[1:])
