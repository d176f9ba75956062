"""Result files: what a record becomes, what the schema and the cross-checks refuse."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from nemf.errors import NemfError
from nemf.scoring import PROTOCOLS, get_protocol
from reports.records import make_record, score_pairs
from reports.results import read_result, result_json, result_of, result_problems, schema
from tests.test_records import three_pairs

CODE = {"commit": "c" * 40, "dirty": True}


def result(
    label: str = "mine",
    pck: float = 0.5,
    protocol: str = "canonical@1",
    averaging: str = "image",
    *,
    method: dict[str, Any] | None = None,
    **dataset: Any,
) -> dict[str, Any]:
    """A valid result by hand; ``dataset`` and ``method`` override entries of these parts."""
    data = {
        "name": "spair", "title": "SPair-71k", "layout": "spair", "split": "test",
        "fingerprint": "f" * 64, "synthetic": False, "n_pairs": 12234, "n_images": 500,
        "n_keypoints": 90000, "n_unanswered": 3, "official_pairs": 12234,
    } | dataset  # fmt: skip
    scores = [
        {
            "group": group, "averaging": averaging, "alpha": alpha, "pck": pck,
            "low": max(pck - 0.1, 0), "high": min(pck + 0.1, 1), "n_pairs": n,
        }
        for alpha in (0.05, 0.1)
        for group, n in (("all", data["n_pairs"]), ("class cat", 1))
    ]  # fmt: skip
    return {
        "format": "nemf-result@1",
        "method": {"name": "mine", "label": label, "paper": None} | (method or {}),
        "protocol": {"id": protocol, "text": PROTOCOLS[protocol].describe(data["layout"])},
        "dataset": data,
        "level": 0.95,
        "scores": scores,
        "provenance": {
            "predictions_sha256": hashlib.sha256(label.encode()).hexdigest(),
            "weights_sha256": None,
            "predicted_by": {"commit": None, "dirty": None},
            "scored_by": dict(CODE),
        },
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    """The valid result with one entry replaced (``del``: taken away)."""
    document: Any = result()
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    node = document
    for part in parents:
        node = node[part]
    if value == "del":
        del node[last]
    else:
        node[last] = value
    return document


def _one_pair(pck_of_all: float) -> dict[str, Any]:
    """A result whose one class holds all pairs, so that both have one mean."""
    document = result(n_pairs=1, official_pairs=None)
    for entry in document["scores"]:
        if entry["group"] == "all":
            entry["pck"] = pck_of_all
    return document


def record() -> dict[str, Any]:
    scores = score_pairs(three_pairs(), get_protocol("canonical@1"), (0.05, 0.1))
    return make_record(scores, "d" * 64, CODE)


def test_a_record_becomes_a_result_with_its_numbers() -> None:
    made = result_of(record(), contact="A. Author")
    assert result_problems(made) == []
    assert made["method"]["contact"] == "A. Author"
    assert made["protocol"]["id"] == "canonical@1"
    assert made["dataset"]["n_pairs"] == 3
    assert made["dataset"]["n_unanswered"] == 1
    assert made["provenance"]["scored_by"] == CODE
    at = {(s["group"], s["averaging"], s["alpha"]): s for s in made["scores"]}
    assert at["all", "image", 0.1]["pck"] == pytest.approx((3 / 4 + 0 + 1) / 3)  # by hand
    assert at["all", "point", 0.1]["pck"] == pytest.approx(4 / 7)
    assert at["class dog", "image", 0.05]["pck"] == 0
    assert len(at) == 3 * 2 * 2  # all, cat, dog; two averagings; two alphas: no flags
    kept = next(e for e in record()["metrics"] if e["group"] == "all" and e["alpha"] == 0.1)
    assert at["all", "image", 0.1]["low"] == kept["low"]


def test_a_ceiling_and_an_external_method_are_named_so() -> None:
    source = record()
    source["predictions"]["matcher"] = {"name": "oracle-grid", "label": "grid"}
    assert result_of(source)["method"]["kind"] == "ceiling"
    source["predictions"]["matcher"] = {"name": "x", "label": "x", "external": True}
    source["predictions"]["code"] = CODE  # of who adopted it, not of who predicted
    made = result_of(source)
    assert made["method"]["predicted"] == "elsewhere"
    assert made["provenance"]["predicted_by"] == {"commit": None, "dirty": None}


def test_files_round_trip_and_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    made = result_of(record())
    path = tmp_path / "a.json"
    path.write_text(result_json(made), encoding="utf-8")
    assert read_result(path) == made
    assert result_json(read_result(path)) == result_json(made)


def test_a_record_without_what_a_result_needs_is_refused() -> None:
    source = record()
    source["predictions"]["fingerprint"] = "short"
    with pytest.raises(NemfError, match=r"'hand' on spair is no valid result: dataset.fingerprint"):
        result_of(source)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other format": (changed("format", "nemf-result@2"), "format: 'nemf-result@1' was expected"),
    "method missing": (changed("method", "del"), "the document: 'method' is a required property"),
    "unknown entry": (
        changed("method.rank", 1),
        "method: Additional properties are not allowed ('rank'",
    ),
    "percent": (changed("scores.0.pck", 50), "scores[0].pck: 50 is greater than the maximum of 1"),
    "nan": (changed("scores.0.pck", float("nan")), "scores[0].pck: nan is not of type 'number'"),
    "text for a number": (
        changed("scores.0.pck", "0.5"),
        "scores[0].pck: '0.5' is not of type 'number'",
    ),
    "true for a number": (
        changed("dataset.n_pairs", True),
        "n_pairs: True is not of type 'integer'",
    ),
    "no scores": (changed("scores", []), "scores: [] should be non-empty"),
    "short hash": (
        changed("dataset.fingerprint", "ab"),
        "dataset.fingerprint: 'ab' does not match",
    ),
    "odd averaging": (
        changed("scores.1.averaging", "class"),
        "'class' is not one of ['image', 'point']",
    ),
    "alpha 0": (
        changed("scores.0.alpha", 0),
        "scores[0].alpha: 0 is less than or equal to the minimum",
    ),
    "address as arXiv": (
        changed("method.arxiv", "http://x"),
        "method.arxiv: 'http://x' does not match",
    ),
    "empty label": (changed("method.label", ""), "method.label: '' should be non-empty"),
    "list": ([], "the document: [] is not of type 'object'"),
    "unknown protocol": (changed("protocol.id", "own@1"), "protocol.id: unknown own@1; known"),
    "other text": (changed("protocol.text", "as we like"), "protocol.text: canonical@1 is"),
    "too many pairs": (result(n_pairs=12235), "dataset.n_pairs: 12235 of 12234"),
    "official synthetic": (result(synthetic=True), "a synthetic dataset has no official size"),
    "unanswered": (changed("dataset.n_unanswered", 90001), "more than there are keypoints"),
    "pairs without keypoints": (
        changed("dataset.n_keypoints", 12233),
        "dataset.n_keypoints: 12233, but every one of 12234 pairs",
    ),
    "falls": (
        changed("scores.2.pck", 0.45),
        "scores: all per image falls from pck 0.5 at 0.05 to 0.45 at 0.1",
    ),
    "not the mean of its classes": (
        _one_pair(pck_of_all=0.51),
        "scores[0]: pck 0.51, but its classes' mean is 0.500000",
    ),
    "half an interval": (changed("scores.0.low", None), "scores[0]: low and high must both"),
    "outside": (changed("scores.0.low", 0.55), "scores[0]: pck 0.5 lies outside [0.55, 0.6]"),
    "twice": (changed("scores.3.alpha", 0.05), "scores[3]: the same group, averaging and alpha"),
    "other pairs": (changed("scores.0.n_pairs", 7), "scores[0]: 7 pairs, but dataset.n_pairs"),
    "class beyond": (changed("scores.1.n_pairs", 99999), "scores[1]: 99999 pairs of 12234"),
    "class alone": (changed("scores.0", "del"), "class cat at 0.05 per image, but not all pairs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, tmp_path: Path) -> None:
    document, reason = WRONG[name]
    assert any(reason in line for line in result_problems(document)), result_problems(document)
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(document))
    with pytest.raises(NemfError, match=r"wrong\.json: no valid nemf-result@1: "):
        read_result(path)


def test_the_valid_one_is_valid() -> None:
    assert result_problems(result()) == []
    assert result_problems(changed("scores.0.high", 0.5)) == []  # an interval may end at the mean


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"{", "cannot be read as a result"), (b'{"format": 1, "format": 2}', "twice"),
     (b"\xff\xfe", "cannot be read"), (b"[" * 100_000, "cannot be read"), (b"", "cannot be read")],
)  # fmt: skip
def test_no_json_is_refused_by_name(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(NemfError, match=reason) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


# -- the schema -----------------------------------------------------------------------------------


def test_the_schema_is_valid_and_every_entry_closed() -> None:
    Draft202012Validator.check_schema(schema())

    def objects(node: Any) -> list[dict[str, Any]]:
        below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        found = [o for child in below for o in objects(child)]
        is_schema = isinstance(node, dict) and node.get("type") == "object"
        return [node, *found] if is_schema else found

    assert len(objects(schema())) == 7
    assert all(o["additionalProperties"] is False for o in objects(schema()))


@pytest.mark.parametrize(
    ("place", "text"),
    [("dataset.fingerprint", "f" * 64), ("provenance.weights_sha256", "f" * 64),
     ("provenance.scored_by.commit", "c" * 40), ("method.arxiv", "2403.00001"),
     ("protocol.id", "canonical@1"), ("scores.0.group", "all")],
)  # fmt: skip
def test_a_line_break_at_the_end_is_no_match(place: str, text: str) -> None:
    """`$` stands before a last line break in Python's expressions, not in JSON Schema's."""
    assert result_problems(changed(place, text)) == []
    assert f"{place.replace('.0', '[0]')}: " in result_problems(changed(place, text + "\n"))[0]


def test_infinity_is_no_number_and_a_long_message_is_cut() -> None:
    (line,) = result_problems(changed("dataset.n_pairs", float("inf")))
    assert "inf is not of type 'integer'" in line
    (line,) = result_problems(changed("method.arxiv", "x" * 5000))
    assert line.startswith("method.arxiv: 'xxx")
    assert len(line) < 250
