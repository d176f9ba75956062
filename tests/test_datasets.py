"""The readers on tiny trees: what they read, how the index is kept, how bad input is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from scipy.io import loadmat, savemat

from nemf.datasets import available_datasets, dataset_class
from nemf.datasets.folder import FolderOfPairs
from nemf.datasets.index import PairDataset, walk_files
from nemf.datasets.matfile import read_mat
from nemf.datasets.pfpascal import PFPascal
from nemf.datasets.pfwillow import PFWillow
from nemf.datasets.spair import SPair71k
from nemf.datasets.statistics import card, render
from nemf.errors import NemfError

Make = Callable[..., Path]


def edit_json(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text())
    content.update(fields)
    file.write_text(json.dumps({k: v for k, v in content.items() if v != "DROP"}))


def spair_json(root: Path, number: int = 1, split: str = "test") -> Path:
    """The annotation of the cat (1) or dog (2) pair."""
    folder = root / "SPair-71k" / "PairAnnotation" / split
    return next(folder.glob(f"{number:06d}-*.json"))


def edit_list(file: Path, edit: Callable[[list[list[str]]], None]) -> None:
    """Changes the cells of a CSV in place (rows[0] is the header)."""
    rows = [line.split(",") for line in file.read_text().splitlines()]
    edit(rows)
    file.write_text("\n".join(",".join(row) for row in rows) + "\n")


# -- what the readers read ------------------------------------------------------------------------


def test_spair(tiny_spair: Make) -> None:
    root = tiny_spair()
    dataset = SPair71k(root, "test")
    assert dataset.ids == ["000001-test_a-test_b:cat", "000002-test_c-test_d:dog"]
    assert dataset.categories == ["cat", "dog"]
    assert len(dataset.images) == 4
    assert (dataset.official_pairs, dataset.synthetic) == (12234, False)
    cat, dog = dataset
    content = json.loads(spair_json(root).read_text())
    assert np.array_equal(cat.src_kps, np.float32(content["src_kps"]))
    assert np.array_equal(cat.trg_kps, np.float32(content["trg_kps"]))
    assert cat.src_kps.dtype == cat.src_bbox.dtype == np.float32
    assert cat.kp_names == ("0", "1", "2")
    assert cat.src_bbox.tolist() == [2, 3, 56, 35]
    assert cat.src.size == (40, 60)
    assert dog.flags == {"viewpoint": 1, "scale": 2, "truncation": 3, "occlusion": 0}
    assert dataset[-1].id == dog.id
    with pytest.raises(IndexError):
        dataset[2]


def test_image_annotations_add_keypoints_of_one_image(tiny_spair: Make) -> None:
    """The image's own annotation holds the pair's three keypoints, one more, and an absent one."""
    cat = SPair71k(tiny_spair(), "test")[0]
    assert cat.src.kp_names == ("0", "1", "2", "3")
    assert np.array_equal(cat.src.kps[:3], cat.src_kps)
    assert cat.src.kps[3].tolist() == [1, 1]


def test_without_image_annotations_the_pairs_tell(tiny_spair: Make) -> None:
    root = tiny_spair()
    shutil.rmtree(root / "SPair-71k" / "ImageAnnotation")
    cat = SPair71k(root, "test")[0]
    assert np.array_equal(cat.src.kps, cat.src_kps)


def test_pixels(tiny_pfwillow: Make) -> None:
    dataset = PFWillow(tiny_pfwillow())
    for image in dataset.images:
        pixels = dataset.pixels(image)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*image.size, 3)
        assert np.array_equal(pixels, np.asarray(PILImage.open(image.path)))


@pytest.mark.parametrize("folder", SPair71k.folders)
def test_spair_folder_names(tiny_spair: Make, folder: str) -> None:
    root = tiny_spair(folder=folder, splits=("test",))
    assert len(SPair71k(root)) == 2
    assert len(SPair71k(root / folder)) == 2  # the folder itself


@pytest.mark.parametrize("cls", [PFPascal, PFWillow])
def test_pf_folder_names(cls: type, tiny_pfpascal: Make, tiny_pfwillow: Make) -> None:
    root = tiny_pfpascal() if cls is PFPascal else tiny_pfwillow()
    fingerprints = {cls(root).fingerprint}
    for name in cls.folders[1:]:
        (root / cls.folders[0]).rename(root / name)
        fingerprints.add(cls(root).fingerprint)
        (root / name).rename(root / cls.folders[0])
    assert len(fingerprints) == 1


@pytest.mark.parametrize("on_disk", ["trn", "train"])
def test_training_split_under_both_names(
    tiny_spair: Make, tiny_pfpascal: Make, on_disk: str
) -> None:
    for make, cls in ((tiny_spair, SPair71k), (tiny_pfpascal, PFPascal)):
        root = make(splits=(on_disk,))
        for asked in ("trn", "train"):
            dataset = cls(root, asked)
            assert (dataset.split, len(dataset)) == ("trn", 2)


def test_annotation_names_without_colon(tiny_spair: Make) -> None:
    """Trees unpacked where ':' is forbidden."""
    root = tiny_spair()
    for file in (root / "SPair-71k" / "PairAnnotation" / "test").iterdir():
        file.rename(file.with_name(file.name.replace(":", "_")))
    assert SPair71k(root).ids[0] == "000001-test_a-test_b:cat"


def test_spair_small_layout(tiny_spair: Make) -> None:
    root = tiny_spair()
    layout = root / "SPair-71k" / "Layout"
    (layout / "small").mkdir()
    first = (layout / "large" / "test.txt").read_text().splitlines()[0]
    (layout / "small" / "test.txt").write_text(first)  # no trailing newline
    dataset = SPair71k(root, size="small")
    assert (len(dataset), dataset.official_pairs) == (1, 12234)  # a part, and tables say so
    assert len(SPair71k(root)) == 2
    with pytest.raises(NemfError, match="size must be"):
        SPair71k(root, size="huge")


@pytest.mark.parametrize("nested", [False, True])
def test_pfpascal_drops_keypoints_absent_in_one_image(tiny_pfpascal: Make, nested: bool) -> None:
    root = tiny_pfpascal(nested=nested)
    cat, train = PFPascal(root, "test")
    assert (cat.category, train.category) == ("cat", "train")
    assert cat.kp_names == ("0", "2", "3")
    base = root / "PF-PASCAL" / ("PF-dataset-PASCAL" if nested else "")
    mats = {s: loadmat(base / f"Annotations/cat/test_{s}.mat")["kps"] for s in "ab"}
    assert np.array_equal(cat.src_kps, np.float32(mats["a"][[0, 2, 3]]))
    assert np.array_equal(cat.trg_kps, np.float32(mats["b"][[0, 2, 3]]))
    assert np.isfinite(cat.trg.kps).all()
    assert len(cat.trg.kps) == 4  # the target image shows the second keypoint
    assert cat.src_bbox.tolist() == [1, 2, 47, 32]
    assert set(cat.flags.values()) == {-1}


def test_pfpascal_without_mat_reads_the_list(tiny_pfpascal: Make) -> None:
    with_mat = PFPascal(tiny_pfpascal(), "test")
    without = PFPascal(
        tiny_pfpascal(tiny_pfpascal().parent / "csv", mat=False, csv_kps=True), "test"
    )
    for one, other in zip(with_mat, without, strict=True):
        assert np.array_equal(one.src_kps, other.src_kps)
        assert np.array_equal(one.trg_kps, other.trg_kps)
        assert other.src_bbox is None


def test_pfpascal_prefers_mat_to_the_list(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal(csv_kps=True)
    expected = PFPascal(root, "test")[1].src_kps

    def shift(rows: list[list[str]]) -> None:
        rows[2][rows[0].index("XA")] = "5;6;7"

    edit_list(root / "PF-PASCAL" / "test_pairs.csv", shift)
    train = PFPascal(root, "test")[1]
    assert np.array_equal(train.src_kps, expected)
    assert train.src_bbox is not None


def test_lists_that_only_number_the_points_lose_none(tiny_pfpascal: Make) -> None:
    """In CSV-only PF-PASCAL "0" is another point in another pair; the image keeps both."""
    root = tiny_pfpascal(mat=False, csv_kps=True)

    def add(rows: list[list[str]]) -> None:
        rows.append([rows[1][0], rows[2][1], "8", "11;12", "13;14", "5;6", "7;8"])

    edit_list(root / "PF-PASCAL" / "test_pairs.csv", add)
    cat, _, other = PFPascal(root, "test")
    assert cat.src is other.src
    present = {tuple(p) for p in cat.src.kps.tolist()}
    for pair in (cat, other):
        assert {tuple(p) for p in pair.src_kps.tolist()} <= present
    assert len(set(cat.src.kp_names)) == len(cat.src.kps) == len(present)


def test_pfpascal_flipped_rows_are_mirrored(tiny_pfpascal: Make) -> None:
    """Row 2 of trn has flip = 1: x becomes W - 1 - x, the box turns round, pixels are mirrored."""
    root = tiny_pfpascal()
    plain, flipped = PFPascal(root, "trn")
    assert not plain.src.mirrored
    assert flipped.src.mirrored
    assert flipped.trg.mirrored
    file = root / "PF-PASCAL" / "Annotations" / "train" / "trn_c.mat"
    kps, box = loadmat(file)["kps"], loadmat(file)["bbox"][0]
    width = 51
    assert flipped.src.size == (36, width)
    expected = np.stack([width - 1 - kps[:, 0], kps[:, 1]], 1)
    np.testing.assert_allclose(flipped.src_kps, expected, atol=1e-5)
    assert flipped.src_bbox.tolist() == [width - 1 - box[2], box[1], width - 1 - box[0], box[3]]
    dataset = PFPascal(root, "trn")
    stored = np.asarray(PILImage.open(flipped.src.path))
    assert np.array_equal(dataset.pixels(flipped.src), stored[:, ::-1])


def test_a_mirrored_image_is_another_image(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal()

    def both_ways(rows: list[list[str]]) -> None:
        rows.append([*rows[2][:3], "0"])

    edit_list(root / "PF-PASCAL" / "trn_pairs.csv", both_ways)
    _, flipped, plain = PFPascal(root, "trn")
    assert flipped.src.path == plain.src.path
    assert flipped.src.hash != plain.src.hash
    assert flipped.src.name != plain.src.name


def test_flip_counts_in_training_only(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal()
    edit_list(
        root / "PF-PASCAL" / "test_pairs.csv",
        lambda rows: [row.append("flip" if i == 0 else "1") for i, row in enumerate(rows)],
    )
    assert not any(image.mirrored for image in PFPascal(root, "test").images)


def test_pfpascal_list_names(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal()
    fingerprint = PFPascal(root, "test").fingerprint
    base = root / "PF-PASCAL"
    (base / "image_pairs").mkdir()
    (base / "test_pairs.csv").rename(base / "image_pairs" / "test_pairs_pf_pascal.csv")
    assert PFPascal(root, "test").fingerprint == fingerprint


@pytest.mark.parametrize("below", ["", "PF-dataset", "PF-dataset-WILLOW"])
def test_pfwillow(tiny_pfwillow: Make, below: str) -> None:
    root = tiny_pfwillow(below=below)
    dataset = PFWillow(root)
    assert dataset.ids == [
        "000000-car_1-car_2:car(S)",
        "000001-car_2-car_1:car(S)",
        "000002-duck_1-duck_2:duck(S)",
    ]
    car, back, _ = dataset
    assert np.array_equal(car.src_kps, back.trg_kps)
    row = (root / "PF-WILLOW" / "test_pairs.csv").read_text().splitlines()[1].split(",")
    assert car.src_kps[:, 0].tolist() == [float(v) for v in row[2:12]]
    assert car.src_kps[:, 1].tolist() == [float(v) for v in row[12:22]]
    assert car.trg_kps[:, 0].tolist() == [float(v) for v in row[22:32]]
    assert car.trg_kps[:, 1].tolist() == [float(v) for v in row[32:42]]
    assert car.src_bbox is None
    assert len(dataset.images) == 4


def test_pfwillow_blank_keypoint_is_dropped(tiny_pfwillow: Make) -> None:
    root = tiny_pfwillow()

    def blank(rows: list[list[str]]) -> None:
        rows[1][2 + 3] = "nan"  # x of the fourth source keypoint

    edit_list(root / "PF-WILLOW" / "test_pairs.csv", blank)
    assert PFWillow(root)[0].kp_names == ("0", "1", "2", "4", "5", "6", "7", "8", "9")


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_folder(tiny_folder: Make, kind: str) -> None:
    cup, other = dataset = FolderOfPairs(tiny_folder(kind=kind))
    assert dataset.ids == ["000000-a-b:cup", "000001-b-c:object"]
    assert cup.kp_names == ("0", "2")
    assert cup.src_kps.tolist() == [[3, 4], [20.5, 10]]
    assert cup.trg_kps.tolist() == [[5, 6], [9.5, 30]]
    assert cup.src_bbox.tolist() == [1, 2, 22, 28]
    assert other.trg.path.name == "c.jpg"
    assert dataset.layout == "spair"


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_folder_thresholds(tiny_folder: Make, kind: str) -> None:
    root = tiny_folder(kind=kind, boxes=False)
    assert FolderOfPairs(root).layout == "pfwillow"
    assert FolderOfPairs(root, threshold="image").layout == "pfpascal"
    with pytest.raises(NemfError, match=r"pairs\.\w+: threshold 'bbox' needs src_bbox"):
        FolderOfPairs(root, threshold="bbox")
    with pytest.raises(NemfError, match="threshold must be"):
        FolderOfPairs(root, threshold="area")


def test_folder_names_of_keypoints_and_pairs(tiny_folder: Make) -> None:
    root = tiny_folder()
    pairs = json.loads((root / "pairs.json").read_text())
    pairs[1] |= {"id": "mine", "kp_names": ["handle"]}
    (root / "pairs.json").write_text(json.dumps(pairs))
    pair = FolderOfPairs(root)[1]
    assert (pair.id, pair.kp_names) == ("mine", ("handle",))


def test_catalogue(tiny_spair: Make) -> None:
    described = available_datasets()
    assert set(described) == {"spair", "pfpascal", "pfwillow", "animalpose", "folder"}
    assert described["pfwillow"]["official_pairs"] == {"test": 900}
    with pytest.raises(
        NemfError, match=r"unknown dataset 'spare' \(did you mean 'spair'\?\): choose one of spair"
    ):
        dataset_class("spare")
    animals = dataset_class("animalpose")(tiny_spair(folder="AnimalPose"))
    assert animals[1].flags == {"viewpoint": -1, "scale": 2, "truncation": -1, "occlusion": -1}
    assert animals.official_pairs is None


# -- index and fingerprint ------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each parse."""
    calls: list[str] = []
    original = PairDataset.parse

    def parse(self: PairDataset) -> Any:
        calls.append(self.split)
        return original(self)

    monkeypatch.setattr(PairDataset, "parse", parse)
    return calls


def same(one: PairDataset, other: PairDataset) -> bool:
    """Whether two datasets hold the same pairs and images."""
    for p, q in zip(one, other, strict=True):
        for a, b in ((p.src_kps, q.src_kps), (p.trg_kps, q.trg_kps), (p.src_bbox, q.src_bbox)):
            assert np.array_equal(a, b)
        assert (p.id, p.kp_names, p.flags, p.src.hash) == (q.id, q.kp_names, q.flags, q.src.hash)
    for i, j in zip(one.images, other.images, strict=True):
        assert (i.name, i.path, i.size, i.hash, i.kp_names) == (
            j.name,
            j.path,
            j.size,
            j.hash,
            j.kp_names,
        )
        assert np.array_equal(i.kps, j.kps)
    return one.fingerprint == other.fingerprint


def test_index_is_reused(tiny_spair: Make, counted: list[str], tmp_path: Path) -> None:
    root, cache = tiny_spair(), tmp_path / "cache"
    first = SPair71k(root, cache_dir=cache)
    again = SPair71k(root, cache_dir=cache)
    assert counted == ["test"]
    assert same(first, again)
    SPair71k(root, "val", cache_dir=cache)
    SPair71k(root, outside="keep", cache_dir=cache)
    assert counted == ["test", "val", "test"]


def test_index_follows_the_environment(
    tiny_pfwillow: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    monkeypatch.setenv("NEMF_CACHE", str(tmp_path / "elsewhere"))
    root = tiny_pfwillow()
    PFWillow(root)
    assert list((tmp_path / "elsewhere" / "index").iterdir())
    PFWillow(root, cache_dir=tmp_path / "elsewhere")
    assert counted == ["test"]


def test_an_edit_builds_a_new_index(tiny_spair: Make, counted: list[str]) -> None:
    root = tiny_spair()
    before = SPair71k(root)
    edit_json(spair_json(root), src_kps=[[7, 7], [8, 8], [9, 9]])
    after = SPair71k(root)
    assert len(counted) == 2
    assert after[0].src_kps.tolist() == [[7, 7], [8, 8], [9, 9]]
    assert after.fingerprint != before.fingerprint


def test_an_added_file_builds_a_new_index(tiny_spair: Make, counted: list[str]) -> None:
    root = tiny_spair()
    before = SPair71k(root)
    (root / "SPair-71k" / "JPEGImages" / "cat" / "new.jpg").write_bytes(b"not used")
    assert SPair71k(root).fingerprint == before.fingerprint
    assert len(counted) == 2


def test_a_removed_file_is_missed(tiny_spair: Make) -> None:
    root = tiny_spair()
    image = SPair71k(root)[0].src.path
    image.unlink()
    with pytest.raises(NemfError, match=r"test_a\.jpg: image cannot be read"):
        SPair71k(root)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "half"])
@pytest.mark.parametrize("table", ["pairs.parquet", "images.parquet"])
def test_a_damaged_index_is_built_anew(
    tiny_pfwillow: Make,
    counted: list[str],
    tmp_path: Path,
    damage: str,
    table: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, cache = tiny_pfwillow(), tmp_path / "cache"
    first = PFWillow(root, cache_dir=cache)
    (file,) = cache.rglob(table)
    data = file.read_bytes()
    file.write_bytes(
        {
            "truncated": data[:-7],
            "empty": b"",
            "garbage": b"x" * 99,
            "half": data[: len(data) // 2],
        }[damage]
    )
    assert same(PFWillow(root, cache_dir=cache), first)
    assert "building it anew" in caplog.text
    assert str(file.parent) in caplog.text
    assert same(PFWillow(root, cache_dir=cache), first)
    assert len(counted) == 2


def test_a_removed_table_is_built_anew(tiny_pfwillow: Make, tmp_path: Path) -> None:
    root, cache = tiny_pfwillow(), tmp_path / "cache"
    first = PFWillow(root, cache_dir=cache)
    next(cache.rglob("images.parquet")).unlink()
    assert same(PFWillow(root, cache_dir=cache), first)


def test_an_unusable_cache_only_costs_time(
    tiny_pfwillow: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where the cache folder should be: the dataset is read, a warning says why."""
    cache = tmp_path / "cache"
    cache.write_text("in the way")
    assert len(PFWillow(tiny_pfwillow(), cache_dir=cache)) == 3
    assert str(cache) in caplog.text
    assert "set NEMF_CACHE" in caplog.text


@pytest.mark.parametrize("name", ["spair", "pfpascal", "pfwillow", "folder"])
def test_fingerprint_knows_no_place_and_no_time(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(f"tiny_{name}")()
    cls = dataset_class(name)
    before = cls(root).fingerprint
    moved = tmp_path / "somewhere" / "else"
    shutil.copytree(root, moved)
    for file in walk_files(moved):
        os.utime(file, (1, 1))
    assert cls(moved).fingerprint == before
    assert len(before) == 64


def test_fingerprint_ignores_how_json_is_written(tiny_spair: Make) -> None:
    root = tiny_spair()
    before = SPair71k(root).fingerprint
    file = spair_json(root)
    file.write_text(json.dumps(json.loads(file.read_text()), indent=4, sort_keys=True))
    assert SPair71k(root).fingerprint == before


@pytest.mark.parametrize(
    "change",
    [
        {"src_kps": [[3, 3], [4, 4], [5, 5]]},
        {"trg_kps": [[3, 3], [4, 4], [5, 5.0001]]},
        {"src_bndbox": [2, 3, 56, 36]},
        {"occlusion": 1},
        {"kps_ids": ["0", "1", "9"]},
    ],
)
def test_fingerprint_changes_with_any_annotation(tiny_spair: Make, change: dict) -> None:
    root = tiny_spair()
    before = SPair71k(root).fingerprint
    edit_json(spair_json(root), **change)
    assert SPair71k(root).fingerprint != before


def test_fingerprint_changes_with_one_image_byte(tiny_spair: Make) -> None:
    root = tiny_spair()
    dataset = SPair71k(root)
    path = dataset[0].src.path
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # entropy-coded data: size and header stay
    path.write_bytes(bytes(data))
    assert SPair71k(root).fingerprint != dataset.fingerprint


def test_fingerprint_depends_on_split_order_and_part(tiny_pfwillow: Make) -> None:
    root = tiny_pfwillow()
    whole = PFWillow(root)
    part = PFWillow(root, first=2)
    assert (len(part), part.ids) == (2, whole.ids[:2])
    assert np.array_equal(part[1].src_kps, whole[1].src_kps)
    assert part.fingerprint != whole.fingerprint
    assert PFWillow(root, first=99).fingerprint == whole.fingerprint
    edit_list(root / "PF-WILLOW" / "test_pairs.csv", lambda rows: rows.append(rows.pop(1)))
    assert PFWillow(root).fingerprint != whole.fingerprint


# -- bad input ------------------------------------------------------------------------------------


def refuse(cls: type, root: Path, *fragments: str, **options: Any) -> None:
    """Opening must fail with one line that holds all fragments."""
    with pytest.raises(NemfError) as caught:
        cls(root, **options)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["spair", "pfpascal", "pfwillow", "animalpose", "folder"])
def test_missing_folder(name: str, tmp_path: Path) -> None:
    refuse(dataset_class(name), tmp_path, str(tmp_path))
    refuse(dataset_class(name), tmp_path / "nowhere", "nowhere")


def test_bad_options(tiny_spair: Make) -> None:
    root = tiny_spair()
    refuse(SPair71k, root, "no split 'dev'", "trn, val, test", split="dev")
    refuse(SPair71k, root, "first must be at least 1, not 0", first=0)
    refuse(SPair71k, root, "outside must be", "'drop'", outside="drop")
    refuse(PFWillow, root, "no split 'trn'", split="trn")


def test_spair_lists(tiny_spair: Make) -> None:
    root = tiny_spair()
    file = root / "SPair-71k" / "Layout" / "large" / "test.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n \n")
    refuse(SPair71k, root, str(file), "lists no pair")
    file.write_bytes(b"\xff\xfe\x00")
    refuse(SPair71k, root, str(file), "cannot be read as text")
    file.write_text("\n".join([*lines, lines[0]]))
    refuse(SPair71k, root, str(file), "pair 000001-test_a-test_b:cat is listed twice")
    file.write_text("../../../../etc/passwd")
    refuse(SPair71k, root, str(file), "leads out of")
    file.write_text("x" * 400)
    refuse(SPair71k, root, "x" * 100)
    file.write_text("000009-no-such:cat")
    refuse(SPair71k, root, "000009-no-such:cat.json: the annotation is missing")
    file.unlink()
    refuse(SPair71k, root, str(file), "list of the split is missing")


def test_spair_missing_annotation_folder(tiny_spair: Make) -> None:
    root = tiny_spair()
    shutil.rmtree(root / "SPair-71k" / "PairAnnotation" / "test")
    refuse(SPair71k, root, "PairAnnotation/test", "missing")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"src_kps": "DROP"}, "'src_kps' is missing"),
        ({"category": "DROP"}, "'category' is missing"),
        ({"src_kps": 5}, "'src_kps' must be a list of [x, y]"),
        ({"src_kps": [[1, 2], [3], [4, 5]]}, "'src_kps' must be a list of [x, y]"),
        ({"src_kps": [[1, 2, 3]]}, "'src_kps' must be a list of [x, y]"),
        ({"src_kps": [["a", "b"]]}, "'src_kps' must be a list of [x, y]"),
        ({"src_kps": [[10**400, 1]] * 3}, "'src_kps' must be a list of [x, y]"),
        ({"src_kps": [[1, 2]]}, "1 source but 3 target keypoints"),
        ({"src_kps": []}, "0 source but 3 target keypoints"),
        ({"src_kps": [None] * 3}, "no keypoint that both images show"),
        ({"src_kps": [], "trg_kps": [], "kps_ids": []}, "no keypoint that both images show"),
        ({"src_kps": [[float("inf"), 1], [2, 2], [3, 3]]}, "infinite keypoint coordinate"),
        ({"src_kps": [[61.5, 1], [2, 2], [3, 3]]}, "source keypoint 0 at (61.5, 1) lies outside"),
        ({"trg_kps": [[1, 1], [2, -1.5], [3, 3]]}, "target keypoint 1 at (2, -1.5) lies outside"),
        ({"kps_ids": ["0", "1"]}, "3 keypoints but 2 names"),
        ({"kps_ids": ["0", "1", "0"]}, "names two of its keypoints '0'"),
        ({"kps_ids": 3}, "'kps_ids' must be a list of names"),
        ({"src_bndbox": "DROP"}, "'src_bndbox' is missing"),
        ({"src_bndbox": [1, 2, 3]}, "'src_bndbox' must be [x1, y1, x2, y2]"),
        ({"src_bndbox": None}, "'src_bndbox' must be [x1, y1, x2, y2]"),
        ({"src_bndbox": [5, 5, 5, 9]}, "source box [5.0, 5.0, 5.0, 9.0] is empty"),
        ({"trg_bndbox": [9, 9, 3, 3]}, "target box [9.0, 9.0, 3.0, 3.0] is empty or turned round"),
        ({"trg_bndbox": [900, 900, 901, 901]}, "lies outside its 44x50 image"),
        ({"src_bndbox": [1, 2, float("nan"), 4]}, "is not finite"),
        ({"src_imsize": [61, 40, 3]}, "for a source image of 61x40, but cat/test_a.jpg is 60x40"),
        ({"src_imsize": "big"}, "'src_imsize' must be [width, height, ...]"),
        ({"truncation": 4}, "'truncation' must be an integer 0..3"),
        ({"occlusion": "no"}, "'occlusion' must be an integer 0..3"),
        ({"occlusion": True}, "'occlusion' must be an integer 0..3"),
        ({"src_imname": "../../../secret.jpg"}, "leads out of"),
        ({"src_imname": "nope.jpg"}, "cat/nope.jpg: image cannot be read"),
        ({"src_imname": "a\0b.jpg"}, "image cannot be read"),
        ({"category": "../cat"}, "leads out of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_spair_annotations(tiny_spair: Make, fields: dict, reason: str) -> None:
    root = tiny_spair(splits=("test",))
    file = spair_json(root)
    edit_json(file, **fields)
    at_fault = root / "SPair-71k" / "JPEGImages" if "image cannot be read" in reason else file
    refuse(SPair71k, root, str(at_fault), reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read as JSON"),
        ('{"src_kps": [[1, 2]', "cannot be read as JSON"),
        ("\x80", "cannot be read as JSON"),
        ("[1, 2]", "holds list, expected a JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_malformed_json(tiny_spair: Make, text: str, reason: str) -> None:
    root = tiny_spair()
    for file in (spair_json(root), root / "SPair-71k/ImageAnnotation/cat/test_a.json"):
        before = file.read_bytes()
        file.write_bytes(text.encode("latin-1"))
        refuse(SPair71k, root, str(file), reason)
        file.write_bytes(before)


@pytest.mark.parametrize(
    "kps", [[], [[1, 2]], {"0": 5}, {"0": [1]}, {"0": [1], "1": [2]}, {"0": "ab"}, None]
)
def test_malformed_image_annotation(tiny_spair: Make, kps: Any) -> None:
    root = tiny_spair()
    file = root / "SPair-71k" / "ImageAnnotation" / "cat" / "test_a.json"
    file.write_text(json.dumps({"kps": kps}))
    refuse(SPair71k, root, str(file), "'kps' must map keypoint ids to [x, y] or null")


def test_outside_keep(tiny_spair: Make) -> None:
    root = tiny_spair()
    edit_json(spair_json(root), src_kps=[[99, 1], [2, 2], [3, 3]])
    refuse(SPair71k, root, "lies outside cat/test_a.jpg (60x40)", "outside='keep'")
    assert SPair71k(root, outside="keep")[0].src_kps[0].tolist() == [99, 1]


def test_one_pixel_outside_is_counting_from_one(tiny_spair: Make) -> None:
    root = tiny_spair()
    edit_json(spair_json(root), src_kps=[[60, 40], [-1, 0], [3, 3]])  # of a 60x40 image
    assert len(SPair71k(root)) == 2


def test_truncated_jpeg_is_named_when_read(tiny_spair: Make) -> None:
    root = tiny_spair()
    path = SPair71k(root)[0].src.path
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])  # the header survives, so indexing does not see it
    dataset = SPair71k(root)
    with pytest.raises(NemfError, match=r"test_a\.jpg: image does not decode .*truncated"):
        dataset.pixels(dataset[0].src)


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n" + b"\0" * 40]
)
def test_no_image(tiny_spair: Make, content: bytes) -> None:
    root = tiny_spair()
    path = SPair71k(root)[0].src.path
    path.write_bytes(content)
    refuse(SPair71k, root, str(path), "not a readable image")


def test_an_image_that_claims_to_be_huge(tiny_pfwillow: Make) -> None:
    """Pillow refuses it with an exception of its own kind."""
    import struct
    import zlib

    root = tiny_pfwillow()
    path = root / "PF-WILLOW" / "car(S)" / "car_1.png"
    data = path.read_bytes()
    header = data[12:16] + struct.pack(">II", 60_000, 60_000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    refuse(PFWillow, root, str(path), "not a readable image", "decompression bomb")


def test_an_image_that_changed_while_in_use(tiny_pfwillow: Make) -> None:
    dataset = PFWillow(tiny_pfwillow())
    image = dataset[0].src
    PILImage.new("RGB", (9, 7)).save(image.path)
    with pytest.raises(NemfError, match=r"car_1\.png: is 9x7 but was 44x30 when indexed"):
        dataset.pixels(image)
    image.path.unlink()
    with pytest.raises(NemfError, match=r"car_1\.png: image is missing"):
        dataset.pixels(image)


PASCAL_ROWS = [
    ((1, "class", "21"), "class must be 1..20 in VOC order, not 21"),
    ((1, "class", "x"), "class must be 1..20 in VOC order"),
    ((1, "class", ""), "class must be 1..20 in VOC order"),
    ((2, "class", "8"), "no Annotations/cat/test_c.mat"),
    ((1, "source_image", "nope.jpg"), "the image JPEGImages/nope.jpg is missing"),
    ((1, "source_image", ".."), "leads out of"),
]


@pytest.mark.parametrize(("cell", "reason"), PASCAL_ROWS)
def test_pfpascal_rows(tiny_pfpascal: Make, cell: tuple[int, str, str], reason: str) -> None:
    root = tiny_pfpascal()
    file = root / "PF-PASCAL" / "test_pairs.csv"
    row, column, value = cell

    def change(rows: list[list[str]]) -> None:
        rows[row][rows[0].index(column)] = value

    edit_list(file, change)
    refuse(PFPascal, root, f"{file} row {row + 1}: ", reason)


def test_pfpascal_flip_must_be_a_flag(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal()
    file = root / "PF-PASCAL" / "trn_pairs.csv"
    edit_list(file, lambda rows: rows[2].__setitem__(3, "2"))
    refuse(PFPascal, root, f"{file} row 3: flip must be 0 or 1, not 2", split="trn")


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("1;2;x", "row 3, column XA: expected numbers separated by ';', not '1;2;x'"),
        ("1;2", "row 3: XA has 2 numbers, YA 3"),
        ("nan;nan;nan", "no keypoint that both images show"),
        ("1;2;inf", "infinite keypoint coordinate"),
        ("1;2;300", "source keypoint 2 at (300,"),
    ],
)
def test_pfpascal_csv_keypoints(tiny_pfpascal: Make, cell: str, reason: str) -> None:
    root = tiny_pfpascal(mat=False, csv_kps=True)
    file = root / "PF-PASCAL" / "test_pairs.csv"
    edit_list(file, lambda rows: rows[2].__setitem__(3, cell))
    refuse(PFPascal, root, str(file), reason)


def test_pfpascal_without_any_keypoints(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal(mat=False)
    file = root / "PF-PASCAL" / "test_pairs.csv"
    refuse(PFPascal, root, f"{file} row 2: no Annotations/cat/test_a.mat", "has no keypoints")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no MATLAB 5 file"),
        (b"not a mat file" * 20, "no MATLAB 5 file"),
        ({"points": np.zeros((3, 2))}, "holds no numeric 'kps'"),
        ({"kps": "abc"}, "holds no numeric 'kps'"),
        ({"kps": np.zeros((2, 3))}, "'kps' must be (N, 2), not (2, 3)"),
        ({"kps": np.zeros((4, 2)), "bbox": np.zeros((1, 3))}, "'bbox' must hold rows"),
        ({"kps": np.full((4, 2), np.nan)}, "no keypoint that both images show"),
        ({"kps": np.ones((9, 2))}, "9 source but 4 target keypoints"),
    ],
)
def test_pfpascal_mat(tiny_pfpascal: Make, content: Any, reason: str) -> None:
    root = tiny_pfpascal()
    file = root / "PF-PASCAL" / "Annotations" / "cat" / "test_a.mat"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        savemat(file, content)
    pair_level = "keypoint" in reason
    refuse(PFPascal, root, "test_pairs.csv row 2" if pair_level else str(file), reason)


def csv_file(name: str, root: Path) -> Path:
    places = {"pfpascal": "PF-PASCAL/test_pairs.csv", "pfwillow": "PF-WILLOW/test_pairs.csv"}
    return root / places.get(name, "pairs.csv")


@pytest.mark.parametrize("name", ["pfpascal", "pfwillow", "folder"])
def test_malformed_csv(name: str, request: pytest.FixtureRequest) -> None:
    make = request.getfixturevalue(f"tiny_{name}")
    root = make(kind="csv") if name == "folder" else make()
    file, cls = csv_file(name, root), dataset_class(name)
    text = file.read_text()
    for content, reason in (
        ("", "lists no pair"),
        (text.splitlines()[0] + "\n", "lists no pair"),
        ("a,b\n1,2\n", "has 2 columns, expected at least"),
        (text + "cut,short\n", f"row {len(text.splitlines()) + 1}: has 2 fields, the header"),
        (text.rstrip("\n") + ",surplus\n", "fields, the header"),
        (",".join(["x"] * 50) + "\n" + ",".join(["y"] * 51) + "\n", "has 51 fields, the header 50"),
        ("\udc80\udcff\n1\n", "cannot be read as CSV"),
    ):
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
        refuse(cls, root, str(file), reason)
    if name != "folder":
        file.unlink()
        refuse(cls, root, str(file), "pair list of the split is missing")


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        (0, "car(S)/car_1.png", "expected <root>/<class>/<file>"),
        (0, "x/../../secret.png", "expected <root>/<class>/<file>"),
        (0, "x/../secret.png", "leads out of"),
        (5, "x", "columns 3 to 42 must be numbers"),
        (5, "999", "source keypoint 3 at (999,"),
        (25, "inf", "infinite keypoint coordinate"),
    ],
)
def test_pfwillow_rows(tiny_pfwillow: Make, column: int, value: str, reason: str) -> None:
    root = tiny_pfwillow()
    file = root / "PF-WILLOW" / "test_pairs.csv"
    edit_list(file, lambda rows: rows[2].__setitem__(column, value))
    refuse(PFWillow, root, f"{file} row 3", reason)


def test_pfwillow_missing_image(tiny_pfwillow: Make) -> None:
    root = tiny_pfwillow()
    path = root / "PF-WILLOW" / "duck(S)" / "duck_2.png"
    path.unlink()
    refuse(PFWillow, root, str(path), "image cannot be read (No such file")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"src": "DROP"}, "entry 1: the field 'src' is missing"),
        ({"src": "../a.png"}, "entry 1: the path '../a.png' leads out of"),
        ({"src": "/etc/passwd"}, "entry 1: the path '/etc/passwd' leads out of"),
        ({"src_kps": [[1, 2]]}, "1 source but 3 target keypoints"),
        ({"src_kps": "abc"}, "'src_kps' must be a list of [x, y]"),
        ({"src_bbox": [1, 2]}, "'src_bbox' must be [x1, y1, x2, y2]"),
        ({"kp_names": "abc"}, "'kp_names' must be a list of names"),
        ({"id": "000001-b-c:object"}, "pair 000001-b-c:object is listed twice"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_folder_entries(tiny_folder: Make, fields: dict, reason: str) -> None:
    root = tiny_folder()
    file = root / "pairs.json"
    pairs = json.loads(file.read_text())
    pairs[0] = {k: v for k, v in (pairs[0] | fields).items() if v != "DROP"}
    file.write_text(json.dumps(pairs))
    refuse(FolderOfPairs, root, str(file), reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read as JSON"),
        ("{}", "must be a list of objects"),
        ("[1]", "must be a list of objects"),
        ("[]", "lists no pair"),
    ],
)
def test_folder_lists(tiny_folder: Make, text: str, reason: str) -> None:
    root = tiny_folder()
    (root / "pairs.json").write_text(text)
    refuse(FolderOfPairs, root, str(root / "pairs.json"), reason)


def test_folder_csv_ids_may_be_long_numbers(tiny_folder: Make) -> None:
    root = tiny_folder(kind="csv")
    long = "9" * 30
    edit_list(
        root / "pairs.csv",
        lambda rows: [row.append("id" if i == 0 else f"{i}{long}") for i, row in enumerate(rows)],
    )
    assert FolderOfPairs(root).ids == [f"1{long}", f"2{long}"]


def test_folder_csv_columns(tiny_folder: Make) -> None:
    root = tiny_folder(kind="csv")
    edit_list(root / "pairs.csv", lambda rows: rows[0].__setitem__(3, "xs"))
    refuse(FolderOfPairs, root, "pairs.csv: the columns XA are missing")


# -- MAT files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_mat_against_scipy(tmp_path: Path, compressed: bool) -> None:
    rng = np.random.default_rng(0)
    content = {
        "kps": rng.normal(size=(7, 2)),
        "single": np.float32([[1.5, np.nan]]),
        "b": np.array([[-3]], np.int8),
        "wide": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "long": np.array([[2**40]], np.int64),
        "cube": rng.normal(size=(2, 3, 4)),
        "empty": np.zeros((0, 4)),
        "text": "skipped",
        "struct": {"a": 1.0},
        "cell": np.array([1, "x"], object),
    }
    savemat(tmp_path / "x.mat", content, do_compression=compressed)
    ours, theirs = read_mat(tmp_path / "x.mat"), loadmat(tmp_path / "x.mat")
    assert set(ours) == set(content) - {"text", "struct", "cell"}
    for name, values in ours.items():
        assert values.dtype == np.float64
        assert np.array_equal(values, theirs[name], equal_nan=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_no_damaged_mat_does_more_than_raise(tmp_path: Path, compressed: bool) -> None:
    """Any one byte changed, any length cut: an error that names the file, or numbers."""
    file = tmp_path / "x.mat"
    savemat(file, {"kps": np.arange(6.0).reshape(3, 2)}, do_compression=compressed)
    data = file.read_bytes()
    messages = []
    damaged = [
        data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
        for at in range(126, len(data))
        for flip in (1, 8, 255)
    ]
    damaged += [data[:length] for length in range(0, len(data), 5)]
    for content in damaged:
        file.write_bytes(content)
        try:
            read_mat(file)
        except NemfError as problem:
            messages.append(str(problem))
    assert all(message.startswith(f"{file}: cannot be read as MAT (") for message in messages)
    assert not any(message.endswith("()") for message in messages)
    assert len(messages) > len(damaged) / 3


# -- cards ----------------------------------------------------------------------------------------


def test_card(tiny_spair: Make) -> None:
    root = tiny_spair()
    file = root / "SPair-71k" / "Layout" / "large" / "test.txt"
    cat, dog = file.read_text().splitlines()
    again = "000003-test_b-test_a:cat"  # the cat pair turned round
    content = json.loads(spair_json(root).read_text())
    turned = {
        **content,
        **{f"src_{k}": content[f"trg_{k}"] for k in ("imname", "imsize", "bndbox", "kps")},
        **{f"trg_{k}": content[f"src_{k}"] for k in ("imname", "imsize", "bndbox", "kps")},
    }
    spair_json(root).with_name(f"{again}.json").write_text(json.dumps(turned))
    file.write_text("\n".join([cat, dog, again]))
    shutil.copy(
        root / "SPair-71k/JPEGImages/cat/test_a.jpg", root / "SPair-71k/JPEGImages/dog/test_c.jpg"
    )
    edit_json(spair_json(root, 2), src_imsize=[60, 40, 3])
    numbers = card(SPair71k(root, outside="keep"))
    assert (numbers["pairs"], numbers["official_pairs"]) == (3, 12234)
    assert (numbers["images"], numbers["distinct_images"]) == (4, 3)
    assert numbers["pairs_per_image"] == {"min": 1, "median": 1.5, "mean": 1.5, "max": 2}
    assert numbers["image_width"] == {"min": 44, "median": 52, "mean": 52, "max": 60}
    assert numbers["image_height"] == {"min": 40, "median": 45, "mean": 45, "max": 50}
    assert (numbers["keypoints"], numbers["keypoints_outside"]) == (8, 0)
    assert numbers["keypoints_per_pair"]["mean"] == pytest.approx(8 / 3)
    assert numbers["classes"] == {
        "cat": {"pairs": 2, "images": 2, "keypoints": 6, "keypoints_per_pair": 3.0},
        "dog": {"pairs": 1, "images": 2, "keypoints": 2, "keypoints_per_pair": 2.0},
    }
    assert numbers["flags"]["viewpoint"] == {"0": 2, "1": 1}
    assert numbers["flags"]["truncation"] == {"0": 2, "3": 1}
    assert (numbers["synthetic"], numbers["split"]) == (False, "test")
    json.dumps(numbers)
    text = render(numbers)
    assert "SPair-71k, test (real photographs, layout spair)" in text
    assert "3 of 12,234 official pairs (a part)" in text
    assert numbers["fingerprint"] in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["cat", "2", "2", "6", "3.00"],
        ["dog", "1", "2", "2", "2.00"],
    ]


def test_card_counts_points_off_the_image(tiny_spair: Make) -> None:
    root = tiny_spair()
    edit_json(spair_json(root), src_kps=[[59.5, 1], [59.6, 2], [-0.6, 3]])  # 60 wide
    assert card(SPair71k(root))["keypoints_outside"] == 2


def test_card_says_what_is_not_annotated(tiny_pfwillow: Make) -> None:
    numbers = card(PFWillow(tiny_pfwillow(), first=2))
    assert numbers["flags"]["occlusion"] == {"not annotated": 2}
    assert numbers["images"] == 2  # of the pairs in use
    assert "occlusion           not annotated: 2" in render(numbers)


# -- real data ------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "split", "pairs", "official", "images", "distinct"),
    [
        ("pfwillow", "test", 900, 900, 100, 70),
        ("pfpascal", "test", 65, 299, 108, 108),
        ("pfpascal", "val", 65, 308, 110, 110),
        ("animalpose", "trn", 6000, None, 800, 799),
        ("animalpose", "val", 500, None, 100, 100),
        ("animalpose", "test", 1000, None, 200, 200),
    ],
)
def test_real_datasets(
    shared: Path,
    name: str,
    split: str,
    pairs: int,
    official: int | None,
    images: int,
    distinct: int,
) -> None:
    dataset = dataset_class(name)(shared / "data", split)
    assert (len(dataset), dataset.official_pairs) == (pairs, official)
    assert not dataset.synthetic
    numbers = card(dataset)
    assert (numbers["images"], numbers["distinct_images"]) == (images, distinct)
    assert dataset.pixels(dataset[0].src).shape[:2] == dataset[0].src.size


@pytest.mark.real
def test_real_training_list_without_keypoints(shared: Path) -> None:
    refuse(PFPascal, shared / "data", "trn_pairs.csv row 2", "has no keypoints", split="trn")


def test_an_index_made_by_other_code_is_not_used(
    tiny_pfwillow: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemf.datasets import index
    from nemf.datasets.pfwillow import PFWillow

    dataset = PFWillow(tiny_pfwillow())
    first = dataset._cache_key()
    assert dataset._cache_key() == first
    monkeypatch.setattr(index, "_reader_sources", lambda reader: ("changed",))
    assert dataset._cache_key() != first
