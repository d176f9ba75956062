"""Numeric variables of MATLAB level 5 files (what ``save`` writes by default, -v6 and -v7).

A reader of our own because the common one may crash the process on a damaged uncompressed file,
and verification has to outlive every file it looks at.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from nemf.errors import NemfError
from nemf.limits import UNPACKED_BYTES
from nemf.reading import read_within

_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15  # types of the elements a file consists of
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
_NUMERIC_CLASSES = range(6, 16)  # double, single, int8 .. uint64


def read_mat(file: Path) -> dict[str, np.ndarray]:
    """The numeric variables (float64, at least 2-D) by name; others, say structs, are left out.

    Imaginary parts are ignored. NemfError naming the file if it cannot be read, is damaged, of
    another level (-v4, -v7.3), holds a variable twice or unpacks to more than
    :data:`nemf.limits.UNPACKED_BYTES`.
    """
    try:
        data = read_within(file)
        order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER_BYTES])
        if order is None:
            raise ValueError("no MATLAB 5 file; save it with -v7")
        variables: dict[str, np.ndarray] = {}
        unpacked = 0
        for kind, content in _elements(data[_HEADER_BYTES:], order):
            if kind == _COMPRESSED:
                content = _unpacked(content, UNPACKED_BYTES.value - unpacked)
                unpacked += len(content)
                UNPACKED_BYTES.check(file, unpacked, "unpacks to at least")
                kind, content = next(_elements(content, order))
            if kind != _MATRIX:
                raise ValueError(f"unexpected element of type {kind}")
            found = _variable(content, order)
            if not variables.keys().isdisjoint(found):
                raise ValueError(f"variable {next(iter(found))!r} is there twice")
            variables.update(found)
    except OSError as problem:
        raise NemfError(f"{file}: cannot be read ({problem.strerror})") from None
    except NemfError:
        raise
    except (ValueError, OverflowError, StopIteration, struct.error, zlib.error) as problem:
        reason = str(problem) or "it is cut short"
        raise NemfError(f"{file}: cannot be read as MAT ({reason})") from None
    return variables


def _unpacked(content: bytes, limit: int) -> bytes:
    """A compressed element's content, cut after the byte that is beyond the limit."""
    stream = zlib.decompressobj()
    unpacked = stream.decompress(content, limit + 1)
    if not stream.eof and len(unpacked) <= limit:
        raise ValueError("it is cut short")
    return unpacked


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of the elements in ``data``; small ones hold both in their eight bytes."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        at += 8
        if kind >> 16:
            kind, size, at = kind & 0xFFFF, kind >> 16, at - 4
            step = 4
        else:
            step = size if kind == _COMPRESSED else -(-size // 8) * 8
        if at + size > len(data) or size > step:
            raise ValueError("it is cut short")
        yield kind, data[at : at + size]
        at += step


def _variable(content: bytes, order: str) -> dict[str, np.ndarray]:
    """{name: values} of a matrix element, {} if it is not numeric."""
    parts = _elements(content, order)
    flags = _numbers(*next(parts), order)
    if not len(flags) or int(flags[0]) & 0xFF not in _NUMERIC_CLASSES:
        return {}
    shape = [int(side) for side in _numbers(*next(parts), order)]
    name = next(parts)[1].decode("ascii")
    values = _numbers(*next(parts), order)
    if len(shape) < 2 or min(shape) < 0 or prod(shape) != len(values):
        raise ValueError(f"variable {name!r} of shape {shape} holds {len(values)} numbers")
    return {name: values.astype(np.float64).reshape(shape, order="F")}


def _numbers(kind: int, content: bytes, order: str) -> np.ndarray:
    if kind not in _NUMBERS:
        raise ValueError(f"unexpected numbers of type {kind}")
    return np.frombuffer(content, order + _NUMBERS[kind])
