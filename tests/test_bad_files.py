"""Files that mean harm: bombs, pickles that run code, paths that lead out, markup, addresses."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader
from PIL import Image as PILImage
from scipy.io import savemat

import nemf
from experiments.configurations import CONFIGS
from experiments.own_checkpoints import newest_checkpoint
from experiments.training import train
from nemf.checkpoints import read_content, read_state
from nemf.datasets.folder import FolderOfPairs
from nemf.datasets.index import PairDataset, decode_image, examine_image
from nemf.datasets.matfile import read_mat
from nemf.datasets.pfpascal import PFPascal
from nemf.datasets.pfwillow import PFWillow
from nemf.datasets.spair import SPair71k
from nemf.errors import NemfError
from nemf.limits import LIMITS, PARQUET_BYTES, TEXT_BYTES
from nemf.predictions import Predictions, query_list, read_external
from nemf.reading import read_json, read_parquet, read_within, read_yaml
from nemf.scoring import get_protocol
from reports.tables import TableSpec
from tests.conftest import REPO, save_image, write_csv, write_json

Make = Callable[..., Path]
SOURCES = [
    path for package in ("nemf", "baselines", "experiments", "reports")
    for path in sorted((REPO / package).rglob("*.py"))
]  # fmt: skip


# -- limits ---------------------------------------------------------------------------------------


def test_limits_are_set_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in LIMITS:
        limit.check("x", limit.default, "holds")
        monkeypatch.setenv(limit.variable, "1_000")
        assert limit.value == 1000
        limit.check("x", 1000, "holds")
        with pytest.raises(NemfError, match=rf"^x: holds 1,001 .*set {limit.variable} higher$"):
            limit.check("x", 1001, "holds")


@pytest.mark.parametrize("text", ["0", "-5", "5e3", "many", "1" * 30, "１"])
def test_a_limit_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEXT_BYTES.variable, text)
    with pytest.raises(NemfError, match=TEXT_BYTES.variable):
        TEXT_BYTES.check("x", 1, "holds")


def huge_png(path: Path, width: int, height: int) -> Path:
    """A small file that decodes to one bit a pixel of black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress(bytes(height * (1 + -(-width // 8))), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize("sides", [(10_000, 10_000), (20_000, 20_000)])
def test_a_hundred_megapixels_are_refused_before_they_are_decoded(
    sides: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is more than Pillow itself lets through."""
    file = huge_png(tmp_path / "huge.png", *sides)
    assert file.stat().st_size < 100_000

    def decoded(*_: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(PILImage.Image, "convert", decoded)
    for read in (examine_image, decode_image):
        with pytest.raises(NemfError, match=r"huge\.png: .* NEMF_MAX_IMAGE_PIXELS higher"):
            read(file)
    with pytest.raises(NemfError, match=r"huge\.png"):
        nemf.match(nemf.build_matcher("copy"), file, file, [[1, 1]])


def test_the_pixel_limit_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = huge_png(tmp_path / "x.png", 640, 480)
    monkeypatch.setenv("NEMF_MAX_IMAGE_PIXELS", str(640 * 480))
    assert decode_image(file).shape == (480, 640, 3)
    monkeypatch.setenv("NEMF_MAX_IMAGE_PIXELS", str(640 * 480 - 1))
    with pytest.raises(NemfError, match="an image of 307,200 pixels, more than 307,199"):
        decode_image(file)


def test_a_larger_limit_than_pillows_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setenv("NEMF_MAX_IMAGE_PIXELS", "400_000")
    assert decode_image(huge_png(tmp_path / "x.png", 640, 480)).shape == (480, 640, 3)


def test_formats_that_start_programs_are_no_images(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript."""
    file = tmp_path / "photo.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with PILImage.open(file) as image:
        assert image.format == "EPS"
    for read in (examine_image, decode_image):
        with pytest.raises(NemfError, match=r"photo\.jpg"):
            read(file)


def test_a_matlab_bomb_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.mat"
    savemat(file, {"kps": np.zeros((1, 1 << 24))}, do_compression=True)
    assert file.stat().st_size < 1 << 20
    with pytest.raises(
        NemfError, match=r"bomb\.mat: unpacks to at least .*NEMF_MAX_UNPACKED_BYTES"
    ):
        read_mat(file)


def test_many_small_elements_share_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.mat"
    savemat(file, {name: np.zeros((1, 500)) for name in "abcd"}, do_compression=True)
    assert set(read_mat(file)) == set("abcd")
    monkeypatch.setenv("NEMF_MAX_UNPACKED_BYTES", "10_000")
    with pytest.raises(NemfError, match="unpacks to at least"):
        read_mat(file)


def deflated(file: Path, extra: int) -> Path:
    """A checkpoint whose entries are compressed, one of ``extra`` zeros."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    with (
        zipfile.ZipFile(buffer) as archive,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in archive.namelist():
            new.writestr(name, archive.read(name))
        new.writestr("archive/data/7", bytes(extra))
    return file


def test_a_zip_bomb_for_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = deflated(tmp_path / "bomb.pth", 100 << 20)
    assert file.stat().st_size < 1 << 20
    for read in (read_state, CheckpointLoader.load_checkpoint):
        with pytest.raises(
            NemfError, match=r"bomb\.pth: unpacks to more .*NEMF_MAX_UNPACKED_BYTES"
        ):
            read(str(file) if read is not read_state else file)
    with monkeypatch.context() as patch:
        patch.setenv("NEMF_MAX_UNPACKED_BYTES", str(200 << 20))
        assert read_state(file)["w"].tolist() == [1, 1]


def test_a_long_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMF_MAX_TEXT_BYTES", "20")
    for name, read in (("x.json", read_json), ("x.yaml", read_yaml), ("x.csv", read_within)):
        (tmp_path / name).write_text(" " * 21)
        with pytest.raises(NemfError, match=rf"{name}: holds 21 bytes, more than 20"):
            read(tmp_path / name)


def test_a_parquet_bomb_is_refused(tmp_path: Path) -> None:
    """Six million times the same number take a few hundred bytes."""
    file = tmp_path / "bomb.parquet"
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(6_000_000, np.int32)), ["x" * 100])
    pq.write_table(pa.table({"pair": column, "x": np.zeros(6_000_000)}), file)
    assert file.stat().st_size < 200_000
    assert read_parquet(file, dictionaries=["pair"]).nbytes < 80_000_000  # the text stays once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PARQUET_BYTES.variable, "90_000_000")
        with pytest.raises(NemfError, match=r"bomb\.parquet: decodes to 96,000,000 bytes"):
            read_parquet(file)


def test_a_yaml_bomb_is_refused(tmp_path: Path) -> None:
    names = "abcdefghijklmnopqrstuvwxyz"
    text = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, other in itertools.pairwise(names):
        text += f"{other}: &{other} [{', '.join([f'*{one}'] * 9)}]\n"
    (tmp_path / "t.yaml").write_text(text + "title: *z\n")
    with pytest.raises(NemfError, match=r"t\.yaml: cannot be read as .*alias"):
        TableSpec.load(tmp_path / "t.yaml")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', "[" * 100_000])
def test_ambiguous_or_bottomless_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(NemfError, match=r"x\.json: cannot be read as JSON"):
        read_json(tmp_path / "x.json")


def test_what_never_ends_is_not_read(tiny_spair: Make, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (examine_image, decode_image, read_state, read_mat, read_json, Predictions.read):
        for path in (pipe, Path("/dev/zero"), tmp_path):
            with pytest.raises(NemfError, match=re.escape(f"{path}: is no regular file")):
                read(path)


# -- pickles that run code ------------------------------------------------------------------------


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "executed")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What must not be there in the end; it is there if a planted pickle is read as usual."""
    file = tmp_path / "executed"
    pickle.loads(pickle.dumps(Planted(file)))
    assert file.exists()
    file.unlink()
    return file


def by_attributes(marker: Path) -> bytes:
    """A pickle that calls nothing but ``getattr`` and MMEngine's history class, and with them gives
    the class another ``np.array``: ``eval``."""
    history = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
    attribute = b"cbuiltins\ngetattr\n"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def of(owner: bytes, name: str) -> bytes:
        return attribute + owner + text(name) + b"\x86R"

    evaluate = of(of(attribute, "__self__"), "eval")
    names = of(of(history, "__init__"), "__globals__")
    code = text(f"__import__('pathlib').Path({str(marker)!r}).write_text('executed') and []")
    fake = history + b")R}" + text("array") + evaluate + b"sb"
    return b"\x80\x02" + names + text("np") + fake + b"s" + history + code + code + b"\x86R."


def checkpoint(file: Path, how: str, marker: Path) -> Path:
    if how == "plain pickle":
        file.write_bytes(pickle.dumps({"state_dict": Planted(marker)}))
    elif how == "old format":
        torch.save({"state_dict": Planted(marker)}, file, _use_new_zipfile_serialization=False)
    elif how == "archive":
        torch.save({"state_dict": {"w": torch.ones(2)}, "args": Planted(marker)}, file)
    else:
        buffer = io.BytesIO()
        torch.save({"w": torch.ones(2)}, buffer)
        with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(file, "w") as new:
            for name in archive.namelist():
                data = by_attributes(marker) if name.endswith("data.pkl") else archive.read(name)
                new.writestr(name, data)
    return file


WAYS = ["plain pickle", "old format", "archive", "attributes"]


@pytest.mark.parametrize("how", WAYS)
def test_a_planted_checkpoint_executes_nothing(how: str, marker: Path, tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "model_best.pth", how, marker)
    readers: list[Callable[[], Any]] = [
        lambda: read_content(file),
        lambda: read_state(file),
        lambda: nemf.build_matcher("cats", backbone="resnet101", weights=file),
        lambda: nemf.build_matcher("nemf", backbone="resnet101", weights=file),
        lambda: nemf.build_matcher("nearest", backbone="resnet18", weights=file),
        lambda: nemf.build_matcher("ncnet", weights=file),
        lambda: nemf.build_matcher("chm", weights=file),
        lambda: CheckpointLoader.load_checkpoint(str(file)),  # what MMEngine resumes from
    ]
    for read in readers:
        with pytest.raises(NemfError, match=r"model_best\.pth"):
            read()
    assert not marker.exists()


def test_the_attribute_trick_is_one(marker: Path, tmp_path: Path) -> None:
    """With ``getattr`` let through, as MMEngine's files ask for, the planted file would run."""
    import mmengine.logging.history_buffer as module

    file = checkpoint(tmp_path / "x.pth", "attributes", marker)
    kept = module.np
    try:
        with torch.serialization.safe_globals([module.HistoryBuffer, getattr]):
            torch.load(file, weights_only=True)
    finally:
        module.np = kept
    assert marker.read_text() == "executed"


RESUMED = {
    "train_dataloader.dataset.per_class": 1,
    "train_dataloader.batch_size": 10,
    "val_dataloader.dataset.per_class": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a training of one epoch."""
    out = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    train("resnet_small", out, {**RESUMED, "train_cfg.max_epochs": 1})
    return out


@pytest.mark.long
@pytest.mark.parametrize("how", WAYS)
def test_a_planted_resume_file_executes_nothing(
    how: str, marker: Path, trained: Path, tmp_path: Path
) -> None:
    """A whole training that is to go on from it."""
    out = shutil.copytree(trained, tmp_path / "out")
    (file,) = (out / "training" / "resnet_small").glob("*/epoch_1.pth")
    checkpoint(file, how, marker)
    torch.set_num_threads(1)
    with pytest.raises(NemfError, match=r"epoch_1\.pth: not a checkpoint of this suite"):
        train("resnet_small", out, {**RESUMED, "train_cfg.max_epochs": 2})
    assert not marker.exists()


@pytest.mark.parametrize("named", ["http://example.org/x.pth", "/etc/passwd", "../epoch_9.pth", ""])
def test_a_training_goes_on_from_its_own_folder_only(named: str, tmp_path: Path) -> None:
    """MMEngine would load whatever ``last_checkpoint`` names, an address too."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "epoch_9.pth").touch()
    (folder / "last_checkpoint").write_text(named)
    assert newest_checkpoint(folder) is None
    (folder / "epoch_1.pth").touch()
    assert newest_checkpoint(folder) == folder / "epoch_1.pth"


def test_arguments_beside_an_official_checkpoint_are_not_read(marker: Path, tmp_path: Path) -> None:
    from nemf.backbones import build_backbone

    file = tmp_path / "model_best.pth"
    file.write_bytes((CONFIGS.parent / "weights" / "resnet_small.pth").read_bytes())
    for name in ("args.pkl", "model_best.pkl", "args.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Planted(marker)))
    build_backbone("resnet_small", file, upto=6)
    nemf.build_matcher("nearest", backbone="resnet_small", layers=(4, 6), weights=file)
    assert not marker.exists()


def test_pickles_in_the_metadata_of_parquet_are_not_read(
    tiny_pfwillow: Make, marker: Path, tmp_path: Path
) -> None:
    """Old Arrow types were pickled into the schema; pandas keeps notes of its own there."""
    planted = pickle.dumps(Planted(marker))
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    kind[b"ARROW:extension:metadata"] = planted
    notes = {b"pandas": planted, b"nemf": planted, b"PANDAS_ATTRS": planted}
    fields = [pa.field("pair", pa.string(), metadata=kind)]
    fields += [pa.field(name, pa.float64(), metadata=kind) for name in ("keypoint", "x", "y")]
    table = pa.table([["a"], [0.0], [1.0], [1.0]], pa.schema(fields, metadata=notes))
    file = tmp_path / "theirs.parquet"
    pq.write_table(table, file)
    dataset = PFWillow(tiny_pfwillow())
    plan = get_protocol("canonical@1").plan
    for read in (lambda: read_external(file, dataset, plan, "m"), lambda: Predictions.read(file)):
        with pytest.raises(NemfError, match=r"theirs\.parquet"):
            read()
    assert not marker.exists()


def test_weights_are_loaded_as_tensors_everywhere() -> None:
    """Nothing here unpickles, and every torch.load says so."""
    loads = 0
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        calls = re.findall(r"torch\.load\([^)]*\)", text)
        loads += len(calls)
        assert all("weights_only=True" in call for call in calls), path
        forbidden = r"pickle\.loads?\b|allow_pickle=True|yaml\.(?:\w+_)?load\((?!.*\bPlain\))"
        forbidden += r"|read_pickle|joblib|torch\.hub\.load|(?<![.\w])(?:eval|exec)\("
        assert re.findall(forbidden, text) == [], path
    assert loads >= 2


# -- what is no number ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"src_bndbox": [2, 3, 50, 1e38]},  # as a threshold it would make every answer right
        {"src_bndbox": [2, 3, 50, 81]},
        {"trg_bndbox": ["1", 2, 30, 40]},
        {"src_kps": [[True, 4], [5, 6], [7, 8]]},
        {"src_kps": [["3", 4], [5, 6], [7, 8]]},
        {"src_kps": [[3, 4, 5], [5, 6], [7, 8]]},
        {"src_kps": {"0": [3, 4], "1": [5, 6], "2": [7, 8]}},
        {"trg_kps": [[1e39, 4], [5, 6], [7, 8]]},
        {"src_imsize": [60.0, 40, 3]},
        {"category": None},
        {"kps_ids": [["0"], "1", "2"]},
    ],
    ids=repr,
)
def test_json_is_taken_by_its_types(fields: dict[str, Any], tiny_spair: Make) -> None:
    root = spair_with(tiny_spair, **fields)
    with pytest.raises(NemfError, match=rf"{re.escape(str(root))}.*\.json: "):
        SPair71k(root)


def test_a_box_may_reach_a_little_beyond_its_image(tiny_spair: Make) -> None:
    assert len(SPair71k(spair_with(tiny_spair, src_bndbox=[-3, 3, 63, 44]))) == 2


@pytest.mark.parametrize("cell", ["1_0", "True", "１２", "0x1f", "1e", "(3)"])
def test_csv_cells_are_numbers_as_they_are_written(
    cell: str, tiny_pfwillow: Make, tiny_folder: Make
) -> None:
    root = tiny_pfwillow()
    for file, at in (
        (root / "PF-WILLOW" / "test_pairs.csv", 5),
        (tiny_folder(kind="csv") / "pairs.csv", 3),
    ):
        header, first, *rest = file.read_text().splitlines()
        cells = first.split(",")
        cells[at] = cell
        file.write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
        with pytest.raises(NemfError, match=rf"{re.escape(str(file))} row 2.*numbers"):
            (PFWillow if "WILLOW" in str(file) else FolderOfPairs)(file.parent)


@pytest.mark.parametrize(("column", "value"), [(2, "8.5"), (2, "True"), (3, "True"), (3, "0.5")])
def test_classes_and_flips_are_whole_numbers(column: int, value: str, tiny_pfpascal: Make) -> None:
    root = tiny_pfpascal(splits=("trn",))
    file = root / "PF-PASCAL" / "trn_pairs.csv"
    header, *rows = file.read_text().splitlines()
    rows = [",".join([*r[:column], value, *r[column + 1 :]]) for r in (r.split(",") for r in rows)]
    file.write_text("\n".join([header, *rows]) + "\n")
    with pytest.raises(NemfError, match=r"(class|flip) must be"):
        PFPascal(root, "trn")


@pytest.mark.parametrize(
    "values",
    [
        pa.array([True] * 30),
        pa.array([10**9] * 30, pa.timestamp("s")),
        pa.array([b"1"] * 30),
        pa.array([[1.0]] * 30),
    ],
    ids=str,
)
def test_answers_in_other_types_are_no_numbers(
    values: pa.Array, tiny_pfwillow: Make, tmp_path: Path
) -> None:
    """pandas would make a coordinate of a date, and ones and zeros of true and false."""
    dataset = PFWillow(tiny_pfwillow())
    queries = query_list(dataset, get_protocol("canonical@1").plan)
    table = pa.table({"pair": queries["pair"], "keypoint": queries["keypoint"]})
    file = tmp_path / "theirs.parquet"
    pq.write_table(table.append_column("x", values).append_column("y", values), file)
    with pytest.raises(NemfError, match=r"theirs\.parquet: its column x holds"):
        read_external(file, dataset, get_protocol("canonical@1").plan, "m")


@pytest.mark.parametrize("cell", ["True", "1" + "0" * 400, "1e39", "2024-01-01"])
def test_answers_in_csv_are_numbers(cell: str, tiny_pfwillow: Make, tmp_path: Path) -> None:
    dataset = PFWillow(tiny_pfwillow())
    queries = query_list(dataset, get_protocol("canonical@1").plan)
    queries["x"], queries["y"] = cell, "1"
    file = tmp_path / "theirs.csv"
    file.write_text(queries.to_csv(index=False))
    with pytest.raises(NemfError, match=r"theirs\.csv.*x (is|holds)"):
        read_external(file, dataset, get_protocol("canonical@1").plan, "m")


# -- paths that lead out --------------------------------------------------------------------------

OUT = ["../secret.png", "../../secret.png", "/tmp/secret.png", "sub/../../secret.png", "link.png"]


@pytest.mark.parametrize("name", OUT)
def test_own_pairs_stay_below_their_folder(name: str, tmp_path: Path) -> None:
    root = tmp_path / "own"
    save_image(tmp_path / "secret.png", 0, 20, 20)
    save_image(root / "a.png", 0, 20, 20)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    pair = {"src": "a.png", "trg": name, "src_kps": [[3, 4]], "trg_kps": [[5, 6]]}
    write_json(root / "pairs.json", [pair])
    with pytest.raises(NemfError, match=r"pairs\.json entry 1: the path .* leads out of"):
        FolderOfPairs(root)
    (root / "pairs.json").unlink()
    row = ["a.png", name, "3", "4", "5", "6"]
    write_csv(root / "pairs.csv", ["src", "trg", "XA", "YA", "XB", "YB"], [row])
    with pytest.raises(NemfError, match=r"pairs\.csv row 2: the path .* leads out of"):
        FolderOfPairs(root)


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    """And the folder of a dataset may be a link itself, as whoever has the data elsewhere makes."""
    root = tmp_path / "disk"
    save_image(root / "images" / "a.png", 0, 20, 20)
    (root / "b.png").symlink_to(root / "images" / "a.png")
    (root / "more").symlink_to(root / "images")
    pair = {"src": "b.png", "trg": "more/a.png", "src_kps": [[3, 4]], "trg_kps": [[5, 6]]}
    write_json(root / "pairs.json", [pair])
    (tmp_path / "own").symlink_to(root)
    assert len(FolderOfPairs(tmp_path / "own")) == 1


def test_links_of_ones_own_are_followed_where_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_image(tmp_path / "disk" / "a.png", 0, 20, 20)
    root = tmp_path / "own"
    root.mkdir()
    (root / "images").symlink_to(tmp_path / "disk")
    pair = {"src": "images/a.png", "trg": "images/a.png", "src_kps": [[3, 4]], "trg_kps": [[5, 6]]}
    write_json(root / "pairs.json", [pair])
    with pytest.raises(NemfError, match="set NEMF_FOLLOW_LINKS=1"):
        FolderOfPairs(root)
    monkeypatch.setenv("NEMF_FOLLOW_LINKS", "1")
    assert len(FolderOfPairs(root)) == 1
    write_json(root / "pairs.json", [pair | {"trg": "../disk/a.png"}])
    with pytest.raises(NemfError, match="leads out of"):
        FolderOfPairs(root)


def spair_with(make: Make, line: str | None = None, **fields: Any) -> Path:
    root = make(splits=("test",))
    base = root / "SPair-71k"
    listed = base / "Layout" / "large" / "test.txt"
    if line is not None:
        listed.write_text(line + "\n")
        return root
    first = listed.read_text().splitlines()[0]
    file = base / "PairAnnotation" / "test" / f"{first}.json"
    write_json(file, read_json(file) | fields)
    return root


@pytest.mark.parametrize("name", ["../../secret.png", "x/../../../secret.png"])
def test_spair_stays_below_its_folder(name: str, tiny_spair: Make, tmp_path: Path) -> None:
    save_image(tmp_path / "secret.png", 0, 40, 60)
    for root in (
        spair_with(tiny_spair, line=name.removesuffix(".png")),
        spair_with(lambda **k: tiny_spair(tmp_path / "a", **k), line="/tmp/secret"),
        spair_with(lambda **k: tiny_spair(tmp_path / "b", **k), src_imname=name),
        spair_with(lambda **k: tiny_spair(tmp_path / "c", **k), category=f"../{name}"),
    ):
        with pytest.raises(NemfError, match="leads out of"):
            SPair71k(root)


def linked(path: Path, secret: Path) -> None:
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)


def test_links_out_of_the_layouts_are_refused(
    tiny_spair: Make, tiny_pfpascal: Make, tiny_pfwillow: Make, tmp_path: Path
) -> None:
    cases: list[tuple[type[PairDataset], Path, str]] = [
        (SPair71k, tiny_spair(splits=("test",)), "SPair-71k/JPEGImages/cat/test_a.jpg"),
        (PFPascal, tiny_pfpascal(splits=("test",)), "PF-PASCAL/JPEGImages/test_a.jpg"),
        (PFWillow, tiny_pfwillow(), "PF-WILLOW/car(S)/car_1.png"),
    ]
    for number, (cls, root, name) in enumerate(cases):
        linked(root / name, tmp_path / f"secret-{number}")
        with pytest.raises(NemfError, match="is a link that leads out of"):
            cls(root)


@pytest.mark.parametrize("cell", ["r/../secret.png", "../x/secret.png", "//secret.png"])
def test_pf_lists_stay_below_their_folder(
    cell: str, tiny_pfpascal: Make, tiny_pfwillow: Make, tmp_path: Path
) -> None:
    """PF-PASCAL takes the name of the file only, so such a path is just not there."""
    for root, cls, name in (
        (tiny_pfwillow(), PFWillow, "PF-WILLOW"),
        (tiny_pfpascal(splits=("test",)), PFPascal, "PF-PASCAL"),
    ):
        save_image(root / name / "secret.png", 0, 30, 44)
        save_image(root / "secret.png", 0, 30, 44)
        file = root / name / "test_pairs.csv"
        header, first, *rest = file.read_text().splitlines()
        cells = first.split(",")
        cells[0] = cell
        file.write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
        with pytest.raises(NemfError, match=f"{re.escape(str(root / name))}"):
            cls(root)


def test_a_table_names_published_figures_by_name_only(tmp_path: Path) -> None:
    import yaml

    spec = yaml.safe_load((REPO / "experiments" / "tables" / "table1.yaml").read_text())
    (tmp_path / "own.yaml").write_text("methods: []")
    spec["published"] = os.path.relpath(tmp_path / "own.yaml", REPO / "reports" / "published")
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(NemfError, match=r"t\.yaml: published must be null or one of"):
        TableSpec.load(tmp_path / "t.yaml")


# -- markup ---------------------------------------------------------------------------------------


def test_every_page_escapes_what_it_shows() -> None:
    """Templates are rendered with autoescape, mark nothing as safe, and their scripts set texts,
    never markup. (That texts stay texts in the browser is held by tests/test_page.py.)"""
    makers = [path for path in SOURCES if "jinja2" in path.read_text(encoding="utf-8")]
    assert makers
    for path in makers:
        text = path.read_text(encoding="utf-8")
        assert text.count("Environment(") == text.count("autoescape=True"), path
    templates = [p for p in sorted((REPO / "reports" / "templates").iterdir()) if p.is_file()]
    assert len(templates) >= 3
    for template in templates:
        text = template.read_text(encoding="utf-8")
        for unsafe in ("|safe", "| safe", "autoescape false", "innerHTML", "outerHTML",
                       "insertAdjacentHTML", "document.write"):  # fmt: skip
            assert unsafe not in text, (template, unsafe)


# -- addresses ------------------------------------------------------------------------------------

_NO_NETWORK = """
import socket, sys, os
def refuse(what):
    def refused(*arguments, **_):
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{what} {arguments[1:] if what != 'lookup' else arguments} {sys.argv}\\n")
        raise OSError("the network is off in this test")
    return refused
inner = socket.socket.connect
def connect(self, address, *more):
    if self.family == socket.AF_UNIX:
        return inner(self, address, *more)
    return refuse("connect")(self, address)
socket.socket.connect = socket.socket.connect_ex = connect
socket.socket.sendto = refuse("sendto")
socket.getaddrinfo = socket.gethostbyname = refuse("lookup")
"""


@pytest.mark.long
def test_no_verb_asks_the_network(tiny_spair: Make, tmp_path: Path) -> None:
    """The chain from data to MLflow in processes whose sockets refuse and tell; telemetry of MLflow
    is off although nobody set its variable."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_NO_NETWORK)
    attempts, out, data = tmp_path / "attempts", tmp_path / "out", tiny_spair(splits=("test",))
    places = [str(tmp_path / "site"), str(REPO), os.environ.get("PYTHONPATH", "")]
    unset = ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI", "MLFLOW_TRACKING_URI", "NEMF_DATA")
    environment = {k: v for k, v in os.environ.items() if k not in (*unset, "PYTEST_CURRENT_TEST")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, places)), "ATTEMPTS": str(attempts)}

    def nemf_does(*arguments: Any) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "experiments.cli", *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    (file,) = write_table_spec(tmp_path)
    nemf_does("data", "verify", "spair", "--data", data)
    nemf_does("predict", "copy/spair", "--data", data, "--out", out)
    nemf_does("score", "--table", file, "--out", out)
    nemf_does("table", file, "--out", out, "--data", data)
    assert (out / "mlflow.db").exists()
    assert not attempts.exists(), attempts.read_text()

    probe = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/')"
    subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, check=False)
    assert attempts.exists()  # the watch itself works


def write_table_spec(folder: Path) -> list[Path]:
    """A small table of SPair-71k alone."""
    import yaml

    spec = yaml.safe_load((REPO / "experiments" / "tables" / "table1.yaml").read_text())
    spec |= {"name": "small", "columns": ["spair"], "extra_columns": [], "published": None}
    spec |= {"matchers": {"real": ["copy"], "synthetic": ["copy"]}}
    spec |= {"protocols": ["canonical@1"]}
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(spec))
    return [file]


def test_downloads_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("it downloads")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.delenv("NEMF_DOWNLOAD", raising=False)
    monkeypatch.setenv("NEMF_WEIGHTS", str(tmp_path))
    with pytest.raises(NemfError, match="--download"):
        nemf.build_matcher("nearest", backbone="resnet18")
    monkeypatch.setenv("NEMF_DOWNLOAD", "1")
    with pytest.raises(AssertionError, match="it downloads"):
        nemf.build_matcher("nearest", backbone="resnet18")


def test_nothing_here_opens_connections() -> None:
    """The one place that fetches is the backbones' download; others talk to processes of their own
    job or to the browser beside them."""
    words = r"\b(import requests|urlopen|http\.client|aiohttp|socket|\w*_url_to_file|urlretrieve)\b"
    fetching = {
        str(path.relative_to(REPO))
        for path in SOURCES
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(words, line) and not line.lstrip().startswith("#")
    }
    assert "nemf/backbones.py" in fetching
    local = {"experiments/ranks.py", "experiments/prediction.py", "nemf/annotation/server.py"}
    assert fetching <= {"nemf/backbones.py"} | local, fetching
