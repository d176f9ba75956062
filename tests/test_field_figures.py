"""Figures of NeMF's search and of matching fields: what is computed, what is drawn, the verb."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import nemf
from experiments.cli import main_group
from experiments.field_figures import (
    EncodedPair,
    keypoint_field,
    score_answers,
    search_states,
)
from nemf.datasets.spair import SPair71k
from nemf.errors import NemfError
from nemf.field.nemf import NeMF
from nemf.geometry import to_norm, to_pixels
from nemf.pairs import Plan
from nemf.scoring import get_protocol
from reports.field_pictures import (
    KeypointField,
    SearchState,
    displacement,
    draw_keypoint_fields,
    draw_search,
    flow_colours,
    full_colour_px,
    warped,
)
from tests.benchmarks.nemf_search import uneven

NAN = float("nan")
CANONICAL = get_protocol("canonical@1")
SMALL: dict[str, Any] = {
    **{"backbone": "resnet_small", "layers": (4, 6), "init": "random"},
    **{"proj_dim": 32, "mlp_ratio": 1},
}


@pytest.fixture(scope="module")
def searcher() -> NeMF:
    matcher = NeMF(**SMALL, level_channels=4, iterations=3, optimise=False)
    return uneven(matcher.eval())


@pytest.fixture
def make_pair(tiny_spair: Callable[..., Path]) -> Callable[..., EncodedPair]:
    dataset = SPair71k(tiny_spair(), "test")
    return lambda matcher, number=0, plan="src2trg": EncodedPair(
        matcher, dataset, dataset[number].oriented(Plan(plan))
    )


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved while the test runs."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))
    )
    return saved


# -- what is computed -----------------------------------------------------------------------------


def test_the_last_state_is_what_the_matcher_reads(
    searcher: NeMF, make_pair: Callable[..., EncodedPair]
) -> None:
    pair = make_pair(searcher)
    states = search_states(pair, (0, 1, 3))
    assert [state.iterations for state, _ in states] == [0, 1, 3]
    assert [state.field.shape for state, _ in states] == [(40, 60, 2)] * 3
    np.testing.assert_allclose(states[-1][1], pair.answers(), atol=1e-3)
    assert np.abs(states[0][1] - states[-1][1]).max() > 0.1
    assert searcher.iterations == 3


def test_a_state_read_at_a_pixel_is_the_field_there(
    searcher: NeMF, make_pair: Callable[..., EncodedPair]
) -> None:
    """The tiny keypoints are whole pixels, so nothing is interpolated."""
    pair = make_pair(searcher)
    ((state, answers),) = search_states(pair, (2,))
    for (x, y), answer in zip(pair.oriented.query_kps.astype(int), answers, strict=True):
        np.testing.assert_allclose(state.field[y, x], answer, atol=1e-3)


def test_the_start_is_the_soft_argmax(
    searcher: NeMF, make_pair: Callable[..., EncodedPair]
) -> None:
    """The corners of the field are the corners of the grid, resized with aligned corners."""
    pair = make_pair(searcher)
    ((state, _),) = search_states(pair, (0,))
    with torch.no_grad():
        encoded = searcher.encode_pairs([pair.reference_features], [pair.query_features])
        weight = (encoded.refined.mean(1)[0, :, 0] / 0.02).softmax(0).view(16, 16)
        axis = torch.linspace(-1, 1, 16)
        first = torch.stack([(weight.sum(0) * axis).sum(), (weight.sum(1) * axis).sum()])
    wanted = to_pixels(first, pair.reference.canvas)
    np.testing.assert_allclose(state.field[0, 0], wanted, atol=1e-3)


def test_fields_of_nemf_are_its_scores(
    searcher: NeMF, make_pair: Callable[..., EncodedPair]
) -> None:
    pair = make_pair(searcher, plan="trg2src")
    field = keypoint_field(pair, 1, "mine")
    assert field.values.shape == (85, 128)  # the reference is 60 x 40
    assert (field.xs[0], field.xs[-1], field.ys[-1]) == (0, 59, 39)
    with torch.no_grad():
        volume = searcher.encode_pairs([pair.reference_features], [pair.query_features]).volume
        query = torch.from_numpy(pair.oriented.query_kps[1:2].copy())
        side = searcher.mlp_model.at_targets(to_norm(query, pair.query.size), 16)
        for row, column in ((0, 0), (84, 127), (10, 99), (50, 3)):
            point = torch.tensor([[field.xs[column], field.ys[row]]], dtype=torch.float32)
            source = to_norm(point, pair.reference.size)
            score = searcher.mlp_model.score(volume, source, side, torch.zeros(1).long())
            assert field.values[row, column] == pytest.approx(float(score), abs=1e-4)
    np.testing.assert_array_equal(field.answer, pair.answers()[1])


def test_fields_of_cats_are_a_softmax_over_cells(make_pair: Callable[..., EncodedPair]) -> None:
    cats = nemf.build_matcher("cats", **SMALL)
    pair = make_pair(cats)
    field = keypoint_field(pair, 2, "mine")
    q, r = pair.query_features, pair.reference_features
    with torch.no_grad():
        levels = [[x[None] for x in side.levels] for side in (r, q)]
        refined = cats.refine(levels[0], r.projected[None], levels[1], q.projected[None])[0]
    # Literally: the cell whose centre is nearest, in the frame of 256 x 256.
    centres = np.array([(16 * c + 7.5, 16 * row + 7.5) for row in range(16) for c in range(16)])

    def cell(point: Any, size: tuple[int, int]) -> int:
        squashed = np.asarray(point) * 256 / np.array([size[1], size[0]])
        return int(np.abs(centres - squashed).max(1).argmin())

    costs = refined[:, cell(pair.oriented.query_kps[2], pair.query.size)].double().numpy() / 0.02
    weight = np.exp(costs - costs.max())
    weight /= weight.sum()
    for row, column in ((0, 0), (127, 112), (64, 30), (100, 71)):
        number = cell((field.xs[column], field.ys[row]), pair.reference.size)
        assert field.values[row, column] == pytest.approx(weight[number], rel=1e-3, abs=1e-9)


def test_answers_are_scored_as_files_are(
    searcher: NeMF, make_pair: Callable[..., EncodedPair]
) -> None:
    """The target box is 40 x 44 px, so alpha 0.1 is 4.4 px."""
    pair = make_pair(searcher)
    answers = pair.oriented.reference_kps + np.float32([[0, 0], [3, 3], [NAN, 0]])
    found = score_answers(pair, answers.astype(np.float32), CANONICAL, 0.1)
    assert (found["n_right"], found["n"], found["pck"]) == (2, 3, pytest.approx(2 / 3))
    assert found["errors_px"] == [0, pytest.approx(math.sqrt(18), abs=1e-4), None]


def test_what_has_no_field_is_refused(
    searcher: NeMF, make_pair: Callable[..., EncodedPair]
) -> None:
    pair = make_pair(nemf.build_matcher("copy"))
    with pytest.raises(NemfError, match="does not search a field: choose a NeMF"):
        search_states(pair, (1,))
    with pytest.raises(NemfError, match="no matching field to draw: choose NeMF or CATs"):
        keypoint_field(pair, 0, "copy")
    with pytest.raises(NemfError, match="has no keypoint 3: it has 0 to 2"):
        keypoint_field(make_pair(searcher), 3, "mine")
    official = NeMF(**SMALL, level_channels=4, official=True).eval()
    with pytest.raises(NemfError, match="official=True draws new random numbers"):
        search_states(make_pair(official), (1,))


# -- what is drawn --------------------------------------------------------------------------------


def own_positions(height: int, width: int) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width].astype(float)
    return np.stack([cols, rows], -1)


def test_warping_by_hand() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    own = own_positions(5, 7)
    np.testing.assert_array_equal(warped(image, own), image)
    np.testing.assert_array_equal(warped(image, own + [2, 1])[:4, :5], image[1:, 2:])
    assert (warped(image, own + [100, 0]) == 255).all()
    between = warped(image, own + [0.5, 0])[2, 3].astype(float)
    np.testing.assert_allclose(between, image[2, 3:5].astype(float).mean(0), atol=0.5)


def test_displacements_and_their_colours() -> None:
    field = own_positions(4, 6) + [3, -2]
    np.testing.assert_array_equal(displacement(field), np.broadcast_to([3, -2], (4, 6, 2)))
    assert full_colour_px([SearchState(0, field)]) == 3
    none, right, left, up, down, far = flow_colours(
        np.array([[[0, 0], [8, 0], [-8, 0], [0, -8], [0, 8], [80, 0]]], float), 8
    )[0]
    np.testing.assert_allclose(none, 0.55)
    np.testing.assert_allclose(right, far)
    assert right[0] > right[2]  # orange
    assert left[2] > left[0]  # blue
    assert up.sum() < none.sum() < down.sum()
    assert min(c.min() for c in (none, right, left, up, down)) >= 0


def test_the_search_is_drawn(figures: list[Figure], tmp_path: Path) -> None:
    query, reference = np.full((20, 30, 3), 60, np.uint8), np.full((24, 28, 3), 200, np.uint8)
    states = [SearchState(k, own_positions(20, 30) + k) for k in (0, 2)]
    entries = [{"text": "1 of 3 right"}, {"text": "2 of 3 right"}]
    content = {"caption": "words", "states": entries, "full_colour_px": 2.0}
    files = draw_search(content, states, query, reference, tmp_path / "search")
    assert [file.suffix for file in files] == [".png", ".pdf", ".json"]
    grid = figures[0].axes[:6]
    titles = ["query", "start", "iteration 2", "reference", "", ""]
    assert [axes.get_title() for axes in grid] == titles
    assert [axes.get_xlabel() for axes in grid[4:]] == ["1 of 3 right", "2 of 3 right"]
    drawn = grid[2].images[0].get_array()
    np.testing.assert_array_equal(drawn, warped(reference, states[1].field))
    np.testing.assert_allclose(grid[4].images[0].get_array(), 0.55)
    assert figures[0].get_supxlabel() == "words"


def test_fields_are_drawn_with_their_marks(figures: list[Figure], tmp_path: Path) -> None:
    xs, ys = np.linspace(0, 29, 30), np.linspace(0, 19, 20)
    bump = np.exp(-((xs[None] - 8) ** 2 + (ys[:, None] - 5) ** 2) / 20)
    fields = [
        KeypointField("one", "score", xs, ys, bump, np.array([8.0, 5.0])),
        KeypointField("two", "softmax", xs, ys, bump, np.array([NAN, NAN])),
    ]
    image = np.full((20, 30, 3), 60, np.uint8)
    content = {"caption": "c", "query_px": [3, 4], "true_px": [9, 6], "sigma_px": 1.0}
    content["fields"] = [{"text": "error 1.4 px"}, {"text": "no answer"}]
    draw_keypoint_fields(content, fields, image, image, tmp_path / "field")
    by_title = {axes.get_title(): axes for axes in figures[0].axes}
    for label, text in (("one", "error 1.4 px"), ("two", "no answer")):
        axes = by_title[label]
        assert axes.get_xlabel() == text
        marks = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        wanted = {"true position": [[9, 6]]} | ({"answer": [[8, 5]]} if label == "one" else {})
        assert marks == wanted
        assert axes.collections  # the contours
    assert by_title["query"].lines[0].get_xydata().tolist() == [[3, 4]]
    surfaces = [axes for axes in figures[0].axes if axes.name == "3d"]
    assert len(surfaces) == 2
    assert {t.get_text() for t in figures[0].legends[0].get_texts()} == {
        "query keypoint", "true position", "answer",
    }  # fmt: skip


def test_smoothing_is_in_pixels() -> None:
    """A grid of half pixels: a Gaussian of 2 px has a deviation of 4 steps."""
    values = np.zeros((81, 81))
    values[40, 40] = 1
    field = KeypointField(
        "x", "y", np.linspace(0, 40, 81), np.linspace(0, 40, 81), values, np.zeros(2)
    )
    smooth = field.smoothed(2.0)
    assert smooth.sum() == pytest.approx(1, abs=1e-3)
    assert smooth[40, 44] / smooth[40, 40] == pytest.approx(math.exp(-0.5), rel=1e-3)


def test_marks_are_told_apart_without_colour() -> None:
    from reports.field_pictures import _MARKS

    assert len({marker for marker, _, _ in _MARKS.values()}) == len(_MARKS)
    assert len({to_rgb(colour) for _, colour, _ in _MARKS.values()}) == len(_MARKS)


# -- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_spair: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    data, out = tiny_spair(), tmp_path / "out"

    def invoke(*arguments: str) -> Any:
        base = ["--data", str(data), "--out", str(out)]
        return CliRunner().invoke(main_group, [*arguments, *base], catch_exceptions=True)

    invoke.out = out  # type: ignore[attr-defined]
    return invoke


def trained(out: Path, name: str = "nemf_small") -> None:
    """Weights of a recipe where `nemf train` leaves them."""
    file = out / "training" / name / f"{name}.pth"
    file.parent.mkdir(parents=True)
    if name == "nemf_small":
        matcher = NeMF(**SMALL, level_channels=4, field_width=32)
    else:
        matcher = nemf.build_matcher("cats", **SMALL)
    torch.save(matcher.state_dict(), file)


def test_all_makes_what_can_be_made_and_says_what_not(run: Callable[..., Any]) -> None:
    assert run("predict", "copy/spair").exit_code == 0
    result = run("figure", "all")
    assert result.exit_code == 0, result.output
    folder = run.out / "figures" / "spair-test_canonical-1"
    assert {f.name for f in folder.iterdir()} == {
        f"{name}.{ending}"
        for name in ("classes", "curves", "difficulty", "transfer")
        for ending in ("png", "pdf", "json")
    }
    for line in ("training: ", "search: no weights for", "field: no weights for"):
        assert f"not made: {line}" in result.output
    content = json.loads((folder / "classes.json").read_text())
    assert content["drawn_by"].keys() == {"commit", "dirty"}
    assert content["matchers"][0]["label"] == "copy (floor)"


def test_without_anything_all_is_no_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main_group, ["figure", "all", "--out", str(tmp_path)], env=NO_ENV)
    assert result.exit_code == 0
    assert result.output.count("not made: ") == 7
    assert not list(tmp_path.iterdir())


NO_ENV = {"NEMF_DATA": None, "NEMF_WEIGHTS": None}


def test_search_and_field_of_a_trained_recipe(run: Callable[..., Any]) -> None:
    trained(run.out)
    trained(run.out, "cats_small")
    pair = "000002-test_c-test_d:dog"
    named = ["--matchers", "nemf_small cats_small", "--pair", pair, "--keypoint", "1"]
    result = run("figure", "search", "field", *named)
    assert result.exit_code == 0, result.output
    folder = run.out / "figures" / "spair-test_canonical-1"
    search, field = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("search_000002-test_c-test_d-dog", "field_000002-test_c-test_d-dog_1")
    )
    assert [state["iterations"] for state in search["states"]] == [0, 1, 2, 5, 10, 20]
    for state in search["states"]:
        assert state["text"].startswith(f"{state['n_right']} of 2 right")
    answered = f"{search['answer']['n_right']} of 2 right"
    for part in ("NeMF, small CNN, 10 iterations", answered, pair, "SPair-71k test", "canonical@1"):
        assert part in search["caption"]
    assert [entry["label"] for entry in field["fields"]] == [
        "NeMF, small CNN, 10 iterations",
        "CATs, small CNN",
    ]
    assert f"sigma = {field['sigma_px']:.1f} px" in field["caption"]
    assert field["sigma_px"] == pytest.approx(0.02 * 50)
    for entry in field["fields"]:
        apart = math.dist(entry["answer_px"], field["true_px"])
        assert entry["error_px"] == pytest.approx(apart, abs=1e-3)
        assert entry["text"] == f"error {entry['error_px']:.1f} px"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search"], "search: no weights for NeMF, .*run `nemf train"),
        (["search", "--matchers", "copy"], "no config of nemf among copy"),
        (["field", "--matchers", "nemf_small"], "run `nemf train nemf_small`"),
        (["search", "--pair", "nope"], "there is no pair 'nope' in SPair-71k test"),
        (["transfer", "--pair", "nope"], "holds no predictions that canonical@1 scores"),
        (["curves"], "holds no predictions"),
        (["training"], "holds no finished training"),
        (["flow"], "unknown figure 'flow': choose classes, "),
        (["classes", "--alpha", "0"], "alpha must be a positive number"),
    ],
)
def test_a_named_figure_that_cannot_be_made_is_an_error(
    run: Callable[..., Any], arguments: list[str], message: str
) -> None:
    result = run("figure", *arguments)
    assert result.exit_code != 0
    said = result.output + (str(result.exception) if result.exception else "")
    assert re.search(message, said), said


def test_a_keypoint_that_does_not_exist(run: Callable[..., Any]) -> None:
    trained(run.out)
    result = run("figure", "field", "--matchers", "nemf_small", "--keypoint", "9")
    assert result.exit_code == 2
    assert "has no keypoint 9: it has 0 to 2" in result.output
    assert not (run.out / "figures").exists()


def test_transfer_needs_the_images(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run("predict", "copy/spair").exit_code == 0
    arguments = ["figure", "transfer", "--out", str(run.out)]
    result = CliRunner().invoke(main_group, arguments, env=NO_ENV)
    assert result.exit_code == 2
    assert "give the root of the datasets with --data" in result.output
    empty = tmp_path / "empty"
    empty.mkdir()
    result = CliRunner().invoke(main_group, [*arguments, "--data", str(empty)])
    assert "holds no SPair-71k" in result.output
