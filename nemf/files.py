"""Files written whole or not at all. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nemf.errors import NemfError
from nemf.processes import draft_beside


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path in the same folder, then renames it to ``path``.

    NemfError naming the path if the folder cannot be written or the disk is full; nothing is left.
    What a killed writer left is removed by the next one of the same path.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = draft_beside(path)
        temporary.touch(exist_ok=False)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise NemfError(
            f"{path}: cannot be written ({reason}); choose another OUT= folder"
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all (see :func:`write_whole`)."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
