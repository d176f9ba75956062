"""The footer's sizes against Arrow's, and what a damaged footer may do: raise ValueError."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemf.errors import NemfError
from nemf.parquet_footer import decoded_bytes
from nemf.reading import read_parquet
from tests.conftest import REPO

TABLES: dict[str, Any] = {
    "numbers": {"a": np.arange(1000), "b": np.arange(1000.0), "c": [True] * 1000},
    "texts": {"t": ["x", None, "yz"] * 40, "d": pa.array(["u", "v"] * 60).dictionary_encode()},
    "lists": {"l": [[1.0, 2.0], [], None] * 50, "m": [{"k": 1}] * 150},
    "nothing": {"a": pa.array([], pa.int32())},
}


def by_arrow(path: Path) -> int:
    metadata = pq.read_metadata(path)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(max(c.total_uncompressed_size, 8 * c.num_values) for c in columns)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("way", [{}, {"row_group_size": 7}, {"compression": "zstd"}])
def test_sizes_are_arrows(name: str, way: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    meta = {b"nemf": b"{}" * 300}
    pq.write_table(pa.table(TABLES[name]).replace_schema_metadata(meta), path, **way)
    assert decoded_bytes(path) == by_arrow(path)


def test_sizes_of_the_accepted_answers_are_arrows() -> None:
    files = sorted((REPO / "experiments" / "accepted").glob("*.parquet"))
    assert files
    assert [decoded_bytes(file) for file in files] == [by_arrow(file) for file in files]


def test_repeated_values_in_a_list_count(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"l": [np.zeros(3_000_000, np.float32)]}), path)
    assert path.stat().st_size < 100_000
    assert decoded_bytes(path) >= 24_000_000


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 4, b"PAR1\xff\xff\xff\x7fPAR1" * 2])
def test_what_is_no_footer(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"footer|too short"):
        decoded_bytes(path)


def test_a_damaged_footer_gives_a_size_or_an_error(tmp_path: Path) -> None:
    """Some of these would make Arrow's Python part end the process."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(TABLES["texts"] | {"l": [[1.0], []] * 60}), path)
    data = path.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    rng, refused = random.Random(0), 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 2, 5))):
            damaged[rng.randrange(start, len(data) - 8)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert decoded_bytes(path) >= 0
        except ValueError:
            refused += 1
    assert 300 < refused < 3000


@pytest.mark.parametrize("nested", [b"\x1c", b"\x19\x1c", b"\x1b\x01\xbb", b"\x19\x19"])
def test_a_bottomless_footer(nested: bytes, tmp_path: Path) -> None:
    footer = nested * 50_000
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match="footer"):
        decoded_bytes(path)
    with pytest.raises(NemfError, match=r"x\.parquet: cannot be read as parquet"):
        read_parquet(path)
