"""SCorrSAN: its context, a literal restatement of its flow, files, two networks that teach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nemf
from baselines.scorrsan import MutualTeaching, SCorrSAN, SpatialContext, around, self_similarity
from experiments.configurations import CONFIGS
from experiments.training_hooks import TellEpoch
from nemf.backbones import normalise
from nemf.errors import NemfError
from nemf.pairs import Image
from nemf.scoring import PROTOCOLS
from nemf.supervision import flow_labels
from tests.conftest import tiny_pixels
from tests.test_cats import texture
from tests.test_chm import batch_of, literal_resize

SMALL_BACKBONE = CONFIGS.parent / "weights" / "resnet_small.pth"
BARE: dict[str, Any] = {"backbone": "resnet_small", "input_size": 96}
TINY = BARE | {"context": 3, "width": 100, "feature_size": 12}
TAUGHT = TINY | {"teaching": {"first_epoch": 0, "first_share": 0.5, "ramp_epochs": 4}}


@pytest.fixture(scope="module")
def tiny() -> SCorrSAN:
    return SCorrSAN(**TINY, init="random").eval()


@pytest.fixture
def taught() -> SCorrSAN:
    """Two networks, of which the peer is another one by more than its seed."""
    matcher = SCorrSAN(**TAUGHT, init="random").train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = matcher.peer.SCEs[0].conv.weight
        weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return matcher


def answer(matcher: SCorrSAN, query: np.ndarray, reference: np.ndarray, points: Any) -> np.ndarray:
    return nemf.match(matcher, query, reference, points).points.numpy()


# -- spatial context ------------------------------------------------------------------------------


def literal_similarity(features: np.ndarray, side: int) -> np.ndarray:
    """(4 side, h, w) of (C, h, w), cell by cell, in the specified order of channels."""
    h, w = features.shape[1:]
    c = side // 2
    offsets = [(i - c, i - c) for i in range(side)]
    offsets += [(i - c, 0) for i in range(side)]
    offsets += [(i - c, c - i) for i in range(side)]
    offsets += [(0, i - c) for i in range(side)]
    out = np.zeros((4 * side, h, w))
    for channel, (dy, dx) in enumerate(offsets):
        for y in range(h):
            for x in range(w):
                if 0 <= y + dy < h and 0 <= x + dx < w:
                    a, b = features[:, y, x], features[:, y + dy, x + dx]
                    out[channel, y, x] = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return out


@pytest.mark.parametrize(("side", "size"), [(1, (3, 4)), (3, (4, 5)), (7, (5, 4))])
def test_self_similarity_follows_the_specification(side: int, size: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(size=(2, 6, *size))
    found = self_similarity(torch.from_numpy(features), side).numpy()
    for one, expected in zip(found, features, strict=True):
        np.testing.assert_allclose(one, literal_similarity(expected, side), atol=1e-12)


def test_nothing_is_similar_to_nothing() -> None:
    assert not self_similarity(torch.zeros(1, 3, 4, 4), 3).any()


def test_the_context_is_projected_beside_the_map() -> None:
    torch.manual_seed(0)
    encoder = SpatialContext(6, 3, 9)
    features = torch.randn(1, 6, 4, 5)
    with torch.no_grad():
        found = encoder(features)[0].numpy()
    joined = np.concatenate([features[0].numpy(), literal_similarity(features[0].numpy(), 3)])
    weight, bias = (
        p.detach().numpy() for p in (encoder.conv.weight[:, :, 0, 0], encoder.conv.bias)
    )
    expected = np.maximum(np.einsum("oc,chw->ohw", weight, joined) + bias[:, None, None], 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# -- the flow -------------------------------------------------------------------------------------


def literal_flow(src: np.ndarray, trg: np.ndarray, cells: int, size: int) -> np.ndarray:
    """(2, size, size) of unit features (C, cells ** 2), in float64."""
    c = src.T @ trg
    c = c * (c / c.max(0, keepdims=True)) * (c / c.max(1, keepdims=True))
    volume = c.reshape([cells] * 4)
    for axis in range(4):
        volume = literal_resize(volume, axis, size)
    axis_norm, flow = np.linspace(-1, 1, size), np.empty((2, size, size))
    for row in range(size):
        for col in range(size):
            scores = volume[:, :, row, col] / 0.02
            share = np.exp(scores - scores.max())
            share /= share.sum()
            x, y = (share.sum(0) * axis_norm).sum(), (share.sum(1) * axis_norm).sum()
            flow[:, row, col] = (x + 1) / 2 * (size - 1) - col, (y + 1) / 2 * (size - 1) - row
    return flow


def test_the_flow_follows_the_specification(tiny: SCorrSAN) -> None:
    frames = [normalise(np.ascontiguousarray(texture(k, 96, 96))) for k in (0, 1)]
    with torch.no_grad():
        src, trg = (tiny.embed(frame) for frame in frames)
        found = tiny.flow(src, trg)[0].numpy()
    assert src.shape == (1, 100, 36)
    expected = literal_flow(src[0].double().numpy(), trg[0].double().numpy(), 6, 12)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_features_are_layer3_before_its_relu_of_unit_length(tiny: SCorrSAN) -> None:
    frame = normalise(np.ascontiguousarray(texture(0, 96, 96)))
    with torch.no_grad():
        (tap,) = tiny.feature_extraction.backbone.taps(frame, [6])
        encoded = tiny.SCEs[0](tap)[0]
        found = tiny.embed(frame)[0]
    assert tap.min() < 0
    expected = encoded / (encoded.square().sum(0) + 1e-6).sqrt()
    torch.testing.assert_close(found, expected.flatten(1))


@pytest.mark.parametrize("official", [False, True])
def test_matching_computes_the_flow_where_points_need_it(tiny: SCorrSAN, official: bool) -> None:
    """The same answers as by the whole flow, inside, on the border and outside the image."""
    matcher = copy.copy(tiny)
    matcher.official = official
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(0, 95, (30, 2)), [[0, 0], [95, 95], [-7, 40], [99, 130]]])
    images = texture(0, 96, 96), texture(1, 96, 96)
    with torch.no_grad():
        query, reference = (tiny.embed(normalise(np.ascontiguousarray(x))) for x in images)
        (flow,) = matcher.flow(reference, query)
        expected = matcher.transfer(torch.from_numpy(points).float(), flow)
    np.testing.assert_allclose(answer(matcher, *images, points), expected, atol=1e-3)


def test_no_points_are_no_answers(tiny: SCorrSAN) -> None:
    assert answer(tiny, texture(0, 96, 96), texture(1, 96, 96), []).shape == (0, 2)


def test_a_shifted_image_is_followed() -> None:
    """By two cells, before any training, through a flow of 64 x 64."""
    matcher = SCorrSAN(
        "resnet_small", width=96, init="head", backbone_weights=SMALL_BACKBONE
    ).eval()
    wide = texture(0)
    points = [[100, 60], [150, 130.5], [200, 200]]
    found = answer(matcher, wide[:, :256], wide[:, 32:288], points)
    np.testing.assert_allclose(found - points, [[-32, 0]] * 3, atol=12)


def test_the_first_channels_begin_as_the_map(tiny: SCorrSAN) -> None:
    features = torch.randn(1, 96, 4, 4, generator=torch.manual_seed(0))
    with torch.no_grad():
        found = tiny.SCEs[0](features)
    torch.testing.assert_close(found[:, :96], features.relu())
    assert found[:, 96:].abs().max() > 0


def test_features_that_are_not_finite_are_an_error(tiny: SCorrSAN) -> None:
    broken = copy.deepcopy(tiny)
    broken.feature_extraction.backbone.conv1.weight.data[0, 0, 0, 0] = float("nan")
    image = Image.from_pixels(tiny_pixels(0, 40, 50))
    with pytest.raises(NemfError, match=f"{image.hash[:12]} are not finite"):
        broken.encode([image], "query")


def test_its_protocol_is_cats_s() -> None:
    """Target to source, 256 squashed, PF-WILLOW over a -1 padding: its code extends CATs'."""
    protocol = PROTOCOLS[SCorrSAN.card.official_protocol]
    assert (protocol.plan.direction, protocol.frame.side) == ("trg2src", 256)
    assert protocol.bases["pfwillow"] == "kps_extent_padded"


# -- weights --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny: SCorrSAN, tmp_path: Path) -> Callable[..., Path]:
    """``saved(change)`` writes the tiny matcher's state dict after ``change(state)``."""

    def save(change: Callable[[dict[str, Tensor]], Any] = lambda state: None) -> Path:
        state = dict(tiny.state_dict())
        change(state)
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "sc.pth")
        return tmp_path / "sc.pth"

    return save


def test_a_checkpoint_comes_back_with_its_sizes(tiny: SCorrSAN, saved: Callable[..., Path]) -> None:
    twin = nemf.build_matcher("scorrsan", **BARE, weights=saved())
    assert twin.weights_hash == tiny.weights_hash
    assert not twin.random_weights
    pair = tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]]
    np.testing.assert_array_equal(answer(twin, *pair), answer(tiny, *pair))


def test_the_official_keys_at_the_paper_s_sizes() -> None:
    state = SCorrSAN("resnet_small", init="random").state_dict()
    head = {k: tuple(v.shape) for k, v in state.items() if not k.startswith("feature_extraction.")}
    assert head == {
        **{"x_normal": (64,), "y_normal": (64,)},
        **{"SCEs.0.conv.weight": (2048, 96 + 28, 1, 1), "SCEs.0.conv.bias": (2048,)},
    }
    assert "feature_extraction.backbone.layer3.1.conv1.weight" in state


def test_what_training_leaves_beside_it_is_dropped(taught: SCorrSAN, tmp_path: Path) -> None:
    torch.save(taught.state_dict(), tmp_path / "both.pth")
    assert any(key.startswith("peer.") for key in taught.state_dict())
    twin = SCorrSAN(**BARE, weights=tmp_path / "both.pth")
    assert not any(key.startswith("peer.") for key in twin.state_dict())
    assert twin.weights_hash == taught.weights_hash
    with torch.no_grad():
        taught.peer.x_normal += 1
        assert twin.weights_hash == taught.weights_hash
        taught.x_normal += 1
        assert twin.weights_hash != taught.weights_hash


def test_the_classifier_is_accepted(tiny: SCorrSAN, saved: Callable[..., Path]) -> None:
    trunk = "feature_extraction.backbone."
    file = saved(lambda s: s.update({f"{trunk}fc.weight": torch.ones(5, 96)}))
    assert SCorrSAN(**BARE, weights=file).weights_hash == tiny.weights_hash


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("SCEs.0.conv.bias"), "this SCorrSAN: 1 missing .SCEs.0.conv.bias"),
        (lambda s: s.update({"extra": torch.ones(2)}), "1 unexpected .extra"),
        (
            lambda s: s.update({"y_normal": torch.ones(3)}),
            r"1 misshapen .y_normal \(3,\) for \(12,\)",
        ),
        (
            lambda s: s.update({"x_normal": torch.full((12,), float("nan"))}),
            r"damaged: 1 not finite \(x_normal\)",
        ),
        (lambda s: s.pop("SCEs.0.conv.weight"), "no SCorrSAN checkpoint .*SCEs.0.conv.weight"),
        (lambda s: s.update({"x_normal": torch.ones(2, 2)}), "no SCorrSAN checkpoint"),
        (
            lambda s: s.update({"SCEs.0.conv.weight": torch.ones(100, 97, 1, 1)}),
            "an encoder of 97 channels, which is no layer3 of 96",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_explained(
    saved: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=rf"sc\.pth.*{complaint}"):
        SCorrSAN(**BARE, weights=saved(change))


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"context": 7}, "has context 3, not 7: leave context out"),
        ({"width": 96}, "has width 100, not 96"),
        ({"feature_size": 64}, "has feature_size 12, not 64"),
        ({"backbone": "resnet18"}, "an encoder of 108 channels"),
        ({"init": "random"}, "not both"),
        ({"teaching": {}}, "teaching goes with init only"),
    ],
)
def test_keywords_that_disagree_with_the_file(
    saved: Callable[..., Path], keywords: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=complaint):
        SCorrSAN(**BARE | {"weights": saved()} | keywords)


@pytest.mark.parametrize("name", ["context", "width", "feature_size", "input_size"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(NemfError, match=f"{name} must be at least 1, not 0"):
        SCorrSAN(**TINY | {name: 0}, init="random")


def test_a_context_has_a_middle() -> None:
    with pytest.raises(NemfError, match="context must be odd, not 4"):
        SCorrSAN(**TINY | {"context": 4}, init="random")


def test_random_weights_are_the_same_every_time() -> None:
    before = torch.get_rng_state()
    a, b = (SCorrSAN(**TAUGHT, init="random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.weights_hash == b.weights_hash
    assert a.weights_hash != a.peer.weights_hash
    assert a.peer.weights_hash == SCorrSAN(**TINY, init="random", init_seed=1).weights_hash
    assert a.random_weights


# -- training -------------------------------------------------------------------------------------


def test_the_share_of_pseudo_labels_grows() -> None:
    teaching = MutualTeaching()
    shares = [teaching.share(epoch) for epoch in (0, 3, 4, 9, 14, 100)]
    assert shares == pytest.approx([0, 0, 0.2, 0.55, 0.9, 0.9])
    assert MutualTeaching(first_epoch=2, ramp_epochs=0).share(2) == pytest.approx(0.9)


@pytest.mark.parametrize(
    "settings",
    [{"first_share": 0.0}, {"first_share": 0.95}, {"last_share": 1.1}, {"weight": -1}],
)
def test_teaching_that_means_nothing_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(NemfError, match="no teaching by"):
        SCorrSAN(**TINY | {"teaching": settings}, init="random")


def test_the_cells_around_labels() -> None:
    labelled = torch.zeros(2, 12, 12, dtype=torch.bool)
    labelled[0, 5, 0] = True
    labelled[1, 11, 11] = labelled[1, 3, 4] = True
    found = around(labelled).numpy()
    for b, y, x in np.ndindex(2, 12, 12):
        near = [abs(y - r) <= 3 and abs(x - c) <= 3 for r, c in torch.nonzero(labelled[b]).tolist()]
        assert found[b, y, x] == any(near)


def test_the_cells_kept_are_those_where_the_flows_agree_most(taught: SCorrSAN) -> None:
    """A share of half of the cells around labels, pair by pair."""
    flow, other = torch.zeros(2, 2, 12, 12), torch.zeros(2, 2, 12, 12)
    other[:, 0] = torch.arange(144.0).view(12, 12)  # the later a cell, the more they differ
    near = torch.zeros(2, 12, 12, dtype=torch.bool)
    near[0, 2] = near[0, 7, :4] = True
    near[1, 11, 3] = True
    kept = taught._kept(flow, other, near)
    assert torch.nonzero(kept[0]).tolist() == [[2, x] for x in range(8)]
    assert torch.nonzero(kept[1]).tolist() == [[11, 3]]  # never none


def test_losses_written_out(taught: SCorrSAN) -> None:
    batch = batch_of(3)
    labels, labelled = flow_labels(batch, 12)
    own, pseudo, n_kept = [], [], 0
    with torch.no_grad():
        losses = taught.loss(batch)
        one, two = (
            net.flow(net.embed(batch.src), net.embed(batch.trg)) for net in (taught, taught.peer)
        )
    for b in range(3):
        for y, x in torch.nonzero(labelled[b]).tolist():
            own += [float((flow[b, :, y, x] - labels[b, :, y, x]).norm()) for flow in (one, two)]
        near = torch.nonzero(around(labelled)[b]).tolist()
        apart = sorted(float((one[b, :, y, x] - two[b, :, y, x]).norm()) for y, x in near)
        apart = apart[: round(len(near) / 2)]
        pseudo += [2 * value for value in apart]
        n_kept += len(apart)
    counts = taught.supervised(batch)
    assert {k: int(v) for k, v in counts.items()} == {
        **{"loss_flow": int(labelled.sum()), "loss_pseudo": n_kept},
    }
    assert losses["loss_flow"].item() == pytest.approx(sum(own) / int(labelled.sum()), rel=1e-4)
    assert losses["loss_pseudo"].item() == pytest.approx(10 * sum(pseudo) / n_kept, rel=1e-4)


def test_parts_of_a_batch_add_up_to_the_whole_s_loss(taught: SCorrSAN) -> None:
    """And their gradients to the whole's, of both networks."""
    batch = batch_of(3)
    counts = taught.supervised(batch)
    parameters = [p for p in taught.parameters() if p.requires_grad]
    assert len(parameters) == 2 * 4
    whole = taught.loss(batch)
    expected = torch.autograd.grad(sum(whole.values()), parameters)
    parts = [taught.loss(part, counts) for part in batch.split(1)]
    assert set(whole) == {"loss_flow", "loss_pseudo"}
    for name, value in whole.items():
        assert sum(part[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-4)
    found = torch.autograd.grad(sum(sum(part.values()) for part in parts), parameters)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() < 1e-2 * theirs.norm()


def test_teaching_begins_with_its_epoch(taught: SCorrSAN) -> None:
    late = SCorrSAN(**TINY | {"teaching": {"first_epoch": 2}}, init="random")
    batch = batch_of(1)
    assert set(late.loss(batch)) == set(late.supervised(batch)) == {"loss_flow"}
    late.epoch = 2
    assert set(late.loss(batch)) == set(late.supervised(batch)) == {"loss_flow", "loss_pseudo"}
    early = taught.supervised(batch)["loss_pseudo"].item()
    taught.epoch = 4
    assert taught.supervised(batch)["loss_pseudo"].item() == pytest.approx(0.9 / 0.5 * early, abs=2)


def test_the_training_tells_the_epoch(taught: SCorrSAN) -> None:
    loader = SimpleNamespace(dataset=SimpleNamespace(epoch=0))
    runner = SimpleNamespace(
        epoch=7, model=nn.ModuleDict({"matcher": taught}), train_dataloader=loader
    )
    TellEpoch().before_train_epoch(runner)
    assert loader.dataset.epoch == taught.epoch == 7


def test_each_network_learns_from_the_other_as_it_is(taught: SCorrSAN) -> None:
    """The gradient of either is that of a distance to a fixed flow."""
    batch = batch_of(2)
    taught.loss(batch)["loss_pseudo"].backward()
    networks = [taught, taught.peer]
    found = [net.SCEs[0].conv.weight.grad.clone() for net in networks]
    flows = [net.flow(net.embed(batch.src), net.embed(batch.trg)) for net in networks]
    kept = taught._kept(*flows, around(flow_labels(batch, 12)[1]))
    for k in (0, 1):
        apart = (flows[k] - flows[1 - k].detach()).norm(dim=1)[kept].mean()
        weight = networks[k].SCEs[0].conv.weight
        (expected,) = torch.autograd.grad(10 * apart, weight)
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[k], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keywords", [TINY, TAUGHT], ids=["labels", "taught"])
def test_training_learns_a_pair_by_heart(keywords: dict[str, Any]) -> None:
    matcher = SCorrSAN(**keywords, init="random").train()
    batch = batch_of(2)
    optimiser = torch.optim.Adam([p for p in matcher.parameters() if p.requires_grad], lr=5e-3)
    seen = []
    for _ in range(25):
        losses = matcher.loss(batch)
        seen.append(losses["loss_flow"].item())
        sum(losses.values()).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert seen[-1] < 0.4 * seen[0]
