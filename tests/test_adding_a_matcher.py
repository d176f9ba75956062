"""The example of docs/adding-a-matcher.md, followed as it stands: a package from outside joins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemf.datasets.synthetic import make_synthetic

REPO = Path(__file__).resolve().parent.parent
GUIDE = (REPO / "docs" / "adding-a-matcher.md").read_text(encoding="utf-8")
CODE, CONFIG = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
(ENTRY,) = re.findall(r"^colour = \"baselines\.(\S+)\"$", GUIDE, re.MULTILINE)
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example as an installed package, its config, and a small dataset."""
    folder = tmp_path_factory.mktemp("newcomer")
    package = folder / "site"
    info = package / "colour_matcher-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "colour.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: colour-matcher\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[nemf.matchers]\ncolour = {ENTRY}\n")
    (folder / "my").mkdir()
    (folder / "my" / "colour.py").write_text(CONFIG)
    make_synthetic(folder / "outputs" / "synthetic", preset="tiny")
    return folder


def run(folder: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(folder / "site"), str(REPO)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_short() -> None:
    lines = [line for line in CODE.splitlines() if line.strip()]
    assert len(lines) < 40


def test_the_guide_says_what_this_test_does() -> None:
    assert "nemf predict colour/spair --data outputs/synthetic" in COMMANDS
    assert [c for c in COMMANDS if c.startswith("nemf score") or c.startswith("nemf table")] == [
        "nemf score --table 1",
        "nemf table 1",
    ]
    assert "pytest tests/test_matchers.py -k colour" in COMMANDS


def test_from_file_and_config_to_the_table(newcomer: Path) -> None:
    cards = json.loads(run(newcomer, "experiments.cli", "list", "matchers", "--json"))
    assert "colour" in json.dumps(cards)
    data = ("--data", "outputs/synthetic")
    run(newcomer, "experiments.cli", "predict", "my/colour.py/spair", *data)
    run(newcomer, "experiments.cli", "score", "--table", "1")
    run(newcomer, "experiments.cli", "table", "1", "--no-mlflow")
    table = (newcomer / "outputs" / "table1" / "table1.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| nearest colour, 32x32")]
    assert re.search(r"\d+\.\d", row)


def test_the_example_keeps_the_contract(newcomer: Path) -> None:
    tests = str(REPO / "tests" / "test_matchers.py")
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={REPO}")
    said = run(newcomer, "pytest", tests, "-k", "colour", *options)
    passed = re.search(r"(\d+) passed", said)
    assert passed
    assert int(passed[1]) >= 8
