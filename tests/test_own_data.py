"""The tutorial on one's own photographs: its commands run as they stand there."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from experiments.cli import main_group
from nemf.annotation.pair_list import PairList
from nemf.datasets.folder import FolderOfPairs
from nemf.datasets.verification import verify
from nemf.errors import NemfError
from nemf.matcher import build_matcher
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


def own_pairs(root: Path, *entries: dict[str, object]) -> Path:
    for seed, name in enumerate(("a.png", "b.png")):
        save_image(root / "images" / name, seed, 40, 60)
    pair = {"src": "images/a.png", "trg": "images/b.png"}
    (root / "pairs.json").write_text(json.dumps([pair | entry for entry in entries]))
    return root


TWO = {"src_kps": [[1, 2], [30, 20]], "trg_kps": [[3, 4], [20, 30]]}
ONE = {"src_kps": [[1, 2]], "trg_kps": [[3, 4]]}
BOXES = {"src_bbox": [0, 0, 40, 30], "trg_bbox": [0, 0, 40, 30]}


def test_results_below_the_pairs_are_none_of_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = own_pairs(tmp_path / "own", TWO)
    before = verify("folder", root)
    assert (before.files, before.findings) == (3, [])
    dataset = FolderOfPairs(root)
    save_image(root / "results" / "figures" / "f.png", 5, 20, 30)
    assert verify("folder", root) == before
    # the index is used as it is
    monkeypatch.setattr(FolderOfPairs, "parse", lambda self: pytest.fail("it was built again"))
    assert FolderOfPairs(root).fingerprint == dataset.fingerprint
    monkeypatch.undo()
    save_image(root / "images" / "a.png", 9, 40, 60)
    assert FolderOfPairs(root).fingerprint != dataset.fingerprint
    save_image(root / "images" / "spare.png", 5, 20, 30)
    assert [f.file for f in verify("folder", root).findings] == ["images/spare.png"]


def test_images_in_place_of_names_harm_no_other_folder(tmp_path: Path) -> None:
    root = own_pairs(tmp_path / "own", TWO)
    (tmp_path / "beside.txt").write_text("")
    for name in ("", ".", "..", "../beside.txt", "images", "/", "no/such.png", "n\0l.png"):
        (root / "pairs.json").write_text(json.dumps([TWO | {"src": name, "trg": "images/a.png"}]))
        sources = FolderOfPairs.unindexed(root, "test").sources()
        assert {root / "pairs.json", root / "images" / "a.png"} <= set(sources)
        assert all(root in path.parents for path in sources)
        with pytest.raises(NemfError):
            FolderOfPairs(root)


@pytest.mark.parametrize(
    ("entries", "noted"),
    [
        ([TWO, ONE], ["pairs.json entry 2"]),
        ([TWO, TWO | {"trg_kps": [[3, 4], [3, 4]]}], ["pairs.json entry 2"]),
        ([TWO, ONE | BOXES], ["pairs.json entry 2"]),  # boxes count only where all have them
        ([TWO | BOXES, ONE | BOXES], []),
        ([TWO], []),
    ],
)
def test_a_pair_without_extent_is_noted(
    entries: list[dict[str, object]], noted: list[str], tmp_path: Path
) -> None:
    report = verify("folder", own_pairs(tmp_path, *(e | {"id": k} for k, e in enumerate(entries))))
    found = [f for f in report.findings if f.kind == "pair"]
    assert [f.file for f in found] == noted
    assert all("have no extent; of own pairs, give all two boxes" in f.reason for f in found)


def test_score_says_what_to_do_about_a_pair_without_extent(nemf: Any, desk: Path) -> None:
    own_pairs(desk / "own", ONE)
    predicted = nemf("predict", "copy/folder", "--data", "own")
    refused = nemf("score", predicted.out.strip())
    assert refused.status == 2
    assert "extent of 0 px" in refused.err
    assert "dataset.threshold=image" in refused.err
    options = ("--cfg-options", "dataset.threshold=image")
    predicted = nemf("predict", "copy/folder", "--data", "own", *options)
    assert nemf("score", predicted.out.strip()).status == 0


def test_a_folder_without_a_list_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NemfError, match=r"`nemf annotate .*` makes one"):
        FolderOfPairs(tmp_path)
    with pytest.raises(NemfError, match="gone: no such folder of own pairs"):
        FolderOfPairs(tmp_path / "gone")


def test_the_call_from_python_fits_its_backbone() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    (call,) = (c for c in calls if ast.unparse(c.func) == "nemf.build_matcher")
    keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert keywords.pop("weights").startswith(keywords["backbone"])
    build_matcher(ast.literal_eval(call.args[0]), **keywords, init="random")
