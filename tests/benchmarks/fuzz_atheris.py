"""Fuzzing guided by coverage, by hand: ``python -m tests.benchmarks.fuzz_atheris READER``.

READER is a name of tests/fuzzing.py ("SPair pair", "MAT", ...); what follows goes to libFuzzer, say
-max_total_time=60. Needs ``pip install atheris`` (which no test does). The first fault ends it with
a traceback and keeps the input as ``crash-...`` in the current folder.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from pathlib import Path


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed here: pip install atheris")
    with atheris.instrument_imports(include=["nemf", "reports", "experiments", "PIL", "yaml"]):
        from tests.fuzzing import targets

    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="nemf-fuzz-"))
    known = targets(folder)
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in known:
        sys.exit(f"no reader {name!r}: choose one of {', '.join(known)}")
    target = known[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)

    def mutate(content: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(content, longest)
        return rng.choice(target.damages)(content, rng)[:longest]

    def once(content: bytes) -> None:
        target.feed(content)

    arguments = [sys.argv[0], str(corpus), "-timeout=30", "-max_len=65536", *sys.argv[2:]]
    atheris.Setup(arguments, once, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
