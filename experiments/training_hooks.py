"""What happens around a training's epochs: seeds follow, the curve is kept, progress is shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from tqdm import tqdm

from nemf import progress
from nemf.files import write_text
from nemf.reading import read_json


@HOOKS.register_module()
class TellEpoch(Hook):
    """Tells the training dataset the epoch, and every part of the model that keeps an ``epoch``: a
    resumed run draws and weighs what an unbroken one would."""

    def before_train_epoch(self, runner: Runner) -> None:
        runner.train_dataloader.dataset.epoch = runner.epoch
        for module in runner.model.modules():
            if hasattr(module, "epoch"):
                module.epoch = runner.epoch


@HOOKS.register_module()
class RecordCurve(Hook):
    """Keeps the training's curve in ``curve.json`` of the work folder: per epoch its number, every
    loss as a mean over the epoch, the learning rate, and the validation's metrics."""

    priority = "LOW"  # after the runtime information is complete

    def before_train(self, runner: Runner) -> None:
        self.file = Path(runner.work_dir) / "curve.json"
        known = read_json(self.file) if self.file.exists() else []
        self.curve = [entry for entry in known if entry["epoch"] <= runner.epoch]

    def after_train_epoch(self, runner: Runner) -> None:
        scalars = runner.message_hub.log_scalars
        losses = {
            name.removeprefix("train/"): float(history.mean(len(runner.train_dataloader)))
            for name, history in scalars.items()
            if name.startswith("train/loss")
        }
        lr = float(scalars["train/lr"].current())
        self.curve.append({"epoch": runner.epoch + 1, **losses, "lr": lr})
        self._write()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if metrics and getattr(self, "curve", None):
            self.curve[-1].update(metrics)
            self._write()

    @master_only
    def _write(self) -> None:
        write_text(self.file, json.dumps(self.curve, indent=1) + "\n")


@HOOKS.register_module()
class ValidateResumed(Hook):
    """Validates the epoch that a run goes on from: the run before it may have been killed before
    it did, and what a validation found that was not the best is in no checkpoint."""

    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        epoch = runner.epoch
        if not epoch or runner.val_loop is None or epoch < runner.val_begin:
            return
        if epoch % runner.val_interval == 0 or epoch == runner.max_epochs:
            runner.val_loop.run()


@HOOKS.register_module()
class ShowProgress(Hook):
    """A bar over the training's iterations on standard error, with the loss and the time left, and
    a line per validation."""

    priority = "VERY_LOW"

    def before_train(self, runner: Runner) -> None:
        name = Path(runner.work_dir).parent.name
        done = runner.epoch * len(runner.train_dataloader)
        # A bar has no place in a log; lines have.
        self.bar = tqdm(
            total=runner.max_iters, initial=done, desc=f"training {name}", unit="step",
            mininterval=1, disable=not progress.shown(),
        )  # fmt: skip

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.bar.update()
        self.bar.set_postfix(loss=f"{float(outputs['loss']):.2f}", refresh=False)

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        told = ", ".join(f"{name} {value:.3f}" for name, value in (metrics or {}).items())
        where = f"{Path(runner.work_dir).parent.name}: epoch {runner.epoch} of {runner.max_epochs}"
        tqdm.write(f"{where}: {told}", file=sys.stderr)

    def after_train(self, runner: Runner) -> None:
        self.bar.close()
