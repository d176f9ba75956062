"""No reader does more with a damaged file than refuse it by name (see tests/fuzzing.py).

A few thousand inputs here; ``make test-long`` feeds 100,000, and ``python -m
tests.benchmarks.fuzz_atheris`` as many as one likes, guided by coverage.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemf.errors import NemfError
from tests.fuzzing import Target, targets

INPUTS = 70  # of each reader
ALL_INPUTS = 100_000  # of all readers together, in the long run
HANG_S = 10  # of the processor
BLOCKED_S = 600  # of the clock
NAMES = [
    *("SPair pair", "SPair image", "SPair list", "index pairs", "index images"),
    *("PF-PASCAL list", "PF-PASCAL list with keypoints", "PF-WILLOW list"),
    *("own pairs json", "own pairs csv", "COCO keypoints", "MAT"),
    *(f"image {kind}" for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")),
    *("chunk", "predictions", "score record", "result", "answers csv", "answers parquet"),
    *("table specification", "regression policy", "synthetic marker", "accepted answers"),
    *("weights", "resumed training"),
]


class Hang(BaseException):
    """An input took too long. No reader's ``except Exception`` may swallow it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Hang after ``seconds`` of the processor (a busy machine is no hang); ends the process
    if nothing goes on at all."""

    def late(*_: Any) -> None:
        raise Hang

    kept = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(BLOCKED_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, kept)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def feed(name: str, target: Target, contents: Iterator[bytes]) -> dict[str, int]:
    """How many inputs were taken and refused; an AssertionError tells the input of a fault."""
    counts = {"taken": 0, "refused": 0}
    for number, content in enumerate(contents):
        try:
            with at_most(HANG_S):
                counts["taken" if target.feed(content) else "refused"] += 1
        except (Exception, Hang) as fault:
            told = f"{name}, input {number} ({content[:200]!r}): {type(fault).__name__} {fault}"
            raise AssertionError(told) from fault
    return counts


def test_every_reader_is_there(readers: dict[str, Target]) -> None:
    assert sorted(readers) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_valid_contents_are_taken(name: str, readers: dict[str, Target]) -> None:
    target = readers[name]
    assert feed(name, target, iter(target.seeds)) == {"taken": len(target.seeds), "refused": 0}


@pytest.mark.parametrize("name", NAMES)
def test_damaged_contents_are_refused_by_name_or_sound(
    name: str, readers: dict[str, Target]
) -> None:
    target = readers[name]
    counts = feed(name, target, itertools.islice(target.inputs(seed=1), INPUTS))
    built_anew = name.startswith("index")  # a cache: whatever it holds, the dataset is the same
    assert counts["taken" if built_anew else "refused"] > INPUTS / 5


def test_the_inputs_follow_from_the_seed(readers: dict[str, Target]) -> None:
    target = readers["SPair pair"]
    first, again = (list(itertools.islice(target.inputs(seed=3), 50)) for _ in range(2))
    assert first == again
    assert first != list(itertools.islice(target.inputs(seed=4), 50))


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (KeyError("x"), "KeyError"),
        (RecursionError(), "RecursionError"),
        (AssertionError("nan"), "nan"),
        (NemfError("something is wrong"), "does not name"),
        ("hang", "Hang"),
    ],
)
def test_faults_are_noticed(
    fault: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "HANG_S", 0.2)

    def read() -> None:
        if fault == "hang":
            while True:
                pass
        raise fault

    target = Target(tmp_path / "x", [b""], [], read, str(tmp_path / "x"))
    with pytest.raises(AssertionError, match=told):
        feed("x", target, iter([b"content"]))


@pytest.mark.long
def test_a_hundred_thousand_inputs(readers: dict[str, Target]) -> None:
    each, report = -(-ALL_INPUTS // len(readers)), {}
    began, seed = time.monotonic(), 2022
    for name, target in readers.items():
        contents = itertools.islice(target.inputs(random.Random(f"{seed} {name}").random()), each)
        report[name] = feed(name, target, contents)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    total = sum(sum(counts.values()) for counts in report.values())
    print(json.dumps(report, indent=1))
    print(f"{total} inputs, {time.monotonic() - began:.0f} s, at most {memory:.2f} GiB")
    assert total >= ALL_INPUTS
    assert memory < 4
