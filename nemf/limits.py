"""What a file may at most ask of this machine. Torch-free.

Every limit has a default that the benchmarks stay far below, and an environment variable that
sets another one. Readers ask before they read, decode or unpack.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from nemf.errors import NemfError


@dataclass(frozen=True)
class Limit:
    """One limit: the ``variable`` that sets it, its ``default``, and the ``unit`` it counts."""

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The limit in force. NemfError for a variable that is no positive whole number."""
        text = os.environ.get(self.variable)
        if not text:
            return self.default
        digits = text.replace("_", "")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 19 and int(digits)):
            raise NemfError(f"{self.variable} must be a positive whole number, not {text!r}")
        return int(digits)

    def check(self, where: object, asked: int, what: str) -> None:
        """NemfError "<where>: <what> <asked> <unit> ..." if that is more than the limit."""
        if asked > self.value:
            raise NemfError(
                f"{where}: {what} {asked:,} {self.unit}, more than {self.value:,}; if it is "
                f"meant to, set {self.variable} higher"
            )


IMAGE_PIXELS = Limit("NEMF_MAX_IMAGE_PIXELS", 50_000_000, "pixels")
TEXT_BYTES = Limit("NEMF_MAX_TEXT_BYTES", 256 << 20, "bytes")  # JSON, CSV, YAML, lists
UNPACKED_BYTES = Limit("NEMF_MAX_UNPACKED_BYTES", 64 << 20, "bytes")  # MAT; checkpoints: growth
PARQUET_BYTES = Limit("NEMF_MAX_PARQUET_BYTES", 2 << 30, "bytes")  # decoded
LIMITS = (IMAGE_PIXELS, TEXT_BYTES, UNPACKED_BYTES, PARQUET_BYTES)
