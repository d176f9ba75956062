"""Pictures of matches: they are PNGs, show both images, and name what has no answer."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch
from matplotlib.text import Annotation, Text
from PIL import Image as PILImage

from nemf.errors import NemfError
from nemf.match_pictures import draw_matches, match_figure
from reports.training_figure import draw_curves

NAN = float("nan")
RED, BLUE = (200, 30, 30), (30, 30, 200)


def plain(colour: tuple[int, int, int], height: int = 60, width: int = 80) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def share(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(pixels.astype(int) - colour).max(-1) < 8).mean())


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved while the test runs."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: Any, **keywords: Any) -> None:
        saved.append(self)
        save(self, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_the_picture_is_a_png_of_both_images(tmp_path: Path) -> None:
    points = np.array([[10.0, 10.0], [70.0, 50.0]])
    file = tmp_path / "new" / "m.png"
    draw_matches(plain(RED), plain(BLUE), points, points, file)
    with PILImage.open(file) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    middle = pixels.shape[1] // 2
    assert share(pixels[:, :middle], RED) > 0.5
    assert share(pixels[:, middle:], BLUE) > 0.5
    assert share(pixels[:, :middle], BLUE) == share(pixels[:, middle:], RED) == 0
    assert [path.name for path in file.parent.iterdir()] == ["m.png"]


def test_points_lie_where_they_should(tmp_path: Path) -> None:
    """One point in a corner of each image; its colour shows there and in no other corner."""
    file = tmp_path / "m.png"
    draw_matches(plain(RED), plain(BLUE), [[4, 4]], np.array([[75.0, 55.0]]), file)
    pixels = np.asarray(PILImage.open(file).convert("RGB"))
    orange = np.abs(pixels.astype(int) - (0xE6, 0x9F, 0x00)).max(-1) < 8
    middle = pixels.shape[1] // 2
    ys, xs = np.nonzero(orange)
    assert xs.min() < 0.15 * middle
    assert xs.max() > middle + 0.85 * middle
    assert ys[xs.argmin()] < pixels.shape[0] * 0.3
    assert ys[xs.argmax()] > pixels.shape[0] * 0.7


def test_unanswered_points_are_named(figures: list[Figure], tmp_path: Path) -> None:
    points = [[10, 10], [20, 20], [30, 30]]
    answers = np.array([[NAN, NAN], [5, 5], [NAN, 3]])
    draw_matches(plain(RED), plain(BLUE), points, answers, tmp_path / "m.png")
    (figure,) = figures
    assert "no answer for 1, 3" in texts(figure)
    numbers = [text.get_text() for text in figure.findobj(Annotation)]
    assert sorted(numbers) == ["1", "2", "2", "3"]
    assert len(figure.findobj(ConnectionPatch)) == 1


def test_a_full_set_of_answers_needs_no_caption(figures: list[Figure], tmp_path: Path) -> None:
    draw_matches(plain(RED), plain(BLUE), [[1, 2]], np.array([[3.0, 4.0]]), tmp_path / "m.png")
    assert not [text for text in texts(figures[0]) if "no answer" in text]
    assert {"query", "reference", "1"} <= set(texts(figures[0]))


def test_numbers_lie_above_points_and_points_above_links(
    figures: list[Figure], tmp_path: Path
) -> None:
    points = np.array([[10.0, 10.0], [30.0, 20.0]])
    draw_matches(plain(RED), plain(BLUE), points, points, tmp_path / "m.png")
    markers = [artist for artist in figures[0].artists if isinstance(artist, Line2D)]
    links = figures[0].findobj(ConnectionPatch)
    numbers = figures[0].findobj(Annotation)
    assert len(markers) == len(numbers) == 4
    assert max(a.zorder for a in links) < min(a.zorder for a in markers)
    assert max(a.zorder for a in markers) < min(a.zorder for a in numbers)


@pytest.mark.parametrize("answers", [np.zeros((0, 2)), np.full((3, 2), NAN)])
def test_nothing_to_draw_is_fine(answers: np.ndarray, tmp_path: Path) -> None:
    points = np.ones((len(answers), 2))
    draw_matches(plain(RED), plain(BLUE), points, answers, tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 0


@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (2, 2), (1500, 2000)])
def test_any_shape_of_image_gives_a_picture_of_moderate_size(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    draw_matches(plain(RED, *shape), plain(BLUE), [[0, 0]], np.array([[2, 2]]), tmp_path / "m.png")
    with PILImage.open(tmp_path / "m.png") as image:
        assert max(image.size) <= 2000
        assert min(image.size) >= 150


def test_points_outside_do_not_move_the_images(figures: list[Figure], tmp_path: Path) -> None:
    points, answers = [[10, 10], [500, -90]], np.array([[20.0, 20.0], [-300.0, 400.0]])
    draw_matches(plain(RED), plain(BLUE), points, answers, tmp_path / "m.png")
    for axes in figures[0].axes:
        assert axes.get_xlim() == (-0.5, 79.5)
        assert axes.get_ylim() == (59.5, -0.5)


@pytest.mark.parametrize("name", ["m.bmp", "m", "m.png.txt"])
def test_another_ending_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(NemfError, match=r"give a name that ends in \.png, \.pdf"):
        draw_matches(plain(RED), plain(BLUE), [[1, 1]], np.ones((1, 2)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_answers_must_fit_the_points(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 answers to 1 points"):
        draw_matches(plain(RED), plain(BLUE), [[1, 1]], np.ones((2, 2)), tmp_path / "m.png")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(NemfError, match=r"m\.png: cannot be written \(No space left"):
        draw_matches(plain(RED), plain(BLUE), [[1, 1]], np.ones((1, 2)), tmp_path / "m.png")
    assert list(tmp_path.iterdir()) == []


def test_a_row_per_matcher(tmp_path: Path) -> None:
    points = np.array([[4.0, 4.0]])
    rows = {"near": np.array([[6.0, 6.0]]), "far": np.array([[70.0, 50.0]])}
    figure = match_figure(plain(RED), plain(BLUE), points, rows, ("a.jpg", "b.jpg"))
    assert [axes.get_title() for axes in figure.axes] == ["a.jpg", "b.jpg\nnear", "", "far"]
    heights = [axes.get_position().y0 for axes in figure.axes[::2]]
    assert heights[0] > heights[1]
    rows["far"] = np.array([[NAN, NAN]])
    file = tmp_path / "m.svg"
    draw_matches(plain(RED), plain(BLUE), points, rows, file)
    assert "far: no answer for 1" in texts(match_figure(plain(RED), plain(BLUE), points, rows))
    assert file.read_text().startswith("<?xml")


def test_many_points_are_not_buried_under_links() -> None:
    points = np.arange(18.0).reshape(9, 2)
    figure = match_figure(plain(RED), plain(BLUE), points, {"": points})
    assert figure.findobj(ConnectionPatch) == []
    assert len(figure.findobj(Annotation)) == 18


def test_a_large_image_keeps_its_coordinates() -> None:
    large = plain(RED, 4000, 3000)
    figure = match_figure(large, plain(BLUE), [[2999, 3999]], {"": np.array([[1.0, 1.0]])})
    left = figure.axes[0]
    assert (left.get_xlim(), left.get_ylim()) == ((-0.5, 2999.5), (3999.5, -0.5))
    assert max(left.images[0].get_array().shape) <= 2000


def test_a_notebook_shows_a_figure_by_itself() -> None:
    figure = match_figure(plain(RED), plain(BLUE), [[4, 4]], {"": np.array([[6.0, 6.0]])})
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_inputs_are_left_alone(tmp_path: Path) -> None:
    query, reference = plain(RED), plain(BLUE)
    points, answers = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])
    draw_matches(query, reference, points, answers, tmp_path / "m.png")
    assert (query == RED).all()
    assert (reference == BLUE).all()
    assert points.tolist() == [[1, 2]]
    assert answers.tolist() == [[3, 4]]


def test_curves_have_a_line_per_loss_and_threshold(tmp_path: Path) -> None:
    drawn: list[Figure] = []
    entries = [
        {"epoch": 1, "loss": 3.0, "loss_field": 2.0, "loss_flow": 1.0},
        {"epoch": 2, "loss": 1.5, "loss_field": 1.0, "loss_flow": 0.5, "pck-0.10": 0.4},
    ]
    with pytest.MonkeyPatch.context() as patch:
        original = Figure.savefig
        patch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), original(f, *a, **k)))
        draw_curves({"a": entries}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5_000
    left, right = drawn[0].axes
    losses = {line.get_label(): line.get_ydata() for line in left.lines}
    assert {name: list(values) for name, values in losses.items()} == {
        "a loss": [3.0, 1.5],
        "a loss_field": [2.0, 1.0],
        "a loss_flow": [1.0, 0.5],
    }
    (line,) = right.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2], [40.0])
