"""NC-Net: a literal restatement, its read-out, the official checkpoint format, its training."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nemf
from baselines.ncnet import NCNet
from nemf.backbones import build_backbone, normalise
from nemf.errors import NemfError
from nemf.pairs import Image
from nemf.supervision import PairBatch, collate_pairs
from tests.conftest import tiny_pixels
from tests.test_cats import texture
from tests.test_convolution import by_taps

TINY: dict[str, Any] = {
    **{"backbone": "resnet_small", "kernel_sizes": (3, 5), "channels": (4, 1)},
    "input_size": 96,
}


@pytest.fixture(scope="module")
def tiny() -> NCNet:
    return NCNet(**TINY, init="random").eval()


@pytest.fixture(scope="module")
def plain() -> NCNet:
    """NC-Net whose consensus changes nothing but the scale, at 16 cells."""
    matcher = NCNet("resnet_small", (3,), (1,), init="random", input_size=256).eval()
    layer = matcher.NeighConsensus.conv[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[1, 0, 0, 1, 1, 1] = 1
        layer.bias.zero_()
    return matcher


def answer(matcher: NCNet, query: np.ndarray, reference: np.ndarray, points: Any) -> np.ndarray:
    return nemf.match(matcher, query, reference, points).points.numpy()


def official_positions(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels to normalised coordinates as the specification writes it, pixels counted from 1."""
    length = np.array([size[1], size[0]])
    return (points - 1 - (length - 1) / 2) * 2 / (length - 1)


# -- a literal restatement ------------------------------------------------------------------------


def literal_filter(c: np.ndarray) -> np.ndarray:
    """(hA, wA, hB, wB)."""
    over_a = c.max((0, 1), keepdims=True)
    over_b = c.max((2, 3), keepdims=True)
    return c * (c / (over_a + 1e-5)) * (c / (over_b + 1e-5))


def literal_scores(matcher: NCNet, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(hA, wA, hB, wB) of raw layer3 features (C, h, w) in float64, step by step."""
    a, b = (x / np.sqrt((x**2).sum(0) + 1e-6) for x in (a, b))
    c = literal_filter(np.einsum("cij,ckl->ijkl", a, b))

    def layers(volume: np.ndarray) -> np.ndarray:
        x = volume[None, None]
        for layer in list(matcher.NeighConsensus.conv)[::2]:
            stored = layer.weight.detach().double().numpy()  # (kA1, out, in, kA2, kB1, kB2)
            natural = np.moveaxis(stored, 0, 2)
            bias = layer.bias.detach().double().numpy()
            x = np.maximum(by_taps(x, natural) + bias.reshape(1, -1, 1, 1, 1, 1), 0)
        return x[0, 0]

    exchanged = layers(c.transpose(2, 3, 0, 1)).transpose(2, 3, 0, 1)
    return literal_filter(layers(c) + exchanged)


def literal_transfer(scores: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Normalised points (N, 2) of B moved into A by the specification's read-out."""
    h, w, hb, wb = scores.shape
    best = scores.reshape(h * w, hb, wb).argmax(0)
    grid_x, grid_y = np.linspace(-1, 1, wb), np.linspace(-1, 1, hb)
    moved = []
    for x, y in points:
        col = max(int((grid_x < x).sum()) - 1, 0)
        row = max(int((grid_y < y).sum()) - 1, 0)
        total, mixed = 0.0, np.zeros(2)
        for dx in (0, 1):
            for dy in (0, 1):
                opposite = grid_x[col + 1 - dx], grid_y[row + 1 - dy]
                share = abs((x - opposite[0]) * (y - opposite[1]))
                cell = best[row + dy, col + dx]
                there = np.linspace(-1, 1, w)[cell % w], np.linspace(-1, 1, h)[cell // w]
                mixed, total = mixed + share * np.array(there), total + share
        moved.append(mixed / total)
    return np.array(moved)


def raw_features(matcher: NCNet, pixels: np.ndarray) -> np.ndarray:
    """Layer3 after its ReLU, of the image resized as the official code does."""
    size = matcher.input_size
    identity = torch.eye(2, 3)[None]
    grid = F.affine_grid(identity, [1, 3, size, size], align_corners=True)
    frame = F.grid_sample(normalise(pixels), grid, align_corners=True)
    with torch.no_grad():
        (tap,) = matcher.FeatureExtraction.model.taps(frame, [6])
    return tap[0].relu().double().numpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_and_answers_follow_the_specification(tiny: NCNet, seed: int) -> None:
    reference, query = texture(seed, 80, 112), texture(seed + 10, 112, 96)
    a, b = raw_features(tiny, reference), raw_features(tiny, query)
    expected = literal_scores(tiny, a, b)
    images = [Image.from_pixels(x) for x in (reference, query)]
    (source,), (target,) = (tiny.encode([x], "query") for x in images)
    with torch.no_grad():
        found = tiny.volume(source.map[None], target.map[None])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.max())

    points = np.random.default_rng(seed).uniform(1, [96, 112], (12, 2)).astype(np.float32)
    moved = literal_transfer(found.numpy(), official_positions(points, (112, 96)))
    length = np.array([112, 80])
    moved = moved * (length - 1) / 2 + 1 + (length - 1) / 2
    official = copy.copy(tiny)
    official.official = True
    np.testing.assert_allclose(answer(official, query, reference, points), moved, atol=1e-3)


def test_the_official_read_out_beyond_the_upper_left_border(tiny: NCNet) -> None:
    """Pixel 0.4, counted from 1, lies left of the first cell: mixed by absolute distances."""
    official = copy.copy(tiny)
    official.official = True
    scores = torch.from_numpy(np.random.default_rng(0).uniform(size=(6, 6, 6, 6)))
    best = scores.flatten(0, 1).argmax(0)
    positions = torch.stack([best % 6 / 5 * 2 - 1, best // 6 / 5 * 2 - 1], 2)
    points = np.array([[-1.01, 0.3], [-0.2, -1.02], [-1.0, -1.0], [1.0, 1.0], [0.2, 0.6]])
    expected = literal_transfer(scores.numpy(), points)
    found = official.transfer(torch.from_numpy(points), positions)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_between_cells_it_is_bilinear_and_beyond_them_constant(tiny: NCNet) -> None:
    positions = torch.zeros(4, 5, 1)
    positions[..., 0] = torch.arange(5.0)  # the column
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-0.75, 0.9], [0.1, -1.0], [-9.0, 0], [3.0, 2]])
    found = tiny.transfer(points, positions)[:, 0]
    np.testing.assert_allclose(found, [0, 4, 0.5, 2.2, 0, 4], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)])
def test_a_grid_of_one_cell_has_an_answer(tiny: NCNet, shape: tuple[int, int]) -> None:
    positions = torch.ones(*shape, 2)
    assert (tiny.transfer(torch.tensor([[0.3, -0.7], [-1.0, 1.0]]), positions) == 1).all()


def test_official_coordinates_are_counted_from_one(tiny: NCNet) -> None:
    official = copy.copy(tiny)
    official.official = True
    query, reference = texture(4, 96, 112), texture(5, 80, 96)
    points = np.float32([[10, 20], [60.5, 44], [100, 3]])
    shifted = answer(official, query, reference, points + 1) - 1
    np.testing.assert_allclose(shifted, answer(tiny, query, reference, points), atol=1e-4)


def test_a_shifted_image_is_followed(plain: NCNet) -> None:
    """What is at x in the query is at x - 34 in the reference, two cells of 255 / 15 px."""
    wide = texture(0, 256, 320)
    points = [[100, 60], [150, 130.5], [200, 200]]
    found = answer(plain, wide[:, :256], wide[:, 34:290], points)
    np.testing.assert_allclose(found - points, [[-34, 0]] * 3, atol=4)


def test_answers_are_in_pixels_of_the_original_images(plain: NCNet) -> None:
    query = texture(1, 256, 256)
    stretched = np.asarray(PIL.Image.fromarray(query).resize((512, 384)))
    points = np.array([[60.0, 70.0], [128.0, 200.0]])
    np.testing.assert_allclose(answer(plain, query, stretched, points), points * [2, 1.5], atol=12)
    np.testing.assert_allclose(answer(plain, stretched, query, points * [2, 1.5]), points, atol=8)


def test_consensus_does_not_care_which_image_is_which(tiny: NCNet) -> None:
    volume = torch.from_numpy(np.random.default_rng(0).uniform(size=(2, 5, 4, 3, 6)))
    double = copy.deepcopy(tiny).double()
    with torch.no_grad():
        there = double.consensus(volume)
        back = double.consensus(volume.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)
    assert there.abs().max() > 0
    torch.testing.assert_close(there, back)


def test_features_that_are_not_finite_are_an_error(tiny: NCNet) -> None:
    broken = copy.deepcopy(tiny)
    broken.FeatureExtraction.model.conv1.weight.data[0, 0, 0, 0] = float("nan")
    image = Image.from_pixels(tiny_pixels(0, 40, 50))
    with pytest.raises(NemfError, match=f"{image.hash[:12]} are not finite"):
        broken.encode([image], "query")


def test_the_paper_s_sizes_are_the_default() -> None:
    matcher = NCNet(init="random")
    shapes = [tuple(layer.weight.shape) for layer in list(matcher.NeighConsensus.conv)[::2]]
    assert shapes == [(5, 16, 1, 5, 5, 5), (5, 16, 16, 5, 5, 5), (5, 1, 16, 5, 5, 5)]
    assert matcher.input_size == 400


# -- weights --------------------------------------------------------------------------------------


def as_official(state: dict[str, Tensor], trunk: str = "model") -> dict[str, Tensor]:
    """A state dict under the names of the official files: the trunk a numbered sequence."""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6"}
    official = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        part, _, rest = key.removeprefix("FeatureExtraction.model.").partition(".")
        if part in numbers:
            key = f"FeatureExtraction.{trunk}.{numbers[part]}.{rest}"
        official[key] = value
    return official


@pytest.fixture
def saved(tiny: NCNet, tmp_path: Path) -> Callable[..., Path]:
    """``saved(change)`` writes the tiny matcher as an official file after ``change(state)``."""

    def save(
        change: Callable[[dict[str, Tensor]], Any] = lambda state: None, trunk: str = "model"
    ) -> Path:
        state = as_official(tiny.state_dict(), trunk)
        change(state)
        content = {
            "epoch": 5,
            "args": argparse.Namespace(ncons_kernel_sizes=[3, 5], ncons_channels=[4, 1], lr=5e-4),
            "state_dict": state,
            "best_test_loss": np.float64(0.5),
            "optimizer": {"state": {}, "param_groups": [{"lr": 5e-4, "params": [0, 1]}]},
            "train_loss": np.zeros(5),
            "test_loss": np.ones(5),
        }
        torch.save(content, tmp_path / "ncnet_pfpascal.pth.tar")
        return tmp_path / "ncnet_pfpascal.pth.tar"

    return save


@pytest.mark.parametrize("trunk", ["model", "vgg"])
def test_an_official_file_is_taken_with_its_sizes(
    tiny: NCNet, saved: Callable[..., Path], trunk: str
) -> None:
    file = saved(trunk=trunk)
    keys = torch.load(file, weights_only=False)["state_dict"].keys()
    assert {"NeighConsensus.conv.0.weight", "NeighConsensus.conv.2.bias"} <= keys
    assert f"FeatureExtraction.{trunk}.6.0.downsample.1.running_mean" in keys
    twin = nemf.build_matcher("ncnet", backbone="resnet_small", input_size=96, weights=file)
    assert twin.weights_hash == tiny.weights_hash
    assert not twin.random_weights
    pair = tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]]
    np.testing.assert_array_equal(answer(twin, *pair), answer(tiny, *pair))


def test_official_files_of_the_old_format_are_read(tiny: NCNet, saved: Any, tmp_path: Path) -> None:
    """torch before 1.6 wrote no archives."""
    content = torch.load(saved(), weights_only=False)
    torch.save(content, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    twin = NCNet("resnet_small", weights=tmp_path / "old.pth.tar")
    assert twin.weights_hash == tiny.weights_hash


def test_a_checkpoint_of_ours_comes_back(tiny: NCNet, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "ours.pth")
    twin = NCNet("resnet_small", weights=tmp_path / "ours.pth", input_size=96)
    assert twin.weights_hash == tiny.weights_hash


def test_no_code_of_a_file_is_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return logging.warning, ("the file's code has run",)

    torch.save({"args": Harmful(), "state_dict": {}}, tmp_path / "harmful.pth.tar")
    with pytest.raises(NemfError, match=r"harmful\.pth\.tar: not a readable weights file"):
        NCNet("resnet_small", weights=tmp_path / "harmful.pth.tar")
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda s: s.pop("NeighConsensus.conv.2.bias"),
            r"this NC-Net on resnet_small: 1 missing \(NeighConsensus.conv.2.bias",
        ),
        (lambda s: s.update({"extra": torch.ones(2)}), r"1 unexpected \(extra"),
        (
            lambda s: s.update({"FeatureExtraction.model.7.0.conv1.weight": torch.ones(2)}),
            "1 unexpected .FeatureExtraction.model.7.0.conv1.weight",
        ),
        (
            lambda s: s.update({"NeighConsensus.conv.0.bias": torch.ones(3)}),
            r"1 misshapen .NeighConsensus.conv.0.bias \(3,\) for \(4,\)",
        ),
        (
            lambda s: s.update({"NeighConsensus.conv.0.bias": torch.full((4,), float("nan"))}),
            r"damaged: 1 not finite \(NeighConsensus.conv.0.bias\)",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("Neigh")],
            "is no NC-Net checkpoint",
        ),
        (
            lambda s: s.update({"NeighConsensus.conv.0.weight": torch.ones(3)}),
            "is no NC-Net checkpoint",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_explained(
    saved: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=rf"ncnet_pfpascal.*{complaint}"):
        NCNet("resnet_small", weights=saved(change))


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"kernel_sizes": (5, 5)}, r"has kernel_sizes \(3, 5\), not \(5, 5\): leave"),
        ({"channels": [16, 1]}, r"has channels \(4, 1\), not \(16, 1\): leave channels out"),
        ({"backbone": "resnet18"}, "does not hold this NC-Net on resnet18"),
        ({"init": "random"}, "not both"),
        ({"backbone_weights": "x.pth"}, "goes with init='head'"),
    ],
)
def test_keywords_that_disagree_with_the_file(
    saved: Callable[..., Path], keywords: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=complaint):
        NCNet(**{"backbone": "resnet_small", "weights": saved()} | keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"kernel_sizes": (4, 3)},
        {"kernel_sizes": (3,)},
        {"kernel_sizes": (), "channels": ()},
        {"channels": (4, 2)},
        {"channels": (0, 1)},
        {"input_size": 16},
    ],
)
def test_sizes_that_mean_nothing_are_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(NemfError, match="must be"):
        NCNet(**TINY | keywords, init="random")


def test_a_learned_trunk_under_a_random_head(tmp_path: Path) -> None:
    trunk = build_backbone("resnet_small", init="random", upto=6, seed=5)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    matcher = NCNet(**TINY, init="head", backbone_weights=tmp_path / "trunk.pth")
    loaded = matcher.FeatureExtraction.model
    assert torch.equal(loaded.conv1.weight, trunk.conv1.weight)
    assert not loaded.is_random
    assert matcher.random_weights  # the head


# -- training -------------------------------------------------------------------------------------


def batch_of(n_pairs: int, side: int = 96) -> PairBatch:
    """Pairs of which the target is the source, shifted by a cell."""
    samples = []
    for k in range(n_pairs):
        wide = texture(20 + k, side, side + 16)
        src, trg = (normalise(np.ascontiguousarray(x))[0] for x in (wide[:, 16:], wide[:, :-16]))
        samples.append((src, trg, torch.tensor([[5.0, 6]]), torch.tensor([[21.0, 6]]), k))
    return collate_pairs(samples)


def test_the_loss_is_the_strangers_score_minus_the_pairs() -> None:
    """Written out pair by pair; one is added so that both parts are positive."""
    matcher = NCNet(**TINY, init="random")
    batch = batch_of(3)

    def score(src: Tensor, trg: Tensor) -> float:
        a, b = (matcher.features(x[None]) for x in (src, trg))
        scores = matcher.volume(a, b)[0].reshape(36, 36).double().numpy()
        powers = np.exp(scores)
        of_b = (powers / powers.sum(0, keepdims=True)).max(0).mean()
        of_a = (powers / powers.sum(1, keepdims=True)).max(1).mean()
        return (of_a + of_b) / 2

    with torch.no_grad():
        pairs = [score(batch.src[i], batch.trg[i]) for i in range(3)]
        strangers = [score(batch.src[(i + 1) % 3], batch.trg[i]) for i in range(3)]
        losses = matcher.loss(batch)
    assert losses["loss_positive"].item() == pytest.approx(1 - np.mean(pairs), rel=1e-5)
    assert losses["loss_negative"].item() == pytest.approx(np.mean(strangers), rel=1e-5)


def test_keypoints_teach_nothing() -> None:
    matcher = NCNet(**TINY, init="random")
    batch = batch_of(2)
    before = matcher.loss(batch)
    batch.src_kps.fill_(50)
    after = matcher.loss(batch)
    assert all(after[name].item() == value.item() for name, value in before.items())


def test_training_raises_the_pairs_above_the_strangers() -> None:
    matcher = NCNet(**TINY, init="random").train()
    batch = batch_of(4)
    parameters = [p for p in matcher.parameters() if p.requires_grad]
    assert len(parameters) == 4  # the consensus layers
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    margins = []
    for _ in range(20):
        losses = matcher.loss(batch)
        loss = sum(losses.values())
        margins.append(1 - loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert margins[-1] > margins[0] + 0.1
