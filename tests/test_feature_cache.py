"""The feature cache: the same on disk and in memory; the order of pairs; pictures ahead."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import feature_cache
from experiments.configurations import load_config
from experiments.feature_cache import FeatureCache, n_bytes, visiting_order
from experiments.prediction import predict, predict_pairs
from nemf.datasets.pfwillow import PFWillow
from nemf.errors import NemfError
from nemf.matcher import Matcher, build_matcher
from nemf.pairs import OrientedPair, Plan
from nemf.predictions import Predictions
from tests.benchmarks.cache_order import hit_rate, optimal_hit_rate, requests, spair_sized
from tests.conftest import REPO

FORWARD = Plan("src2trg")


class Named(NamedTuple):
    map: torch.Tensor
    text: str


@dataclasses.dataclass(frozen=True)
class Frozen:
    values: Any
    size: tuple[int, int] = (3, 4)


class Rich(Matcher):
    """Features of every kind, that follow from the pixels."""

    card = build_matcher("copy").card

    def encode(self, images: Sequence[Any], role: str) -> list[Any]:
        pixels = torch.from_numpy(images[0].pixels).float()
        return [
            {
                "a": Named(pixels, "x"),
                "b": [pixels.permute(2, 0, 1), pixels[::2], pixels.to(torch.bfloat16).mT],
                "c": Frozen((images[0].pixels, images[0].pixels.T.copy())),
                "d": (pixels.mean(), torch.zeros(0, 3), pixels > 5, pixels[:1].expand(4, -1, -1)),
                "e": (3, None, "text"),
            }
        ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and same(vars(a), vars(b))
    return a == b


def test_features_on_disk_are_those_in_memory(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = PFWillow(tiny_pfwillow())
    oriented = [pair.oriented(FORWARD) for pair in dataset]
    memory = FeatureCache(Rich(), dataset, 2**30)
    disk = FeatureCache(Rich(), dataset, 2**30, tmp_path / "out")
    for pair in oriented * 2:
        for role in ("query", "reference"):
            one, other = memory.get(pair, role), disk.get(pair, role)
            assert same(one, other)
            assert n_bytes(one) == n_bytes(other) > 0
    assert (disk.asked, disk.encoded) == (memory.asked, memory.encoded) == (12, 4)
    first = disk.get(oriented[0], "query")["b"][0]  # a permuted one keeps its strides
    assert first.stride() == memory.get(oriented[0], "query")["b"][0].stride()


def test_the_disk_keeps_to_the_budget_and_is_cleared(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = PFWillow(tiny_pfwillow())
    oriented = [pair.oriented(FORWARD) for pair in dataset]
    memory = FeatureCache(Rich(), dataset, 2**30)
    size = max(n_bytes(memory.get(p, role)) for p in oriented for role in ("query", "reference"))
    place = tmp_path / "out"
    cache = FeatureCache(Rich(), dataset, size, place)
    for pair in oriented * 2:
        cache.get(pair, "query")
        cache.get(pair, "reference")
        stored = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
        assert 0 < stored <= size
    assert cache.encoded > 4
    del cache
    assert list(place.iterdir()) == []


def test_where_features_lie_changes_no_answer(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny_pfwillow()
    tables = []
    for place in ("memory", "disk"):
        config = load_config("nearest_small/pfwillow", {"predict.cache_on": place})
        file = predict(config, data=data, out=tmp_path / place, plan=FORWARD)
        tables.append(Predictions.read(file).table)
        assert not list((tmp_path / place).rglob(".features-*"))
    pd.testing.assert_frame_equal(tables[0].to_pandas(), tables[1].to_pandas(), check_exact=True)
    with pytest.raises(NemfError, match="cache_on must be memory or disk, not 'tape'"):
        predict(
            load_config("copy/pfwillow", {"predict.cache_on": "tape"}),
            data=data, out=tmp_path, plan=FORWARD,
        )  # fmt: skip


# -- order ----------------------------------------------------------------------------------------


def test_the_order_is_a_permutation_that_follows_from_the_pairs() -> None:
    pairs = spair_sized("shuffled", 300)
    order = visiting_order(pairs)
    assert sorted(order) == list(range(300))
    assert order == visiting_order(spair_sized("shuffled", 300))
    assert visiting_order([]) == []
    assert visiting_order(pairs[:1]) == [0]


def test_the_order_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """a-b first; of the rest b-a shares both images; then c-b its newer one; d-e none."""
    pairs = [FakePair(*text) for text in ("ab", "de", "cb", "ba")]
    assert visiting_order(pairs) == [0, 3, 2, 1]
    monkeypatch.setattr(feature_cache, "_WINDOW", 2)
    assert visiting_order(pairs) == [0, 1, 2, 3]


class FakePair:
    """Two images by name, as far as the order looks at a pair."""

    def __init__(self, query: str, reference: str) -> None:
        self.query, self.reference = FakeImage(query), FakeImage(reference)


@dataclasses.dataclass(frozen=True)
class FakeImage:
    hash: str


@pytest.mark.parametrize("listed", ["sorted", "shuffled"])
@pytest.mark.parametrize(("images", "least"), [(4, 0.5), (8, 0.6), (16, 0.75), (27, 0.98)])
def test_the_hit_rate_on_a_list_of_spairs_shape(listed: str, images: int, least: float) -> None:
    pairs = spair_sized(listed, 12_234)
    ours = hit_rate(requests(pairs, chunk=64), images)
    assert ours >= least
    assert ours >= hit_rate(requests(pairs, chunk=None), images)
    if images <= 8:  # better than any cache could do in the order of the list
        assert ours > optimal_hit_rate(requests(pairs, chunk=None), images)
    if images >= 27:  # a whole class: each image once
        assert ours == pytest.approx(1 - 486 / (2 * 12_234), abs=1e-9)


def test_the_simulation_is_the_cache(tiny_pfwillow: Callable[..., Path]) -> None:
    """The benchmark's rates are those of FeatureCache itself."""
    dataset = PFWillow(tiny_pfwillow())
    cache = FeatureCache(Counted(), dataset, 3 * 1024)
    pairs = [pair.oriented(FORWARD) for pair in dataset] * 9
    asked = requests(pairs, chunk=5)
    for start in range(0, len(pairs), 5):
        predict_pairs(cache.matcher, cache, pairs[start : start + 5], 1)
    assert 1 - cache.encoded / cache.asked == pytest.approx(hit_rate(asked, 3))


class Counted(Matcher):
    """A kibibyte per image; copies keypoints."""

    card = build_matcher("copy").card

    def encode(self, images: Sequence[Any], role: str) -> list[torch.Tensor]:
        return [torch.zeros(256)]

    def match(self, queries: Any, references: Any, points: Sequence[torch.Tensor]) -> list[Any]:
        from nemf.pairs import Matches

        return [Matches(kps.clone()) for kps in points]


def test_optimal_eviction_by_hand() -> None:
    """Two places, a b c a b c: the least recent goes too early each time, the optimum keeps one."""
    assert hit_rate("abcabc", 2) == 0
    assert optimal_hit_rate("abcabc", 2) == pytest.approx(2 / 6)
    assert hit_rate("aabb", 1) == optimal_hit_rate("aabb", 1) == 0.5


def test_answers_stand_where_their_pairs_do(tiny_pfwillow: Callable[..., Path]) -> None:
    dataset = PFWillow(tiny_pfwillow())
    cache = FeatureCache(build_matcher("copy"), dataset, 2**20)
    pairs = [dataset[i].oriented(FORWARD) for i in (0, 2, 1, 2, 0)]
    assert visiting_order(pairs) != [0, 1, 2, 3, 4]
    for batch in (1, 2, 5):
        for pair, (points, _) in zip(
            pairs, predict_pairs(cache.matcher, cache, pairs, batch), strict=True
        ):
            (h, w), (height, width) = pair.query.size, pair.reference.size
            expected = pair.query_kps * np.float32([width / w, height / h])
            np.testing.assert_allclose(points, expected, rtol=1e-5)


def test_coupled_pairs_keep_their_order(tiny_pfwillow: Callable[..., Path]) -> None:
    seen: list[OrientedPair] = []

    class Coupled(Counted):
        couples_pairs = True

        def match(self, queries: Any, references: Any, points: Sequence[torch.Tensor]) -> list[Any]:
            seen.extend(points)
            return super().match(queries, references, points)

    dataset = PFWillow(tiny_pfwillow())
    pairs = [dataset[i].oriented(FORWARD) for i in (0, 2, 1, 2, 0)]
    predict_pairs(Coupled(), FeatureCache(Coupled(), dataset, 0), pairs, 2)
    for points, pair in zip(seen, pairs, strict=True):
        np.testing.assert_array_equal(points.numpy(), pair.query_kps)


# -- pictures ahead -------------------------------------------------------------------------------


def test_pictures_are_decoded_ahead_by_another_thread(
    tiny_pfwillow: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PFWillow(tiny_pfwillow())
    decoded: list[tuple[str, bool]] = []
    real = dataset.pixels

    def pixels(record: Any) -> np.ndarray:
        decoded.append((record.name, threading.current_thread() is threading.main_thread()))
        return real(record)

    monkeypatch.setattr(dataset, "pixels", pixels)
    pairs = [pair.oriented(FORWARD) for pair in dataset]
    cache = FeatureCache(Counted(), dataset, 2**20)
    predict_pairs(cache.matcher, cache, pairs, 2)
    assert [name for name, _ in decoded] == list(dict.fromkeys(name for name, _ in decoded))
    assert len(decoded) == 4
    assert not any(main for _, main in decoded)
    assert cache.waited_s >= 0
    decoded.clear()
    cache.get(pairs[0], "query")  # held
    FeatureCache(Counted(), dataset, 2**20).get(pairs[0], "query")  # nobody said it was coming
    assert decoded == [(pairs[0].query.name, True)]


def test_a_picture_that_does_not_decode_is_told_when_it_is_needed(
    tiny_pfwillow: Callable[..., Path],
) -> None:
    dataset = PFWillow(tiny_pfwillow())
    pairs = [pair.oriented(FORWARD) for pair in dataset]
    pairs[2].query.path.write_bytes(b"no image")
    cache = FeatureCache(Counted(), dataset, 2**20)
    answers = predict_pairs(cache.matcher, cache, pairs[:2], 1)
    assert len(answers) == 2
    with pytest.raises(NemfError, match=r"duck_1\.png: image does not decode"):
        predict_pairs(cache.matcher, cache, pairs, 1)


def test_the_benchmark_prints_its_table() -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.cache_order", "--pairs", "400"],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("|") > 40
