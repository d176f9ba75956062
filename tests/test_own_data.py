"""The tutorial on one's own photographs: its commands run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from experiments.cli import main_group
from nemf.annotation.pair_list import PairList
from tests.conftest import REPO, save_image

DOCUMENT = REPO / "docs" / "own-data.md"


def commands() -> list[str]:
    blocks = re.findall(r"```[a-z]*\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("nemf ")]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the tutorial starts from; it is the current one."""
    for variable in ("NEMF_DATA", "NEMF_WEIGHTS", "NEMF_DOWNLOAD", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("cat1", "cat2", "cat3")):
        save_image(tmp_path / "photos" / f"{name}.jpg", seed, 180, 240)
    images, annotations = [], []
    for k in range(4):
        save_image(tmp_path / "images" / f"{k}.jpg", 10 + k, 50, 70)
        images.append({"id": k, "file_name": f"{k}.jpg", "width": 70, "height": 50})
        points = [v for n in range(4) for v in (10 + 5 * n + k, 20 + 3 * n, 2)]
        annotations.append(
            {"image_id": k, "category_id": 1, "keypoints": points, "bbox": [5, 5, 40, 40]}
        )
    category = {"id": 1, "name": "dog", "keypoints": ["nose", "neck", "back", "tail"]}
    content = {"images": images, "annotations": annotations, "categories": [category]}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return tmp_path


def test_there_is_a_command_for_each_step() -> None:
    verbs = {line.split()[1] for line in commands()}
    assert {"match", "annotate", "data", "predict", "score", "table", "compare"} <= verbs


def test_the_tutorial_runs(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for line in commands():
        words = shlex.split(line)[1:]
        if words[0] == "annotate":  # the page itself: tests/test_annotation.py
            pairs = PairList(desk / words[1])
            for a, b in (("cat1.jpg", "cat2.jpg"), ("cat2.jpg", "cat3.jpg")):
                rows = [
                    {"name": "", "src": [10 * n, 7 * n], "trg": [9 * n + 3, 8 * n]}
                    for n in range(1, 6)
                ]
                boxless = {"category": "cat", "rows": rows, "src_bbox": None, "trg_bbox": None}
                pairs.put(a, b, 0, "", boxless)
            continue
        capsys.readouterr()
        status = 0
        try:
            main_group(words, standalone_mode=False)
        except SystemExit as leave:
            status = leave.code
        shown[line] = capsys.readouterr().out
        assert status == 0, (line, shown[line])
    first, typed, several, as_json = [shown[line] for line in commands()[:4]]
    assert "resnet_small.pth, which comes with nemf" in first
    assert len(re.findall(r"^ +\d+ +[\d.]+,[\d.]+ -> ", first, re.MULTILINE)) == 16
    assert "60.0,80.0 -> " in typed
    assert PILImage.open(desk / "cats.png").size[0] > 300
    assert [several.count(f"{name}: ") for name in ("hpf_small", "copy")] == [1, 1]
    answer = json.loads(as_json)
    assert np.isfinite(answer["matchers"][0]["answers"]).all()
    assert answer["matchers"][0]["weights"]["shipped"] is True
    assert len(json.loads((desk / "dogs" / "pairs.json").read_text())) == 6
    table = (desk / "results" / "own" / "own.md").read_text(encoding="utf-8")
    assert "| HPF, small CNN (4,6) | measured | canonical@1 |" in table
    assert "own pairs test: 2 pairs of 3 distinct images, 10 keypoints" in table
    assert (desk / "results" / "own" / "own.html").exists()
