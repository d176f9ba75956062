"""Whether bars of progress are shown: on a terminal, and not after ``nemf --quiet``."""

from __future__ import annotations

import os
import sys

_SWITCH = "TQDM_DISABLE"  # what tqdm itself heeds where a bar is made without further ado


def silence() -> None:
    """Shows no bar from now on, in processes started from here neither."""
    os.environ[_SWITCH] = "1"


def shown() -> bool:
    """A bar has no place in a log, nor where quiet was asked for."""
    return sys.stderr.isatty() and os.environ.get(_SWITCH) != "1"
