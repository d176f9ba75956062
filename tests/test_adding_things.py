"""The examples of docs/adding-a-dataset.md and docs/adding-a-protocol.md, followed as they stand in
a copy of the packages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("nemf", "baselines", "experiments", "reports")
RUN = "import sys; from experiments.cli import main; sys.argv[0] = 'nemf'; main()"


def blocks(document: str, language: str) -> list[str]:
    text = (REPO / "docs" / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages, to be changed as the documents say."""
    ignored = shutil.ignore_patterns("__pycache__", "accepted", "*.pth")
    for package in PACKAGES:
        shutil.copytree(REPO / package, tmp_path / "code" / package, ignore=ignored)
    return tmp_path


def nemf(folder: Path, line: str, status: int = 0) -> str:
    """Runs a documented command; DATA is data/, KEY what the last prediction was called."""
    keys = [path.read_text().strip() for path in folder.glob("outputs/predictions/*/*/*/current")]
    words = line.replace("DATA", "data").replace("KEY", "".join(keys)).split()[1:]
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, *words],
        cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(folder / "code"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def insert(file: Path, before: str, text: str) -> None:
    """Puts ``text`` before the first line ``before`` of a source file."""
    source = file.read_text(encoding="utf-8")
    assert source.count(f"\n{before}\n") >= 1
    file.write_text(source.replace(f"\n{before}\n", f"\n{text}{before}\n", 1), encoding="utf-8")


def write_mugs(folder: Path) -> None:
    """Three pairs of four photographs; `copy` is exact on images of one size."""
    photos = folder / "data" / "Mugs" / "photos"
    photos.mkdir(parents=True)
    for k, name in enumerate("abcd"):
        pixels = np.random.default_rng(k).integers(0, 256, (60, 80, 3), np.uint8)
        PILImage.fromarray(pixels).save(photos / f"{name}.png")
    points = [[10, 10, 10, 10], [50, 30, 50, 40]]  # the second is off by 10 px of an extent of 40
    pairs = [
        {"first": f"{a}.png", "second": f"{b}.png", "points": points} for a, b in ("ab", "bc", "cd")
    ]
    (photos.parent / "test.json").write_text(json.dumps(pairs))


def test_a_dataset(copy: Path) -> None:
    reader, line, config = blocks("adding-a-dataset.md", "python")
    code = copy / "code"
    (code / "nemf" / "datasets" / "mugs.py").write_text(reader)
    insert(code / "nemf" / "datasets" / "__init__.py", "}", line)
    (code / "experiments" / "configs" / "datasets" / "mugs.py").write_text(config)
    write_mugs(copy)
    verify, stats, predict, score = "".join(blocks("adding-a-dataset.md", "sh")).splitlines()
    nemf(copy, verify)
    assert re.search(r"pairs +3\b", nemf(copy, stats))
    nemf(copy, predict)
    # extent 40 px: one keypoint exact, one off by 10: half right at 0.1, all at 0.3
    said = nemf(copy, f"{score} --protocol canonical@1 --alphas 0.1,0.3")
    assert "copy (floor) on Mugs test (3 pairs of 4 distinct images, 6 keypoints" in said
    assert re.search(r"^all \(3\) +50\.0 .* 100\.0 ", said, re.MULTILINE)
    (copy / "data" / "Mugs" / "test.json").write_text('[{"first": "a.png"}]')
    assert "test.json entry 1: needs first, second, points" in nemf(copy, verify, status=1)


def test_a_protocol(copy: Path) -> None:
    (entry,) = blocks("adding-a-protocol.md", "python")
    insert(copy / "code" / "nemf" / "scoring.py", "    ]", entry)
    listing, predict, score = "".join(blocks("adding-a-protocol.md", "sh")).splitlines()
    assert "mugs-paper@1" in nemf(copy, listing)
    folder = copy / "data" / "PF-WILLOW" / "mug(S)"
    folder.mkdir(parents=True)
    for name, (height, width) in {"a.png": (160, 320), "b.png": (80, 80)}.items():
        PILImage.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / name)
    # `copy` from the target into the source: x times 320/80, y times 160/80. The extent is 288, so
    # the limit at 0.125 is 36. Squashed, 17 px of y are 34 and right; 18 are 36, and < makes that
    # wrong. All others are exact.
    source = [*(32 * k for k in range(10)), 17, 18, *[0] * 8]
    target = [*(8 * k for k in range(10)), *[0] * 10]
    head = ["imageA", "imageB", *(f"{a}{s}{k}" for s in "AB" for a in "XY" for k in range(1, 11))]
    row = ["x/mug(S)/a.png", "x/mug(S)/b.png", *source, *target]
    lines = [",".join(map(str, line)) for line in (head, row)]
    (folder.parent / "test_pairs.csv").write_text("\n".join(lines) + "\n")
    nemf(copy, predict)
    said = nemf(copy, f"{score} --alphas 0.125,0.126")
    assert "error < alpha x src kps extent; squashed to 320x320" in said
    assert re.search(r"^all \(1\) +90\.0 \[\?\] +100\.0 ", said, re.MULTILINE), said
