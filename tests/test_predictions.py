"""Prediction files: round trips, whole or not at all, and what is refused, ours and others'."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemf.datasets.folder import FolderOfPairs
from nemf.datasets.index import PairDataset
from nemf.datasets.pfwillow import PFWillow
from nemf.datasets.spair import SPair71k
from nemf.errors import NemfError
from nemf.files import write_text, write_whole
from nemf.pairs import FLAGS, Plan
from nemf.predictions import (
    FORMAT,
    SCHEMA,
    Predictions,
    dataset_meta,
    prediction_table,
    query_list,
    read_external,
    warn_of_strange_answers,
)
from nemf.scoring import get_protocol
from reports.records import score_pairs
from tests.conftest import write_json

FORWARD, BACKWARD = Plan("src2trg"), Plan("trg2src")
NAN = float("nan")


@pytest.fixture
def willow(tiny_pfwillow: Callable[..., Path]) -> PFWillow:
    return PFWillow(tiny_pfwillow())


def answered(dataset: PairDataset, plan: Plan = FORWARD, shift: float = 1.0) -> pa.Table:
    """Every pair's truth moved by ``shift`` px, in one chunk per pair."""
    chunks = []
    for number, pair in enumerate(dataset):
        oriented = pair.oriented(plan)
        points = oriented.reference_kps + np.float32(shift)
        confidence = np.linspace(0, 1, len(points)) if number % 2 else None
        chunks.append(prediction_table([(number, oriented, points, confidence)]))
    return pa.concat_tables(chunks).unify_dictionaries()


def predictions_of(dataset: PairDataset, plan: Plan = FORWARD, shift: float = 1.0) -> Predictions:
    meta = dataset_meta(dataset, plan) | {"matcher": {"name": "shifted", "label": "shifted"}}
    return Predictions(answered(dataset, plan, shift), meta)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# -- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [FORWARD, BACKWARD])
def test_what_is_written_is_read(
    plan: Plan, tiny_spair: Callable[..., Path], tmp_path: Path
) -> None:
    dataset = SPair71k(tiny_spair())
    made = predictions_of(dataset, plan)
    made.write(tmp_path / "p.parquet")
    read = Predictions.read(tmp_path / "p.parquet")
    assert read.meta == made.meta
    assert read.table.schema.equals(SCHEMA)
    assert read.table.num_rows == 5
    pd.testing.assert_frame_equal(read.table.to_pandas(), made.table.to_pandas())
    assert read.plan == plan
    assert read.pair_starts.tolist() == [0, 3]
    assert read.column("keypoint").tolist() == [0, 1, 2, 0, 1]
    assert read.column("pair_number").tolist() == [0, 0, 0, 1, 1]

    row = 0
    for pair in dataset:
        seen = pair.oriented(plan)
        n = len(seen.query_kps)
        rows = slice(row, row + n)
        np.testing.assert_array_equal(read.points("query")[rows], seen.query_kps)
        np.testing.assert_array_equal(read.points("true")[rows], seen.reference_kps)
        np.testing.assert_array_equal(read.points("pred")[rows], seen.reference_kps + 1)
        np.testing.assert_array_equal(read.bbox("query")[row], seen.query_bbox)
        np.testing.assert_array_equal(read.bbox("reference")[row], seen.reference_bbox)
        for side in ("query", "reference"):
            record = getattr(seen, side)
            assert (read.column(f"{side}_height")[row], read.column(f"{side}_width")[row]) == (
                record.size
            )
            assert read.column(f"{side}_hash")[row] == record.hash
            assert read.column(f"{side}_image")[row] == record.name
            annotated = read.column(f"{side}_annotated")[row].reshape(-1, 2)
            np.testing.assert_array_equal(annotated, record.kps)
            assert len(annotated) == n + 1  # the fixture annotates one that no pair uses
        for flag in FLAGS:
            assert read.column(flag)[row] == pair.flags[flag]
        row += n
    assert np.isnan(read.column("confidence")[:3]).all()  # the first pair came without one
    assert read.column("confidence")[3:].tolist() == [0.0, 1.0]


def test_text_columns_of_several_chunks_become_one_dictionary(
    willow: PFWillow, tmp_path: Path
) -> None:
    predictions_of(willow).write(tmp_path / "p.parquet")
    read = Predictions.read(tmp_path / "p.parquet")
    codes, texts = read.codes("category")
    assert texts == ["car(S)", "duck(S)"]
    assert codes.tolist() == [0] * 20 + [1] * 10
    codes, texts = read.codes("pair")
    assert [texts[code] for code in codes[::10]] == willow.ids
    assert read.column("category")[0] == "car(S)"


def test_missing_boxes_are_nan_and_missing_flags_minus_one(willow: PFWillow) -> None:
    made = predictions_of(willow)
    assert np.isnan(made.bbox("query")).all()
    assert {int(v) for flag in FLAGS for v in made.column(flag)} == {-1}


def test_some_columns_only(willow: PFWillow, tmp_path: Path) -> None:
    predictions_of(willow).write(tmp_path / "p.parquet")
    read = Predictions.read(tmp_path / "p.parquet", ["pair_number"])
    assert read.table.column_names == ["pair_number"]
    assert read.meta["dataset"] == "pfwillow"


def test_two_writes_are_byte_equal(willow: PFWillow, tmp_path: Path) -> None:
    for name in "ab":
        predictions_of(willow).write(tmp_path / f"{name}.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_the_metadata_says_what_dataset_and_plan_determine(
    willow: PFWillow, tiny_spair: Callable[..., Path]
) -> None:
    meta = dataset_meta(willow, Plan("trg2src", "pair"))
    assert meta["format"] == FORMAT
    assert (meta["layout"], meta["plan"], meta["n_pairs"]) == ("pfwillow", "trg2src-pair", 3)
    assert (meta["official_pairs"], meta["synthetic"]) == (900, False)
    assert meta["fingerprint"] == willow.fingerprint
    spair = dataset_meta(SPair71k(tiny_spair()), Plan("trg2src", "pair"))
    assert spair["plan"] == "trg2src-own"  # SPair layouts are never padded


def test_answers_of_the_wrong_number_are_an_error(willow: PFWillow) -> None:
    with pytest.raises(ValueError, match=r"10 queries but answers of shape \(9, 2\)"):
        prediction_table([(0, willow[0].oriented(FORWARD), np.zeros((9, 2), np.float32), None)])


# -- whole or not at all --------------------------------------------------------------------------


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def half(file: Path) -> None:
        file.write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_whole(tmp_path / "new" / "x.txt", half)
    assert left_in(tmp_path) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "x.txt", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NemfError, match=r"x\.txt: cannot be written \(No space left"):
        write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "old"
    assert left_in(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_names_the_path_and_leaves_nothing(
    broken: str, willow: PFWillow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = predictions_of(willow), tmp_path / "out"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(NemfError) as refused:
        made.write(out / "p.parquet")
    assert str(refused.value).startswith(f"{out / 'p.parquet'}: cannot be written (No space left")
    assert left_in(out) == []


def test_a_file_where_the_folder_should_be_is_named(willow: PFWillow, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(NemfError, match=r"out/p\.parquet: cannot be written"):
        predictions_of(willow).write(tmp_path / "out" / "p.parquet")


# -- read errors ----------------------------------------------------------------------------------


def _missing(path: Path, _: PFWillow) -> None:
    path.unlink(missing_ok=True)


def _text(path: Path, _: PFWillow) -> None:
    path.write_text("pair,keypoint,x,y\n")


def _truncated(path: Path, dataset: PFWillow) -> None:
    predictions_of(dataset).write(path)
    path.write_bytes(path.read_bytes()[:-200])


def _foreign(path: Path, _: PFWillow) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(path)


def _damaged_metadata(path: Path, dataset: PFWillow) -> None:
    pq.write_table(answered(dataset).replace_schema_metadata({b"nemf": b"{"}), path)


def _other_format(path: Path, dataset: PFWillow) -> None:
    made = predictions_of(dataset)
    Predictions(made.table, made.meta | {"format": FORMAT + 1}).write(path)


def _lacks_columns(path: Path, dataset: PFWillow) -> None:
    made = predictions_of(dataset)
    Predictions(made.table.drop_columns(["pred_x", "true_y"]), made.meta).write(path)


def _empty(path: Path, dataset: PFWillow) -> None:
    made = predictions_of(dataset)
    Predictions(made.table.slice(0, 0), made.meta).write(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_missing, "no such prediction file"),
        (_text, "cannot be read as parquet"),
        (_truncated, "cannot be read as parquet"),
        (_foreign, "not a prediction file of this suite; predictions made elsewhere need"),
        (_damaged_metadata, "its metadata is damaged"),
        (_other_format, f"has format {FORMAT + 1}, this version reads {FORMAT}"),
        (_lacks_columns, "lacks the columns pred_x, true_y"),
        (_empty, "holds no prediction"),
    ],
)
def test_what_is_no_prediction_file_is_refused(
    damage: Callable[[Path, PFWillow], None], reason: str, willow: PFWillow, tmp_path: Path
) -> None:
    path = tmp_path / "p.parquet"
    damage(path, willow)
    with pytest.raises(NemfError) as refused:
        Predictions.read(path)
    assert str(refused.value).startswith(f"{path}: {reason}")


def test_a_flipped_bit_in_the_numbers_is_refused(willow: PFWillow, tmp_path: Path) -> None:
    """Without page checksums a damaged page can decode to other coordinates."""
    path = tmp_path / "p.parquet"
    predictions_of(willow).write(path)
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(SCHEMA.names.index("pred_x"))
    start = column.dictionary_page_offset or column.data_page_offset
    damaged = bytearray(whole)
    damaged[start + column.total_compressed_size - 3] ^= 0x10
    path.write_bytes(bytes(damaged))
    with pytest.raises(NemfError, match=r"p\.parquet: cannot be read as parquet"):
        Predictions.read(path)
    path.write_bytes(whole)
    assert len(Predictions.read(path)) == 30


# -- predictions made elsewhere -------------------------------------------------------------------


def answer_sheet(dataset: PairDataset, plan: Plan = FORWARD) -> pd.DataFrame:
    """The question list answered with the truth."""
    table = query_list(dataset, plan)
    truth = np.concatenate([pair.oriented(plan).reference_kps for pair in dataset])
    table["x"], table["y"] = truth[:, 0], truth[:, 1]
    return table


def save(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    return path


def test_the_question_list_names_files_and_pixels(willow: PFWillow) -> None:
    table = query_list(willow, BACKWARD)
    assert list(table.columns) == [
        *("pair", "keypoint", "query_image", "reference_image", "query_x", "query_y")
    ]
    assert len(table) == 30
    first = willow[0]
    assert table.loc[3, ["pair", "keypoint"]].tolist() == [first.id, 3]
    assert willow.folder / table.loc[0, "query_image"] == first.trg.path
    assert willow.folder / table.loc[0, "reference_image"] == first.src.path
    np.testing.assert_array_equal(table[["query_x", "query_y"]][:10], first.trg_kps)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("plan", "protocol"), [(FORWARD, "canonical@1"), (BACKWARD, "cats-paper@1")]
)
def test_the_truth_as_an_answer_scores_one(
    ending: str, plan: Plan, protocol: str, willow: PFWillow, tmp_path: Path
) -> None:
    file = save(answer_sheet(willow, plan), tmp_path / f"answers.{ending}")
    read = read_external(file, willow, plan, "theirs")
    scored = score_pairs(read, get_protocol(protocol), [1e-4]).frame
    assert (scored["pck-0.0001"] == scored["n"]).all()
    assert scored["n_none"].sum() == 0
    assert read.meta["matcher"]["label"] == "theirs"
    assert read.meta["matcher"]["external"] is True
    assert read.plan == plan


def test_order_and_further_columns_do_not_matter(willow: PFWillow, tmp_path: Path) -> None:
    sheet = answer_sheet(willow)
    plain = read_external(save(sheet, tmp_path / "a.csv"), willow, FORWARD, "m")
    shuffled = sheet.sample(frac=1, random_state=3).assign(remark="text", score=np.inf)
    other = read_external(save(shuffled, tmp_path / "b.csv"), willow, FORWARD, "m")
    pd.testing.assert_frame_equal(plain.table.to_pandas(), other.table.to_pandas())
    assert np.isnan(plain.column("confidence")).all()


def test_confidence_is_kept(willow: PFWillow, tmp_path: Path) -> None:
    sheet = answer_sheet(willow)
    sheet["confidence"] = np.arange(len(sheet)) / 32
    sheet.loc[4, "confidence"] = NAN
    read = read_external(save(sheet, tmp_path / "a.csv"), willow, FORWARD, "m")
    assert read.column("confidence")[3] == 3 / 32
    assert np.isnan(read.column("confidence")[4])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_blank_answer_counts_as_wrong(ending: str, willow: PFWillow, tmp_path: Path) -> None:
    sheet = answer_sheet(willow)
    sheet.loc[[12, 17], ["x", "y"]] = NAN
    read = read_external(save(sheet, tmp_path / f"a.{ending}"), willow, FORWARD, "m")
    scored = score_pairs(read, get_protocol("canonical@1"), [100.0]).frame
    assert scored["n_none"].tolist() == [0, 2, 0]
    assert scored["pck-100.00"].tolist() == [10, 8, 10]


def test_pair_ids_that_look_like_numbers_or_nothing_survive_a_csv(tmp_path: Path) -> None:
    from tests.conftest import save_image

    for seed, name in enumerate("ab"):
        save_image(tmp_path / "own" / f"{name}.png", seed, 20, 30)
    sides = {"src": "a.png", "trg": "b.png", "src_kps": [[1, 2], [3, 4]]}
    ids = ["007", "7", "1e5", "NA", "null", "0x1f", "-0"]
    pairs = [sides | {"id": name, "trg_kps": [[k, 6], [7, 8]]} for k, name in enumerate(ids)]
    write_json(tmp_path / "own" / "pairs.json", pairs)
    dataset = FolderOfPairs(tmp_path / "own")
    assert dataset.ids == ids
    read = read_external(save(answer_sheet(dataset), tmp_path / "a.csv"), dataset, FORWARD, "m")
    assert read.column("pair")[::2].tolist() == ids
    np.testing.assert_array_equal(read.points("pred"), read.points("true"))


def _drop(column: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda sheet: sheet.drop(columns=column)


def _set(row: int, column: str, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(sheet: pd.DataFrame) -> pd.DataFrame:
        sheet = sheet.astype({column: object})
        sheet.loc[row, column] = value
        return sheet

    return change


def _pick(rows: slice | list[int]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda sheet: sheet.iloc[rows]


REFUSALS = {
    "missing column": (_drop("y"), r"lacks the column\(s\) y .*; it has 'pair', 'keypoint'"),
    "answered twice": (_pick([*range(30), 4, 5]), r"keypoint 4 is answered twice \(and 1 more\)"),
    "unknown pair": (_set(3, "pair", "elsewhere"), "pair elsewhere keypoint 3 is not in PF-WILLOW"),
    "blank pair": (_set(3, "pair", None), "pair  keypoint 3 is not in PF-WILLOW"),
    "unknown keypoint": (_set(3, "keypoint", 10), "keypoint 10 is not in PF-WILLOW test"),
    "negative keypoint": (_set(0, "keypoint", -1), "keypoint -1 is not in PF-WILLOW test"),
    "keypoint is a fraction": (_set(3, "keypoint", 0.5), "row 5: keypoint is 0.5, not"),
    "keypoint is blank": (_set(3, "keypoint", None), "row 5: keypoint is nan, not"),
    "incomplete": (_pick(slice(0, 28)), r"keypoint 8 has no answer .* \(and 1 more\)"),
    "no row": (_pick(slice(0, 0)), r"keypoint 0 has no answer .* \(and 29 more\)"),
    "infinite": (_set(7, "x", np.inf), "row 9: x is inf, not a finite number"),
    "minus infinite": (_set(7, "y", -np.inf), "row 9: y is -inf, not a finite number"),
    "beyond float32": (_set(7, "x", 1e39), r"row 9: x is 1e\+39, not a finite number"),
    "text": (_set(7, "x", "left"), "row 9: x is 'left', not a finite number"),
    "one coordinate": (_set(7, "x", None), "keypoint 7 has only one coordinate"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_bad_answers_are_refused_by_file_and_reason(
    change: Callable[[pd.DataFrame], pd.DataFrame], reason: str, willow: PFWillow, tmp_path: Path
) -> None:
    file = save(change(answer_sheet(willow)), tmp_path / "answers.csv")
    with pytest.raises(NemfError, match=reason) as refused:
        read_external(file, willow, FORWARD, "m")
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


def _swap(sheet: pd.DataFrame) -> pd.DataFrame:
    return sheet.assign(x=sheet["y"] + 1000, y=sheet["x"])


STRANGE = {
    "outside": (_swap, "30 of 30 answers lie outside their reference image, the first at"),
    "shares": (lambda sheet: sheet.assign(x=0.5, y=0.5), r"every answer lies within \(-1, 1\)"),
    "declined": (lambda s: s.assign(x=None, y=None), "none of 30 queries is answered"),
    "as they should be": (lambda sheet: sheet, None),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_answers_are_warned_of(
    name: str, willow: PFWillow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, said = STRANGE[name]
    file = save(change(answer_sheet(willow)), tmp_path / "answers.csv")
    predictions = read_external(file, willow, FORWARD, "m")
    caplog.clear()
    warn_of_strange_answers(predictions, "mine")
    assert [bool(re.search(said or "", r.message)) for r in caplog.records] == [True] * bool(said)


def test_answers_without_their_queries_are_taken_for_the_plans(
    willow: PFWillow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sheet = answer_sheet(willow).drop(columns=["query_x", "query_y"], errors="ignore")
    read_external(save(sheet, tmp_path / "answers.csv"), willow, FORWARD, "m")
    assert "holds no query_x, query_y" in caplog.text
    assert "src2trg" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("gone.csv", None, "no such file"),
        ("empty.csv", b"", "is empty; it needs the columns"),
        ("latin.csv", b"pair,keypoint,x,y\n\xff\xfe,0,1,2\n", "cannot be read as CSV or parquet"),
        ("ragged.csv", b"pair,keypoint\na,0\nb,1,2,3\n", "cannot be read as CSV or parquet"),
        ("text.parquet", b"pair,keypoint,x,y\n", "cannot be read as parquet"),
        ("header.csv", b"Pair,Keypoint,X,Y\n", r"lacks the column\(s\) pair, keypoint, x, y"),
    ],
)
def test_unreadable_answers_are_refused(
    name: str, content: bytes | None, reason: str, willow: PFWillow, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(NemfError, match=reason) as refused:
        read_external(file, willow, FORWARD, "m")
    assert str(refused.value).startswith(str(file))


def test_the_metadata_of_foreign_predictions_names_their_content(
    willow: PFWillow, tmp_path: Path
) -> None:
    sheet = answer_sheet(willow)
    keys = []
    for name, shift in (("a.csv", 0), ("b.csv", 0), ("c.csv", 1)):
        file = save(sheet.assign(x=sheet["x"] + shift), tmp_path / name)
        meta = read_external(file, willow, FORWARD, "m").meta
        assert json.loads(json.dumps(meta)) == meta
        assert meta["matcher"]["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        keys.append(meta["key"])
    assert keys[0] == keys[1] != keys[2]


def test_answers_to_the_other_directions_queries_are_refused(
    willow: PFWillow, tmp_path: Path
) -> None:
    table = query_list(willow, FORWARD).assign(x=1.0, y=1.0)
    table.to_csv(tmp_path / "a.csv", index=False)
    assert len(read_external(tmp_path / "a.csv", willow, FORWARD, "mine")) == len(table)
    with pytest.raises(NemfError, match=r"a\.csv: pair .* was asked at .*direction"):
        read_external(tmp_path / "a.csv", willow, BACKWARD, "mine")
