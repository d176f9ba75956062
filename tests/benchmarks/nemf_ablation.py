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

import numpy as np
import torch

from experiments.jobs import open_dataset
from experiments.prediction import FeatureCache, predict_pairs
from nemf.field.nemf import NeMF
from nemf.predictions import Predictions, dataset_meta, prediction_table
from nemf.scoring import get_protocol
from reports.records import alpha_name, score_pairs
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
    plan = protocol.plan.for_layout(opened.layout)
    count = min(int(pairs or len(opened)), len(opened))
    chosen = np.linspace(0, len(opened) - 1, count).round().astype(int)
    oriented = [opened[int(i)].oriented(plan) for i in chosen]
    ids = tuple(int(k) for k in layers.split(","))
    shares, seconds = {}, {}
    for name, settings in VARIANTS.items():
        matcher = NeMF(backbone=backbone, layers=ids, weights=weights, **settings).eval()
        begun = time.perf_counter()
        answers = predict_pairs(matcher, FeatureCache(matcher, opened, 2**31), oriented, 8)
        seconds[name] = (time.perf_counter() - begun) / count
        rows = [(int(i), p, *a) for i, p, a in zip(chosen, oriented, answers, strict=True)]
        predictions = Predictions(prediction_table(rows), dataset_meta(opened, plan))
        frame = score_pairs(predictions, protocol, list(ALPHAS)).frame
        shares[name] = {a: (frame[alpha_name(a)] / frame["n"]).to_numpy() for a in ALPHAS}
        images = frame["image_a"].to_numpy(), frame["image_b"].to_numpy()
        values = " ".join(f"{100 * shares[name][a].mean():6.1f}" for a in ALPHAS)
        print(f"{name:36} {values}   {seconds[name]:.2f} s a pair", flush=True)
    print(f"\n{opened.title} test, {count} of {len(opened)} pairs, canonical@1, @ {ALPHAS}")
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
