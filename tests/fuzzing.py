"""Damaged inputs for every reader of files, and what a reader may do with one.

A :class:`Target` holds valid contents of one file and reads whatever lies in its place: it returns
after having checked what it got, or raises NemfError. Anything else is a fault. Contents are
damaged by bytes and, where the format is known, by structure; all from one seed.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from mmengine.logging import HistoryBuffer
from PIL import Image as PILImage
from scipy.io import savemat

from experiments.accepted_answers import read_listing
from experiments.own_checkpoints import read_own_checkpoint
from experiments.store import Cell
from nemf.checkpoints import fitting_state, read_state
from nemf.datasets.coco import pairs_from_coco
from nemf.datasets.folder import FolderOfPairs
from nemf.datasets.index import PairDataset, decode_image, examine_image
from nemf.datasets.matfile import read_mat
from nemf.datasets.pfpascal import PFPascal, read_pascal_mat
from nemf.datasets.pfwillow import PFWillow
from nemf.datasets.spair import SPair71k
from nemf.datasets.synthetic import synthetic_marker
from nemf.errors import NemfError
from nemf.pairs import Plan
from nemf.predictions import Predictions, dataset_meta, prediction_table, query_list, read_external
from nemf.reading import read_parquet
from nemf.scoring import get_protocol
from reports.records import make_record, metrics, read_record, score_pairs, write_record
from reports.regression import FORMAT as ACCEPTED_FORMAT
from reports.regression_policy import Policy
from reports.results import read_result, result_json, result_of
from reports.tables import TableSpec
from tests.conftest import REPO, WILLOW_HEADER, save_image, write_csv, write_json

PLAN = Plan("src2trg")
CANONICAL = get_protocol("canonical@1")
Damage = Callable[[bytes, random.Random], bytes]


@dataclass
class Target:
    """One reader. ``file``: where it looks; ``seeds``: valid contents; ``damages``: ways to damage
    them; ``read``: reads what is there, checks what it got (AssertionError), or raises NemfError;
    ``names``: a text that every rejection must contain."""

    file: Path
    seeds: list[bytes]
    damages: list[Damage]
    read: Callable[[], None]
    names: str

    def inputs(self, seed: float) -> Iterator[bytes]:
        """Endless damaged contents."""
        rng = random.Random(seed)
        while True:
            content = rng.choice(self.seeds)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                content = rng.choice(self.damages)(content, rng)
            yield content

    def feed(self, content: bytes) -> bool:
        """Whether the reader took the content; False for a rejection that names the file."""
        self.file.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.read()
        except NemfError as refused:
            if self.names not in str(refused):
                raise AssertionError(f"does not name {self.names}: {refused}") from None
            return False
        return True


# -- damage by bytes ------------------------------------------------------------------------------

_WORDS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\0\x80")


def flip(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwrite(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    new = rng.choice((rng.choice(_WORDS), rng.randbytes(rng.randrange(1, 9))))
    return content[:at] + new + content[at + len(new) :]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def splice(content: bytes, rng: random.Random) -> bytes:
    """A part of the content again, or left out, somewhere."""
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return rng.choice((content[:a] + content[b:], content[:b] + content[a:c] + content[b:]))


def grow(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return (
        content[:at]
        + rng.choice((b"\0", b"A", b"\xff", b"\n")) * rng.choice((1, 64, 5000))
        + (content[at:])
    )


BYTES: list[Damage] = [flip, flip, overwrite, cut, splice, grow]

# -- damage by structure --------------------------------------------------------------------------

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 3.5, 1e39, 1e308, -1e308, 2**31, 2**63, -(2**63), 10**400),
    *(math.nan, math.inf, -math.inf, [], {}, [[]], [None], {"": None}, "", " ", "0", "12", "1_0"),
    *("nan", "１２", "true", "../../x", "/etc/passwd", "a\0b", "\n", "\ud800", "é\u202e\u0301😀"),
    *("<script>alert(1)</script>", "x" * 5000, ["x"] * 3000, [[1, 2]] * 3000, "a/b/c", ".", "-"),
]  # fmt: skip


def _places(tree: Any, at: tuple = ()) -> Iterator[tuple]:
    yield at
    items = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree) if isinstance(tree, list) else items
    for key, value in items:
        yield from _places(value, (*at, key))


def change_tree(tree: Any, rng: random.Random) -> Any:
    """A nested structure with one place replaced, left out, doubled or swapped with another."""
    places = list(_places(tree))
    at = rng.choice(places)
    if not at:
        return rng.choice((rng.choice(NASTY), [tree], {"x": tree}))
    parent = tree
    for key in at[:-1]:
        parent = parent[key]
    how = rng.randrange(6)
    if how == 0:
        del parent[at[-1]]
    elif how == 1 and isinstance(parent, list):
        parent.insert(
            rng.randrange(len(parent) + 1), rng.choice((parent[at[-1]], rng.choice(NASTY)))
        )
    elif how == 2 and isinstance(parent, dict):
        parent[rng.choice(("", "x", "kps", "id", 7))] = rng.choice(NASTY)
    elif how == 3 and isinstance(parent[at[-1]], int | float):
        value = parent[at[-1]]
        parent[at[-1]] = rng.choice((-value, value * 1000, str(value), [value], bool(value)))
    else:
        parent[at[-1]] = rng.choice(NASTY)
    return tree


def json_damage(content: bytes, rng: random.Random) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return flip(content, rng)
    text = json.dumps(change_tree(tree, rng))
    how = rng.randrange(12)
    if how == 0:
        depth = rng.choice((10, 500, 100_000))
        text = text.replace(":", ":" + "[" * depth + "]" * depth + ",", 1)
    elif how == 1 and '"' in text:  # a key twice
        text = text.replace("{", '{"src_kps": [[1, 2]], "src_kps": [[1, 2]], ', 1)
    elif how == 2:
        return text.encode("utf-16" if rng.random() < 0.5 else "utf-8-sig", "surrogatepass")
    elif how == 3:
        text += rng.choice(("{}", ",", "\0", "//"))
    return text.encode("utf-8", "surrogatepass")


def csv_damage(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode("utf-8", "replace").split("\n")
    number = rng.randrange(len(lines))
    cells = lines[number].split(",")
    at = rng.randrange(len(cells))
    cell = rng.choice(NASTY)
    text = cell if isinstance(cell, str) else repr(cell)[:2000]
    how = rng.randrange(7)
    if how == 0:
        del cells[at]
    elif how == 1:
        cells.insert(at, text)
    elif how == 2:
        cells[at] = f'"{text}'
    elif how == 3 and len(cells) > 1:
        other = rng.randrange(len(cells))
        cells[at], cells[other] = cells[other], cells[at]
    elif how == 4:
        cells[at] = f"{cells[at]};{text}"
    else:
        cells[at] = text
    lines[number] = ",".join(cells)
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


_BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)
_YAML_NASTY = (
    *("!!python/object/apply:os.system ['true']", "*a", "&a [*a]", "2024-13-45", "0o77", "1_000"),
    *("[" * 3000, "? x", "!!binary ===", "!!set {a, b}", "~", ".inf", ".nan", "0x", "!!float x"),
)  # fmt: skip


def yaml_damage(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    how = rng.randrange(5)
    if "&" in text:  # it may be the bomb already, which nobody should open
        return rng.choice(BYTES)(content, rng)
    if how == 0:
        return (_BOMB + text + "\ntitle: *n\n").encode()
    if how == 1:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(_YAML_NASTY)
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if how == 2:
        lines = text.split("\n")
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    try:
        tree = change_tree(yaml.safe_load(text), rng)
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return flip(content, rng)


def mat_damage(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed inside the compressed elements, or the whole packed as such an element."""
    inner = content[128:]
    if content[128:132] == b"\x0f\0\0\0":
        try:
            inner = zlib.decompress(content[136:])
        except zlib.error:
            return flip(content, rng)
    packed = zlib.compress(rng.choice(BYTES)(inner, rng))
    return content[:128] + struct.pack("<II", 15, len(packed)) + packed


def png_damage(content: bytes, rng: random.Random) -> bytes:
    """Another header with a right checksum."""
    if content[:4] != b"\x89PNG" or len(content) < 33:
        return flip(content, rng)
    sides = [rng.choice((0, 1, 7, 40, 65_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
    head = b"IHDR" + struct.pack(">II", *sides) + content[24:29]
    if rng.random() < 0.5:
        head = head[:12] + bytes(rng.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(5))
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def zip_damage(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed inside an entry of an archive, its checksums right."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
    except Exception:
        return flip(content, rng)
    if not entries:
        return flip(content, rng)
    name = rng.choice([n for n in entries if n.endswith("pkl")] * 3 + list(entries))
    how = rng.randrange(8)
    if how == 0:
        entries.pop(name)
    elif how == 1 and name.endswith("pkl"):
        entries[name] = pickle.dumps(rng.choice(NASTY), protocol=2)
    else:
        entries[name] = rng.choice(BYTES)(entries[name], rng)
    packed = io.BytesIO()
    way = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(packed, "w", way) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    return packed.getvalue()


def parquet_damage(content: bytes, rng: random.Random) -> bytes:
    """Another column, type, number or metadata in a file that is whole."""
    try:
        return _other_parquet(pq.read_table(pa.BufferReader(content)), rng)
    except Exception:  # it is damaged already
        return flip(content, rng)


def _other_parquet(table: pa.Table, rng: random.Random) -> bytes:
    meta = dict(table.schema.metadata or {})
    how, at = rng.randrange(8), rng.randrange(max(table.num_columns, 1))
    name, values = table.column_names[at], table.column(at).to_pylist()
    if how == 0:
        table = table.drop_columns([name])
    elif how == 1 and b"nemf" in meta:
        meta[b"nemf"] = json_damage(meta[b"nemf"], rng)
    elif how == 2:
        table = table.take(pa.array([rng.randrange(table.num_rows) for _ in range(table.num_rows)]))
    elif how == 3:
        table = table.append_column(name, table.column(at))
    elif values:
        row, nasty = (
            rng.randrange(len(values)),
            rng.choice((None, math.nan, math.inf, -5, 1e30, 99)),
        )
        kinds = [table.schema.field(at).type, pa.string(), pa.bool_(), pa.float64(), pa.int64()]
        kinds += [pa.list_(pa.float32()), pa.timestamp("s"), pa.binary()]
        values = [v if i != row else nasty for i, v in enumerate(values)]
        for kind in rng.sample(kinds, len(kinds)):
            try:
                column = pa.array(values if how < 7 else [nasty] * len(values), kind)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                continue
            table = table.set_column(at, name, column)
            break
    file = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(meta), file)
    return file.getvalue().to_pybytes()


# -- readers --------------------------------------------------------------------------------------


def check_dataset(dataset: PairDataset, root: Path) -> None:
    """What every pair of an opened dataset promises."""
    for pair in dataset:
        assert len(pair.src_kps) == len(pair.trg_kps) == len(pair.kp_names) >= 1
        for record, kps, box in (
            (pair.src, pair.src_kps, pair.src_bbox),
            (pair.trg, pair.trg_kps, pair.trg_bbox),
        ):
            assert record.path.resolve().is_relative_to(root.resolve())
            height, width = record.size
            assert np.isfinite(kps).all()
            assert (kps >= -1).all()
            assert (kps <= np.float32([width, height])).all()
            assert box is None or (box[2] > box[0] and box[3] > box[1] and np.isfinite(box).all())


def _numbers(value: Any) -> list[Any]:
    """Every leaf of nested lists, as JSON has it."""
    if isinstance(value, list):
        return [leaf for item in value for leaf in _numbers(item)]
    return [value]


def check_spair_numbers(dataset: PairDataset, file: Path) -> None:
    """The keypoints are numbers that stand in the file as such."""
    fields = json.loads(file.read_bytes())
    for side in ("src", "trg"):
        leaves = [v for v in _numbers(fields[f"{side}_kps"]) if v is not None]
        assert all(type(v) in (int, float) for v in leaves), leaves
        assert all(type(v) in (int, float) for v in fields[f"{side}_bndbox"])
        written = {float(np.float32(v)) for v in leaves}
        assert set(getattr(dataset[0], f"{side}_kps").ravel().tolist()) <= written


def check_scores(predictions: Predictions) -> None:
    """Scores that are there are fractions."""
    scores = score_pairs(predictions, CANONICAL)
    for entry in metrics(scores):
        assert 0 <= entry["pck"] <= 1
        assert entry["low"] is None or 0 <= entry["low"] <= entry["high"] <= 1
    assert (scores.frame["n"] > 0).all()


def targets(folder: Path) -> dict[str, Target]:
    """Every reader by name, on valid files below ``folder``."""
    made: dict[str, Target] = {}
    cache = folder / "cache"

    def add(
        name: str, file: Path, read: Callable[[], None], damages: list[Damage],
        *more: bytes, names: Path | None = None,
    ) -> None:  # fmt: skip
        seeds = [file.read_bytes(), *more]
        made[name] = Target(file, seeds, [*damages * 3, *BYTES], read, str(names or file))

    def opened(cls: type[PairDataset], root: Path, split: str = "test", **options: Any) -> Any:
        dataset = cls(root, split, cache_dir=cache, **options)
        check_dataset(dataset, root)
        return dataset

    # SPair-71k: own copies, so that each target damages one file of a whole dataset
    for part in ("pair", "image", "list", "index"):
        root = folder / f"spair-{part}"
        base, line = root / "SPair-71k", "000001-a-b:cat"
        for seed, stem in enumerate("ab"):
            save_image(base / "JPEGImages" / "cat" / f"{stem}.jpg", seed, 24, 30)
        kps = [[3, 4], [5.5, 6], [20, 10]]
        fields = {"src_imname": "a.jpg", "trg_imname": "b.jpg", "src_imsize": [30, 24, 3]}
        fields |= {"trg_imsize": [30, 24, 3], "category": "cat", "src_kps": kps, "trg_kps": kps}
        fields |= {"src_bndbox": [1, 2, 25, 20], "trg_bndbox": [1, 2, 25, 20]}
        fields |= {"kps_ids": ["0", "1", "2"], "viewpoint_variation": 1, "scale_variation": 0}
        fields |= {"truncation": 3, "occlusion": 0}
        pair = base / "PairAnnotation" / "test" / f"{line}.json"
        own = base / "ImageAnnotation" / "cat" / "a.json"
        listed = base / "Layout" / "large" / "test.txt"
        write_json(pair, fields)
        write_json(own, {"kps": {"0": kps[0], "1": kps[1], "2": kps[2], "3": None}})
        listed.parent.mkdir(parents=True)
        listed.write_text(line + "\n")

        if part == "index":
            made |= _index_targets(root, folder / "index-cache")
            continue

        def read(root: Path = root, part: str = part, pair: Path = pair) -> None:
            dataset = opened(SPair71k, root)
            if part == "pair":
                check_spair_numbers(dataset, pair)

        file = {"pair": pair, "image": own, "list": listed}[part]
        damages = [csv_damage] if part == "list" else [json_damage]
        add(f"SPair {part}", file, read, damages, names=root)

    root = folder / "pascal"
    base = root / "PF-PASCAL"
    for seed, stem in enumerate("ab"):
        save_image(base / "JPEGImages" / f"{stem}.jpg", seed, 24, 30)
        place = base / "Annotations" / "cat" / f"{stem}.mat"
        place.parent.mkdir(parents=True, exist_ok=True)
        savemat(place, {"kps": np.float64([[3, 4], [np.nan, 1], [7, 8]]), "bbox": [[1, 2, 25, 20]]})
    header = ["source_image", "target_image", "class", "flip"]
    rows = [["x/a.jpg", "x/b.jpg", 8, 0], ["x/b.jpg", "x/a.jpg", 8, 1]]
    write_csv(base / "trn_pairs.csv", header, rows)
    add("PF-PASCAL list", base / "trn_pairs.csv", lambda: opened(PFPascal, root, "trn"),
        [csv_damage], names=root)  # fmt: skip
    bare = folder / "bare"
    for seed, stem in enumerate("ab"):
        save_image(bare / "PF-PASCAL" / "JPEGImages" / f"{stem}.jpg", seed, 24, 30)
    header = ["source_image", "target_image", "class", "XA", "YA", "XB", "YB"]
    row = ["x/a.jpg", "x/b.jpg", 8, "3;4.5;nan", "4;5;nan", "7;8;nan", "9;1;nan"]
    write_csv(bare / "PF-PASCAL" / "test_pairs.csv", header, [row])
    add("PF-PASCAL list with keypoints", bare / "PF-PASCAL" / "test_pairs.csv",
        lambda: opened(PFPascal, bare), [csv_damage], names=bare)  # fmt: skip

    root_w = folder / "willow"
    for seed, stem in enumerate("ab"):
        save_image(root_w / "PF-WILLOW" / "car(S)" / f"{stem}.png", seed, 24, 30)
    rows = [["r/car(S)/a.png", "r/car(S)/b.png", *(k + 0.5 for k in range(1, 21)), *range(1, 21)]]
    write_csv(root_w / "PF-WILLOW" / "test_pairs.csv", WILLOW_HEADER, rows)
    add("PF-WILLOW list", root_w / "PF-WILLOW" / "test_pairs.csv", lambda: opened(PFWillow, root_w),
        [csv_damage], names=root_w)  # fmt: skip

    own_pairs = [
        {"src": "a.png", "trg": "b.png", "id": "one", "category": "cup", "kp_names": ["l", "r"],
         "src_kps": [[3, 4], None], "trg_kps": [[5, 6], [7, 8]], "src_bbox": [1, 2, 22, 20],
         "trg_bbox": [2, 1, 21, 20]},
        {"src": "b.png", "trg": "a.png", "src_kps": [[5, 6]], "trg_kps": [[30, 2]],
         "src_bbox": [1, 2, 22, 20], "trg_bbox": [2, 1, 21, 20]},
    ]  # fmt: skip
    for kind in ("json", "csv"):
        place = folder / f"own-{kind}"
        for seed, stem in enumerate("ab"):
            save_image(place / f"{stem}.png", seed, 24, 30)
        if kind == "json":
            write_json(place / "pairs.json", own_pairs)
        else:
            header = ["src", "trg", "category", "XA", "YA", "XB", "YB", "src_bbox", "trg_bbox"]
            row = [
                "a.png",
                "b.png",
                "cup",
                "3;nan",
                "4;nan",
                "5;7",
                "6;8",
                "1;2;22;20",
                "2;1;21;20",
            ]
            write_csv(place / "pairs.csv", header, [row])
        damage = json_damage if kind == "json" else csv_damage
        add(f"own pairs {kind}", place / f"pairs.{kind}",
            lambda place=place: opened(FolderOfPairs, place), [damage], names=place)  # fmt: skip

    # MATLAB files, images
    mat = folder / "x.mat"
    contents = []
    for packed in (False, True):
        variables = {"kps": np.arange(8.0).reshape(4, 2), "bbox": np.float64([[1, 2, 3, 4]])}
        variables |= {"text": "abc", "cell": np.array([1, "x"], object)}
        savemat(mat, variables, do_compression=packed)
        contents.append(mat.read_bytes())

    def read_matlab() -> None:
        assert all(v.dtype == np.float64 and v.ndim >= 2 for v in read_mat(mat).values())
        kps, box = read_pascal_mat(mat)
        assert kps.shape[1] == 2
        assert box is None or len(box) == 4

    add("MAT", mat, read_matlab, [mat_damage], contents[0])
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        image = folder / f"image-{kind}"
        variants = []
        for mode in ("RGB", "L", "P", "RGBA", "1"):
            picture = PILImage.open(save_image(folder / "x.png", 3, 20, 28)).convert(mode)
            try:
                packed = {"TIFF": {"compression": "tiff_lzw"}}.get(kind, {})
                picture.save(image, kind, **(packed if mode in ("RGB", "L") else {}))
            except OSError:
                continue
            variants.append(image.read_bytes())

        def read_image(image: Path = image) -> None:
            known = examine_image(image)
            pixels = decode_image(image)
            assert pixels.dtype == np.uint8
            assert pixels.shape == (*known.size, 3)

        add(f"image {kind}", image, read_image, [png_damage] if kind == "PNG" else BYTES, *variants)

    # predictions
    dataset = SPair71k(folder / "spair-index", cache_dir=cache)
    oriented = [pair.oriented(PLAN) for pair in dataset]
    rows_of = [(i, o, o.reference_kps + np.float32(1), None) for i, o in enumerate(oriented)]
    meta = dataset_meta(dataset, PLAN) | {"matcher": {"name": "m", "label": "m"}}
    file = folder / "predictions.parquet"
    Predictions(prediction_table(rows_of), meta).write(file)
    add("predictions", file, lambda: check_scores(Predictions.read(file)), [parquet_damage])
    record = folder / "record.json"
    write_record(record, make_record(score_pairs(Predictions.read(file), CANONICAL), "0", {}))
    add("score record", record, lambda: _checked_record(read_record(record)), [json_damage])
    answers = query_list(dataset, PLAN)
    answers["x"], answers["y"] = answers["query_x"] + 1, answers["query_y"]
    answers["confidence"] = 0.5
    for suffix in ("csv", "parquet"):
        sheet = folder / f"answers.{suffix}"
        if suffix == "csv":
            sheet.write_text(answers.to_csv(index=False))
        else:
            answers.to_parquet(sheet)
        add(f"answers {suffix}", sheet,
            lambda sheet=sheet: check_scores(read_external(sheet, dataset, PLAN, "m")),
            [csv_damage] if suffix == "csv" else [parquet_damage])  # fmt: skip

    cell = Cell(folder / "cell", "key")
    cell.commit(0, prediction_table(rows_of))
    (chunk,) = cell.folder.glob("chunks/*")
    kept = Predictions.read(file).table.to_pylist()

    def read_chunk() -> None:
        if 0 not in cell.finished_chunks():  # it is predicted anew, so nothing has to be said
            raise NemfError(f"{chunk} is gone")
        assert repr(read_parquet(chunk).to_pylist()) == repr(kept)  # NaN equals NaN by its name

    add("chunk", chunk, read_chunk, BYTES)
    result = folder / "result.json"
    told = make_record(
        score_pairs(Predictions.read(file), CANONICAL), "a" * 64, {"commit": "b" * 40}
    )
    result.write_text(result_json(result_of(told)))
    add("result", result, lambda: _checked_result(read_result(result)), [json_damage])

    def read_coco() -> None:
        shutil.rmtree(folder / "coco" / "out", ignore_errors=True)
        pairs_from_coco(coco, folder / "coco" / "images", folder / "coco" / "out", common=2)
        opened(FolderOfPairs, folder / "coco" / "out")

    coco = folder / "coco" / "coco.json"
    listed = [
        {"image_id": k, "category_id": 1, "bbox": [1, 2, 20, 15], "iscrowd": 0,
         "keypoints": [3, 4, 2, 5.5, 6, 2, 9, 9, 1]}
        for k in (1, 2)
    ]  # fmt: skip
    images = [{"id": k, "file_name": f"{k}.png", "width": 30, "height": 24} for k in (1, 2)]
    for image in images:
        save_image(coco.parent / "images" / image["file_name"], image["id"], 24, 30)
    classes = [{"id": 1, "name": "dog", "keypoints": ["l", "r", "t"]}]
    write_json(coco, {"images": images, "annotations": listed, "categories": classes})
    add("COCO keypoints", coco, read_coco, [json_damage], names=coco.parent)

    # settings
    spec = folder / "table.yaml"
    spec.write_bytes((REPO / "experiments" / "tables" / "table1.yaml").read_bytes())
    other = (REPO / "experiments" / "tables" / "table2.yaml").read_bytes()
    add(
        "table specification",
        spec,
        lambda: _checked_spec(TableSpec.load(spec)),
        [yaml_damage],
        other,
    )
    policy = folder / "regress.yaml"
    policy.write_bytes((REPO / "experiments" / "regress.yaml").read_bytes())
    add("regression policy", policy, lambda: _checked_policy(Policy.load(policy)), [yaml_damage])
    marker = folder / "marked" / "SYNTHETIC.json"
    write_json(marker, {"synthetic": True, "generator": "g@1", "seed": 0, "preset": "tiny"})
    add("synthetic marker", marker, lambda: synthetic_marker(marker.parent), [json_damage])
    accepted = folder / "accepted" / "accepted.json"
    accepted.parent.mkdir()
    stored = json.loads((REPO / "experiments" / "accepted" / "accepted.json").read_bytes())
    write_json(accepted, stored | {"format": ACCEPTED_FORMAT})
    add("accepted answers", accepted, lambda: read_listing(accepted.parent), [json_damage])

    # checkpoints
    weights = folder / "weights.pth"
    state = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.bias": torch.ones(3),
        "n": torch.ones(1),
    }
    old = folder / "old.pth"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "epoch": 3, "best_loss": 0.5}, weights)

    def read_weights() -> None:
        loaded = fitting_state(weights, read_state(weights), state, unexpected=(), holds="a model")
        for key, value in loaded.items():
            assert value.shape == state[key].shape
            assert torch.isfinite(value).all()

    add("weights", weights, read_weights, [zip_damage], old.read_bytes())
    resume = folder / "epoch_1.pth"
    history = HistoryBuffer()
    history.update(0.5)
    content = {"meta": {"epoch": 1, "seed": 3, "cfg": "x = 1"}, "state_dict": state}
    content |= {"message_hub": {"log_scalars": {"train/loss": history}, "n": np.float64(1.5)}}
    torch.save(content, resume)
    add("resumed training", resume, lambda: read_own_checkpoint(str(resume)), [zip_damage])
    return made


def _index_targets(root: Path, cache: Path) -> dict[str, Target]:
    """The cached index: a damaged one is built anew, so the dataset is what it was."""
    whole = SPair71k(root, cache_dir=cache)
    (place,) = (cache / "index").iterdir()
    made = {}
    for name in ("pairs", "images"):
        file = place / f"{name}.parquet"
        kept = {p: p.read_bytes() for p in place.iterdir()}

        def read(kept: dict[Path, bytes] = kept, file: Path = file) -> None:
            again = SPair71k(root, cache_dir=cache)
            assert again.fingerprint == whole.fingerprint
            assert np.array_equal(again[0].src_kps, whole[0].src_kps)
            assert again[0].src.hash == whole[0].src.hash
            for path, content in kept.items():
                path.parent.mkdir(exist_ok=True)
                if path != file:
                    path.write_bytes(content)

        made[f"index {name}"] = Target(file, [file.read_bytes()], BYTES, read, str(root))
    return made


def _checked_record(record: dict[str, Any]) -> None:
    for entry in record["metrics"]:
        assert type(entry["pck"]) in (int, float)
        assert 0 <= entry["pck"] <= 1
        assert entry["alpha"] in record["alphas"]


def _checked_result(result: dict[str, Any]) -> None:
    assert all(0 <= entry["pck"] <= 1 for entry in result["scores"])


def _checked_spec(spec: TableSpec) -> None:
    assert all(isinstance(text, str) for text in (spec.name, spec.title, spec.split))
    assert all(alpha > 0 and math.isfinite(alpha) for alpha in spec.alphas)
    assert all(grid > 0 for grid in spec.oracle_grids)


def _checked_policy(policy: Policy) -> None:
    assert policy.suite.threads >= 1
    assert math.isfinite(policy.cost.level)
    assert policy.cells()
