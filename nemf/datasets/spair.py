"""SPair-71k (Min et al., arXiv 1908.10543) and other datasets in its layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nemf.datasets.index import PairDataset, RawImage, RawPair, inside
from nemf.errors import NemfError
from nemf.pairs import FLAGS
from nemf.reading import read_json, read_within

_SPLIT_FILES = {"trn": ("trn", "train"), "val": ("val",), "test": ("test",)}
_FLAG_FIELDS = dict(zip(FLAGS, ("viewpoint_variation", "scale_variation", *FLAGS[2:]), strict=True))


class SPair71k(PairDataset):
    """SPair-71k in its official layout (70,958 pairs of 1,800 photographs, 18 classes).

    ``Layout/<size>/<split>.txt`` lists the pairs, ``PairAnnotation/<split>/<line>.json`` holds
    their keypoints and boxes, ``JPEGImages/<class>/`` the images; ``ImageAnnotation/`` (optional)
    adds the keypoints that only one image of a pair shows. ``size``: "large" (all pairs) or
    "small". Boxes are x1, y1, x2, y2 in pixels.
    """

    name = "spair"
    title = "SPair-71k"
    layout = "spair"
    folders = ("SPair-71k", "SPair71k", "SPair-71K", "spair-71k")
    official: ClassVar[dict[str, int]] = {"trn": 53340, "val": 5384, "test": 12234}
    annotated_flags: ClassVar[tuple[str, ...]] = FLAGS
    size = "large"

    def __init__(
        self, root: Any, split: str = "test", *, size: str = "large", **options: Any
    ) -> None:
        if size not in ("large", "small"):
            raise NemfError(f"size must be 'large' or 'small', not {size!r}")
        self.size = size
        super().__init__(root, split, **options)

    def options(self) -> dict[str, Any]:
        return {"size": self.size}

    def sources(self) -> list[Path]:
        annotation = self._annotation_folder()
        return [
            self.list_file(),
            annotation,
            self.folder / "ImageAnnotation",
            self.folder / "JPEGImages",
        ]

    def entries(self) -> list[str]:
        try:
            lines = read_within(self.list_file()).decode("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as problem:
            raise NemfError(f"{self.list_file()}: cannot be read as text ({problem})") from None
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise NemfError(f"{self.list_file()}: lists no pair")
        return lines

    def read(self, line: str, images: dict[str, RawImage]) -> RawPair:
        file = inside(self._annotation_folder(), f"{line}.json", str(self.list_file()))
        if not file.exists():  # file systems that forbid ':' hold the same files with '_'
            other = file.with_name(_without_colon(file.name))
            file = other if other.exists() else file
        fields = read_json_object(file)
        category = json_text(file, fields, "category")
        names = {}
        for side in ("src", "trg"):
            stem = json_text(file, fields, f"{side}_imname")
            names[side] = f"{category}/{stem}"
            if names[side] not in images:
                path = inside(self.folder / "JPEGImages", names[side], str(file))
                images[names[side]] = self._image(names[side], path)
        kps = {side: json_points(file, fields, f"{side}_kps") for side in ("src", "trg")}
        return RawPair(
            id=line,
            category=category,
            src=names["src"],
            trg=names["trg"],
            src_kps=kps["src"],
            trg_kps=kps["trg"],
            kp_names=json_names(file, fields, "kps_ids", len(kps["src"])),
            origin=str(file),
            src_bbox=json_box(file, fields, "src_bndbox"),
            trg_bbox=json_box(file, fields, "trg_bndbox"),
            src_size=_claimed_size(file, fields, "src_imsize"),
            trg_size=_claimed_size(file, fields, "trg_imsize"),
            flags={f: _flag(file, fields, _FLAG_FIELDS[f]) for f in self.annotated_flags},
        )

    def _image(self, name: str, path: Path) -> RawImage:
        own = f"{name.rpartition('.')[0] or name}.json"
        file = inside(self.folder / "ImageAnnotation", own, str(path))
        if not file.exists():
            return RawImage(name, path)
        kps = json_field(file, read_json_object(file), "kps")
        wrong = f"{file}: 'kps' must map keypoint ids to [x, y] or null"
        if not isinstance(kps, dict):
            raise NemfError(wrong)
        try:
            points = _points([p if p is None else p[:2] for p in kps.values()])
        except (TypeError, ValueError, KeyError, OverflowError):
            raise NemfError(wrong) from None
        return RawImage(name, path, points, tuple(kps))

    def unlisted(self) -> list[Path]:
        listed = {f"{line}.json" for line in self.entries()}
        listed |= {_without_colon(name) for name in listed}
        files = sorted(self._annotation_folder().glob("*.json"))
        return [file for file in files if file.name not in listed]

    def list_file(self) -> Path:
        folder = self.folder / "Layout" / self.size
        for stem in _SPLIT_FILES[self.split]:
            if (folder / f"{stem}.txt").is_file():
                return folder / f"{stem}.txt"
        raise NemfError(f"{folder / (self.split + '.txt')}: the list of the split is missing")

    def _annotation_folder(self) -> Path:
        for stem in _SPLIT_FILES[self.split]:
            if (self.folder / "PairAnnotation" / stem).is_dir():
                return self.folder / "PairAnnotation" / stem
        raise NemfError(f"{self.folder / 'PairAnnotation' / self.split}: the folder is missing")


class AnimalPose(SPair71k):
    """Animal-Pose (Cao et al., ICCV 2019) made into pairs in SPair-71k's layout.

    Not SPair-71k: five animal classes; of the difficulty flags only scale is annotated (the files
    hold 0 for the others).
    """

    name = "animalpose"
    title = "AnimalPose"
    folders = ("AnimalPose",)
    official: ClassVar[dict[str, int]] = {}
    annotated_flags = ("scale",)


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; NemfError naming it if missing, unreadable or something else."""
    fields = read_json(file, missing="the annotation is missing")
    if not isinstance(fields, dict):
        raise NemfError(f"{file}: holds {type(fields).__name__}, expected a JSON object")
    return fields


def json_field(file: Path, fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise NemfError(f"{file}: the field {key!r} is missing")
    return fields[key]


def json_text(file: Path, fields: dict[str, Any], key: str) -> str:
    """A name. NemfError for anything but a text that a file system and a table can hold."""
    text = json_field(file, fields, key)
    if not isinstance(text, str) or not text or not _is_unicode(text):
        raise NemfError(f"{file}: {key!r} must be a text, not {text!r}")
    return text


def json_points(file: Path, fields: dict[str, Any], key: str) -> np.ndarray:
    """float32 (N, 2); null coordinates or points become NaN."""
    points = json_field(file, fields, key)
    try:
        return _points(points)
    except (TypeError, ValueError, OverflowError):
        raise NemfError(f"{file}: {key!r} must be a list of [x, y]") from None


def _points(points: Any) -> np.ndarray:
    """float32 (N, 2) from lists of two numbers. TypeError, ValueError or OverflowError if they are
    not that, or numbers that float32 cannot hold."""
    rows = [(math.nan, math.nan) if p is None else tuple(map(_coordinate, p)) for p in points]
    if not isinstance(points, list) or any(len(row) != 2 for row in rows):
        raise ValueError
    array = np.asarray(rows, np.float64).reshape(len(rows), 2)
    if (np.abs(array[np.isfinite(array)]) > np.finfo(np.float32).max).any():
        raise OverflowError
    return array.astype(np.float32)


def _coordinate(value: Any) -> float:
    """A JSON number (true and "1" are none), NaN for null."""
    return math.nan if value is None else json_number(value)


def json_number(value: Any) -> float:
    """A number of a JSON file; TypeError for anything else, be it true or a text."""
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def json_box(file: Path, fields: dict[str, Any], key: str) -> tuple[float, ...]:
    box = json_field(file, fields, key)
    try:
        x1, y1, x2, y2 = map(json_number, box)
    except (TypeError, ValueError, OverflowError):
        raise NemfError(f"{file}: {key!r} must be [x1, y1, x2, y2], not {box!r}") from None
    return x1, y1, x2, y2


def json_names(file: Path, fields: dict[str, Any], key: str, n: int) -> tuple[str, ...]:
    """The names of keypoints, their positions 0..n-1 where the field is absent or empty."""
    names = fields.get(key) or list(range(n))
    if not isinstance(names, list) or not all(_is_name(name) for name in names):
        raise NemfError(f"{file}: {key!r} must be a list of names, not {names!r}")
    return tuple(str(name) for name in names)


def _is_name(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and _is_unicode(value))


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _without_colon(name: str) -> str:
    return name.replace(":", "_")


def _claimed_size(file: Path, fields: dict[str, Any], key: str) -> tuple[int, int] | None:
    """(height, width) from the annotation's [width, height, channels], None where absent."""
    size = fields.get(key)
    if size is None:
        return None
    if not isinstance(size, list) or len(size) < 2 or any(type(v) is not int for v in size[:2]):
        raise NemfError(f"{file}: {key!r} must be [width, height, ...], not {size!r}")
    return size[1], size[0]


def _flag(file: Path, fields: dict[str, Any], key: str) -> int:
    value = fields.get(key, -1)
    if type(value) is not int or not -1 <= value <= 3:  # true is no number here
        raise NemfError(f"{file}: {key!r} must be an integer 0..3, not {value!r}")
    return value
