"""Prediction: MMEngine's runner drives a registered loop over chunks of pairs into the store."""

from __future__ import annotations

import inspect
import itertools
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import barrier
from mmengine.registry import FUNCTIONS, LOOPS
from mmengine.runner import BaseLoop, Runner
from tqdm import tqdm

from experiments.configurations import fill_weights
from experiments.feature_cache import FeatureCache, visiting_order
from experiments.provenance import code_fingerprint, code_state, library_versions
from experiments.ranks import (
    RankRunner,
    all_alike,
    broken_connections,
    first_goes_first,
    from_first,
    held_for_all,
    is_first,
    join,
    share,
)
from experiments.store import Cell, cell_key, check_row, slot_folder
from nemf.claims import Claim
from nemf.datasets import dataset_class
from nemf.datasets.index import PairDataset
from nemf.errors import NemfError, did_you_mean
from nemf.matcher import Matcher
from nemf.pairs import Matches, OrientedPair, Pair, Plan
from nemf.predictions import (
    Predictions,
    dataset_folder,
    dataset_meta,
    prediction_table,
    warn_of_strange_answers,
)
from nemf.registry import matcher_class

log = logging.getLogger(__name__)
_runs = itertools.count()  # MMEngine wants a name per Runner of a process


def predict_pairs(
    matcher: Matcher, cache: FeatureCache, pairs: Sequence[OrientedPair], batch: int
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Answers (float32 (N, 2) px, confidence (N,) or None) for the pairs, ``batch`` at a time.
    Pairs that share images are taken one after the other, unless the matcher couples its pairs."""
    order = list(range(len(pairs))) if matcher.couples_pairs else visiting_order(pairs)
    cache.expect(pairs[i] for i in order)
    answers: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    for start in range(0, len(pairs), batch):
        part = [pairs[i] for i in order[start : start + batch]]
        queries = [cache.get(oriented, "query") for oriented in part]
        references = [cache.get(oriented, "reference") for oriented in part]
        points = [torch.from_numpy(o.query_kps.copy()).to(matcher.device) for o in part]
        matches = matcher.match(queries, references, points)
        if not isinstance(matches, Sequence) or len(matches) != len(part):
            count = len(matches) if isinstance(matches, Sequence) else type(matches).__name__
            raise NemfError(
                f"matcher {matcher.card.name}: match must return a list of one Matches for each of "
                f"{len(part)} pairs, not {count}"
            )
        for i, oriented, match in zip(order[start : start + batch], part, matches, strict=True):
            answers[i] = _checked_answer(match, oriented, matcher.card.name)
    return [answers[i] for i in range(len(pairs))]


def _checked_answer(
    match: Any, oriented: OrientedPair, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """A matcher's answer as arrays; NemfError for what is none to the pair's queries."""
    n, at = len(oriented.query_kps), f"matcher {name}, pair {oriented.pair.id}"
    if not isinstance(match, Matches):
        raise NemfError(f"{at}: answered {type(match).__name__}, not nemf.pairs.Matches")
    for part, wanted in (("points", (n, 2)), ("confidence", (n,))):
        value = getattr(match, part)
        if value is None and part == "confidence":
            continue
        if not isinstance(value, torch.Tensor):
            raise NemfError(f"{at}: {part} is a {type(value).__name__}, not a tensor")
        if tuple(value.shape) != wanted:
            kind = "one (x, y) in px" if part == "points" else "one number"
            raise NemfError(
                f"{at}: {part} has shape {tuple(value.shape)}, not {wanted}: {kind} for each query"
            )
    xy = match.points.detach().cpu().float().numpy()
    if np.isinf(xy).any():
        raise NemfError(f"{at}: points has infinite values; NaN is 'no answer'")
    confidence = match.confidence
    return xy, None if confidence is None else confidence.detach().cpu().float().numpy()


@FUNCTIONS.register_module()
def list_pairs(pairs: list[Pair]) -> list[Pair]:
    """Collate function: a chunk is the list of its pairs (no pixels; images are read on demand)."""
    return pairs


@LOOPS.register_module()
class PredictLoop(BaseLoop):
    """Predicts every pair of the dataloader's dataset into the store; ``run`` returns the file.

    Each batch of the dataloader is one chunk of the store. The ranks of a job share the chunks;
    rank 0 claims the cell and joins the chunks. ``wait``: for a cell that another job holds.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: Any,
        evaluator: Any = None,
        *,
        out: str,
        label: str,
        plan: str,
        model: dict[str, Any],
        seed: int,
        batch: int,
        cache_mib: int,
        cache_on: str,
        progress: str | None,
        wait: bool,
    ) -> None:
        super().__init__(runner, dataloader)
        self.out, self.label, self.plan = Path(out), label, Plan.parse(plan)
        self.model, self.seed, self.batch, self.progress = dict(model), seed, batch, progress
        self.wait = wait
        self.budget_bytes, self.cache_on = cache_mib * 2**20, cache_on

    def run(self) -> Path:
        matcher: Matcher = self.runner.model.eval()
        dataset: PairDataset = self.dataloader.dataset
        plan = self.plan.for_layout(dataset.layout)
        facts = self._facts(matcher, dataset, plan)
        all_alike(facts)
        key = cell_key(facts)
        slot = slot_folder(self.out, self.label, dataset_folder(facts), str(plan))
        cell = Cell(slot, key)
        from_first(lambda: check_row(self.out, slot, self.label, matcher.card.name, facts))
        if not from_first(lambda: cell.complete):
            with held_for_all(cell.claim, self.wait) as claim:
                if not from_first(lambda: cell.complete):  # another job may have been faster
                    self._predict(cell, claim, facts, matcher, dataset, plan)
        if is_first():
            cell.tidy()
            cell.make_current()
        barrier()
        return cell.file

    def _predict(
        self,
        cell: Cell,
        claim: Claim | None,
        facts: dict[str, Any],
        matcher: Matcher,
        dataset: PairDataset,
        plan: Plan,
    ) -> None:
        folder = cell.folder if self.cache_on == "disk" else None
        cache = FeatureCache(matcher, dataset, self.budget_bytes, folder)
        began = time.perf_counter()
        mine = self._my_chunks(cell, matcher)
        sizes = [self.dataloader.batch_size] * len(self.dataloader)
        sizes[-1] += len(dataset) - sum(sizes)
        bar = tqdm(
            total=sum(sizes[chunk] for chunk in mine), desc=self.progress, unit="pair",
            mininterval=0.5, disable=self.progress is None, file=sys.stderr,
        )  # fmt: skip
        number = 0
        with bar, torch.no_grad():
            for chunk, pairs in enumerate(self.dataloader):
                if chunk in mine:
                    oriented = [pair.oriented(plan) for pair in pairs]
                    answers = predict_pairs(matcher, cache, oriented, self.batch)
                    rows = [
                        (number + i, pair, *answer)
                        for i, (pair, answer) in enumerate(zip(oriented, answers, strict=True))
                    ]
                    if claim is not None:
                        claim.check()
                    cell.commit(chunk, prediction_table(rows))
                    bar.update(len(pairs))
                number += len(pairs)
        log.info(
            "encoded %d images for %d requests; %.1f %% of the time went into waiting for pictures",
            cache.encoded, cache.asked, 100 * cache.waited_s / (time.perf_counter() - began),
        )  # fmt: skip
        barrier()
        if is_first():
            self._join(cell, claim, facts, matcher, dataset, plan)
        barrier()

    def _my_chunks(self, cell: Cell, matcher: Matcher) -> set[int]:
        """The chunks that this rank is to predict."""

        def missing() -> list[int]:
            if matcher.couples_pairs:  # its random stream runs through all: from the start or not
                cell.discard_chunks()
            return sorted(set(range(len(self.dataloader))) - cell.finished_chunks())

        chunks = from_first(missing)
        if matcher.couples_pairs:
            return set(chunks) if is_first() else set()
        return set(share(chunks))

    def _join(
        self,
        cell: Cell,
        claim: Claim,
        facts: dict[str, Any],
        matcher: Matcher,
        dataset: PairDataset,
        plan: Plan,
    ) -> None:
        meta = dataset_meta(dataset, plan) | {
            "key": cell.key,
            "matcher": {
                "name": matcher.card.name,
                "label": self.label,
                "card": matcher.card.as_dict(),
                "config": facts["matcher"],
                "weights_sha256": facts["weights"],
                "random_weights": matcher.random_weights,
                "flow_resolution": getattr(matcher, "flow_resolution", None),
            },
            "code": code_state(),
            "facts": facts,
        }
        claim.check()
        cell.write_json("cell.json", meta)
        cell.finish(len(self.dataloader), meta)
        columns = ("pred_x", "pred_y", "reference_width", "reference_height")
        warn_of_strange_answers(Predictions.read(cell.file, columns), matcher.card.name)

    def _facts(self, matcher: Matcher, dataset: PairDataset, plan: Plan) -> dict[str, Any]:
        """Everything that can change a prediction."""
        device = matcher.device.type
        module = type(matcher).__module__
        return {
            **dataset_meta(dataset, plan),  # the file repeats these, so a change needs a new file
            "matcher": {k: v for k, v in sorted(self.model.items()) if not k.endswith("weights")},
            "weights": matcher.weights_hash,
            "seed": self.seed,
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "threads": torch.get_num_threads(),
            "chunk": self.dataloader.batch_size,
            "batch": self.batch,
            "libraries": library_versions(),
            "code": code_fingerprint("experiments.prediction", module, type(dataset).__module__),
        }


def predict(
    config: Config,
    *,
    data: Path,
    out: Path,
    plan: Plan,
    progress: str | None = None,
    wait: bool = False,
) -> Path:
    """Runs one cell through MMEngine and returns its prediction file (cached if nothing changed).
    Started by torchrun or SLURM, all processes of the job share the work.

    Raises NemfError for anything the user can act on: dataset, weights, config, output folder; Busy
    if another job predicts this cell, unless it is to ``wait`` for that.
    """
    _check(config)
    fill_weights(config, out)
    model, dataset = dict(config.model), dict(config.dataset)
    dataset_class(dataset["type"])
    matcher_class(model["type"])  # registers it, or says which matchers there are
    settings = config.predict
    launcher = join()
    try:
        runner = _runner(
            launcher=launcher,
            model=model | {"type": f"nemf.{model['type']}"},
            work_dir=str(out / "logs"),
            randomness={"seed": config.seed},
            test_dataloader={
                "dataset": dataset | {"type": f"nemf.{dataset['type']}", "root": str(data)},
                "batch_size": settings.chunk,
                "num_workers": 0,
                "sampler": {"type": "WholeOrder"},
                "collate_fn": {"type": "list_pairs"},
            },
            test_cfg={
                "type": "PredictLoop",
                "out": str(out),
                "label": config.label,
                "plan": str(plan),
                "model": model,
                "seed": config.seed,
                "batch": config.batch,
                "cache_mib": settings.cache_mib,
                "cache_on": settings.get("cache_on", "memory"),
                "progress": progress,
                "wait": wait,
            },
        )
        with broken_connections():
            with first_goes_first():
                _ = runner.test_loop  # opens the dataset: rank 0 makes its index
            return runner.test()
    except TypeError as problem:
        found = re.search(r"(\w+)\.__init__\(\) got an unexpected .* '(\w+)'", str(problem))
        if found is None:
            raise
        raise NemfError(_unknown_keyword(config, *found.groups())) from None


def _unknown_keyword(config: Config, constructor: str, keyword: str) -> str:
    """What is wrong with a config that gives ``constructor`` a keyword that it does not have."""
    for part, find in (("model", matcher_class), ("dataset", dataset_class)):
        cls = find(config[part].type)
        if cls.__name__ == constructor:
            known = list(inspect.signature(cls).parameters)
            return (
                f"config {config.label!r}: {part} has the unknown keyword {keyword!r}"
                f"{did_you_mean(keyword, known)}; {config[part].type} takes {', '.join(known)}"
            )
    return f"config {config.label!r}: {constructor} has no keyword {keyword!r}"


def _check(config: Config) -> None:
    """NemfError for entries of the wrong kind."""
    for part in ("model", "dataset"):
        entry = config.get(part)
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise NemfError(f"config: {part} must be a dict with a type, not {entry!r}")
    settings = config.get("predict") or {}
    for name, value, least in (
        ("seed", config.get("seed"), 0),
        ("batch", config.get("batch"), 1),
        ("predict.chunk", settings.get("chunk"), 1),
        ("predict.cache_mib", settings.get("cache_mib"), 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise NemfError(f"config: {name} must be an integer of at least {least}, not {value!r}")
    place = settings.get("cache_on", "memory")
    if place not in ("memory", "disk"):
        raise NemfError(f"config: predict.cache_on must be memory or disk, not {place!r}")


def _runner(**arguments: Any) -> Runner:
    """A Runner that only tests: no hooks that log, save or visualise."""
    off = ("timer", "logger", "param_scheduler", "checkpoint")
    try:
        return RankRunner(
            test_evaluator=[],
            default_hooks=dict.fromkeys(off),
            log_level="WARNING",
            default_scope="mmengine",
            experiment_name=f"predict-{next(_runs)}",
            **arguments,
        )
    except OSError as problem:
        where = problem.filename or arguments["work_dir"]
        raise NemfError(
            f"{where}: cannot be written ({problem.strerror}); choose another OUT="
        ) from None
