"""The history of regression tracking in MLflow: a run per commit, and the same files back."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemf.errors import NemfError
from reports.history_page import write_history
from reports.history_store import fetch_history, publish_history
from reports.regression import FORMAT
from tests.test_tracking import client, make_empty_store

CELLS = ("offset/fixed/canonical", "other/fixed/canonical@1")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_empty_store(tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture
def out(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with a store that $MLFLOW_TRACKING_URI names."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return folder


def history(numbers: range, changed: tuple[int, ...] = (3,)) -> dict[str, Any]:
    """Commits by number; number 2 has no prediction, those of ``changed`` are worse."""
    commits, points = [], []
    for number in numbers:
        commits.append(
            {
                "label": f"{number:08x}",
                "commit": f"{number:040x}",
                "dirty": False,
                "tree": f"{number + 100:040x}",
                "subject": f"Step {number}",
                "problem": "does not import" if number == 2 else None,
                "parent": f"{number - 1:040x}" if number else None,
            }
        )
        pck = 0.5 - 0.1 * sum(number >= at for at in changed)
        point = {"pck": pck, "low": pck - 0.05, "high": pck + 0.05}
        points.append(dict.fromkeys(point) if number == 2 else point)
    reason = {"watch": "accuracy", "verdict": "worse", "text": "all @0.1 50.0 → 40.0"}
    changes = [
        {
            "at": at,
            "since": commits[0]["label"],
            "cell": CELLS[0],
            "verdict": "worse",
            "reasons": [reason],
            "causes": [],
            "exactness": None,
        }
        for at, number in enumerate(numbers)
        if at > 0 and number in changed
    ]
    return {
        "format": FORMAT,
        "suite": "folder:data",
        "alpha": 0.1,
        "synthetic": True,
        "commits": commits,
        "series": {CELLS[0]: points, CELLS[1]: copy.deepcopy(points)},
        "changes": changes,
        "compared_by": {"commit": "c" * 40, "dirty": False},
    }


def publish(out: Path, content: dict[str, Any]) -> dict[str, str]:
    _, files = write_history(content, out / "regress")
    return publish_history(out, content, files)


def runs(out: Path) -> list[Any]:
    store = client(out)
    experiment = store.get_experiment_by_name("nemf-history")
    return store.search_runs([experiment.experiment_id])


def test_a_commit_is_a_run_with_the_numbers_of_all_cells(out: Path) -> None:
    found = publish(out, history(range(5)))
    assert len(found) == 5
    run = client(out).get_run(found[f"{3:040x}"])
    assert run.data.metrics["offset/fixed/canonical/per-image/pck-0.10"] == pytest.approx(0.4)
    assert run.data.metrics["other/fixed/canonical-1/per-image/pck-0.10-low"] == pytest.approx(0.35)
    assert run.info.run_name == "00000003 Step 3"
    tags = run.data.tags
    assert (tags["commit"], tags["parent"]) == (f"{3:040x}", f"{2:040x}")
    assert tags["changes"] == "worse: offset/fixed/canonical"
    broken = client(out).get_run(found[f"{2:040x}"])
    assert (broken.data.metrics, broken.data.tags["problem"]) == ({}, "does not import")


def test_the_same_files_come_back_on_another_machine(out: Path, tmp_path: Path) -> None:
    content = history(range(5))
    _, files = write_history(content, out / "regress")
    publish_history(out, content, files)
    here = tmp_path / "here"
    fetched = fetch_history(here, 5)
    assert fetched == content
    _, again = write_history(fetched, here / "regress")
    for one, other in zip(files, again, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes(), one.name


def test_publishing_again_writes_nothing(out: Path) -> None:
    before = publish(out, history(range(5)))
    tags = {r.info.run_id: (r.data.tags, r.info.end_time) for r in runs(out)}
    assert publish(out, history(range(5))) == before
    assert {r.info.run_id: (r.data.tags, r.info.end_time) for r in runs(out)} == tags
    assert len(tags) == 6  # five commits and the history


def test_histories_of_other_lengths_share_their_runs(out: Path, tmp_path: Path) -> None:
    """Commits that are published bit by bit are one line, and the first one of a later history
    keeps what was found of it before."""
    first = publish(out, history(range(4)))
    second = publish(out, history(range(3, 6), changed=(3, 5)))
    assert first[f"{3:040x}"] == second[f"{3:040x}"]
    fetched = fetch_history(tmp_path / "here", 6)
    assert [c["subject"] for c in fetched["commits"]] == [f"Step {k}" for k in range(6)]
    assert [(c["at"], c["since"]) for c in fetched["changes"]] == [(3, f"{0:08x}"), (5, f"{3:08x}")]
    part = fetch_history(tmp_path / "here", 3)
    assert [c["at"] for c in part["changes"]] == [2]  # of its first commit nothing is drawn
    assert len(part["series"][CELLS[0]]) == 3


def test_fewer_than_asked_for_are_told(
    out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(out, history(range(1, 4)))
    assert len(fetch_history(tmp_path / "here", 9)["commits"]) == 3
    assert "only 3 commits in a row are published" in caplog.text


def test_a_cell_that_is_no_longer_run_has_no_number(out: Path) -> None:
    found = publish(out, history(range(3, 5)))
    content = history(range(3, 5))
    del content["series"][CELLS[1]]
    publish(out, content)
    metrics = client(out).get_run(found[f"{4:040x}"]).data.metrics
    assert metrics["offset/fixed/canonical/per-image/pck-0.10"] == pytest.approx(0.4)
    gone = metrics["other/fixed/canonical-1/per-image/pck-0.10"]
    assert gone != gone


def test_other_data_are_another_line(out: Path, tmp_path: Path) -> None:
    publish(out, history(range(4)))
    other = history(range(2, 5)) | {"suite": "synthetic:table1"}
    publish(out, other)
    assert len(fetch_history(tmp_path / "here", 9)["commits"]) == 3
    publish(out, history(range(5)))  # now this is the one that was published last
    assert fetch_history(tmp_path / "here", 9)["suite"] == "folder:data"
    assert len(fetch_history(tmp_path / "here", 9)["commits"]) == 5


def test_what_is_missing_or_damaged_is_said(out: Path, tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="nothing was published there"):
        fetch_history(tmp_path / "here", 3)
    found = publish(out, history(range(3)))
    (file,) = out.glob(f"mlartifacts/{found[f'{1:040x}']}/artifacts/commit.json")
    content = json.loads(file.read_text())
    content["points"] = {}
    file.write_text(json.dumps(content))
    with pytest.raises(NemfError, match=r"commit\.json of run \w+ is damaged"):
        fetch_history(tmp_path / "here", 3)
    file.unlink()
    with pytest.raises(NemfError, match=r"commit\.json of run \w+ is missing"):
        fetch_history(tmp_path / "here", 3)
