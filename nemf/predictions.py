"""Prediction files: one row per keypoint, with everything that scoring needs. Torch-free.

A file holds queries, predictions and truth in original pixels, sizes, boxes, difficulty flags and
all annotated keypoints of both images, so it serves every rule of its plan without a network. Its
schema metadata (key ``nemf``, JSON) says how the predictions came about. Files are written under a
temporary name and renamed, so a file that exists is complete.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemf.errors import NemfError
from nemf.files import write_whole
from nemf.pairs import FLAGS, Layout, OrientedPair, Plan
from nemf.reading import read_parquet, read_within

if TYPE_CHECKING:
    from nemf.datasets.index import PairDataset

log = logging.getLogger(__name__)

FORMAT = 1
FILE_NAME = "predictions.parquet"
_TEXT = pa.dictionary(pa.int32(), pa.string())
_POINTS = pa.list_(pa.float32())
_BOX = ("x1", "y1", "x2", "y2")
_BLANK = ("", "nan", "NaN", "NA", "None", "null")
_ANSWER_COLUMNS = ("pair", "keypoint", "x", "y", "confidence", "query_x", "query_y")
_MANY_OUTSIDE = 0.1  # more than any matcher that reads its frame aright
_LARGEST = float(np.finfo(np.float32).max)

SCHEMA = pa.schema(
    [
        ("pair", _TEXT),
        ("pair_number", pa.int32()),
        ("category", _TEXT),
        ("keypoint", pa.int16()),
        ("kp_name", _TEXT),
        *((f"{what}_{axis}", pa.float32()) for what in ("query", "pred", "true") for axis in "xy"),
        ("confidence", pa.float32()),
        *((f"{side}_image", _TEXT) for side in ("query", "reference")),
        *((f"{side}_hash", _TEXT) for side in ("query", "reference")),
        *((f"{s}_{d}", pa.int32()) for s in ("query", "reference") for d in ("height", "width")),
        *((f"{s}_bbox_{v}", pa.float32()) for s in ("query", "reference") for v in _BOX),
        *((flag, pa.int8()) for flag in FLAGS),
        *((f"{side}_annotated", _POINTS) for side in ("query", "reference")),
    ]
)


_TEXT_COLUMNS = [field.name for field in SCHEMA if field.type == _TEXT]
_META_TEXTS = ("dataset", "title", "split", "layout", "plan")
_SIZES = tuple(f"{side}_{d}" for side in ("query", "reference") for d in ("height", "width"))
_MAY_BE_NAN = ("pred_x", "pred_y", "confidence", *(n for n in SCHEMA.names if "_bbox_" in n))


@dataclass(eq=False)
class Predictions:
    """The content of a prediction file: an Arrow table of :data:`SCHEMA` and its metadata.

    Columns (R rows, the rows of a pair adjacent, pairs in dataset order): ``pair`` id,
    ``pair_number`` position in the dataset, ``category``, ``keypoint`` number within the pair,
    ``kp_name``; ``query_x/y``, ``pred_x/y`` (NaN = no answer), ``true_x/y`` float32 px;
    ``confidence`` (NaN = none); per side ``*_image``, ``*_hash``, ``*_height``, ``*_width``,
    ``*_bbox_*`` (NaN = none), ``*_annotated`` (flattened x, y of every annotated keypoint); flags.
    ``origin``: begins messages about the content: the file it was read from and a colon, or empty.
    """

    table: pa.Table
    meta: dict[str, Any]
    origin: str = ""

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """A column as a NumPy array (texts as objects)."""
        return self.table[name].to_numpy()

    def points(self, what: str) -> np.ndarray:
        """float32 (R, 2) of "query", "pred" or "true" points, px of their original image."""
        return np.stack([self.column(f"{what}_x"), self.column(f"{what}_y")], 1)

    def bbox(self, side: str) -> np.ndarray:
        """float32 (R, 4) xyxy px boxes of the "query" or "reference" image, NaN = none."""
        return np.stack([self.column(f"{side}_bbox_{v}") for v in _BOX], 1)

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Integer codes (R,) and the distinct texts of a text column."""
        encoded = self.table[name].combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = pa.chunked_array(encoded).combine_chunks()
        return encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()

    @cached_property
    def pair_starts(self) -> np.ndarray:
        """Row at which each pair begins."""
        number = self.column("pair_number")
        return np.flatnonzero(np.r_[True, number[1:] != number[:-1]]) if len(number) else number

    @property
    def plan(self) -> Plan:
        return Plan.parse(self.meta["plan"])

    @classmethod
    def read(cls, path: Path, columns: Sequence[str] | None = None) -> Predictions:
        """Reads a prediction file (optionally some columns). NemfError if it is none, or holds what
        no prediction file can."""
        try:
            table = read_parquet(path, columns, _TEXT_COLUMNS)
        except FileNotFoundError:
            raise NemfError(f"{path}: no such prediction file") from None
        except NemfError as problem:
            if "cannot be read as parquet" not in str(problem):
                raise
            raise NemfError(f"{problem}; predict anew, or remove it") from None
        text = (table.schema.metadata or {}).get(b"nemf")
        if text is None:
            raise NemfError(
                f"{path}: not a prediction file of this suite; predictions made elsewhere need "
                "--dataset and --name (see docs/predictions.md)"
            )
        try:
            meta = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            raise NemfError(f"{path}: its metadata is damaged; predict anew") from None
        if meta.get("format") != FORMAT:
            raise NemfError(f"{path}: has format {meta.get('format')}, this version reads {FORMAT}")
        missing = [n for n in (columns or SCHEMA.names) if n not in table.column_names]
        if missing:
            raise NemfError(f"{path}: lacks the columns {', '.join(missing)}; predict anew")
        if not table.num_rows:
            raise NemfError(f"{path}: holds no prediction")
        for problem in (*_meta_problems(meta), *_column_problems(table)):
            raise NemfError(f"{path}: {problem}; predict anew")
        return cls(table, meta, f"{path}: ")

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all. NemfError naming the path if that fails."""
        meta = {b"nemf": json.dumps(self.meta, sort_keys=True).encode()}
        table = self.table.combine_chunks().replace_schema_metadata(meta)
        write_whole(
            path,
            lambda file: pq.write_table(table, file, compression="zstd", write_page_checksum=True),
        )


def _meta_problems(meta: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the metadata that scoring relies on."""
    for key in _META_TEXTS:
        if not isinstance(meta.get(key), str):
            yield f"its metadata give the {key} {meta.get(key)!r}"
            return
    if meta["layout"] not in get_args(Layout):
        yield f"its metadata give the layout {meta['layout']!r}"
    try:
        Plan.parse(meta["plan"])
    except ValueError as problem:
        yield f"its metadata give a plan: {problem}"
    if not isinstance(meta.get("synthetic"), bool) or not isinstance(meta.get("matcher"), dict):
        yield "its metadata do not say who predicted what"


def _column_problems(table: pa.Table) -> Iterator[str]:
    """What is wrong with the columns that were read: types, gaps, numbers that cannot be."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name not in SCHEMA.names:
            continue
        wanted = SCHEMA.field(name).type
        if column.type != wanted:
            yield f"its column {name} holds {column.type}, not {wanted}"
            return
        if column.null_count:
            yield f"its column {name} has gaps"
            return
        if wanted == _TEXT:
            continue
        values = pc.list_flatten(column).to_numpy() if wanted == _POINTS else column.to_numpy()
        if np.isinf(values).any() or (name not in _MAY_BE_NAN and np.isnan(values).any()):
            yield f"its column {name} holds numbers that are not finite"
        elif wanted == _POINTS and (pc.list_value_length(column).to_numpy() % 2).any():
            yield f"its column {name} holds half a point"
        elif name in _SIZES and (values < 1).any():
            yield f"its column {name} holds the size {values.min()}"
        elif name in ("pair_number", "keypoint") and (values < 0).any():
            yield f"its column {name} counts {values.min()}"
        elif name == "pair_number" and (np.diff(values) < 0).any():
            yield "the rows of its pairs are not in order"
        elif name in FLAGS and (values < -1).any():
            yield f"its column {name} holds the flag {values.min()}"


def prediction_table(
    numbered: Iterable[tuple[int, OrientedPair, np.ndarray, np.ndarray | None]],
) -> pa.Table:
    """The rows of some pairs: tuples of (position in the dataset, pair, predicted points float32
    (N, 2) px, confidence (N,) or None), in order."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for number, oriented, points, confidence in numbered:
        for name, values in _pair_rows(number, oriented, points, confidence).items():
            columns[name].append(values)
    arrays = []
    for field in SCHEMA:
        parts = columns[field.name]
        if field.type == _TEXT:
            flat = [text for part in parts for text in part]
            arrays.append(pa.array(flat, pa.string()).dictionary_encode().cast(_TEXT))
        elif field.type == _POINTS:
            arrays.append(pa.array([points for part in parts for points in part], _POINTS))
        else:
            flat = np.concatenate(parts) if parts else np.zeros(0)
            arrays.append(pa.array(flat.astype(field.type.to_pandas_dtype()), field.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _pair_rows(
    number: int, oriented: OrientedPair, points: np.ndarray, confidence: np.ndarray | None
) -> dict[str, Any]:
    pair, n = oriented.pair, len(oriented.query_kps)
    if points.shape != (n, 2):
        raise ValueError(f"pair {pair.id}: {n} queries but answers of shape {points.shape}")
    rows: dict[str, Any] = {
        "pair": [pair.id] * n,
        "pair_number": np.full(n, number),
        "category": [pair.category] * n,
        "keypoint": np.arange(n),
        "kp_name": list(pair.kp_names),
        "confidence": np.full(n, np.nan) if confidence is None else confidence,
    }
    sides = (("query", oriented.query_kps), ("pred", points), ("true", oriented.reference_kps))
    for what, values in sides:
        rows[f"{what}_x"], rows[f"{what}_y"] = values[:, 0], values[:, 1]
    for side in ("query", "reference"):
        record, box = getattr(oriented, side), getattr(oriented, f"{side}_bbox")
        rows[f"{side}_image"], rows[f"{side}_hash"] = [record.name] * n, [record.hash] * n
        rows[f"{side}_height"] = np.full(n, record.size[0])
        rows[f"{side}_width"] = np.full(n, record.size[1])
        for k, v in enumerate(_BOX):
            rows[f"{side}_bbox_{v}"] = np.full(n, np.nan if box is None else box[k])
        rows[f"{side}_annotated"] = [record.kps.ravel()] * n
    for flag in FLAGS:
        rows[flag] = np.full(n, pair.flags.get(flag, -1))
    return rows


def dataset_meta(dataset: PairDataset, plan: Plan) -> dict[str, Any]:
    """The part of a file's metadata that the dataset and the plan determine."""
    return {
        "format": FORMAT,
        "dataset": dataset.name,
        "title": dataset.title,
        "split": dataset.split,
        "layout": dataset.layout,
        "fingerprint": dataset.fingerprint,
        "synthetic": dataset.synthetic,
        "n_pairs": len(dataset),
        "official_pairs": dataset.official_pairs,
        "plan": str(plan.for_layout(dataset.layout)),
    }


def dataset_folder(meta: Mapping[str, Any]) -> str:
    """The folder of a dataset's predictions, from a file's metadata: ``spair-test-synthetic``."""
    return f"{meta['dataset']}-{meta['split']}" + ("-synthetic" if meta["synthetic"] else "")


# -- predictions made elsewhere -----------------------------------------------------------------


def query_list(dataset: PairDataset, plan: Plan) -> pd.DataFrame:
    """The questions of a dataset, for methods outside this suite: one row per keypoint with
    ``pair``, ``keypoint``, both image paths relative to the dataset's folder, ``query_x``,
    ``query_y`` (px). Answers go into columns ``x`` and ``y`` (see :func:`read_external`)."""
    rows = []
    for oriented in _oriented(dataset, plan):
        for number, (x, y) in enumerate(oriented.query_kps.tolist()):
            paths = [
                os.path.relpath(r.path, dataset.folder)
                for r in (oriented.query, oriented.reference)
            ]
            rows.append((oriented.pair.id, number, *paths, x, y))
    names = ["pair", "keypoint", "query_image", "reference_image", "query_x", "query_y"]
    return pd.DataFrame(rows, columns=names)


def read_external(path: Path, dataset: PairDataset, plan: Plan, name: str) -> Predictions:
    """Predictions made elsewhere, joined with the dataset they are for.

    ``path``: CSV or parquet with one row per keypoint and the columns ``pair`` (id), ``keypoint``
    (number within the pair, from 0), ``x``, ``y`` (px of the original reference image; both empty
    or NaN = no answer) and optionally ``confidence``. Columns ``query_x``, ``query_y`` (as in the
    query list) are checked: they catch answers to the other direction's queries. Further columns
    are ignored. Every keypoint of every pair must be answered exactly once. NemfError says what is
    missing or foreign.
    """
    table = _read_answers(path)
    queries = query_list(dataset, plan)
    known = pd.MultiIndex.from_frame(queries[["pair", "keypoint"]])
    given = pd.MultiIndex.from_frame(table[["pair", "keypoint"]])
    _refuse(path, given[given.duplicated()], "is answered twice")
    _refuse(path, given.difference(known), f"is not in {dataset.title} {dataset.split}")
    _refuse(path, known.difference(given), "has no answer (leave x and y empty to decline one)")
    answers = table.set_index(given).reindex(known)
    _check_queries(path, answers, queries, plan)
    points = answers[["x", "y"]].to_numpy(np.float32)
    half = np.isnan(points).sum(1) == 1
    if half.any():
        raise NemfError(f"{path}: {_label(known[int(np.argmax(half))])} has only one coordinate")
    confidence = answers["confidence"].to_numpy(np.float32) if "confidence" in answers else None
    content = hashlib.sha256(path.read_bytes()).hexdigest()

    def rows() -> Iterator[tuple[int, OrientedPair, np.ndarray, np.ndarray | None]]:
        start = 0
        for number, oriented in enumerate(_oriented(dataset, plan)):
            stop = start + len(oriented.query_kps)
            part = None if confidence is None else confidence[start:stop]
            yield number, oriented, points[start:stop], part
            start = stop

    matcher = {"name": name, "label": name, "external": True, "file_sha256": content}
    meta = dataset_meta(dataset, plan)
    key = hashlib.sha256(f"{content} {json.dumps(meta, sort_keys=True)}".encode()).hexdigest()[:24]
    meta |= {"matcher": matcher, "code": None, "key": key}
    return Predictions(prediction_table(rows()), meta, f"{path}: ")


def warn_of_strange_answers(predictions: Predictions, what: str) -> None:
    """Warns where answers look like a mistake of frame or axes: a number would come of them."""
    points = predictions.points("pred")
    answered = ~np.isnan(points).any(1)
    if not answered.any():
        log.warning("%s: none of %d queries is answered; all count as wrong", what, len(points))
        return
    sizes = [predictions.column(f"reference_{d}") for d in ("width", "height")]
    size, points = np.stack(sizes, 1)[answered], points[answered]
    if (np.abs(points) <= 1).all():
        log.warning("%s: every answer lies within (-1, 1): px are meant, not shares", what)
    outside = ((points < -0.5) | (points > size - 0.5)).any(1)
    if outside.mean() > _MANY_OUTSIDE:
        first = int(np.argmax(outside))
        log.warning(
            "%s: %d of %d answers lie outside their reference image, the first at (%g, %g) of one "
            "%d wide and %d high; (x, y) px of the original image are meant",
            what, outside.sum(), len(points), *points[first], *size[first],
        )  # fmt: skip


def _check_queries(path: Path, answers: pd.DataFrame, queries: pd.DataFrame, plan: Plan) -> None:
    """NemfError if the file repeats queries that are not the dataset's."""
    if not {"query_x", "query_y"} <= set(answers.columns):
        log.warning(
            "%s: holds no query_x, query_y, so its answers cannot be told from those to the other "
            "direction's queries; they are taken to be %s", path, plan.direction,
        )  # fmt: skip
        return
    names = ["query_x", "query_y"]
    given = answers[names].apply(_numeric).to_numpy()
    asked = queries[names].to_numpy()
    wrong = ~(np.abs(given - asked) <= 0.01).all(1)
    if wrong.any():
        row = int(np.argmax(wrong))
        label = _label((queries["pair"].iloc[row], int(queries["keypoint"].iloc[row])))
        raise NemfError(
            f"{path}: {label} was asked at ({asked[row][0]:g}, {asked[row][1]:g}), the file says "
            f"({given[row][0]:g}, {given[row][1]:g}); is it for another --protocol's direction?"
        )


def _oriented(dataset: PairDataset, plan: Plan) -> Iterator[OrientedPair]:
    plan = plan.for_layout(dataset.layout)
    return (pair.oriented(plan) for pair in dataset)


def _read_answers(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            table = _answers_from(read_parquet(path, _ANSWER_COLUMNS, ["pair"]), path)
        else:
            text = read_within(path).decode("utf-8")
            if not text.strip():
                raise NemfError(f"{path}: is empty; it needs the columns pair, keypoint, x, y")
            header = next(csv.reader(io.StringIO(text, newline="")), [])
            if len(set(header)) < len(header):
                raise NemfError(f"{path}: two columns of its header have one name")
            blank = dict.fromkeys(("keypoint", "x", "y", "confidence"), _BLANK)
            table = pd.read_csv(  # "NA" and "007" are names of pairs like any other
                io.StringIO(text), dtype={"pair": str}, keep_default_na=False, na_values=blank
            )
    except FileNotFoundError:
        raise NemfError(f"{path}: no such file") from None
    except NemfError:
        raise
    except (OSError, ValueError, OverflowError, csv.Error, pa.ArrowException) as problem:
        raise NemfError(f"{path}: cannot be read as CSV or parquet ({problem})") from None
    missing = [c for c in ("pair", "keypoint", "x", "y") if c not in table.columns]
    if missing:
        has = ", ".join(map(repr, table.columns[:8])) or "none"
        raise NemfError(
            f"{path}: lacks the column(s) {', '.join(missing)} (needs pair, keypoint, x, y, "
            f"separated by commas in CSV); it has {has}"
        )
    table = table.copy()
    table["pair"] = table["pair"].astype(str)
    for column in [c for c in ("keypoint", "x", "y", "confidence") if c in table.columns]:
        if table[column].dtype == bool:  # to_numeric would make ones and zeros of it
            raise NemfError(f"{path}: {column} holds true and false, not numbers")
        numbers = _numeric(table[column])
        bad = (numbers.isna() & table[column].notna()) | (numbers.abs() > _LARGEST)
        if column == "keypoint":
            bad |= numbers.isna() | (numbers % 1 != 0)
        if bad.any():
            row = int(np.argmax(bad.to_numpy()))
            value = table[column].iloc[row]
            shown = repr(value) if isinstance(value, str) else value
            raise NemfError(f"{path} row {row + 2}: {column} is {shown}, not a finite number")
        table[column] = numbers
    table["keypoint"] = table["keypoint"].astype(int)
    return table


def _numeric(column: pd.Series) -> pd.Series:
    """A column as numbers, NaN where there is none; pandas would take True for one, and fail at an
    integer that is too large."""
    if column.dtype == object:
        column = column.map(lambda cell: cell if isinstance(cell, float) else str(cell))
    return pd.to_numeric(column, errors="coerce")


def _answers_from(table: pa.Table, path: Path) -> pd.DataFrame:
    """The columns of answers in a parquet file. NemfError for columns that are no such thing:
    pandas would make numbers of dates."""
    for name in table.column_names:
        kind = table.schema.field(name).type
        text = pa.types.is_dictionary(kind) or pa.types.is_string(kind)
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not number and not text:
            raise NemfError(f"{path}: its column {name} holds {kind}, not numbers")
    return table.to_pandas(ignore_metadata=True)


def _refuse(path: Path, offending: pd.MultiIndex, what: str) -> None:
    if len(offending):
        more = f" (and {len(offending) - 1} more)" if len(offending) > 1 else ""
        raise NemfError(f"{path}: {_label(offending[0])} {what}{more}")


def _label(entry: tuple[str, int]) -> str:
    return f"pair {entry[0]} keypoint {entry[1]}"
