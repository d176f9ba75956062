"""Two photographs of one's own: `nemf match`, the one-call API, and pictures in notebooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ImageOps
import pytest
import torch
from PIL import Image as PILImage

import nemf as suite
from experiments import own_images
from experiments.own_images import check_inside, chosen_matchers, grid_points, read_points
from nemf.backbones import build_backbone
from nemf.errors import NemfError
from nemf.match_pictures import match_figure
from nemf.pairs import Matches
from nemf.photographs import orientation, upright_pixels, upright_size, write_upright
from tests.conftest import REPO, save_image, tiny_pixels


@pytest.fixture(autouse=True)
def _desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder without weights, and no settings."""
    monkeypatch.chdir(tmp_path)
    for name in ("NEMF_DATA", "NEMF_WEIGHTS", "NEMF_DOWNLOAD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def turned(path: Path, stored: np.ndarray, exif_orientation: int) -> Path:
    exif = PILImage.Exif()
    exif[274] = exif_orientation
    PILImage.fromarray(stored).save(path, exif=exif)
    return path


# -- photographs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exif_orientation", range(1, 9))
def test_photographs_are_turned_as_pillow_turns_them(exif_orientation: int, tmp_path: Path) -> None:
    path = turned(tmp_path / "p.png", tiny_pixels(0, 20, 30), exif_orientation)
    with PILImage.open(path) as image:
        expected = np.asarray(PIL.ImageOps.exif_transpose(image))
    assert orientation(path) == exif_orientation
    assert upright_size(path) == expected.shape[:2]
    assert (upright_pixels(path) == expected).all()
    write_upright(path, tmp_path / "copy.png")
    with PILImage.open(tmp_path / "copy.png") as copy:
        assert 274 not in copy.getexif()
        assert (np.asarray(copy) == expected).all()


def test_an_orientation_that_exif_does_not_know_is_none(tmp_path: Path) -> None:
    path = turned(tmp_path / "p.png", tiny_pixels(0, 20, 30), 77)
    assert (upright_pixels(path) == tiny_pixels(0, 20, 30)).all()


def test_heic_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NemfError, match=r"a\.HEIC: HEIC cannot be read; save the photograph"):
        upright_pixels(tmp_path / "a.HEIC")


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_is_known_by_its_bytes(brand: bytes, tmp_path: Path) -> None:
    for name, start in (("phone.jpg", b"ftyp" + brand), ("other.jpg", b"ftypisom")):
        (tmp_path / name).write_bytes(b"\0\0\0\x18" + start + bytes(64))
    with pytest.raises(NemfError, match=r"phone\.jpg: HEIC cannot be read; .*`magick IMG\.HEIC"):
        upright_pixels(tmp_path / "phone.jpg")
    with pytest.raises(NemfError, match=r"other\.jpg: not a readable image"):
        upright_pixels(tmp_path / "other.jpg")


def test_grey_of_16_bits_is_refused_not_clipped(tmp_path: Path) -> None:
    image = PILImage.fromarray(np.full((20, 30), 30000, np.uint16))
    image.save(tmp_path / "deep.png")
    with pytest.raises(NemfError, match=r"deep\.png: has more than 8 bits.*save it with 8 bits"):
        upright_pixels(tmp_path / "deep.png")
    copy = suite.build_matcher("copy")
    with pytest.raises(NemfError, match="the image: has more than 8 bits"):
        suite.match(copy, image, image, [[1, 1]])
    PILImage.new("L", (30, 20), 120).save(tmp_path / "grey.png")
    assert (upright_pixels(tmp_path / "grey.png") == 120).all()


def test_the_one_call_api_turns_paths_and_leaves_pixels(tmp_path: Path) -> None:
    stored = tiny_pixels(0, 20, 30)
    path = turned(tmp_path / "p.png", stored, 6)
    copy = suite.build_matcher("copy")
    reference = tiny_pixels(1, 60, 20)  # upright the query is 30 high and 20 wide
    assert suite.match(copy, path, reference, [[3, 4]]).points.tolist() == [[3, 8]]
    with PILImage.open(path) as image:
        as_stored = suite.match(copy, image, reference, [[3, 4]])
    assert as_stored.points.tolist() == [[2, 12]]
    assert suite.match(copy, stored, reference, [[3, 4]]).points.tolist() == [[2, 12]]


def test_points_outside_the_query_image_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    copy, pixels = suite.build_matcher("copy"), tiny_pixels(0, 20, 30)
    suite.match(copy, pixels, pixels, [[-1, 20], [30, 0]])  # one pixel of slack
    assert caplog.text == ""
    suite.match(copy, pixels, pixels, [[3, 4], [4, 25]])
    assert "1 of 2 points lie outside the query image (30x20), the first of them (4, 25)" in (
        caplog.text
    )


def test_what_is_no_matcher_image_or_points_is_named() -> None:
    copy, pixels = suite.build_matcher("copy"), tiny_pixels(0, 20, 30)
    with pytest.raises(NemfError, match=r"as nemf\.build_matcher makes them, not str"):
        suite.match("copy", pixels, pixels, [[1, 1]])  # type: ignore[arg-type]
    with pytest.raises(NemfError, match=r"points must be numbers of shape \(N, 2\)"):
        suite.match(copy, pixels, pixels, "1,1")
    with pytest.raises(NemfError, match=r"points must be finite, but row 1 is \[nan, 3\.0\]"):
        suite.match(copy, pixels, pixels, [[1, 1], [np.nan, 3]])
    with pytest.raises(ValueError, match=r"must be uint8 \(H, W, 3\), not float64"):
        suite.match(copy, pixels.astype(float), pixels, [[1, 1]])


# -- plot -----------------------------------------------------------------------------------------


def test_matches_show_themselves() -> None:
    copy = suite.build_matcher("copy")
    points = np.array([[3.0, 4.0], [10.0, 5.0]], np.float32)
    matches = suite.match(copy, tiny_pixels(0, 20, 30), tiny_pixels(1, 40, 60), points)
    points[:] = 0  # what was asked is not changed by what becomes of the caller's array
    figure = matches.plot()
    assert [axes.get_title() for axes in figure.axes] == ["query", "reference"]
    data = figure._repr_png_()
    assert data.startswith(b"\x89PNG")
    drawn = [line.get_xydata().tolist() for line in figure.artists if hasattr(line, "get_xydata")]
    assert [[3, 4]] in drawn
    assert [[6, 8]] in drawn


@pytest.mark.parametrize("sizes", [((20, 20), (249, 300)), ((179, 300), (200, 1500))])
@pytest.mark.parametrize("label", ["", "HPF"])
def test_titles_and_caption_fit_into_the_picture(sizes: Any, label: str) -> None:
    images = [np.zeros((*size, 3), np.uint8) for size in sizes]
    figure = match_figure(*images, [[1, 1]], {label: np.full((1, 2), np.nan)}, ("a.jpg", "b.jpg"))
    figure.canvas.draw()
    texts = [axes.title for axes in figure.axes] + figure.texts
    assert any("no answer for 1" in text.get_text() for text in texts)
    for text in texts:
        box = text.get_window_extent()
        assert box.y0 >= 0
        assert box.y1 <= figure.bbox.height


def test_bare_matches_say_that_they_know_no_images() -> None:
    bare = Matches(torch.zeros(1, 2), None, None)
    assert bare.scene is None
    with pytest.raises(NemfError, match=r"know no images: nemf\.match gives some that do"):
        bare.plot()
    with pytest.raises(TypeError):
        Matches(torch.zeros(1, 2), None, None, None)  # type: ignore[call-arg]
    assert "scene" not in repr(bare)
    assert bare != Matches(torch.zeros(1, 2))


def test_no_window_system_is_touched() -> None:
    code = (
        "import numpy as np, sys, nemf; p = np.zeros((20, 30, 3), np.uint8);"
        "m = nemf.match(nemf.build_matcher('copy'), p, p, [[1, 2]]);"
        "print('matplotlib' in sys.modules); m.plot()._repr_png_();"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


# -- points ---------------------------------------------------------------------------------------


def test_a_grid_is_the_middles_of_equal_parts() -> None:
    assert grid_points((4, 8), 2).tolist() == [[1.5, 0.5], [5.5, 0.5], [1.5, 2.5], [5.5, 2.5]]
    assert grid_points((5, 7), 1).tolist() == [[3, 2]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "x,y\n# the ear\n1,2\n\n3.5, 4\n"),
        ("p.txt", "1 2\n3.5\t4\n"),
        ("p.json", "[[1, 2], [3.5, 4]]"),
        ("p.json", '{"points": [[1, 2], [3.5, 4]], "matchers": []}'),
    ],
)
def test_points_from_files(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_points([name]).tolist() == [[1, 2], [3.5, 4]]
    assert read_points([name, "7,8 9,10"]).tolist() == [[1, 2], [3.5, 4], [7, 8], [9, 10]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1,2\n3\n", "line 2: expected x and y"),
        ("1,2\na,b\n", "line 2: expected x and y"),
        ("x,y\n", "holds no points"),
        ("1,inf\n", "finite"),
        ("\udcff", "cannot be read"),
    ],
)
def test_points_that_are_none(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(NemfError, match=reason):
        read_points(["p.csv"])


def test_a_file_of_points_that_is_not_there_is_called_so() -> None:
    with pytest.raises(NemfError, match=r"--points 'gone\.csv': there is no such file; expected"):
        read_points(["gone.csv"])
    with pytest.raises(NemfError, match=r"but point 2 is \[3\.0, inf\]"):
        read_points(["1,2 3,inf"])


def test_a_point_may_lie_one_pixel_outside() -> None:
    check_inside(np.array([[-1.0, 0.0], [30.0, 20.0]]), (20, 30), "a.png")
    with pytest.raises(NemfError, match=r"point 1 \(30\.5, 3\) lies outside a\.png \(30x20\)"):
        check_inside(np.array([[30.5, 3.0]]), (20, 30), "a.png")


# -- matchers -------------------------------------------------------------------------------------


def test_the_best_matcher_whose_weights_are_there_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shipped,) = chosen_matchers([], {}, tmp_path)
    assert (shipped.name, shipped.shipped) == ("hpf_small", True)
    assert "resnet_small.pth, which comes with nemf and knows rendered" in shipped.described()
    folder = tmp_path / "weights"
    folder.mkdir()
    state = build_backbone("resnet18", init="random", upto=6).state_dict()
    torch.save(state, folder / "resnet18-mine.pth")
    monkeypatch.setenv("NEMF_WEIGHTS", str(folder))
    (better,) = chosen_matchers([], {}, tmp_path)
    assert (better.name, better.shipped) == ("hpf_resnet18", False)
    assert better.weights_file == folder / "resnet18-mine.pth"
    assert better.described().endswith(f", on {folder / 'resnet18-mine.pth'}")


def test_random_weights_are_called_so(tmp_path: Path) -> None:
    options = {"model.weights": None, "model.init": "random"}
    (chosen,) = chosen_matchers(["nearest_small", "nearest_small"], options, tmp_path)
    assert chosen.described().endswith("with RANDOM weights")
    assert chosen.as_dict()["weights"] | {"sha256": ""} == {
        "file": None, "sha256": "", "random": True, "shipped": False,
    }  # fmt: skip
    (copy,) = chosen_matchers(["copy"], {}, tmp_path)
    assert copy.described() == "copy: copy (floor), without weights"


def test_options_need_a_named_matcher(tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="name it with --matcher"):
        chosen_matchers([], {"model.layers": (4, 6)}, tmp_path)


# -- the command ----------------------------------------------------------------------------------


def test_nothing_but_two_photographs_is_needed(nemf: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("a.jpg", "b.jpg")):
        save_image(tmp_path / name, seed, 180, 240)
    result = nemf("match", "a.jpg", "b.jpg")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[:2] == ["a.jpg: 240x180 px", "b.jpg: 240x180 px"]
    assert lines[2].startswith("hpf_small: ")
    assert [line.split()[0] for line in lines[3:-1]] == [str(k) for k in range(1, 17)]
    assert lines[-1] == "outputs/match/a-b.png"
    with PILImage.open(lines[-1]) as picture:
        assert picture.size[0] > 500


def test_both_images_are_drawn_and_matchers_are_rows(nemf: Any, tmp_path: Path) -> None:
    files = []
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        files.append(tmp_path / f"{name}.png")
        PILImage.new("RGB", (80, 60), colour).save(files[-1])
    picture = tmp_path / "new" / "m.png"
    points = ("--points", "10,20 70.5,3", "--out", picture)
    result = nemf("match", *files, "--matcher", "copy", *points)
    assert result.status == 0, result.err
    assert result.out.splitlines()[2:] == [
        "copy: copy (floor), without weights",
        "   1  10.0,20.0 -> 10.0,20.0",
        "   2  70.5,3.0 -> 70.5,3.0",
        str(picture),
    ]
    pixels = np.asarray(PILImage.open(picture).convert("RGB")).astype(int)
    middle = pixels.shape[1] // 2
    for half, colour in ((pixels[:, :middle], (200, 30, 30)), (pixels[:, middle:], (30, 30, 200))):
        assert (np.abs(half - colour).max(-1) < 8).mean() > 0.5
    nemf("match", *files, "--matcher", "copy", "--matcher", "nearest_small", *points)
    with PILImage.open(picture) as both:
        assert both.height > 1.7 * pixels.shape[0]


def test_as_json(nemf: Any, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 0, 20, 30)
    turned(tmp_path / "b.png", tiny_pixels(1, 90, 40), 6)
    result = nemf("match", "a.png", "b.png", "--matcher", "copy", "--points", "3,4", "--json")
    content = json.loads(result.out)
    (copy,) = content.pop("matchers")
    assert content == {
        "query": {"file": "a.png", "width": 30, "height": 20, "exif_orientation": 1},
        "reference": {"file": "b.png", "width": 90, "height": 40, "exif_orientation": 6},
        "points": [[3, 4]],
        "picture": None,
    }
    assert (copy["matcher"], copy["answers"], copy["confidence"]) == ("copy", [[9, 8]], None)
    assert not (tmp_path / "outputs").exists()
    plain = nemf("match", "a.png", "b.png", "--matcher", "copy", "--points", "3,4")
    assert "b.png: 90x40 px, turned upright as its EXIF says" in plain.out


def test_no_answer_is_said(
    nemf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from baselines.copy import CopyKeypoints

    def silent(self: Any, queries: Any, references: Any, points: Any) -> list[Matches]:
        return [Matches(torch.full_like(p, float("nan"))) for p in points]

    monkeypatch.setattr(CopyKeypoints, "match", silent)
    image = save_image(tmp_path / "a.png", 0, 20, 30)
    arguments = ("match", image, image, "--matcher", "copy", "--points", "3,4")
    result = nemf(*arguments)
    assert "   1  3.0,4.0 -> no answer\n" in result.out
    assert "copy answers no point: a photograph of 30x20 or 30x20 px may be too" in caplog.text
    answer = json.loads(nemf(*arguments, "--json").out)
    assert answer["matchers"][0]["answers"] == [[None, None]]


def test_missing_weights_say_what_to_do(nemf: Any, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.png", 0, 20, 30)
    result = nemf("match", image, image, "--matcher", "hpf_resnet18")
    assert result.status == 2
    assert result.err.startswith("nemf: hpf_resnet18: no weights for resnet18: ")
    assert "allow the download with --download" in result.err
    assert "put resnet18*.pth into the folder of --weights" in result.err
    result = nemf("match", image, image, "--matcher", "cats_small")
    assert "run `nemf train cats_small`" in result.err


def test_a_weights_file_in_place_of_its_folder(nemf: Any, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.png", 0, 20, 30)
    (tmp_path / "w.pth").write_bytes(b"")
    result = nemf("match", image, image, "--weights", tmp_path / "w.pth")
    assert f"it is a file: give its folder, {tmp_path})" in result.err


def test_weights_beside_are_found(nemf: Any, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    state = build_backbone("resnet18", init="random", upto=6).state_dict()
    torch.save(state, tmp_path / "weights" / "resnet18.pth")
    image = save_image(tmp_path / "a.png", 0, 180, 240)
    result = nemf("match", image, image, "--grid", "1", "--json")
    os.environ.pop("NEMF_WEIGHTS", None)  # the command sets it for the backbones
    assert json.loads(result.out)["matchers"][0]["matcher"] == "hpf_resnet18"


def test_the_order_of_preference_names_configs() -> None:
    from experiments.configurations import config_names

    assert set(own_images.PREFERRED) <= set(config_names("matchers"))
