"""The indexed pair dataset that every reader derives from.

A reader parses its layout once; the result is checked, fingerprinted and kept as parquet in the
index cache, so that later starts read two small files instead of thousands. The cache key holds
name, size and modification time of every file that the layout consists of: an edit, an added or a
removed file builds a new index.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage
from tqdm import tqdm

from nemf.errors import NemfError
from nemf.limits import IMAGE_PIXELS
from nemf.pairs import FLAGS, ImageRecord, Layout, Pair
from nemf.processes import draft_beside
from nemf.reading import file_bytes, read_parquet

log = logging.getLogger(__name__)

FORMAT = 1  # of the cached index; raised when its columns or its checks change
SLACK_PX = 1.0  # annotations that count pixels from 1 may sit one pixel outside
# Of Pillow's many readers those that photographs come in; one of the others starts Ghostscript.
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
HEIC_REFUSED = (
    "HEIC cannot be read; save the photograph as JPEG or PNG (export it from a viewer, or "
    "`magick IMG.HEIC IMG.jpg`, on a Mac `sips -s format jpeg IMG.HEIC --out IMG.jpg`)"
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
SPLITS = {"trn": "trn", "train": "trn", "val": "val", "test": "test", "tst": "test"}


@dataclass(eq=False)
class RawImage:
    """An image as the annotations name it. ``kps`` (K, 2) px with NaN rows for absent keypoints."""

    name: str
    path: Path
    kps: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    kp_names: tuple[str, ...] = ()
    mirrored: bool = False


@dataclass(eq=False)
class RawPair:
    """A pair as parsed, before any check. Keypoints (N, 2) px; NaN rows are dropped later.

    ``origin``: the file (and row) that says so, for error messages. ``src_size``/``trg_size``:
    (height, width) that the annotation claims, or None.
    """

    id: str
    category: str
    src: str
    trg: str
    src_kps: np.ndarray
    trg_kps: np.ndarray
    kp_names: tuple[str, ...]
    origin: str
    src_bbox: Sequence[float] | None = None
    trg_bbox: Sequence[float] | None = None
    src_size: tuple[int, int] | None = None
    trg_size: tuple[int, int] | None = None
    flags: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageFile:
    """What the index knows of an image file: (height, width), hex SHA-256, bytes, orientation."""

    size: tuple[int, int]
    hash: str
    n_bytes: int
    exif_orientation: int


def examine_image(path: Path) -> ImageFile:
    """Size, hash and length of an image file, from its header and bytes, without decoding it.

    The pixel grid is the one stored: an EXIF orientation is reported, never applied (annotations
    of the benchmarks refer to the stored grid). NemfError if it is missing, not an image, or has
    more pixels than :data:`nemf.limits.IMAGE_PIXELS`.
    """
    try:
        file_bytes(path)
        data = path.read_bytes()
    except NemfError:
        raise
    except (OSError, ValueError) as problem:  # ValueError: a name no file can have
        reason = getattr(problem, "strerror", None) or problem
        raise NemfError(f"{path}: image cannot be read ({reason})") from None
    size, orientation = image_header(path)
    return ImageFile(size, hashlib.sha256(data).hexdigest(), len(data), orientation)


def image_header(path: Path) -> tuple[tuple[int, int], int]:
    """((height, width), EXIF orientation) of an image file. NemfError if it is not an image."""
    with _opened(path, f"{path}: not a readable image (%s); replace the file") as image:
        width, height = image.size
        orientation = int(image.getexif().get(274, 1) or 1)
    return (height, width), orientation


def decode_image(path: Path, mirrored: bool = False) -> np.ndarray:
    """uint8 RGB (H, W, 3) as stored (EXIF orientation not applied). NemfError if damaged, of more
    pixels than :data:`nemf.limits.IMAGE_PIXELS` or of more than 8 bits in one grey channel."""
    refusal = (
        f"{path}: image does not decode (%s); replace the file "
        "(`nemf data verify` lists every damaged one)"
    )
    with _opened(path, refusal) as image:
        pixels = rgb_pixels(image, str(path))
    return np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels


def rgb_pixels(image: PILImage.Image, name: str) -> np.ndarray:
    """uint8 RGB (H, W, 3) of a Pillow image. NemfError, with ``name``, for one of 16 or 32 bits in
    one grey channel: Pillow would clip it to white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise NemfError(
            f"{name}: has more than 8 bits per pixel in one grey channel (Pillow's mode "
            f"{image.mode}); save it with 8 bits per channel"
        )
    return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(path: Path, refusal: str) -> Iterator[PILImage.Image]:
    """An image file of few enough pixels. Whatever goes wrong with it is a NemfError: ``refusal``
    with the reason."""
    try:
        file_bytes(path)
        if PILImage.MAX_IMAGE_PIXELS is not None:  # Pillow's own, which ours replaces
            PILImage.MAX_IMAGE_PIXELS = max(PILImage.MAX_IMAGE_PIXELS, IMAGE_PIXELS.value)
        with warnings.catch_warnings():  # on more than half of Pillow's limit
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            image = PILImage.open(path, formats=_IMAGE_FORMATS)
        with image:
            IMAGE_PIXELS.check(path, image.width * image.height, "is an image of")
            yield image
    except FileNotFoundError:
        raise NemfError(f"{path}: image is missing") from None
    except NemfError:
        raise
    except PILImage.DecompressionBombError as problem:  # more than twice Pillow's limit
        more = f"if it is meant to, set {IMAGE_PIXELS.variable} higher"
        raise NemfError(refusal.partition(";")[0] % f"{_reason(problem)}; {more}") from None
    except Exception as problem:  # Pillow's plugins raise many kinds for damaged files
        if _is_heic(path):
            raise NemfError(f"{path}: {HEIC_REFUSED}") from None
        raise NemfError(refusal % _reason(problem)) from None


def _is_heic(path: Path) -> bool:
    """Whether a file is HEIC by its first bytes, whatever it is called."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except (OSError, ValueError):
        return False
    return start[4:8] == b"ftyp" and start[8:] in _HEIC_BRANDS


class PairDataset(Sequence[Pair]):
    """Pairs of one split of one dataset, in the order of its official list.

    ``root``: the folder that holds the dataset's folder (or that folder itself). ``split``: trn,
    val or test (train is understood). ``outside="keep"`` accepts keypoints further than a pixel
    outside their image instead of refusing the dataset. ``first`` keeps the first pairs only
    (trials; the fingerprint then differs, and tables say how many pairs were used).

    Attributes: ``folder``; ``fingerprint`` hex SHA-256 over every pair's annotation and every
    used image's name, length and content hash, independent of where the dataset lies;
    ``synthetic`` whether it is a rendered stand-in; ``images``, ``official_pairs`` (how many
    pairs the official split has, None if unknown).

    Subclasses set ``name``, ``layout``, ``folders``, ``official`` and implement ``list_file``,
    ``sources``, ``entries`` and ``read``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    layout: Layout
    folders: ClassVar[tuple[str, ...]]
    splits: ClassVar[tuple[str, ...]] = ("trn", "val", "test")
    official: ClassVar[dict[str, int]] = {}

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "test",
        *,
        outside: Literal["refuse", "keep"] = "refuse",
        first: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if outside not in ("refuse", "keep"):
            raise NemfError(f"outside must be 'refuse' or 'keep', not {outside!r}")
        if first is not None and first < 1:
            raise NemfError(f"first must be at least 1, not {first}")
        self.outside = outside
        self._open(Path(root), split)
        self._load(Path(cache_dir) if cache_dir else default_cache(), first)

    @classmethod
    def unindexed(cls, root: str | os.PathLike[str], split: str) -> Self:
        """A reader for :meth:`attempts` only: nothing is parsed or checked, so it has no pairs."""
        reader = cls.__new__(cls)
        reader._open(Path(root), split)
        return reader

    def _open(self, root: Path, split: str) -> None:
        from nemf.datasets.synthetic import synthetic_marker  # with SciPy; `nemf list` does without

        if SPLITS.get(split) not in self.splits:
            raise NemfError(f"{self.name} has no split {split!r}: choose {', '.join(self.splits)}")
        self.split = SPLITS[split]
        self.folder = self.locate(root)
        self.synthetic = synthetic_marker(self.folder) is not None
        self.official_pairs = None if self.synthetic else self.official.get(self.split)

    # -- what a reader provides ---------------------------------------------------------------

    def sources(self) -> list[Path]:
        """Files and folders (walked) whose names, sizes and times make up the cache key."""
        raise NotImplementedError

    def list_file(self) -> Path:
        """The pair list of the split. NemfError if it is missing."""
        raise NotImplementedError

    def entries(self) -> Iterable[Any]:
        """What the list says of each pair. NemfError if it is unreadable or empty."""
        raise NotImplementedError

    def read(self, entry: Any, images: dict[str, RawImage]) -> RawPair:
        """The pair of one entry, its images put into ``images`` by name. NemfError naming the
        file for anything malformed."""
        raise NotImplementedError

    def unlisted(self) -> list[Path]:
        """Annotation files that belong to the split but to no entry of its list."""
        return []

    def unscorable(self, pairs: Sequence[RawPair]) -> Iterable[tuple[RawPair, str]]:
        """Which of these well-formed pairs the usual thresholds cannot score, and why."""
        return ()

    # -- the annotations of the split ---------------------------------------------------------

    def attempts(self, images: dict[str, RawImage]) -> Iterator[RawPair | NemfError]:
        """Each listed pair, or what prevents it from being read; goes on after an error."""
        for entry in self.entries():
            try:
                attempt: RawPair | NemfError = self.read(entry, images)
            except NemfError as problem:
                attempt = problem
            except OSError as problem:
                attempt = NemfError(f"{problem.filename}: cannot be read ({problem.strerror})")
            yield attempt

    def parse(self) -> tuple[dict[str, RawImage], Iterable[RawPair]]:
        """The images by name (filled while the pairs are read) and the pairs. Reading them raises
        NemfError naming the file for the first thing that is malformed."""
        images: dict[str, RawImage] = {}

        def pairs() -> Iterator[RawPair]:
            for attempt in self.attempts(images):
                if isinstance(attempt, NemfError):
                    raise attempt
                yield attempt

        return images, pairs()

    @classmethod
    def find(cls, root: Path) -> Path | None:
        """The dataset's folder below (or at) ``root``, or None."""
        for name in cls.folders:
            if (root / name).is_dir():
                return root / name
        return root if root.name in cls.folders and root.is_dir() else None

    @classmethod
    def locate(cls, root: Path) -> Path:
        folder = cls.find(root)
        if folder is None:
            raise NemfError(
                f"{root}: no {cls.title} here (looked for {', '.join(cls.folders)}); "
                "give the folder that holds the datasets with DATA= or --data"
            )
        return folder

    # -- sequence of pairs --------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start, stop = self._offsets[index], self._offsets[index + 1]
        row = self._columns
        return Pair(
            id=self._ids[index],
            category=self._categories[index],
            src=self.images[row["src"][index]],
            trg=self.images[row["trg"][index]],
            src_kps=self._src_kps[start:stop],
            trg_kps=self._trg_kps[start:stop],
            kp_names=tuple(self._kp_names[start:stop]),
            src_bbox=_box_or_none(row["src_bbox"][index]),
            trg_bbox=_box_or_none(row["trg_bbox"][index]),
            flags={flag: int(row[flag][index]) for flag in FLAGS},
        )

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    @property
    def ids(self) -> list[str]:
        return list(self._ids)

    @property
    def categories(self) -> list[str]:
        """The class of each pair."""
        return list(self._categories)

    def pixels(self, record: ImageRecord) -> np.ndarray:
        """The decoded image, uint8 (H, W, 3) RGB. NemfError if damaged or changed in size."""
        pixels = decode_image(record.path, record.mirrored)
        if pixels.shape[:2] != record.size:
            raise NemfError(
                f"{record.path}: is {pixels.shape[1]}x{pixels.shape[0]} but was "
                f"{record.size[1]}x{record.size[0]} when indexed; it changed while in use"
            )
        return pixels

    # -- index --------------------------------------------------------------------------------

    def _load(self, cache: Path, first: int | None) -> None:
        key = self._cache_key()
        folder = cache / "index" / f"{self.name}-{self.split}-{key[:24]}"
        tables = _read_index(folder)
        if tables is None:
            pairs, images = self._build()
            _write_index(folder, pairs, images)
        else:
            pairs, images = tables
        meta = json.loads(pairs.schema.metadata[b"nemf"])
        self.fingerprint: str = meta["fingerprint"]
        if first is not None and first < len(pairs):
            pairs = pairs.slice(0, first).combine_chunks()
            self.fingerprint = hashlib.sha256(
                f"{self.fingerprint} first {first}".encode()
            ).hexdigest()
        self._fill(pairs, images)

    def _cache_key(self) -> str:
        digest = hashlib.sha256()
        facts = [FORMAT, type(self).__qualname__, self.split, str(self.folder.resolve())]
        facts += _reader_sources(type(self))
        digest.update(repr([*facts, self.outside, self.options()]).encode())
        for source in self.sources():
            for entry in _walk(source):
                digest.update(entry.encode())
        return digest.hexdigest()

    def options(self) -> dict[str, Any]:
        """Keywords of the reader beyond the common ones that change what is read."""
        return {}

    def _build(self) -> tuple[pa.Table, pa.Table]:
        raw_images, raw_pairs = self.parse()
        files: dict[str, ImageFile] = {}
        kept: list[RawPair] = []
        bar = tqdm(raw_pairs, desc=f"indexing {self.title} {self.split}", unit="pair", delay=2)
        for pair in bar:
            for name in (pair.src, pair.trg):
                if name not in raw_images:
                    raise NemfError(f"{pair.origin}: names the image {name}, which is not there")
                if name not in files:
                    files[name] = examine_image(raw_images[name].path)
            problems = list(pair_problems(pair, files, outside=self.outside))
            if problems:
                raise NemfError(problems[0])
            kept.append(drop_absent(pair))
        if not kept:
            raise NemfError(f"{self.folder}: the {self.split} list of {self.title} holds no pair")
        seen: set[str] = set()
        for pair in kept:
            if pair.id in seen:
                raise NemfError(f"{self.list_file()}: pair {pair.id} is listed twice")
            seen.add(pair.id)
        return index_tables(kept, {n: raw_images[n] for n in files}, files, self.folder)

    def _fill(self, pairs: pa.Table, images: pa.Table) -> None:
        self._ids: list[str] = pairs["id"].to_pylist()
        self._categories: list[str] = pairs["category"].to_pylist()
        numeric = ["src", "trg", *FLAGS]
        self._columns = {c: pairs[c].combine_chunks().to_numpy(False) for c in numeric}
        for side in ("src", "trg"):
            self._columns[f"{side}_bbox"] = _flat(pairs[f"{side}_bbox"]).reshape(-1, 4)
        lists = pairs["kp_names"].combine_chunks()
        self._offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
        self._kp_names = lists.flatten().to_numpy(zero_copy_only=False)
        self._src_kps = _flat(pairs["src_kps"]).reshape(-1, 2)
        self._trg_kps = _flat(pairs["trg_kps"]).reshape(-1, 2)
        self.images = [
            ImageRecord(
                path=self.folder / row["file"],
                name=row["name"],
                hash=row["hash"],
                size=(row["height"], row["width"]),
                kps=np.asarray(row["kps"], np.float32).reshape(-1, 2),
                kp_names=tuple(row["kp_names"]),
                mirrored=row["mirrored"],
            )
            for row in images.to_pylist()
        ]


@cache
def _reader_sources(reader: type) -> tuple[str, ...]:
    """Hashes of the sources that parsing runs through: an index made by other code is not used."""
    files = {*Path(__file__).parent.glob("*.py"), Path(inspect.getfile(reader))}
    return tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files))


def default_cache() -> Path:
    """``$NEMF_CACHE``, else the platform's user cache folder + ``nemf``."""
    if os.environ.get("NEMF_CACHE"):
        return Path(os.environ["NEMF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemf"


def inside(root: Path, relative: str, origin: str) -> Path:
    """``root / relative``; NemfError if that leads out of ``root``, by its name or, unless
    ``NEMF_FOLLOW_LINKS=1``, by a link below ``root`` (which may be a link itself)."""
    path = root / relative
    parts = Path(relative).parts
    if Path(relative).is_absolute() or ".." in parts:
        raise NemfError(f"{origin}: the path {relative!r} leads out of {root}; use paths below it")
    ancestors = [path, *path.parents[: len(parts) - 1]] if parts else []
    follow = os.environ.get("NEMF_FOLLOW_LINKS") == "1"
    if not follow and any(map(os.path.islink, ancestors)):
        real = os.path.realpath(root)
        if os.path.commonpath([real, os.path.realpath(path)]) != real:
            raise NemfError(
                f"{origin}: the path {relative!r} is a link that leads out of {root}; put the file "
                "itself there, or set NEMF_FOLLOW_LINKS=1 if the link is yours"
            )
    return path


def pair_problems(
    pair: RawPair, files: dict[str, ImageFile], *, outside: str = "refuse"
) -> Iterator[str]:
    """Everything that is wrong with one pair, one line each, naming its file."""
    where = f"{pair.origin}: pair {pair.id}"
    if pair.src_kps.shape != pair.trg_kps.shape or pair.src_kps.ndim != 2:
        yield (
            f"{where} has {len(pair.src_kps)} source but {len(pair.trg_kps)} target keypoints; "
            "the lists must be parallel"
        )
        return
    if len(pair.kp_names) != len(pair.src_kps):
        yield f"{where} has {len(pair.src_kps)} keypoints but {len(pair.kp_names)} names"
        return
    if len(set(pair.kp_names)) < len(pair.kp_names):
        twice = next(n for n in pair.kp_names if pair.kp_names.count(n) > 1)
        yield f"{where} names two of its keypoints {twice!r}; names must be distinct"
    if np.isinf(pair.src_kps).any() or np.isinf(pair.trg_kps).any():
        yield f"{where} has an infinite keypoint coordinate; use null or NaN for an absent one"
    both = ~(np.isnan(pair.src_kps).any(1) | np.isnan(pair.trg_kps).any(1))
    if not both.any():
        yield f"{where} has no keypoint that both images show; correct it or take it off the list"
    for side, name in (("source", pair.src), ("target", pair.trg)):
        if name not in files:
            continue
        height, width = files[name].size
        claimed = pair.src_size if side == "source" else pair.trg_size
        if claimed is not None and claimed != (height, width):
            yield (
                f"{where} is annotated for a {side} image of {claimed[1]}x{claimed[0]}, but {name} "
                f"is {width}x{height}; its keypoints would be misplaced"
            )
        kps = (pair.src_kps if side == "source" else pair.trg_kps)[both]
        if outside == "refuse" and len(kps):
            beyond = np.maximum(-kps, kps - np.array([width - 1, height - 1])).max(1)
            worst = int(np.argmax(beyond))
            if beyond[worst] > SLACK_PX:
                label = np.array(pair.kp_names)[both][worst]
                yield (
                    f"{where}: {side} keypoint {label} at ({kps[worst][0]:g}, {kps[worst][1]:g}) "
                    f"lies outside {name} ({width}x{height}); correct it, or pass outside='keep'"
                )
        box = pair.src_bbox if side == "source" else pair.trg_bbox
        if box is not None:
            yield from box_problems(f"{where}: {side} box", box, width, height)


def box_problems(where: str, box: Sequence[float], width: int, height: int) -> Iterator[str]:
    """What is wrong with an xyxy box of an image of that size."""
    x1, y1, x2, y2 = box
    if not np.isfinite(box).all():
        yield f"{where} {list(box)} is not finite"
    elif x2 <= x1 or y2 <= y1:
        yield f"{where} {list(box)} is empty or turned round; expected x1 < x2 and y1 < y2"
    elif x2 < 0 or y2 < 0 or x1 > width or y1 > height:
        yield f"{where} {list(box)} lies outside its {width}x{height} image"
    elif x1 < -width or y1 < -height or x2 > 2 * width or y2 > 2 * height:
        # a box sets a threshold: one that is far too large makes every answer right
        yield f"{where} {list(box)} reaches far beyond its {width}x{height} image; correct it"


def drop_absent(pair: RawPair) -> RawPair:
    """The pair without the keypoints that one of its images lacks (NaN)."""
    both = ~(np.isnan(pair.src_kps).any(1) | np.isnan(pair.trg_kps).any(1))
    if both.all():
        return pair
    names = tuple(n for n, keep in zip(pair.kp_names, both, strict=True) if keep)
    kept = {"src_kps": pair.src_kps[both], "trg_kps": pair.trg_kps[both], "kp_names": names}
    return RawPair(**{**pair.__dict__, **kept})


def index_tables(
    pairs: list[RawPair],
    raw_images: dict[str, RawImage],
    files: dict[str, ImageFile],
    folder: Path,
) -> tuple[pa.Table, pa.Table]:
    """The checked pairs and their images as two Arrow tables, the fingerprint in the metadata."""
    names = sorted(files)
    number = {name: i for i, name in enumerate(names)}
    annotated = _annotated_keypoints(pairs, raw_images)
    digest = hashlib.sha256()
    rows = []
    for name in names:
        raw, file = raw_images[name], files[name]
        kps, kp_names = annotated[name]
        content = file.hash
        if raw.mirrored:
            content = hashlib.sha256(f"{file.hash} mirrored".encode()).hexdigest()
        digest.update(f"{name} {content} {file.n_bytes} {kp_names}".encode() + kps.tobytes())
        rows.append(
            {
                "name": name,
                "file": os.path.relpath(raw.path, folder),
                "hash": content,
                "height": file.size[0],
                "width": file.size[1],
                "kps": kps.ravel().tolist(),
                "kp_names": list(kp_names),
                "mirrored": raw.mirrored,
            }
        )
    for p in pairs:
        boxes = [None if b is None else [float(v) for v in b] for b in (p.src_bbox, p.trg_bbox)]
        flags = [p.flags.get(f, -1) for f in FLAGS]
        digest.update(repr([p.id, p.category, p.src, p.trg, p.kp_names, boxes, flags]).encode())
        digest.update(np.ascontiguousarray(p.src_kps, np.float32).tobytes())
        digest.update(np.ascontiguousarray(p.trg_kps, np.float32).tobytes())
    absent = [float("nan")] * 4
    floats = pa.list_(pa.float32())
    columns = {
        "id": pa.array([p.id for p in pairs]),
        "category": pa.array([p.category for p in pairs]),
        "src": pa.array([number[p.src] for p in pairs], pa.int32()),
        "trg": pa.array([number[p.trg] for p in pairs], pa.int32()),
        "src_kps": pa.array([np.ravel(p.src_kps).tolist() for p in pairs], floats),
        "trg_kps": pa.array([np.ravel(p.trg_kps).tolist() for p in pairs], floats),
        "kp_names": pa.array([list(p.kp_names) for p in pairs], pa.list_(pa.string())),
        "src_bbox": pa.array(
            [list(p.src_bbox) if p.src_bbox is not None else absent for p in pairs], floats
        ),
        "trg_bbox": pa.array(
            [list(p.trg_bbox) if p.trg_bbox is not None else absent for p in pairs], floats
        ),
    }
    for flag in FLAGS:
        columns[flag] = pa.array([p.flags.get(flag, -1) for p in pairs], pa.int8())
    meta = {b"nemf": json.dumps({"fingerprint": digest.hexdigest()}).encode()}
    return pa.table(columns).replace_schema_metadata(meta), pa.Table.from_pylist(rows)


def _annotated_keypoints(
    pairs: list[RawPair], images: dict[str, RawImage]
) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """Every present keypoint of each image: its own annotation, else what the pairs say of it.

    Where names only number a pair's points (PF-PASCAL lists without MAT files), a name may mean
    another point in another pair; such a point is kept too, under a name of its own.
    """
    known: dict[str, dict[tuple[str, bytes], None]] = {}
    for name, raw in images.items():
        present = ~np.isnan(raw.kps).any(1) if len(raw.kps) else []
        known[name] = dict.fromkeys(_named(raw.kp_names, raw.kps, present))
    for pair in pairs:
        for image, kps in ((pair.src, pair.src_kps), (pair.trg, pair.trg_kps)):
            if not images[image].kp_names:
                known[image].update(dict.fromkeys(_named(pair.kp_names, kps, [True] * len(kps))))
    annotated = {}
    for image, points in known.items():
        met: dict[str, int] = {}
        names = []
        for name, _ in points:
            met[name] = met.get(name, 0) + 1
            names.append(name if met[name] == 1 else f"{name}.{met[name]}")
        kps = np.frombuffer(b"".join(point for _, point in points), np.float32).reshape(-1, 2)
        annotated[image] = (kps, tuple(names))
    return annotated


def _named(
    names: Iterable[str], kps: np.ndarray, present: Iterable[bool]
) -> Iterator[tuple[str, bytes]]:
    """Name and float32 bytes of each present point."""
    points = np.ascontiguousarray(kps, np.float32)
    return ((n, p.tobytes()) for n, p, there in zip(names, points, present, strict=True) if there)


def _reason(problem: Exception) -> str:
    """One line that says what a library complained of, which may have no text of its own."""
    return " ".join(str(problem).split()) or type(problem).__name__


def _box_or_none(box: np.ndarray) -> np.ndarray | None:
    return None if np.isnan(box).any() else box


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _walk(source: Path) -> Iterator[str]:
    """Name, size and modification time of a file, or of every file below a folder."""
    for path, stat in _stats(str(source)):
        if stat is None:  # absent or a dangling link; whoever needs the file will say so
            yield f"{path} absent\n"
        else:
            yield f"{path} {stat.st_size} {stat.st_mtime_ns}\n"


def walk_files(source: Path) -> Iterator[Path]:
    """``source`` itself unless it is a folder, else every file below it, sorted per folder."""
    return (Path(path) for path, _ in _stats(str(source)))


def _stats(source: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Path and status of a file, or of every file below a folder, sorted per folder. On strings
    and directory entries: opening a dataset of 70,000 files must not take seconds."""
    if not os.path.isdir(source):
        yield source, os.stat(source) if os.path.exists(source) else None
        return
    try:
        with os.scandir(source) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as problem:
        raise NemfError(f"{source}: the folder cannot be listed ({problem.strerror})") from None
    for entry in entries:
        try:
            if entry.is_dir():
                yield from _stats(entry.path)
                continue
            stat = entry.stat()
        except OSError:
            stat = None
        yield entry.path, stat


def _read_index(folder: Path) -> tuple[pa.Table, pa.Table] | None:
    """The cached tables, or None where there are none (an unreadable cache is rebuilt)."""
    try:
        if (folder / "sha256").read_bytes() != _index_digest(folder):
            raise NemfError("its checksum is another")
        return read_parquet(folder / "pairs.parquet"), read_parquet(folder / "images.parquet")
    except FileNotFoundError:
        if folder.exists():  # a part is missing
            shutil.rmtree(folder, ignore_errors=True)
        return None
    except (NemfError, OSError) as problem:
        log.warning("index %s cannot be read (%s): building it anew", folder, problem)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _index_digest(folder: Path) -> bytes:
    """Parquet's own checksums do not cover what the columns are called and where they lie."""
    digest = hashlib.sha256()
    for name in ("pairs", "images"):
        digest.update(hashlib.sha256((folder / f"{name}.parquet").read_bytes()).digest())
    return digest.hexdigest().encode()


def _write_index(folder: Path, pairs: pa.Table, images: pa.Table) -> None:
    """Both tables, complete or not at all; a cache that cannot be written only costs time."""
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = draft_beside(folder)
        staging.mkdir()
        for name, table in (("pairs", pairs), ("images", images)):
            pq.write_table(table, staging / f"{name}.parquet", write_page_checksum=True)
        (staging / "sha256").write_bytes(_index_digest(staging))
        os.rename(staging, folder)
    except OSError as problem:
        if not folder.exists():  # otherwise another process was faster with the same index
            log.warning("index cannot be kept in %s (%s); set NEMF_CACHE", folder.parent, problem)
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
