"""PF-PASCAL (Ham et al., TPAMI 2017) with the pair lists of SCNet/NC-Net."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nemf.datasets.index import PairDataset, RawImage, RawPair, image_header, inside
from nemf.datasets.matfile import read_mat
from nemf.errors import NemfError
from nemf.reading import read_within

if TYPE_CHECKING:
    import pandas as pd

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
_SPLIT_FILES = {"trn": ("trn", "train"), "val": ("val",), "test": ("test",)}
_COORDINATES = ("XA", "YA", "XB", "YB")


class PFPascal(PairDataset):
    """PF-PASCAL: ``<split>_pairs.csv`` (two image paths, class 1..20 in VOC order, flip), images
    in ``JPEGImages/``, keypoints in ``Annotations/<class>/<stem>.mat`` (``kps`` N x 2 with NaN for
    absent ones, ``bbox`` xyxy).

    Both layouts in circulation are read: everything directly in the folder, or images and
    annotations below ``PF-dataset-PASCAL/``. Without MAT files the keypoints come from the list's
    columns XA, YA, XB, YB (numbers separated by semicolons). Rows with flip = 1 (training list)
    yield the mirrored pair: x becomes W - 1 - x.
    """

    name = "pfpascal"
    title = "PF-PASCAL"
    layout = "pfpascal"
    folders = ("PF-PASCAL", "pf-pascal", "PF_PASCAL", "pfpascal")
    official: ClassVar[dict[str, int]] = {"trn": 2940, "val": 308, "test": 299}

    def sources(self) -> list[Path]:
        return [
            self.list_file(),
            *(base / name for base in self._bases() for name in ("Annotations", "JPEGImages")),
        ]

    def entries(self) -> list[tuple[int, dict[str, Any]]]:
        table = read_pair_list(self.list_file(), min_columns=3)
        return list(enumerate(table.to_dict("records")))

    def read(self, entry: tuple[int, dict[str, Any]], images: dict[str, RawImage]) -> RawPair:
        row, cells = entry
        origin = f"{self.list_file()} row {row + 2}"
        values = list(cells.values())
        category = self._category(values[2], origin)
        mirrored = self._flip(cells, origin)
        stems, kps, boxes, names = [], [], [], []
        for side, cell in enumerate(values[:2]):
            file_name = Path(str(cell)).name
            path = self._image_path(file_name, origin)
            points, box = self._annotation(category, path.stem, cells, side, origin)
            labels = tuple(str(k) for k in range(len(points)))
            if mirrored:
                right = image_header(path)[0][1] - 1
                points = points * np.float32([-1, 1]) + np.float32([right, 0])
                if box is not None:
                    box = (right - box[2], box[1], right - box[0], box[3])
            name = f"{file_name}#mirrored" if mirrored else file_name
            has_own = not {"XA", "XB"} <= cells.keys() or self._mat(category, path.stem)
            annotated = (points, labels) if has_own else (np.zeros((0, 2), np.float32), ())
            images.setdefault(name, RawImage(name, path, *annotated, mirrored))
            stems.append(path.stem)
            kps.append(points)
            boxes.append(box)
            names.append(name)
        return RawPair(
            id=f"{row:06d}-{stems[0]}-{stems[1]}:{category}",
            category=category,
            src=names[0],
            trg=names[1],
            src_kps=kps[0],
            trg_kps=kps[1],
            kp_names=tuple(str(k) for k in range(len(kps[0]))),
            origin=origin,
            src_bbox=boxes[0],
            trg_bbox=boxes[1],
        )

    def _annotation(
        self, category: str, stem: str, cells: dict, side: int, origin: str
    ) -> tuple[np.ndarray, tuple[float, ...] | None]:
        """Keypoints float32 (N, 2) with NaN rows and the box, of one image of a row."""
        mat = self._mat(category, stem)
        if mat is not None:
            return read_pascal_mat(mat)
        if not set(_COORDINATES) <= cells.keys():
            raise NemfError(
                f"{origin}: no Annotations/{category}/{stem}.mat below {self.folder} and no "
                f"columns {', '.join(_COORDINATES)} in the list: this split has no keypoints"
            )
        keys = _COORDINATES[2 * side : 2 * side + 2]
        axes = [semicolon_numbers(cells[key], f"{origin}, column {key}") for key in keys]
        if len(axes[0]) != len(axes[1]):
            raise NemfError(
                f"{origin}: {keys[0]} has {len(axes[0])} numbers, {keys[1]} {len(axes[1])}"
            )
        return np.stack(axes, 1).astype(np.float32), None

    def _mat(self, category: str, stem: str) -> Path | None:
        for base in self._bases():
            path = base / "Annotations" / category / f"{stem}.mat"
            if path.is_file():
                return inside(base / "Annotations", f"{category}/{stem}.mat", str(path))
        return None

    def _image_path(self, file_name: str, origin: str) -> Path:
        for base in self._bases():
            path = inside(base / "JPEGImages", file_name, origin)
            if path.is_file():
                return path
        raise NemfError(
            f"{origin}: the image JPEGImages/{file_name} is missing below {self.folder}"
        )

    def _category(self, cell: object, origin: str) -> str:
        number = csv_number(cell)
        if number not in range(1, 21):
            raise NemfError(f"{origin}: class must be 1..20 in VOC order, not {cell!r}")
        return VOC_CLASSES[int(number) - 1]

    def _flip(self, cells: dict, origin: str) -> bool:
        value = csv_number(cells.get("flip", 0))
        if value not in (0, 1):
            raise NemfError(f"{origin}: flip must be 0 or 1, not {cells['flip']!r}")
        return bool(value) and self.split == "trn"

    def _bases(self) -> list[Path]:
        return [self.folder, self.folder / "PF-dataset-PASCAL", self.folder / "PF-dataset"]

    def list_file(self) -> Path:
        names = [
            f"{stem}_pairs{tail}.csv"
            for stem in _SPLIT_FILES[self.split]
            for tail in ("", "_pf_pascal")
        ]
        return find_list(self.folder, names)


def find_list(folder: Path, names: list[str]) -> Path:
    """The first of the pair lists that exists in the folder or in its ``image_pairs/``."""
    for base in (folder, folder / "image_pairs"):
        for name in names:
            if (base / name).is_file():
                return base / name
    raise NemfError(f"{folder / names[0]}: the pair list of the split is missing")


def read_pair_list(file: Path, min_columns: int) -> pd.DataFrame:
    """A pair list with a header; NemfError naming the file if malformed, empty or too narrow.

    Every row must have as many fields as the header: pandas alone would fill a row that was cut
    short with NaN, which reads as absent keypoints, and take a surplus first column for an index.
    """
    import pandas as pd

    try:
        text = read_within(file).decode("utf-8")
        reader = csv.reader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except NemfError:
        raise
    except (OSError, ValueError, csv.Error) as problem:
        raise NemfError(f"{file}: cannot be read as CSV ({problem})") from None
    if len(rows) < 2:
        raise NemfError(f"{file}: lists no pair")
    for line, row in rows:
        if len(row) != len(rows[0][1]):
            raise NemfError(
                f"{file} row {line}: has {len(row)} fields, the header {len(rows[0][1])}"
            )
    if len(set(rows[0][1])) < len(rows[0][1]):
        raise NemfError(f"{file}: two columns of its header have one name")
    try:
        table = pd.read_csv(io.StringIO(text))
    except (OverflowError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise NemfError(f"{file}: cannot be read as CSV ({reason})") from None
    if table.shape[1] < min_columns:
        raise NemfError(f"{file}: has {table.shape[1]} columns, expected at least {min_columns}")
    return table


_NUMBER = re.compile(r"\s*([+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf)\s*", re.A | re.I)


def csv_number(cell: object) -> float | None:
    """The number in a cell, NaN for an empty one or "nan"; None for anything else: Python would
    take 1_000 and True for numbers as well."""
    if isinstance(cell, bool | np.bool_) or not _NUMBER.fullmatch(str(cell)):
        return None
    return float(str(cell))  # an integer may be too large for float(), not its digits


def semicolon_numbers(cell: object, where: str) -> np.ndarray:
    """float64 (N,) from "1.5;2;nan"; NemfError naming the cell otherwise."""
    parts = str(cell).split(";") if isinstance(cell, str) else [cell]
    numbers = [csv_number(part) for part in parts]
    if None in numbers:
        raise NemfError(f"{where}: expected numbers separated by ';', not {cell!r}")
    return np.array(numbers, np.float64)


def read_pascal_mat(file: Path) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """Keypoints float32 (N, 2), NaN where absent, and the xyxy box of a PF-PASCAL annotation."""
    content = read_mat(file)
    if "kps" not in content:
        raise NemfError(f"{file}: holds no numeric 'kps'")
    kps, boxes = content["kps"].astype(np.float32), content.get("bbox")
    if kps.ndim != 2 or kps.shape[1] != 2:
        raise NemfError(f"{file}: 'kps' must be (N, 2), not {kps.shape}")
    if boxes is None or not boxes.size:
        return kps, None
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise NemfError(f"{file}: 'bbox' must hold rows of x1, y1, x2, y2, not {boxes.shape}")
    return kps, tuple(boxes[0].tolist())
