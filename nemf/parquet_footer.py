"""How much a parquet file decodes to, from its footer, before anything is decoded. Torch-free.

Arrow knows that too, but its Python part ends the process where the description of a column is
damaged. The footer is a structure in Thrift's compact protocol; of it three fields are needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_ROW_GROUPS, _COLUMNS, _ABOUT_COLUMN = 4, 1, 3  # field numbers of parquet.thrift
_N_VALUES, _UNCOMPRESSED = 5, 6
_DEEPEST = 20
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


def decoded_bytes(path: Path) -> int:
    """Bytes of all pages, or eight for each value where that is more (a page of repeated values is
    short). ValueError for a footer that is none, OSError as ``open`` raises it."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        if length < 12:
            raise ValueError("it is too short")
        file.seek(length - 8)
        end = file.read(8)
        size = int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or size > length - 12:
            raise ValueError("Parquet magic bytes not found in footer")
        file.seek(length - 8 - size)
        footer = _Compact(file.read(size)).struct(0)
    total = 0
    try:
        for group in footer[_ROW_GROUPS]:
            for column in group[_COLUMNS]:
                about = column[_ABOUT_COLUMN]
                total += max(about[_UNCOMPRESSED], 8 * about[_N_VALUES], 0)
    except (LookupError, TypeError):
        raise ValueError("its footer does not describe its columns") from None
    return total


class _Compact:
    """A reader of Thrift's compact protocol: structures as dicts by field number."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._number()
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError("its footer is nested too deeply")
        if kind in (_TRUE, _FALSE, _BYTE):  # of a list or map: a byte each
            return self._byte()
        if kind < _DOUBLE:
            return self._number()
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            size = self._length(head >> 4 if head >> 4 < 15 else self._varint())
            return [self._value(head & 15, depth + 1) for _ in range(size)]
        if kind == _MAP:
            size = self._length(self._varint())
            kinds = self._byte() if size else 0
            for _ in range(size):
                self._value(kinds >> 4, depth + 1)
                self._value(kinds & 15, depth + 1)
            return None
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"its footer has a field of unknown type {kind}")

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("its footer is cut short")
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("its footer has an endless number")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _length(self, size: int) -> int:
        """A number of elements that the rest can hold."""
        if size > len(self.data) - self.at:
            raise ValueError("its footer is cut short")
        return size

    def _skip(self, size: int) -> None:
        self.at += self._length(size)
