"""Score records: what one prediction file is worth under one protocol, and where it came from.

A record is a JSON file beside its predictions; tables, comparisons and MLflow are made from
records. It holds PCK at every alpha, per image and per point, over all pairs, per class and per
difficulty flag, each with its interval.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nemf.datasets.folder import NO_EXTENT
from nemf.errors import NemfError
from nemf.files import write_text
from nemf.geometry import snap_to_grid
from nemf.pairs import FLAGS
from nemf.predictions import FILE_NAME, Predictions
from nemf.reading import read_json
from nemf.scoring import Protocol, check_alphas, check_errors, correct, errors_px, lengths_px
from reports.statistics import dyadic_mean

log = logging.getLogger(__name__)

FORMAT = 1
_LARGEST = 1e300  # a JSON file may hold larger integers, which are no floats
LEVEL = 0.95


@dataclasses.dataclass(eq=False)
class PairScores:
    """Per-pair results under one protocol: what every mean, interval and comparison is made from.

    ``frame`` has one row per pair: ``pair``, ``category``, the flags, ``image_a``, ``image_b``
    (codes of the two images' content), ``n`` keypoints, ``n_none`` unanswered ones, and one column
    per alpha with the number of correct keypoints.
    """

    frame: pd.DataFrame
    alphas: tuple[float, ...]
    protocol: Protocol
    meta: dict[str, Any]


def keypoint_errors(
    predictions: Predictions, protocol: Protocol, *, oracle_grid: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Error and threshold length, float32 (R,) each, in the protocol's frame; +inf error = no
    answer. ``oracle_grid=G`` scores the truth snapped to a G x G grid of the reference image
    instead of the predictions: the ceiling of a method of that resolution.

    NemfError if the predictions were made under another plan than the protocol's, or lack boxes.
    """
    layout = predictions.meta["layout"]
    plan = protocol.plan.for_layout(layout)
    if predictions.plan != plan:
        raise NemfError(
            f"{predictions.origin}{protocol.id} scores predictions of plan {plan} on "
            f"{predictions.meta['title']}, but these were made under "
            f"{predictions.plan}: predict with --protocol {protocol.id}"
        )
    heights = predictions.column("reference_height")
    widths = predictions.column("reference_width")
    true = predictions.points("true")
    if oracle_grid is None:
        pred = predictions.points("pred")
    else:
        pred = np.empty_like(true)
        sizes = heights.astype(np.int64) << 32 | widths
        for size in np.unique(sizes):
            rows = sizes == size
            pred[rows] = snap_to_grid(true[rows], (size >> 32, size & 0xFFFFFFFF), oracle_grid)
    factors = protocol.frame.factors(heights, widths)
    error = errors_px(pred, true, factors)
    try:
        length = lengths_px(
            protocol.bases[layout],
            factors=factors,
            heights=heights,
            widths=widths,
            bbox=predictions.bbox("reference"),
            true=true,
            pair=predictions.column("pair_number"),
        )
    except NemfError as problem:
        raise NemfError(f"{predictions.origin}{problem}") from None
    if not (length > 0).all():
        row = int(np.argmin(length > 0))
        raise NemfError(
            f"{predictions.origin}pair {predictions.column('pair')[row]} has a "
            f"{protocol.bases[layout]} of {length[row]:g} px, which alpha cannot multiply: "
            f"{protocol.id} cannot score it{NO_EXTENT if layout == 'pfwillow' else ''}"
        )
    check_errors(error, length)
    return error, length


def score_pairs(
    predictions: Predictions,
    protocol: Protocol,
    alphas: Sequence[float] | None = None,
    *,
    oracle_grid: int | None = None,
) -> PairScores:
    """Scores a prediction file pair by pair. Errors as :func:`keypoint_errors`."""
    error, length = keypoint_errors(predictions, protocol, oracle_grid=oracle_grid)
    scores = pair_scores(predictions, protocol, error, length, alphas)
    if oracle_grid is not None:
        label = f"oracle-grid {oracle_grid}x{oracle_grid} (ceiling)"
        scores.meta["matcher"] = {"name": "oracle-grid", "label": label, "grid": oracle_grid}
    return scores


def pair_scores(
    predictions: Predictions,
    protocol: Protocol,
    error_px: np.ndarray,
    length_px: np.ndarray,
    alphas: Sequence[float] | None = None,
) -> PairScores:
    """Scores from :func:`keypoint_errors`, for callers that use the errors as well or change them
    (an error set to +inf makes a keypoint wrong at every alpha)."""
    chosen = check_alphas(alphas if alphas is not None else protocol.alphas)
    starts = predictions.pair_starts
    columns: dict[str, Any] = {}
    for name in ("pair", "category"):
        codes, texts = predictions.codes(name)
        columns[name] = pd.Categorical.from_codes(codes[starts], texts)
    for flag in FLAGS:
        columns[flag] = predictions.column(flag)[starts]
    columns["image_a"], columns["image_b"] = _image_codes(predictions, starts)
    columns["n"] = np.diff(np.r_[starts, len(error_px)])
    columns["n_none"] = np.add.reduceat(np.isinf(error_px).astype(np.int64), starts)
    for alpha in chosen:
        hits = correct(error_px, length_px, alpha, inclusive=protocol.inclusive)
        columns[alpha_name(alpha)] = np.add.reduceat(hits.astype(np.int64), starts)
    return PairScores(pd.DataFrame(columns), chosen, protocol, dict(predictions.meta))


def _image_codes(predictions: Predictions, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the query and the reference image's content, in one numbering for both."""
    query, query_texts = predictions.codes("query_hash")
    reference, reference_texts = predictions.codes("reference_hash")
    number = {text: i for i, text in enumerate(dict.fromkeys(query_texts + reference_texts))}
    remap = [np.array([number[t] for t in texts]) for texts in (query_texts, reference_texts)]
    return remap[0][query[starts]], remap[1][reference[starts]]


def groups(scores: PairScores) -> Iterator[tuple[str, str, np.ndarray]]:
    """(kind, value, row mask) for all pairs, every class, and every annotated flag value."""
    frame = scores.frame
    yield "all", "all", np.ones(len(frame), bool)
    codes = frame["category"].cat.codes.to_numpy()
    for category in sorted(frame["category"].unique()):
        yield "class", str(category), codes == frame["category"].cat.categories.get_loc(category)
    for flag in FLAGS:
        values = frame[flag].to_numpy()
        for value in np.unique(values[values >= 0]):
            yield flag, str(int(value)), values == value


def metrics(scores: PairScores, level: float = LEVEL) -> list[dict[str, Any]]:
    """One entry per group, averaging and alpha: mean, interval, numbers of pairs and images."""
    frame = scores.frame
    a, b, n = (frame[c].to_numpy() for c in ("image_a", "image_b", "n"))
    fractions = {alpha: frame[alpha_name(alpha)].to_numpy() / n for alpha in scores.alphas}
    entries = []
    for kind, value, rows in groups(scores):
        for averaging in ("image", "point"):
            weights = n[rows] if averaging == "point" else None
            for alpha in scores.alphas:
                estimate = dyadic_mean(
                    fractions[alpha][rows],
                    a[rows],
                    b[rows],
                    weights=weights,
                    level=level,
                    bounds=(0.0, 1.0),
                )
                entries.append(
                    {
                        "group": kind,
                        "value": value,
                        "averaging": averaging,
                        "alpha": alpha,
                        "pck": estimate.mean,
                        **{k: or_none(getattr(estimate, k)) for k in ("low", "high", "se")},
                        "n_pairs": int(rows.sum()),
                        "n_keypoints": int(n[rows].sum()),
                        "n_images": estimate.n_images,
                    }
                )
    return entries


def make_record(
    scores: PairScores, predictions_sha256: str, scored_by: dict[str, Any]
) -> dict[str, Any]:
    """The JSON record of one scoring: provenance of predictions and scoring code, and metrics."""
    protocol, frame = scores.protocol, scores.frame
    return {
        "format": FORMAT,
        "predictions": scores.meta,
        "predictions_sha256": predictions_sha256,
        "protocol": dataclasses.asdict(protocol)
        | {"id": protocol.id, "description": protocol.describe(scores.meta["layout"])},
        "alphas": list(scores.alphas),
        "level": LEVEL,
        "n_pairs": len(frame),
        "n_keypoints": int(frame["n"].sum()),
        "n_unanswered": int(frame["n_none"].sum()),
        "n_images": len(np.unique(np.r_[frame["image_a"], frame["image_b"]])),
        "scored_by": scored_by,
        "metrics": metrics(scores),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=1, allow_nan=False, default=_plain) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A record; NemfError if the file is none, of another format version or holds what no record
    can."""
    record = read_json(path, "a score record")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise NemfError(
            f"{path}: not a score record of format {FORMAT}; run `nemf score` "
            "again, or remove the file if it is none of the suite's"
        )
    problem = _record_problem(record)
    if problem is not None:
        raise NemfError(f"{path}: {problem}; run `nemf score` again")
    return record


def _record_problem(record: dict[str, Any]) -> str | None:
    """What tables would stumble over, or print although it cannot be."""
    made, protocol = record.get("predictions"), record.get("protocol")
    if not isinstance(made, dict) or not isinstance(made.get("matcher"), dict):
        return "it does not say whose predictions it scores"
    texts = [made.get(key) for key in ("dataset", "title", "split", "layout")]
    texts += [made["matcher"].get("label"), record.get("predictions_sha256")]
    if not isinstance(protocol, dict) or not all(map(_is_text, [*texts, protocol.get("id")])):
        return "it does not say what it scores under which protocol"
    alphas, entries = record.get("alphas"), record.get("metrics")
    if not isinstance(alphas, list) or not isinstance(entries, list):
        return "it holds no alphas or no metrics"
    for entry in entries:
        known = isinstance(entry, dict) and entry.get("averaging") in ("image", "point")
        if not known or not _is_text(entry.get("group")) or not _is_text(entry.get("value")):
            return "an entry of its metrics has no name"
        if not _is_number(entry.get("alpha")) or entry["alpha"] not in alphas:
            return f"its metrics have the alpha {entry.get('alpha')!r}"
        numbers = [entry[key] for key in ("low", "high", "se") if entry.get(key) is not None]
        if not all(map(_is_number, numbers)):
            return "an interval of its metrics is no number"
        if not _is_number(entry.get("pck")) or not 0 <= entry["pck"] <= 1:
            return f"its metrics have the PCK {entry.get('pck')!r}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST  # so not NaN either


def current_predictions(out: Path, row: str = "*") -> list[Path]:
    """The current, complete prediction files below an output folder, in a fixed order; of one
    ``row``'s folder, if given.

    Each lies in ``predictions/<label>/<dataset>/<plan>/<key>/``; ``current`` beside the key's
    folder names the key. Records lie in ``scores/`` beside the file. A ``current`` that names no
    prediction is warned of: its row is left out.
    """
    files = []
    for pointer in sorted((out / "predictions").glob(f"{row}/*/*/current")):
        key = pointer.read_bytes().decode(errors="replace").strip()
        file = pointer.parent / key / FILE_NAME
        if re.fullmatch(r"[\w-]+", key) and file.is_file():
            files.append(file)
        else:
            log.warning(
                "%s: names no prediction (%.40r), so its row is left out: predict it anew, or "
                "remove %s", pointer, key, pointer.parent,
            )  # fmt: skip
    return files


def current_records(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every record (path, content) beside the current prediction files. NemfError for a record of
    other predictions than the file's."""
    found = []
    for file in current_predictions(out):
        paths = sorted((file.parent / "scores").glob("*.json"))
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if paths else ""
        for path in paths:
            record = read_record(path)
            if record["predictions_sha256"] != digest:
                raise NemfError(f"{path}: scores other predictions than {file}; run `nemf score`")
            found.append((path, record))
    return found


def alpha_name(alpha: float) -> str:
    """Column and metric name of an alpha: two decimals at least, so that names sort well."""
    text = f"{alpha:.10f}".rstrip("0")
    decimals = max(2, len(text.partition(".")[2]))
    return f"pck-{alpha:.{decimals}f}"


def or_none(value: float) -> float | None:
    """JSON has no NaN: an interval that does not exist is null."""
    return None if np.isnan(value) else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")
