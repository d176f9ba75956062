"""The recipe of docs/cluster.md: MLflow on a real PostgreSQL, artifacts in a shared folder."""

from __future__ import annotations

import glob
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from nemf.errors import NemfError
from reports.rebuilding import fetch_table
from reports.tracking import publish_cells
from tests.test_rebuilding import publish, tree

pytestmark = pytest.mark.long
PROGRAMS = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb")) or [shutil.which("initdb") or ""]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URI of an empty database: a file, or on a PostgreSQL of our own behind a socket."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/server.db"
        return
    if not PROGRAMS[-1]:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("psycopg2 is not installed (pip install psycopg2-binary)")
    programs = Path(PROGRAMS[-1]).parent
    folder = Path(tempfile.mkdtemp(prefix="nemf-pg-", dir="/tmp"))  # sockets have short names
    owner = {}
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        owner = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **owner}
    initdb = [programs / "initdb", "-D", folder / "db", "-A", "trust", "-U", "nemf", "-N"]
    subprocess.run(initdb, check=True, **quiet)
    server = subprocess.Popen(
        [programs / "postgres", "-D", folder / "db", "-k", folder, "-c", "listen_addresses="],
        **quiet,
    )
    try:
        create = [programs / "createdb", "-h", folder, "-U", "nemf", "mlflow"]
        patiently(lambda: subprocess.run(create, check=False, **quiet).returncode == 0, server)
        yield f"postgresql+psycopg2://nemf@/mlflow?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        server.wait(60)
        shutil.rmtree(folder)


def patiently(ready: object, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while not ready():  # type: ignore[operator]
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.3)


class Server:
    """`mlflow server` on the database; it can vanish and come back at the same address."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder = uri, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", str(self.port), "--workers", "1", "--backend-store-uri", self.uri),
            *("--artifacts-destination", str(self.folder / "artifacts")),
        ]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env=environment,
                start_new_session=True,
            )  # fmt: skip
        patiently(self.answers, self.process)

    def answers(self) -> bool:
        try:
            return urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).status == 200
        except (URLError, OSError):
            return False

    def vanish(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture
def server(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    started = Server(database, folder)
    started.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{started.port}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield started
    started.vanish()


def test_many_hosts_and_a_server_that_vanishes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published by two hosts at once and rebuilt on a third; a server that vanishes in the middle
    costs nothing but the same command again."""
    from mlflow import MlflowClient

    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    cells = publish(one, ("a", "b"))
    assert publish_cells(one) == cells
    fetch_table(three, "table1")
    wanted = {k: v for k, v in tree(one).items() if not k.endswith(".lock")}
    assert tree(three) == wanted

    shutil.copytree(one, two)
    code = "import sys, pathlib, reports.tracking as t; t.publish_cells(pathlib.Path(sys.argv[1]))"
    both = [subprocess.Popen([sys.executable, "-c", code, out]) for out in (one, two)]
    assert [process.wait(300) for process in both] == [0, 0]

    real = MlflowClient.log_batch

    def vanishing(self: MlflowClient, *arguments: object, **more: object) -> None:
        server.vanish()
        real(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", vanishing)
        with pytest.raises(NemfError, match=r"the results are safe in .* same command again"):
            publish(one, ("a", "b", "c"))
    server.start()
    store = MlflowClient()
    experiment = store.get_experiment_by_name("nemf").experiment_id

    def cell_runs() -> list[object]:
        runs = store.search_runs([experiment])
        return [run for run in runs if "nemf.cell" in run.data.tags]

    states = sorted(run.info.status for run in cell_runs())
    assert states == ["FINISHED", "FINISHED", "RUNNING"]  # nobody says it is complete
    published = publish(one, ("a", "b", "c"))
    assert sorted(published.values()) == sorted(run.info.run_id for run in cell_runs())
    assert {run.info.status for run in cell_runs()} == {"FINISHED"}
