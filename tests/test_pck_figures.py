"""Figures of prediction files and trainings: their numbers are the records', and they are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image as PILImage

from nemf.errors import NemfError
from nemf.pairs import ImageRecord, Pair, Plan
from nemf.predictions import FORMAT, Predictions, prediction_table
from nemf.scoring import get_protocol
from reports.comparison import Run
from reports.figure_files import CannotDraw, write_figure
from reports.figure_sources import find_sources
from reports.pck_figures import (
    class_figure,
    curve_figure,
    difficulty_figure,
    draw_classes,
    draw_difficulty,
    draw_pck_curves,
)
from reports.records import make_record, score_pairs
from reports.training_figure import draw_training, finished_trainings, training_figure
from reports.transfer_figure import RIGHT, WRONG, draw_transfer, transfer_figure

NAN = float("nan")
CANONICAL = get_protocol("canonical@1")
SPOTS = np.float32([[50, 50], [50, 150], [200, 100], [200, 20]])


def image(name: str) -> ImageRecord:
    return ImageRecord(Path(name), name, f"hash-{name}", (200, 300), np.zeros((0, 2)), ())


def four_pairs(flags: bool = True) -> list[Pair]:
    """Three cats and a dog with 4 keypoints each; alpha 0.1 is 10 px; no two share an image."""
    box = np.float32([0, 0, 100, 50])
    names = tuple("abcd")
    values = {"viewpoint": 0, "scale": -1, "truncation": 0, "occlusion": -1}
    return [
        Pair(
            f"p{k}", "dog" if k == 3 else "cat", image(f"s{k}"), image(f"t{k}"),
            SPOTS, SPOTS, names, box, box,
            values | {"viewpoint": k % 2} if flags else {},
        )
        for k in range(4)
    ]  # fmt: skip


def put(out: Path, label: str, errors_px: Sequence[Sequence[float]], **changed: Any) -> Path:
    """A prediction file below ``out`` whose answers miss to the right by so many px (NaN: none)."""
    pairs = changed.pop("pairs", None) or four_pairs()
    rows = []
    for number, (pair, errors) in enumerate(zip(pairs, errors_px, strict=True)):
        answers = SPOTS + np.float32([[error, 0] for error in errors])
        rows.append((number, pair.oriented(Plan("src2trg")), answers, None))
    meta = {
        "format": FORMAT, "dataset": "spair", "title": "SPair-71k", "split": "test",
        "layout": "spair", "fingerprint": "f" * 64, "synthetic": True, "n_pairs": len(pairs),
        "official_pairs": None, "plan": "src2trg-own", "key": "k",
        "matcher": {"name": label, "label": label}, "code": None,
    } | changed  # fmt: skip
    slot = out / "predictions" / label / "spair-test-synthetic" / meta["plan"]
    file = slot / "k" / "predictions.parquet"
    Predictions(prediction_table(rows), meta).write(file)
    (slot / "current").write_text("k\n")
    return file


ONE = [[0, 5, 20, 30], [0, 0, 0, 0], [9, 11, 12, 13], [NAN, 4, 40, 50]]  # right: 2, 4, 1, 1
TWO = [[30, 30, 30, 30], [0, 0, 9, 0], [15, 15, 15, 15], [0, 0, 0, 0]]  # right: 0, 4, 0, 4


@pytest.fixture
def out(tmp_path: Path) -> Path:
    put(tmp_path, "one", ONE)
    put(tmp_path, "two", TWO)
    return tmp_path


@pytest.fixture
def runs(out: Path) -> list[Run]:
    (found,) = find_sources(out, CANONICAL).values()
    return found


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved while the test runs."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))
    )
    return saved


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def entry(content: dict[str, Any], label: str, **wanted: Any) -> dict[str, Any]:
    (found,) = (
        e
        for e in content["entries"]
        if e["label"] == label and all(e[key] == value for key, value in wanted.items())
    )
    return found


def record_entries(run: Run) -> list[dict[str, Any]]:
    record = make_record(score_pairs(run.predictions, CANONICAL), run.sha256, {})
    return [e for e in record["metrics"] if e["averaging"] == "image"]


# -- numbers --------------------------------------------------------------------------------------


def test_classes_by_hand(runs: list[Run]) -> None:
    content = class_figure(runs, CANONICAL, 0.1)
    assert entry(content, "one", value="cat")["pck"] == pytest.approx((2 + 4 + 1) / 12)
    assert entry(content, "one", value="dog")["pck"] == pytest.approx(1 / 4)
    assert entry(content, "two", value="all")["pck"] == pytest.approx((0 + 4 + 0 + 4) / 16)
    assert entry(content, "two", value="cat")["n_pairs"] == 3


@pytest.mark.parametrize("make", [class_figure, difficulty_figure, curve_figure])
def test_numbers_are_the_records(runs: list[Run], make: Callable[..., dict[str, Any]]) -> None:
    content = make(runs, CANONICAL, 0.15)
    compared = 0
    for run in runs:
        for line in record_entries(run):
            group = {"group": line["group"], "value": line["value"]}
            wanted = group if make is not curve_figure else {}
            found = [
                e
                for e in content["entries"]
                if e["label"] == run.label
                and e["alpha"] == line["alpha"]
                and all(e[key] == value for key, value in wanted.items())
                and (wanted or line["group"] == "all")
            ]
            for e in found:
                assert (e["pck"], e["low"], e["high"]) == (line["pck"], line["low"], line["high"])
                compared += 1
    assert compared >= 4


def test_a_content_says_what_it_is_about(runs: list[Run]) -> None:
    for make in (class_figure, curve_figure, difficulty_figure, transfer_figure):
        content = make(runs, CANONICAL, 0.1)
        for part in ("SYNTHETIC", "SPair-71k test", "4 pairs", "8 images", "canonical@1", "0.1"):
            assert part in content["caption"], (make, part)
        assert [m["label"] for m in content["matchers"]] == ["one", "two"]
        assert content["matchers"][0]["predictions_sha256"] == runs[0].sha256
        assert content["dataset"]["fingerprint"] == "f" * 64
        assert content["dataset"]["n_pairs"] == 4


def test_a_part_of_a_real_dataset_says_so(tmp_path: Path) -> None:
    put(tmp_path, "one", ONE, synthetic=False, official_pairs=12234)
    (runs,) = find_sources(tmp_path, CANONICAL).values()
    caption = class_figure(runs, CANONICAL, 0.1)["caption"]
    assert "4 of its 12,234 pairs" in caption
    assert "SYNTHETIC" not in caption


def test_what_is_not_annotated_cannot_be_drawn(tmp_path: Path) -> None:
    put(tmp_path, "one", [[0] * 4] * 4, pairs=four_pairs(flags=False))
    (runs,) = find_sources(tmp_path, CANONICAL).values()
    with pytest.raises(CannotDraw, match="SPair-71k has no two levels"):
        difficulty_figure(runs, CANONICAL, 0.1)
    put(tmp_path, "one", [[0] * 4] * 3, pairs=four_pairs()[:3])
    (runs,) = find_sources(tmp_path, CANONICAL).values()
    with pytest.raises(CannotDraw, match="single class"):
        class_figure(runs, CANONICAL, 0.1)


# -- pictures -------------------------------------------------------------------------------------


def test_the_heat_map_prints_its_numbers(
    runs: list[Run], figures: list[Figure], tmp_path: Path
) -> None:
    content = class_figure(runs, CANONICAL, 0.1)
    draw_classes(content, tmp_path / "f" / "classes")
    shown = texts(figures[0])
    assert {f"{100 * e['pck']:.1f}" for e in content["entries"]} <= set(shown)
    assert {"cat (3)", "dog (1)", "all (4)", "one", "two"} <= set(shown)
    grid = figures[0].axes[0].collections[0].get_array()
    np.testing.assert_allclose(grid, [[700 / 12, 400 / 12], [25, 100], [50, 50]])


def test_curves_are_drawn_with_bands(
    runs: list[Run], figures: list[Figure], tmp_path: Path
) -> None:
    content = curve_figure(runs, CANONICAL, 0.1)
    draw_pck_curves(content, tmp_path / "curves")
    (axes,) = figures[0].axes
    lines = {line.get_label().partition(":")[0]: line for line in axes.lines}
    x, y = lines["one"].get_data()
    assert x[0] == 0.005
    assert x[-1] == 0.2
    assert y[list(x).index(0.1)] == pytest.approx(100 * (2 + 4 + 1 + 1) / 16)
    assert len(axes.collections) == 2
    assert lines["one"].get_linestyle() != lines["two"].get_linestyle()
    at = entry(content, "two", alpha=0.1)
    wanted = f"two: 50.0 [{100 * at['low']:.1f}, {100 * at['high']:.1f}]"
    assert wanted in texts(figures[0])


def test_difficulty_has_a_panel_per_annotated_flag(
    runs: list[Run], figures: list[Figure], tmp_path: Path
) -> None:
    """Truncation is 0 everywhere, scale and occlusion are not annotated: only viewpoint is left,
    easy for pairs 0 and 2, medium for 1 and 3."""
    content = difficulty_figure(runs, CANONICAL, 0.1)
    draw_difficulty(content, tmp_path / "difficulty")
    (axes,) = figures[0].axes
    assert axes.get_title() == "viewpoint"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["easy\n(2)", "medium\n(2)"]
    drawn = [container.lines[0].get_ydata()[0] for container in axes.containers]
    np.testing.assert_allclose(drawn, [300 / 8, 500 / 8, 0, 100])


def test_a_level_without_interval_has_an_open_marker(figures: list[Figure], tmp_path: Path) -> None:
    """One pair alone determines no interval: easy and hard have one each, medium two."""
    pairs = four_pairs()
    pairs[0].flags["viewpoint"] = 2
    put(tmp_path, "one", ONE, pairs=pairs)
    (runs,) = find_sources(tmp_path, CANONICAL).values()
    content = difficulty_figure(runs, CANONICAL, 0.1)
    assert entry(content, "one", value="2")["low"] is None
    draw_difficulty(content, tmp_path / "difficulty")
    faces = [c.lines[0].get_markerfacecolor() for c in figures[0].axes[0].containers]
    assert [isinstance(face, str) and face == "white" for face in faces] == [True, False, True]


def test_three_files_of_equal_bytes(runs: list[Run], tmp_path: Path) -> None:
    content = class_figure(runs, CANONICAL, 0.1)
    first = [file.read_bytes() for file in draw_classes(content, tmp_path / "a.1")]
    files = draw_classes(content, tmp_path / "a.1")
    assert [file.name for file in files] == ["a.1.png", "a.1.pdf", "a.1.json"]
    assert [file.read_bytes() for file in files] == first
    assert json.loads(files[2].read_text()) == json.loads(json.dumps(content))
    assert files[1].read_bytes().startswith(b"%PDF")
    with PILImage.open(files[0]) as picture:
        assert picture.size[0] == 990  # 3.3 inches at 300 dpi


def test_numbers_that_are_no_json_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_figure(tmp_path / "x", {"caption": "c", "v": NAN}, (3, 2), lambda figure: None)
    assert not (tmp_path / "x.json").exists()


# -- transfer -------------------------------------------------------------------------------------


def pixels_of(content: dict[str, Any]) -> dict[str, np.ndarray]:
    hashes = {e[s] for e in content["pairs"] for s in ("query_hash", "reference_hash")}
    return {digest: np.full((200, 300, 3), 90, np.uint8) for digest in hashes}


def test_transfer_tells_right_from_wrong(
    runs: list[Run], figures: list[Figure], tmp_path: Path
) -> None:
    content = transfer_figure(runs, CANONICAL, 0.1, ["p3", "p0"])
    answers = {(p["pair"], a["label"]): a for p in content["pairs"] for a in p["answers"]}
    assert answers["p3", "one"]["right"] == [False, True, False, False]
    assert answers["p3", "one"]["points"][:2] == [[None, 50], [54, 150]]
    assert (answers["p0", "two"]["n_right"], answers["p0", "two"]["n"]) == (0, 4)
    draw_transfer(content, pixels_of(content), tmp_path / "transfer")
    grid = np.array(figures[0].axes).reshape(2, 3)
    assert [axes.get_title() for axes in grid[0]] == ["query", "one", "two"]
    assert grid[0, 1].get_xlabel() == "1 of 4, 1 unanswered"
    assert grid[0, 2].get_xlabel() == "4 of 4"
    of = {
        kind: [line for line in grid[1, 1].lines if line.get_color() == colour]
        for kind, colour in (("right", RIGHT), ("wrong", WRONG))
    }
    assert [line.get_xydata().tolist() for line in of["right"]] == [[[50, 50]], [[55, 150]]]
    links = [line.get_xydata().tolist() for line in of["wrong"] if line.get_linestyle() == "-"]
    assert links == [[[220, 100], [200, 100]], [[230, 20], [200, 20]]]


def test_transfer_spreads_its_pairs(tmp_path: Path) -> None:
    pairs = [
        Pair(f"p{k}", "cat", image(f"s{k}"), image(f"t{k}"), SPOTS, SPOTS, tuple("abcd"),
             np.float32([0, 0, 9, 9]), np.float32([0, 0, 9, 9]))
        for k in range(40)
    ]  # fmt: skip
    put(tmp_path, "one", [[0] * 4] * 40, pairs=pairs)
    (runs,) = find_sources(tmp_path, CANONICAL).values()
    content = transfer_figure(runs, CANONICAL, 0.1)
    assert [entry["pair"] for entry in content["pairs"]] == ["p5", "p15", "p25", "p35"]
    assert "not by their results" in content["caption"]


def test_too_many_matchers_leave_the_best(tmp_path: Path) -> None:
    for k in range(7):
        put(tmp_path, f"m{k}", [[0] * k + [50] * (4 - k) if k < 4 else [0] * 4] * 4)
    (runs,) = find_sources(tmp_path, CANONICAL).values()
    content = transfer_figure(runs, CANONICAL, 0.1)
    assert [m["label"] for m in content["matchers"]] == ["m2", "m3", "m4", "m5", "m6"]
    assert "5 of 7 matchers" in content["caption"]


def test_transfer_refuses_what_is_not_there(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="no pair 'p9' in SPair-71k"):
        transfer_figure(runs, CANONICAL, 0.1, ["p9"])
    content = transfer_figure(runs, CANONICAL, 0.1, ["p1"])
    with pytest.raises(CannotDraw, match="image of pair p1"):
        draw_transfer(content, {}, tmp_path / "transfer")


# -- where they come from -------------------------------------------------------------------------


def test_rows_come_as_asked(out: Path) -> None:
    def labels(**options: Any) -> list[str]:
        (found,) = find_sources(out, CANONICAL, **options).values()
        return [run.label for run in found]

    assert labels(order=["two", "one"]) == ["two", "one"]
    assert labels(order=["two"]) == ["two", "one"]
    assert labels(names=[("two",)]) == ["two"]
    assert labels(names=[("config", "two"), ("one",)]) == ["two", "one"]
    assert labels(dataset="spair-test-synthetic") == ["one", "two"]


def test_sources_that_are_not_there(out: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotDraw, match="holds no predictions that canonical@1 scores"):
        find_sources(tmp_path / "empty", CANONICAL)
    with pytest.raises(CannotDraw, match="no predictions on pfwillow"):
        find_sources(out, CANONICAL, dataset="pfwillow")
    with pytest.raises(CannotDraw, match="that nemf-paper@1 scores"):
        find_sources(out, get_protocol("nemf-paper@1"))
    with pytest.raises(NemfError, match=r"'three' is not predicted .*'one', 'two'"):
        find_sources(out, CANONICAL, names=[("three",)])
    put(out, "three", ONE, fingerprint="e" * 64)
    with pytest.raises(NemfError, match="different versions of the dataset"):
        find_sources(out, CANONICAL)


# -- trainings ------------------------------------------------------------------------------------


def write_story(out: Path, name: str, **changed: Any) -> Path:
    facts = {"dataset": "spair", "pairs": 50, "synthetic": True, "fingerprint": "f"}
    story = {
        "settings": {"val_cfg": {"protocol": "canonical@1", "pairs": 10}},
        "datasets": {
            "train_dataloader": facts | {"split": "trn"},
            "val_dataloader": facts | {"split": "val"},
        },
        "validation": {"epoch": 2, "score": 0.5},
        "curve": [
            {"epoch": 1, "loss": 2.0, "loss_flow": 2.0},
            {"epoch": 2, "loss": 1.0, "loss_flow": 1.0, "pck-0.10": 0.5},
        ],
    } | changed
    file = out / "training" / name / f"{name}.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(story))
    return file


def test_a_training_is_drawn(figures: list[Figure], tmp_path: Path) -> None:
    file = write_story(tmp_path, "small")
    write_story(tmp_path, "without", curve=[])
    assert finished_trainings(tmp_path) == [file]
    content = training_figure(file)
    draw_training(content, tmp_path / "figures" / "training")
    left, right = figures[0].axes
    assert left.lines[0].get_ydata().tolist() == [2, 1]
    assert right.lines[0].get_ydata().tolist() == [50]
    for part in ("small", "SYNTHETIC", "10 of 50 pairs", "canonical@1", "epoch 2"):
        assert part in content["caption"]


def test_no_training_no_curve(tmp_path: Path) -> None:
    with pytest.raises(CannotDraw, match="no finished training"):
        finished_trainings(tmp_path)
    broken = tmp_path / "training" / "x" / "x.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    with pytest.raises(NemfError, match=r"x\.json: cannot be read"):
        finished_trainings(tmp_path)
