"""Jobs of several ranks for the tests: ``python -m tests.rank_jobs FILE`` with a JSON list of jobs.

Each job is {"ranks", "launcher", "call": "predict" | "train", "arguments", "slow_s", "threads"};
its ranks are forked from here, so that torch is imported and the sources are read once. A line of
JSON per job says the ranks' process numbers when they start, another one the exit status of each.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from experiments import prediction
from experiments.configurations import load_config
from experiments.provenance import code_fingerprint, code_state
from experiments.training import train
from nemf.errors import NemfError
from nemf.pairs import Plan


def main(file: Path) -> None:
    torch.set_num_threads(1)
    code_state()  # kept: what is edited meanwhile does not count
    for module in ("baselines.nearest", "baselines.copy"):
        readers = ("nemf.datasets.pfwillow", "nemf.datasets.spair")
        for reader in readers:
            code_fingerprint("experiments.prediction", module, reader)
    for job in json.loads(file.read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [start(job, rank, port) for rank in range(job["ranks"])]
        print(json.dumps(children), flush=True)
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(ended), flush=True)


def start(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    os.dup2(2, 1)  # MMEngine's notes do not belong between the lines for the caller
    try:
        os.environ |= environment(job, rank, port)
        status = run(job)
    finally:
        sys.stderr.flush()
        os._exit(status)


def environment(job: dict[str, Any], rank: int, port: int) -> dict[str, str]:
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job["launcher"] == "none":
        return {}
    if job["launcher"] == "slurm":
        names = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
        there |= dict.fromkeys(names, str(job["ranks"]))
        there |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODELIST": "here"}
    else:
        there |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["ranks"])}
    return there


def run(job: dict[str, Any]) -> int:
    arguments = job["arguments"]
    data, out = Path(arguments["data"]), Path(arguments["out"])
    if "slow_s" in job:
        real = prediction.predict_pairs

        def slow(*given: Any) -> Any:
            time.sleep(job["slow_s"])
            return real(*given)

        prediction.predict_pairs = slow
    try:
        if job["call"] == "predict":
            config = load_config(arguments["config"], arguments["options"])
            if "threads" in job:
                torch.set_num_threads(job["threads"][int(os.environ["RANK"])])
            prediction.predict(config, data=data, out=out, plan=Plan("src2trg"))
        else:
            train(arguments["config"], out, arguments["options"], data)
    except NemfError as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
