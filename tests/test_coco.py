"""Pairs from COCO keypoints: which instance, which keypoints, which pairs, in what order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from nemf.datasets.coco import pairs_from_coco
from nemf.datasets.folder import FolderOfPairs
from nemf.errors import NemfError
from tests.conftest import save_image, tiny_pixels

NAMES = ["nose", "left_eye", "right_eye", "tail"]


def keypoints(x: float, flags: str = "2222") -> list[float]:
    """Keypoints in a row from (x, 10), with their visibility flags."""
    return [v for k, flag in enumerate(flags) for v in (x + k, 10 + k, int(flag))]


def instance(image: int, x: float, flags: str = "2222", **more: Any) -> dict[str, Any]:
    box = [x - 1, 5, 20, 20]
    return {
        "image_id": image, "category_id": 1, "keypoints": keypoints(x, flags), "bbox": box
    } | more  # fmt: skip


def coco(tmp_path: Path, listed: list[dict[str, Any]], n: int = 4, **more: Any) -> Path:
    """An annotation file with images ``d/0.jpg`` ... of 40x60 px."""
    images = [{"id": k, "file_name": f"d/{k}.jpg", "width": 60, "height": 40} for k in range(n)]
    for k in range(n):
        save_image(tmp_path / "images" / "d" / f"{k}.jpg", k, 40, 60)
    content = {
        "images": images,
        "annotations": listed,
        "categories": [
            {"id": 1, "name": "dog", "keypoints": NAMES},
            {"id": 2, "name": "cat", "keypoints": NAMES[:2]},
            {"id": 3, "name": "car"},
        ],
    } | more
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(content))
    return file


def entries(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "pairs.json").read_text())


def test_pairs_by_hand(tmp_path: Path) -> None:
    file = coco(tmp_path, [instance(0, 10, "2212"), instance(1, 30, "2022")])
    out = tmp_path / "out"
    written = pairs_from_coco(file, tmp_path / "images", out, common=2)
    assert (written.pairs, written.images, written.left_out) == ({"dog": 1}, 2, {})
    (entry,) = entries(out)
    turned = entry["src"] == "images/d/1.jpg"
    sides = ("trg", "src") if turned else ("src", "trg")
    assert [entry[side] for side in sides] == ["images/d/0.jpg", "images/d/1.jpg"]
    assert entry["kp_names"] == ["nose", "tail"]  # the others are hidden in one of the images
    assert entry[f"{sides[0]}_kps"] == [[10, 10], [13, 13]]
    assert entry[f"{sides[1]}_kps"] == [[30, 10], [33, 13]]
    assert entry[f"{sides[1]}_bbox"] == [29, 5, 49, 25]
    assert (entry["id"], entry["category"]) == ("dog-00001", "dog")
    original = (tmp_path / "images" / "d" / "0.jpg").read_bytes()
    assert (out / "images" / "d" / "0.jpg").read_bytes() == original
    (pair,) = FolderOfPairs(out)
    assert pair.kp_names == ("nose", "tail")


def test_hidden_keypoints_count_when_asked_for(tmp_path: Path) -> None:
    file = coco(tmp_path, [instance(0, 10, "1110"), instance(1, 30, "2111")])
    with pytest.raises(NemfError, match="--visibility 1 counts hidden keypoints too"):
        pairs_from_coco(file, tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pairs_from_coco(file, tmp_path / "images", tmp_path / "out", visibility=1)
    assert entries(tmp_path / "out")[0]["kp_names"] == NAMES[:3]


def test_the_main_instance_shows_most_keypoints_then_most_area(tmp_path: Path) -> None:
    few_but_large = instance(0, 10, "2220", bbox=[0, 0, 60, 40])
    small, large = instance(0, 20), instance(0, 30, bbox=[29, 5, 25, 20])
    crowd = instance(0, 40, bbox=[0, 0, 60, 40], iscrowd=1)
    for order in itertools.permutations([few_but_large, small, large, crowd]):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        file = coco(tmp_path, [*order, instance(1, 5)])
        written = pairs_from_coco(file, tmp_path / "images", out)
        (entry,) = entries(out)
        side = "src" if entry["src"] == "images/d/0.jpg" else "trg"
        assert entry[f"{side}_kps"][0] == [30, 10]
        assert written.left_out == {"instances that are crowds": 1}


def test_the_seed_alone_decides(tmp_path: Path) -> None:
    annotations = [instance(k, 5 + k) for k in range(8)]
    file = coco(tmp_path, annotations, n=8)
    images = tmp_path / "images"

    def drawn(name: str, **how: Any) -> list[tuple[str, str]]:
        pairs_from_coco(file, images, tmp_path / name, pairs=6, **how)
        return [(e["src"], e["trg"]) for e in entries(tmp_path / name)]

    first = drawn("a")
    assert len(set(map(frozenset, first))) == 6  # no two images are paired twice
    assert drawn("b") == first
    content = json.loads(file.read_text())
    for key in ("images", "annotations", "categories"):
        content[key].reverse()
    file.write_text(json.dumps(content))
    assert drawn("c") == first
    assert drawn("d", seed=1) != first


def test_every_pair_is_drawn_once_when_all_are_wanted(tmp_path: Path) -> None:
    file = coco(tmp_path, [instance(k, 5 + k) for k in range(7)], n=7)
    written = pairs_from_coco(file, tmp_path / "images", tmp_path / "out", pairs=1000)
    assert written.pairs == {"dog": 21}
    paired = {frozenset((e["src"], e["trg"])) for e in entries(tmp_path / "out")}
    assert len(paired) == 21
    ways = [e["src"] < e["trg"] for e in entries(tmp_path / "out")]
    assert 3 < sum(ways) < 18  # both directions occur


def test_classes_can_be_chosen(tmp_path: Path) -> None:
    dogs = [instance(k, 10) for k in range(2)]
    cats = [instance(k, 10, "22", category_id=2) for k in range(2)]
    cars = [{"image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4]}]
    file = coco(tmp_path, [*dogs, *cats, *cars])
    images = tmp_path / "images"
    written = pairs_from_coco(file, images, tmp_path / "all", common=2)
    assert written.pairs == {"cat": 1, "dog": 1}
    written = pairs_from_coco(file, images, tmp_path / "one", common=2, categories=["cat"])
    assert written.pairs == {"cat": 1}
    written = pairs_from_coco(file, images, tmp_path / "three")
    assert written.pairs == {"dog": 1}
    assert written.left_out == {"instances with fewer than 3 visible keypoints": 2}
    with pytest.raises(NemfError, match=r"no class 'dogs' with keypoints \(did you mean 'dog'\?\)"):
        pairs_from_coco(file, images, tmp_path / "none", categories=["dogs"])


def test_an_annotation_of_the_turned_photograph_gets_it_turned(tmp_path: Path) -> None:
    file = coco(tmp_path, [instance(0, 10), instance(1, 10)])
    exif = PILImage.Exif()
    exif[274] = 6
    stored = tiny_pixels(5, 60, 40)  # upright it is 40 high and 60 wide, as annotated
    path = tmp_path / "images" / "d" / "0.jpg"
    PILImage.fromarray(stored).save(path, exif=exif, quality=95)
    pairs_from_coco(file, tmp_path / "images", tmp_path / "out")
    with PILImage.open(tmp_path / "out" / "images" / "d" / "0.jpg") as copy:
        assert 274 not in copy.getexif()
        pixels = np.asarray(copy).astype(int)
    assert np.abs(pixels - np.rot90(stored, -1)).mean() < 4
    assert len(FolderOfPairs(tmp_path / "out")) == 1


BAD: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "no categories": ({"categories": []}, [], "none of its categories names keypoints"),
    "no list": ({"annotations": {}}, [], "'annotations' is not a list"),
    "odd image": ({"images": [{"id": 1}]}, [], "images entry 1 lacks"),
    "odd category": ({"categories": [{"id": 1}]}, [], "categories entry 1 lacks"),
    "unknown image": ({}, [instance(9, 1)], "annotations entry 1: its image 9 is not listed"),
    "odd annotation": ({}, [{"category_id": [1]}], "annotations entry 1 is no object"),
    "too few": ({}, [instance(0, 1, "22")], "entry 1 needs 4 keypoints as x, y, visibility"),
    "text": ({}, [instance(0, 1, keypoints=["x"] * 12)], "entry 1 needs keypoints"),
    "no box": ({}, [instance(0, 1, bbox=None)], "entry 1 needs keypoints"),
    "empty box": ({}, [instance(0, 1, bbox=[1, 1, 0, 4])], "entry 1: its bbox is empty"),
    "infinite": ({}, [instance(0, float("inf"))], "entry 1 needs 4 keypoints"),
    "outside": ({}, [instance(0, 100)], r"nose at \(100, 10\) lies outside d/0.jpg"),
    "alone": ({}, [instance(0, 10)], "no two images show 3 common keypoints"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "annotations", "reason"), BAD.values(), ids=BAD)
def test_what_is_no_annotation_is_refused(
    tmp_path: Path, more: dict[str, Any], annotations: list[dict[str, Any]], reason: str
) -> None:
    file = coco(tmp_path, annotations, **more)
    with pytest.raises(NemfError, match=f"coco.json.*{reason}"):
        pairs_from_coco(file, tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_must_be_there_and_fit(tmp_path: Path) -> None:
    file = coco(tmp_path, [instance(0, 10), instance(1, 10)])
    path = tmp_path / "images" / "d" / "1.jpg"
    save_image(path, 0, 41, 60)
    with pytest.raises(NemfError, match=r"1.jpg: is 60x41, but .* was made for 60x40"):
        pairs_from_coco(file, tmp_path / "images", tmp_path / "out")
    path.unlink()
    with pytest.raises(NemfError, match=r"1.jpg: the image is missing"):
        pairs_from_coco(file, tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(NemfError, match="is there and not empty"):
        pairs_from_coco(file, tmp_path / "images", tmp_path / "out")
