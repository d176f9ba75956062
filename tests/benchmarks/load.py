"""The whole chain at SPair-71k's size and at a multiple of it, each stage a process of its own.

``python -m tests.benchmarks.load [--pairs 70958] [--times 10] [--folder FOLDER]`` makes a layout of
tiny random images with three splits in SPair-71k's proportions, opens each twice (indexing it the
first time), predicts the test split with ``copy`` (which looks at no pixel, so that what remains is
the suite's own work), scores it, and makes table and page. Per stage it prints seconds,
microseconds per pair and the most memory the process held.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from experiments.benchmarks import large_layout
from tests.conftest import REPO

SPLITS = {"trn": 53_340, "val": 5_384, "test": 12_234}
IMAGES = {"trn": 53, "val": 20, "test": 27}  # per class
LIMIT_GIB = 4
_OPEN = (
    "import sys; from pathlib import Path; from nemf.datasets.spair import SPair71k; "
    "print(len(SPair71k(Path(sys.argv[1]), sys.argv[2])))"
)


def run(pairs: int, folder: Path) -> bool:
    """Measures every stage; whether all of them kept to the memory limit."""
    data, out, spec = folder / "data", folder / "out", folder / "load.yaml"
    sizes = {split: round(pairs * n / sum(SPLITS.values())) for split, n in SPLITS.items()}
    widen = max(1.0, (pairs / sum(SPLITS.values())) ** 0.5)
    began = time.perf_counter()
    images = sum(
        large_layout(data, split, n, round(IMAGES[split] * widen)) for split, n in sizes.items()
    )
    seconds = time.perf_counter() - began
    print(f"made {sum(sizes.values()):,} pairs of {images:,} images, {seconds:.0f} s")
    write_spec(spec)
    stages = [
        (f"{verb} {split}", ["-c", _OPEN, str(data), split], split)
        for split in SPLITS
        for verb in ("index", "open")
    ]
    nemf, there = ["-m", "experiments.cli"], ["--data", str(data), "--out", str(out)]
    stages += [
        ("predict", [*nemf, "predict", "copy/spair", *there], "test"),
        ("score", [*nemf, "score", "--table", str(spec), "--out", str(out)], "test"),
        ("table and page", [*nemf, "table", str(spec), "--no-mlflow", *there], "test"),
    ]
    print("| stage | pairs | seconds | of the processor | µs per pair | peak memory |")
    print("|---|---|---|---|---|---|")
    highest = 0.0
    for name, arguments, split in stages:
        n = sizes[split]
        seconds, busy, memory = measured([sys.executable, *arguments], folder)
        highest = max(highest, memory)
        cells = [name, f"{n:,}", f"{seconds:.1f}", f"{busy:.1f}", f"{1e6 * busy / n:.0f}"]
        print(f"| {' | '.join(cells)} | {memory:.2f} GiB |", flush=True)
    page = next((out / "load").glob("*.html"))
    print(f"page: {page.stat().st_size / 2**20:.1f} MiB")
    return highest < LIMIT_GIB


def measured(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Seconds of the clock and of the processor, and GiB at most, of a command; it must succeed."""
    environment = os.environ | {"NEMF_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed: {told.decode(errors='replace')[-2000:]}")
    seconds = time.perf_counter() - began
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def write_spec(file: Path) -> None:
    """A table of SPair-71k alone."""
    spec = yaml.safe_load((REPO / "experiments" / "tables" / "table1.yaml").read_text())
    spec |= {"name": "load", "columns": ["spair"], "extra_columns": [], "published": None}
    spec |= {"protocols": ["canonical@1"], "oracle_grids": []}
    file.write_text(yaml.safe_dump(spec))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=sum(SPLITS.values()))
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="Where the files go [a temporary folder].")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        kept = run(given.pairs * given.times, Path(folder))
    sys.exit(0 if kept else f"a stage took more than {LIMIT_GIB} GiB")


if __name__ == "__main__":
    main()
