"""Training through MMEngine's runner: ``nemf train CONFIG``."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, get_world_size
from mmengine.runner import Runner
from torch import nn

import experiments.classification
import experiments.training_hooks  # noqa: F401  (all three register what configs name)
from experiments.configurations import trained_file, training_config
from experiments.matcher_training import computes_in_bfloat16
from experiments.own_checkpoints import newest_checkpoint, read_own_checkpoint
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
)
from nemf.claims import Claim, claimed
from nemf.errors import NemfError
from nemf.files import write_text, write_whole
from nemf.matcher import build_matcher
from nemf.processes import sweep_folder
from nemf.reading import read_json
from reports.training_figure import draw_curves

log = logging.getLogger(__name__)

_NOT_IN_KEY = ("train_cfg", "work_dir", "resume", "default_hooks", "experiment_name", "label")


def train(
    name: str,
    out: Path,
    options: dict[str, Any],
    data: Path | None = None,
    *,
    wait: bool = False,
) -> Path:
    """Trains what a config describes and returns the file of the trained weights.

    ``name``: one of ``configs/training`` or a path. The weights are those of the best validation
    if the config's checkpoint hook has a ``save_best``, else the last; the config's ``export``
    names the part of the model whose state dict is written, to
    ``<out>/training/<name>/<name>.pth``. Beside it, ``<name>.json`` says how it was trained.

    A run that was stopped goes on from its last epoch, if neither the config (but for its length)
    nor the training pairs nor the code changed; a finished one is not repeated. NemfError for a
    config that cannot be read, for datasets that are not there, for a loss that is not finite; Busy
    if another job trains this, unless it is to ``wait`` for that.

    Started by torchrun or SLURM, all processes share each batch: ``batch_size`` is that of all of
    them together, and the result that of one process within the rounding of sums.
    """
    launcher = join()
    config = training_config(name, options)
    name = Path(name).stem
    _locate(config, data)
    file = trained_file(name, out)
    with broken_connections():
        with first_goes_first():  # makes the index of the dataset
            facts = _facts(config)
        all_alike(facts)
        folder = file.parent / facts["key"]
        with held_for_all(partial(_claim, folder), wait):
            epochs = config.train_cfg.max_epochs
            if from_first(lambda: _finished(file, facts["key"], epochs)):
                log.info("%s is trained already", file)
                return file
            if get_world_size() > 1:
                _share_batches(config)
            config.launcher = launcher
            config.work_dir = str(folder)
            config.experiment_name = f"{name}-{facts['key']}-{time.monotonic_ns()}"
            config.setdefault("default_scope", "mmengine")
            began = time.monotonic()
            _make_resumable(config, folder)
            runner = RankRunner.from_cfg(config)
            runner.train()
            if is_first():
                part, best = _trained_part(runner, config.export)
                seconds = round(time.monotonic() - began)
                told = facts | {"name": name, "epochs": epochs, "validation": best}
                _write_result(part, file, folder, told | {"seconds_of_last_start": seconds})
            barrier()
    return file


def _claim(folder: Path, timeout_s: float) -> AbstractContextManager[Claim]:
    busy = "another process trains here; wait for it or choose another OUT="
    return claimed(folder, ".lock", busy, timeout_s=timeout_s)


def _share_batches(config: Config) -> None:
    """Gives each rank its part of every batch that one process would take."""
    loader = config.train_dataloader
    if config.model.type != "MatcherTraining" or loader.sampler.type != "DefaultSampler":
        raise NemfError(
            f"{config.model.type} with {loader.sampler.type} trains in one process only (its batch "
            "statistics tie the samples of a batch together): start it without a launcher"
        )
    loader.sampler.type = "WholeOrder"
    loader.batch_sampler = {"type": "ShareOfBatch", "drop_last": loader.pop("drop_last", False)}
    loader.collate_fn = {"type": "collate_share"}


def _make_resumable(config: Config, folder: Path) -> None:
    """A run that is killed at any moment goes on as if nothing had been."""
    sweep_folder(folder)  # MMEngine writes a checkpoint twice; the second time may not come again
    newest = newest_checkpoint(folder)
    config.resume = bool(config.get("resume")) and newest is not None
    if config.resume:
        config.load_from = str(newest)
    checkpoint = config.get("default_hooks", {}).get("checkpoint")
    if checkpoint and checkpoint.get("max_keep_ckpts") == 1:
        checkpoint.max_keep_ckpts = 2  # MMEngine removes the old one before it writes the new one
    config.custom_hooks = [*config.get("custom_hooks", []), {"type": "ValidateResumed"}]


def _write_result(part: nn.Module, file: Path, folder: Path, told: dict[str, Any]) -> None:
    """Writes the trained weights and, beside them, how they were trained."""
    state = part.state_dict()
    if told["settings"].get("export_half"):  # half the bytes; readers make it float32 again
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        part.load_state_dict(state)  # so that its hash is the one of what is read back
    save_state(state, file)
    story = told | {
        "code": code_state(),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        # of a matcher: as predictions with these weights name them
        "weights_hash": getattr(part, "weights_hash", None),
    }
    curve = folder / "curve.json"
    story["curve"] = read_json(curve) if curve.exists() else []
    if story["curve"]:
        draw_curves({"": story["curve"]}, file.with_suffix(".png"))
    write_text(file.with_suffix(".json"), json.dumps(story, indent=1, default=str) + "\n")


def _locate(config: Config, data: Path | None) -> None:
    """Tells every dataset of the config where the data lie."""
    for part in ("train_dataloader", "val_dataloader"):
        dataset = (config.get(part) or {}).get("dataset")
        if dataset is None or not (
            dataset.type == "TrainingPairs" or dataset.type.startswith("nemf.")
        ):
            continue
        if data is None:
            raise NemfError("this config trains on a dataset: give its root with DATA= or --data")
        dataset.root = str(data)


def _facts(config: Config) -> dict[str, Any]:
    """What decides the trained weights, and a ``key`` of it."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_IN_KEY}
    modules = ["experiments.training"]
    facts: dict[str, Any] = {
        "settings": _without_places(settings),
        "libraries": library_versions(),
        "threads": torch.get_num_threads(),
        "bfloat16": computes_in_bfloat16("cuda" if torch.cuda.is_available() else "cpu"),
        "datasets": {},
    }
    if "matcher" in config.model:
        keywords = dict(config.model.matcher)
        matcher = build_matcher(keywords.pop("type"), **keywords)
        modules.append(type(matcher).__module__)
        facts["initial_weights"] = matcher.weights_hash
    facts["code_fingerprint"] = code_fingerprint(*modules)
    for part in ("train_dataloader", "val_dataloader"):
        dataset = dict((config.get(part) or {}).get("dataset", {}))
        if "root" in dataset:
            facts["datasets"][part] = _fingerprint(dataset)
    text = json.dumps(facts, sort_keys=True, default=str)
    return facts | {"key": hashlib.sha256(text.encode()).hexdigest()[:12]}


def _without_places(value: Any) -> Any:
    """Settings without the paths of data and weights: their content is told apart by hashes."""
    if isinstance(value, dict):
        return {
            k: _without_places(v)
            for k, v in value.items()
            if k not in ("root", "weights", "backbone_weights")
        }
    return value


def _fingerprint(dataset: dict[str, Any]) -> dict[str, Any]:
    from experiments.jobs import open_dataset

    keywords = dict(dataset.get("dataset", dataset))
    kind = keywords.pop("type").removeprefix("nemf.")
    keywords.pop("root", None)
    opened = open_dataset(kind, dataset["root"], keywords.pop("split", "trn"), **keywords)
    return {
        "dataset": opened.name,
        "split": opened.split,
        "pairs": len(opened),
        "fingerprint": opened.fingerprint,
        "synthetic": opened.synthetic,
    }


def _finished(file: Path, key: str, epochs: int) -> bool:
    """Whether ``file`` holds what this training gives."""
    story = file.with_suffix(".json")
    if not file.exists() or not story.exists():
        return False
    told = read_json(story, "a training's story")
    same = told.get("key") == key and told.get("epochs") == epochs
    return same and hashlib.sha256(file.read_bytes()).hexdigest() == told.get("sha256")


def _trained_part(runner: Runner, export: str) -> tuple[nn.Module, dict[str, Any]]:
    """The part of the model to export, with the weights of the best validation if there was one,
    and which validation that is. NemfError if there is no such part."""
    chosen = {}
    best = runner.message_hub.runtime_info.get("best_ckpt")
    if best is not None:
        content = read_own_checkpoint(best)
        runner.model.load_state_dict(content["state_dict"])
        chosen = {
            "epoch": content["meta"]["epoch"],
            "score": runner.message_hub.get_info("best_score"),
        }
    try:
        return runner.model.get_submodule(export), chosen
    except AttributeError:
        raise NemfError(f"export={export!r} is no part of the model") from None


def save_state(state: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a state dict (CPU tensors, loadable with weights_only), whole or not at all."""
    buffer = io.BytesIO()
    torch.save({key: value.detach().cpu().clone() for key, value in state.items()}, buffer)
    write_whole(file, lambda temporary: temporary.write_bytes(buffer.getvalue()))
