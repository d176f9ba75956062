"""The chain at the whole size of SPair-71k (see tests/benchmarks/load.py, which measures it)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.load import LIMIT_GIB, SPLITS, run


@pytest.mark.long
def test_all_of_spair_is_indexed_predicted_scored_and_shown_within_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sum(SPLITS.values()), tmp_path)
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if " GiB |" in line]
    assert len(rows) == 9
    assert {row[2].strip() for row in rows} == {"53,340", "5,384", "12,234"}
    assert all(float(row[6].split()[0]) < LIMIT_GIB for row in rows)
