"""A row of a table is one method: others of its name are refused, mistyped configs are named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.configurations import load_config
from experiments.prediction import predict
from experiments.store import check_row, slot_folder
from nemf.errors import NemfError
from nemf.pairs import Plan
from nemf.predictions import Predictions
from reports.comparison import find_runs
from reports.records import current_predictions, read_record

PLAN = Plan("src2trg")
COPY = "label = 'mine'\nmodel = dict(type='copy')\nbatch = 4\n"


def written(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}/pfwillow"


@pytest.mark.parametrize(
    ("right", "wrong", "entry"),
    [
        ("label =", "lable =", "label"),
        ("batch =", "batc =", "batch"),
        ("model =", "modle =", "model"),
        ("batch = 4", "batch = 4; recipee = 'nemf_small'", "recipe"),
        ("batch = 4", "batch = 4; sed = 3", "seed"),
    ],
)
def test_a_mistyped_entry_is_named(tmp_path: Path, right: str, wrong: str, entry: str) -> None:
    with pytest.raises(NemfError, match=rf"mine\.py/pfwillow: unknown entry .*mean '{entry}'"):
        load_config(written(tmp_path, COPY.replace(right, wrong)))


def test_an_entry_of_ones_own_is_let_alone(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, COPY + "width = 3\n")).width == 3


@pytest.mark.parametrize("label", ["''", "3", "None"])
def test_a_label_is_a_text(tmp_path: Path, label: str) -> None:
    with pytest.raises(NemfError, match=r"mine\.py/pfwillow: label must be a text"):
        load_config(written(tmp_path, COPY.replace("'mine'", label)))


def test_a_mistyped_keyword_is_named(tiny_pfwillow: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config("nearest_small/pfwillow", {"model.windw": 3})
    with pytest.raises(NemfError, match=r"nearest, small.*'windw' \(did you mean 'window'\?\)"):
        predict(config, data=tiny_pfwillow(), out=tmp_path, plan=PLAN)


def test_a_mistyped_recipe_is_named(tiny_pfwillow: Callable[..., Path], tmp_path: Path) -> None:
    text = "label = 'm'\nmodel = dict(type='nemf')\nbatch = 4\nrecipe = 'nemf_smal'\n"
    config = load_config(written(tmp_path, text))
    with pytest.raises(NemfError, match=r"called 'nemf_smal' \(did you mean 'nemf_small'"):
        predict(config, data=tiny_pfwillow(), out=tmp_path, plan=PLAN)


def test_another_methods_row_is_not_taken(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root, out = tiny_pfwillow(), tmp_path / "out"
    file = predict(load_config("copy/pfwillow"), data=root, out=out, plan=PLAN)
    taken = load_config("nearest_small/pfwillow")
    taken.label = "copy (floor)"
    with pytest.raises(NemfError, match=r"of matcher copy.*give it another label"):
        predict(taken, data=root, out=out, plan=PLAN)
    similar = load_config("copy/pfwillow")
    similar.label = "copy, floor"  # the same folder
    with pytest.raises(NemfError, match=r"'copy, floor' would replace or join 'copy \(floor\)'"):
        predict(similar, data=root, out=out, plan=PLAN)
    dataset = file.parents[2].name
    slot = slot_folder(out, "external-copy (floor)", dataset, str(PLAN))
    with pytest.raises(NemfError, match="of matcher copy"):  # made elsewhere
        check_row(out, slot, "copy (floor)", "copy (floor)")
    assert current_predictions(out) == [file]


def test_the_row_of_answers_made_elsewhere_is_not_taken(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root, out = tiny_pfwillow(), tmp_path / "out"
    file = predict(load_config("copy/pfwillow"), data=root, out=tmp_path / "else", plan=PLAN)
    given = Predictions.read(file)
    given.meta["matcher"] = {"name": "mine", "label": "mine", "external": True}
    slot = slot_folder(out, "external-mine", file.parents[2].name, str(PLAN))
    given.write(slot / "key" / file.name)
    (slot / "current").write_text("key\n")
    check_row(out, slot, "mine", "mine")  # new answers of the same method
    with pytest.raises(NemfError, match="'mine' of predictions made elsewhere"):
        predict(load_config(written(tmp_path, COPY)), data=root, out=out, plan=PLAN)


def test_a_changed_config_under_an_old_label_is_told(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny_pfwillow()
    config = load_config("nearest_small/pfwillow")
    with caplog.at_level(logging.WARNING):
        predict(config, data=root, out=tmp_path, plan=PLAN)
        predict(config, data=root, out=tmp_path, plan=PLAN)
        assert "another config" not in caplog.text
        config.model.input_size = 128
        predict(config, data=root, out=tmp_path, plan=PLAN)
    assert "another config (input_size: 256, now 128)" in caplog.text


@pytest.mark.parametrize("pointer", [b"", b"k\xff", b"../../..", b"0123456789abcdef01234567"])
def test_a_damaged_pointer_is_told(
    tiny_pfwillow: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    pointer: bytes,
) -> None:
    config = load_config("copy/pfwillow")
    file = predict(config, data=tiny_pfwillow(), out=tmp_path, plan=PLAN)
    (file.parents[1] / "current").write_bytes(pointer)
    assert current_predictions(tmp_path) == []
    assert "current: names no prediction" in caplog.text


def test_damaged_and_foreign_files_say_what_to_do(tmp_path: Path) -> None:
    empty, foreign = tmp_path / "predictions.parquet", tmp_path / "notes.json"
    empty.touch()
    foreign.write_text('{"a": 1}')
    with pytest.raises(NemfError, match=r"predictions\.parquet: cannot be read.*predict anew"):
        Predictions.read(empty)
    with pytest.raises(NemfError, match=r"notes\.json: not a score record.*or remove the file"):
        read_record(foreign)


def test_comparing_folders_says_which_file(tmp_path: Path) -> None:
    from nemf.scoring import get_protocol

    names = [(str(tmp_path),), ("copy",)]
    with pytest.raises(NemfError, match=r"is a folder; .* predictions\.parquet"):
        find_runs(tmp_path, names, get_protocol("canonical@1"))
