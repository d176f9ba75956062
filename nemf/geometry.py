"""Frames of 2-D points and how to move between them. Torch-free; works on arrays and tensors.

Convention (all functions): points are (..., 2) in (x, y) order; pixel coordinates put the centre of
the top-left pixel at (0, 0); sizes are (height, width). Nothing is clamped or validated unless
said.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from nemf.pairs import Size

Points = TypeVar("Points")  # numpy array or torch tensor, (..., 2)


def to_norm(points_px: Points, size: Size) -> Points:
    """Pixels to normalised coordinates of an image of that size.

    Convention: -1 is the centre of the first pixel, +1 of the last (align_corners=True); an axis of
    a single pixel is treated as one pixel wide.
    """
    return points_px / _extent(points_px, size) * 2 - 1


def to_pixels(points_norm: Points, size: Size) -> Points:
    """Inverse of :func:`to_norm` (same convention)."""
    return (points_norm + 1) / 2 * _extent(points_norm, size)


def squash(points_px: Points, size: Size, frame: Size) -> Points:
    """Pixels of an image to pixels of the image resized to ``frame``, aspect ratio ignored.

    Convention: the field's: x * frame_width / width, without a half-pixel term, so pixel centres
    at integers shift by half a pixel relative to a true resize; each axis has its own factor.
    """
    return points_px * _like(points_px, (frame[1] / size[1], frame[0] / size[0]))


def unsquash(points_px: Points, size: Size, frame: Size) -> Points:
    """Inverse of :func:`squash`: from ``frame`` back to the original image of ``size``."""
    return points_px * _like(points_px, (size[1] / frame[1], size[0] / frame[0]))


def fit_ratio(size: Size, longest_px: int) -> float:
    """Factor that brings the longer side down to ``longest_px``; 1 for images that fit already."""
    longer = max(size)
    return longest_px / longer if longer > longest_px else 1.0


def snap_to_grid(points_px: np.ndarray, size: Size, grid: int) -> np.ndarray:
    """Each point moved to the centre of its cell in a grid x grid partition of the image.

    Convention: pixel i covers [i - 1/2, i + 1/2], so the image spans [-1/2, W - 1/2] and cell c of
    G has its centre at (c + 1/2) * W / G - 1/2; points outside go to the nearest border cell.
    float32 in, float32 out.
    """
    if grid < 1:
        raise ValueError(f"grid must be at least 1, not {grid}")
    extent = np.array([size[1], size[0]], np.float64)
    cell = np.clip(np.floor((points_px + 0.5) / extent * grid), 0, grid - 1)
    return ((cell + 0.5) * extent / grid - 0.5).astype(np.float32)


def _extent(points: Points, size: Size) -> Points:
    return _like(points, (max(size[1] - 1, 1), max(size[0] - 1, 1)))


def _like(points: Points, xy: tuple[float, float]) -> Points:
    """The pair (x, y) as an array or tensor that multiplies ``points``."""
    if isinstance(points, np.ndarray):
        return np.asarray(xy, points.dtype if points.dtype.kind == "f" else np.float64)
    return points.new_tensor(xy)
