"""Checks every file of a dataset and reports everything that is wrong with it, not the first thing.

A :class:`Finding` is a *problem* (the dataset cannot be used as it is, or scores on it would not
mean what they should) or a *note* (worth knowing, harmless).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from nemf.datasets import dataset_class
from nemf.datasets.index import (
    SLACK_PX,
    SPLITS,
    ImageFile,
    PairDataset,
    RawImage,
    RawPair,
    decode_image,
    examine_image,
    pair_problems,
    walk_files,
)
from nemf.errors import NemfError

Severity = Literal["problem", "note"]
Kind = Literal["list", "annotation", "image", "pair", "leak", "duplicate", "unused", "exif", "box"]
TITLES: dict[Kind, str] = {
    "list": "pair lists",
    "annotation": "annotations",
    "image": "image files",
    "pair": "pairs",
    "leak": "images shared between splits",
    "duplicate": "identical images under several names",
    "unused": "images that no pair uses",
    "exif": "EXIF orientation",
    "box": "boxes",
}
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_SHOWN = 5  # findings of a group in the text; as_dict() has them all


@dataclass(frozen=True)
class Finding:
    """One thing about one file. ``file`` is relative to the dataset's folder and may go on with
    the row or entry (``test_pairs.csv row 12``); ``reason`` is one line."""

    severity: Severity
    file: str
    reason: str
    kind: Kind


@dataclass
class Report:
    """What :func:`verify` found.

    ``splits``: those that were checked; ``files``: how many files the layout consists of
    (lists, annotations, images); ``images``: image files that decoded; ``pairs``: listed pairs
    whose annotation could be read. ``ok``: no finding is a problem.
    """

    dataset: str
    title: str
    folder: str
    synthetic: bool
    splits: list[str] = field(default_factory=list)
    files: int = 0
    images: int = 0
    pairs: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "problem"]

    @property
    def notes(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "note"]

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        """A summary, then problems and notes in groups of which the first few are spelled out."""
        synthetic = " (synthetic)" if self.synthetic else ""
        lines = [
            f"{self.title}{synthetic} in {self.folder}",
            (
                f"checked {', '.join(self.splits) or 'no split'}: {_count(self.pairs, 'pair')}, "
                f"{_count(self.images, 'image')}, {_count(self.files, 'file')}"
            ),
        ]
        for heading, findings in (("problem", self.problems), ("note", self.notes)):
            groups: dict[Kind, list[Finding]] = defaultdict(list)
            for finding in findings:
                groups[finding.kind].append(finding)
            for kind, group in groups.items():
                lines.append(f"{heading}: {TITLES[kind]} ({len(group)})")
                lines += [f"  {f.file}: {f.reason}" for f in group[:_SHOWN]]
                if len(group) > _SHOWN:
                    lines.append(f"  ... and {len(group) - _SHOWN} more (--json has them all)")
        verdict = "no problems" if self.ok else _count(len(self.problems), "problem")
        lines.append(f"{verdict}, {_count(len(self.notes), 'note')}")
        return "\n".join(lines)


def verify(
    dataset_name: str,
    root: str | os.PathLike[str],
    splits: Iterable[str] | None = None,
    *,
    progress: bool = False,
) -> Report:
    """Checks all files of a dataset; whatever is malformed becomes a finding.

    ``splits``: by default every split of the dataset that has a list (one without is noted; a
    named one without is a problem). Every image is decoded once. Images count as identical when
    their pixels are.

    Raises NemfError only for an unknown dataset or split, or where the folder is not there.
    """
    cls = dataset_class(dataset_name)
    return _Verification(cls, Path(root), splits, progress).run()


@dataclass
class _Split:
    """One split as far as it could be read. ``complete``: all of it; ``uses``: pairs per image."""

    reader: PairDataset
    images: dict[str, RawImage] = field(default_factory=dict)
    pairs: list[RawPair] = field(default_factory=list)
    uses: Counter[Path] = field(default_factory=Counter)
    complete: bool = True


class _Verification:
    def __init__(
        self, cls: type[PairDataset], root: Path, splits: Iterable[str] | None, progress: bool
    ) -> None:
        self.progress = progress
        self.all_splits = splits is None
        names = cls.splits if splits is None else dict.fromkeys(SPLITS.get(s, s) for s in splits)
        self.readers = [cls.unindexed(root, name) for name in names]
        if not self.readers:
            raise NemfError(f"name at least one split of {cls.name}: {', '.join(cls.splits)}")
        first = self.readers[0]
        self.folder = first.folder
        self.report = Report(cls.name, cls.title, str(self.folder), first.synthetic)
        self.files: dict[Path, ImageFile] = {}
        self.pixel_hashes: dict[Path, str] = {}

    def run(self) -> Report:
        splits = [split for reader in self.readers if (split := self._read(reader)) is not None]
        if not splits and self.report.ok:
            self._add("problem", "list", ".", "holds the pair list of no split")
        present = self._present(splits)
        used = {path for split in splits for path in split.uses}
        unused = {path for path in present - used if path.suffix.lower() in _IMAGE_SUFFIXES}
        self._decode(used, "problem")
        if self.all_splits and all(split.complete for split in splits):
            self._decode(unused, "note")
            for path in sorted(unused):
                self._add("note", "unused", path, "no pair uses it")
        elif self.all_splits:  # what the unreadable pairs use is not known
            self._decode(unused, "problem")
        for split in splits:
            self._check_pairs(split)
        for split in splits:
            self._duplicates(split)
        for one, other in combinations(splits, 2):
            self._leaks(one, other)
        self.report.files = len(present)
        self.report.splits = [split.reader.split for split in splits]
        self.report.pairs = sum(len(split.pairs) for split in splits)
        self.report.images = len(self.pixel_hashes)
        self.report.findings = list(dict.fromkeys(self.report.findings))
        return self.report

    # -- steps --------------------------------------------------------------------------------

    def _read(self, reader: PairDataset) -> _Split | None:
        """The split's pairs and what is wrong with its list and annotations; None without list."""
        try:
            reader.list_file()
        except NemfError as missing:
            self._add_error("note" if self.all_splits else "problem", "list", missing)
            return None
        split = _Split(reader)
        listed = 0
        try:
            for attempt in self._bar(reader.attempts(split.images), f"reading {reader.split}"):
                listed += 1
                if isinstance(attempt, NemfError):
                    split.complete = False
                    self._add_error("problem", "annotation", attempt)
                else:
                    split.pairs.append(attempt)
        except NemfError as unreadable:
            self._add_error("problem", "list", unreadable)
            split.complete = False
            return split
        try:
            for stray in reader.unlisted():
                self._add("problem", "annotation", stray, f"is not on the {reader.split} list")
        except NemfError as unreadable:
            self._add_error("problem", "annotation", unreadable)
        self._ids(split)
        official = reader.official_pairs
        if official is not None and listed != official:
            reason = f"lists {listed} of {official} official pairs; results are of a part"
            if listed > official:
                reason = f"lists {listed} pairs, but officially there are {official}"
            self._add("note", "list", reader.list_file(), reason)
        for pair in split.pairs:
            split.uses.update({split.images[name].path for name in (pair.src, pair.trg)})
        return split

    def _ids(self, split: _Split) -> None:
        file = split.reader.list_file()
        for pair_id, times in Counter(pair.id for pair in split.pairs).items():
            if times > 1:
                self._add("problem", "list", file, f"pair {pair_id} is listed {times} times")
        content = Counter((p.category, p.src, p.trg) for p in split.pairs)
        repeated = [f"{src} -> {trg}" for (_, src, trg), times in content.items() if times > 1]
        ids_repeat = len({p.id for p in split.pairs}) < len(split.pairs)
        if repeated and not ids_repeat:
            reason = f"lists the images {repeated[0]} twice (and {len(repeated) - 1} more such)"
            self._add("note", "list", file, reason)

    def _present(self, splits: list[_Split]) -> set[Path]:
        """Every file of the layout, used or not."""
        present: set[Path] = set()
        for split in splits:
            try:
                for source in split.reader.sources():
                    present.update(path for path in walk_files(source) if path.is_file())
            except NemfError as problem:
                self._add_error("problem", "annotation", problem)
        return present

    def _decode(self, paths: set[Path], severity: Severity) -> None:
        for path in self._bar(sorted(paths), "decoding images"):
            try:
                file = examine_image(path)
                pixels = decode_image(path)
            except NemfError as damaged:
                self._add_error(severity, "image", damaged)
                continue
            if pixels.shape[:2] != file.size:
                reason = (
                    f"decodes to {pixels.shape[:2]} (height, width), its header says {file.size}"
                )
                self._add(severity, "image", path, reason)
            if file.exif_orientation != 1:
                reason = (
                    f"is {file.exif_orientation}; it is ignored here (annotations refer to the "
                    "stored pixels), but other programs may turn the image"
                )
                self._add("note", "exif", path, reason)
            self.files[path] = file
            digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes())
            self.pixel_hashes[path] = digest.hexdigest()

    def _check_pairs(self, split: _Split) -> None:
        by_name = {
            name: self.files[image.path]
            for name, image in split.images.items()
            if image.path in self.files
        }
        sound = []
        for pair in split.pairs:
            problems = list(pair_problems(pair, by_name))
            for problem in problems:
                self._add_error("problem", "pair", NemfError(problem))
            if not problems:
                sound.append(pair)
                self._doubts(pair, split, by_name)
        for pair, reason in split.reader.unscorable(sound):
            self._add("note", "pair", pair.origin, f"pair {pair.id}: {reason}")

    def _doubts(self, pair: RawPair, split: _Split, by_name: dict[str, ImageFile]) -> None:
        """What is odd about a pair that is formally right."""
        for side, name, kps, box in (
            ("source", pair.src, pair.src_kps, pair.src_bbox),
            ("target", pair.trg, pair.trg_kps, pair.trg_bbox),
        ):
            if box is not None and name in by_name:
                height, width = by_name[name].size
                beyond = max(-box[0], -box[1], box[2] - width, box[3] - height)
                if beyond > SLACK_PX:
                    reason = f"{side} box {list(box)} reaches beyond {name} ({width}x{height})"
                    self._add("note", "box", pair.origin, reason)
            image = split.images[name]
            own = dict(zip(image.kp_names, image.kps, strict=True))
            for label, point in zip(pair.kp_names, kps, strict=True):
                if label in own and np.abs(own[label] - point).max() > SLACK_PX:
                    reason = (
                        f"{side} keypoint {label} at ({point[0]:g}, {point[1]:g}) is at "
                        f"({own[label][0]:g}, {own[label][1]:g}) in the annotation of {name}"
                    )
                    self._add("note", "annotation", pair.origin, reason)

    def _duplicates(self, split: _Split) -> None:
        for paths in self._by_pixels(split).values():
            if len(paths) > 1:
                others = ", ".join(self._relative(path) for path in paths[1:])
                reason = f"the same picture as {others} ({split.reader.split})"
                self._add("note", "duplicate", paths[0], reason)

    def _leaks(self, one: _Split, other: _Split) -> None:
        """A picture of the training pairs among the test pairs is a problem, else a note."""
        names = one.reader.split, other.reader.split
        severity: Severity = "problem" if set(names) == {"trn", "test"} else "note"
        here, there = self._by_pixels(one), self._by_pixels(other)
        for digest, ours in here.items():
            if digest not in there:
                continue
            theirs = there[digest]
            reason = (
                f"{names[0]} image (in {_count(self._pairs_with(one, ours), 'pair')}) is the "
                f"{names[1]} image {self._relative(theirs[0])} "
                f"(in {_count(self._pairs_with(other, theirs), 'pair')})"
            )
            self._add(severity, "leak", ours[0], reason)

    # -- small parts --------------------------------------------------------------------------

    def _by_pixels(self, split: _Split) -> dict[str, list[Path]]:
        groups: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(split.uses):
            if path in self.pixel_hashes:
                groups[self.pixel_hashes[path]].append(path)
        return groups

    def _pairs_with(self, split: _Split, paths: list[Path]) -> int:
        if len(paths) == 1:
            return split.uses[paths[0]]
        wanted = {name for name, image in split.images.items() if image.path in paths}
        return sum(pair.src in wanted or pair.trg in wanted for pair in split.pairs)

    def _bar(self, items: Iterable[Any], label: str) -> Iterable[Any]:
        return tqdm(items, desc=label, disable=not self.progress)

    def _relative(self, path: Path | str) -> str:
        return str(path).removeprefix(f"{self.folder}{os.sep}")

    def _add(self, severity: Severity, kind: Kind, file: Path | str, reason: str) -> None:
        self.report.findings.append(Finding(severity, self._relative(file), reason, kind))

    def _add_error(self, severity: Severity, kind: Kind, error: NemfError) -> None:
        """A reader's message: ``<file>[ row n]: <reason>``."""
        file, _, reason = self._relative(str(error)).partition(": ")
        reason = reason.replace(f"{self.folder}{os.sep}", "")
        self.report.findings.append(Finding(severity, file, reason, kind))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
