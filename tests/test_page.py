"""The page of a table: what its bytes hold, and what it does in a browser (headless Chromium)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import reports.page
from experiments.jobs import TABLES
from nemf.datasets import dataset_class
from nemf.datasets.spair import SPair71k
from nemf.errors import NemfError
from nemf.pairs import ImageRecord, Pair, Plan
from nemf.predictions import FORMAT, Predictions, dataset_meta, prediction_table
from nemf.scoring import PROTOCOLS, Protocol, get_protocol
from reports.page import write_page
from reports.records import current_records, make_record, score_pairs, write_record
from reports.tables import Table, TableSpec, build_table
from tests.browser import Browser

DATASETS = ("spair", "pfpascal", "pfwillow")
NASTY = "<script>alert(1)</script>\"'&amp;"
CODE = {"commit": "c" * 40, "dirty": True}
STRICT = dataclasses.replace(get_protocol("canonical@1"), name="strict", inclusive=False)


# -- an output folder ---------------------------------------------------------------------------


def image(name: str, width: int, height: int) -> ImageRecord:
    return ImageRecord(Path(name), name, f"hash-{name}", (height, width), np.zeros((0, 2)), ())


def random_pairs(n: int, seed: int = 0, names: Sequence[str] = ("cat", "dog", "tv")) -> list[Pair]:
    """Pairs of 20 images with 1 to 9 keypoints; whole numbers, so that ties occur."""
    rng = np.random.default_rng(seed)
    images = [image(f"i{k}.jpg", *rng.integers(60, 400, 2).tolist()) for k in range(20)]
    pairs = []
    for k in range(n):
        src, trg = (images[i] for i in rng.choice(20, 2, replace=False))
        points = [
            np.stack([rng.integers(0, side, 9) for side in record.size[::-1]], 1).astype(np.float32)
            for record in (src, trg)
        ]
        count = int(rng.integers(1, 10))
        points = [xy[:count] + np.float32([[0, 0]] * (count - 1) + [[0, 2]]) for xy in points]
        boxes = [np.float32([3, 5, 43, 55]), np.float32([4, 7, 104, 57])]
        flags = {"viewpoint": k % 3, "scale": k % 2, "truncation": -1, "occlusion": k % 2}
        kp_names = tuple(f"part {i}" for i in range(count))
        name = names[k % len(names)]
        pairs.append(Pair(f"{k:04d}-{name}", name, src, trg, *points, kp_names, *boxes, flags))
    return [pair for pair in pairs if np.ptp(pair.src_kps, 0).max() * np.ptp(pair.trg_kps, 0).max()]


def answers_of(pairs: Sequence[Pair], plan: Plan, seed: int, spread_px: float) -> list[np.ndarray]:
    """The truth plus noise; some without an answer, some off by 10 px sharp."""
    rng = np.random.default_rng(seed)
    answers = []
    for pair in pairs:
        truth = pair.oriented(plan).reference_kps
        noise = rng.normal(0, spread_px, truth.shape)
        noise[rng.random(len(truth)) < 0.2] = (6, -8)
        noise[rng.random(len(truth)) < 0.1] = np.nan
        answers.append((truth + noise).astype(np.float32))
    return answers


def put(
    out: Path,
    dataset: str,
    plan: Plan,
    numbered: Sequence[tuple[int, Any, np.ndarray, np.ndarray | None]],
    *,
    label: str = "mine",
    folder: str = "mine",
    grids: tuple[int, ...] = (),
    protocols: Sequence[Protocol] | None = None,
    **meta: Any,
) -> Path:
    """A prediction file in its place below ``out``, scored under every protocol of its plan."""
    matcher = {
        "name": label, "label": label, "config": {"type": label}, "weights_sha256": "e" * 64,
        "random_weights": False, "card": {"official_protocol": "canonical@1"},
    }  # fmt: skip
    facts = {"seed": 2022, "device": "cpu", "threads": 1, "libraries": {"numpy": "2.0"}}
    described = {
        "format": FORMAT, "dataset": dataset, "title": dataset_class(dataset).title,
        "split": "test", "layout": dataset, "fingerprint": f"fingerprint of {dataset}",
        "synthetic": False, "n_pairs": len(numbered), "official_pairs": None, "plan": str(plan),
        "key": "0" * 24, "matcher": matcher, "code": CODE, "facts": facts,
    } | meta  # fmt: skip
    predictions = Predictions(prediction_table(numbered), described)
    slot = out / "predictions" / folder / f"{dataset}-test" / str(plan)
    file = slot / "key" / "predictions.parquet"
    predictions.write(file)
    (slot / "current").write_text("key\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for rule in protocols or PROTOCOLS.values():
        if rule.plan.for_layout(dataset) != plan:
            continue
        for grid in (None, *grids):
            record = make_record(score_pairs(predictions, rule, oracle_grid=grid), digest, CODE)
            write_record(file.parent / "scores" / f"{grid}-{rule.id}.json", record)
    return file


def put_pairs(
    out: Path,
    dataset: str,
    plan: Plan,
    pairs: Sequence[Pair],
    answers: Sequence[np.ndarray],
    **more: Any,
) -> Path:
    rows = zip(pairs, answers, strict=True)
    numbered = [(k, pair.oriented(plan), xy, None) for k, (pair, xy) in enumerate(rows)]
    return put(out, dataset, plan, numbered, **more)


def table_of(out: Path, **changes: Any) -> Table:
    spec = yaml.safe_load((TABLES / "table1.yaml").read_text(encoding="utf-8"))
    spec |= {"name": "small", "title": "Table 9: PCK (%)", "alphas": [0.05, 0.1]}
    spec |= {"extra_columns": [], "protocols": list(PROTOCOLS), "published": None} | changes
    (out / "spec.yaml").write_text(yaml.safe_dump(spec))
    records = [record for _, record in current_records(out)]
    synthetic = records[0]["predictions"]["synthetic"]
    return build_table(TableSpec.load(out / "spec.yaml"), records, synthetic=synthetic)


def page_of(out: Path, *, data: Path | None = None, shown: int = 12, **changes: Any) -> Path:
    path = out / "page.html"
    write_page(path, table_of(out, **changes), current_records(out), data=data, shown=shown)
    return path


def block(page: Path, name: str) -> Any:
    pattern = f'<script type="application/json" id="{name}">(.*?)</script>'
    found = re.search(pattern, page.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three datasets under all plans by two methods, one with ceilings; a protocol with < too."""
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, STRICT.id, STRICT)
        for seed, dataset in enumerate(DATASETS):
            pairs = random_pairs(40, seed)
            for plan in {str(p.plan.for_layout(dataset)): p.plan.for_layout(dataset)
                         for p in PROTOCOLS.values()}.values():  # fmt: skip
                near, far = (answers_of(pairs, plan, seed, spread) for spread in (6, 30))
                grids = (8,) if str(plan) == "src2trg-own" else ()
                put_pairs(folder, dataset, plan, pairs, near, grids=grids)
                put_pairs(folder, dataset, plan, pairs, far, label="far", folder="far")
        yield folder


@pytest.fixture(scope="module")
def page(out: Path) -> Path:
    return page_of(out, published="nemf_table1.yaml")


# -- the file -----------------------------------------------------------------------------------


class Addresses(HTMLParser):
    """Every address that a document names, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]


def parsed(page: Path) -> Addresses:
    parser = Addresses()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_the_page_names_no_address_and_the_policy_forbids_all_but_its_own(page: Path) -> None:
    assert parsed(page).found == []
    assert "default-src 'none'" in page.read_text(encoding="utf-8")
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttp|http-equiv=.refresh", page.read_text())


def test_equal_input_gives_equal_bytes(out: Path, page: Path) -> None:
    before = page.read_bytes()
    page_of(out, published="nemf_table1.yaml")
    assert page.read_bytes() == before


def test_the_table_is_there_without_javascript(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "Published: figures as printed" in text
    assert text.index("CATs (NeurIPS 2021)") < text.index("Measured here: mean")
    assert re.search(r'<th scope="row">mine</th>\s*<td>measured</td>\s*<td>canonical@1</td>', text)
    for fact in ("c" * 40 + " with uncommitted changes", "e" * 64, "2022", "numpy 2.0"):
        assert fact in text


def test_synthetic_is_said_in_title_and_banner(tmp_path: Path, page: Path) -> None:
    pairs = random_pairs(6)
    plan = Plan("src2trg")
    put_pairs(tmp_path, "spair", plan, pairs, answers_of(pairs, plan, 0, 5), synthetic=True)
    text = page_of(tmp_path).read_text(encoding="utf-8")
    assert re.search(r"<title>[^<]*SYNTHETIC[^<]*</title>", text)
    assert 'class="banner" role="note"' in text
    assert 'class="banner" role="note"' not in page.read_text(encoding="utf-8")


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """Markup in every text that comes from a user or a dataset."""
    pairs = [
        dataclasses.replace(
            pair,
            id=f"{k}{NASTY}",
            src=dataclasses.replace(pair.src, name=f"{NASTY}{pair.src.name}"),
            kp_names=tuple(f"{NASTY}{name}" for name in pair.kp_names),
        )
        for k, pair in enumerate(random_pairs(8, names=(NASTY,)))
    ]
    plan = Plan("src2trg")
    put_pairs(
        tmp_path, "spair", plan, pairs, answers_of(pairs, plan, 0, 5),
        label=NASTY, fingerprint=NASTY, code={"commit": NASTY, "dirty": False},
    )  # fmt: skip
    return page_of(tmp_path, title=NASTY)


def test_texts_stay_texts(nasty: Path, page: Path) -> None:
    plain = parsed(nasty).tags
    assert "<script>alert" not in nasty.read_text(encoding="utf-8")
    assert plain.count("script") == 1 + 2 + 1 + 1  # page and pictures, ground, cell, program


def test_texts_stay_texts_in_the_browser(nasty: Path, browser: Browser) -> None:
    browser.open(nasty)
    assert browser.js("document.title") == NASTY
    assert browser.js("document.querySelectorAll('script').length") == 5
    figure = browser.js("document.querySelector('figure').textContent")
    assert figure.count(NASTY) >= 4  # class, pair, image, keypoints
    assert NASTY in browser.js("byId('chart').textContent")
    assert NASTY in browser.js("byId('provenance').textContent")
    # A script that got in all the same would not run.
    browser.js(
        "(() => { const intruder = document.createElement('script');"
        " intruder.textContent = 'window.intruded = true'; document.body.append(intruder); })()"
    )
    assert browser.js("window.intruded ?? null") is None


def test_a_full_benchmark_fits_into_ten_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [image(f"class/{k:06d}.jpg", 500, 375) for k in range(500)]
    names, box = tuple(str(k) for k in range(10)), np.float32([10, 10, 300, 300])
    plan, pairs = Plan("src2trg"), []
    for k in range(12234):
        src, trg = images[k % 500], images[(7 * k + 1) % 500]
        points = rng.uniform(0, 370, (2, 10, 2)).astype(np.float32)
        pairs.append(
            Pair(f"{k:06d}-{src.name}-{trg.name}", "x", src, trg, *points, names, box, box)
        )
    answers = rng.uniform(0, 370, (len(pairs), 10, 2)).astype(np.float32)
    put_pairs(tmp_path, "spair", plan, pairs, list(answers), protocols=[PROTOCOLS["canonical@1"]])
    assert page_of(tmp_path).stat().st_size < 10e6


# -- pictures -----------------------------------------------------------------------------------


@pytest.fixture
def with_images(tiny_spair: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """An output folder of predictions for images that are on disk; and the data root."""
    root = tiny_spair()
    dataset = SPair71k(root)
    plan = Plan("src2trg")
    numbered = [
        (k, pair.oriented(plan), pair.oriented(plan).reference_kps + 1, None)
        for k, pair in enumerate(dataset)
    ]
    out = tmp_path / "out"
    meta = dataset_meta(dataset, plan)
    put(out, meta.pop("dataset"), Plan.parse(meta.pop("plan")), numbered, **meta)
    return out, root


def test_pictures_are_found_by_their_content(with_images: tuple[Path, Path]) -> None:
    out, root = with_images
    page = page_of(out, data=root)
    assert len(block(page, "pictures")) == 4
    used = [entry["picture"] for entry in block(page, "ground-0")["images"]]
    assert sorted(used) == [0, 1, 2, 3]
    broken = next(root.rglob("JPEGImages/cat/test_a.jpg"))
    other = next(root.rglob("JPEGImages/dog/test_c.jpg"))
    broken.write_bytes(next(root.rglob("JPEGImages/cat/trn_a.jpg")).read_bytes())
    assert other.is_file()
    page = page_of(out, data=root)  # the same name, but another photograph
    assert len(block(page, "pictures")) == 3


def test_pictures_are_bounded(
    with_images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, root = with_images
    monkeypatch.setattr(reports.page, "_PICTURE_SIDE_PX", 16)
    small = block(page_of(out, data=root), "pictures")
    monkeypatch.setattr(reports.page, "_PICTURE_BYTES", len(small[0]))
    assert 0 < len(block(page_of(out, data=root), "pictures")) < 4


def test_the_picture_is_shrunk_and_drawn_in_the_images_own_pixels(
    with_images: tuple[Path, Path], browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, root = with_images
    monkeypatch.setattr(reports.page, "_PICTURE_SIDE_PX", 16)
    browser.open(page_of(out, data=root))
    shown = browser.js(
        "Promise.all([...document.querySelectorAll('figure image')].map(async (e) => {"
        " const loaded = new Image(); loaded.src = e.getAttribute('href'); await loaded.decode();"
        " return [e.parentNode.getAttribute('viewBox'), loaded.naturalWidth, loaded.naturalHeight];"
        "}))"
    )
    assert sorted(shown) == [
        ["-0.5 -0.5 44 50", 14, 16], ["-0.5 -0.5 44 50", 14, 16],
        ["-0.5 -0.5 60 40", 16, 11], ["-0.5 -0.5 60 42", 16, 11],
    ]  # fmt: skip
    assert browser.problems() == []


def test_without_images_there_is_a_plain_ground(
    with_images: tuple[Path, Path], browser: Browser, tmp_path: Path
) -> None:
    out, _ = with_images
    (tmp_path / "empty").mkdir()
    for data in (None, tmp_path / "empty"):
        browser.open(page_of(out, data=data))
        assert browser.js("document.querySelectorAll('figure image').length") == 0
        sizes = browser.js(
            "[...document.querySelectorAll('figure rect.plain')]"
            ".map((e) => [e.getAttribute('width'), e.getAttribute('height')])"
        )
        assert sorted(map(tuple, sizes)) == [
            ("44", "50"), ("44", "50"), ("60", "40"), ("60", "42"),
        ]  # fmt: skip


# -- scoring in the page ------------------------------------------------------------------------


def test_every_number_is_the_records(out: Path, page: Path, browser: Browser) -> None:
    """Every protocol, averaging, alpha and group, computed by the page's own script."""
    browser.open(page)
    rows = browser.js(
        "(async () => { const rows = [];"
        " for (const [i, { method, dataset, scores, ground: g }] of page.cells.entries()) {"
        " const ground = await loadGround(g), cell = await loadCell(i);"
        " for (const [rule, { alphas }] of Object.entries(scores)) for (const alpha of alphas) {"
        " const hits = hitsOf(ground, errorsOf(ground, cell, rule), rule, alpha);"
        " for (const averaging of ['image', 'point'])"
        " for (const [group, pairs] of groupsOf(ground)) rows.push([method, dataset, rule,"
        " averaging, alpha, group, pckOf(ground, hits, pairs, averaging),"
        " recorded(i, rule, averaging, alpha, group)]); } } return rows; })()"
    )
    found = {tuple(row[:6]): row[6:] for row in rows}
    expected = {}
    for _, record in current_records(out):
        meta = record["predictions"]
        for e in record["metrics"]:
            key = (meta["matcher"]["label"], meta["dataset"], record["protocol"]["id"],
                   e["averaging"], e["alpha"], f"{e['group']} {e['value']}")  # fmt: skip
            expected[key] = e["pck"]
    assert found.keys() == expected.keys()
    assert {key[2] for key in found} == {*PROTOCOLS, STRICT.id}
    for key, (value, (pck, _, _)) in found.items():
        assert value == pytest.approx(expected[key], abs=1e-9), key
        assert pck == pytest.approx(expected[key], abs=1e-8), key
    ties = [k for k, v in expected.items() if k[2] == "canonical@1"
            and v != expected[(*k[:2], "strict@1", *k[3:])]]  # fmt: skip
    assert ties  # otherwise < and <= would not be told apart


def test_the_ceiling_is_the_snapped_truth(page: Path, browser: Browser) -> None:
    browser.open(page)
    number = [c["method"] for c in block(page, "page")["cells"]].index("oracle-grid 8x8 (ceiling)")
    pairs, (width, height) = random_pairs(40, 0), (0, 0)
    height, width = pairs[0].trg.size
    x, y = pairs[0].trg_kps[0]
    column, row = (int((v + 0.5) // (side / 8)) for v, side in ((x, width), (y, height)))
    centre = [(min(c, 7) + 0.5) * side / 8 - 0.5 for c, side in ((column, width), (row, height))]
    first = browser.js(f"loadCell({number}).then((cell) => [...cell.pred.slice(0, 2)])")
    assert first == pytest.approx(centre, abs=1e-4)


def test_switching_protocol_dataset_and_averaging_changes_the_shown_numbers(
    out: Path, page: Path, browser: Browser
) -> None:
    browser.open(page)
    records = {
        (r["predictions"]["dataset"], r["protocol"]["id"]): r
        for _, r in current_records(out)
        if r["predictions"]["matcher"]["label"] == "mine"
    }
    for dataset, rule, averaging in (
        ("spair", "canonical@1", "image"), ("spair", "strict@1", "point"),
        ("pfpascal", "cats-paper@1", "image"), ("pfpascal", "nemf-paper@1", "image"),
        ("pfwillow", "hpf-paper@1", "point"),
    ):  # fmt: skip
        browser.choose(dataset=dataset, rule=rule, averaging=averaging)
        shown = browser.js(
            "[...byId('scores').tBodies[0].rows].map((r) => [...r.cells].map((c) => c.innerText))"
        )
        mine = next(row for row in shown if row[0] == "mine")
        entries = [
            e for e in records[dataset, rule]["metrics"]
            if (e["group"], e["averaging"]) == ("all", averaging)
        ]  # fmt: skip
        text = [
            f"{100 * e['pck']:.1f}\n{100 * e['low']:.1f}–{100 * e['high']:.1f}" for e in entries
        ]
        assert mine[1:-1] == text
        assert mine[-1] == "equal"
        assert f"per-{averaging} mean" in browser.js("byId('description').textContent")
    assert browser.problems() == []


def test_a_protocol_without_a_record_has_numbers_but_no_interval(
    tmp_path: Path, browser: Browser
) -> None:
    pairs, plan = random_pairs(20), Plan("src2trg")
    canonical = PROTOCOLS["canonical@1"]
    file = put_pairs(
        tmp_path, "spair", plan, pairs, answers_of(pairs, plan, 0, 9), protocols=[canonical]
    )
    browser.open(page_of(tmp_path))
    browser.choose(rule="hpf-paper@1")
    scores = score_pairs(Predictions.read(file), PROTOCOLS["hpf-paper@1"], [0.1]).frame
    shown = browser.js("[...byId('scores').tBodies[0].rows[0].cells].map((c) => c.innerText)")
    assert shown[5] == f"{100 * (scores['pck-0.10'] / scores['n']).mean():.1f}\nnot recorded"
    assert shown[-1] == "no record"


def test_methods_of_another_plan_are_named_not_compared(tmp_path: Path, browser: Browser) -> None:
    pairs = random_pairs(20)
    for name, plan in (("there", Plan("src2trg")), ("back", Plan("trg2src"))):
        answers = answers_of(pairs, plan, 0, 9)
        put_pairs(tmp_path, "spair", plan, pairs, answers, label=name, folder=name)
    browser.open(page_of(tmp_path))
    for rule, here, other in (("canonical@1", "there", "back"), ("cats-paper@1", "back", "there")):
        browser.choose(rule=rule)
        rows = browser.js("[...byId('scores').tBodies[0].rows].map((r) => r.cells[0].innerText)")
        assert rows == [here]
        assert browser.js("byId('method').value") == here
        assert browser.js("byId('plan-note').textContent").endswith(f"not here: {other}.")


# -- chart, pairs, table ------------------------------------------------------------------------


def test_bars_are_as_long_as_the_numbers(page: Path, browser: Browser) -> None:
    browser.open(page)
    browser.choose(dataset="pfwillow", rule="canonical@1", averaging="image", alpha=0.05)
    drawn = browser.js(
        "[...document.querySelectorAll('#chart rect')]"
        ".map((e) => [e.querySelector('title').textContent, Number(e.getAttribute('width'))])"
    )
    assert len(drawn) == 3 * 4  # three methods; all pairs and three classes
    grid = browser.js(
        "[...document.querySelectorAll('#chart .grid')].map((e) => Number(e.getAttribute('x1')))"
    )
    scale = grid[-1] - grid[0]  # from 0 to 100
    for title, width in drawn:
        value = float(re.search(r": ([\d.]+) \(", title)[1])
        assert width / scale * 100 == pytest.approx(value, abs=0.06)
    browser.js(
        "[...document.querySelectorAll('#series label')].find((e) => e.innerText === 'far').click()"
    )
    browser.choose(groups="scale")
    titles = browser.js(
        "[...document.querySelectorAll('#chart rect title')].map((e) => e.innerHTML)"
    )
    assert len(titles) == 2 * 3
    assert not [title for title in titles if ", far:" in title]
    rows = browser.js("[...byId('chart-table').rows].map((r) => r.cells[0].textContent)")
    assert rows == ["Difficulty", "all pairs", "scale 0", "scale 1"]


def test_pairs_can_be_filtered_and_ranked(out: Path, page: Path, browser: Browser) -> None:
    browser.open(page)
    browser.choose(dataset="spair", rule="canonical@1", alpha=0.1, method="mine")
    file = next((out / "predictions" / "mine").glob("spair*/src2trg-own/key/predictions.parquet"))
    frame = score_pairs(Predictions.read(file), PROTOCOLS["canonical@1"], [0.1]).frame
    fraction = (frame["pck-0.10"] / frame["n"]).to_numpy()

    def shown() -> list[int]:
        return browser.js("[...document.querySelectorAll('figure')].map((e) => +e.dataset.pair)")

    for kind, order in (("worst", 1), ("best", -1)):
        browser.choose(kind=kind)
        assert len(shown()) == 12
        assert fraction[shown()].tolist() == (order * np.sort(order * fraction))[:12].tolist()
    captions = browser.js(
        "[...document.querySelectorAll('figcaption strong')].map((e) => e.innerHTML)"
    )
    hits, n = frame["pck-0.10"], frame["n"]
    assert captions == [f"{hits[p]} of {n[p]} correct" for p in shown()]
    browser.choose(kind="random")
    first = shown()
    browser.choose(category="dog")
    browser.choose(**{"flag-scale": 1, "flag-viewpoint": 1})
    wanted = frame[(frame["category"] == "dog") & (frame["scale"] == 1) & (frame["viewpoint"] == 1)]
    assert sorted(shown()) == wanted.index.tolist()
    assert browser.js("byId('pairs-status').textContent") == f"{len(wanted)} of {len(wanted)} pairs"
    assert not browser.js("!!byId('flag-truncation')")  # not annotated
    browser.choose(method="far", category="")
    browser.choose(**{"flag-scale": "", "flag-viewpoint": ""})
    assert shown() == first  # the same random pairs for every method


def test_how_many_pairs_are_shown_is_a_parameter(out: Path, browser: Browser) -> None:
    path = out / "few.html"
    write_page(path, table_of(out), current_records(out), shown=3)
    browser.open(path)
    assert browser.js("document.querySelectorAll('figure').length") == 3


def test_the_overlay_by_hand(tmp_path: Path, browser: Browser) -> None:
    """A 100x50 reference in the 256x256 frame: the threshold is an ellipse in the image."""
    src, trg = image("r.png", 100, 50), image("q.png", 80, 60)
    queries, truth = np.float32([[1, 2], [3, 4], [5, 6]]), np.float32([[30, 20], [60, 30], [9, 9]])
    pair = Pair("p", "c", src, trg, truth, queries, ("a", "b", "d"))
    answers = np.float32([[38, 20], [60, 42], [np.nan, np.nan]])
    put_pairs(tmp_path, "pfpascal", Plan("trg2src"), [pair], [answers])
    browser.open(page_of(tmp_path))
    browser.choose(rule="cats-paper@1", alpha=0.1)
    marks = browser.js(
        "Object.fromEntries(['query', 'threshold', 'truth', 'right', 'wrong'].map((name) =>"
        " [name, [...document.querySelectorAll(`figure .${name}`)].map((e) => Object.fromEntries("
        "[...e.attributes].filter((a) => a.name !== 'class').map((a) => [a.name, a.value])))]))"
    )
    assert [(m["cx"], m["cy"]) for m in marks["query"]] == [("1", "2"), ("3", "4"), ("5", "6")]
    assert [(m["cx"], m["cy"]) for m in marks["truth"]] == [("30", "20"), ("60", "30"), ("9", "9")]
    radii = [(float(m["rx"]), float(m["ry"])) for m in marks["threshold"]]
    assert radii == [pytest.approx((10, 5), abs=1e-4)] * 3
    line, point = marks["right"]  # 8 px to the right are within 10, 12 px down are not within 5
    assert [line[k] for k in ("x1", "y1", "x2", "y2")] == ["30", "20", "38", "20"]
    assert (point["cx"], point["cy"]) == ("38", "20")
    link, cross = marks["wrong"]
    assert [link[k] for k in ("x2", "y2")] == ["60", "42"]
    assert cross["d"].startswith("M")
    caption = browser.js("document.querySelector('figcaption').innerText")
    assert caption.startswith("1 of 3 correct")
    assert "no answer: 3" in caption


HEADS = "[...byId('main-table').tHead.rows[1].cells]"


def first_column(browser: Browser) -> list[list[str]]:
    return browser.js(
        "[...byId('main-table').tBodies].map((b) => [...b.rows].slice(1).map((r) =>"
        " r.cells[0].innerText))"
    )


def test_tables_sort_by_click_and_key_within_their_parts(page: Path, browser: Browser) -> None:
    browser.open(page)
    published, measured = first_column(browser)
    names = browser.js(f"{HEADS}.map((e) => e.innerText)")
    column = len(names) - 1  # PF-WILLOW at 0.1
    browser.js(f"{HEADS}[{column}].querySelector('button').click()")
    assert browser.js(f"{HEADS}.map((e) => e.ariaSort)").count("descending") == 1
    values = browser.js(
        "[...byId('main-table').tBodies].map((b) => [...b.rows].slice(1)"
        f".map((r) => r.cells[{column}].dataset.value))"
    )
    for part in values:
        numbers = [float(v) for v in part if v]
        assert numbers == sorted(numbers, reverse=True)
        assert part[len(numbers) :] == [""] * (len(part) - len(numbers))  # empty cells last
    now = first_column(browser)
    assert [sorted(part) for part in now] == [sorted(published), sorted(measured)]
    headings = "[...byId('main-table').tBodies].map((b) => b.rows[0].innerText.split(':')[0])"
    assert browser.js(headings) == ["Published", "Measured here"]
    browser.js(f"{HEADS}[0].querySelector('button').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.js(f"{HEADS}[0].ariaSort") == "ascending"
    assert browser.js(f"{HEADS}[{column}].ariaSort") == "none"
    assert first_column(browser)[0] == sorted(published, key=str.casefold)
    browser.press(" ", 32, " ")
    assert browser.js(f"{HEADS}[0].ariaSort") == "descending"
    assert first_column(browser)[0] == sorted(published, key=str.casefold)[::-1]


# -- for everybody ------------------------------------------------------------------------------


def test_the_page_asks_no_network_and_logs_no_problem(page: Path, browser: Browser) -> None:
    browser.open(page)
    browser.choose(dataset="pfpascal", rule="cats-paper@1", kind="random")
    requests = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert browser.problems() == []


def test_every_control_is_reached_by_tab_has_a_label_and_shows_the_focus(
    page: Path, browser: Browser
) -> None:
    browser.open(page)
    controls = "[...document.querySelectorAll('select, input, button, summary, [tabindex]')]"
    browser.js(f"{controls}.forEach((e, i) => {{ e.dataset.number = i; }})")
    expected = browser.js(
        f"{controls}.filter((e) => e.checkVisibility()).map((e) => e.dataset.number)"
    )
    assert len(expected) > 30
    reached = []
    for _ in range(len(expected) + 1):
        browser.press("Tab", 9)
        number, outline = browser.js(
            "[document.activeElement.dataset.number ?? '',"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.append(number)
        assert number == "" or outline == "solid", number
    assert reached[: len(expected)] == expected  # in the page's order, and no trap
    assert reached[-1] not in expected[1:]
    unnamed = browser.js(
        "[...document.querySelectorAll('select, input')].filter((e) =>"
        " ![...e.labels].some((l) => l.textContent.trim())).map((e) => e.id)"
    )
    assert unnamed == []


@pytest.mark.parametrize("name", ["page", "nasty"])
def test_a_phone_scrolls_tables_only(
    name: str, request: pytest.FixtureRequest, browser: Browser
) -> None:
    browser.open(request.getfixturevalue(name), width=360)
    browser.js("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.js("document.scrollingElement.scrollWidth") == 360
    beyond = browser.js(
        "[...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroller') &&"
        " !e.closest('svg') && e.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML)"
    )
    assert beyond == []
    assert browser.js("byId('main-table').closest('.scroller').scrollWidth") > 360


def luminance(colour: str) -> float:
    channels = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_both_schemes(scheme: str, page: Path, browser: Browser) -> None:
    browser.open(page, scheme=scheme)
    pairs = browser.js(
        "['body', '.hint', '.footnotes li', 'tr.heading th', 'tbody.published td', 'small',"
        " 'select', 'figcaption span', 'dt'].map((name) => {"
        " const e = document.querySelector(name);"
        " let below = e; while (getComputedStyle(below).backgroundColor === 'rgba(0, 0, 0, 0)')"
        " below = below.parentElement;"
        " return [name, getComputedStyle(e).color, getComputedStyle(below).backgroundColor]; })"
    )
    for name, *colours in pairs:
        dark, light = sorted(map(luminance, colours))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name
    assert (luminance(pairs[0][2]) < 0.1) == (scheme == "dark")


# -- what is refused ----------------------------------------------------------------------------


def test_what_cannot_be_shown_is_refused(out: Path, tmp_path: Path) -> None:
    table, records = table_of(out), current_records(out)
    path = tmp_path / "page.html"
    with pytest.raises(NemfError, match="shown must be at least 1"):
        write_page(path, table, records, shown=0)
    with pytest.raises(NemfError, match="nowhere: no such folder"):
        write_page(path, table, records, data=tmp_path / "nowhere")
    mine = [(p, r) for p, r in records if r["predictions"]["matcher"]["label"] != "far"]
    with pytest.raises(NemfError, match="no record of far was given"):
        write_page(path, table, mine)
    assert not path.exists()


def test_files_of_one_dataset_must_agree_on_the_truth(tmp_path: Path) -> None:
    plan = Plan("src2trg")
    for seed, name in enumerate(("one", "two")):
        pairs = random_pairs(10, seed)
        answers = answers_of(pairs, plan, 0, 5)
        put_pairs(tmp_path, "spair", plan, pairs, answers, label=name, folder=name)
    with pytest.raises(NemfError, match=r"two.*holds other pairs or another truth than .*one"):
        page_of(tmp_path)


def test_the_page_needs_no_torch() -> None:
    code = "import reports.page, sys; print({'torch', 'mmengine', 'mlflow'} & set(sys.modules))"
    repo = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repo
    )
    assert done.stdout.strip() == "set()"
