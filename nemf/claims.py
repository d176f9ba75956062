"""Claims: a folder held by one process of all the hosts that share it. Torch-free.

A claim is a small file ``<name>.<number>`` that only one process can make; the highest number
counts. It holds the owner's name and is touched while the owner lives; an empty one is free again.
A claim is taken over under the next number when its owner is known to be dead, or, of an owner on
another host, when the file was not touched for ``NEMF_CLAIM_TIMEOUT_S`` seconds (60). That is
measured by the watcher's steady clock from what it sees change, so no clock of any host is compared
with another's. The file system must give exclusive hard links and show a host what another wrote.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nemf.errors import NemfError
from nemf.processes import draft_beside, known_dead, process_name

log = logging.getLogger(__name__)
_BEATS = 6  # how often a claim is touched in the time after which it counts as left behind
_POLL_S = 0.2


class Busy(NemfError):
    """Another process holds the claim."""


class Claim:
    """A claim of this process, see :func:`claimed`."""

    def __init__(self, folder: Path, name: str, number: int, beat_s: float) -> None:
        self._folder, self._name, self._number = folder, name, number
        self._path = folder / f"{name}.{number}"
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(beat_s,), daemon=True)
        self._heart.start()

    def check(self) -> None:
        """NemfError if another process took the claim over, since this one seemed to be dead."""
        if _latest(self._folder, self._name) != self._number:
            raise NemfError(
                f"{self._folder}: another process took over, since this one gave no sign of life "
                "for long; what it had finished is kept"
            )

    def release(self) -> None:
        self._over.set()
        self._heart.join()
        with suppress(OSError):  # if it was taken over there is nothing to give back
            os.truncate(self._path, 0)

    def _beat(self, beat_s: float) -> None:
        while not self._over.wait(beat_s):
            with suppress(OSError):
                os.utime(self._path)


@contextmanager
def claimed(
    folder: Path, name: str, busy: str, *, of: Path | None = None, timeout_s: float = 0
) -> Iterator[Claim]:
    """Holds ``folder`` (made if it is not there) for this process; free again if it dies.

    Busy "<of or folder>: <busy> (<who>)" if another process holds it for longer than ``timeout_s``;
    NemfError if the folder cannot be written. Whether an owner on another host lives is seen after
    a while only, so a refusal may take up to ``NEMF_CLAIM_TIMEOUT_S``.
    """
    claim = _acquire(folder, name, f"{of or folder}: {busy}", timeout_s)
    try:
        yield claim
    finally:
        claim.release()


def claim_timeout_s() -> float:
    """``$NEMF_CLAIM_TIMEOUT_S``: a claim of another host that was not touched for so long counts as
    left behind. NemfError if it is no positive number."""
    text = os.environ.get("NEMF_CLAIM_TIMEOUT_S", "60")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise NemfError(f"NEMF_CLAIM_TIMEOUT_S={text!r} is not a number of seconds above 0")
    return value


def _acquire(folder: Path, name: str, busy: str, timeout_s: float) -> Claim:
    stale_s = claim_timeout_s()
    begun = time.monotonic()
    watched, since, lives = None, begun, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            number = _latest(folder, name)
            owner, beat = _read(folder / f"{name}.{number}")
            now = time.monotonic()
            if (number, owner, beat) != watched:
                lives = watched is not None and watched[:2] == (number, owner)  # it was touched
                if watched is None and owner and _elsewhere(owner):
                    log.info("%s: watching whether %s still works on it", folder, _shown(owner))
                watched, since = (number, owner, beat), now
            gone = not owner or known_dead(_process(owner)) or now - since > stale_s
            if gone and _make(folder, name, number + 1):
                return Claim(folder, name, number + 1, stale_s / _BEATS)
            if not gone and (lives or not _elsewhere(owner)) and now - begun >= timeout_s:
                raise Busy(f"{busy} ({_shown(owner)})")
            time.sleep(_POLL_S)
    except OSError as problem:
        raise NemfError(
            f"{folder}: cannot be written ({problem.strerror}); choose another OUT="
        ) from None


def _latest(folder: Path, name: str) -> int:
    """The number of the claim that counts, 0 if there was none."""
    return max(_numbers(folder, name), default=0)


def _numbers(folder: Path, name: str) -> set[int]:
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)")
    found = (pattern.fullmatch(entry) for entry in os.listdir(folder))
    return {int(match[1]) for match in found if match}


def _read(path: Path) -> tuple[str, int]:
    """What a claim says of its owner (nothing if it is free), and when it was touched last."""
    try:
        with open(path, encoding="utf-8") as file:  # opening asks a file server for the truth
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return "", 0


def _make(folder: Path, name: str, number: int) -> bool:
    """Makes the claim of that number; False if somebody else was quicker."""
    target = folder / f"{name}.{number}"
    draft = draft_beside(folder / name)
    try:
        draft.write_text(f"{process_name()} {platform.node()}\n", encoding="utf-8")
        os.link(draft, target)
    except FileExistsError:
        # A file server may have done it and lost its answer.
        if os.stat(draft).st_nlink < 2:
            return False
    finally:
        draft.unlink(missing_ok=True)
    if _latest(folder, name) != number:  # the folder had been listed from a stale cache
        target.unlink(missing_ok=True)
        return False
    for earlier in _numbers(folder, name) - {number}:
        (folder / f"{name}.{earlier}").unlink(missing_ok=True)
    return True


def _process(owner: str) -> str:
    return owner.partition(" ")[0]


def _elsewhere(owner: str) -> bool:
    """Whether the owner runs where this process cannot see it."""
    return _process(owner).rpartition("~")[0] != process_name().rpartition("~")[0]


def _shown(owner: str) -> str:
    process, _, host = owner.strip().partition(" ")
    return f"process {process.rpartition('~')[2].partition('.')[0]} on {host or 'a host'}"
