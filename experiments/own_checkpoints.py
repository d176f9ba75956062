"""The checkpoints MMEngine keeps of a training of ours, read without running what they hold.

Beside tensors they hold plain data: numbers of NumPy and histories of MMEngine. Those types are
let through by name. A history's statistics are pickled as ``getattr(HistoryBuffer, "mean")``;
``getattr`` itself would reach any function from there, so a stand-in answers for these four only.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from nemf.checkpoints import check_archive, one_line
from nemf.errors import NemfError

_STATISTICS = ("min", "max", "current", "mean")


def _statistic(owner: Any, name: Any) -> Any:
    """What ``getattr`` may give to a checkpoint."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of {owner!r}")
    return getattr(HistoryBuffer, name)


_PLAIN_DATA = [
    HistoryBuffer,
    (_statistic, "builtins.getattr"),
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")),
]


@CheckpointLoader.register_scheme(prefixes="", force=True)  # MMEngine's loader of local files
def read_own_checkpoint(filename: str, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint. NemfError naming the file if it is missing, damaged, or holds
    anything but plain data."""
    try:
        check_archive(Path(filename))
        with torch.serialization.safe_globals(_PLAIN_DATA):
            return torch.load(filename, map_location=map_location, weights_only=True)
    except NemfError:
        raise
    except Exception as problem:  # on a foreign file torch's reader may stumble over anything
        raise NemfError(
            f"{filename}: not a checkpoint of this suite ({one_line(problem)}); delete its folder "
            "to train from the start"
        ) from None


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last epoch or iteration that a training saved in ``folder``. They are
    written whole, so that one that is there can be gone on from; what MMEngine notes in
    ``last_checkpoint`` (it may be an address, which would be fetched) is not heeded."""
    found = {}
    for path in folder.glob("*_*.pth"):
        match = re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name)
        if match:
            found[int(match[1])] = path
    return found[max(found)] if found else None
