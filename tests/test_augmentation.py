"""Training frames: where keypoints go, what stays the same, what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemf.augmentation import Augmentation, mirrored, training_frame

ALWAYS = Augmentation(colour=0.0, crop=1.0)


def dotted(kps: np.ndarray, height: int, width: int, radius: int = 6) -> np.ndarray:
    """A black picture with a white disc at every keypoint."""
    y, x = np.mgrid[:height, :width]
    away = np.hypot(x[..., None] - kps[:, 0], y[..., None] - kps[:, 1])
    disc = (away <= radius).any(-1)
    return np.repeat((disc * 255).astype(np.uint8)[..., None], 3, 2)


def test_a_plain_frame_maps_pixel_centres() -> None:
    """100 wide to 50: x = 10 has its centre at 10.5 of 100, so 5.25 of 50, which is pixel 4.75."""
    pixels = np.zeros((40, 100, 3), np.uint8)
    frame, kps = training_frame(
        pixels, np.array([[10.0, 30.0]]), None, 50, None, np.random.default_rng(0)
    )
    assert frame.shape == (50, 50, 3)
    assert frame.dtype == np.uint8
    assert kps.dtype == np.float32
    np.testing.assert_allclose(kps, [[4.75, 37.625]])


@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(60, 200),
    width=st.integers(60, 200),
    side=st.sampled_from([64, 128, 256]),
)
@settings(max_examples=40, deadline=None)
def test_keypoints_stay_on_what_they_mark(seed: int, height: int, width: int, side: int) -> None:
    """A disc around the keypoint, cropped and squashed, has its middle at the moved keypoint."""
    rng = np.random.default_rng(seed)
    kps = rng.uniform([15, 15], [width - 16, height - 16], (1, 2))
    bbox = np.array([*(kps[0] - 12), *(kps[0] + 12)])
    frame, moved = training_frame(dotted(kps, height, width), kps, bbox, side, ALWAYS, rng)
    weight = frame[..., 0].astype(float)
    y, x = np.mgrid[:side, :side]
    middle = [(weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()]
    scale = side / min(height, width)
    np.testing.assert_allclose(moved[0], middle, atol=0.35 * max(scale, 1) + 0.5)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_crop_keeps_the_box(seed: int) -> None:
    """Both corners of the box stay inside the frame, even one that leaves the image."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((80, 120, 3), np.uint8)
    x, y = np.sort(rng.uniform(0, 119, 2)), np.sort(rng.uniform(0, 79, 2))
    corners = np.array([[x[0], y[0]], [x[1], y[1]]])
    bbox = np.array([x[0], y[0], x[1], y[1]]) + rng.uniform(-3, 3, 4)
    inside = np.clip(corners, bbox[:2], bbox[2:])
    _, moved = training_frame(pixels, inside, bbox, 64, ALWAYS, rng)
    scale = 64 / np.array([120, 80])
    assert (np.diff(moved, axis=0) >= np.diff(inside, axis=0) * scale - 0.75).all()


def test_without_a_box_the_keypoints_extent_is_kept() -> None:
    kps = np.array([[20.0, 30.0], [100.0, 60.0]])
    for seed in range(20):
        _, moved = training_frame(
            np.zeros((80, 120, 3), np.uint8), kps, None, 240, ALWAYS, np.random.default_rng(seed)
        )
        assert (moved[1] - moved[0] >= (kps[1] - kps[0]) * [2, 3] - 1e-3).all()


def test_the_same_numbers_give_the_same_frame() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    kps, bbox = np.array([[30.0, 30.0]]), np.array([10.0, 10, 60, 50])
    change = Augmentation(colour=1.0, crop=0.5)
    frames = [
        training_frame(pixels, kps, bbox, 64, change, np.random.default_rng(s)) for s in (3, 3, 4)
    ]
    np.testing.assert_array_equal(frames[0][0], frames[1][0])
    assert (frames[0][0] != frames[2][0]).any()


def test_colours_change_and_places_do_not() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    kps = np.array([[30.0, 30.0]])
    plain, where = training_frame(pixels, kps, None, 64, None, np.random.default_rng(1))
    changed, also = training_frame(
        pixels, kps, None, 64, Augmentation(colour=1.0, crop=0.0), np.random.default_rng(1)
    )
    np.testing.assert_array_equal(where, also)
    assert np.abs(plain.astype(int) - changed).mean() > 5


def test_each_photometric_change_keeps_size_and_type() -> None:
    from PIL import Image

    from nemf import augmentation as module

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    for name in (
        "_grey",
        "_posterize",
        "_equalize",
        "_sharpen",
        "_brighten",
        "_solarize",
        "_jitter",
    ):
        changed = getattr(module, name)(picture, np.random.default_rng(2))
        assert (changed.size, changed.mode) == ((40, 30), "RGB"), name
        assert (np.asarray(changed) != np.asarray(picture)).any(), name


def test_photometric_changes_by_hand() -> None:
    from PIL import Image

    from nemf import augmentation as module

    flat = Image.new("RGB", (8, 8), (200, 100, 17))
    rng = np.random.default_rng(0)
    assert module._solarize(flat, rng).getpixel((4, 4)) == (55, 100, 17)  # from 128 on: 255 - v
    assert module._posterize(flat, rng).getpixel((4, 4)) == (192, 96, 16)  # four bits
    grey = module._grey(flat, rng).getpixel((4, 4))
    assert grey == (round(0.299 * 200 + 0.587 * 100 + 0.114 * 17),) * 3


def test_mirroring_by_hand() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    flipped, kps = mirrored(pixels, np.array([[0.0, 1.0], [2.0, 0.5]]))
    np.testing.assert_array_equal(flipped[0, 0], pixels[0, 2])
    np.testing.assert_array_equal(kps, [[2, 1], [0, 0.5]])


@pytest.mark.parametrize("side", [1, 7])
def test_keypoints_never_leave_the_frame(side: int) -> None:
    kps = np.array([[-0.5, -0.5], [119.5, 79.5]])
    _, moved = training_frame(
        np.zeros((80, 120, 3), np.uint8), kps, None, side, None, np.random.default_rng(0)
    )
    assert moved.min() >= 0
    assert moved.max() <= side - 1
