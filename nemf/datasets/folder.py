"""A user's own pairs: a folder with images and one pair list."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemf.datasets.index import PairDataset, RawImage, RawPair, drop_absent, inside
from nemf.datasets.pfpascal import read_pair_list, semicolon_numbers
from nemf.datasets.spair import json_box, json_names, json_points, json_text
from nemf.errors import NemfError
from nemf.pairs import Layout
from nemf.reading import read_json

log = logging.getLogger(__name__)
_LISTS = ("pairs.json", "pairs.csv")
NO_EXTENT = (
    "; of own pairs, give all two boxes or this one a second point, or predict with "
    "--cfg-options dataset.threshold=image"
)


class FolderOfPairs(PairDataset):
    """Own pairs from ``<root>/pairs.json`` or ``<root>/pairs.csv``; paths are relative to root.

    JSON: a list of objects with ``src``, ``trg`` (image paths), ``src_kps``, ``trg_kps`` (parallel
    lists of [x, y], null for an absent one) and optionally ``id``, ``category``, ``kp_names``,
    ``src_bbox``, ``trg_bbox`` (x1, y1, x2, y2); ``unfinished: true``, which ``nemf annotate`` sets
    on a pair without a complete point, leaves it out. CSV: columns ``src, trg, XA, YA, XB, YB``
    (numbers separated by semicolons) and optionally ``id, category, src_bbox, trg_bbox``.

    ``threshold``: the length that alpha multiplies: "bbox" (all pairs need boxes), "image" or
    "kps_extent"; by default bbox where every pair has boxes, else kps_extent. Coordinates refer to
    the stored pixel grid (EXIF orientation is not applied).
    """

    name = "folder"
    title = "own pairs"
    folders = ()
    splits = ("test",)

    def __init__(
        self, root: Any, split: str = "test", *, threshold: str | None = None, **options: Any
    ):
        layouts: dict[str | None, Layout | None] = {
            "bbox": "spair",
            "image": "pfpascal",
            "kps_extent": "pfwillow",
            None: None,
        }
        if threshold not in layouts:
            raise NemfError(f"threshold must be bbox, image or kps_extent, not {threshold!r}")
        super().__init__(root, split, **options)
        boxes = all(pair.src_bbox is not None and pair.trg_bbox is not None for pair in self)
        if threshold == "bbox" and not boxes:
            raise NemfError(
                f"{self.list_file()}: threshold 'bbox' needs src_bbox and trg_bbox everywhere"
            )
        self.layout = layouts[threshold] or ("spair" if boxes else "pfwillow")

    @classmethod
    def find(cls, root: Path) -> Path | None:
        return root if any((root / name).is_file() for name in _LISTS) else None

    @classmethod
    def locate(cls, root: Path) -> Path:
        if cls.find(root) is None:
            if not root.is_dir():
                raise NemfError(f"{root}: no such folder of own pairs")
            raise NemfError(
                f"{root}: holds neither pairs.json nor pairs.csv; `nemf annotate {root}` makes one"
            )
        return root

    def sources(self) -> list[Path]:
        """The list, the images it names, and what lies beside them. Other folders are none of it:
        results may be written below the pairs."""
        file = self.list_file()
        try:
            listed = _listed(file)
        except NemfError:  # `entries` says what is wrong
            listed = []
        names = {str(entry.get(side)) for entry in listed for side in ("src", "trg")}
        parts = {name: Path(name).parts for name in names}
        within = [n for n, p in parts.items() if p and ".." not in p and not Path(n).is_absolute()]
        paths = {file, *(self.folder / name for name in within)}
        for folder in {path.parent for path in paths}:
            paths.update(_beside(folder))
        return sorted(path for path in paths if not path.is_dir())

    def unscorable(self, pairs: Sequence[RawPair]) -> Iterator[tuple[RawPair, str]]:
        if all(pair.src_bbox is not None and pair.trg_bbox is not None for pair in pairs):
            return
        for pair in map(drop_absent, pairs):
            for side, kps in (("source", pair.src_kps), ("target", pair.trg_kps)):
                if len(kps) and not np.ptp(kps, 0).any():
                    yield pair, f"its {side} keypoints have no extent{NO_EXTENT}"
                    break

    def entries(self) -> list[tuple[int, dict[str, Any]]]:
        file = self.list_file()
        entries = _listed(file)
        finished = [(k, e) for k, e in enumerate(entries) if e.get("unfinished") is not True]
        if not finished:
            raise NemfError(f"{file}: lists unfinished pairs only: go on with `nemf annotate`")
        if len(finished) < len(entries):
            log.warning("%s: %d unfinished left out", file, len(entries) - len(finished))
        return finished

    def read(self, entry: tuple[int, dict[str, Any]], images: dict[str, RawImage]) -> RawPair:
        number, fields = entry
        file = self.list_file()
        if file.suffix == ".json":
            origin = f"{file} entry {number + 1}"
        else:
            origin = f"{file} row {number + 2}"
            fields = _from_csv(fields, origin)
        here = Path(origin)
        files = [json_text(here, fields, side) for side in ("src", "trg")]
        for name in files:
            images.setdefault(name, RawImage(name, inside(self.folder, name, origin)))
        kps = [json_points(here, fields, key) for key in ("src_kps", "trg_kps")]
        boxes = [
            json_box(here, fields, key) if fields.get(key) is not None else None
            for key in ("src_bbox", "trg_bbox")
        ]
        stems = [Path(name).stem for name in files]
        category = json_text(here, fields, "category") if fields.get("category") else "object"
        own_id = fields.get("id")
        if type(own_id) is not int and own_id:  # an empty or absent one is made up
            own_id = json_text(here, fields, "id")
        return RawPair(
            id=str(own_id or f"{number:06d}-{stems[0]}-{stems[1]}:{category}"),
            category=category,
            src=files[0],
            trg=files[1],
            src_kps=kps[0],
            trg_kps=kps[1],
            kp_names=json_names(here, fields, "kp_names", len(kps[0])),
            origin=origin,
            src_bbox=boxes[0],
            trg_bbox=boxes[1],
        )

    def list_file(self) -> Path:
        return next(self.folder / name for name in _LISTS if (self.folder / name).is_file())


def _beside(folder: Path) -> list[Path]:
    """What a folder holds, nothing where it cannot be listed (its images are then missing)."""
    try:
        return list(folder.iterdir())
    except (OSError, ValueError):
        return []


def _listed(file: Path) -> list[dict[str, Any]]:
    return _json_entries(file) if file.suffix == ".json" else _csv_entries(file)


def _json_entries(file: Path) -> list[dict[str, Any]]:
    entries = read_json(file)
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise NemfError(f"{file}: must be a list of objects, one per pair")
    if not entries:
        raise NemfError(f"{file}: lists no pair")
    return entries


def _csv_entries(file: Path) -> list[dict[str, Any]]:
    table = read_pair_list(file, min_columns=6)
    needed = {"src", "trg", "XA", "YA", "XB", "YB"}
    if not needed <= set(table.columns):
        raise NemfError(
            f"{file}: the columns {', '.join(sorted(needed - set(table.columns)))} are missing"
        )
    return table.to_dict("records")


def _from_csv(cells: dict[str, Any], origin: str) -> dict[str, Any]:
    """A row of the CSV in the form of a JSON entry."""
    entry = {key: str(cells[key]) for key in ("src", "trg")}
    for side, keys in (("src_kps", ("XA", "YA")), ("trg_kps", ("XB", "YB"))):
        axes = [semicolon_numbers(cells[key], f"{origin}, column {key}") for key in keys]
        if len(axes[0]) != len(axes[1]):
            raise NemfError(f"{origin}: {keys[0]} and {keys[1]} differ in length")
        entry[side] = np.stack(axes, 1).tolist()
    for key in ("id", "category", "src_bbox", "trg_bbox"):
        value = cells.get(key)
        if value is not None and value == value:  # pandas reads an empty cell as NaN
            is_box = key.endswith("bbox")
            numbers = semicolon_numbers(value, f"{origin}, column {key}") if is_box else None
            entry[key] = str(value) if numbers is None else numbers.tolist()
    return entry
