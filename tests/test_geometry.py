"""Frames of points: hand-computed values, round trips, arrays and tensors alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nemf.geometry import fit_ratio, snap_to_grid, squash, to_norm, to_pixels, unsquash

sizes = st.tuples(st.integers(2, 900), st.integers(2, 900))  # height, width
coordinates = st.floats(-2000, 2000, width=32)
points = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, 2), elements=coordinates))


def test_to_norm_by_hand() -> None:
    """A 5x9 image (height, width): its corners are the corners of the square, its middle is 0."""
    pixels = np.float32([[0, 0], [8, 4], [4, 2], [2, 1], [-4, 8]])
    expected = np.float32([[-1, -1], [1, 1], [0, 0], [-0.5, -0.5], [-2, 3]])
    ours = to_norm(pixels, (5, 9))
    assert ours.dtype == np.float32
    assert np.array_equal(ours, expected)


def test_to_norm_of_a_single_pixel_axis() -> None:
    assert np.array_equal(to_norm(np.array([[0.0, 0.0]]), (1, 3)), [[-1.0, -1.0]])
    assert np.array_equal(to_pixels(np.array([[-1.0, -1.0]]), (1, 1)), [[0.0, 0.0]])


@given(points, sizes)
def test_norm_round_trip(pixels: np.ndarray, size: tuple[int, int]) -> None:
    np.testing.assert_allclose(to_pixels(to_norm(pixels, size), size), pixels, atol=1e-8)


def test_squash_by_hand() -> None:
    """A 50x200 image squashed to 100x100: x halves, y doubles, no half-pixel term."""
    pixels = np.float32([[0, 0], [200, 50], [10, 10]])
    expected = np.float32([[0, 0], [100, 100], [5, 20]])
    assert np.array_equal(squash(pixels, (50, 200), (100, 100)), expected)
    assert np.array_equal(unsquash(expected, (50, 200), (100, 100)), pixels)


@given(points, sizes, sizes)
def test_squash_round_trip(
    pixels: np.ndarray, size: tuple[int, int], frame: tuple[int, int]
) -> None:
    back = unsquash(squash(pixels, size, frame), size, frame)
    np.testing.assert_allclose(back, pixels, rtol=1e-12, atol=1e-9)


@given(points, sizes)
def test_squash_to_its_own_size_is_identity(pixels: np.ndarray, size: tuple[int, int]) -> None:
    assert np.array_equal(squash(pixels, size, size), pixels)


def test_inputs_stay_as_they_are() -> None:
    pixels = np.float32([[3, 4]])
    for function in (to_norm, to_pixels):
        function(pixels, (10, 20))
    squash(pixels, (10, 20), (5, 5))
    snap_to_grid(pixels, (10, 20), 4)
    assert np.array_equal(pixels, np.float32([[3, 4]]))


def test_integer_points_are_not_truncated() -> None:
    pixels = np.array([[1, 1]])
    np.testing.assert_allclose(squash(pixels, (3, 3), (4, 4)), [[4 / 3, 4 / 3]])


def test_tensors_agree_with_arrays() -> None:
    torch = pytest.importorskip("torch")
    pixels = np.float32([[1.5, 2.25], [30, 7], [-4, 99]])
    tensor = torch.from_numpy(pixels)
    for function in (to_norm, to_pixels):
        ours = function(tensor, (31, 47))
        assert ours.dtype == torch.float32
        np.testing.assert_array_equal(ours.numpy(), function(pixels, (31, 47)))
    for function in (squash, unsquash):
        ours = function(tensor, (31, 47), (64, 16))
        np.testing.assert_array_equal(ours.numpy(), function(pixels, (31, 47), (64, 16)))


@pytest.mark.parametrize(
    ("size", "longest_px", "ratio"),
    [
        ((300, 200), 300, 1.0),
        ((299, 20), 300, 1.0),
        ((200, 600), 300, 0.5),
        ((400, 100), 100, 0.25),
    ],
)
def test_fit_ratio(size: tuple[int, int], longest_px: int, ratio: float) -> None:
    assert fit_ratio(size, longest_px) == ratio


def test_snap_to_grid_by_hand() -> None:
    """8x4 image (height, width), 4x4 cells: cells are 1 px wide and 2 px high, so their centres
    are at x = 0, 1, 2, 3 and y = 0.5, 2.5, 4.5, 6.5."""
    given_px = np.float32([[0, 0], [0.4, 1.4], [0.6, 1.6], [3.4, 7.4], [-9, 99], [2, 4]])
    expected = np.float32([[0, 0.5], [0, 0.5], [1, 2.5], [3, 6.5], [0, 6.5], [2, 4.5]])
    ours = snap_to_grid(given_px, (8, 4), 4)
    assert ours.dtype == np.float32
    assert np.array_equal(ours, expected)


def test_snap_to_one_cell_is_the_centre() -> None:
    assert np.array_equal(snap_to_grid(np.float32([[9, 1]]), (5, 11), 1), np.float32([[5, 2]]))


@given(st.integers(1, 40), points)
def test_grid_of_pixels_is_rounding(grid: int, pixels: np.ndarray) -> None:
    """With one cell per pixel a point goes to the nearest pixel centre of the image."""
    expected = np.clip(np.floor(pixels + 0.5), 0, grid - 1)
    assert np.array_equal(snap_to_grid(pixels, (grid, grid), grid), expected.astype(np.float32))


@given(points, sizes, st.integers(1, 64))
def test_snapping(pixels: np.ndarray, size: tuple[int, int], grid: int) -> None:
    """Snapping twice changes nothing, and no point inside moves more than half a cell."""
    once = snap_to_grid(pixels, size, grid)
    np.testing.assert_array_equal(snap_to_grid(once, size, grid), once)
    extent = np.array([size[1], size[0]])
    inside = ((pixels >= -0.5) & (pixels < extent - 0.5)).all(1)
    moved = np.abs(once - pixels)[inside]
    assert (moved <= extent / grid / 2 + 1e-4).all()


def test_grid_must_have_a_cell() -> None:
    with pytest.raises(ValueError, match="grid must be at least 1, not 0"):
        snap_to_grid(np.zeros((1, 2)), (4, 4), 0)
