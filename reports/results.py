"""Result files: what one method reaches on one dataset under one protocol, to be passed on.

A score record made small and self-contained, as JSON with a published schema
(``schemas/result-1.json``, docs/leaderboard.md). Records hold more and are this suite's own;
results are for others to read, collect and rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, TypeChecker
from jsonschema.validators import extend

from nemf.errors import NemfError
from nemf.reading import read_json
from nemf.scoring import PROTOCOLS

FORMAT = "nemf-result@1"
SCHEMA_FILE = Path(__file__).parent / "schemas" / "result-1.json"
_KINDS = {"copy": "floor", "oracle-grid": "ceiling"}
_LONGEST = 200  # characters of a message that quotes a document
_SLACK = 1e-9  # intervals and means may differ by rounding
_MEAN_SLACK = 1e-3  # both sides may be rounded to a tenth of a percent


@cache
def schema() -> dict[str, Any]:
    return json.loads(SCHEMA_FILE.read_bytes())


def result_of(record: dict[str, Any], contact: str | None = None) -> dict[str, Any]:
    """The result of a score record (:func:`reports.records.make_record`). ``contact``: whom to ask
    about it. NemfError where the record has nothing that a result must have."""
    meta = record["predictions"]
    matcher, card = meta["matcher"], meta["matcher"].get("card", {})
    external = bool(matcher.get("external"))
    facts = meta.get("facts") or {}
    result = {
        "format": FORMAT,
        "method": {
            "name": matcher["name"],
            "label": matcher["label"],
            "paper": card.get("paper"),
            "year": card.get("year"),
            "arxiv": card.get("arxiv"),
            "backbone": matcher.get("config", {}).get("backbone") or card.get("backbone"),
            "training": card.get("training"),
            "kind": _KINDS.get(matcher["name"], "method"),
            "oracle_class": bool(card.get("oracle_class")),
            "random_weights": bool(matcher.get("random_weights")),
            "predicted": "elsewhere" if external else "here",
            "contact": contact,
        },
        "protocol": {
            "id": record["protocol"]["id"],
            "text": record["protocol"]["description"],
        },
        "dataset": {
            "name": meta["dataset"],
            **{key: meta[key] for key in ("title", "layout", "split", "fingerprint", "synthetic")},
            **{key: record[key] for key in ("n_pairs", "n_images", "n_keypoints", "n_unanswered")},
            "official_pairs": meta["official_pairs"],
        },
        "level": record["level"],
        "scores": [
            {
                "group": "all" if entry["group"] == "all" else f"class {entry['value']}",
                **{k: entry[k] for k in ("averaging", "alpha", "pck", "low", "high", "n_pairs")},
            }
            for entry in record["metrics"]
            if entry["group"] in ("all", "class")
        ],
        "provenance": {
            "predictions_sha256": record["predictions_sha256"],
            "weights_sha256": matcher.get("weights_sha256"),
            "seed": facts.get("seed"),
            "predicted_by": _code(None if external else meta.get("code")),
            "scored_by": _code(record["scored_by"]),
        },
    }
    wrong = result_problems(result)
    if wrong:
        raise NemfError(f"{matcher['label']!r} on {meta['title']} is no valid result: {wrong[0]}")
    return result


def _code(state: dict[str, Any] | None) -> dict[str, Any]:
    return {key: (state or {}).get(key) for key in ("commit", "dirty")}


def result_json(result: dict[str, Any]) -> str:
    """The text of a result file; equal results give equal bytes."""
    return json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_result(path: Path) -> dict[str, Any]:
    """A valid result. NemfError naming the file and what is wrong with it."""
    result = read_json(path, "a result")
    wrong = result_problems(result)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise NemfError(f"{path}: no valid {FORMAT}: {wrong[0]}{more}")
    return result


def result_problems(result: Any) -> list[str]:
    """What the schema refuses, or, where it fits, what contradicts itself or this version's
    protocols; one line each, empty if the result is valid."""
    return list(_misfits(result)) or list(_contradictions(result))


def _misfits(result: Any) -> Iterator[str]:
    for error in _validator().iter_errors(result):
        place = error.json_path.removeprefix("$").removeprefix(".") or "the document"
        text = error.message
        yield f"{place}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}"


@cache
def _validator() -> Draft202012Validator:
    """Of the schema, but that NaN and infinity, which Python reads from JSON, are no numbers."""
    numbers = Draft202012Validator.TYPE_CHECKER.redefine("number", _is_number)
    strict = extend(Draft202012Validator, type_checker=numbers)
    return strict(schema())


def _is_number(checker: TypeChecker, value: Any) -> bool:
    return Draft202012Validator.TYPE_CHECKER.is_type(value, "number") and math.isfinite(value)


def _contradictions(result: dict[str, Any]) -> Iterator[str]:
    protocol, dataset, scores = result["protocol"], result["dataset"], result["scores"]
    known = PROTOCOLS.get(protocol["id"])
    if known is None:
        yield f"protocol.id: unknown {protocol['id']}; known are {', '.join(PROTOCOLS)}"
    elif protocol["text"] != known.describe(dataset["layout"]):
        yield (
            f"protocol.text: {protocol['id']} is {known.describe(dataset['layout'])!r} on this "
            f"layout, not {protocol['text']!r}"
        )
    official = dataset["official_pairs"]
    if official is not None and dataset["n_pairs"] > official:
        yield f"dataset.n_pairs: {dataset['n_pairs']} of {official} official pairs"
    if dataset["synthetic"] and official is not None:
        yield "dataset.official_pairs: a synthetic dataset has no official size"
    if dataset["n_unanswered"] > dataset["n_keypoints"]:
        yield "dataset.n_unanswered: more than there are keypoints"
    if dataset["n_keypoints"] < dataset["n_pairs"]:
        yield (
            f"dataset.n_keypoints: {dataset['n_keypoints']}, but every one of {dataset['n_pairs']} "
            "pairs has at least one"
        )
    seen: dict[tuple[Any, ...], int] = {}
    for number, entry in enumerate(scores):
        at = f"scores[{number}]"
        key = entry["group"], entry["averaging"], entry["alpha"]
        if key in seen:
            yield f"{at}: the same group, averaging and alpha as scores[{seen[key]}]"
        seen[key] = number
        low, high = entry["low"], entry["high"]
        if (low is None) != (high is None):
            yield f"{at}: low and high must both be numbers or both null"
        elif low is not None and not low - _SLACK <= entry["pck"] <= high + _SLACK:
            yield f"{at}: pck {entry['pck']} lies outside [{low}, {high}]"
        if entry["group"] == "all" and entry["n_pairs"] != dataset["n_pairs"]:
            yield f"{at}: {entry['n_pairs']} pairs, but dataset.n_pairs is {dataset['n_pairs']}"
        if entry["n_pairs"] > dataset["n_pairs"]:
            yield f"{at}: {entry['n_pairs']} pairs of {dataset['n_pairs']}"
    yield from _falling(scores)
    yield from _other_means(scores, dataset["n_pairs"])
    if not any(group == "all" for group, _, _ in seen):
        yield "scores: none over all pairs (group all)"
    for group, averaging, alpha in seen:
        if ("all", averaging, alpha) not in seen:
            yield f"scores: {group} at {alpha:g} per {averaging}, but not all pairs"


def _falling(scores: list[dict[str, Any]]) -> Iterator[str]:
    """A larger alpha accepts every keypoint that a smaller one does."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in sorted(scores, key=lambda entry: entry["alpha"]):
        key = entry["group"], entry["averaging"]
        before = last.setdefault(key, entry)
        if entry["pck"] < before["pck"] - _SLACK:
            yield (
                f"scores: {entry['group']} per {entry['averaging']} falls from pck "
                f"{before['pck']} at {before['alpha']:g} to {entry['pck']} at {entry['alpha']:g}"
            )
        last[key] = entry


def _other_means(scores: list[dict[str, Any]], n_pairs: int) -> Iterator[str]:
    """Per image, the mean over all pairs is that of the classes, weighted by their pairs."""
    classes: dict[float, dict[str, dict[str, Any]]] = {}
    for entry in scores:
        if entry["averaging"] == "image" and entry["group"] != "all":
            classes.setdefault(entry["alpha"], {})[entry["group"]] = entry
    for number, entry in enumerate(scores):
        parts = classes.get(entry["alpha"], {}).values()
        whole = entry["group"] == "all" and entry["averaging"] == "image"
        if not whole or sum(part["n_pairs"] for part in parts) != n_pairs:
            continue
        mean = sum(part["pck"] * part["n_pairs"] for part in parts) / n_pairs
        if abs(mean - entry["pck"]) > _MEAN_SLACK:
            yield f"scores[{number}]: pck {entry['pck']}, but its classes' mean is {mean:.6f}"
