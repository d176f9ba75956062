"""A miniature of the whole job for the tests of faults: data, index, training, prediction, scoring,
table, MLflow.

``python -m tests.fault_job`` imports everything once and then, for every line of JSON {"out",
"parts", "kill_after_s"} on standard input, runs the job in a forked child, kills that with all its
children by SIGKILL after that time (null: never), and prints {"status", "seconds"}.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import mlflow  # noqa: F401  (this and others: imported once here, not in every child)
import torch

import baselines.cats
import baselines.copy
import baselines.nearest  # noqa: F401
from experiments.jobs import predict_table, rescorer, score_table, table_spec
from experiments.prediction import predict  # noqa: F401
from experiments.provenance import code_fingerprint, code_state, library_versions
from experiments.training import train
from nemf.cards import available_matchers
from nemf.datasets import pfwillow, spair  # noqa: F401
from nemf.datasets.synthetic import make_synthetic
from nemf.errors import NemfError
from reports import score_figures  # noqa: F401
from reports.records import current_records
from reports.tables import build_table
from reports.tracking import publish_cells, publish_table, publish_trainings

MATCHERS = ("copy", "nearest_small", "cats_small")
TRAINING = {
    "model.matcher.proj_dim": 32,
    "model.matcher.mlp_ratio": 1,
    "train_dataloader.batch_size": 2,
    "train_dataloader.dataset.pairs_per_epoch": 4,
    "val_cfg.pairs": 2,
    "train_cfg.max_epochs": 3,
    "train_cfg.val_interval": 1,
}
SPECIFICATION = """
name: small
kind: datasets
title: "A small table"
split: test
alphas: [0.05, 0.10]
averaging: image
columns: [spair, pfwillow]
extra_columns: []
published: null
protocols: [paper, canonical@1]
matchers: {real: [copy], synthetic: [copy, nearest_small, cats_small]}
oracle_grids: [16]
"""


def job(out: Path, parts: tuple[str, ...]) -> None:
    """Everything into ``out``; parts that were done are not done again."""
    os.environ["NEMF_CACHE"] = str(out / "cache")
    out.mkdir(parents=True, exist_ok=True)
    data, file = out / "synthetic", out / "small.yaml"
    file.write_text(SPECIFICATION)
    spec = table_spec(str(file))
    make_synthetic(data, preset="tiny")
    matchers = MATCHERS if "training" in parts else MATCHERS[:2]
    if "training" in parts:
        train("cats_small", out, TRAINING, data)
    predict_table(spec, data, out, matchers, {"predict.chunk": 2})
    score_table(spec, out)
    found = current_records(out)
    records = [record for _, record in found]
    table = build_table(
        spec, records, synthetic=True, missing=[], scores_of=rescorer(found, spec.alphas)
    )
    files = table.write(out / spec.name)
    if "mlflow" in parts:
        publish_table(out, table, [*files], publish_cells(out))
        publish_trainings(out)


def start(out: Path, parts: tuple[str, ...]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        os.dup2(2, 1)
        job(out, parts)
        status = 0
    except NemfError as problem:
        print(problem, file=sys.stderr)
        status = 2
    except BaseException:
        logging.exception("the job failed")
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    code_state()  # kept: what is edited meanwhile does not count
    library_versions()
    available_matchers()
    for module in ("copy", "nearest", "cats"):
        for reader in ("spair", "pfwillow"):
            code_fingerprint(
                "experiments.prediction", f"baselines.{module}", f"nemf.datasets.{reader}"
            )
    code_fingerprint("experiments.training", "baselines.cats")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        child = start(Path(order["out"]), tuple(order["parts"]))
        if order["kill_after_s"] is not None:
            timer = threading.Timer(order["kill_after_s"], kill, [child])
            timer.start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if order["kill_after_s"] is not None:
            timer.cancel()
        print(json.dumps({"status": status, "seconds": time.monotonic() - began}), flush=True)


def kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or has not begun
        os.kill(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
