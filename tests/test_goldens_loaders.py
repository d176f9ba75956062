"""The readers, oriented and scored as the papers do, against the authors' own data loaders.

The golden items follow the order of the test lists of ``fake_datasets``. The official loaders pad
keypoints with -1 to 40 and count the real ones in ``n_pts``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from nemf.datasets import dataset_class
from nemf.datasets.index import PairDataset
from nemf.pairs import Image, ImageRecord, OrientedPair, Pair
from nemf.scoring import Protocol, get_protocol, lengths_px

pytestmark = pytest.mark.real
NAMES = ["spair", "pfpascal", "pfwillow"]
FLAG_KEYS = {"viewpoint": "vpvar", "scale": "scvar", "truncation": "trncn", "occlusion": "occln"}
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
WILLOW_CLASSES = [  # all ten: the fake tree holds only three of them
    *("car(G)", "car(M)", "car(S)", "duck(S)", "motorbike(G)", "motorbike(M)", "motorbike(S)"),
    *("winebottle(M)", "winebottle(wC)", "winebottle(woC)"),
]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dataset(name: str, shared: Path) -> PairDataset:
    root = shared / "goldens" / "fake_datasets"
    return dataset_class(name)(root, "test", outside="keep")


@pytest.fixture
def nemf_items(name: str, shared: Path) -> list[dict[str, Any]]:
    return json.loads((shared / "goldens" / "loaders_nemf.json").read_text())[name]


@pytest.fixture
def cats_items(name: str, shared: Path) -> list[dict[str, Any]]:
    return json.loads((shared / "goldens" / "loaders_cats.json").read_text())[name]


def base_name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def length_px(pair: Pair, protocol: Protocol, layout: str) -> np.float32:
    """The one length that alpha multiplies in this pair."""
    oriented = pair.oriented(protocol.plan.for_layout(layout))
    n = len(pair.kp_names)
    size = oriented.reference.size
    heights, widths = np.full(n, size[0]), np.full(n, size[1])
    box = oriented.reference_bbox
    lengths = lengths_px(
        protocol.bases[layout],
        factors=protocol.frame.factors(heights, widths),
        heights=heights,
        widths=widths,
        bbox=np.tile(np.full(4, np.nan) if box is None else box, (n, 1)),
        true=oriented.reference_kps,
        pair=np.zeros(n, int),
    )
    assert lengths.dtype == np.float32
    assert len(set(lengths.tolist())) == 1
    return lengths[0]


def squashed(points: np.ndarray, record: ImageRecord) -> np.ndarray:
    protocol = get_protocol("cats-paper@1")
    return points * protocol.frame.factors(*(np.array([side]) for side in record.size))


def float32(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32)


def test_one_item_per_pair(
    dataset: PairDataset, nemf_items: list[dict[str, Any]], cats_items: list[dict[str, Any]]
) -> None:
    for items in (nemf_items, cats_items):
        assert len(items) == len(dataset)
        for pair, item in zip(dataset, items, strict=True):
            assert base_name(pair.src.name) == base_name(item["src_imname"])
            assert base_name(pair.trg.name) == base_name(item["trg_imname"])
            assert len(pair.kp_names) == item["n_pts"]


def test_categories(
    dataset: PairDataset, name: str, nemf_items: list[dict[str, Any]], cats_items: list[dict]
) -> None:
    if name == "spair":
        classes = sorted(p.name for p in (dataset.folder / "JPEGImages").iterdir())
    elif name == "pfpascal":
        from nemf.datasets.pfpascal import VOC_CLASSES

        classes = sorted(VOC_CLASSES)
    else:
        classes = WILLOW_CLASSES
    for pair, ours, theirs in zip(dataset, nemf_items, cats_items, strict=True):
        for item in (ours, theirs):
            assert pair.category == item["category"]
            assert classes.index(pair.category) == item["category_id"]


def test_flags(dataset: PairDataset, nemf_items: list[dict[str, Any]], name: str) -> None:
    for pair, item in zip(dataset, nemf_items, strict=True):
        for flag, key in FLAG_KEYS.items():
            assert pair.flags[flag] == (item[key] if name == "spair" else -1)


def test_nemf_original_pixels(
    dataset: PairDataset, name: str, nemf_items: list[dict[str, Any]]
) -> None:
    """Sizes, keypoints (targets clamped into the padded image, as the official read-out does),
    boxes and thresholds, exactly in float32."""
    protocol = get_protocol("nemf-paper@1")
    for pair, item in zip(dataset, nemf_items, strict=True):
        oriented = pair.oriented(protocol.plan.for_layout(dataset.layout))
        assert list(oriented.reference.size) == item["src_imsize_ori"]
        assert list(oriented.query.size) == item["trg_imsize_ori"]
        n = item["n_pts"]
        src_kps, trg_kps = float32(item["src_kps"]), float32(item["trg_kps"])
        assert (src_kps[n:] == -1).all()
        height, width = oriented.canvases[0]
        clamped = np.clip(oriented.query_kps, 0, float32([width - 1, height - 1]))
        assert np.array_equal(oriented.reference_kps, src_kps[:n])
        assert np.array_equal(clamped, trg_kps[:n])
        if name == "pfwillow":
            assert pair.src_bbox is None
        else:
            assert np.array_equal(pair.src_bbox, float32(item["src_bbox"]))
            assert np.array_equal(pair.trg_bbox, float32(item["trg_bbox"]))
        assert length_px(pair, protocol, dataset.layout) == float32(item["pckthres"])


def test_cats_squashed_pixels(
    dataset: PairDataset, name: str, cats_items: list[dict[str, Any]]
) -> None:
    protocol = get_protocol("cats-paper@1")
    for pair, item in zip(dataset, cats_items, strict=True):
        assert list(pair.src.size) == item["src_imsize"][::-1]
        assert list(pair.trg.size) == item["trg_imsize"][::-1]
        n = item["n_pts"]
        for record, kps, key in (
            (pair.src, pair.src_kps, "src_kps"),
            (pair.trg, pair.trg_kps, "trg_kps"),
        ):
            golden = float32(item[key]).T
            assert (golden[n:] == -1).all()
            assert np.array_equal(squashed(kps, record), golden[:n])
        if name != "pfwillow":
            for record, box, key in (
                (pair.src, pair.src_bbox, "src_bbox"),
                (pair.trg, pair.trg_bbox, "trg_bbox"),
            ):
                corners = squashed(box.reshape(2, 2), record).ravel()
                # PF-PASCAL's official boxes are float64, so ours may be a float32 step away
                steps = 1 if name == "pfpascal" else 0
                np.testing.assert_array_max_ulp(corners, float32(item[key]), steps)
        assert length_px(pair, protocol, dataset.layout) == float32(item["pckthres"])


def normalised(oriented: OrientedPair, dataset: PairDataset, side: str) -> np.ndarray:
    """float32 (3, Hc, Wc): the reference ("src") or query image on its canvas."""
    canvases = dict(zip(("trg", "src"), oriented.canvases, strict=True))
    record = oriented.reference if side == "src" else oriented.query
    image = Image(dataset.pixels(record), record.hash, canvases[side])
    return ((float32(image.on_canvas()) / 255 - MEAN) / STD).transpose(2, 0, 1)


def test_nemf_image_pixels(
    dataset: PairDataset, name: str, nemf_items: list[dict[str, Any]], shared: Path
) -> None:
    """Decoding, padding and normalisation at 256 sampled places and over the whole image.

    PNG must agree up to float rounding; JPEG decoders may differ by one grey level.
    """
    samples = np.load(shared / "goldens" / "loaders_nemf.npz")
    plan = get_protocol("nemf-paper@1").plan.for_layout(dataset.layout)
    grey_level = 0.0 if name == "pfwillow" else float(1 / 255 / STD.min())
    padded = 0
    for i, (pair, item) in enumerate(zip(dataset, nemf_items, strict=True)):
        oriented = pair.oriented(plan)
        for side in ("src", "trg"):
            image = normalised(oriented, dataset, side)
            golden = item[f"{side}_img"]
            assert list(image.shape) == golden["shape"]
            at = samples[f"{name}_{i}_{side}_img_idx"]
            values = samples[f"{name}_{i}_{side}_img_val"]
            assert np.abs(image.ravel()[at] - values).max() <= grey_level + 1e-6
            for channel in range(3):
                values = image[channel].astype(np.float64)
                near = grey_level / 10 + 1e-9
                assert values.mean() == pytest.approx(golden["mean"][channel], abs=near)
                assert values.std(ddof=1) == pytest.approx(golden["std"][channel], abs=near)
            record = oriented.reference if side == "src" else oriented.query
            padded += image.shape[1:] != record.size
            zero = (-MEAN / STD)[:, None]
            outside = np.ones(image.shape[1:], bool)
            outside[: record.size[0], : record.size[1]] = False
            assert (image[:, outside] == zero).all()
    assert (padded > 0) == (name != "spair")


def test_cats_image_pixels(dataset: PairDataset, name: str, shared: Path) -> None:
    """The same decoded images, squashed to 256x256 by PIL first, as CATs is fed."""
    samples = np.load(shared / "goldens" / "loaders_cats.npz")
    for i, pair in enumerate(dataset):
        for side, record in (("src", pair.src), ("trg", pair.trg)):
            resize = PILImage.fromarray(dataset.pixels(record)).resize
            pixels = float32(resize((256, 256), PILImage.Resampling.BILINEAR))
            image = ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1).ravel()
            at = samples[f"{name}_{i}_{side}_img_idx"]
            values = samples[f"{name}_{i}_{side}_img_val"]
            grey_level = 0.0 if name == "pfwillow" else float(1 / 255 / STD.min())
            assert np.abs(image[at] - values).max() <= grey_level + 1e-6
