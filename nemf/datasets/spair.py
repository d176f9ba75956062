"""SPair-71k (Min et al., arXiv 1908.10543) and other datasets in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nemf.datasets.index import PairDataset, RawImage, RawPair, inside
from nemf.errors import NemfError
from nemf.pairs import FLAGS

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
            lines = self.list_file().read_text(encoding="utf-8").split("\n")
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
        category = str(json_field(file, fields, "category"))
        names = {}
        for side in ("src", "trg"):
            stem = str(json_field(file, fields, f"{side}_imname"))
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
        file = (self.folder / "ImageAnnotation" / name).with_suffix(".json")
        if not file.exists():
            return RawImage(name, path)
        kps = json_field(file, read_json_object(file), "kps")
        if not isinstance(kps, dict):
            raise NemfError(f"{file}: 'kps' must map keypoint ids to [x, y] or null")
        absent = [float("nan")] * 2
        try:
            points = np.asarray([absent if p is None else p[:2] for p in kps.values()], np.float32)
            points = points.reshape(len(kps), 2)
        except (TypeError, ValueError, KeyError, OverflowError):
            raise NemfError(f"{file}: 'kps' must map keypoint ids to [x, y] or null") from None
        return RawImage(name, path, points, tuple(str(k) for k in kps))

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
    try:
        fields = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise NemfError(f"{file}: the annotation is missing") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise NemfError(f"{file}: cannot be read as JSON ({problem})") from None
    if not isinstance(fields, dict):
        raise NemfError(f"{file}: holds {type(fields).__name__}, expected a JSON object")
    return fields


def json_field(file: Path, fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise NemfError(f"{file}: the field {key!r} is missing")
    return fields[key]


def json_points(file: Path, fields: dict[str, Any], key: str) -> np.ndarray:
    """float32 (N, 2); null coordinates or points become NaN."""
    points = json_field(file, fields, key)
    try:
        rows = [
            [np.nan, np.nan] if p is None else [np.nan if v is None else v for v in p]
            for p in points
        ]
        array = np.asarray(rows, np.float32).reshape(len(rows), 2)
    except (TypeError, ValueError, OverflowError):
        raise NemfError(f"{file}: {key!r} must be a list of [x, y]") from None
    return array


def json_box(file: Path, fields: dict[str, Any], key: str) -> tuple[float, ...]:
    box = json_field(file, fields, key)
    try:
        x1, y1, x2, y2 = (float(v) for v in box)
    except (TypeError, ValueError, OverflowError):
        raise NemfError(f"{file}: {key!r} must be [x1, y1, x2, y2], not {box!r}") from None
    return x1, y1, x2, y2


def json_names(file: Path, fields: dict[str, Any], key: str, n: int) -> tuple[str, ...]:
    """The names of keypoints, their positions 0..n-1 where the field is absent or empty."""
    names = fields.get(key) or list(range(n))
    if not isinstance(names, list):
        raise NemfError(f"{file}: {key!r} must be a list of names, not {names!r}")
    return tuple(str(name) for name in names)


def _without_colon(name: str) -> str:
    return name.replace(":", "_")


def _claimed_size(file: Path, fields: dict[str, Any], key: str) -> tuple[int, int] | None:
    """(height, width) from the annotation's [width, height, channels], None where absent."""
    size = fields.get(key)
    if size is None:
        return None
    try:
        return int(size[1]), int(size[0])
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        raise NemfError(f"{file}: {key!r} must be [width, height, ...], not {size!r}") from None


def _flag(file: Path, fields: dict[str, Any], key: str) -> int:
    value = fields.get(key, -1)
    if type(value) is not int or not -1 <= value <= 3:  # true is no number here
        raise NemfError(f"{file}: {key!r} must be an integer 0..3, not {value!r}")
    return value
