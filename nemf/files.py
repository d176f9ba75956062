"""Files written whole or not at all, folders held by one process. Torch-free."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nemf.errors import NemfError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path in the same folder, then renames it to ``path``.

    NemfError naming the path if the folder cannot be written or the disk is full; nothing is left.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
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


@contextmanager
def claimed(folder: Path, lock_name: str, busy: str, *, timeout_s: float = 0) -> Iterator[None]:
    """Holds ``folder`` (made if it is not there) for this process by a lock file; freed if the
    process dies.

    NemfError "<folder>: <busy>" if another process holds it for longer than ``timeout_s``, or if
    the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / lock_name, timeout=timeout_s)
        lock.acquire()
    except Timeout:
        raise NemfError(f"{folder}: {busy}") from None
    except OSError as problem:
        raise NemfError(
            f"{folder}: cannot be written ({problem.strerror}); choose another OUT="
        ) from None
    try:
        yield
    finally:
        lock.release()
