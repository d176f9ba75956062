"""Whole jobs, as a user starts them (``make test-long``)."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

REPO = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.long, pytest.mark.skipif(not shutil.which("make"), reason="needs make")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """This interpreter's environment stands in for .venv; data and weights are not inherited."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NEMF_", "MLFLOW_"))}
    return kept | {"NEMF_CACHE": str(tmp_path_factory.mktemp("cache"))}


def make(
    environment: dict[str, str], out: Path, *variables: str, target: str = "reproduce-table1"
) -> subprocess.CompletedProcess[str]:
    venv = Path(sys.prefix)
    ready = venv / ".ready"
    command = ["make", target, f"VENV={venv}", f"OUT={out}", *variables]
    command += ["--assume-old", str(ready)]  # the environment at hand is as it should be
    ready.touch()
    return subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=1500
    )


def printed_table(out: Path) -> str:
    """The table without its line on the state of the code."""
    lines = (out / "table1" / "table1.md").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("- Code:"))


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("job") / "outputs"
    begun = time.monotonic()
    done = make(environment, out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - begun < 900
    return out


def test_the_job_without_data_is_synthetic_and_says_so(undisturbed: Path) -> None:
    text = printed_table(undisturbed)
    assert "SYNTHETIC" in text.splitlines()[0]
    assert "published" not in text
    cells = pd.read_csv(undisturbed / "table1" / "table1.csv")
    assert cells["synthetic"].all()
    at_ten = cells[(cells["alpha"] == 0.1) & (cells["protocol"] == "canonical@1")]
    means = at_ten.groupby(["method", "dataset"])["pck"].mean().unstack(0)
    learned = [c for c in means.columns if c.startswith(("nearest", "HPF"))]
    assert (means[learned].min(axis=1) > means["copy (floor)"]).all()


def test_a_second_start_predicts_nothing(environment: dict[str, str], undisturbed: Path) -> None:
    files = sorted(undisturbed.rglob("predictions.parquet"))
    before = [(f, f.stat().st_mtime_ns) for f in files]
    runs = count_runs(undisturbed)
    assert make(environment, undisturbed).returncode == 0
    assert [
        (f, f.stat().st_mtime_ns) for f in sorted(undisturbed.rglob("predictions.parquet"))
    ] == before
    assert count_runs(undisturbed) == runs


def test_table_2_is_made_from_the_predictions_of_table_1(
    environment: dict[str, str], undisturbed: Path
) -> None:
    before = sorted(undisturbed.rglob("predictions.parquet"))
    done = make(environment, undisturbed, target="reproduce-table2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(undisturbed.rglob("predictions.parquet")) == before
    cells = {n: pd.read_csv(undisturbed / f"table{n}" / f"table{n}.csv") for n in (1, 2)}
    assert cells[2]["synthetic"].all()
    key = ["method", "protocol"]
    one = cells[1][(cells[1]["dataset"] == "spair") & (cells[1]["alpha"] == 0.1)].set_index(key)
    all_pairs = cells[2][cells[2]["group"] == "all"].set_index(key)
    pd.testing.assert_series_equal(one["pck"], all_pairs["pck"])
    classes = cells[2][~cells[2]["group"].isin(["all", "class mean"])]
    assert classes["group"].nunique() >= 10
    means = classes.groupby(key)["pck"].mean()
    class_mean = cells[2][cells[2]["group"] == "class mean"].set_index(key)["pck"]
    assert means.to_dict() == pytest.approx(class_mean.to_dict())


def count_runs(out: Path) -> int:
    with sqlite3.connect(out / "mlflow.db") as database:
        (count,) = database.execute("select count(*) from runs").fetchone()
    return count


@pytest.mark.parametrize("moment_s", [2, 6, 12, 18, 25])
def test_a_killed_job_ends_with_the_same_table(
    environment: dict[str, str], undisturbed: Path, tmp_path: Path, moment_s: int
) -> None:
    out, venv = tmp_path / "outputs", Path(sys.prefix)
    command = ["make", "reproduce-table1", f"VENV={venv}", f"OUT={out}"]
    command += ["--assume-old", str(venv / ".ready")]
    process = subprocess.Popen(
        command, cwd=REPO, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(moment_s)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = make(environment, out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed_table(out) == printed_table(undisturbed)


@pytest.mark.real
def test_the_job_on_real_photographs(
    environment: dict[str, str], shared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "outputs"
    done = make(environment, out, f"DATA={shared / 'data'}")
    assert done.returncode == 0, done.stderr[-2000:]
    text = printed_table(out)
    assert "SYNTHETIC" not in text
    assert "measured on 65 of 299 pairs" in text
    assert "Not measured: SPair-71k" in text
    cells = pd.read_csv(out / "table1" / "table1.csv")
    willow = cells[(cells["dataset"] == "pfwillow") & (cells["protocol"] == "canonical@1")]
    at = {a: willow[willow["alpha"] == a].set_index("method")["pck"] * 100 for a in (0.05, 0.1)}
    assert at[0.1]["HPF, ResNet-18 (4,6)"] == pytest.approx(56.5, abs=0.5)
    assert at[0.05]["HPF, ResNet-18 (4,6)"] == pytest.approx(30.0, abs=0.5)
    assert 40 < at[0.1]["nearest, ResNet-18 layer3.1"] < 50
    assert at[0.1]["copy (floor)"] == pytest.approx(27.0, abs=0.1)


def test_setup_a_second_time_does_nothing() -> None:
    venv = Path(sys.prefix)
    command = ["make", "setup", f"VENV={venv}", "--assume-old", str(venv / ".ready")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert "pip" not in done.stdout
