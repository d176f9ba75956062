"""Training through MMEngine's runner: ``nemf train CONFIG``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

import experiments.classification  # noqa: F401  (registers its dataset, model and metric)
from experiments.configurations import load_config
from nemf.errors import NemfError
from nemf.files import write_whole

# What MMEngine puts into a checkpoint of its own beside tensors; all of it is plain data.
_OWN_CHECKPOINTS = [
    HistoryBuffer,
    getattr,
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")),
]


def train(config_file: Path, out: Path, options: dict[str, Any]) -> Path:
    """Trains what a config file describes and returns the file of the trained weights.

    A run that was stopped goes on from its last epoch. The config's ``export`` names the part of
    the model whose state dict is written to ``<out>/training/<name>/<name>.pth``. NemfError for a
    config that cannot be read.
    """
    config = load_config(str(config_file), options)
    name = config_file.stem
    config.work_dir = str(out / "training" / name)
    config.setdefault("default_scope", "mmengine")
    with torch.serialization.safe_globals(_OWN_CHECKPOINTS):
        runner = Runner.from_cfg(config)
        runner.train()
    try:
        part = runner.model.get_submodule(config.export)
    except AttributeError:
        raise NemfError(
            f"{config_file}: export={config.export!r} is no part of the model"
        ) from None
    file = Path(config.work_dir) / f"{name}.pth"
    save_state(part.state_dict(), file)
    return file


def save_state(state: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a state dict (CPU tensors, loadable with weights_only), whole or not at all."""
    buffer = io.BytesIO()
    torch.save({key: value.detach().cpu().clone() for key, value in state.items()}, buffer)
    write_whole(file, lambda temporary: temporary.write_bytes(buffer.getvalue()))
