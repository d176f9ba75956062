"""Reading weights files: tensors only, checked key by key, saying what does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemf.errors import NemfError, WeightsNotFound


def read_content(path: Path) -> Any:
    """Whatever a file written by ``torch.save`` holds. Nothing but tensors is unpickled.

    NemfError if the file is missing or unreadable.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise NemfError(f"{path}: there is no such weights file") from None
    except Exception as problem:  # on a foreign file torch's reader may stumble over anything
        raise NemfError(f"{path}: not a readable weights file ({one_line(problem)})") from None


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, bare or under ``"state_dict"``.

    NemfError if the file cannot be read or holds something else.
    """
    content = read_content(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise NemfError(f"{path}: holds no state dict (tensors by name, bare or in 'state_dict')")
    return state


def check_sources(
    method: str, weights: str | Path | None, init: str | None, backbone_weights: str | Path | None
) -> None:
    """The weights of a whole model come from ``weights`` or from ``init``: "head" (drawn, for
    training) or "random" (everything drawn), where ``backbone_weights`` may give the trunk.
    WeightsNotFound if there is neither, NemfError for any other combination."""
    if init not in (None, "head", "random"):
        raise NemfError(f"init must be 'head', 'random' or left out, not {init!r}")
    if weights is None and init is None:
        raise WeightsNotFound(
            f"no weights for {method}: pass weights=FILE (the authors' model_best.pth or a "
            "checkpoint of ours), or init='head' or 'random'"
        )
    if weights is not None and init is not None:
        raise NemfError(f"give either weights={str(weights)!r} or init={init!r}, not both")
    if weights is not None and backbone_weights is not None:
        raise NemfError(
            f"backbone_weights={str(backbone_weights)!r} goes with init='head' or 'random' only: "
            f"{weights} holds a trunk of its own"
        )


def fitting_state(
    path: Path,
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    unexpected: Iterable[str],
    holds: str,
    remark: str = "",
) -> dict[str, Tensor]:
    """The tensors of ``state`` that a model needs, in the types of ``wanted`` (its state dict).

    Counters of batches seen are set to zero: they say how long training took, and older files lack
    them. NemfError "<path> does not hold <holds>" lists missing, ``unexpected`` and misshapen keys,
    followed by ``remark``; another names tensors that are not finite.
    """
    fitting: dict[str, Tensor] = {}
    missing, misshapen = [], []
    for key, meta in wanted.items():
        if is_counter(key):
            fitting[key] = torch.zeros_like(meta, device="cpu")
        elif key not in state:
            missing.append(key)
        elif state[key].shape != meta.shape:
            misshapen.append(f"{key} {tuple(state[key].shape)} for {tuple(meta.shape)}")
        else:
            fitting[key] = state[key].to(meta.dtype)
    complaints = {"missing": missing, "unexpected": list(unexpected), "misshapen": misshapen}
    if any(complaints.values()):
        listed = "; ".join(_some(keys, kind) for kind, keys in complaints.items() if keys)
        raise NemfError(f"{path} does not hold {holds}: {listed}{remark}")
    broken = [key for key, value in fitting.items() if not torch.isfinite(value).all()]
    if broken:
        raise NemfError(f"{path} is damaged: {_some(broken, 'not finite')}")
    return fitting


def is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def one_line(problem: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(problem) or type(problem).__name__).splitlines()[0]


def _some(keys: list[str], kind: str) -> str:
    more = ", ..." if len(keys) > 3 else ""
    return f"{len(keys)} {kind} ({', '.join(keys[:3])}{more})"
