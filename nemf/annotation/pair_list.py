"""A folder's photographs and its ``pairs.json``, edited one pair at a time.

The file is the only state: every edit reads it, changes one pair and writes it whole. An edit names
the revision of the pair that it is based on, and is refused if the pair has changed since, so
several pages, or an editor, never overwrite each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemf.datasets.index import SLACK_PX, box_problems, image_header, inside
from nemf.errors import NemfError
from nemf.files import write_text
from nemf.pairs import Size
from nemf.photographs import orientation, write_upright
from nemf.reading import read_json

log = logging.getLogger(__name__)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif")
UPRIGHT = "upright"  # folder of the upright copies
RESULTS = "outputs"  # where commands write by default
_SIDES = ("src", "trg")


class Changed(Exception):
    """The pair is not the one that the edit was based on; ``pair`` is what it is now."""

    def __init__(self, pair: dict[str, Any]) -> None:
        super().__init__("the pair has changed")
        self.pair = pair


@dataclass(frozen=True)
class Photograph:
    """``name``: path relative to the folder, with slashes; ``size`` (height, width) as stored."""

    name: str
    size: Size


class PairList:
    """The photographs below ``folder`` and the pairs in its ``pairs.json``.

    Photographs that EXIF says to turn get upright copies in ``upright/``, which stand for them:
    coordinates in a dataset refer to the stored pixels. ``photographs``: those to annotate, by
    name; ``left_out``: why each of the others is not among them. NemfError if there are fewer than
    two, or if the folder's list is a ``pairs.csv``.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise NemfError(f"{folder}: no such folder of photographs")
        self.folder, self.file = folder, folder / "pairs.json"
        if not self.file.exists() and (folder / "pairs.csv").exists():
            raise NemfError(
                f"{folder / 'pairs.csv'}: only a pairs.json can be annotated; write the list as "
                "pairs.json (docs/datasets.md) or annotate in another folder"
            )
        self._lock = threading.Lock()
        self.left_out: dict[str, str] = {}
        used = {str(entry[side]) for entry in self._entries() for side in _SIDES}
        found = filter(None, (self._photograph(path, used) for path in self._files(used)))
        self.photographs = {p.name: p for p in sorted(found, key=lambda p: p.name)}
        for name in sorted(used - self.photographs.keys()):
            raise NemfError(f"{self.file}: names {name}, which is no readable image in {folder}")
        if len(self.photographs) < 2:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.left_out.items())
            raise NemfError(
                f"{folder}: holds {len(self.photographs)} photographs, a pair needs two"
                + (f" ({why})" if why else "")
            )

    def _files(self, used: set[str]) -> list[Path]:
        """Image files, but those in hidden folders and, unless ``used``, in folders of results."""
        files = []
        for path in sorted(self.folder.rglob("*")):
            within = path.relative_to(self.folder)
            if path.suffix.lower() not in ENDINGS or not path.is_file():
                continue
            if any(part.startswith(".") for part in within.parts):
                continue
            results = next((p for p in within.parents if self._holds_results(p)), None)
            if results is not None and within.as_posix() not in used:
                self.left_out[results.as_posix()] = "holds results of nemf, no photographs"
                continue
            files.append(path)
        return files

    def _holds_results(self, within: Path) -> bool:
        """Whether a folder below this one is an --out of other commands."""
        return within.parts != () and (
            within.as_posix() == RESULTS or (self.folder / within / "predictions").is_dir()
        )

    def _photograph(self, path: Path, used: set[str]) -> Photograph | None:
        """The photograph in a file, or its upright copy, or None if it cannot be read."""
        name = path.relative_to(self.folder).as_posix()
        try:
            if orientation(path) != 1 and name not in used:
                path = self._upright_copy(path, name)
            return Photograph(path.relative_to(self.folder).as_posix(), image_header(path)[0])
        except NemfError as problem:
            self.left_out[name] = str(problem)
            return None

    def _upright_copy(self, path: Path, name: str) -> Path:
        jpeg = path.suffix.lower() in (".jpg", ".jpeg")
        copy = self.folder / UPRIGHT / (name if jpeg else f"{name}.png")
        if not copy.exists() or copy.stat().st_mtime_ns < path.stat().st_mtime_ns:
            write_upright(path, copy)
            log.info("%s is stored turned: %s is its upright copy", name, copy)
        return copy

    # -- pairs --------------------------------------------------------------------------------

    def pairs(self) -> list[dict[str, Any]]:
        """Every pair as the page shows it: ``src``, ``trg``, ``nth`` (among the pairs of these two
        images), ``revision``, ``category``, ``rows`` (``name``, ``src`` and ``trg`` [x, y] or
        null), ``src_bbox``, ``trg_bbox`` (xyxy or null)."""
        met: dict[tuple[str, str], int] = {}
        shown = []
        for entry in self._entries():
            key = (entry["src"], entry["trg"])
            shown.append(self._shown(entry, *key, met.get(key, 0)))
            met[key] = met.get(key, 0) + 1
        return shown

    def put(self, src: str, trg: str, nth: int, revision: str, content: Any) -> dict[str, Any]:
        """Gives a pair a new content (``category``, ``rows``, ``src_bbox``, ``trg_bbox``) and
        returns it as it is then. A pair without points and boxes (and nothing else that somebody
        wrote there) is taken off the list; one without a point in both images is marked unfinished,
        which the dataset leaves out.

        Changed if its revision is not ``revision`` ("" for a pair that is not on the list);
        NemfError, and nothing is written, for content that no dataset may hold.
        """
        for name in (src, trg):
            if name not in self.photographs:
                raise NemfError(f"{name}: is none of the photographs of {self.folder}")
        fields = self._checked(src, trg, content)
        with self._lock:
            entries = self._entries()
            places = [k for k, e in enumerate(entries) if (e["src"], e["trg"]) == (src, trg)]
            place = places[nth] if nth < len(places) else None
            old = {} if place is None else entries[place]
            if (_revision(old) if old else "") != revision:
                raise Changed(self._shown(old, src, trg, nth))
            kept = {k: v for k, v in old.items() if k not in _CONTENT}
            new = kept | fields
            empty = not fields["src_kps"] and not {"src_bbox", "trg_bbox"} & fields.keys()
            if empty and not kept.keys() - {"id", "src", "trg"}:
                if place is not None:
                    del entries[place]
                new = {}
            elif place is None:
                ids = {str(entry.get("id")) for entry in entries}
                new = {"id": _new_id(src, trg, ids), "src": src, "trg": trg} | new
                entries.append(new)
            else:
                entries[place] = new
            lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
            write_text(self.file, f"[\n{lines}\n]\n" if entries else "[]\n")
        return self._shown(new, src, trg, nth) | {"category": fields.get("category", "")}

    def _entries(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        entries = read_json(self.file)
        if not isinstance(entries, list) or not all(
            isinstance(e, dict) and all(isinstance(e.get(side), str) for side in _SIDES)
            for e in entries
        ):
            raise NemfError(f"{self.file}: must be a list of objects with src and trg")
        for entry in entries:
            for side in _SIDES:
                inside(self.folder, entry[side], str(self.file))
        return entries

    def _shown(self, entry: dict[str, Any], src: str, trg: str, nth: int) -> dict[str, Any]:
        kps = [entry.get(f"{side}_kps") or [] for side in _SIDES]
        names = entry.get("kp_names") or [str(k) for k in range(len(kps[0]))]
        try:
            rows = [
                {"name": "" if name == str(k) else str(name), "src": _xy(a), "trg": _xy(b)}
                for k, (name, a, b) in enumerate(zip(names, *kps, strict=True))
            ]
        except (TypeError, ValueError):
            raise NemfError(
                f"{self.file}: the keypoints of {src} and {trg} are no parallel lists of [x, y]"
            ) from None
        return {
            "src": src,
            "trg": trg,
            "nth": nth,
            "revision": _revision(entry) if entry else "",
            "category": str(entry.get("category") or ""),
            "rows": [row for row in rows if row["src"] or row["trg"]],
            "src_bbox": entry.get("src_bbox"),
            "trg_bbox": entry.get("trg_bbox"),
        }

    def _checked(self, src: str, trg: str, content: Any) -> dict[str, Any]:
        """The fields of an entry with that content. NemfError for anything that does not fit."""
        try:
            rows = [(str(r["name"]).strip(), r["src"], r["trg"]) for r in content["rows"]]
            category = str(content["category"]).strip()
            boxes = {f"{side}_bbox": content[f"{side}_bbox"] for side in _SIDES}
        except (KeyError, TypeError):
            raise NemfError("a pair needs category, rows and both boxes") from None
        names = [name or str(k) for k, (name, _, _) in enumerate(rows)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise NemfError(f"two points are called {twice!r}; names must be distinct")
        if any(a is None and b is None for _, a, b in rows):
            raise NemfError("a point must lie in one of the images")
        sizes = [self.photographs[name].size for name in (src, trg)]
        fields: dict[str, Any] = {
            "src_kps": [_checked_point(a, sizes[0], src) for _, a, _ in rows],
            "trg_kps": [_checked_point(b, sizes[1], trg) for _, _, b in rows],
        }
        if category:
            fields["category"] = category
        if any(name for name, _, _ in rows):
            fields["kp_names"] = names
        for (key, box), image, size in zip(boxes.items(), (src, trg), sizes, strict=True):
            if box is None:
                continue
            fields[key] = _numbers(box, 4, f"a box in {image}")
            for problem in box_problems(f"the box in {image}", box, size[1], size[0]):
                raise NemfError(problem)
        if not any(a is not None and b is not None for _, a, b in rows):
            fields["unfinished"] = True
        return fields


_CONTENT = {"category", "src_kps", "trg_kps", "kp_names", "src_bbox", "trg_bbox", "unfinished"}


def _xy(point: Any) -> list[float] | None:
    if point is None or any(v is None for v in point):
        return None
    x, y = point
    return [x, y]


def _checked_point(point: Any, size: Size, image: str) -> list[float] | None:
    if point is None:
        return None
    x, y = _numbers(point, 2, f"a point in {image}")
    height, width = size
    if not (-SLACK_PX <= x <= width - 1 + SLACK_PX and -SLACK_PX <= y <= height - 1 + SLACK_PX):
        raise NemfError(f"the point ({x:g}, {y:g}) lies outside {image} ({width}x{height})")
    return [x, y]


def _numbers(values: Any, n: int, what: str) -> list[float]:
    good = isinstance(values, list) and len(values) == n
    if not good or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise NemfError(f"{what} must be {n} finite numbers, not {values!r}")
    return values


def _revision(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def _new_id(src: str, trg: str, taken: set[str]) -> str:
    stems = [Path(name).with_suffix("").as_posix().replace("/", "_") for name in (src, trg)]
    name, number = "-".join(stems), 1
    while name in taken:
        number += 1
        name = f"{'-'.join(stems)}-{number}"
    return name
