"""Configs by name and path, and where their weights come from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.configurations import (
    CONFIGS,
    config_names,
    fill_weights,
    load_config,
    trained_file,
    training_config,
)
from experiments.jobs import TABLES
from nemf.cards import available_matchers
from nemf.errors import NemfError, WeightsNotFound
from reports.tables import TableSpec

MATCHERS = config_names("matchers")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("NEMF_WEIGHTS", str(folder))
    return folder


def put(file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    return str(file)


def test_labels_tell_configs_apart() -> None:
    labels = [load_config(f"{name}/spair").label for name in MATCHERS]
    assert len(set(labels)) == len(labels)


def test_every_registered_matcher_has_a_config() -> None:
    used = {load_config(f"{name}/spair").model.type for name in MATCHERS}
    assert used == set(available_matchers())


def test_every_registered_matcher_is_in_table_1() -> None:
    rows = TableSpec.load(TABLES / "table1.yaml").rows(synthetic=False)
    shown = {load_config(f"{name}/spair").model.type for name in rows}
    assert shown == set(available_matchers())


def test_recipes_of_configs_exist() -> None:
    recipes = {load_config(f"{name}/spair").get("recipe") for name in MATCHERS} - {None}
    assert recipes <= set(config_names("training"))


def test_a_matcher_config_of_ones_own_goes_with_every_dataset(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text('label = "mine"\nmodel = dict(type="copy")\nbatch = 3\n')
    config = load_config(f"{mine}/pfwillow")
    assert (config.label, config.dataset.type, config.predict.chunk) == ("mine", "pfwillow", 64)
    with pytest.raises(NemfError, match=r"none\.py: no such matcher config"):
        load_config("none.py/pfwillow")


@pytest.mark.parametrize("name", ["copy", "copy/", "/spair", "coppy/spair", "copy/spair/test"])
def test_a_name_that_is_none_is_an_error(name: str) -> None:
    with pytest.raises(NemfError, match="unknown config"):
        load_config(name)


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("spair", "cats/spair/model_best.pth"),
        ("pfwillow", "cats/pfpascal/model_best.pth"),
        ("animalpose", "cats/spair/model_best.pth"),
    ],
)
def test_the_authors_files_are_taken_by_dataset(dataset: str, file: str, weights: Path) -> None:
    config = load_config(f"cats_resnet101/{dataset}")
    with pytest.raises(WeightsNotFound, match=f"put {file} into"):
        fill_weights(config, weights.parent)
    expected = put(weights / file)
    fill_weights(config, weights.parent)
    assert config.model.weights == expected


def test_a_training_in_the_output_folder_comes_before_the_weights_folder(weights: Path) -> None:
    out = weights.parent
    with pytest.raises(WeightsNotFound, match=r"or put cats_small\.pth"):
        fill_weights(load_config("cats_small/spair"), out)
    elsewhere = put(weights / "cats_small.pth")
    config = load_config("cats_small/spair")
    fill_weights(config, out)
    assert config.model.weights == elsewhere
    here = put(trained_file("cats_small", out))
    config = load_config("cats_small/spair")
    fill_weights(config, out)
    assert config.model.weights == here


def test_weights_that_are_named_win(weights: Path) -> None:
    put(weights / "cats" / "spair" / "model_best.pth")
    for options in ({"model.weights": "mine.pth"}, {"model.init": "random"}):
        config = load_config("cats_resnet101/spair", options)
        fill_weights(config, weights.parent)
        assert config.model.get("weights") == options.get("model.weights")


def test_a_base_that_is_not_there_is_told_where_the_suites_lie(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text('_base_ = "cats_small.py"\n')
    with pytest.raises(NemfError, match=r"own\.py: .*cats_small\.py is not there; .*configs$"):
        training_config(str(own))


def test_the_documented_recipe_starts_from_another(tmp_path: Path) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (recipe,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    own = tmp_path / "own.py"
    own.write_text(recipe.replace('"cats_small.py"', repr(str(CONFIGS / "training/cats_small.py"))))
    config = training_config(str(own))
    assert config.model.matcher == {"type": "mine", "init": "head"}
    assert config.model.pairs_at_once == training_config("cats_small").model.pairs_at_once
    assert config.train_cfg.max_epochs == 4
