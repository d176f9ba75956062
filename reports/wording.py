"""How every report names the same things: datasets and parts of them, difficulty, code.

Torch-free; texts only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STAND_INS = "SYNTHETIC stand-ins (rendered objects)"
SAYS_NOTHING = f" — {STAND_INS}: says nothing about photographs"  # at the end of a title
FLAG_LEVELS = {  # what the values of SPair's flags mean
    "viewpoint": ("easy", "medium", "hard"),
    "scale": ("easy", "medium", "hard"),
    "truncation": ("none", "source", "target", "both"),
    "occlusion": ("none", "source", "target", "both"),
}


def dataset_title(data: Mapping[str, Any]) -> str:
    """``title`` and ``split``; ``synthetic`` stand-ins are called so."""
    title = f"{data['title']} {data['split']}"
    return f"{STAND_INS} for {title}" if data["synthetic"] else title


def is_part(data: Mapping[str, Any]) -> bool:
    """Whether ``n_pairs`` are not all that the official split has."""
    return data["official_pairs"] not in (None, data["n_pairs"])


def code_text(code: Mapping[str, Any] | None, digits: int | None = 12) -> str:
    """The commit of some code (so many ``digits`` of it), and whether it was changed."""
    if not code or not code.get("commit"):
        return "code outside a git checkout"
    changed = " with uncommitted changes" if code.get("dirty") else ""
    return f"commit {code['commit'][:digits]}{changed}"
