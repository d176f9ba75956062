"""Same seed, machine, chunks and threads: the same bytes, for any order and number of workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.configurations import load_config
from experiments.prediction import FeatureCache, predict, predict_pairs
from experiments.training import train
from nemf.datasets.spair import SPair71k
from nemf.matcher import Matcher, build_matcher
from nemf.pairs import Plan
from tests.test_matchers import NAMES, SMALL
from tests.test_training import pair_options


@pytest.fixture(scope="module", params=NAMES)
def matcher(request: pytest.FixtureRequest) -> Matcher:
    torch.manual_seed(7)
    return build_matcher(request.param, **SMALL[request.param])


def test_an_answer_depends_on_its_pair_alone(
    matcher: Matcher, tiny_spair: Callable[..., Path]
) -> None:
    """Whatever was asked before, and whether the features were kept or computed again."""
    if matcher.couples_pairs:
        pytest.skip("an official random stream runs through all pairs")
    dataset = SPair71k(tiny_spair(), "test")
    pairs = [pair.oriented(Plan("src2trg")) for pair in dataset]
    pairs.append(dataset[0].oriented(Plan("trg2src")))
    answers: dict[int, set[bytes]] = {number: set() for number in range(len(pairs))}
    for order, budget_bytes in (([0, 1, 2], 2**30), ([2, 2, 1, 0], 2**30), ([1, 2, 0], 0)):
        torch.manual_seed(len(order))  # of no influence
        cache = FeatureCache(matcher, dataset, budget_bytes)
        with torch.no_grad():
            found = predict_pairs(matcher, cache, [pairs[i] for i in order], 1)
        for number, (xy, _) in zip(order, found, strict=True):
            answers[number].add(xy.tobytes())
    assert [len(different) for different in answers.values()] == [1] * len(pairs)


def test_the_same_prediction_twice_has_the_same_bytes(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    data, files = tiny_pfwillow(), []
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)
        config = load_config("nearest_small/pfwillow", {"predict.chunk": 2})
        files.append(predict(config, data=data, out=tmp_path / name, plan=Plan("src2trg")))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].parent.name == files[1].parent.name


def test_workers_do_not_change_a_training(tiny_spair: Callable[..., Path], tmp_path: Path) -> None:
    data, states = tiny_spair(), []
    for workers in (0, 2):
        options: dict[str, Any] = pair_options(2) | {"train_dataloader.num_workers": workers}
        file = train("cats_small", tmp_path / str(workers), options, data)
        states.append(torch.load(file, weights_only=True))
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key
