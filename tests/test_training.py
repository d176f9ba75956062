"""Training through the runner: the small backbone of the synthetic job, and matchers on pairs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nemf
from experiments import matcher_training
from experiments.classification import RenderedObjects, render_square
from experiments.configurations import CONFIGS, load_config
from experiments.matcher_training import AutocastOptimWrapper, TrainingPairs
from experiments.prediction import predict
from experiments.training import train
from nemf.backbones import build_backbone, normalise
from nemf.datasets.synthetic_objects import OBJECT_CLASSES
from nemf.errors import NemfError
from nemf.pairs import Plan
from nemf.predictions import Predictions
from nemf.scoring import get_protocol
from reports.records import score_pairs

CONFIG = "resnet_small"
SMALL_BACKBONE = CONFIGS.parent / "weights" / "resnet_small.pth"


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


# -- matchers on annotated pairs ------------------------------------------------------------------


def pair_options(epochs: int, **more: Any) -> dict[str, Any]:
    return {
        "model.matcher.proj_dim": 32,
        "model.matcher.mlp_ratio": 1,
        "model.pairs_at_once": 1,
        "train_dataloader.batch_size": 2,
        "train_dataloader.dataset.pairs_per_epoch": 4,
        "train_dataloader.dataset.dataset.type": "spair",
        "val_dataloader.dataset.type": "nemf.spair",
        "val_cfg.pairs": 2,
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_interval": 1,
        **more,
    }


NEMF = {
    **{"model.matcher.field_width": 32, "model.matcher.iterations": 1},
    "model.matcher.training": {"candidates": 6},
}


@pytest.mark.parametrize("name", ["cats_small", "nemf_small"])
def test_a_matcher_s_training_goes_on_bit_for_bit(
    name: str, tmp_path: Path, tiny_spair: Callable[..., Path]
) -> None:
    """Two epochs at once and one after the other: same weights, same curve."""
    more = NEMF if name == "nemf_small" else {}
    data = tiny_spair()
    unbroken = train(name, tmp_path / "a", pair_options(2, **more), data)
    train(name, tmp_path / "b", pair_options(1, **more), data)
    resumed = train(name, tmp_path / "b", pair_options(2, **more), data)
    states = [torch.load(file, weights_only=True) for file in (unbroken, resumed)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=0, msg=key)
    stories = [file.with_suffix(".json") for file in (unbroken, resumed)]
    curves = [json.loads(story.read_text())["curve"] for story in stories]
    assert [step["epoch"] for step in curves[0] if "loss" in step] == [1, 2]
    assert curves[0] == curves[1]
    matcher = nemf.build_matcher(
        name.removesuffix("_small"), backbone="resnet_small", layers=(4, 6), weights=resumed
    )
    assert not matcher.random_weights
    story = json.loads(resumed.with_suffix(".json").read_text())
    assert story["sha256"] == hashlib.sha256(resumed.read_bytes()).hexdigest()
    assert story["datasets"]["train_dataloader"]["pairs"] == 2
    assert story["validation"]["epoch"] in (1, 2)


def test_a_finished_training_is_not_repeated(
    tmp_path: Path, tiny_spair: Callable[..., Path]
) -> None:
    data = tiny_spair()
    file = train("cats_small", tmp_path, pair_options(1), data)
    before = file.stat().st_mtime_ns
    assert train("cats_small", tmp_path, pair_options(1), data) == file
    assert file.stat().st_mtime_ns == before
    changed = pair_options(1) | {"optim_wrapper.optimizer.lr": 1e-5}
    train("cats_small", tmp_path, changed, data)
    assert file.stat().st_mtime_ns > before
    file.write_bytes(b"damaged")
    train("cats_small", tmp_path, changed, data)
    torch.load(file, weights_only=True)


def test_half_the_bytes_are_the_weights_that_are_told_of(
    tmp_path: Path, tiny_spair: Callable[..., Path]
) -> None:
    """``export_half``, with the recipe whose weights ship for the regression gate."""
    options = pair_options(1) | {"model.matcher.proj_dim": 8}
    file = train("cats_tiny", tmp_path, options, tiny_spair())
    state = torch.load(file, weights_only=True)
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
    matcher = nemf.build_matcher("cats", backbone="resnet_small", layers=(4,), weights=file)
    assert next(matcher.parameters()).dtype == torch.float32
    told = json.loads(file.with_suffix(".json").read_text())
    assert matcher.weights_hash == told["weights_hash"]


def test_what_is_computed_at_once_does_not_change_the_training(
    tmp_path: Path, tiny_spair: Callable[..., Path]
) -> None:
    data, states = tiny_spair(), []
    for at_once in (1, 2):
        options = pair_options(1) | {"model.pairs_at_once": at_once}
        options["optim_wrapper.type"] = "OptimWrapper"  # no rounding to bfloat16
        file = train("cats_small", tmp_path / str(at_once), options, data)
        states.append(torch.load(file, weights_only=True))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=5e-5, msg=key)


def test_averaged_weights_and_a_trained_trunk(
    tmp_path: Path, tiny_spair: Callable[..., Path]
) -> None:
    """EMA through MMEngine's hook, the trunk at a tenth of the rate."""
    data = tiny_spair()
    options = pair_options(1) | {
        "model.matcher.train_trunk": True,
        "optim_wrapper.paramwise_cfg": {
            "custom_keys": {"feature_extraction": {"lr_mult": 0.1}},
        },
    }
    plain = torch.load(train("cats_small", tmp_path / "a", options, data), weights_only=True)
    hooks = [{"type": "TellEpoch"}, {"type": "RecordCurve"}, {"type": "EMAHook", "momentum": 0.5}]
    averaged = torch.load(
        train("cats_small", tmp_path / "b", options | {"custom_hooks": hooks}, data),
        weights_only=True,
    )
    start = nemf.build_matcher(
        "cats", backbone="resnet_small", layers=(4, 6), proj_dim=32, mlp_ratio=1,
        init="head", backbone_weights=SMALL_BACKBONE,
    ).state_dict()  # fmt: skip
    moved = {
        key: (plain[key] - start[key]).abs().max().item()
        for key in ("feature_extraction.backbone.conv1.weight", "decoder.proj.weight")
    }
    trunk, head = moved.values()
    assert 0 < trunk < 0.5 * head
    key = "decoder.proj.weight"
    assert (averaged[key] != plain[key]).any()
    assert plain.keys() == averaged.keys()


def test_a_loss_that_is_not_finite_ends_the_training(
    tmp_path: Path, tiny_spair: Callable[..., Path]
) -> None:
    options = pair_options(1) | {"optim_wrapper.optimizer.lr": 1e30}
    with pytest.raises(NemfError, match="loss is not finite"):
        train("cats_small", tmp_path, options | {"optim_wrapper.clip_grad": None}, tiny_spair())


def test_training_needs_its_data(tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="--data"):
        train("cats_small", tmp_path, pair_options(1))
    with pytest.raises(NemfError, match="unknown training config 'cats_smal'"):
        train("cats_smal", tmp_path, {})


def test_pairs_are_taken_pass_by_pass(tiny_spair: Callable[..., Path]) -> None:
    """Of a dataset of two pairs, epochs of three: passes of both pairs, each in its own order."""
    pairs = TrainingPairs(str(tiny_spair()), {"type": "spair"}, 32, pairs_per_epoch=3, seed=1)
    keypoints = []
    for epoch in range(8):
        pairs.epoch = epoch
        keypoints += [len(pairs[i][2]) for i in range(len(pairs))]  # 3 of the cats, 2 of the dogs
    passes = [tuple(keypoints[i : i + 2]) for i in range(0, 24, 2)]
    assert set(passes) == {(3, 2), (2, 3)}


def test_a_sample_is_a_function_of_its_pass_and_pair(tiny_spair: Callable[..., Path]) -> None:
    root, change = str(tiny_spair()), {"colour": 0.5, "crop": 0.5, "mirror": 0.5}
    one, other = (TrainingPairs(root, {"type": "spair"}, 32, change) for _ in range(2))
    one[1]  # what was drawn before has no influence
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    other.epoch = 1
    assert one[0][4] != other[0][4]


def test_mirrored_pairs_keep_keypoints_on_their_places(tiny_spair: Callable[..., Path]) -> None:
    root = str(tiny_spair())
    plain = TrainingPairs(root, {"type": "spair"}, 64)
    flipped = TrainingPairs(root, {"type": "spair"}, 64, {"colour": 0, "crop": 0, "mirror": 1})
    for k in (0, 1):
        torch.testing.assert_close(flipped[0][2 + k][:, 0], 63 - plain[0][2 + k][:, 0])
        torch.testing.assert_close(flipped[0][2 + k][:, 1], plain[0][2 + k][:, 1])
        apart = (flipped[0][k] - plain[0][k].flip(2)).abs().mean()
        assert apart < 0.1


def test_validation_is_the_score_of_a_prediction_file(
    tmp_path: Path, tiny_spair: Callable[..., Path]
) -> None:
    data = tiny_spair()
    file = train("cats_small", tmp_path, pair_options(1), data)
    told = json.loads(file.with_suffix(".json").read_text())["validation"]["score"]
    config = load_config("cats_small/spair")
    config.dataset.split = "val"
    config.model.weights = str(file)
    predictions = predict(config, data=data, out=tmp_path, plan=Plan("src2trg"))
    scores = score_pairs(Predictions.read(predictions), get_protocol("canonical@1"), [0.1])
    share = (scores.frame["pck-0.10"] / scores.frame["n"]).mean()
    assert told == pytest.approx(share, abs=1e-6)


def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(2, 2)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(matcher_training, "computes_in_bfloat16", lambda _, n=native: n)
        wrapper = AutocastOptimWrapper(torch.optim.SGD(layer.parameters(), 0.1))
        with wrapper.optim_context(layer):
            assert layer(torch.ones(1, 2)).dtype == dtype
