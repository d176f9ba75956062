"""The measured tables of docs/worked-examples.md: complete, and made again with the same result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemf.scoring import PROTOCOLS
from tests.test_site import load

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "worked-examples.md").read_text("utf-8")
(BLOCK,) = re.findall(r"<!-- measured:begin -->\n(.*)<!-- measured:end -->", PAGE, re.DOTALL)


def test_every_protocol_is_in_the_table_of_its_plan() -> None:
    tables = re.findall(r"\*\*.*?\*\* \(`(\S+)`\)\n(.*?)(?=\n\*\*|\Z)", BLOCK, re.DOTALL)
    shown = {name: plan for plan, rows in tables for name in re.findall(r"^\| `(\S+)`", rows, re.M)}
    wanted = {name: str(protocol.plan) for name, protocol in PROTOCOLS.items()}
    assert shown == wanted, "run `python docs/worked_examples.py`"
    assert BLOCK.startswith("SYNTHETIC stand-ins")


@pytest.mark.long
def test_the_tables_are_made_again(tmp_path: Path) -> None:
    script = load("worked_examples")
    script.predict(tmp_path)
    made = "\n".join(script.tables(tmp_path)) + "\n"
    number = re.compile(r"\b\d+\.\d\b(?! in percent)")
    assert number.sub("#", made) == number.sub("#", BLOCK)
    found, written = ([float(x) for x in number.findall(text)] for text in (made, BLOCK))
    assert len(found) == 2 * 3 * len(PROTOCOLS)
    assert found == pytest.approx(written, abs=0.3)  # other machines move a keypoint or two
