"""Prediction: MMEngine's runner drives a registered loop over chunks of pairs into the store."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import FUNCTIONS, LOOPS
from mmengine.runner import BaseLoop, Runner
from tqdm import tqdm

from experiments.configurations import fill_weights
from experiments.provenance import code_fingerprint, code_state, library_versions
from experiments.store import Cell, cell_key, slot_folder
from nemf.datasets import dataset_class
from nemf.datasets.index import PairDataset
from nemf.errors import NemfError
from nemf.matcher import Features, Matcher, Role
from nemf.pairs import Image, OrientedPair, Pair, Plan
from nemf.predictions import dataset_folder, dataset_meta, prediction_table
from nemf.registry import matcher_class

log = logging.getLogger(__name__)
_runs = itertools.count()  # MMEngine wants a name per Runner of a process


class FeatureCache:
    """Encodes each image once: a least-recently-used cache of features under a byte budget."""

    def __init__(self, matcher: Matcher, dataset: PairDataset, budget_bytes: int) -> None:
        self.matcher, self.dataset, self.budget_bytes = matcher, dataset, budget_bytes
        self.encoded = self.asked = 0
        self._held: OrderedDict[tuple, tuple[Features, int]] = OrderedDict()
        self._bytes = 0

    def get(self, oriented: OrientedPair, role: Role) -> Features:
        """Features of the pair's query or reference image on its canvas."""
        record = oriented.query if role == "query" else oriented.reference
        canvas = oriented.canvases[0 if role == "query" else 1]
        category = oriented.pair.category if self.matcher.card.oracle_class else None
        key = (record.hash, canvas, category, role if self.matcher.uses_role else None)
        self.asked += 1
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        image = Image(self.dataset.pixels(record), record.hash, canvas, category)
        (features,) = self.matcher.encode([image], role)
        self.encoded += 1
        self._keep(key, features)
        return features

    def _keep(self, key: tuple, features: Features) -> None:
        size = n_bytes(features)
        self._held[key] = (features, size)
        self._bytes += size
        while self._bytes > self.budget_bytes and self._held:
            _, (_, dropped) = self._held.popitem(last=False)
            self._bytes -= dropped


def n_bytes(features: Features) -> int:
    """Bytes of every tensor and array held in (nested) features."""
    if isinstance(features, torch.Tensor | np.ndarray):
        return int(features.nbytes)
    if isinstance(features, dict):
        return sum(n_bytes(value) for value in features.values())
    if isinstance(features, list | tuple):
        return sum(n_bytes(value) for value in features)
    if dataclasses.is_dataclass(features):
        return sum(n_bytes(getattr(features, f.name)) for f in dataclasses.fields(features))
    return 0


def predict_pairs(
    matcher: Matcher, cache: FeatureCache, pairs: Sequence[OrientedPair], batch: int
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Answers (float32 (N, 2) px, confidence (N,) or None) for the pairs, ``batch`` at a time."""
    answers = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        queries = [cache.get(oriented, "query") for oriented in part]
        references = [cache.get(oriented, "reference") for oriented in part]
        points = [torch.from_numpy(o.query_kps.copy()).to(matcher.device) for o in part]
        matches = matcher.match(queries, references, points)
        for oriented, match in zip(part, matches, strict=True):
            xy = match.points.detach().cpu().numpy().astype(np.float32)
            if xy.shape != oriented.query_kps.shape or np.isinf(xy).any():
                raise NemfError(
                    f"matcher {matcher.card.name} answered {xy.shape} (infinite values: "
                    f"{bool(np.isinf(xy).any())}) to {len(oriented.query_kps)} queries of pair "
                    f"{oriented.pair.id}"
                )
            confidence = match.confidence
            answers.append((xy, None if confidence is None else confidence.detach().cpu().numpy()))
    return answers


@FUNCTIONS.register_module()
def list_pairs(pairs: list[Pair]) -> list[Pair]:
    """Collate function: a chunk is the list of its pairs (no pixels; images are read on demand)."""
    return pairs


@LOOPS.register_module()
class PredictLoop(BaseLoop):
    """Predicts every pair of the dataloader's dataset into the store; ``run`` returns the file.

    Each batch of the dataloader is one chunk of the store.
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
        progress: str | None,
    ) -> None:
        super().__init__(runner, dataloader)
        self.out, self.label, self.plan = Path(out), label, Plan.parse(plan)
        self.model, self.seed, self.batch, self.progress = dict(model), seed, batch, progress
        self.budget_bytes = cache_mib * 2**20

    def run(self) -> Path:
        matcher: Matcher = self.runner.model.eval()
        dataset: PairDataset = self.dataloader.dataset
        plan = self.plan.for_layout(dataset.layout)
        facts = self._facts(matcher, dataset, plan)
        key = cell_key(facts)
        slot = slot_folder(self.out, self.label, dataset_folder(facts), str(plan))
        cell = Cell(slot, key)
        if not cell.complete:
            with cell.claim():
                if not cell.complete:  # another process may have been faster
                    self._predict(cell, facts, matcher, dataset, plan)
        cell.make_current()
        return cell.file

    def _predict(
        self, cell: Cell, facts: dict[str, Any], matcher: Matcher, dataset: PairDataset, plan: Plan
    ) -> None:
        cache = FeatureCache(matcher, dataset, self.budget_bytes)
        if matcher.couples_pairs:  # its random stream runs through all pairs: from the start or not
            cell.discard_chunks()
        done = cell.finished_chunks()
        bar = tqdm(
            total=len(dataset), desc=self.progress, unit="pair", mininterval=0.5,
            disable=self.progress is None, file=sys.stderr,
        )  # fmt: skip
        number = 0
        with bar, torch.no_grad():
            for chunk, pairs in enumerate(self.dataloader):
                if chunk not in done:
                    oriented = [pair.oriented(plan) for pair in pairs]
                    answers = predict_pairs(matcher, cache, oriented, self.batch)
                    rows = [
                        (number + i, pair, *answer)
                        for i, (pair, answer) in enumerate(zip(oriented, answers, strict=True))
                    ]
                    cell.commit(chunk, prediction_table(rows))
                number += len(pairs)
                bar.update(len(pairs))
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
        log.info("encoded %d images for %d requests", cache.encoded, cache.asked)
        cell.write_json("cell.json", meta)
        cell.finish(len(self.dataloader), meta)

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
) -> Path:
    """Runs one cell through MMEngine and returns its prediction file (cached if nothing changed).

    Raises NemfError for anything the user can act on: dataset, weights, config, output folder.
    """
    _check(config)
    fill_weights(config, out)
    model, dataset = dict(config.model), dict(config.dataset)
    dataset_class(dataset["type"])
    matcher_class(model["type"])  # registers it, or says which matchers there are
    settings = config.predict
    try:
        runner = _runner(
            model=model | {"type": f"nemf.{model['type']}"},
            work_dir=str(out / "logs"),
            randomness={"seed": config.seed},
            test_dataloader={
                "dataset": dataset | {"type": f"nemf.{dataset['type']}", "root": str(data)},
                "batch_size": settings.chunk,
                "num_workers": 0,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
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
                "progress": progress,
            },
        )
        return runner.test()
    except TypeError as problem:
        if "__init__() got an unexpected keyword argument" in str(problem):
            raise NemfError(f"config: {problem}") from None
        raise


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


def _runner(**arguments: Any) -> Runner:
    """A Runner that only tests: no hooks that log, save or visualise."""
    off = ("timer", "logger", "param_scheduler", "checkpoint")
    try:
        return Runner(
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
