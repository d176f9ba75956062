"""Tables from MLflow alone: the same bytes in an empty folder, and every damage named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from experiments.cli import main
from nemf.errors import NemfError
from reports.rebuilding import fetch_table
from reports.tracking import publish_cells, publish_table
from tests.test_tracking import client, make_empty_store, prediction_file, score, table


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_empty_store(tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture
def there(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder with a store that $MLFLOW_TRACKING_URI names."""
    folder = tmp_path / "there"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("NEMF_DATA", "NEMF_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An output folder of another machine, not made yet."""
    return tmp_path / "here"


def publish(out: Path, slots: tuple[str, ...] = ("a", "b"), name: str = "table1") -> dict[str, str]:
    """Cells of one prediction file each, and a table of them."""
    for slot in slots:
        score(prediction_file(out, label=slot, slot=slot))
    folder = out / name
    folder.mkdir(exist_ok=True)
    files = [folder / f"{name}.md", folder / "job.json"]
    files[0].write_text("# Table\n")
    files[1].write_text('{"synthetic": false, "missing": {}}\n')
    cells = publish_cells(out)
    publish_table(out, table(name), files, cells)
    return cells


def tree(out: Path) -> dict[str, bytes]:
    """What tables are made from."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in [*out.glob("predictions/**/*"), *out.glob("*/job.json")]
        if path.is_file() and not path.name.startswith(".lock.")
    }


def artifact(out: Path, run_id: str, name: str) -> Path:
    path = out / "mlartifacts" / run_id / "artifacts" / name
    assert path.exists()
    return path


def refusal(out: Path) -> str:
    """What is said, and that no table could be made of what came."""
    with pytest.raises(NemfError) as caught:
        fetch_table(out, "table1")
    assert not list(out.glob("predictions/*/*/*/current"))
    return str(caught.value)


def test_records_and_predictions_come_back_as_they_were(there: Path, here: Path) -> None:
    publish(there)
    fetched = fetch_table(here, "table1")
    assert tree(here) == tree(there)
    assert len(tree(here)) == 9  # twice predictions, cell, record, pointer; and the job
    assert not fetched.synthetic
    same, other = there / "table1" / "table1.md", here / "other.md"
    other.write_text("changed")
    assert fetched.differing([same, other]) == [other]


def test_a_second_fetch_takes_what_is_there(there: Path, here: Path) -> None:
    cells = publish(there)
    fetch_table(here, "table1")
    for run_id in cells.values():
        artifact(there, run_id, "predictions.parquet").unlink()
    fetch_table(here, "table1")
    assert tree(here) == tree(there)


def test_what_is_missing_or_damaged_is_named_all_at_once(there: Path, here: Path) -> None:
    first, second = publish(there).values()
    artifact(there, first, "predictions.parquet").write_bytes(b"something else")
    artifact(there, second, "scores/canonical@1.json").unlink()
    message = refusal(here)
    assert f"predictions.parquet of run {first} is damaged" in message
    assert f"scores/canonical@1.json of run {second} is missing" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda store, run: store.set_terminated(run, "FAILED"), "is FAILED, not FINISHED"),
        (lambda store, run: store.update_run(run, status="RUNNING"), "is RUNNING, not FINISHED"),
        (lambda store, run: store.delete_run(run), "is deleted"),
        (lambda store, run: store.set_tag(run, "nemf.cell", "x/y/z/0"), "mirrors another cell"),
        (lambda store, run: store.delete_tag(run, "nemf.files"), "has no tag nemf.files"),
    ],
)
def test_an_unfinished_cell_is_named(
    harm: Callable[[Any, str], None], words: str, there: Path, here: Path
) -> None:
    ((cell, run_id),) = publish(there, ("a",)).items()
    harm(client(there), run_id)
    message = refusal(here)
    assert f"{cell}: run {run_id} {words}" in message


def test_a_list_of_files_that_was_changed_is_not_believed(there: Path, here: Path) -> None:
    (run_id,) = publish(there, ("a",)).values()
    listing = artifact(there, run_id, "files.json")
    listing.write_text(listing.read_text().replace("cell.json", "bell.json"))
    assert f"files.json of run {run_id} is damaged" in refusal(here)


@pytest.mark.parametrize("cell", ["../../../x", "a/b/c", "a/../b/c", "/a/b/c/d"])
def test_a_cell_leads_nowhere_else(cell: str, there: Path, here: Path) -> None:
    publish(there, ("a",))
    publish_table(there, table(title="T"), [], {cell: "0" * 32})
    assert f"{cell!r} is no cell" in refusal(here)


def test_a_folder_with_other_results_is_left_alone(there: Path, here: Path) -> None:
    publish(there, ("a",))
    foreign = score(prediction_file(here, slot="foreign")).parent.parent / "predictions.parquet"
    before = tree(here)
    with pytest.raises(NemfError, match="choose an empty --out") as caught:
        fetch_table(here, "table1")
    assert str(foreign) in str(caught.value)
    assert before.items() <= tree(here).items()


def test_local_files_are_never_overwritten(there: Path) -> None:
    """Fetching into the very folder that was scored anew since."""
    publish(there, ("a",))
    (record,) = there.glob("predictions/*/*/*/*/scores/*.json")
    record.write_text(record.read_text() + "\n")
    extra = record.with_name("mine.json")
    extra.write_text("{}")
    with pytest.raises(NemfError) as caught:
        fetch_table(there, "table1")
    assert f"{record} differs from the published file" in str(caught.value)
    assert f"{extra} was not published" in str(caught.value)
    assert record.read_text().endswith("\n\n")


def test_the_table_published_last_decides(there: Path, here: Path) -> None:
    publish(there, ("a",))
    publish(there, ("b",))  # both are current now
    fetch_table(here, "table1")
    assert {path.split("/")[1] for path in tree(here) if "/" in path} >= {"a", "b"}


def test_a_table_that_was_never_published_is_made_of_another_one_s_cells(
    there: Path, here: Path
) -> None:
    publish(there)
    fetched = fetch_table(here, "table2")
    assert fetched.published == {}
    assert not (here / "table2").exists()
    assert {n for n in tree(here) if n.startswith("pred")} == {
        n for n in tree(there) if n.startswith("pred")
    }


def test_nothing_published_is_said(there: Path, here: Path) -> None:
    with pytest.raises(NemfError, match="nothing was published"):
        fetch_table(here, "table1")
    prediction_file(there)
    publish_cells(there)
    with pytest.raises(NemfError, match="no finished run of a table"):
        fetch_table(here, "table1")
    publish(there)
    with pytest.raises(NemfError, match="no finished run of a table"):
        fetch_table(here, "table1", synthetic=True)


def test_a_store_that_is_not_there_is_not_made(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(NemfError, match=r"none\.db: there is no such MLflow store"):
        fetch_table(here, "table1")
    assert not (tmp_path / "none.db").exists()


# -- through the command line -------------------------------------------------------------------


@pytest.fixture
def nemf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``nemf(*arguments)`` runs the command line in this process and returns what it printed."""

    def run(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["nemf", *map(str, arguments)])
        capsys.readouterr()
        status: Any = 0
        try:
            main()
        except SystemExit as leave:
            status = leave.code
        captured = capsys.readouterr()
        assert not status, captured.err
        return captured.out

    return run


@pytest.fixture
def data(tiny_spair: Any, tiny_pfpascal: Any, tiny_pfwillow: Any) -> Path:
    tiny_spair()
    tiny_pfpascal()
    return tiny_pfwillow()


def table_bytes(out: Path, name: str) -> dict[str, bytes]:
    return {ending: (out / name / f"{name}.{ending}").read_bytes() for ending in ENDINGS}


ENDINGS = ("md", "tex", "csv", "html")


def test_every_file_of_a_table_is_rebuilt_byte_by_byte(
    nemf: Callable[..., str], data: Path, there: Path, here: Path
) -> None:
    nemf("predict", "--table", "1", "--matchers", "copy", "--data", data, "--out", there)
    nemf("score", "--table", "1", "--out", there)
    job = json.loads((there / "table1" / "job.json").read_text())
    job["missing"]["X"] = "X: was not at hand."  # a footnote that only the job knows of
    (there / "table1" / "job.json").write_text(json.dumps(job))
    nemf("table", "1", "--data", data, "--out", there)
    original = table_bytes(there, "table1")
    assert b"X: was not at hand." in original["md"]
    shutil.rmtree(there / "predictions")
    shutil.rmtree(there / "table1")

    told = nemf("table", "1", "--from-mlflow", "--data", data, "--out", here)
    assert table_bytes(here, "table1") == original
    assert "differs" not in told
    assert not (here / "mlflow.db").exists()

    plain = nemf("table", "1", "--from-mlflow", "--out", here)  # no pictures without the data
    differing = [line for line in plain.splitlines() if "differs" in line]
    assert [line.partition(" ")[0] for line in differing] == [f"{here}/table1/table1.html"]
    assert "give --data" in plain


def test_fetching_needs_an_address(
    there: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(sys, "argv", ["nemf", "table", "1", "--from-mlflow", "--out", str(here)])
    with pytest.raises(SystemExit):
        main()
    assert "needs MLFLOW_TRACKING_URI" in capsys.readouterr().err
    assert not here.exists()


# -- through a server ---------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`mlflow server` on SQLite that hands out artifacts itself, named by $MLFLOW_TRACKING_URI;
    gives the folder it keeps everything in."""
    folder = tmp_path / "server"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
        )
    try:
        for _ in range(240):
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (URLError, OSError):
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield folder
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.mark.long
def test_the_same_through_a_server_that_only_an_address_is_known_of(
    nemf: Callable[..., str], data: Path, server: Path, tmp_path: Path
) -> None:
    out, here = tmp_path / "out", tmp_path / "here"
    nemf("predict", "--table", "1", "--matchers", "copy", "--data", data, "--out", out)
    nemf("score", "--table", "1", "--out", out)
    for name in ("1", "2"):
        nemf("table", name, "--out", out)
    original = {name: table_bytes(out, name) for name in ("table1", "table2")}
    shutil.rmtree(out)
    for name in ("1", "2"):
        assert "differs" not in nemf("table", name, "--from-mlflow", "--out", here)
    assert {name: table_bytes(here, name) for name in ("table1", "table2")} == original
    assert not list(here.rglob("mlflow.db"))
    assert not list(here.rglob("mlartifacts"))

    (record, *_) = server.glob("artifacts/**/oracle-grid-16-canonical@1.json")
    record.write_text("{}")
    again = tmp_path / "again"
    with pytest.raises(NemfError, match=r"oracle-grid-16-canonical@1\.json .* is damaged"):
        fetch_table(again, "table1")
    record.unlink()
    with pytest.raises(NemfError, match=r"oracle-grid-16-canonical@1\.json .* is missing"):
        fetch_table(again, "table1")


@pytest.mark.long
def test_two_folders_publish_to_one_server_at_once(server: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    code = "import sys, pathlib, reports.tracking as t; t.publish_cells(pathlib.Path(sys.argv[1]))"
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:  # the same two cells in both
        for slot in ("a", "b"):
            score(prediction_file(out, slot=slot))
    both = [subprocess.Popen([sys.executable, "-c", code, out]) for out in outs]
    assert [process.wait(600) for process in both] == [0, 0]
    store = MlflowClient()
    runs = store.search_runs([store.get_experiment_by_name("nemf").experiment_id])
    assert len(runs) == len({run.data.tags["nemf.cell"] for run in runs}) == 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    published = [publish_cells(out) for out in outs]
    assert published[0] == published[1]
    assert set(published[0].values()) == {run.info.run_id for run in runs}
