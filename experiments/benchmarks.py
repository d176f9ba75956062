"""Speed of the suite itself: ``nemf bench``. Every ratio is measured within one run."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from PIL import Image as PILImage

from nemf.datasets.index import PairDataset
from nemf.datasets.spair import SPair71k
from nemf.errors import NemfError
from nemf.pairs import ImageRecord, Pair, Plan
from nemf.predictions import FORMAT, Predictions, prediction_table
from nemf.scoring import get_protocol

FORWARD = Plan("src2trg")


def run(names: tuple[str, ...], *, quick: bool) -> None:
    """Runs the named benchmarks (all by default) and prints what they measured."""
    for name in names:
        if name not in BENCHMARKS:
            raise NemfError(f"unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}")
    click.echo(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {platform.platform()}")
    for name in names or tuple(BENCHMARKS):
        click.echo(f"\n{name}: {BENCHMARKS[name].__doc__}")
        with tempfile.TemporaryDirectory() as folder:
            for line in BENCHMARKS[name](Path(folder), quick):
                click.echo(f"  {line}")


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of some runs."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def bench_score(folder: Path, quick: bool) -> list[str]:
    """prediction file to every mean and interval: 6 alphas x 18 classes, parquet on disk."""
    from reports.records import metrics, score_pairs

    n_pairs = 500 if quick else 12_234
    file = folder / "predictions.parquet"
    random_predictions(n_pairs, 18, 27).write(file)
    protocol = get_protocol("canonical@1")
    score = _seconds(lambda: score_pairs(Predictions.read(file), protocol))
    whole = _seconds(lambda: metrics(score_pairs(Predictions.read(file), protocol)))
    part = min(n_pairs, 500)
    loop = _seconds(lambda: _score_pair_by_pair(file, part), 1) * n_pairs / part
    return [
        f"{n_pairs} pairs: read and score {score:.2f} s; with means and intervals {whole:.2f} s",
        (
            f"pair by pair in Python: {loop:.1f} s (extrapolated from {part} pairs): "
            f"{loop / score:.0f} times the vectorised scoring"
        ),
    ]


def random_predictions(n_pairs: int, n_classes: int, images_per_class: int) -> Predictions:
    """A prediction file of SPair's shape with random content (for timing only)."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n_pairs):
        category = f"class{number * n_classes // n_pairs:02d}"
        images = []
        for k in rng.choice(images_per_class, 2, replace=False):
            name = f"{category}/{k}"
            kps = rng.uniform(0, 300, (12, 2)).astype(np.float32)
            images.append(
                ImageRecord(Path(name), name, name, (375, 500), kps, tuple(map(str, range(12))))
            )
        n = int(rng.integers(3, 13))
        points = [image.kps[:n] for image in images]
        box = np.float32([10, 10, 310, 300])
        flags = {"viewpoint": number % 3, "scale": number % 3, "truncation": 0, "occlusion": 0}
        names = tuple(map(str, range(n)))
        pair = Pair(f"{number:06d}", category, *images, *points, names, box, box, flags)
        answer = points[1] + rng.normal(0, 20, (n, 2)).astype(np.float32)
        rows.append((number, pair.oriented(FORWARD), answer, None))
    meta = {"format": FORMAT, "dataset": "spair", "title": "random", "layout": "spair"}
    meta |= {"split": "test", "synthetic": True, "plan": str(FORWARD), "matcher": {"name": "x"}}
    return Predictions(prediction_table(rows), meta)


def _score_pair_by_pair(file: Path, n_pairs: int) -> float:
    """The obvious loop, as a yardstick: six alphas, per image, without intervals."""
    table = Predictions.read(file).table.to_pandas()
    means = []
    for _, pair in table[table["pair_number"] < n_pairs].groupby("pair_number"):
        delta = pair[["pred_x", "pred_y"]].to_numpy() - pair[["true_x", "true_y"]].to_numpy()
        box = pair.iloc[0]
        width = box["reference_bbox_x2"] - box["reference_bbox_x1"]
        height = box["reference_bbox_y2"] - box["reference_bbox_y1"]
        error = np.sqrt((delta**2).sum(1))
        alphas = (0.01, 0.03, 0.05, 0.07, 0.1, 0.15)
        means.append([(error <= a * max(width, height)).mean() for a in alphas])
    return float(np.mean(means))


def bench_index(folder: Path, quick: bool) -> list[str]:
    """opening a layout of 70,000 pairs: the first time and after."""
    n_pairs = 2_000 if quick else 70_000
    made = large_layout(folder / "data", "trn", n_pairs, 100)
    cache = folder / "cache"

    def load() -> PairDataset:
        return SPair71k(folder / "data", "trn", cache_dir=cache)

    first = _seconds(load, 1)
    again = _seconds(load)
    return [
        (
            f"{n_pairs} pairs of {made} images: first {first:.1f} s, then {again:.2f} s "
            f"({first / again:.0f} times faster); files on {_file_system(folder)}"
        )
    ]


def large_layout(root: Path, split: str, n_pairs: int, per_class: int) -> int:
    """Writes one split of SPair-71k's layout with 18 classes of so many tiny random images (for
    measuring only), and returns how many images that are."""
    base, rng = root / "SPair-71k", np.random.default_rng(0)
    for part in ("Layout/large", f"PairAnnotation/{split}", "JPEGImages"):
        (base / part).mkdir(parents=True, exist_ok=True)
    classes = 18
    for c in range(classes):
        (base / "JPEGImages" / f"c{c:02d}").mkdir(exist_ok=True)
        for k in range(per_class):
            pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
            place = base / "JPEGImages" / f"c{c:02d}" / f"{split}{k:03d}.jpg"
            PILImage.fromarray(pixels).save(place)
    points = rng.integers(0, [64, 48], (classes, per_class, 12, 2))
    lines = []
    for number in range(n_pairs):
        category = f"c{number * classes // n_pairs:02d}"
        a = int(rng.integers(per_class))
        b = (a + int(rng.integers(1, per_class))) % per_class
        n = int(rng.integers(3, 13))
        kps = [points[number * classes // n_pairs, k, :n].tolist() for k in (a, b)]
        names = [f"{split}{k:03d}" for k in (a, b)]
        lines.append(f"{number:06d}-{names[0]}-{names[1]}:{category}")
        fields = {
            f"{side}_imname": f"{name}.jpg"
            for side, name in zip(("src", "trg"), names, strict=True)
        }
        fields |= {"category": category}
        fields |= {"src_imsize": [64, 48, 3], "trg_imsize": [64, 48, 3], "mirror": 0}
        fields |= {"src_bndbox": [2, 2, 60, 44], "trg_bndbox": [2, 2, 60, 44]}
        fields |= {"src_kps": kps[0], "trg_kps": kps[1], "kps_ids": list(map(str, range(n)))}
        fields |= {"viewpoint_variation": 0, "scale_variation": 0, "truncation": 0, "occlusion": 0}
        (base / "PairAnnotation" / split / f"{lines[-1]}.json").write_text(json.dumps(fields))
    (base / "Layout" / "large" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return classes * per_class


def _file_system(path: Path) -> str:
    stat = os.statvfs(path)
    return f"a volume with {stat.f_blocks * stat.f_frsize / 2**30:.0f} GiB"


def bench_encode(folder: Path, quick: bool) -> list[str]:
    """encoding each image once against encoding it anew for every pair, same pairs."""
    import torch

    from experiments.configurations import load_config
    from experiments.feature_cache import FeatureCache
    from experiments.prediction import predict_pairs
    from nemf.datasets.synthetic import make_synthetic
    from nemf.matcher import build_matcher

    make_synthetic(folder, preset="tiny" if quick else "table1", workers=2)
    dataset = SPair71k(folder, "test", cache_dir=folder / "cache")
    pairs = [pair.oriented(FORWARD) for pair in dataset][: 5 if quick else 240]
    lines = []
    for name in ("nearest_small", "hpf_small"):
        model = dict(load_config(f"{name}/spair").model)
        matcher = build_matcher(model.pop("type"), **model)
        results, seconds, encoded = [], [], []
        for budget in (2**31, 0):
            cache = FeatureCache(matcher, dataset, budget)
            start = time.perf_counter()
            with torch.no_grad():
                results.append(predict_pairs(matcher, cache, pairs, 8))
            seconds.append(time.perf_counter() - start)
            encoded.append(cache.encoded)
        same = all(
            np.array_equal(a, b, equal_nan=True) for (a, _), (b, _) in zip(*results, strict=True)
        )
        if not same:
            raise NemfError(f"{name}: encoding once changed a prediction; please report this")
        ratio = seconds[1] / seconds[0]
        lines.append(
            f"{name}: {len(pairs)} pairs, {encoded[0]} encodings {seconds[0]:.2f} s against "
            f"{encoded[1]} encodings {seconds[1]:.2f} s: {ratio:.1f} times faster, same answers"
        )
    return lines


BENCHMARKS = {"score": bench_score, "index": bench_index, "encode": bench_encode}
