"""The MLflow writer on real SQLite stores: what a run holds, and that nothing is written twice."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from nemf.errors import NemfError
from nemf.pairs import ImageRecord, Pair, Plan
from nemf.predictions import Predictions, prediction_table
from nemf.scoring import get_protocol
from reports import mlflow_store, tracking
from reports.mlflow_store import tracking_uri
from reports.records import alpha_name, make_record, score_pairs, write_record
from reports.table_files import Table
from reports.tracking import publish_cells, publish_table, publish_trainings

CANONICAL, HPF = "canonical@1", "hpf-paper@1"
CARD = {
    "name": "mine",
    "title": "My matcher",
    "paper": "Someone et al.",
    "year": 2020,
    "description": "Matches.",
    "oracle_class": False,
}


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_empty_store(tmp_path_factory.mktemp("store") / "mlflow.db")


def make_empty_store(file: Path) -> Path:
    """An SQLite store with MLflow's tables and nothing in them (making one takes seconds)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def out(tmp_path: Path, empty_store: Path) -> Path:
    folder = tmp_path / "out put"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


def image(name: str, kps: list[list[float]]) -> ImageRecord:
    digest = hashlib.sha256(name.encode()).hexdigest()
    points = np.array(kps, np.float32)
    return ImageRecord(Path(name), name, digest, (100, 200), points, ("a", "b"))


def prediction_file(
    out: Path,
    label: str = "Mine (4,6)",
    slot: str = "mine",
    synthetic: bool = False,
    external: bool = False,
    categories: tuple[str, ...] = ("car(G)", "duck(S)"),
) -> Path:
    """One pair per category, two keypoints each with image boxes of 100 px: the first keypoint of
    every pair is exact and the second 8 px off, so PCK@0.05 is 0.5 and PCK@0.1 is 1."""
    rows = []
    box = np.array([0, 0, 100, 50], np.float32)
    plan = Plan("src2trg")
    for number, category in enumerate(categories):
        src = image(f"s{number}.png", [[10, 10], [60, 40]])
        trg = image(f"t{number}.png", [[20, 20], [50, 30]])
        flags = {"viewpoint": number}
        pair = Pair(
            f"pair-{number}", category, src, trg, src.kps, trg.kps, ("a", "b"), box, box, flags
        )
        answers = trg.kps + np.array([[0, 0], [8, 0]], np.float32)
        rows.append((number, pair.oriented(plan), answers, None))
    matcher: dict[str, Any] = {"name": "mine", "label": label}
    if external:
        matcher |= {"external": True, "file_sha256": "ab" * 32}
    else:
        matcher |= {
            "card": CARD,
            "config": {"type": "mine", "backbone": "resnet18"},
            "weights_sha256": "cd" * 32,
            "random_weights": False,
        }
    key = hashlib.sha256(slot.encode()).hexdigest()[:24]
    meta = {
        "format": 1,
        "dataset": "spair",
        "title": "SPair-71k",
        "split": "test",
        "layout": "spair",
        "fingerprint": "0123456789abcdef" * 4,
        "synthetic": synthetic,
        "n_pairs": len(categories),
        "official_pairs": None if synthetic else 12234,
        "plan": "src2trg-own",
        "key": key,
        "matcher": matcher,
        "code": None if external else {"commit": "f" * 40, "dirty": True},
    }
    if not external:
        meta["facts"] = {"seed": 7, "device": "cpu", "libraries": {"torch": "2.0"}}
    folder = out / "predictions" / slot / "spair-test" / "src2trg-own"
    file = folder / key / "predictions.parquet"
    Predictions(prediction_table(rows), meta).write(file)
    (folder / "current").write_text(key + "\n")
    if not external:
        (file.parent / "cell.json").write_text(json.dumps(meta))
    return file


def score(file: Path, protocol: str = CANONICAL, alphas: tuple[float, ...] = (0.05, 0.1)) -> Path:
    scores = score_pairs(Predictions.read(file), get_protocol(protocol), alphas)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    path = file.parent / "scores" / f"{protocol}.json"
    write_record(path, make_record(scores, digest, {"commit": "e" * 40, "dirty": False}))
    return path


def client(out: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")


def all_runs(out: Path) -> list[Any]:
    store = client(out)
    return store.search_runs([store.get_experiment_by_name("nemf").experiment_id])


def the_run(out: Path) -> Any:
    (run,) = all_runs(out)
    return run


def histories(out: Path, run_id: str) -> dict[str, list[float]]:
    """Every value that was ever logged, by metric, oldest first."""
    store = client(out)
    return {
        name: [entry.value for entry in store.get_metric_history(run_id, name)]
        for name in store.get_run(run_id).data.metrics
    }


def state(out: Path) -> list[tuple]:
    """Everything of the store that a needless write would change."""
    return [
        (
            run.info.run_id,
            run.info.status,
            run.info.end_time,
            sorted(run.data.tags.items()),
            histories(out, run.info.run_id),
        )
        for run in all_runs(out)
    ]


# -- what a run holds ---------------------------------------------------------------------------


def test_a_run_holds_the_numbers_and_their_origin(out: Path) -> None:
    file = prediction_file(out)
    score(file)
    published = publish_cells(out)
    run = the_run(out)
    cell = f"mine/spair-test/src2trg-own/{file.parent.name}"
    assert published == {cell: run.info.run_id}
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "Mine (4,6) / SPair-71k test / src2trg-own"

    metrics = run.data.metrics
    assert metrics["canonical-1/per-image/all/pck-0.05"] == 0.5
    assert metrics["canonical-1/per-image/all/pck-0.10"] == 1.0
    assert metrics["canonical-1/per-point/all/pck-0.05"] == 0.5
    assert metrics["canonical-1/per-image/car_G/pck-0.05"] == 0.5
    assert metrics["canonical-1/per-image/duck_S/pck-0.10"] == 1.0
    assert metrics["canonical-1/per-image/viewpoint-1/pck-0.05"] == 0.5
    assert metrics["canonical-1/per-image/all/n-pairs"] == 2
    assert metrics["canonical-1/per-image/all/n-images"] == 4

    tags = run.data.tags
    assert tags["nemf.cell"] == cell
    expected = {
        "commit": "f" * 40,
        "dirty": "true",
        "dataset": "spair",
        "split": "test",
        "fingerprint": "0123456789abcdef" * 4,
        "synthetic": "false",
        "plan": "src2trg-own",
        "protocols": "canonical@1",
        "matcher": "Mine (4,6)",
        "weights_sha256": "cd" * 32,
        "random_weights": "false",
        "external": "false",
        "seed": "7",
    }
    assert {name: tags.get(name) for name in expected} == expected
    assert json.loads(tags["matcher_card"]) == CARD
    assert run.data.params == {
        "matcher": "Mine (4,6)",
        "dataset": "spair",
        "split": "test",
        "plan": "src2trg-own",
        "seed": "7",
        "backbone": "resnet18",
    }
    note = tags["mlflow.note.content"]
    assert "| 0.05 | 50.0" in note
    assert "2 of 12234 pairs" in note
    assert "uncommitted" in note
    assert "SYNTHETIC" not in note

    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("SPair-71k", "0123456789ab")
    assert [(t.key, t.value) for t in dataset.tags] == [("mlflow.data.context", "test")]


def test_intervals_are_logged_only_where_they_exist(out: Path) -> None:
    path = score(prediction_file(out))
    record = json.loads(path.read_text())
    entries = [e for e in record["metrics"] if (e["group"], e["averaging"]) == ("all", "image")]
    entries[0] |= {"low": 0.25, "high": 0.75}
    entries[1] |= {"low": None, "high": None}
    path.write_text(json.dumps(record))
    publish_cells(out)
    metrics = the_run(out).data.metrics
    assert metrics["canonical-1/per-image/all/pck-0.05-low"] == 0.25
    assert metrics["canonical-1/per-image/all/pck-0.05-high"] == 0.75
    assert "canonical-1/per-image/all/pck-0.10-low" not in metrics
    assert "50.0 [25.0, 75.0]" in the_run(out).data.tags["mlflow.note.content"]


def test_artifacts_are_the_files_on_disk_and_lie_in_the_output_folder(out: Path) -> None:
    file = prediction_file(out)
    record = score(file)
    publish_cells(out)
    run = the_run(out)
    root = out / "mlartifacts" / run.info.run_id / "artifacts"
    names = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert names == {
        "predictions.parquet",
        "cell.json",
        "environment.txt",
        "files.json",
        "pck.png",
        "scores/canonical@1.json",
    }
    assert (root / "pck.png").read_bytes().startswith(b"\x89PNG")
    listed = json.loads((root / "files.json").read_text())
    assert listed == {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest()
        for name in names - {"environment.txt", "files.json", "pck.png"}
    }
    told = hashlib.sha256((root / "files.json").read_bytes()).hexdigest()
    assert run.data.tags["nemf.files"] == told
    assert (root / "predictions.parquet").read_bytes() == file.read_bytes()
    assert (root / "scores" / record.name).read_bytes() == record.read_bytes()
    assert f"numpy=={np.__version__}\n" in (root / "environment.txt").read_text()


def test_synthetic_and_external_cells_say_so(out: Path) -> None:
    score(prediction_file(out, synthetic=True))
    prediction_file(out, label="their CSV", slot="theirs", external=True)
    publish_cells(out)
    theirs, fake = sorted(all_runs(out), key=lambda run: run.data.tags["synthetic"])
    assert "SYNTHETIC SPair-71k" in fake.info.run_name
    assert "**SYNTHETIC" in fake.data.tags["mlflow.note.content"]
    assert fake.inputs.dataset_inputs[0].dataset.name == "SPair-71k (synthetic)"
    assert theirs.data.tags["external"] == "true"
    assert theirs.data.tags["external_file_sha256"] == "ab" * 32
    assert theirs.data.tags["commit"] == "unknown"
    assert theirs.data.tags["protocols"] == "none yet"
    assert "made elsewhere" in theirs.data.tags["mlflow.note.content"]
    assert theirs.data.metrics == {}


def test_nothing_predicted_makes_no_store(tmp_path: Path) -> None:
    assert publish_cells(tmp_path) == {}
    assert not (tmp_path / "mlflow.db").exists()


# -- names --------------------------------------------------------------------------------------


def test_names_that_meet_get_a_hash_of_their_own() -> None:
    words = tracking._words(["car(G)", "car G", "cat", "Cat", "dog"])
    assert words["dog"] == "dog"
    assert len({word.casefold() for word in words.values()}) == 5
    for text in ("car(G)", "car G", "cat", "Cat"):
        assert words[text].endswith("-" + hashlib.sha256(text.encode()).hexdigest()[:8])
    assert words == tracking._words(["dog", "Cat", "cat", "car G", "car(G)"])


def test_a_class_may_not_pass_for_everything_or_a_flag() -> None:
    words = tracking._words(["all", "viewpoint-1", "x"], {"all", "viewpoint-1"})
    assert words["x"] == "x"
    assert not {"all", "viewpoint-1"} & set(words.values())


@pytest.mark.parametrize(
    ("text", "word"),
    [("canonical@1", "canonical-1"), ("car(G)", "car_G"), ("../a/b", "a_b"), ("(@)", "-")],
)
def test_names_hold_only_what_mlflow_accepts(text: str, word: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert tracking._words([text])[text] == word
    _validate_metric_name(f"x/{word}/pck-0.10")


def test_colliding_classes_keep_their_own_numbers(out: Path) -> None:
    path = score(prediction_file(out, categories=("car(G)", "car G", "all")))
    record = json.loads(path.read_text())
    for entry in record["metrics"]:
        if entry["group"] == "class":
            entry["pck"] = {"car(G)": 0.125, "car G": 0.25, "all": 0.375}[entry["value"]]
    path.write_text(json.dumps(record))
    publish_cells(out)
    metrics = the_run(out).data.metrics
    assert metrics["canonical-1/per-image/all/pck-0.05"] == 0.5
    for text, start, value in (
        ("car(G)", "car_G", 0.125),
        ("car G", "car_G", 0.25),
        ("all", "all", 0.375),
    ):
        word = f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        assert metrics[f"canonical-1/per-image/{word}/pck-0.05"] == value


def test_more_metrics_than_mlflow_takes_at_a_time(out: Path) -> None:
    alphas = tuple(k / 1000 for k in range(1, 131))
    path = score(prediction_file(out), alphas=alphas)
    publish_cells(out)
    metrics = the_run(out).data.metrics
    assert len(metrics) > 1000
    for entry in json.loads(path.read_text())["metrics"]:
        if (entry["group"], entry["averaging"]) == ("all", "point"):
            name = f"canonical-1/per-point/all/{alpha_name(entry['alpha'])}"
            assert metrics[name] == entry["pck"]


# -- once and again -----------------------------------------------------------------------------


def test_a_second_call_writes_nothing(out: Path) -> None:
    score(prediction_file(out))
    first = publish_cells(out)
    before = state(out)
    assert publish_cells(out) == first
    assert state(out) == before


def test_another_protocol_joins_the_same_run_without_repeating_values(out: Path) -> None:
    file = prediction_file(out)
    score(file)
    first = publish_cells(out)
    score(file, HPF)
    assert publish_cells(out) == first
    run = the_run(out)
    history = histories(out, run.info.run_id)
    assert all(len(values) == 1 for values in history.values())
    assert history["hpf-paper-1/per-image/all/pck-0.10"] == [1.0]
    assert run.info.status == "FINISHED"
    assert run.data.tags["protocols"] == "canonical@1, hpf-paper@1"
    assert len(run.inputs.dataset_inputs) == 1


def test_a_changed_number_is_the_latest_even_if_smaller(out: Path, monkeypatch: Any) -> None:
    path = score(prediction_file(out))
    monkeypatch.setattr(mlflow_store.time, "time", lambda: 1e9)  # and the clock stands still
    publish_cells(out)
    path.write_text(path.read_text().replace('"pck": 1.0', '"pck": 0.25'))
    publish_cells(out)
    run = the_run(out)
    name = "canonical-1/per-image/all/pck-0.10"
    assert run.data.metrics[name] == 0.25
    assert histories(out, run.info.run_id)[name] == [1.0, 0.25]


def test_a_number_that_no_record_holds_any_more_becomes_nan_once(out: Path) -> None:
    file = prediction_file(out)
    score(file)
    (run_id,) = publish_cells(out).values()
    client(out).log_metric(run_id, "train/loss", 3.0)
    score(file, alphas=(0.1,))
    publish_cells(out)
    score(file, HPF)
    publish_cells(out)
    history = histories(out, run_id)
    gone = history["canonical-1/per-image/all/pck-0.05"]
    assert gone[0] == 0.5
    assert len(gone) == 2
    assert math.isnan(gone[1])
    assert history["canonical-1/per-image/all/pck-0.10"] == [1.0]
    assert history["train/loss"] == [3.0]


def test_a_run_left_by_a_killed_call_is_completed(out: Path) -> None:
    score(prediction_file(out))
    (run_id,) = publish_cells(out).values()
    complete = state(out)
    store = client(out)
    store.delete_run(run_id)
    made = store.create_run(
        store.get_experiment_by_name("nemf").experiment_id,
        tags={"nemf.cell": dict(complete[0][3])["nemf.cell"]},
    )
    store.log_metric(made.info.run_id, "canonical-1/per-image/all/pck-0.05", 0.5)
    assert list(publish_cells(out).values()) == [made.info.run_id]
    ((_, status, _, tags, history),) = state(out)
    assert (status, tags, history) == ("FINISHED", complete[0][3], complete[0][4])


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
def test_a_failed_call_is_recorded_and_repaired(
    out: Path, monkeypatch: pytest.MonkeyPatch, problem: type[BaseException]
) -> None:
    from mlflow import MlflowClient

    score(prediction_file(out))

    def fail(*_: Any, **__: Any) -> None:
        raise problem("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", fail)
        with pytest.raises(problem):
            publish_cells(out)
    failed = the_run(out)
    assert failed.info.status == "FAILED"
    assert "nemf.content" not in failed.data.tags
    assert list(publish_cells(out).values()) == [failed.info.run_id]
    assert the_run(out).info.status == "FINISHED"
    assert the_run(out).data.metrics["canonical-1/per-image/all/pck-0.10"] == 1.0


@pytest.mark.long
def test_two_publishers_of_one_folder_make_one_run_each_cell(out: Path) -> None:
    for slot in ("a", "b"):
        score(prediction_file(out, label=slot, slot=slot))
    code = "import sys, pathlib, reports.tracking as t;"
    code += " print(t.publish_cells(pathlib.Path(sys.argv[1])))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert first == second
    assert [run.info.status for run in all_runs(out)] == ["FINISHED"] * 2
    for run in all_runs(out):
        assert all(len(values) == 1 for values in histories(out, run.info.run_id).values())


def test_a_dataset_that_another_run_stores_at_this_moment_is_no_failure(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    score(prediction_file(out))
    log, failures = MlflowClient.log_inputs, [1, 2]

    def fail_first(*arguments: Any) -> None:
        if failures:
            failures.pop()
            raise MlflowException("UNIQUE constraint failed: datasets.name")
        log(*arguments)

    monkeypatch.setattr(MlflowClient, "log_inputs", fail_first)
    publish_cells(out)
    assert the_run(out).info.status == "FINISHED"
    assert len(the_run(out).inputs.dataset_inputs) == 1


def test_of_two_runs_made_at_once_the_older_stays(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishers on two machines: between our search and our run another makes the same."""
    from mlflow import MlflowClient

    score(prediction_file(out))
    make, theirs = MlflowClient.create_run, []

    def second(self: Any, experiment: str, **more: Any) -> Any:
        theirs.append(make(self, experiment, start_time=1, **more).info.run_id)
        return make(self, experiment, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", second)
        assert list(publish_cells(out).values()) == theirs
    assert the_run(out).info.run_id == theirs[0]
    assert list(publish_cells(out).values()) == theirs
    assert the_run(out).info.status == "FINISHED"


# -- tables -------------------------------------------------------------------------------------


def table(name: str = "table1", title: str = "Table", notes: tuple[str, ...] = ()) -> Table:
    """A table of three numbers: one of two datasets and one that was published."""
    common = {"group": "all", "split": "test", "synthetic": False}
    ours = common | {"origin": "measured", "method": "Mine", "protocol": "canonical@1", "seed": 7}
    ours |= {"commit": "f" * 40, "dirty": False, "scored_by": "e" * 40, "scored_dirty": True}
    cells = [
        common | {"origin": "published", "dataset": "spair", "method": "Theirs"},
        ours | {"dataset": "spair", "fingerprint": "ab" * 32, "n_pairs": 2},
        ours | {"dataset": "pfwillow", "fingerprint": "cd" * 32, "n_pairs": 3},
    ]
    return Table(name, title, (0.1,), ["spair"], {}, [], pd.DataFrame(cells), list(notes))


def test_a_table_is_one_run_per_content(out: Path) -> None:
    score(prediction_file(out))
    cells = publish_cells(out)
    file = out / "table1.md"

    def publish(title: str = "Table", name: str = "table1") -> str:
        file.write_text(f"# {title}\n")
        return publish_table(out, table(name, title), [file], cells)

    first = publish()
    before = state(out)
    assert publish() == first
    assert state(out) == before

    run = client(out).get_run(first)
    assert (run.info.run_name, run.info.status) == ("table1", "FINISHED")
    expected = {
        "nemf.table": "table1",
        "nemf.cells": "1",
        "synthetic": "false",
        "protocols": "canonical@1",
        "dataset": "spair, pfwillow",
        "fingerprint": f"{'ab' * 32}, {'cd' * 32}",
        "matcher": "Mine",
        "seed": "7",
        "commit": "f" * 40,
        "scored_by": "e" * 40,
        "dirty": "true",
    }
    assert {name: run.data.tags.get(name) for name in expected} == expected
    inputs = {d.dataset.name: d.dataset.digest for d in run.inputs.dataset_inputs}
    assert inputs == {"SPair-71k": "ab" * 6, "PF-WILLOW": "cd" * 6}
    (cell_run,) = cells.values()
    note = run.data.tags["mlflow.note.content"]
    assert note.startswith("# Table\n")
    assert f"/runs/{cell_run})" in note
    root = out / "mlartifacts" / first / "artifacts"
    assert (root / "table" / "table1.md").read_text() == "# Table\n"
    assert json.loads((root / "cells.json").read_text()) == cells

    changed = publish("Table, changed")
    assert changed not in (first, publish("Table", "table2"))
    assert client(out).get_run(first).data.tags["mlflow.note.content"].startswith("# Table\n")
    assert len(all_runs(out)) == 4


def test_the_table_published_last_is_known_also_if_it_is_an_old_one(out: Path) -> None:
    def last() -> str:
        with mlflow_store.open_store(out) as store:
            return store.newest({"nemf.table": "table1"}, "nemf.last_published").info.run_id

    one, other = (publish_table(out, table(title=t), [], {}) for t in ("A", "B"))
    assert last() == other
    assert publish_table(out, table(title="A"), [], {}) == one
    assert last() == one
    before = state(out)
    publish_table(out, table(title="A"), [], {})
    assert state(out) == before


def test_a_table_left_by_a_killed_call_is_completed(out: Path) -> None:
    whole = publish_table(out, table(), [], {})
    store = client(out)
    content = store.get_run(whole).data.tags["nemf.content"]
    store.delete_run(whole)
    experiment = store.get_experiment_by_name("nemf").experiment_id
    left = store.create_run(experiment, tags={"nemf.content": content}).info.run_id
    assert publish_table(out, table(), [], {}) == left
    run = the_run(out)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.note.content"].startswith("# Table\n")


def test_a_long_table_is_cut_after_a_line_and_says_where_the_rest_is(out: Path) -> None:
    notes = tuple(f"note {i} {'x' * 50}" for i in range(500))
    long = table("big", notes=notes)
    long.cells["synthetic"] = True
    run = client(out).get_run(publish_table(out, long, [], {}))
    note = run.data.tags["mlflow.note.content"]
    assert len(note) <= 8000
    assert "`table/`" in note.splitlines()[-1]
    assert note.splitlines()[-3].endswith("x" * 50)
    assert run.info.run_name == "big SYNTHETIC"


# -- trainings ----------------------------------------------------------------------------------


def training(out: Path, weights: bytes = b"weights", **more: Any) -> dict[str, Any]:
    """A finished training "small" on synthetic SPair-71k as ``nemf train`` leaves it."""
    folder = out / "training" / "small"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.pth").write_bytes(weights)
    (folder / "small.png").write_bytes(b"\x89PNG picture")
    (folder / "0123456789ab").mkdir(exist_ok=True)
    data = {"dataset": "spair", "pairs": 12, "synthetic": True}
    story = {
        "name": "small",
        "key": "0123456789ab",
        "epochs": 2,
        "settings": {
            "seed": 7,
            "model": {"type": "MatcherTraining", "matcher": {"type": "cats"}},
            "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.001}},
            "train_dataloader": {"batch_size": 8},
        },
        "libraries": {"torch": "2.0"},
        "datasets": {
            "train_dataloader": data | {"split": "trn", "fingerprint": "12" * 32},
            "val_dataloader": data | {"split": "val", "fingerprint": "34" * 32},
        },
        "validation": {"epoch": 2, "score": 0.5},
        "code": {"commit": "f" * 40, "dirty": False},
        "sha256": hashlib.sha256(weights).hexdigest(),
        "weights_hash": "cd" * 32,
        "curve": [
            {"epoch": 1, "loss": 3.0, "loss_flow": 2.0, "lr": 0.001},
            {"epoch": 2, "loss": 4.0, "loss_flow": 1.0, "lr": 0.0005, "pck-0.10": 0.5},
        ],
        **more,
    }
    (folder / "small.json").write_text(json.dumps(story))
    return story


def steps(out: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(out).get_metric_history(run_id, name)]


def test_a_training_is_a_run_with_its_curve(out: Path) -> None:
    story = training(out)
    published = publish_trainings(out)
    run = the_run(out)
    run_id = run.info.run_id
    assert published == {"small": run_id}
    assert run.info.run_name == "training small / SYNTHETIC SPair-71k trn"
    assert steps(out, run_id, "train/loss") == [(1, 3.0), (2, 4.0)]
    assert steps(out, run_id, "train/loss_flow") == [(1, 2.0), (2, 1.0)]
    assert steps(out, run_id, "train/lr") == [(1, 0.001), (2, 0.0005)]
    assert steps(out, run_id, "validation/pck-0.10") == [(2, 0.5)]
    expected = {
        "nemf.training": f"small/0123456789ab/2-epochs/{story['sha256'][:12]}",
        "weights_sha256": "cd" * 32,
        "weights_file_sha256": story["sha256"],
        "train_fingerprint": "12" * 32,
        "validation_fingerprint": "34" * 32,
        "synthetic": "true",
        "matcher": "cats",
        "seed": "7",
        "commit": "f" * 40,
        "dirty": "false",
    }
    assert {name: run.data.tags.get(name) for name in expected} == expected
    assert run.data.params["lr"] == "0.001"
    assert run.data.params["batch_size"] == "8"
    inputs = {d.tags[0].value: d.dataset.digest for d in run.inputs.dataset_inputs}
    assert inputs == {"train": "12" * 6, "validation": "34" * 6}
    root = out / "mlartifacts" / run_id / "artifacts"
    assert json.loads((root / "settings.json").read_text()) == story["settings"]
    assert json.loads((root / "small.json").read_text()) == story
    assert (root / "small.png").exists()
    assert not list(root.rglob("*.pth"))
    note = run.data.tags["mlflow.note.content"]
    assert "| epoch | loss | loss_flow | lr | pck-0.10 |" in note
    assert "| 1 | 3 | 2 | 0.001 | – |" in note
    assert "**SYNTHETIC" in note

    before = state(out)
    publish_trainings(out)
    assert state(out) == before


def test_a_training_and_the_cells_of_its_weights_find_each_other(out: Path) -> None:
    training(out)
    score(prediction_file(out))  # of the same weights
    publish_trainings(out)
    publish_cells(out)
    (condition,) = {
        unquote(link)
        for run in all_runs(out)
        for link in re.findall(r"searchFilter=([^&)]*)", run.data.tags["mlflow.note.content"])
    }
    store = client(out)
    experiment = store.get_experiment_by_name("nemf").experiment_id
    assert len(store.search_runs([experiment], condition)) == 2


def test_another_result_is_another_run(out: Path) -> None:
    training(out)
    first = publish_trainings(out)["small"]
    training(out, b"other weights")
    second = publish_trainings(out)["small"]
    assert second != first
    training(out, b"other weights", epochs=3)  # a longer training that chose the same epoch
    assert publish_trainings(out)["small"] not in (first, second)
    assert len(all_runs(out)) == 3


def test_a_half_written_curve_is_completed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    training(out)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_tag", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            publish_trainings(out)
    assert the_run(out).info.status == "FAILED"
    (run_id,) = publish_trainings(out).values()
    assert steps(out, run_id, "train/loss") == [(1, 3.0), (2, 4.0)]
    assert the_run(out).info.status == "FINISHED"


def test_a_training_without_the_weights_it_tells_of_is_refused(out: Path) -> None:
    training(out)
    weights = out / "training" / "small" / "small.pth"
    weights.write_bytes(b"others")
    with pytest.raises(NemfError, match="tells of other weights"):
        publish_trainings(out)
    weights.unlink()
    with pytest.raises(NemfError, match=r"small\.pth: is missing"):
        publish_trainings(out)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_training_s_damaged_file_is_named(text: str, out: Path) -> None:
    training(out)
    file = out / "training" / "small" / "small.json"
    file.write_text(text)
    with pytest.raises(NemfError, match=r"cannot be read as (what|a training's story)") as caught:
        publish_trainings(out)
    assert str(file) in str(caught.value)


def test_no_training_makes_no_store(tmp_path: Path) -> None:
    (tmp_path / "training" / "begun" / "0123456789ab").mkdir(parents=True)
    assert publish_trainings(tmp_path) == {}
    assert not (tmp_path / "mlflow.db").exists()


def test_a_trained_matcher_s_cell_names_the_hash_of_its_training(
    tmp_path: Path, tiny_spair: Any
) -> None:
    """The real thing: the hash in the training's file is the one that the prediction finds."""
    from experiments.configurations import load_config
    from experiments.prediction import predict
    from experiments.training import train

    options = {
        "model.matcher.proj_dim": 32,
        "model.matcher.mlp_ratio": 1,
        "train_dataloader.batch_size": 2,
        "train_dataloader.dataset.pairs_per_epoch": 2,
        "val_cfg.pairs": 1,
        "train_cfg.max_epochs": 1,
        "train_cfg.val_interval": 1,
    }
    data = tiny_spair()
    weights = train("cats_small", tmp_path, options, data)
    config = load_config("cats_small/spair")
    config.model.weights = str(weights)
    file = predict(config, data=data, out=tmp_path, plan=Plan("src2trg"))
    told = json.loads(weights.with_suffix(".json").read_text())["weights_hash"]
    assert told == Predictions.read(file).meta["matcher"]["weights_sha256"]


# -- what goes wrong ----------------------------------------------------------------------------


def refusal(out: Path) -> str:
    with pytest.raises(NemfError) as caught:
        publish_cells(out)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_an_unreachable_server_is_named_soon_and_keeps_the_users_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(prediction_file(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    message = refusal(tmp_path)
    assert f"127.0.0.1:{port}" in message
    assert "secret" not in message
    assert "same command again" in message
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    assert "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT" not in os.environ


def test_a_broken_database_is_named_at_once(tmp_path: Path) -> None:
    prediction_file(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 100)
    message = refusal(tmp_path)
    assert str(tmp_path / "mlflow.db") in message
    assert "move away" in message


def test_a_stale_record_is_refused(out: Path) -> None:
    path = score(prediction_file(out))
    record = json.loads(path.read_text()) | {"predictions_sha256": "0" * 64}
    path.write_text(json.dumps(record))
    assert str(path) in refusal(out)


def test_a_deleted_experiment_is_not_written_to(out: Path) -> None:
    prediction_file(out)
    publish_cells(out)
    store = client(out)
    store.delete_experiment(store.get_experiment_by_name("nemf").experiment_id)
    assert "mlflow experiments restore" in refusal(out)


def test_a_copied_folder_does_not_write_into_the_original(out: Path) -> None:
    prediction_file(out)
    publish_cells(out)
    copied = out.parent / "copy"
    shutil.copytree(out, copied)
    assert "moved or copied" in refusal(copied)
    (copied / "mlflow.db").unlink()


# -- addresses and manners ----------------------------------------------------------------------


def test_the_users_address_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("sub")) == f"sqlite:///{tmp_path}/sub/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert tracking_uri(tmp_path) == "http://somewhere:5000"


@pytest.mark.parametrize("name", ["what?", "a%20b"])
def test_names_that_mlflow_would_misread_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(NemfError, match="MLFLOW_TRACKING_URI"):
        tracking_uri(tmp_path / name)


def test_artifacts_stay_near_their_database_and_a_server_chooses_its_own(tmp_path: Path) -> None:
    near = mlflow_store._artifact_location
    assert near(f"sqlite:///{tmp_path}/db/x.db", Path("o")) == f"file://{tmp_path}/db/mlartifacts"
    assert near("postgresql://me@host/db", tmp_path) == f"file://{tmp_path}/mlartifacts"
    for uri in ("http://host:5000", "https://host", "databricks"):
        assert near(uri, tmp_path) is None


def test_publishing_says_nothing_and_leaves_logging_alone(
    out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prediction_file(out)
    import mlflow  # noqa: F401

    level = logging.getLogger("mlflow").level
    publish_cells(out)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("mlflow").level == level


def test_importing_the_writer_loads_neither_mlflow_nor_torch() -> None:
    code = "import sys, reports.tracking, reports.rebuilding;"
    code += " sys.exit(bool({'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
