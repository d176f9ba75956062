"""Training through the runner: the small backbone of the synthetic job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.classification import RenderedObjects, render_square
from experiments.configurations import CONFIGS
from experiments.training import train
from nemf.backbones import build_backbone, normalise
from nemf.datasets.synthetic_objects import OBJECT_CLASSES
from nemf.errors import NemfError

CONFIG = CONFIGS / "training" / "resnet_small.py"


def options(epochs: int) -> dict[str, Any]:
    return {
        "train_dataloader.dataset.per_class": 3,
        "train_dataloader.batch_size": 10,
        "val_dataloader.dataset.per_class": 1,
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_interval": 1,
    }


def test_squares_are_a_function_of_their_key() -> None:
    square = render_square((0, 0, 3, 7))
    assert square.shape == (144, 144, 3)
    np.testing.assert_array_equal(square, render_square((0, 0, 3, 7)))
    assert (square != render_square((0, 1, 3, 7))).any()


def test_augmentation_is_drawn_from_epoch_and_index() -> None:
    plain = RenderedObjects(1, "val", 112, augment=False, workers=1)
    drawn = RenderedObjects(1, "val", 112, augment=True, workers=1)
    assert len(plain) == len(OBJECT_CLASSES)
    assert [plain[i]["labels"] for i in range(len(plain))] == list(range(len(plain)))
    assert plain[0]["inputs"].shape == (3, 112, 112)
    first = drawn[2]["inputs"]
    torch.testing.assert_close(drawn[2]["inputs"], first, rtol=0, atol=0)
    drawn.epoch = 1
    assert not torch.equal(drawn[2]["inputs"], first)


def test_a_resumed_training_equals_an_unbroken_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    unbroken = train(CONFIG, tmp_path / "a", options(2))
    train(CONFIG, tmp_path / "b", options(1))
    resumed = train(CONFIG, tmp_path / "b", options(2))
    states = [torch.load(file, weights_only=True) for file in (unbroken, resumed)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=0, msg=key)
    trunk = build_backbone("resnet_small", unbroken, upto=6)
    (tap,) = trunk.taps(normalise(np.zeros((64, 64, 3), np.uint8)), [6])
    assert tap.shape == (1, 96, 4, 4)


def test_a_part_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="export='nothing'"):
        train(CONFIG, tmp_path, {**options(1), "export": "nothing"})


def test_the_shipped_weights_are_small_and_load() -> None:
    file = CONFIGS.parent / "weights" / "resnet_small.pth"
    assert file.stat().st_size <= 2_000_000
    assert not build_backbone("resnet_small", file, upto=6).is_random
