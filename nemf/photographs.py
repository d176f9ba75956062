"""A user's own photographs: read upright, as every viewer shows them.

Phones store a photograph as the sensor lay and note in EXIF how to turn it. Datasets refer to the
stored pixels and never turn them; for one's own photographs that would be wrong: the points that
somebody reads off in a viewer are those of the upright image, and matchers expect upright objects.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from nemf.datasets.index import HEIC_REFUSED, decode_image, image_header
from nemf.errors import NemfError
from nemf.files import write_whole

# What each EXIF orientation says must be done with the stored pixels (H, W, 3).
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}


def orientation(path: Path) -> int:
    """The EXIF orientation of a photograph, 1 where it is stored upright. NemfError if it is none
    or cannot be read."""
    if path.suffix.lower() in (".heic", ".heif"):
        raise NemfError(f"{path}: {HEIC_REFUSED}")
    found = image_header(path)[1]
    return found if found in _TURNS else 1


def upright_size(path: Path) -> tuple[int, int]:
    """(height, width) of the photograph as it is shown. NemfError as :func:`orientation`."""
    (height, width), found = image_header(path)[0], orientation(path)
    return (width, height) if found >= 5 else (height, width)


def upright_pixels(path: Path) -> np.ndarray:
    """uint8 RGB (H, W, 3), turned as EXIF says. NemfError if it cannot be read."""
    found = orientation(path)
    pixels = decode_image(path)
    return np.ascontiguousarray(_TURNS[found](pixels)) if found != 1 else pixels


def write_upright(path: Path, copy: Path) -> None:
    """Writes an upright copy of a photograph, as PNG (nothing is lost) or as JPEG, by the ending of
    ``copy``. NemfError if it cannot be read or written."""
    image = PIL.Image.fromarray(upright_pixels(path))
    jpeg = copy.suffix.lower() in (".jpg", ".jpeg")
    how = {"format": "JPEG", "quality": 95, "subsampling": 0} if jpeg else {"format": "PNG"}
    write_whole(copy, lambda temporary: image.save(temporary, **how))
