"""Jobs of several processes: the same predictions byte for byte, the same training within rounding,
and what happens when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import ranks
from nemf.claims import Busy
from nemf.errors import NemfError
from nemf.predictions import Predictions
from tests.conftest import REPO

RANDOM = {"model.init": "random", "model.weights": None}
TRAINING = {
    "model.matcher.proj_dim": 32,
    "model.matcher.mlp_ratio": 1,
    "train_dataloader.batch_size": 3,
    "train_dataloader.dataset.pairs_per_epoch": 7,  # batches of 3, 3 and 1
    "val_cfg.pairs": 2,
    "train_cfg.max_epochs": 1,
    "train_cfg.val_interval": 1,
    "optim_wrapper.type": "OptimWrapper",  # no rounding to bfloat16
}


def start(jobs: list[dict[str, Any]], folder: Path) -> subprocess.Popen[str]:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.rank_jobs", str(file)],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[list[list[int]], str]:
    """Exit statuses of the ranks of each job, and what they wrote to standard error."""
    told, errors = process.communicate(timeout=600)
    return [json.loads(line) for line in told.splitlines()][1::2], errors


def job(call: str, config: str, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    options = more.pop("options", {})
    arguments = {"config": config, "data": str(data), "out": str(out), "options": options}
    launcher = "none" if more.get("ranks") == 1 else "pytorch"
    return {"call": call, "arguments": arguments, "ranks": 2, "launcher": launcher, **more}


def prediction_file(out: Path) -> Path:
    (file,) = out.rglob("predictions.parquet")
    return file


def test_predictions_of_several_ranks_are_those_of_one(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    """Three pairs in three and in two chunks: uneven parts, and a rank that has none."""
    data, jobs = tiny_pfwillow(), []
    cases = ((1, 1, "none"), (2, 1, "pytorch"), (1, 2, "none"), (3, 2, "pytorch"), (2, 2, "slurm"))
    for n, chunk, launcher in cases:
        out = tmp_path / f"{chunk}-{launcher}"
        more = {"ranks": n, "launcher": launcher, "options": {**RANDOM, "predict.chunk": chunk}}
        jobs.append(job("predict", "nearest_small/pfwillow", data, out, **more))
    statuses, errors = finish(start(jobs, tmp_path))
    assert statuses == [[0] * n for n, *_ in cases], errors
    for _, chunk, launcher in cases:
        alone = prediction_file(tmp_path / f"{chunk}-none")
        together = prediction_file(tmp_path / f"{chunk}-{launcher}")
        assert together.read_bytes() == alone.read_bytes()
        assert together.parent.name == alone.parent.name
        assert (together.parent.parent / "current").read_text().strip() == alone.parent.name
        assert not list(together.parent.glob("chunks/*"))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("cats_small", {}),
        pytest.param(
            "nemf_small",
            {
                "model.matcher.field_width": 32,
                "model.matcher.iterations": 1,
                "model.matcher.training": {"candidates": 6},
            },
            marks=pytest.mark.long,
        ),
        pytest.param("ncnet_small", {"pairs_per_epoch": 6}, marks=pytest.mark.long),
    ],
)
def test_a_training_of_several_ranks_is_that_of_one(
    name: str, more: dict[str, Any], tiny_spair: Callable[..., Path], tmp_path: Path
) -> None:
    data, options = tiny_spair(), TRAINING | more
    if name == "ncnet_small":  # pairs are compared with each other: across ranks too
        options = {k: v for k, v in options.items() if "model." not in k}
        options["train_dataloader.dataset.pairs_per_epoch"] = options.pop("pairs_per_epoch")
    numbers = (1, 2) if name == "cats_small" else (1, 2, 3)
    jobs = [job("train", name, data, tmp_path / str(n), options=options, ranks=n) for n in numbers]
    statuses, errors = finish(start(jobs, tmp_path))
    assert statuses == [[0] * n for n in numbers], errors
    files = {n: tmp_path / str(n) / "training" / name / f"{name}.pth" for n in numbers}
    states = {n: torch.load(file, weights_only=True) for n, file in files.items()}
    curves = {
        n: json.loads(file.with_suffix(".json").read_text())["curve"] for n, file in files.items()
    }
    for n in numbers[1:]:
        for key, value in states[n].items():
            torch.testing.assert_close(value, states[1][key], rtol=0, atol=5e-5, msg=key)
        for entry, one in zip(curves[n], curves[1], strict=True):
            assert entry == pytest.approx(one, rel=1e-4)


def test_what_one_process_must_do_is_refused_and_differences_are_named(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    data = tiny_pfwillow()
    shallow = {"train_dataloader.dataset.per_class": 1, "val_dataloader.dataset.per_class": 1}
    jobs = [
        job("train", "resnet_small", data, tmp_path / "a", options=shallow),
        job("predict", "copy/pfwillow", data, tmp_path / "b", threads=[1, 2]),
        job("predict", "copy/pfwillow", data / "nowhere", tmp_path / "c"),
    ]
    statuses, errors = finish(start(jobs, tmp_path))
    assert statuses == [[2, 2]] * 3
    assert "trains in one process only" in errors
    assert "differ in threads (threads: 1 and 2)" in errors
    assert errors.count("no PF-WILLOW here") == 2
    assert not list((tmp_path).rglob("predictions.parquet"))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_dies_ends_the_job_and_the_next_start_goes_on(
    victim: int, tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    data, out = tiny_pfwillow(), tmp_path / "out"
    more = {"options": {**RANDOM, "predict.chunk": 1}}
    jobs = [
        job("predict", "nearest_small/pfwillow", data, out, slow_s=1.0, **more),
        job("predict", "nearest_small/pfwillow", data, out, ranks=1, **more),
        job("predict", "nearest_small/pfwillow", data, tmp_path / "alone", ranks=1, **more),
    ]
    process = start(jobs, tmp_path)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    end = time.monotonic() + 300
    while not list(out.rglob("chunks/*.parquet")):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(pids[victim], signal.SIGKILL)
    statuses = json.loads(process.stdout.readline())
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] == 2
    _, errors = finish(process)
    assert "another process of this job ended" in errors
    assert prediction_file(out).read_bytes() == prediction_file(tmp_path / "alone").read_bytes()


def test_jobs_that_share_a_folder_leave_each_other_s_cells(tmp_path: Path) -> None:
    from experiments.jobs import spread

    held, calls = {"b"}, []

    def task(name: str) -> Callable[..., None]:
        def do(wait: bool) -> None:
            calls.append((name, wait))
            if name in held and not wait:
                raise Busy(name)

        return do

    spread([task("a"), task("b"), task("c")])
    assert calls == [("a", False), ("b", False), ("c", False), ("b", True)]


@pytest.mark.long
def test_several_jobs_in_one_folder_do_no_cell_twice(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    """Three commands at once make a table's cells: each is encoded by one of them."""
    data, out = tiny_pfwillow(), tmp_path / "out"
    spec = tmp_path / "small.yaml"
    text = (REPO / "experiments" / "tables" / "table1.yaml").read_text()
    spec.write_text(text.replace("name: table1", "name: small"))
    command = [
        *(sys.executable, "-m", "experiments.cli", "predict", "--table", str(spec)),
        *("--matchers", "copy nearest_small hpf_small", "--data", str(data), "--out", str(out)),
    ]
    jobs = [
        subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    errors = [process.communicate(timeout=600)[1] for process in jobs]
    assert [process.returncode for process in jobs] == [0] * 3, errors
    files = list(out.rglob("predictions.parquet"))
    assert files
    for file in files:
        Predictions.read(file)
    assert sum(text.count("encoded") for text in errors) == len(files)


@pytest.mark.long
def test_torchrun_and_one_process_give_the_same_bytes_through_the_command_line(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    verb = ["-m", "experiments.cli", "predict", "nearest_small/pfwillow"]
    rest = ["--data", str(tiny_pfwillow()), "--cfg-options", "predict.chunk=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed = []
    for name, first in (("one", [sys.executable]), ("two", launch)):
        command = [*first, *verb, *rest, "--out", str(tmp_path / name)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
        printed.append(done.stdout.splitlines())
    assert [len(lines) for lines in printed] == [1, 1]  # rank 0 alone says where the file is
    one, two = (Path(lines[0]) for lines in printed)
    assert one.read_bytes() == two.read_bytes()


# -- parts ----------------------------------------------------------------------------------------


def test_launchers_are_known_by_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ranks._TORCHRUN, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    assert ranks.launcher() == "none"
    monkeypatch.setenv("WORLD_SIZE", "2")  # some clusters set it by themselves
    assert ranks.launcher() == "none"
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # a batch script is one process
    assert ranks.launcher() == "none"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert ranks.launcher() == "slurm"
    for name in ranks._TORCHRUN:  # torchrun within a step
        monkeypatch.setenv(name, "1")
    assert ranks.launcher() == "pytorch"


@pytest.mark.parametrize(("count", "world"), [(7, 3), (2, 3), (0, 2), (6, 2), (1, 1)])
def test_shares_cover_everything_once_in_order(
    count: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []
    monkeypatch.setattr(ranks, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(ranks, "get_rank", lambda r=rank: r)
        parts.append(ranks.share(range(count)))
    assert [item for part in parts for item in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_the_whole_order_is_that_of_one_process() -> None:
    from mmengine.dataset import DefaultSampler

    mine, theirs = (
        kind(range(11), shuffle=True, seed=5) for kind in (ranks.WholeOrder, DefaultSampler)
    )
    for epoch in (0, 3):
        mine.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(mine) == list(theirs)
    with pytest.raises(NemfError, match="needs a seed"):
        ranks.WholeOrder(range(3), shuffle=True)
