"""The synthetic stand-ins: exact geometry, honest visibility, official layouts, same bytes."""

import csv
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from nemf.datasets.rendering import (
    SUPERSAMPLE,
    Camera,
    Lighting,
    Material,
    Mesh,
    look_at,
    rasterise,
    render,
    visible,
)
from nemf.datasets.synthetic import _pair_annotation, _Shot, make_synthetic, synthetic_marker
from nemf.datasets.synthetic_objects import OBJECT_CLASSES
from nemf.datasets.synthetic_scenes import Framing, Photograph, take_photograph
from nemf.errors import NemfError

VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]  # fmt: skip
PAIR_FIELDS = [
    "filename", "src_imname", "trg_imname", "src_imsize", "trg_imsize", "src_bndbox", "trg_bndbox",
    "category", "src_kps", "trg_kps", "kps_ids", "mirror", "viewpoint_variation",
    "scale_variation", "truncation", "occlusion",
]  # fmt: skip
LIGHT = Lighting(np.array([0.6, 0.0, 0.8]), np.full(3, 0.5), np.full(3, 0.5))
TINY_CLASSES = {"bus", "chair", "motorbike"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    make_synthetic(root, preset="tiny")
    return root


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith(".make-synthetic.lock.")
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# geometry


def test_look_at_puts_the_objects_left_on_the_right_of_a_front_view():
    rotation, translation = look_at(
        np.zeros(3), azimuth_deg=0, elevation_deg=0, roll_deg=0, distance=4
    )
    camera = Camera(rotation, translation, 100.0, (50.0, 40.0))
    xy, depth = camera.project(np.array([[0.0, 1, 0], [0, 0, 1], [2, 0, 0], [2, 1, 1]]))
    np.testing.assert_allclose(xy, [[75, 40], [50, 15], [50, 40], [100, -10]], atol=1e-9)
    np.testing.assert_allclose(depth, [4, 4, 2, 2])


def test_look_at_from_the_left_sees_the_front_on_the_left():
    rotation, translation = look_at(
        np.zeros(3), azimuth_deg=90, elevation_deg=0, roll_deg=0, distance=5
    )
    xy, depth = Camera(rotation, translation, 10.0, (0.0, 0.0)).project(np.array([[1.0, 0, 0]]))
    np.testing.assert_allclose(xy, [[-2, 0]], atol=1e-9)
    np.testing.assert_allclose(depth, [5])


def test_a_cube_covers_the_pixels_computed_by_hand():
    mesh = Mesh()
    mesh.box((0, 0, 0), (2, 2, 2), Material((0.5, 0.5, 0.5)))
    rotation, translation = look_at(
        np.zeros(3), azimuth_deg=0, elevation_deg=0, roll_deg=0, distance=5
    )
    # the front face is at depth 4: half-width 40 · 1/4 = 10 px about the centre 31.5
    camera = Camera(rotation, translation, 40.0, (31.5, 23.5))
    picture = render(mesh, camera, 64, 48, LIGHT)
    rows, columns = np.nonzero(picture.coverage > 0)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (22, 41, 14, 33)
    assert picture.coverage[14:34, 22:42].min() == 1
    np.testing.assert_allclose(picture.depth[np.isfinite(picture.depth)], 4, rtol=1e-9)
    # albedo · (ambient · 0.8 on an upright face + lamp · cosine 0.6)
    np.testing.assert_allclose(picture.colour[20, 30], 0.5 * (0.5 * 0.8 + 0.5 * 0.6), rtol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda mesh, m: mesh.box((0, 0, 0), (2, 1, 3), m),
        lambda mesh, m: mesh.ellipsoid((4, 0, 1), (1, 2, 0.5), m, tilt=0.3),
        lambda mesh, m: mesh.cylinder((0, 1, 0), (3, 0, 1), (0.5, 0.2), m),
        lambda mesh, m: mesh.torus((1, 2, 3), 1.0, 0.2, m),
        lambda mesh, m: mesh.lathe((0, 0, 0), (0, 0, -1), [(1, 0), (0.5, 1), (0.8, 2)], m),
    ],
)
def test_solids_are_closed_and_face_outwards(build):
    mesh = Mesh()
    build(mesh, Material((1.0, 1.0, 1.0)))
    triangles = mesh.corners
    area = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    # the area vectors of a closed surface cancel, and its volume is positive
    np.testing.assert_allclose(area.sum(axis=0), 0, atol=1e-9)
    assert np.einsum("ti,ti->", triangles.mean(axis=1), area) > 0
    outward = np.einsum("tci,ti->tc", mesh.normals, area)
    assert (outward >= -1e-9).all()


def test_rasterise_agrees_with_a_point_in_triangle_oracle():
    rng = np.random.default_rng(3)
    corners = rng.uniform(-5, 30, (12, 3, 2))
    inverse = rng.uniform(0.1, 1, (12, 3))
    nearest, buffer = rasterise(corners, inverse, 24, 20)
    expected = np.full((20, 24), -1)
    best = np.zeros((20, 24))
    for index, (triangle, value) in enumerate(zip(corners, inverse, strict=True)):
        weights = np.linalg.inv(np.vstack([triangle.T, np.ones(3)]))
        for y in range(20):
            for x in range(24):
                share = weights @ (x, y, 1)
                if share.min() >= 0 and share @ value > best[y, x]:
                    best[y, x], expected[y, x] = share @ value, index
    np.testing.assert_array_equal(nearest, expected)
    np.testing.assert_allclose(buffer, best, rtol=1e-9)


def test_visible_tells_front_from_back_and_outside():
    mesh = Mesh()
    mesh.box((0, 0, 0), (2, 2, 2), Material((0.5, 0.5, 0.5)))
    rotation, translation = look_at(
        np.zeros(3), azimuth_deg=0, elevation_deg=0, roll_deg=0, distance=5
    )
    camera = Camera(rotation, translation, 40.0, (31.5, 23.5))
    depth = render(mesh, camera, 64, 48, LIGHT).depth
    points = np.array([[1.0, 0, 0], [1, 1, 1], [-1, 0, 0], [1, 9, 0]])
    assert visible(points, camera, depth, 0.1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", OBJECT_CLASSES)
def test_keypoints_scale_with_the_resolution_and_lie_on_the_object(name):
    subject = OBJECT_CLASSES[name]
    solid = subject.build(np.random.default_rng(1))
    points = np.array([solid.keypoints[key] for key in subject.keypoints])
    corners = solid.mesh.corners.reshape(-1, 3)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    size = np.linalg.norm(np.ptp(corners, axis=0))
    ever = np.zeros(len(points), bool)
    for azimuth in range(0, 360, 45):
        for elevation in (-20, 15, 35):
            rotation, translation = look_at(
                middle,
                azimuth_deg=azimuth,
                elevation_deg=elevation,
                roll_deg=5,
                distance=2 * size,
            )
            camera = Camera(rotation, translation, 300.0, (79.5, 79.5))
            picture = render(solid.mesh, camera, 160, 160, LIGHT)
            ever |= visible(points, camera, picture.depth, subject.tolerance * size)
            xy, _ = camera.project(points)
            finer, _ = camera.magnified(3).project(points)
            np.testing.assert_allclose(finer + 0.5, 3 * (xy + 0.5))
    assert ever.all(), [key for key, seen in zip(subject.keypoints, ever, strict=True) if not seen]


def test_a_finer_rendering_shows_the_same_outline():
    subject = OBJECT_CLASSES["car"]
    solid = subject.build(np.random.default_rng(0))
    rotation, translation = look_at(
        np.array([0, 0, 0.7]), azimuth_deg=40, elevation_deg=15, roll_deg=0, distance=10
    )
    camera = Camera(rotation, translation, 150.0, (39.5, 29.5))
    coarse = render(solid.mesh, camera, 80, 60, LIGHT)
    fine = render(solid.mesh, camera.magnified(4), 320, 240, LIGHT)
    pooled = fine.coverage.reshape(60, 4, 80, 4).mean(axis=(1, 3))
    assert np.abs(pooled - coarse.coverage).max() < 0.5
    assert abs(pooled.sum() - coarse.coverage.sum()) < 0.01 * pooled.sum()


def test_left_and_right_are_the_objects_own():
    for subject in OBJECT_CLASSES.values():
        points = subject.build(np.random.default_rng(7)).keypoints
        for name, point in points.items():
            if name.endswith("_left"):
                assert point[1] > 0 > points[name.removesuffix("_left") + "_right"][1], name


# classes and photographs


def test_classes_keep_to_voc_and_to_the_promised_keypoint_counts():
    assert len(OBJECT_CLASSES) >= 8
    counts = []
    for name, subject in OBJECT_CLASSES.items():
        assert VOC[subject.voc_id - 1] == name
        assert len(set(subject.keypoints)) == len(subject.keypoints)
        counts.append(len(subject.keypoints))
    assert min(counts) >= 6
    assert max(counts) <= 12
    assert sum(count >= 10 for count in counts) >= 6


@pytest.mark.parametrize("name", ["aeroplane", "bottle", "car"])
def test_photographs_keep_their_promises(name):
    subject = OBJECT_CLASSES[name]
    framing = Framing(subject.keypoints, subject.azimuth_deg, truncated=0.5, occluded=0.8)
    truncated, occluded = set(), set()
    for index in range(12):
        photo = take_photograph(subject, framing, np.random.default_rng([5, index]))
        height, width = photo.pixels.shape[:2]
        assert photo.pixels.dtype == np.uint8
        assert 200 <= max(width, height) <= 320
        seen = photo.keypoints_px[photo.visible]
        assert seen.min() >= 0
        assert (seen <= (width - 1, height - 1)).all()
        x1, y1, x2, y2 = photo.box_px
        assert 0 <= x1 <= x2 < width
        assert 0 <= y1 <= y2 < height
        # a seen corner may stick out of the covered pixels by the width of an antialiased edge
        assert (seen >= (x1 - 1.5, y1 - 1.5)).all()
        assert (seen <= (x2 + 1.5, y2 + 1.5)).all()
        truncated.add(photo.truncated)
        occluded.add(photo.occluded)
    assert truncated == occluded == {True, False}


def test_an_untruncated_photograph_holds_every_keypoint():
    subject = OBJECT_CLASSES["horse"]
    framing = Framing(subject.keypoints, (50, 100), truncated=0.0, occluded=0.0)
    for index in range(8):
        photo = take_photograph(subject, framing, np.random.default_rng(index))
        height, width = photo.pixels.shape[:2]
        assert not photo.truncated
        assert not photo.occluded
        assert photo.keypoints_px.min() >= 0
        assert (photo.keypoints_px <= (width - 1, height - 1)).all()
        assert 50 <= photo.azimuth_deg <= 100


def test_an_occluder_hides_keypoints_and_shrinks_the_box(monkeypatch):
    def left_half(rng, coverage, share):
        opacity = np.zeros_like(coverage)
        opacity[:, : coverage.shape[1] // 2] = 1
        return np.ones((*coverage.shape, 3), np.float32), opacity

    subject = OBJECT_CLASSES["bus"]
    framing = Framing(subject.keypoints, subject.azimuth_deg, truncated=0.0, fewest_visible=1)
    monkeypatch.setattr("nemf.datasets.synthetic_scenes._occluder", left_half)
    photo = take_photograph(subject, framing, np.random.default_rng(0))
    half = photo.pixels.shape[1] // 2
    assert photo.occluded
    assert photo.visible.any()
    assert (photo.keypoints_px[photo.visible, 0] >= half - 0.5).all()
    assert photo.box_px[0] == half


# layouts


def test_spair_layout(tiny):
    root = tiny / "SPair-71k"
    annotations = {}
    for path in (root / "ImageAnnotation").rglob("*.json"):
        one = json.loads(path.read_text())
        assert one["category"] == path.parent.name
        with Image.open(root / "JPEGImages" / one["category"] / one["filename"]) as image:
            assert image.format == "JPEG"
            assert image.size == (one["image_width"], one["image_height"])
        assert list(one["kps"]) == [str(i) for i in range(len(one["kps_names"]))]
        assert tuple(one["kps_names"]) == OBJECT_CLASSES[one["category"]].keypoints
        assert one["azimuth_id"] in range(8)
        annotations[one["filename"]] = one
    assert {one["category"] for one in annotations.values()} == TINY_CLASSES
    images_of = {}
    for split in ("trn", "val", "test"):
        text = (root / "Layout" / "large" / f"{split}.txt").read_text()
        assert text.endswith("\n")
        lines = text.split("\n")[:-1]
        files = {path.stem for path in (root / "PairAnnotation" / split).iterdir()}
        assert files == set(lines)
        assert len(files) == len(lines)
        images_of[split] = set()
        for line in lines:
            src_name, trg_name, name = re.fullmatch(r"\d{6}-([^-:]+)-([^-:]+):(\w+)", line).groups()
            pair = json.loads((root / "PairAnnotation" / split / f"{line}.json").read_text())
            assert list(pair) == PAIR_FIELDS
            assert (pair["filename"], pair["category"], pair["mirror"]) == (line, name, 0)
            assert pair["src_imname"] == f"{src_name}.jpg"
            assert pair["trg_imname"] == f"{trg_name}.jpg"
            src, trg = annotations[pair["src_imname"]], annotations[pair["trg_imname"]]
            common = [
                i for i in src["kps"] if src["kps"][i] is not None and trg["kps"][i] is not None
            ]
            assert pair["kps_ids"] == common
            assert len(common) >= 3
            for side, one in (("src", src), ("trg", trg)):
                assert pair[f"{side}_kps"] == [one["kps"][i] for i in common]
                assert pair[f"{side}_bndbox"] == one["bndbox"]
                assert pair[f"{side}_imsize"] == [one["image_width"], one["image_height"], 3]
            assert pair["truncation"] == src["truncated"] + 2 * trg["truncated"]
            assert pair["occlusion"] == src["occluded"] + 2 * trg["occluded"]
            areas = sorted(
                (x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (src["bndbox"], trg["bndbox"])
            )
            ratio = areas[1] / areas[0]
            assert pair["scale_variation"] == (ratio > 2) + (ratio > 4)
            assert pair["viewpoint_variation"] in (0, 1, 2)
            images_of[split] |= {src_name, trg_name}
    assert not images_of["trn"] & images_of["val"]
    assert not images_of["test"] & (images_of["trn"] | images_of["val"])


def test_pair_annotation_by_hand():
    def shot(name, azimuth, box, *, truncated, occluded, seen):
        kps = np.arange(10.0).reshape(5, 2) + azimuth
        photo = Photograph(
            np.empty((0, 0, 3), np.uint8), kps, np.array(seen), np.array(box), azimuth,
            truncated, occluded,
        )  # fmt: skip
        return _Shot(Path(f"{name}.jpg"), (300, 200), photo)

    src = shot(
        "a", 170.0, (0, 0, 99, 99), truncated=False, occluded=True, seen=[True] * 4 + [False]
    )
    trg = shot(
        "b", -150.0, (10, 10, 59, 69), truncated=True, occluded=True, seen=[False] + [True] * 4
    )
    pair = _pair_annotation("000001-a-b:car", "car", src, trg)
    assert pair["kps_ids"] == ["1", "2", "3"]
    assert pair["src_kps"] == [[172, 173], [174, 175], [176, 177]]
    assert pair["trg_kps"] == [[-148, -147], [-146, -145], [-144, -143]]
    # 40 degrees across the back; 10,000 px against 3,000 px
    assert (pair["viewpoint_variation"], pair["scale_variation"]) == (1, 1)
    assert (pair["truncation"], pair["occlusion"]) == (2, 3)
    swapped = _pair_annotation("000002-b-a:car", "car", trg, src)
    assert (swapped["truncation"], swapped["occlusion"]) == (1, 3)


def test_pfpascal_layout(tiny):
    root = tiny / "PF-PASCAL"
    images_of = {}
    for split in ("trn", "val", "test"):
        rows = read_csv(root / f"{split}_pairs.csv")
        extra = ["flip"] if split == "trn" else []
        assert list(rows[0]) == ["source_image", "target_image", "class", *extra]
        images_of[split] = set()
        for row in rows:
            name = VOC[int(row["class"]) - 1]
            assert name in TINY_CLASSES
            found = []
            for column in ("source_image", "target_image"):
                path = Path(row[column])
                images_of[split].add(path.name)
                with Image.open(root / "JPEGImages" / path.name) as image:
                    size = np.array(image.size)
                content = loadmat(root / "Annotations" / name / f"{path.stem}.mat")
                kps, box = content["kps"], content["bbox"][0]
                assert kps.shape == (len(OBJECT_CLASSES[name].keypoints), 2)
                there = ~np.isnan(kps).any(axis=1)
                assert (np.isnan(kps).all(axis=1) == ~there).all()
                assert (kps[there] >= 0).all()
                assert (kps[there] <= size - 1).all()
                assert (box[:2] <= box[2:]).all()
                assert (box[2:] < size).all()
                found.append(there)
            assert (found[0] & found[1]).sum() >= 3
        if split == "trn":
            assert {row["flip"] for row in rows} == {"0", "1"}
    assert not images_of["trn"] & images_of["val"]
    assert not images_of["test"] & (images_of["trn"] | images_of["val"])


def test_pfwillow_layout(tiny):
    root = tiny / "PF-WILLOW"
    rows = read_csv(root / "test_pairs.csv")
    assert len(rows) == 4
    axes = [f"{axis}{image}{i}" for image in "AB" for axis in "XY" for i in range(1, 11)]
    assert list(rows[0]) == ["imageA", "imageB", *axes]
    points_of = {}
    for row in rows:
        assert row["imageA"] != row["imageB"]
        assert row["imageA"].split("/")[1] == row["imageB"].split("/")[1]
        for image in "AB":
            first, folder, file = row[f"image{image}"].split("/")
            assert first == "PF-dataset"
            with Image.open(root / folder / file) as picture:
                assert picture.format == "PNG"
                size = np.array(picture.size)
            points = np.array(
                [[float(row[f"{axis}{image}{i}"]) for axis in "XY"] for i in range(1, 11)]
            )
            assert (points >= 0).all()
            assert (points <= size - 1).all()
            np.testing.assert_array_equal(points, points_of.setdefault((folder, file), points))


# reproducibility and safety


def test_two_runs_and_two_workers_write_the_same_bytes(tiny, tmp_path):
    make_synthetic(tmp_path, preset="tiny", workers=2)
    assert digests(tmp_path) == digests(tiny)


def test_another_seed_writes_other_images(tiny, tmp_path):
    make_synthetic(tmp_path, preset="tiny", seed=1)
    ours, theirs = digests(tmp_path), digests(tiny)
    images = [name for name in ours if name.endswith((".jpg", ".png"))]
    assert images
    assert all(ours[name] != theirs[name] for name in images)
    assert len({ours[name] for name in images}) == len(images)


def test_marker_and_repeated_call(tiny):
    folders = [tiny / name for name in ("SPair-71k", "PF-PASCAL", "PF-WILLOW")]
    for folder in folders:
        assert synthetic_marker(folder) == {
            "synthetic": True,
            "generator": "nemf-synthetic@1",
            "seed": 0,
            "preset": "tiny",
        }
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*.jpg")}
    assert make_synthetic(tiny, preset="tiny") == folders
    assert before == {path: path.stat().st_mtime_ns for path in tiny.rglob("*.jpg")}


def test_no_marker_is_none_and_a_malformed_one_is_an_error(tmp_path):
    assert synthetic_marker(tmp_path) is None
    assert synthetic_marker(tmp_path / "nowhere") is None
    file = tmp_path / "SYNTHETIC.json"
    for text in ("{", "[]", '{"synthetic": true}', "\udcff"):
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(NemfError, match=r"SYNTHETIC\.json"):
            synthetic_marker(tmp_path)
    file.write_text(json.dumps({"synthetic": False, "generator": "x", "seed": 0, "preset": "tiny"}))
    with pytest.raises(NemfError, match="synthetic: false"):
        synthetic_marker(tmp_path)


def test_real_data_is_never_overwritten(tmp_path):
    real = tmp_path / "PF-PASCAL" / "JPEGImages"
    real.mkdir(parents=True)
    (real / "2008_000001.jpg").write_bytes(b"real")
    with pytest.raises(NemfError, match=r"PF-PASCAL exists and is not synthetic"):
        make_synthetic(tmp_path, preset="tiny")
    assert (real / "2008_000001.jpg").read_bytes() == b"real"
    assert not (tmp_path / "SPair-71k").exists()


def test_another_seed_or_preset_in_the_way_is_refused(tiny):
    before = digests(tiny)
    with pytest.raises(NemfError, match=r"SPair-71k holds the synthetic data.*seed 0.*remove it"):
        make_synthetic(tiny, preset="tiny", seed=1)
    with pytest.raises(NemfError, match=r"preset 'tiny'"):
        make_synthetic(tiny, preset="table1")
    assert digests(tiny) == before


def test_leftovers_of_a_killed_run_are_removed(tiny, tmp_path):
    stale = tmp_path / ".PF-WILLOW.partial" / "car(S)"
    stale.mkdir(parents=True)
    (stale / "half.png").write_bytes(b"half")
    make_synthetic(tmp_path, preset="tiny")
    assert digests(tmp_path) == digests(tiny)


def test_a_killed_run_leaves_no_dataset_behind(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nemf.datasets.synthetic.take_photograph", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_synthetic(tmp_path, preset="tiny")
    assert not (tmp_path / "SPair-71k").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "unknown preset 'huge': choose one of table1, tiny"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1.5}, r"seed 1\.5"),
        ({"workers": 0}, "workers 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(NemfError, match=message):
        make_synthetic(tmp_path / "new", **{"preset": "tiny", **arguments})
    assert not (tmp_path / "new").exists()


def test_a_file_as_root_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NemfError, match="is not a folder"):
        make_synthetic(tmp_path / "file", preset="tiny")


def test_visibility_agrees_with_a_sharper_rendering():
    """Away from edges, a keypoint seen at low resolution is seen at three times of it."""
    subject = OBJECT_CLASSES["bus"]
    solid = subject.build(np.random.default_rng(2))
    points = np.array([solid.keypoints[name] for name in subject.keypoints])
    rotation, translation = look_at(
        np.array([0, 0, 1.5]), azimuth_deg=50, elevation_deg=15, roll_deg=0, distance=22
    )
    camera = Camera(rotation, translation, 350.0, (99.5, 69.5))
    found = []
    for factor in (1, 3):
        fine = camera.magnified(factor)
        picture = render(solid.mesh, fine, 200 * factor, 140 * factor, LIGHT)
        assert picture.depth.shape == (140 * factor * SUPERSAMPLE, 200 * factor * SUPERSAMPLE)
        found.append(visible(points, fine, picture.depth, 0.3).tolist())
    assert found[0] == found[1]
    seen = dict(zip(subject.keypoints, found[0], strict=True))
    assert seen["wheel_front_left"]
    assert seen["roof_front_right"]
    assert not seen["wheel_front_right"]
    assert not seen["bottom_rear_right"]
