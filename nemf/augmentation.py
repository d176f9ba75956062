"""Training frames: an image squashed to a square, after the augmentations of CATs.

Photometric changes, then a random crop around the object (Cho et al., CATs, NeurIPS 2021, as its
code sets them: defaults of albumentations, each with probability 0.2). Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

_RESIZE = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Augmentation:
    """``colour``: probability of each photometric change; ``crop``: of a crop that keeps the box;
    ``mirror``: of mirroring both images of a pair (not in CATs; keypoints keep their names, so left
    and right then only say on which side of the picture something lies)."""

    colour: float = 0.2
    crop: float = 0.5
    mirror: float = 0.0


def training_frame(
    pixels: np.ndarray,
    kps_px: np.ndarray,
    bbox: np.ndarray | None,
    side_px: int,
    augmentation: Augmentation | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (S, S, 3) and the keypoints float32 (N, 2) px in it, clamped to 0 .. S - 1.

    ``pixels`` uint8 (H, W, 3) RGB; ``kps_px`` (N, 2); ``bbox`` (4,) xyxy px, the keypoints' extent
    where there is none. Without ``augmentation`` the whole image is squashed.

    Convention: pixel centres at integers before and after; the resize maps x to
    (x - left + 1/2) S / w - 1/2, as Pillow's does (bilinear; it smooths where it shrinks).
    """
    picture = Image.fromarray(pixels)
    box = (0, 0, picture.width, picture.height)
    if augmentation is not None:
        picture = _recoloured(picture, augmentation.colour, rng)
        if rng.uniform() < augmentation.crop:
            around = bbox
            if around is None:
                around = np.concatenate([kps_px.min(0), kps_px.max(0)])
            box = _crop_box(np.asarray(around, np.float64), picture.size, rng)
    frame = picture.resize((side_px, side_px), _RESIZE, box=box)
    scale = side_px / np.array([box[2] - box[0], box[3] - box[1]])
    moved = (kps_px - np.array(box[:2]) + 0.5) * scale - 0.5
    return np.asarray(frame), moved.clip(0, side_px - 1).astype(np.float32)


def mirrored(pixels: np.ndarray, kps_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and keypoints left-right mirrored: x becomes W - 1 - x."""
    flipped = np.stack([pixels.shape[1] - 1 - kps_px[:, 0], kps_px[:, 1]], 1)
    return np.ascontiguousarray(pixels[:, ::-1]), flipped.astype(np.float32)


def _crop_box(
    bbox: np.ndarray, size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box of whole pixels that holds ``bbox`` (cut to the image of (width, height))."""
    width, height = size
    x1, y1, x2, y2 = bbox
    low_x, low_y = int(np.clip(x1, 0, width - 1)), int(np.clip(y1, 0, height - 1))
    high_x = int(np.clip(np.ceil(x2), low_x + 1, width))
    high_y = int(np.clip(np.ceil(y2), low_y + 1, height))
    left, top = rng.integers(0, low_x + 1), rng.integers(0, low_y + 1)
    right, bottom = rng.integers(high_x, width + 1), rng.integers(high_y, height + 1)
    return int(left), int(top), int(right), int(bottom)


def _recoloured(picture: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    changes = (_grey, _posterize, _equalize, _sharpen, _brighten, _solarize, _jitter)
    for change in changes:
        if rng.uniform() < share:
            picture = change(picture, rng)
    return picture


def _grey(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.grayscale(picture).convert("RGB")


def _posterize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.posterize(picture, 4)


def _equalize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.equalize(picture)


def _sharpen(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    strength, lightness = rng.uniform(0.2, 0.5), rng.uniform(0.5, 1.0)
    kernel = np.full((3, 3), -strength)
    kernel[1, 1] = 1 - strength + strength * (8 + lightness)
    return picture.filter(ImageFilter.Kernel((3, 3), kernel.ravel().tolist(), scale=1))


def _brighten(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    contrast, brightness = 1 + rng.uniform(-0.2, 0.2), 255 * rng.uniform(-0.2, 0.2)
    return picture.point(
        [round(min(max(v * contrast + brightness, 0), 255)) for v in range(256)] * 3
    )


def _solarize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.solarize(picture, 128)


def _jitter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, in random order."""
    factors = rng.uniform(0.8, 1.2, 3)
    turn = rng.uniform(-0.2, 0.2)
    for which in rng.permutation(4):
        if which == 3:
            hue, *others = picture.convert("HSV").split()
            hue = hue.point([(v + round(turn * 256)) % 256 for v in range(256)])
            picture = Image.merge("HSV", (hue, *others)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
            picture = enhance(picture).enhance(factors[which])
    return picture
