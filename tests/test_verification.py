"""Verification finds every planted defect, goes on after each, and finds none in sound trees."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from nemf.datasets import dataset_class, verification
from nemf.datasets.index import PairDataset
from nemf.datasets.verification import Finding, Report, verify
from nemf.errors import NemfError

Make = Callable[..., Path]
NAMES = ["spair", "pfpascal", "pfwillow", "folder"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def root(name: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{name}")()


def found(report: Report, severity: str, file: str, reason: str) -> bool:
    return any(
        f.severity == severity and file in f.file and reason in f.reason for f in report.findings
    )


def problems(report: Report) -> list[tuple[str, str]]:
    return [(f.file, f.reason) for f in report.problems]


def edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def annotation(root: Path, number: int, split: str = "test") -> Path:
    folder = root / "SPair-71k" / "PairAnnotation" / split
    return next(folder.glob(f"{number:06d}-*.json"))


# -- sound datasets -------------------------------------------------------------------------------


def test_a_sound_dataset_has_no_problems(name: str, root: Path) -> None:
    report = verify(name, root)
    assert report.ok, str(report)
    splits = dataset_class(name).splits
    per_split = {"pfwillow": 3}.get(name, 2)
    assert report.splits == list(splits)
    assert report.pairs == per_split * len(splits)
    assert report.images == {"spair": 12, "pfpascal": 12, "pfwillow": 4, "folder": 3}[name]
    # lists + annotations + images
    assert (
        report.files
        == {
            "spair": 3 + 6 + 12 + 12,
            "pfpascal": 3 + 12 + 12,
            "pfwillow": 1 + 4,
            "folder": 1 + 3,
        }[name]
    )
    assert {f.kind for f in report.notes} <= {"list"}
    assert str(report).splitlines()[-1].startswith(f"no problems, {len(report.notes)} note")


def test_part_of_the_official_pairs_is_a_note(tiny_pfpascal: Make) -> None:
    report = verify("pfpascal", tiny_pfpascal(), ["test"])
    assert report.findings == [
        Finding(
            "note", "test_pairs.csv", "lists 2 of 299 official pairs; results are of a part", "list"
        )
    ]


def test_more_than_the_official_pairs(tiny_pfwillow: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_class("pfwillow"), "official", {"test": 2})
    report = verify("pfwillow", tiny_pfwillow())
    assert found(report, "note", "test_pairs.csv", "lists 3 pairs, but officially there are 2")


def test_chosen_splits(tiny_spair: Make) -> None:
    root = tiny_spair(splits=("val", "test"))
    report = verify("spair", root, ["test"])
    assert (report.splits, report.pairs, report.images) == (["test"], 2, 4)
    assert not any(f.kind == "unused" for f in report.findings)  # val uses the other images
    assert verify("spair", root, ["val", "test", "test"]).splits == ["val", "test"]
    whole = verify("spair", root)
    assert whole.ok
    assert found(whole, "note", "Layout/large/trn.txt", "list of the split is missing")
    asked = verify("spair", root, ["train", "test"])
    assert problems(asked) == [("Layout/large/trn.txt", "the list of the split is missing")]
    assert asked.splits == ["test"]


def test_what_cannot_be_verified_at_all(tmp_path: Path, tiny_spair: Make) -> None:
    with pytest.raises(NemfError, match="unknown dataset 'x'"):
        verify("x", tmp_path)
    with pytest.raises(NemfError, match="no SPair-71k here"):
        verify("spair", tmp_path)
    with pytest.raises(NemfError, match="no split 'dev'"):
        verify("spair", tiny_spair(), ["dev"])
    with pytest.raises(NemfError, match="name at least one split"):
        verify("spair", tiny_spair(), [])


def test_no_list_at_all_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "PF-WILLOW").mkdir()
    report = verify("pfwillow", tmp_path)
    assert problems(report) == [(".", "holds the pair list of no split")]
    assert "checked no split" in str(report)


# -- one defect each ------------------------------------------------------------------------------


def test_truncated_jpeg(tiny_spair: Make) -> None:
    """The header survives, so only decoding tells."""
    root = tiny_spair()
    path = root / "SPair-71k" / "JPEGImages" / "cat" / "test_a.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    dataset_class("spair")(root)  # opens
    report = verify("spair", root)
    ((file, reason),) = problems(report)
    assert file == "JPEGImages/cat/test_a.jpg"
    assert "truncated" in reason
    assert report.images == 11


def test_each_image_is_decoded_once(tiny_pfwillow: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    original = verification.decode_image

    def decode(path: Path) -> np.ndarray:
        seen.append(path)
        return original(path)

    monkeypatch.setattr(verification, "decode_image", decode)
    verify("pfwillow", tiny_pfwillow())  # two of the four images are in two pairs
    assert len(seen) == len(set(seen)) == 4


def test_all_defects_of_a_tree_are_reported(tiny_spair: Make) -> None:
    """A dozen at once, in every kind of file, each named."""
    root = tiny_spair()
    base = root / "SPair-71k"
    annotation(root, 1, "trn").write_text("{")
    edit_json(annotation(root, 2, "trn"), trg_kps=[[1, 1], [400, 1]])
    annotation(root, 1, "val").unlink()
    edit_json(annotation(root, 2, "val"), src_imsize=[10, 10, 3], trg_bndbox=[9, 9, 1, 1])
    edit_json(annotation(root, 1), src_kps=[[1, 1]])
    edit_json(annotation(root, 2), src_kps=[None, None])
    (base / "PairAnnotation" / "test" / "000009-x-y:cat.json").write_text("{}")
    (base / "JPEGImages" / "cat" / "test_b.jpg").unlink()
    (base / "JPEGImages" / "dog" / "test_d.jpg").write_bytes(b"no image")
    with (base / "Layout" / "large" / "val.txt").open("a") as file:
        file.write("000002-val_c-val_d:dog\n")
    report = verify("spair", root)
    expected = [
        ("PairAnnotation/trn/000001-trn_a-trn_b:cat.json", "cannot be read as JSON"),
        (
            "PairAnnotation/trn/000002-trn_c-trn_d:dog.json",
            "target keypoint 1 at (400, 1) lies outside",
        ),
        ("PairAnnotation/val/000001-val_a-val_b:cat.json", "the annotation is missing"),
        ("PairAnnotation/val/000002-val_c-val_d:dog.json", "annotated for a source image of 10x10"),
        (
            "PairAnnotation/val/000002-val_c-val_d:dog.json",
            "target box [9.0, 9.0, 1.0, 1.0] is empty",
        ),
        ("Layout/large/val.txt", "pair 000002-val_c-val_d:dog is listed 2 times"),
        ("PairAnnotation/test/000001-test_a-test_b:cat.json", "1 source but 3 target keypoints"),
        ("PairAnnotation/test/000002-test_c-test_d:dog.json", "no keypoint that both images show"),
        ("PairAnnotation/test/000009-x-y:cat.json", "is not on the test list"),
        ("JPEGImages/cat/test_b.jpg", "image cannot be read (No such file or directory)"),
        ("JPEGImages/dog/test_d.jpg", "not a readable image"),
    ]
    for file, reason in expected:
        assert found(report, "problem", file, reason), (file, reason)
    assert len(report.problems) == len(expected), str(report)
    text = str(report)
    assert all(file in text for file, _ in expected)
    assert str(root) not in text.split("\n", 1)[1]  # files are named relative to the folder


def test_pf_tables_go_on_after_a_bad_row(tiny_pfwillow: Make) -> None:
    root = tiny_pfwillow()
    file = root / "PF-WILLOW" / "test_pairs.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()]
    rows[1][7], rows[2][0], rows[3][30] = "x", "no/such/path.png", "-77"
    file.write_text("\n".join(",".join(row) for row in rows) + "\n")
    report = verify("pfwillow", root)
    assert found(report, "problem", "test_pairs.csv row 2", "must be numbers")
    assert found(report, "problem", "such/path.png", "image cannot be read")
    assert found(report, "problem", "test_pairs.csv row 4", "lies outside")
    assert len(report.problems) == 3
    assert report.pairs == 2


def test_an_unreadable_list(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal()
    (root / "PF-PASCAL" / "val_pairs.csv").write_text("a,b,c\n1,2\n")
    (root / "PF-PASCAL" / "trn_pairs.csv").write_bytes(b"\xff")
    report = verify("pfpascal", root)
    assert {f.file for f in report.problems} == {"val_pairs.csv row 2", "trn_pairs.csv"}
    assert report.pairs == 2
    assert report.images == 12  # what the unreadable lists use is decoded nevertheless


def test_damaged_mat(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal(nested=True)
    file = root / "PF-PASCAL/PF-dataset-PASCAL/Annotations/cat/test_a.mat"
    file.write_bytes(file.read_bytes()[:-40])
    ((named, reason),) = problems(verify("pfpascal", root))
    assert named == "PF-dataset-PASCAL/Annotations/cat/test_a.mat"
    assert "cannot be read as MAT (it is cut short)" in reason


def test_exif_orientation_is_a_note(tiny_spair: Make) -> None:
    root = tiny_spair()
    path = root / "SPair-71k" / "JPEGImages" / "cat" / "test_a.jpg"
    image = PILImage.open(path)
    exif = image.getexif()
    exif[274] = 6
    image.save(path, exif=exif)
    report = verify("spair", root)
    assert report.ok  # its stored size is still the annotated one
    assert found(report, "note", "JPEGImages/cat/test_a.jpg", "is 6; it is ignored here")


def test_unused_images_are_notes_even_if_damaged(tiny_spair: Make) -> None:
    root = tiny_spair()
    folder = root / "SPair-71k" / "JPEGImages" / "cat"
    shutil.copy(folder / "test_a.jpg", folder / "spare.jpg")
    (folder / "broken.png").write_bytes(b"")
    report = verify("spair", root)
    assert report.ok
    assert found(report, "note", "cat/spare.jpg", "no pair uses it")
    assert found(report, "note", "cat/broken.png", "no pair uses it")
    assert found(report, "note", "cat/broken.png", "not a readable image")
    assert sum(f.kind == "unused" for f in report.findings) == 2


def test_training_images_in_the_test_split(tiny_spair: Make) -> None:
    """The same picture under another name, and as another file format of the same pixels."""
    root = tiny_spair()
    folder = root / "SPair-71k" / "JPEGImages"
    shutil.copy(folder / "cat/trn_a.jpg", folder / "cat/test_a.jpg")
    pixels = PILImage.open(folder / "dog/val_d.jpg")
    pixels.save(folder / "dog/test_d.jpg", format="PNG")  # other bytes
    report = verify("spair", root)
    assert problems(report) == [
        (
            "JPEGImages/cat/trn_a.jpg",
            "trn image (in 1 pair) is the test image JPEGImages/cat/test_a.jpg (in 1 pair)",
        )
    ]
    assert found(report, "note", "dog/val_d.jpg", "is the test image JPEGImages/dog/test_d.jpg")
    assert verify("spair", root, ["val", "test"]).ok


def test_leaks_count_pairs(tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal()
    base = root / "PF-PASCAL"
    shutil.copy(base / "JPEGImages/trn_a.jpg", base / "JPEGImages/test_a.jpg")
    with (base / "test_pairs.csv").open("a") as file:
        file.write("x/test_b.jpg,x/test_a.jpg,8\n")
    report = verify("pfpascal", root)
    assert found(
        report,
        "problem",
        "JPEGImages/trn_a.jpg",
        "trn image (in 1 pair) is the test image JPEGImages/test_a.jpg (in 2 pairs)",
    )


def test_identical_images_within_a_split(tiny_pfwillow: Make) -> None:
    root = tiny_pfwillow()
    base = root / "PF-WILLOW"
    # enlarge first: the copy must hold the other image's keypoints
    PILImage.new("RGB", (60, 60), "red").save(base / "car(S)/car_1.png")
    shutil.copy(base / "car(S)/car_1.png", base / "duck(S)/duck_1.png")
    report = verify("pfwillow", root)
    assert report.ok
    assert found(
        report, "note", "car(S)/car_1.png", "the same picture as duck(S)/duck_1.png (test)"
    )


def test_the_same_images_listed_twice(tiny_pfwillow: Make) -> None:
    root = tiny_pfwillow()
    file = root / "PF-WILLOW" / "test_pairs.csv"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, lines[1]]) + "\n")
    report = verify("pfwillow", root)
    assert report.ok
    assert found(report, "note", "test_pairs.csv", "car(S)/car_1.png -> car(S)/car_2.png twice")


def test_boxes_that_reach_beyond_their_image(tiny_spair: Make) -> None:
    root = tiny_spair()
    edit_json(annotation(root, 1), src_bndbox=[2, 3, 61, 41])  # 60x40: a pixel is no matter
    assert not any(f.kind == "box" for f in verify("spair", root).findings)
    edit_json(annotation(root, 1), src_bndbox=[2, 3, 62, 35])
    report = verify("spair", root)
    assert report.ok
    assert found(
        report, "note", "000001-test_a-test_b:cat.json", "reaches beyond cat/test_a.jpg (60x40)"
    )


def test_pair_and_image_annotation_that_disagree(tiny_spair: Make) -> None:
    root = tiny_spair()
    edit_json(annotation(root, 1), src_kps=[[20, 20], [21, 21], [22, 22]])
    report = verify("spair", root)
    assert report.ok
    assert found(
        report, "note", "000001-test_a-test_b:cat.json", "in the annotation of cat/test_a.jpg"
    )


# -- the report -----------------------------------------------------------------------------------


def test_report_as_dict_and_text() -> None:
    findings = [Finding("problem", f"row {i}", "is wrong", "annotation") for i in range(7)]
    findings += [Finding("note", "a.jpg", "no pair uses it", "unused")]
    report = Report("spair", "SPair-71k", "/data", True, ["test"], 20, 1, 1234, findings)
    assert not report.ok
    content = json.loads(json.dumps(report.as_dict()))
    assert content["ok"] is False
    assert content["findings"][0] == {
        "severity": "problem",
        "file": "row 0",
        "reason": "is wrong",
        "kind": "annotation",
    }
    assert str(report).splitlines() == [
        "SPair-71k (synthetic) in /data",
        "checked test: 1,234 pairs, 1 image, 20 files",
        "problem: annotations (7)",
        *(f"  row {i}: is wrong" for i in range(5)),
        "  ... and 2 more (--json has them all)",
        "note: images that no pair uses (1)",
        "  a.jpg: no pair uses it",
        "7 problems, 1 note",
    ]


def test_progress_goes_to_stderr(tiny_pfwillow: Make, capsys: pytest.CaptureFixture[str]) -> None:
    root = tiny_pfwillow()
    verify("pfwillow", root)
    assert capsys.readouterr().err == ""
    verify("pfwillow", root, progress=True)
    shown = capsys.readouterr()
    assert "decoding images" in shown.err
    assert shown.out == ""


# -- whatever the damage --------------------------------------------------------------------------


def damage(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    kind = rng.randrange(6)
    if kind == 0:
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 1:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 4, 30])):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(bytes(changed))
    elif kind == 2:
        file.write_bytes(rng.randbytes(50))
    elif kind == 3:
        file.unlink()
        file.mkdir()
    elif kind == 4:
        file.unlink()
        file.symlink_to(file.parent / "nowhere")
    else:
        junk = rng.choice([b"null", b"-1", b"1e999", b'"x"', b"[]", b"{}", b"../../x", b"nan"])
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + junk + data[at + rng.randrange(1, 9) :])


@pytest.mark.parametrize("seed", range(3))
def test_survives_any_damage(name: str, root: Path, tmp_path: Path, seed: int) -> None:
    """verify() reports, the reader raises NemfError or works, and never does verify() call sound
    what the reader refuses (except a split whose list is gone, which is a note)."""
    rng = random.Random(f"{name} {seed}")
    for trial in range(15):
        copy = tmp_path / f"trial{trial}"
        shutil.copytree(root, copy)
        file = rng.choice([p for p in sorted(copy.rglob("*")) if p.is_file()])
        damage(file, rng)
        report = None
        try:
            report = verify(name, copy)
        except NemfError:
            assert name == "folder"  # without its list it is no dataset
        json.dumps(report and report.as_dict())
        assert str(report)
        for split in dataset_class(name).splits:
            problem = open_and_decode(dataset_class(name), copy, split)
            if problem is not None and "list of the split is missing" not in str(problem):
                assert report is None or not report.ok, (file, problem)


def open_and_decode(cls: type[PairDataset], root: Path, split: str) -> NemfError | None:
    try:
        dataset = cls(root, split)
        for image in dataset.images:
            dataset.pixels(image)
    except NemfError as problem:
        return problem
    return None


# -- real data ------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_pfwillow(shared: Path) -> None:
    report = verify("pfwillow", shared / "data")
    assert report.ok
    assert (report.pairs, report.images) == (900, 100)
    assert len(report.notes) == 30
    assert {f.kind for f in report.notes} == {"duplicate"}


@pytest.mark.real
def test_real_pfpascal(shared: Path) -> None:
    report = verify("pfpascal", shared / "data", ["val", "test"])
    assert report.ok
    assert found(report, "note", "test_pairs.csv", "lists 65 of 299 official pairs")
    with_training = verify("pfpascal", shared / "data")
    assert len(with_training.problems) == 632
    assert all("has no keypoints" in f.reason for f in with_training.problems)


@pytest.mark.real
def test_real_animalpose(shared: Path) -> None:
    report = verify("animalpose", shared / "data")
    assert report.ok, str(report)
    assert (report.pairs, report.images) == (7500, 1100)
    assert [f.kind for f in report.notes] == ["duplicate"]


@pytest.mark.real
def test_goldens_share_images_between_splits(shared: Path) -> None:
    report = verify("spair", shared / "goldens" / "fake_datasets")
    assert {f.kind for f in report.problems} == {"leak"}
    assert len(report.problems) == 6
