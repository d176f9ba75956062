"""Annotating by clicks: the list on disk, the server's manners, and the page in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from nemf.annotation.pair_list import Changed, PairList
from nemf.annotation.server import AnnotationServer, annotation_server
from nemf.datasets.folder import FolderOfPairs
from nemf.errors import NemfError
from tests.browser import Browser
from tests.conftest import REPO, save_image, tiny_pixels

A, B = "a.png", "cats/b.jpg"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photographs of (height, width) 90x120, 80x60 and 70x70."""
    folder = tmp_path / "photos"
    for seed, (name, size) in enumerate({A: (90, 120), B: (80, 60), "c.png": (70, 70)}.items()):
        save_image(folder / name, seed, *size)
    return folder


def rows(*points: Any) -> list[dict[str, Any]]:
    return [{"name": "", "src": src, "trg": trg} for src, trg in points]


def content(*points: Any, **more: Any) -> dict[str, Any]:
    return {"category": "", "rows": rows(*points), "src_bbox": None, "trg_bbox": None} | more


def on_disk(folder: Path) -> Any:
    return json.loads((folder / "pairs.json").read_text(encoding="utf-8"))


# -- the list -------------------------------------------------------------------------------------


def test_a_pair_is_what_the_dataset_reads(photos: Path) -> None:
    pairs = PairList(photos)
    named = [{"name": "ear", "src": [3, 4.5], "trg": [7, 8]}, *rows(([30, 40], None))]
    put = pairs.put(A, B, 0, "", content(category=" cat ", rows=named, src_bbox=[1, 2, 50, 60]))
    assert put["revision"]
    assert pairs.pairs() == [put]
    assert (put["category"], put["rows"]) == ("cat", named)
    (pair,) = FolderOfPairs(photos)
    assert (pair.id, pair.category, pair.kp_names) == ("a-cats_b", "cat", ("ear",))
    assert pair.src_kps.tolist() == [[3, 4.5]]
    assert pair.trg_kps.tolist() == [[7, 8]]
    assert pair.src_bbox.tolist() == [1, 2, 50, 60]
    assert pair.trg_bbox is None


def test_a_pair_without_a_complete_point_is_left_out_aloud(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = PairList(photos)
    pairs.put(A, B, 0, "", content(([3, 4], None)))
    assert on_disk(photos)[0]["unfinished"] is True
    with pytest.raises(NemfError, match="unfinished pairs only: go on with `nemf annotate`"):
        FolderOfPairs(photos)
    pairs.put(A, "c.png", 0, "", content(([3, 4], [5, 6])))
    assert [pair.trg.name for pair in FolderOfPairs(photos)] == ["c.png"]
    assert "pairs.json: 1 unfinished left out" in caplog.text
    half = pairs.pairs()[0]
    pairs.put(A, B, 0, half["revision"], content(([3, 4], [9, 9])))
    assert "unfinished" not in on_disk(photos)[0]
    assert len(FolderOfPairs(photos)) == 2


def test_results_below_the_photographs_are_none(photos: Path) -> None:
    before = PairList(photos).photographs
    for name in ("outputs/match/m.png", "runs/one/figures/f.png"):
        save_image(photos / name, 5, 20, 30)
    (photos / "runs" / "one" / "predictions").mkdir()
    pairs = PairList(photos)
    assert pairs.photographs == before
    assert set(pairs.left_out) >= {"outputs", "runs/one"}
    assert "results of nemf" in pairs.left_out["outputs"]
    used = {"src": A, "trg": "outputs/match/m.png", "src_kps": [[1, 1]], "trg_kps": [[1, 1]]}
    (photos / "pairs.json").write_text(json.dumps([used]))
    assert PairList(photos).photographs.keys() - before.keys() == {"outputs/match/m.png"}


def test_an_edit_of_an_older_state_is_refused_with_the_newer(photos: Path) -> None:
    pairs, again = PairList(photos), PairList(photos)
    first = pairs.put(A, B, 0, "", content(([1, 1], [2, 2])))
    second = again.put(A, B, 0, first["revision"], content(([1, 1], [2, 2]), ([5, 5], None)))
    before = (photos / "pairs.json").read_bytes()
    for revision in ("", first["revision"]):
        with pytest.raises(Changed) as refused:
            pairs.put(A, B, 0, revision, content(([9, 9], [9, 9])))
        assert refused.value.pair == second
    assert (photos / "pairs.json").read_bytes() == before


def test_what_others_wrote_is_kept(photos: Path) -> None:
    mine = [
        {"src": A, "trg": B, "src_kps": [[1, 2], None], "trg_kps": [[3, 4], [5, 6]], "by": "me"},
        {"id": "second", "src": A, "trg": B, "src_kps": [[1, 1]], "trg_kps": [[1, 1]]},
    ]
    (photos / "pairs.json").write_text(json.dumps(mine))
    pairs = PairList(photos)
    first, second = pairs.pairs()
    assert (first["nth"], second["nth"]) == (0, 1)
    pairs.put(A, B, 1, second["revision"], content(([2, 2], [2, 2])))
    pairs.put(A, B, 0, first["revision"], content())
    kept, changed = on_disk(photos)
    assert (kept["by"], kept["src_kps"], kept["unfinished"]) == ("me", [], True)
    assert (changed["id"], changed["src_kps"]) == ("second", [[2, 2]])
    pairs.put(A, B, 1, pairs.pairs()[1]["revision"], content())
    assert on_disk(photos) == [kept]  # nothing of anybody was left in the other


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (content(([200, 4], [5, 6])), r"\(200, 4\) lies outside a.png \(120x90\)"),
        (content(([3, 4], [float("nan"), 6])), "a point in cats/b.jpg must be 2 finite numbers"),
        (content((None, None)), "must lie in one of the images"),
        (
            content(rows=[{"name": "x", "src": [1, 1], "trg": None}] * 2),
            "two points are called 'x'",
        ),
        (content(src_bbox=[5, 5, 5, 9]), "the box in a.png .* is empty"),
        (content(trg_bbox=[1, 2, 3]), "a box in cats/b.jpg must be 4 finite numbers"),
        ({"rows": []}, "needs category, rows and both boxes"),
        ([], "needs category, rows and both boxes"),
    ],
)
def test_what_no_dataset_may_hold_is_refused(photos: Path, wrong: Any, reason: str) -> None:
    with pytest.raises(NemfError, match=reason):
        PairList(photos).put(A, B, 0, "", wrong)
    assert not (photos / "pairs.json").exists()


def test_which_folders_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="no such folder of photographs"):
        PairList(tmp_path / "nowhere")
    lonely = tmp_path / "lonely"
    save_image(lonely / "a.png", 0, 20, 20)
    (lonely / "b.jpg").write_bytes(b"text")
    with pytest.raises(NemfError, match=r"holds 1 photographs, a pair needs two \(b.jpg: "):
        PairList(lonely)
    (photos / "pairs.json").write_text('[{"src": "a.png", "trg": "gone.png"}]')
    with pytest.raises(NemfError, match=r"names gone\.png, which is no readable image"):
        PairList(photos)
    (photos / "pairs.json").unlink()
    (photos / "pairs.csv").write_text("src,trg\n")
    with pytest.raises(NemfError, match=r"only a pairs\.json can be annotated"):
        PairList(photos)


def test_a_turned_photograph_is_annotated_upright(photos: Path) -> None:
    exif = PILImage.Exif()
    exif[274] = 6
    stored = tiny_pixels(7, 40, 60)
    PILImage.fromarray(stored).save(photos / "phone.jpg", exif=exif, quality=95)
    names = {name: p.size for name, p in PairList(photos).photographs.items()}
    assert names == {A: (90, 120), "c.png": (70, 70), B: (80, 60), "upright/phone.jpg": (60, 40)}
    copy = np.asarray(PILImage.open(photos / "upright" / "phone.jpg")).astype(int)
    assert np.abs(copy - np.rot90(stored, -1)).mean() < 4
    before = (photos / "upright" / "phone.jpg").stat().st_mtime_ns
    PairList(photos)
    assert (photos / "upright" / "phone.jpg").stat().st_mtime_ns == before


# -- the server -----------------------------------------------------------------------------------


@pytest.fixture
def server(photos: Path) -> Iterator[AnnotationServer]:
    with annotation_server(photos) as bound:
        thread = threading.Thread(target=bound.serve_forever)
        thread.start()
        yield bound
        bound.shutdown()
        thread.join()


def ask(
    server: AnnotationServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    read = answer.read()
    connection.close()
    return answer.status, read


def test_only_the_token_opens_and_only_from_this_machine(
    server: AnnotationServer, photos: Path
) -> None:
    assert server.server_address[0] == "127.0.0.1"
    home = f"/{server.token}/"
    assert len(server.token) == 32
    assert ask(server, "GET", home)[0] == 200
    for path in ("/", "/state", f"/{server.token[:-1]}x/", f"/{server.token}", "/../etc/passwd"):
        assert ask(server, "GET", path) == (404, b""), path
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert ask(server, "GET", f"{home}state", None, **headers) == (404, b"")
    body = json.dumps({"src": A, "trg": B, "nth": 0, "revision": "", "content": content()})
    kind = {"Content-Type": "application/json"}
    assert (
        ask(server, "POST", f"{home}pair", body)[0] == 400
    )  # a form of another site could do that
    assert ask(server, "POST", f"{home}pair", body, Origin="http://evil.example", **kind)[0] == 404
    long = kind | {"Content-Length": str(1 << 21)}
    assert ask(server, "POST", f"{home}pair", "", **long)[0] == 413
    for wrong in ("{", "[]", "null", '{"src": 1}', body.replace("0", "-1")):
        status, answer = ask(server, "POST", f"{home}pair", wrong, **kind)
        assert (status, json.loads(answer)) == (422, {"error": "the request is no pair"})
    for name in ("..%2Fsecret.png", "%2Fetc%2Fpasswd", "pairs.json"):
        assert ask(server, "GET", f"{home}image/{name}")[0] == 404
    assert not (photos / "pairs.json").exists()


def test_images_are_served_in_their_stored_pixels(photos: Path) -> None:
    exif = PILImage.Exif()
    exif[274] = 6
    PILImage.fromarray(tiny_pixels(7, 40, 60)).save(photos / "old.png", exif=exif)
    PILImage.fromarray(tiny_pixels(8, 40, 60)).save(photos / "scan.tif")
    listed = {"src": "old.png", "trg": A, "src_kps": [[59, 1]], "trg_kps": [[1, 1]]}
    (photos / "pairs.json").write_text(json.dumps([listed]))  # in pixels as stored
    with annotation_server(photos) as bound:
        threading.Thread(target=bound.serve_forever, daemon=True).start()
        for name, seed in (("old.png", 7), ("scan.tif", 8)):
            _, data = ask(bound, "GET", f"/{bound.token}/image/{name}")
            (photos / "served").write_bytes(data)
            image = PILImage.open(photos / "served")
            assert image.format == "PNG"
            assert 274 not in image.getexif()
            assert (np.asarray(image) == tiny_pixels(seed, 40, 60)).all()
        bound.shutdown()


def test_the_page_needs_nothing_from_elsewhere(server: AnnotationServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", f"/{server.token}/")
    answer = connection.getresponse()
    page = answer.read().decode()
    connection.close()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "//" not in page.replace("http://www.w3.org/2000/svg", "").replace("// ", "")


def test_a_folder_has_one_server_and_keeps_its_address(photos: Path) -> None:
    with annotation_server(photos) as first:
        url = first.url
        with (
            pytest.raises(NemfError, match="photos: being annotated by another `nemf annotate`"),
            annotation_server(photos),
        ):
            pass
    with annotation_server(photos) as second:
        assert second.url == url
        cache = Path(os.environ["NEMF_CACHE"])
        files = list(cache.glob("annotate/*/address.json"))
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    with annotation_server(photos.parent / "photos" / ".." / "photos") as third:
        assert third.url == url


# -- the page -------------------------------------------------------------------------------------


class Page:
    """The page of a server in a browser, used with mouse and keys."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.browser = browser
        browser.open("about:blank#", ready=False)
        browser.open(url, **options)

    def screen(self, side: str, x: float, y: float) -> tuple[float, float]:
        """Where pixel (x, y) of an image is on the screen."""
        at = self.browser.js(
            f"(() => {{ const v = views.{side}, frame = v.element.getBoundingClientRect();"
            f" return [frame.left + v.element.clientLeft + v.left + ({x} + 0.5) * v.scale,"
            f" frame.top + v.element.clientTop + v.top + ({y} + 0.5) * v.scale]; }})()"
        )
        return at[0], at[1]

    def mouse(self, kind: str, at: tuple[float, float], **more: Any) -> None:
        self.browser.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **more)

    def click(self, side: str, x: float, y: float) -> None:
        at = self.screen(side, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, at, button="left", clickCount=1)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.mouse("mousePressed", start, button="left", clickCount=1)
        for share in (0.5, 1):
            at = tuple(a + share * (b - a) for a, b in zip(start, end, strict=True))
            self.mouse("mouseMoved", at, button="left", buttons=1)
        self.mouse("mouseReleased", end, button="left", clickCount=1)

    def saved(self) -> None:
        self.wait("queue.length === 0 && !pumping")

    def wait(self, condition: str) -> None:
        self.browser.js(
            "new Promise((done, fail) => { const start = Date.now(); (function look() {"
            f" if ({condition}) done();"
            " else if (Date.now() - start > 30000) fail(new Error('in vain'));"
            " else setTimeout(look, 10); })(); })"
        )

    def text(self, name: str) -> str:
        return self.browser.js(f"byId('{name}').textContent")


@pytest.fixture
def page(server: AnnotationServer, browser: Browser) -> Iterator[Page]:
    opened = Page(browser, server.url)
    yield opened
    assert browser.problems() == []


def close_to(points: Any) -> Any:
    """The mouse meets a pixel of the screen, which is less than one of the tiny images."""
    return [None if p is None else pytest.approx(p, abs=0.3) for p in points]


def test_clicks_in_turn_make_pairs_of_points(page: Page, photos: Path) -> None:
    page.click("src", 20, 30)
    page.saved()
    assert on_disk(photos)[0]["unfinished"] is True  # the half point is on disk already
    assert page.text("hint") == "Click the same point (number 1) in the right image."
    page.click("trg", 5, 60)
    page.click("trg", 50, 60)  # the other image may come first
    page.click("trg", 54, 62)  # again on the same side: a correction
    page.click("src", 119, 89)
    page.saved()
    beside = page.browser.js("byId('view-src').getBoundingClientRect().toJSON()")
    for kind in ("mousePressed", "mouseReleased"):  # the ground beside the image is no point
        page.mouse(kind, (beside["left"] + 30, beside["top"] + 4), button="left", clickCount=1)
    page.saved()
    (entry,) = on_disk(photos)
    assert entry["src_kps"] == close_to([[20, 30], [119, 89]])
    assert entry["trg_kps"] == close_to([[5, 60], [54, 62]])
    assert "unfinished" not in entry
    assert page.text("status") == "all saved"


def test_zoomed_and_moved_clicks_mean_the_same_pixel(page: Page, photos: Path) -> None:
    middle = page.screen("src", 60, 40)
    page.mouse("mouseWheel", middle, deltaX=0, deltaY=-900)
    # It zooms where the mouse is, as far as whole pixels of the screen tell.
    assert page.screen("src", 60, 40) == pytest.approx(middle, abs=3)
    scale = page.browser.js("views.src.scale")
    assert scale > 3 * page.browser.js("Math.min(1, views.trg.scale)")
    middle = page.screen("src", 60, 40)
    page.drag(middle, (middle[0] + 40, middle[1] - 25))
    assert page.screen("src", 60, 40) == pytest.approx((middle[0] + 40, middle[1] - 25), abs=1)
    page.click("src", 61, 42)
    page.saved()
    assert on_disk(photos)[0]["src_kps"] == [pytest.approx([61, 42], abs=1 / scale)]


def test_points_can_be_moved_deleted_named_and_taken_back(page: Page, photos: Path) -> None:
    for side, x, y in (("src", 20, 30), ("trg", 5, 60), ("src", 80, 50), ("trg", 40, 20)):
        page.click(side, x, y)
    page.drag(page.screen("src", 20, 30), page.screen("src", 30, 35))
    page.saved()
    assert on_disk(photos)[0]["src_kps"] == close_to([[30, 35], [80, 50]])
    page.browser.js(
        "(() => { const input = document.querySelector('#points input');"
        " input.value = ' left eye '; input.dispatchEvent(new Event('change')); })()"
    )
    page.saved()
    assert on_disk(photos)[0]["kp_names"] == ["left eye", "1"]
    page.click("src", 30, 35)  # on a point: it is chosen, no further one is set
    page.browser.press("Delete", 46)
    page.saved()
    assert on_disk(photos)[0]["src_kps"] == close_to([[80, 50]])
    for expected in ([[30, 35], [80, 50]], [[30, 35], [80, 50]], [[20, 30], [80, 50]]):
        page.browser.press("u", 85, "u")
        page.saved()
        assert on_disk(photos)[0]["src_kps"] == close_to(expected)
    assert "kp_names" not in on_disk(photos)[0]
    for _ in range(4):
        page.browser.js("byId('undo').click()")
    page.saved()
    assert on_disk(photos) == []
    assert page.browser.js("byId('undo').disabled")


def test_names_must_differ_and_the_page_says_so(page: Page, photos: Path) -> None:
    for side, x, y in (("src", 20, 30), ("trg", 5, 60), ("src", 80, 50), ("trg", 40, 20)):
        page.click(side, x, y)
    for k in (0, 1):
        page.browser.js(
            f"(() => {{ const input = document.querySelectorAll('#points input')[{k}];"
            " input.value = 'eye'; input.dispatchEvent(new Event('change')); })()"
        )
        page.saved()
    assert page.text("notice") == "not saved: two points are called 'eye'; names must be distinct"
    assert on_disk(photos)[0]["kp_names"] == ["eye", "1"]
    page.browser.events.clear()  # the browser logs the refusal as an error of the network


def test_boxes_are_drawn_or_made_from_the_points(page: Page, photos: Path) -> None:
    for side, x, y in (("src", 20, 30), ("trg", 5, 60), ("src", 80, 50), ("trg", 40, 20)):
        page.click(side, x, y)
    page.browser.js("byId('extent').click()")
    page.saved()
    (entry,) = on_disk(photos)
    assert entry["src_bbox"] == pytest.approx([20, 30, 80, 50], abs=0.3)
    assert entry["trg_bbox"] == pytest.approx([5, 20, 40, 60], abs=0.3)
    page.browser.press("b", 66, "b")
    page.drag(page.screen("src", 100, 80), page.screen("src", 10, 15))
    page.saved()
    assert on_disk(photos)[0]["src_bbox"] == pytest.approx([10, 15, 100, 80], abs=0.3)
    assert len(on_disk(photos)[0]["src_kps"]) == 2
    page.browser.js("byId('nobox').click()")
    page.saved()
    assert "src_bbox" not in on_disk(photos)[0]


def test_pairs_are_chosen_and_gone_through(page: Page, photos: Path) -> None:
    seen = []
    for _ in range(4):
        seen.append(page.browser.js("[pair.src, pair.trg]"))
        before = page.browser.js("renders")
        page.browser.press("n", 78, "n")
        page.wait(f"renders > {before} && pair.src + pair.trg !== {json.dumps(''.join(seen[-1]))}")
    assert seen == [[A, "c.png"], [A, B], ["c.png", B], [A, "c.png"]]  # sorted, then from the start
    page.browser.choose(src="c.png", trg=B)
    page.browser.js(
        "(() => { byId('category').value = 'cat';"
        " byId('category').dispatchEvent(new Event('change')); })()"
    )
    page.click("src", 10, 10)
    page.click("trg", 20, 20)
    page.saved()
    (entry,) = on_disk(photos)
    assert (entry["src"], entry["trg"], entry["category"]) == ("c.png", B, "cat")
    assert page.browser.js("byId('pairs').selectedOptions[0].text") == f"c.png \u2192 {B}: 1 point"


def test_keys_alone_are_enough(page: Page, photos: Path) -> None:
    for key, code, arrow, arrow_code in (("1", 49, "ArrowLeft", 37), ("2", 50, "ArrowDown", 40)):
        page.browser.press(key, code, key)
        for _ in range(8):
            page.browser.press(arrow, arrow_code)
        page.browser.press("Enter", 13, "\r")
    page.saved()
    (entry,) = on_disk(photos)
    scales = page.browser.js("[views.src.scale, views.trg.scale]")
    sizes = page.browser.js("[views.src.photograph, views.trg.photograph]")
    middles = [[(s["width"] - 1) / 2, (s["height"] - 1) / 2] for s in sizes]
    assert entry["src_kps"][0] == pytest.approx(
        [middles[0][0] - 8 / scales[0], middles[0][1]], abs=0.1
    )
    assert entry["trg_kps"][0] == pytest.approx(
        [middles[1][0], middles[1][1] + 8 / scales[1]], abs=0.1
    )
    unnamed = page.browser.js(
        "[...document.querySelectorAll('select, input, button, [tabindex]')].filter((e) =>"
        " !(e.ariaLabel || e.textContent.trim() || [...e.labels ?? []].length)).map((e) => e.id)"
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_and_a_phone(
    scheme: str, server: AnnotationServer, browser: Browser
) -> None:
    page = Page(browser, server.url, scheme=scheme, width=400)
    colours = browser.js(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    light = [sum(int(v) for v in colour[4:-1].split(",")) for colour in colours]
    assert (light[0] < 120 and light[1] > 600) if scheme == "dark" else light[0] == 765
    assert browser.js("document.scrollingElement.scrollWidth") == 400
    page.click("src", 20, 30)
    page.saved()


def test_a_reload_goes_on_where_it_was(page: Page, photos: Path, server: AnnotationServer) -> None:
    page.browser.choose(src="c.png", trg=A)
    page.click("src", 10, 10)
    page.click("trg", 20, 20)
    page.click("src", 33, 40)
    page.saved()
    page.browser.open(server.url)
    assert page.browser.js("[pair.src, pair.trg]") == ["c.png", A]
    drawn = page.browser.js("document.querySelectorAll('#view-src .point').length")
    assert drawn == 2
    assert page.text("hint") == "Click the same point (number 2) in the right image."
    page.click("trg", 70, 60)
    page.saved()
    assert on_disk(photos)[0]["trg_kps"] == close_to([[20, 20], [70, 60]])


def test_two_windows_lose_nothing(
    page: Page, photos: Path, server: AnnotationServer, tmp_path: Path
) -> None:
    other_browser = Browser(page.browser.program, tmp_path / "profile")
    try:
        other = Page(other_browser, server.url)
        page.click("src", 20, 30)
        page.saved()
        other.click("src", 80, 50)  # its page does not know of the first point
        other.saved()
        page.click("trg", 30, 20)  # nor this one of the second
        page.saved()
        other.click("trg", 60, 40)
        other.saved()
        page.browser.press("u", 85, "u")  # would throw away what the other window did
        page.saved()
        assert page.text("notice").startswith("changed in another window")
    finally:
        other_browser.close()
    (entry,) = on_disk(photos)
    assert entry["src_kps"] == close_to([[20, 30], [80, 50]])
    assert entry["trg_kps"] == close_to([[30, 20], [60, 40]])
    page.browser.events.clear()  # the browser logs each conflict as an error of the network


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """``nemf annotate`` in a process of its own, and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "experiments.cli", "annotate", str(folder), "--no-browser"],
        cwd=REPO, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("annotate at "):
            return process, line.split()[2]
    raise AssertionError("the server did not start")


def test_a_killed_server_loses_nothing(photos: Path, browser: Browser) -> None:
    process, url = start(photos)
    try:
        page = Page(browser, url)
        page.click("src", 20, 30)
        page.saved()
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.click("trg", 30, 20)
        page.click("src", 80, 50)
        page.wait("offline")
        assert page.text("status").startswith("NOT SAVED: 2 step(s) wait")
        assert on_disk(photos)[0]["trg_kps"] == [None]
        process, again = start(photos)
        assert again == url
        page.saved()  # the open page goes on by itself
        assert page.text("status") == "all saved"
        assert on_disk(photos)[0]["src_kps"] == close_to([[20, 30], [80, 50]])
        assert on_disk(photos)[0]["trg_kps"] == [pytest.approx([30, 20], abs=0.3), None]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert "the same command goes on" in process.stdout.read()
    assert not list(photos.rglob(".*"))


def test_steps_that_wait_survive_a_reload(photos: Path, browser: Browser) -> None:
    process, url = start(photos)
    try:
        page = Page(browser, url)
        process.kill()
        process.wait()
        page.click("src", 20, 30)
        page.wait("offline")
        kept = browser.js("sessionStorage.getItem(QUEUE)")
        assert json.loads(kept)[0]["step"]["kind"] == "point"
        process, _ = start(photos)
        deadline = time.monotonic() + 30
        while not (photos / "pairs.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        page.saved()
        assert browser.js("sessionStorage.getItem(QUEUE)") is None
        browser.js(f"sessionStorage.setItem(QUEUE, {json.dumps(kept.replace('20', '40'))})")
        browser.open(url)
        page.saved()
        assert len(on_disk(photos)[0]["src_kps"]) == 2
    finally:
        process.kill()
        process.wait()


def test_the_annotated_folder_is_ready_for_use(
    page: Page, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from experiments.cli import main_group

    for side, x, y in (("src", 20, 30), ("trg", 5, 60), ("src", 60, 50), ("trg", 40, 20)):
        page.click(side, x, y)
    page.saved()
    run: Callable[..., Any] = lambda *words: main_group(  # noqa: E731
        [str(word) for word in words], standalone_mode=False
    )
    out = tmp_path / "out"
    run("predict", "copy/folder", "--data", photos, "--out", out)
    file = capsys.readouterr().out.strip()
    run("score", file, "--out", out, "--protocol", "canonical@1")
    assert "copy (floor) on own pairs test (1 pairs" in capsys.readouterr().out
