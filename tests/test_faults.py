"""What goes wrong around a job: kills, full disks, locked and vanished stores, clocks, impatience.

After each of them the same command goes on and ends with the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from experiments import ranks
from experiments.configurations import load_config
from experiments.matcher_training import ValidatePCK
from experiments.prediction import predict
from experiments.training import train
from nemf.errors import NemfError
from nemf.pairs import Plan
from reports import mlflow_store, tracking
from reports.tracking import publish_cells, publish_table
from tests.conftest import REPO
from tests.test_tracking import client, empty_store, out, prediction_file, score, table  # noqa: F401
from tests.test_training import pair_options

KILLS = 50
LONG_CASES = [
    pytest.param(*case, marks=pytest.mark.long)
    for case in (("validating", 1), ("saving", 1), ("saving", 3))
]


# -- SIGKILL at any moment ------------------------------------------------------------------------


class Jobs:
    """Runs the miniature job again and again, see tests/fault_job.py."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts
        self.told = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by end)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fault_job"],
            cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.told, text=True, start_new_session=True,
            env={k: v for k, v in os.environ.items() if not k.startswith(("NEMF_", "MLFLOW_"))}
            | {"MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        self._answer()

    def run(self, folder: Path, kill_after_s: float | None = None) -> dict[str, Any]:
        order = {"out": str(folder), "parts": self.parts, "kill_after_s": kill_after_s}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())

    def finish(self, folder: Path) -> None:
        """Runs undisturbed; AssertionError with what was written to standard error if it fails."""
        start = self.told.tell()
        if self.run(folder)["status"]:
            self.told.seek(start)
            raise AssertionError(self.told.read()[-3000:])

    def end(self) -> None:
        self.told.close()
        self._server.kill()
        self._server.wait()


@pytest.fixture
def jobs(request: pytest.FixtureRequest) -> Iterator[Jobs]:
    started = Jobs(*request.param)
    yield started
    started.end()


def results(folder: Path) -> dict[str, str]:
    """Hashes of everything a job is run for: data, weights, predictions, scores, tables. The story
    of a training tells how long it took, and pictures who drew them: these are left out."""
    found = {}
    for pattern in (
        "synthetic/**/*",
        "training/*/*.pth",
        "training/*/*/curve.json",
        "predictions/**/*.*",
        "small/*",
    ):
        for path in folder.glob(pattern):
            if path.is_file() and not path.name.startswith("."):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(folder).as_posix()] = digest
    return found


def half_written(folder: Path) -> list[str]:
    """Drafts that nobody removed, and files that cannot be read as what they are."""
    bad = []
    for path in folder.rglob("*"):
        if path.name.startswith(".") and not re.search(r"\.lock\.\d+$", path.name):
            bad.append(path.name)
        try:
            if path.suffix == ".parquet":
                pq.read_table(path)
            if path.suffix == ".json" and "vis_data" not in path.parts:
                json.loads(path.read_text())
        except Exception as problem:
            bad.append(f"{path}: {problem}")
    return bad


def runs(folder: Path) -> list[tuple[Any, ...]]:
    """State, name, metrics and files of every active run, whatever its id and time."""
    store = folder / "mlflow.db"
    if not store.exists():
        return []
    from mlflow import MlflowClient

    asked = MlflowClient(tracking_uri=f"sqlite:///{store}")
    experiment = asked.get_experiment_by_name("nemf")
    found = []
    for run in asked.search_runs([experiment.experiment_id]):
        names = ("nemf.cell", "nemf.training", "nemf.table")
        key = next(run.data.tags[name] for name in names if name in run.data.tags)
        root = folder / "mlartifacts" / run.info.run_id / "artifacts"
        listed = json.loads((root / "files.json").read_text())
        whole = {
            name: hashlib.sha256((root / name).read_bytes()).hexdigest() == digest
            for name, digest in listed.items()
        }
        assert all(whole.values()), whole
        metrics = sorted(run.data.metrics.items())
        found.append((key, run.info.status, run.info.run_name, metrics, sorted(listed)))
    return sorted(found)


def check_kills(jobs: Jobs, folder: Path, kills: int) -> None:
    undisturbed = jobs.run(folder / "whole")
    assert undisturbed["status"] == 0
    wanted, wanted_runs = results(folder / "whole"), runs(folder / "whole")
    assert "small/small.md" in wanted
    assert {state for _, state, *_ in wanted_runs} <= {"FINISHED"}
    drawn, seconds = random.Random(kills), undisturbed["seconds"]
    for number in range(kills):  # one moment in every kills-th part of the time
        share, here = 0.98 * (number + drawn.random()) / kills, folder / f"killed-{number}"
        while (ended := jobs.run(here, moment := share * seconds))["status"] != -signal.SIGKILL:
            seconds = ended["seconds"]  # it was faster than the one before: not killed
            shutil.rmtree(here)
        jobs.finish(here)
        assert results(here) == wanted, f"after a kill at {moment:.2f} s"
        assert half_written(here) == [], f"after a kill at {moment:.2f} s"
        assert runs(here) == wanted_runs, f"after a kill at {moment:.2f} s"
        shutil.rmtree(here)


@pytest.mark.parametrize("jobs", [()], indirect=True)
def test_a_job_killed_at_any_moment_ends_with_the_same_files(jobs: Jobs, tmp_path: Path) -> None:
    """Data, index, prediction, scoring and table; the long test has training and MLflow too."""
    check_kills(jobs, tmp_path, 2)


@pytest.mark.long
@pytest.mark.parametrize("jobs", [("training", "mlflow")], indirect=True)
def test_the_whole_chain_killed_at_fifty_moments(jobs: Jobs, tmp_path: Path) -> None:
    check_kills(jobs, tmp_path, KILLS)


@pytest.mark.parametrize(
    ("where", "number"),
    [("validating", 2), ("saving", 2), *LONG_CASES],
)
def test_a_training_stopped_while_it_saves_or_validates_goes_on_as_if_nothing_had_been(
    where: str,
    number: int,
    tiny_spair: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, options = tiny_spair(), pair_options(2)
    part = (ValidatePCK, "evaluate") if where == "validating" else (ranks, "write_whole")
    calls, real = [], getattr(*part)

    def stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*part, stops)
        with pytest.raises(KeyboardInterrupt):
            train("cats_small", tmp_path / "stopped", options, data)
    files = [train("cats_small", tmp_path / n, options, data) for n in ("stopped", "whole")]
    stories = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    for name in ("validation", "curve", "weights_hash"):
        assert stories[0][name] == stories[1][name], name
    assert half_written(tmp_path / "stopped") == []


# -- disks and folders ----------------------------------------------------------------------------


def fill(file: Path) -> None:
    """Lets a file grow until its disk is full."""
    with file.open("ab", 0) as ballast, suppress(OSError):
        while ballast.write(bytes(1024)):
            pass


def run_nearest(data: Path, folder: Path) -> Path:
    config = load_config("nearest_small/pfwillow", {"predict.chunk": 1})
    return predict(config, data=data, out=folder, plan=Plan("src2trg"))


def complaint_of(data: Path, folder: Path) -> str | None:
    try:
        run_nearest(data, folder)
    except NemfError as problem:
        return str(problem)
    return None


def test_a_full_disk_is_named_and_the_next_start_goes_on(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    data, disk = tiny_pfwillow(), tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "nemf-test", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        ballast = disk / "ballast"
        refused = 0
        for free_kib in range(0, 48, 4):
            fill(ballast)
            os.truncate(ballast, max(0, ballast.stat().st_size - free_kib * 1024))
            said = complaint_of(data, disk / "out")
            if said is None:  # that was enough
                break
            assert re.search(r"/disk.*(No space left|cannot be written)", said)
            assert not list(disk.rglob("predictions.parquet"))
            refused += 1
        assert refused >= 3
        ballast.unlink()
        again = run_nearest(data, disk / "out")
        assert again.read_bytes() == run_nearest(data, tmp_path / "whole").read_bytes()
        assert half_written(disk) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_that_may_only_be_read_is_named(tiny_pfwillow: Callable[..., Path]) -> None:
    """As another user where the tests run as root, whom no permission stops."""
    top = Path(tempfile.mkdtemp(prefix="nemf-test-"))
    try:
        data = tiny_pfwillow(root=top / "data")
        (top / "out").mkdir()
        os.chmod(top, 0o755)
        os.chmod(top / "out", 0o555)
        told, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                if os.geteuid() == 0:
                    os.setgid(pwd.getpwnam("nobody").pw_gid)
                    os.setuid(pwd.getpwnam("nobody").pw_uid)
                os.environ["NEMF_CACHE"] = str(top / "out" / "cache")  # costs time, no more
                config = load_config("copy/pfwillow")
                predict(config, data=data, out=top / "out", plan=Plan("src2trg"))
            except BaseException as problem:
                os.write(writer, f"{type(problem).__name__}: {problem}".encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        text = os.read(told, 10_000).decode()
        assert text.startswith("NemfError: ")
        assert str(top / "out") in text
        assert "cannot be written (Permission denied)" in text
        assert os.listdir(top / "out") == []
    finally:
        os.chmod(top / "out", 0o755)
        shutil.rmtree(top)


# -- stores ---------------------------------------------------------------------------------------


def test_a_locked_store_is_named_and_written_when_it_is_free(
    out: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score(prediction_file(out))
    connect = sqlite3.connect
    with monkeypatch.context() as patch:
        patch.setattr(
            mlflow_store.sqlite3, "connect", lambda file, timeout: connect(file, timeout=0.1)
        )
        holder = connect(out / "mlflow.db", isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(NemfError, match=r"database is locked.*results are safe.*same command"):
            publish_cells(out)
        holder.rollback()
        holder.close()
        assert len(publish_cells(out)) == 1


def test_a_store_made_by_a_killed_process_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of MLflow's tables would be of no use: the file appears with all of them."""
    from mlflow import MlflowClient

    score(prediction_file(tmp_path))

    class Killed(BaseException):
        pass

    def dies(self: Any, **_: Any) -> None:
        assert not (tmp_path / "mlflow.db").exists()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "search_experiments", dies)
        with pytest.raises(Killed):
            publish_cells(tmp_path)
    assert not list(tmp_path.glob("*mlflow.db*"))
    assert len(publish_cells(tmp_path)) == 1
    assert [path.name for path in tmp_path.glob("*mlflow.db*")] == ["mlflow.db"]


# -- clocks ---------------------------------------------------------------------------------------


def test_a_clock_that_is_put_back_does_not_hide_newer_numbers(
    out: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = score(prediction_file(out))
    for value, now_s in ((1.0, 2e9), (0.75, 1e9), (0.5, 1.1e9), (0.25, 0.9e9)):
        monkeypatch.setattr(mlflow_store.time, "time", partial(float, now_s))
        text = re.sub(r'"pck": [\d.]+', f'"pck": {value}', path.read_text())
        path.write_text(text)
        (run_id,) = publish_cells(out).values()
        metrics = client(out).get_run(run_id).data.metrics
        assert metrics["canonical-1/per-image/all/pck-0.10"] == value


def test_the_table_published_last_is_the_last_also_after_the_clock_was_put_back(
    out: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Clock:
        moment = datetime(2030, 1, 1, tzinfo=UTC)
        fromisoformat = staticmethod(datetime.fromisoformat)

        @classmethod
        def now(cls, _: Any) -> datetime:
            return cls.moment

    monkeypatch.setattr(tracking, "datetime", Clock)
    for title, back in (("A", 0), ("B", 400), ("C", 1), ("A", 800)):
        Clock.moment -= timedelta(days=back)
        run_id = publish_table(out, table(title=title), [], {})
        with mlflow_store.open_store(out) as store:
            last = store.newest({"nemf.table": "table1"}, tracking.LAST_PUBLISHED)
        assert last.info.run_id == run_id


# -- impatience -----------------------------------------------------------------------------------

HANGING = """
import time
from experiments import cli, prediction
real, calls = prediction.predict_pairs, []
def hanging(*arguments):
    calls.append(1)
    if len(calls) == 2:  # one chunk is there
        try:
            print("hanging", flush=True)
            time.sleep(100)
        finally:
            print("leaving", flush=True)
            time.sleep(PATIENCE_S)
    return real(*arguments)
prediction.predict_pairs = hanging
cli.main()
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_and_a_second_one_does_not_wait(
    presses: int, tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    data, folder = tiny_pfwillow(), tmp_path / "out"
    code = HANGING.replace("PATIENCE_S", "0" if presses == 1 else "100")
    arguments = ["predict", "nearest_small/pfwillow", "--data", str(data), "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--cfg-options", "predict.chunk=1"],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for word in ("hanging", "leaving")[:presses]:
        assert process.stdout.readline().strip() == word
        process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == (130 if presses == 1 else -signal.SIGINT)
    assert "Traceback" not in errors
    assert ("stopped; the same command goes on where it was" in errors) == (presses == 1)
    assert len(list(folder.rglob("chunks/*.parquet"))) == 1
    again = run_nearest(data, folder)
    assert again.read_bytes() == run_nearest(data, tmp_path / "whole").read_bytes()
