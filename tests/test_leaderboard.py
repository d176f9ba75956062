"""The leaderboard: what is ranked together, what is refused, and the page in a browser."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from nemf.errors import NemfError
from reports.leaderboard import read_folder, write_board
from tests.browser import Browser
from tests.test_results import result

NASTY = "<script>alert(1)</script>\"'&amp;"


def fill(folder: Path, **results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in results.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def board_of(folder: Path) -> str:
    entries, refused = read_folder(folder)
    assert refused == []
    write_board(folder / "board.html", entries)
    return (folder / "board.html").read_text(encoding="utf-8")


def sections(page: str) -> dict[tuple[str, ...], str]:
    """The rankings of a page by kind, dataset, protocol and averaging."""
    names = ("kind", "dataset", "protocol", "averaging")
    head = "".join(rf' data-{name}="([^"]*)"' for name in names)
    found = re.findall(rf'<section class="ranking"{head}(.*?)</section>', page, re.DOTALL)
    return {tuple(parts): text for *parts, text in found}


def cells(section: str, label: str) -> list[str]:
    """The texts of a row's cells after the method."""
    row = next(r for r in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL) if f">{label}" in r)
    return [re.sub(r"<[^>]+>", "|", c) for c in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)]


SPAIR = ("real", "SPair-71k test", "canonical@1", "image")


def test_results_are_ranked_where_they_mean_the_same(tmp_path: Path) -> None:
    page = board_of(
        fill(
            tmp_path,
            best=result("best", 0.8), second=result("second", 0.65), third=result("third", 0.5),
            floor=result("copy", 0.9, method={"kind": "floor"}),
            told=result("told", 0.95, method={"oracle_class": True}),
            random=result("random", 0.99, method={"random_weights": True}),
            other=result("other", 0.99, "hpf-paper@1"),
            point=result("point", 0.99, averaging="point"),
        )
    )  # fmt: skip
    found = sections(page)
    assert list(found) == [SPAIR, (*SPAIR[:3], "point"), (*SPAIR[:2], "hpf-paper@1", "image")]
    main = found[SPAIR]
    assert '<span class="best">80.0</span>' in main
    assert '<span class="second">65.0</span> ≈' in main  # [55, 75] overlaps [70, 90]
    assert main.count('class="best"') == 2  # of each of the two alphas
    assert cells(main, "third")[0] == "|50.0||40.0–60.0|"  # no overlap: no ≈
    for label, mark in (("copy", "floor"), ("told", "oracle class"), ("random", "random weights")):
        assert f"{label} [{mark}]" in main
        assert cells(main, label)[0].count("≈") == 0
    order = re.findall(r'<th scope="row">(\w+)', main.partition("<details>")[0])
    assert order == ["random", "told", "copy", "best", "second", "third"]
    alone = found[(*SPAIR[:2], "hpf-paper@1", "image")]
    assert 'class="best"' not in alone


def test_kinds_fingerprints_and_splits_are_apart(tmp_path: Path) -> None:
    synthetic = {"synthetic": True, "official_pairs": None}
    page = board_of(
        fill(
            tmp_path,
            a=result("a"), b=result("b", split="val", n_pairs=5384, official_pairs=5384),
            c=result("c", fingerprint="e" * 64), d=result("d", fingerprint="d" * 64, **synthetic),
        )
    )  # fmt: skip
    found = sections(page)
    assert [(kind, dataset) for kind, dataset, *_ in found] == [
        ("real", "SPair-71k test [eeeeeeee]"),
        ("real", "SPair-71k test [ffffffff]"),
        ("real", "SPair-71k val"),
        ("synthetic", "SYNTHETIC stand-ins (rendered objects) for SPair-71k test"),
    ]
    for (kind, *_), text in found.items():
        assert ("says nothing about photographs" in text) == (kind == "synthetic")
        assert len(re.findall('<th scope="row">', text.partition("<details>")[0])) == 1


def test_parts_are_marked_and_not_ranked(tmp_path: Path) -> None:
    part = {"n_pairs": 65, "official_pairs": 299}
    page = board_of(fill(tmp_path, a=result("a", 0.4, **part), b=result("b", 0.6, **part)))
    (text,) = sections(page).values()
    assert "<strong>A part of the dataset:</strong> 65 of 299 pairs. Not ranked." in text
    assert 'class="best"' not in text
    assert "≈" not in text


def test_everything_from_a_file_is_escaped(tmp_path: Path) -> None:
    method = {"paper": NASTY, "contact": NASTY, "backbone": NASTY, "training": NASTY}
    nasty = result(NASTY, title=NASTY, method=method)
    nasty["scores"][1]["group"] = nasty["scores"][3]["group"] = f"class {NASTY}"
    page = board_of(fill(tmp_path, nasty=nasty))
    assert page.count("<script") == 1
    assert page.count("&lt;script&gt;") > 6
    assert "alert(1)</script>" not in page


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    results = {name: result(name, pck) for name, pck in (("a", 0.4), ("b", 0.4), ("c", 0.6))}
    first = board_of(fill(tmp_path / "one", **results))
    assert board_of(fill(tmp_path / "two", **dict(reversed(results.items())))) == first


# -- what is refused ------------------------------------------------------------------------------


def test_every_refused_file_is_named(tmp_path: Path) -> None:
    wrong = result("wrong")
    wrong["scores"][0]["pck"] = 61.2
    fill(tmp_path, a=result("a"), b=wrong, c=result("a"), d=result("d", n_images=7))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "e.json").write_text("{")
    (tmp_path / "README.md").write_text("no result")
    entries, refused = read_folder(tmp_path)
    assert [entry.file for entry in entries] == ["a.json"]
    told = {Path(line.partition(": ")[0]).name: line.partition(": ")[2] for line in refused}
    assert set(told) == {"b.json", "c.json", "d.json", "e.json"}
    reason = "scores[0].pck: 61.2 is greater than the maximum of 1"
    assert told["b.json"] == f"no valid nemf-result@1: {reason}"
    assert told["c.json"] == "tells the result of a.json again"
    assert told["d.json"] == "dataset.n_images is 7, but 500 in a.json for the same fingerprint"
    assert told["e.json"].startswith("cannot be read as a result")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["nemf", *map(str, arguments)])
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def test_the_command_writes_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = fill(tmp_path / "results", a=result("a")), tmp_path / "board"
    assert run(monkeypatch, "leaderboard", folder, "--out", out) == 0
    assert (out / "index.html").is_file()
    (out / "index.html").unlink()
    (folder / "bad.json").write_text("[]")
    assert run(monkeypatch, "leaderboard", folder, "--out", out) == 2
    captured = capsys.readouterr()
    assert f"nemf: {folder / 'bad.json'}: no valid nemf-result@1" in captured.err
    assert "1 of 2 files refused; no board written" in captured.err
    assert not (out / "index.html").exists()


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_results_is_refused(make: bool, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    if make:
        folder.mkdir()
    with pytest.raises(NemfError, match="holds no result file" if make else "no such folder"):
        read_folder(folder)


# -- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("board")
    willow = {"name": "pfwillow", "title": "PF-WILLOW", "layout": "pfwillow", "n_pairs": 900}
    willow |= {"official_pairs": 900, "fingerprint": "b" * 64}
    synthetic = {"synthetic": True, "official_pairs": None, "fingerprint": "d" * 64}
    board_of(
        fill(
            folder,
            a=result("a", 0.4), b=result("b", 0.6), c=result("c", 0.5, "hpf-paper@1"),
            d=result("d", 0.7, averaging="point"), e=result("e", 0.3, **willow),
            f=result("f", 0.9, **synthetic), g=result(f"g {NASTY} {'long ' * 20}", 0.2),
        )
    )  # fmt: skip
    return folder / "board.html"


SHOWN = (
    "[...document.querySelectorAll('section.ranking')].filter((s) => s.checkVisibility())"
    ".map((s) => [s.dataset.kind, s.dataset.dataset, s.dataset.protocol, s.dataset.averaging])"
)


def choose(browser: Browser, **values: str) -> None:
    for name, value in values.items():
        browser.js(
            f"(() => {{ const s = document.getElementById({json.dumps(name)});"
            f" s.value = {json.dumps(value)};"
            " s.dispatchEvent(new Event('change', { bubbles: true })); })()"
        )


def test_filters_never_show_two_kinds_or_averagings(page: Path, browser: Browser) -> None:
    browser.open(page)
    willow = ["real", "PF-WILLOW test", "canonical@1", "image"]
    hpf = [*SPAIR[:2], "hpf-paper@1", "image"]
    assert browser.js(SHOWN) == [willow, [*SPAIR], hpf]
    choose(browser, protocol="hpf-paper@1")
    assert browser.js(SHOWN) == [hpf]
    choose(browser, protocol="", dataset="PF-WILLOW test")
    assert browser.js(SHOWN) == [willow]
    choose(browser, averaging="point", dataset="")
    assert browser.js(SHOWN) == [[*SPAIR[:3], "point"]]
    choose(browser, averaging="image", kind="synthetic")
    assert [s[0] for s in browser.js(SHOWN)] == ["synthetic"]
    status = browser.js("document.getElementById('status').textContent")
    assert status == "1 of 5 rankings"
    assert browser.problems() == []


def test_columns_sort(page: Path, browser: Browser) -> None:
    browser.open(page)
    choose(browser, dataset="SPair-71k test", protocol="canonical@1")
    table = "[...document.querySelectorAll('section.ranking')].find((s) => !s.hidden)"
    names = f"[...{table}.querySelector('tbody').rows].map((r) => r.cells[0].textContent[0])"
    assert browser.js(names) == ["b", "a", "g"]
    browser.js(f"{table}.querySelectorAll('thead button')[1].click()")  # @0.05, descending
    assert browser.js(names) == ["b", "a", "g"]
    browser.js(f"{table}.querySelectorAll('thead button')[1].click()")
    assert browser.js(names) == ["g", "a", "b"]
    browser.js(f"{table}.querySelectorAll('thead button')[0].click()")
    assert browser.js(names) == ["a", "b", "g"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_tables_only_and_nothing_is_fetched(
    scheme: str, page: Path, browser: Browser
) -> None:
    browser.open(page, width=360, scheme=scheme)
    browser.js("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.js("document.scrollingElement.scrollWidth") == 360
    dark = browser.js("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    urls = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
    assert browser.problems() == []
