"""The gate's stored answers: back as they were, and which other images are forgiven."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from experiments.accepted_answers import read_accepted, read_listing, write_accepted
from experiments.benchmarks import random_predictions
from nemf.errors import NemfError
from nemf.predictions import Predictions
from nemf.scoring import get_protocol
from reports.records import score_pairs
from reports.regression_policy import Cell
from reports.regression_watches import Side, causes, not_comparable

CELL = Cell("m", "spair", "canonical")
ALPHAS = (0.05, 0.1)


@pytest.fixture
def accepted(tmp_path: Path) -> Predictions:
    """Predictions that lie in ``tmp_path / "accepted"``."""
    predictions = random_predictions(30, 2, 12)
    predictions.meta |= {"fingerprint": "f" * 64, "n_pairs": 30, "key": "k0", "facts": {"seed": 1}}
    file = tmp_path / "predictions.parquet"
    predictions.write(file)
    frame = score_pairs(predictions, get_protocol("canonical@1"), ALPHAS).frame
    write_accepted(
        tmp_path / "accepted",
        {CELL: (file, "canonical@1", frame)},
        ALPHAS,
        {"commit": "c" * 40, "tree": "t" * 40},
        "the first one",
        "table1-abc",
    )
    return Predictions.read(file)


def side(tmp_path: Path, head: Predictions, *, same_stand_ins: bool) -> Side:
    listing = read_listing(tmp_path / "accepted")
    stored = tmp_path / "accepted" / listing["cells"][str(CELL)]["file"]
    to = tmp_path / "again.parquet"
    return read_accepted(stored, "canonical@1", head, to, same_stand_ins=same_stand_ins)


def with_meta(predictions: Predictions, **meta: object) -> Predictions:
    return Predictions(predictions.table, predictions.meta | meta)


def test_answers_and_means_come_back(accepted: Predictions, tmp_path: Path) -> None:
    listing = read_listing(tmp_path / "accepted")
    assert (listing["reason"], listing["stand_ins"]) == ("the first one", "table1-abc")
    found = side(tmp_path, accepted, same_stand_ins=True)
    assert found.predictions.points("pred").tobytes() == accepted.points("pred").tobytes()
    frame = score_pairs(accepted, get_protocol("canonical@1"), ALPHAS).frame
    mean = (frame["pck-0.10"] / frame["n"]).mean()
    assert found.means["all", "all", 0.1] == pytest.approx(mean)
    assert not_comparable(found, Side(accepted, "canonical@1", {})) is None


@pytest.mark.parametrize("same_stand_ins", [True, False])
def test_other_pixels_of_the_same_stand_ins_are_a_cause_and_no_other_dataset(
    accepted: Predictions, tmp_path: Path, same_stand_ins: bool
) -> None:
    """Only where the same sources rendered them, and the same questions are asked."""
    head = with_meta(accepted, fingerprint="e" * 64)
    found = side(tmp_path, head, same_stand_ins=same_stand_ins)
    problem = not_comparable(found, Side(head, "canonical@1", {}))
    if same_stand_ins:
        assert problem is None
        (cause,) = causes(found.predictions.meta, head.meta)
        assert cause == {"what": "pixels", "base": "f" * 64, "head": "e" * 64}
    else:
        assert "dataset version differs" in str(problem)


def test_other_questions_are_another_dataset(accepted: Predictions, tmp_path: Path) -> None:
    at = accepted.table.column_names.index("true_x")
    moved = pa.array(accepted.column("true_x") + 1, pa.float32())
    table = accepted.table.set_column(at, accepted.table.field(at), moved)
    head = Predictions(table, accepted.meta | {"fingerprint": "e" * 64})
    found = side(tmp_path, head, same_stand_ins=True)
    problem = not_comparable(found, Side(head, "canonical@1", {}))
    assert "dataset version differs" in str(problem)


def test_a_file_that_cannot_be_read_is_named(accepted: Predictions, tmp_path: Path) -> None:
    (file,) = (tmp_path / "accepted").glob("*.parquet")
    file.write_bytes(b"no parquet")
    with pytest.raises(
        NemfError, match=rf"{file.name}: cannot be read .*git checkout -- {file.name}"
    ):
        side(tmp_path, accepted, same_stand_ins=True)
    (tmp_path / "accepted" / "accepted.json").write_text('{"format": 1}')
    with pytest.raises(NemfError, match="of format 2; accept anew"):
        read_listing(tmp_path / "accepted")
    (tmp_path / "accepted" / "accepted.json").write_text("{")
    with pytest.raises(NemfError, match=r"accepted\.json: cannot be read .*git checkout"):
        read_listing(tmp_path / "accepted")
