"""Reading weights files: tensors only, checked key by key, saying what does not fit."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemf.errors import NemfError, WeightsNotFound
from nemf.limits import UNPACKED_BYTES
from nemf.reading import file_bytes


def read_content(path: Path) -> Any:
    """Whatever a file written by ``torch.save`` holds. Nothing but tensors is unpickled.

    NemfError if the file is missing or unreadable, or unpacks to much more than its length.
    """
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise NemfError(f"{path}: there is no such weights file") from None
    except NemfError:
        raise
    except Exception as problem:  # on a foreign file torch's reader may stumble over anything
        raise NemfError(f"{path}: not a readable weights file ({one_line(problem)})") from None


def check_archive(path: Path) -> None:
    """NemfError if a weights file is no regular file, or an archive whose entries unpack to more
    than its length and :data:`nemf.limits.UNPACKED_BYTES` on top (torch packs without compressing).
    OSError if it cannot be opened, BadZipFile if it only begins like an archive."""
    size = file_bytes(path)
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    UNPACKED_BYTES.check(path, unpacked - size, "unpacks to more than its length, by")


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, bare or under ``"state_dict"``.

    NemfError if the file cannot be read or holds something else.
    """
    content = read_content(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise NemfError(f"{path}: holds no state dict (tensors by name, bare or in 'state_dict')")
    odd = next((key for key, value in state.items() if not _is_plain(key, value)), None)
    if odd is not None:
        raise NemfError(f"{path}: {odd!r} is no plain tensor under a name; save dense CPU tensors")
    return state


def _is_plain(key: object, value: Tensor) -> bool:
    """Whether a tensor has numbers of its own that lie side by side, and a text for a name."""
    dense = value.layout is torch.strided and not value.is_quantized and not value.is_nested
    return isinstance(key, str) and dense and value.device.type == "cpu"


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


def check_given(path: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """NemfError for a size ``given`` as a keyword that is not the one ``found`` in a file."""
    for name, value in given.items():
        if value != found[name]:
            raise NemfError(f"{path} has {name} {found[name]}, not {value}: leave {name} out")


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
        elif state[key].is_floating_point() != meta.is_floating_point() or state[key].is_complex():
            misshapen.append(f"{key} {state[key].dtype} for {meta.dtype}")
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
