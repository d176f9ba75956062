"""Training batches, flow labels and the losses that matchers learn by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nemf
from nemf.backbones import ResNet
from nemf.errors import NemfError
from nemf.matcher import Matcher
from nemf.supervision import PairBatch, collate_pairs, end_point_error, flow_labels

TRAINABLE: dict[str, dict[str, Any]] = {
    "cats": {"backbone": "resnet_small", "layers": (4, 6), "proj_dim": 32, "mlp_ratio": 1},
    "nemf": {
        **{"backbone": "resnet_small", "layers": (6,), "proj_dim": 32, "mlp_ratio": 1},
        **{"level_channels": 4, "field_width": 32, "training": {"candidates": 8}},
    },
    "ncnet": {
        **{"backbone": "resnet_small", "kernel_sizes": (3, 3), "channels": (4, 1)},
        "input_size": 96,
    },
    "chm": {"backbone": "resnet_small", "input_size": 96},
    "transformatcher": {"backbone": "resnet_small", "input_size": 96, "depth": 1},
    "scorrsan": {  # with its second network in its own tests
        **{"backbone": "resnet_small", "input_size": 96, "width": 100, "feature_size": 12},
    },
    "catspp": {
        **{"backbone": "resnet_small", "layers": (4, 5, 6), "input_size": 96},
        **{"affinity_dim": 16, "query_dim": 32},
    },
}


def trunks_of(matcher: Matcher) -> list[ResNet]:
    return [module for module in matcher.modules() if isinstance(module, ResNet)]


@pytest.fixture(params=sorted(TRAINABLE))
def matcher(request: pytest.FixtureRequest) -> Matcher:
    built = nemf.build_matcher(request.param, init="random", **TRAINABLE[request.param])
    return built.train()


def batch_of(
    src_kps: list[list[list[float]]], trg_kps: list[list[list[float]]], side: int = 256
) -> PairBatch:
    """Pairs with these keypoints and noise for pictures."""
    noise = np.random.default_rng(5)
    frames = noise.normal(size=(2, len(src_kps), 3, side, side)).astype(np.float32)
    points = [[torch.tensor(kps) for kps in side_kps] for side_kps in (src_kps, trg_kps)]
    pictures = torch.from_numpy(frames)
    samples = [
        (pictures[0, i], pictures[1, i], points[0][i], points[1][i], 100 + i)
        for i in range(len(src_kps))
    ]
    return collate_pairs(samples)


def uneven_batch(matcher: Matcher | None = None) -> PairBatch:
    """Three pairs with one, four and two keypoints, of the size that ``matcher`` takes."""
    rng = np.random.default_rng(0)
    counts = (1, 4, 2)
    side = getattr(matcher, "input_size", 256)
    low, high = 20 / 256 * side, 230 / 256 * side
    src, trg = ([rng.uniform(low, high, (n, 2)).tolist() for n in counts] for _ in range(2))
    return batch_of(src, trg, side)


# -- batches --------------------------------------------------------------------------------------


def test_a_batch_pads_what_valid_leaves_out() -> None:
    batch = batch_of([[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]], [[[7.0, 8.0]], [[9.0, 1.0]] * 2])
    assert batch.valid.tolist() == [[True, False], [True, True]]
    assert batch.src_kps.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert batch.trg_kps.tolist() == [[[7, 8], [0, 0]], [[9, 1], [9, 1]]]
    assert batch.seeds.tolist() == [100, 101]
    assert (len(batch), batch.side_px) == (2, 256)


def test_parts_of_a_batch_are_its_pairs_in_order() -> None:
    batch = uneven_batch()
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 1]
    torch.testing.assert_close(torch.cat([p.src for p in parts]), batch.src)
    assert torch.cat([p.seeds for p in parts]).tolist() == batch.seeds.tolist()


def test_every_pair_has_the_next_one_s_source_whatever_the_parts() -> None:
    """Part by part, and in parts of parts, as in the whole batch: in a circle."""
    batch = uneven_batch()
    expected = batch.src[[1, 2, 0]]
    assert torch.equal(batch.src_of_next, expected)
    for sizes in ((1, 1), (2, 1), (2, 2), (3, 1), (5, 2)):
        parts = [part for half in batch.split(sizes[0]) for part in half.split(sizes[1])]
        assert torch.equal(torch.cat([part.src_of_next for part in parts]), expected)
        moved = [part.to(torch.device("cpu")) for part in parts]
        assert torch.equal(torch.cat([part.src_of_next for part in moved]), expected)


def test_a_lone_pair_has_no_next_one() -> None:
    lone = batch_of([[[1.0, 2.0]]], [[[3.0, 4.0]]])
    for batch in (lone, *lone.split(1)):
        with pytest.raises(NemfError, match="batches of two or more"):
            _ = batch.src_of_next


# -- labels ---------------------------------------------------------------------------------------


def literal_labels(batch: PairBatch, size: int, official: bool) -> tuple[np.ndarray, np.ndarray]:
    """The rule of the specification, cell by cell: cell (r, c) of 16 px owns the inclusive box
    16c - 9 .. 16c + 25, 16r - 9 .. 16r + 25."""
    jump = batch.side_px / size
    flow = np.zeros((len(batch), 2, size, size), np.float32)
    labelled = np.zeros((len(batch), size, size), bool)
    for b in range(len(batch)):
        valid = batch.valid[b].numpy()
        src, trg = (x[b].numpy()[valid] for x in (batch.src_kps, batch.trg_kps))
        for r in range(size):
            for c in range(size):
                low = np.array([c, r]) * jump - 9 / 16 * jump
                high = np.array([c, r]) * jump + 25 / 16 * jump
                owned = np.flatnonzero(((trg >= low) & (trg <= high)).all(1))
                if not len(owned):
                    continue
                start = src[owned[-1]] if official else src[owned].mean(0)
                flow[b, :, r, c] = (start - trg[owned].mean(0)) / jump
                labelled[b, r, c] = not official or bool((flow[b, :, r, c] != 0).any())
    return flow, labelled


def test_a_single_keypoint_teaches_the_cells_around_it() -> None:
    """At (24, 40): columns 0 to 2 (centres 8, 24, 40, reach 17), rows 1 to 3."""
    batch = batch_of([[[40.0, 24.0]]], [[[24.0, 40.0]]])
    flow, labelled = flow_labels(batch, 16)
    rows, cols = torch.nonzero(labelled[0], as_tuple=True)
    assert set(zip(rows.tolist(), cols.tolist(), strict=True)) == {
        (r, c) for r in (1, 2, 3) for c in (0, 1, 2)
    }
    assert flow[0, :, 2, 1].tolist() == [1.0, -1.0]  # (40 - 24, 24 - 40) / 16
    assert flow[0, :, 9, 9].tolist() == [0.0, 0.0]


def test_the_box_of_a_cell_is_inclusive() -> None:
    """Cell 1 owns 7 .. 41."""
    for x, owned in ((7.0, True), (41.0, True), (6.9, False), (41.1, False)):
        _, labelled = flow_labels(batch_of([[[90.0, 24.0]]], [[[x, 24.0]]]), 16)
        assert bool(labelled[0, 1, 1]) is owned


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("size", [16, 8])
def test_labels_follow_the_rule(official: bool, size: int) -> None:
    rng = np.random.default_rng(7)
    src, trg = ([rng.integers(0, 256, (9, 2)) * 1.0 for _ in range(3)] for _ in range(2))
    batch = batch_of([x.tolist() for x in src], [x.tolist() for x in trg])
    flow, labelled = flow_labels(batch, size, official)
    expected, where = literal_labels(batch, size, official)
    np.testing.assert_array_equal(labelled.numpy(), where)
    np.testing.assert_allclose(flow.numpy(), expected, atol=1e-5)


def test_officially_no_displacement_is_no_label() -> None:
    batch = batch_of([[[24.0, 40.0]]], [[[24.0, 40.0]]])
    assert flow_labels(batch, 16)[1].sum() == 9
    assert flow_labels(batch, 16, official=True)[1].sum() == 0


def test_end_point_error_by_hand() -> None:
    flow = torch.zeros(1, 2, 2, 2, requires_grad=True)
    labels = torch.zeros(1, 2, 2, 2)
    labels[0, :, 0, 1] = torch.tensor([3.0, 4.0])
    labels[0, :, 1, 1] = 100.0
    labelled = torch.tensor([[[True, True], [False, False]]])
    error = end_point_error(flow, labels, labelled)
    assert error.item() == 5.0
    error.backward()
    assert torch.isfinite(flow.grad).all()  # also where the flow is exactly right
    torch.testing.assert_close(flow.grad[0, :, 0, 1], torch.tensor([-0.6, -0.8]))


# -- losses ---------------------------------------------------------------------------------------


def test_losses_of_the_parts_add_up_to_the_batch_s(matcher: Matcher) -> None:
    """Whatever is computed at once, the gradient is the whole batch's."""
    batch = uneven_batch(matcher)
    whole = matcher.loss(batch)
    sum(whole.values()).backward()
    gradients = {n: p.grad.clone() for n, p in matcher.named_parameters() if p.grad is not None}
    matcher.zero_grad()
    counts, totals = matcher.supervised(batch), dict.fromkeys(whole, 0.0)
    for part in batch.split(1):
        losses = matcher.loss(part, counts)
        sum(losses.values()).backward()
        totals = {name: totals[name] + losses[name].item() for name in totals}
    for name, value in whole.items():
        assert totals[name] == pytest.approx(value.item(), rel=1e-5)
    assert gradients
    for name, parameter in matcher.named_parameters():
        if name in gradients:
            torch.testing.assert_close(
                parameter.grad, gradients[name], rtol=1e-3, atol=2e-5, msg=name
            )


def test_padding_does_not_teach(matcher: Matcher) -> None:
    """What lies in the padded keypoints has no influence."""
    batch = uneven_batch(matcher)
    before = matcher.loss(batch)
    for kps in (batch.src_kps, batch.trg_kps):
        kps[~batch.valid] = 77.0
    after = matcher.loss(batch)
    for name, value in before.items():
        assert after[name].item() == value.item()


def test_every_trainable_part_learns_and_the_trunk_does_not(matcher: Matcher) -> None:
    sum(matcher.loss(uneven_batch(matcher)).values()).backward()
    still = {n for n, p in matcher.named_parameters() if p.requires_grad and p.grad is None}
    assert still == set()
    assert trunks_of(matcher)
    for trunk in trunks_of(matcher):
        assert not [n for n, p in trunk.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", sorted(TRAINABLE))
def test_a_trunk_that_is_trained_keeps_its_statistics(name: str) -> None:
    built = nemf.build_matcher(name, init="random", train_trunk=True, **TRAINABLE[name]).train()
    statistics = [trunk.bn1.running_mean.clone() for trunk in trunks_of(built)]
    sum(built.loss(uneven_batch(built)).values()).backward()
    for trunk, before in zip(trunks_of(built), statistics, strict=True):
        assert trunk.conv1.weight.grad.abs().max() > 0
        assert torch.equal(trunk.bn1.running_mean, before)


@pytest.mark.parametrize("name", ["cats", "nemf"])  # of the others their own tests do it
def test_a_few_steps_learn_a_pair_by_heart(name: str) -> None:
    built = nemf.build_matcher(name, init="random", **TRAINABLE[name]).train()
    built.decoder.proj.weight.data.zero_()
    batch = uneven_batch(built)
    parameters = [p for p in built.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3)
    seen = []
    for _ in range(12):
        loss = sum(built.loss(batch).values())
        seen.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert seen[-1] < 0.8 * seen[0]


def test_under_autocast_a_loss_stays_near_its_value(matcher: Matcher) -> None:
    batch = uneven_batch(matcher)
    exact = matcher.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = matcher.loss(batch)
    for name, value in exact.items():
        assert rounded[name].item() == pytest.approx(value.item(), rel=0.02)


def test_a_matcher_that_is_not_trainable_says_so() -> None:
    with pytest.raises(NotImplementedError, match="not trainable"):
        nemf.build_matcher("copy").loss(uneven_batch())


@pytest.mark.parametrize("name", ["cats", "chm", "ncnet", "scorrsan", "transformatcher"])
def test_frames_of_another_size_are_refused(name: str) -> None:
    built = nemf.build_matcher(name, init="random", **TRAINABLE[name])
    with pytest.raises(NemfError, match="128 px"):
        built.loss(batch_of([[[1.0, 2.0]]], [[[1.0, 2.0]]], side=128))


# -- NeMF's candidates ----------------------------------------------------------------------------


def test_candidates_come_from_the_pair_s_own_seed() -> None:
    built = nemf.build_matcher("nemf", init="random", **TRAINABLE["nemf"])
    batch = uneven_batch()
    in_trg, in_src = built.candidates(batch)
    assert in_trg.shape == in_src.shape == (3, 4, 7, 2)
    last = batch.split(1)[2]
    unpadded = PairBatch(
        *(last.src, last.trg, last.src_kps[:, :2], last.trg_kps[:, :2]),
        *(last.valid[:, :2], last.seeds),
    )
    for alone, together in zip(built.candidates(unpadded), (in_trg, in_src), strict=True):
        torch.testing.assert_close(alone[0], together[2, :2], rtol=0, atol=0)
    pixels = (in_trg[batch.valid] + 1) / 2 * 255
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    assert in_trg.abs().max() <= 1


def test_near_candidates_lie_around_the_truth() -> None:
    settings = {"candidates": 201, "near": 0.5, "near_norm": 0.05}
    built = nemf.build_matcher("nemf", init="random", **TRAINABLE["nemf"] | {"training": settings})
    batch = batch_of([[[128.0, 128.0]]], [[[60.0, 200.0]]])
    in_trg, in_src = built.candidates(batch)
    for found, truth in ((in_trg, [60.0, 200.0]), (in_src, [128.0, 128.0])):
        away = found[0, 0] - (torch.tensor(truth) / 255 * 2 - 1)
        assert away[:100].std().item() == pytest.approx(0.05, rel=0.2)
        assert away[100:].std().item() > 0.4


@pytest.mark.parametrize("settings", [{"candidates": 1}, {"near": 1.5}, {"near_norm": 0.0}])
def test_training_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(NemfError, match="no training against"):
        nemf.build_matcher("nemf", init="random", **TRAINABLE["nemf"] | {"training": settings})


def test_the_field_s_loss_is_the_cross_entropy_of_the_true_position() -> None:
    """Scored one by one: every valid keypoint against its candidates, in both directions."""
    built = nemf.build_matcher("nemf", init="random", **TRAINABLE["nemf"])
    batch = uneven_batch()
    with torch.no_grad():
        volumes = built._encode_batch(batch).volume.unflatten(0, (3, -1))
        in_trg, in_src = built.candidates(batch)
        entropies = []
        for b in range(3):
            for k in range(int(batch.valid[b].sum())):
                src, trg = (x[b, k] / 255 * 2 - 1 for x in (batch.src_kps, batch.trg_kps))
                for sources, targets in (
                    (src.expand(8, 2), torch.cat([trg[None], in_trg[b, k]])),
                    (torch.cat([src[None], in_src[b, k]]), trg.expand(8, 2)),
                ):
                    scores = []
                    for s, t in zip(sources, targets, strict=True):
                        side = built.mlp_model.at_targets(t[None], 16)
                        row = torch.zeros(1, dtype=torch.long)
                        scores.append(built.mlp_model.score(volumes[b], s[None], side, row))
                    entropies.append(-torch.cat(scores).log_softmax(0)[0])
        loss = built.loss(batch)["loss_field"]
    assert len(entropies) == 14
    assert loss.item() == pytest.approx(torch.stack(entropies).mean().item(), rel=1e-4)
