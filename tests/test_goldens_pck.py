"""PCK against the numbers of the authors' own evaluators (50 pairs, exact hits among them)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import nemf
from nemf.scoring import correct, errors_px

pytestmark = pytest.mark.real
FILES = ["pck_cats", "pck_nemf"]


class Golden:
    """One file, with invalid keypoints as NaN thresholds instead of padding."""

    def __init__(self, file: Path) -> None:
        content = np.load(file)
        self.alphas = content["alphas"]
        self.per_pair = content["pck_per_pair"]  # (6, 50), percent
        self.mean = content["mean_pck"]
        true = content["src_kps"]
        pred = content["pred_kps"].transpose(0, 2, 1)
        valid = np.arange(true.shape[1]) < content["n_pts"][:, None]
        flat = errors_px(pred.reshape(-1, 2), true.reshape(-1, 2), np.ones((true.size // 2, 2)))
        self.error_px = flat.reshape(valid.shape)
        self.threshold_px = np.where(valid, content["pckthres"][:, None], np.float32(np.nan))
        self.n_pts = content["n_pts"]


@pytest.fixture(params=FILES)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    return Golden(shared / "goldens" / f"{request.param}.npz")


def test_each_pair_at_each_alpha(golden: Golden) -> None:
    for a, alpha in enumerate(golden.alphas):
        for i, n in enumerate(golden.n_pts):
            ours = nemf.pck(golden.error_px[i], golden.threshold_px[i], float(alpha))
            assert round(ours * n) == round(golden.per_pair[a, i] * n / 100)
            assert 100 * ours == pytest.approx(golden.per_pair[a, i], abs=1e-12)


def test_mean_over_pairs(golden: Golden, shared: Path) -> None:
    stored = json.loads((shared / "goldens" / "pck_mean.json").read_text())["mean_pck"]
    for alpha, mean in zip(golden.alphas, golden.mean, strict=True):
        ours = 100 * nemf.pck(golden.error_px, golden.threshold_px, float(alpha))
        assert ours == pytest.approx(mean, abs=1e-12)
        assert ours == pytest.approx(stored[f"{alpha:g}"], abs=1e-6)  # averaged in float32 there


def test_exact_hits_are_among_them(golden: Golden) -> None:
    """The files can tell ``<=`` from ``<``, so agreeing with them means something."""
    strict = wide = official = 0
    for a, alpha in enumerate(golden.alphas):
        valid = ~np.isnan(golden.threshold_px)
        strict += (
            correct(golden.error_px, golden.threshold_px, alpha, inclusive=False) & valid
        ).sum()
        wide += (correct(golden.error_px, golden.threshold_px, alpha) & valid).sum()
        official += np.round(golden.per_pair[a] * golden.n_pts / 100).sum()
    assert wide == official
    assert strict < official
