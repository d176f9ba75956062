"""Names of processes, so that one can tell that another one is dead, and clear up after it.
Torch-free.

A name holds where a process runs (boot of the machine and PID namespace), its number and when it
began. Only processes of the same place can be known to be dead: of those of other hosts and
containers nothing is said.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

_PROC = Path("/proc")


def process_name() -> str:
    """The name of this process: letters, digits, dots and dashes."""
    return _name(os.getpid())  # a forked child has a name of its own


def known_dead(name: str) -> bool:
    """Whether the process of that name ended. False if it may live, or if that cannot be known."""
    place, _, rest = name.rpartition("~")
    number, _, born = rest.partition(".")
    if place != _place() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        pass
    state, began = _state(int(number))
    return state in ("Z", "X") or (born not in ("", began) and began != "")


@cache
def _name(pid: int) -> str:
    return f"{_place()}~{pid}.{_state(pid)[1]}"


@cache
def _place() -> str:
    """The machine since its boot, and the PID namespace."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat(_PROC / "self/ns/pid").st_ino
    except OSError:  # not on Linux
        return f"{uuid.uuid5(uuid.NAMESPACE_DNS, platform.node())}"
    return f"{uuid.UUID(boot).hex[:16]}-{namespace}"


def _state(pid: int) -> tuple[str, str]:
    """State letter and time of birth (in ticks since the boot) of a process; empty if unknown."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def draft_beside(path: Path) -> Path:
    """A new hidden path in the folder of ``path`` to make its content under, before a rename.
    Calls :func:`sweep_drafts`."""
    sweep_drafts(path)
    return path.with_name(f".{path.name}-{process_name()}-{uuid.uuid4().hex[:8]}")


def sweep_drafts(path: Path) -> None:
    """Removes the drafts of ``path``, and what lies beside them under their names, that processes
    of this place left when they were killed."""
    _sweep(path.parent, re.escape(path.name))


def sweep_folder(folder: Path) -> None:
    """:func:`sweep_drafts` of whatever file of ``folder``."""
    _sweep(folder, ".+")


def _sweep(folder: Path, name: str) -> None:
    process = rf"{re.escape(_place())}~\d+\.\d*"  # of other places nothing can be known
    draft = re.compile(rf"\.{name}-({process})-[0-9a-f]{{8}}.*")
    for entry in os.listdir(folder):
        match = draft.fullmatch(entry) if entry.startswith(".") else None
        if match and known_dead(match[1]):
            with suppress(OSError):
                left = folder / entry
                shutil.rmtree(left) if left.is_dir() else left.unlink()
