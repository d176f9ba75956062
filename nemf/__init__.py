"""nemf: a benchmark suite for semantic correspondence.

``import nemf`` is light; torch is loaded when a matcher is built.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("nemf")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "available_datasets": "nemf.datasets",
    "available_matchers": "nemf.cards",
    "available_protocols": "nemf.scoring",
    "build_matcher": "nemf.matcher",
    "match": "nemf.matcher",
    "pck": "nemf.scoring",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nemf' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
