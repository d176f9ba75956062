"""TransforMatcher: its attention and position code, a literal restatement, files, training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nemf
from baselines.transformatcher import AdditiveAttention, TransforMatcher, rotary_sign
from experiments.configurations import CONFIGS
from nemf.backbones import build_backbone, normalise
from nemf.errors import NemfError
from nemf.matcher import Matcher
from nemf.pairs import Image
from nemf.scoring import PROTOCOLS
from tests.conftest import tiny_pixels
from tests.test_cats import texture
from tests.test_chm import as_doubled_trunk, batch_of, literal_resize, literal_transfer

SMALL_BACKBONE = CONFIGS.parent / "weights" / "resnet_small.pth"
TINY: dict[str, Any] = {
    **{"backbone": "resnet_small", "layers": (4, 6), "input_size": 80},
    **{"width": 6, "depth": 2, "heads": 3},
}


def uneven(matcher: Matcher) -> Matcher:
    """``matcher`` with a drawn head, and trunks that differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in matcher.match2match.parameters():
            weights += 0.3 * torch.randn(weights.shape, generator=generator)
        trunk = matcher.backbone.reference
        trunk.conv1.weight += 0.1 * torch.randn(trunk.conv1.weight.shape, generator=generator)
    return matcher


@pytest.fixture(scope="module")
def tiny() -> TransforMatcher:
    return uneven(TransforMatcher(**TINY, init="random")).eval()


@pytest.fixture(scope="module")
def whole() -> TransforMatcher:
    """At the paper's 240 px, 15 and 30 cells."""
    return TransforMatcher("resnet_small", init="random", depth=1).eval()


def answer(matcher: Matcher, query: np.ndarray, reference: np.ndarray, points: Any) -> np.ndarray:
    return nemf.match(matcher, query, reference, points).points.numpy()


# -- position code and attention ------------------------------------------------------------------


def rotated(x: np.ndarray, angle: float) -> np.ndarray:
    """Channels (4,) of a token at ``angle``, each neighbouring pair turned in its plane by the
    angle times the pair's frequency, pi and 5 pi."""
    turned = np.empty(4)
    for pair, frequency in enumerate((np.pi, 5 * np.pi)):
        c, s = np.cos(angle * frequency), np.sin(angle * frequency)
        a, b = x[2 * pair : 2 * pair + 2]
        turned[2 * pair : 2 * pair + 2] = a * c - b * s, b * c + a * s
    return turned


@pytest.mark.parametrize("sides", [(3, 3, 3, 3), (5, 5, 5, 5), (1, 3, 5, 1)])
def test_the_position_code_is_the_rotation_by_the_token_s_number(sides: tuple[int, ...]) -> None:
    signs = rotary_sign(sides).numpy()
    assert signs.shape == (np.prod(sides),)
    x = np.array([0.3, -1.0, 2.0, 0.7])
    for t, sign in enumerate(signs):
        np.testing.assert_allclose(rotated(x, t), sign * x, atol=1e-9)


def test_the_position_code_is_a_chessboard_for_even_sides_too() -> None:
    signs = rotary_sign((2, 4, 3, 2)).view(2, 4, 3, 2)
    for place in np.ndindex(2, 4, 3, 2):
        assert signs[place].item() == (-1) ** sum(place)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def literal_attention(layer: AdditiveAttention, tokens: np.ndarray, heads: int) -> np.ndarray:
    """(N, width) of tokens (N, width), by loops over heads and tokens, as specified."""
    w = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    n = len(tokens)
    q, k, v = np.split(tokens @ w["to_qkv.weight"].T, 3, axis=1)
    out = np.empty((n, 4 * heads))
    for h in range(heads):
        mine = slice(4 * h, 4 * h + 4)
        qh, kh, vh = q[:, mine], k[:, mine], v[:, mine]
        alpha = softmax(0.5 * qh @ w["to_q_attn_logits.weight"][0])
        query = sum(alpha[t] * rotated(qh[t], t) for t in range(n))
        mixed = kh * query
        mixed = mixed[:, ::2] + mixed[:, 1::2]
        beta = softmax(0.5 * mixed @ w["to_k_attn_logits.weight"][0])
        key = sum(beta[t] * rotated(kh[t], t) for t in range(n))
        u = vh * key
        u = u[:, ::2] + u[:, 1::2]
        out[:, mine] = u @ w["to_r.weight"].T + w["to_r.bias"] + qh
    return out @ w["to_out.weight"].T + w["to_out.bias"]


def test_additive_attention_follows_the_specification() -> None:
    torch.manual_seed(0)
    layer = AdditiveAttention(6, 3)
    tokens = torch.randn(2, 81, 6)
    with torch.no_grad():
        found = layer(tokens, rotary_sign((3, 3, 3, 3)))
    for one, expected in zip(found, tokens.double().numpy(), strict=True):
        literal = literal_attention(layer, expected, 3)
        np.testing.assert_allclose(one, literal, rtol=1e-4, atol=1e-5)


def test_scores_follow_the_specification(tiny: TransforMatcher) -> None:
    """Five cells a side: every stage again in float64, the tokens one by one."""
    frames = [normalise(np.ascontiguousarray(texture(k, 80, 80))) for k in (0, 1)]
    with torch.no_grad():
        query, reference = tiny.levels(frames[0], "query"), tiny.levels(frames[1], "reference")
        found = tiny.scores(query, reference)[0].numpy()
        sides = []
        trunks = tiny.backbone.query, tiny.backbone.reference
        for frame, trunk in zip(frames, trunks, strict=True):
            maps = []
            for tap in trunk.taps(frame, [4, 6]):
                x = np.maximum(tap[0].double().numpy(), 0)
                x = x / np.sqrt((x**2).sum(0))
                for axis in (1, 2):
                    x = literal_resize(x, axis, 5)
                maps.append(x)
            sides.append(maps)
    head = copy.deepcopy(tiny.match2match).double()
    levels = [np.einsum("cij,ckl->ijkl", *pair) for pair in zip(*sides, strict=True)]
    tokens = np.maximum(np.stack(levels, -1), 0).reshape(-1, 2)
    embedding, result = head.to_embedding[1], head.to_original[0]
    x = tokens @ embedding.weight.detach().numpy().T + embedding.bias.detach().numpy()
    for attention, mlp in head.trans_nc:
        for layer in (attention, mlp):
            centred = x - x.mean(1, keepdims=True)
            normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
            normed = normed * layer.norm.weight.detach().numpy() + layer.norm.bias.detach().numpy()
            if layer is attention:
                x = x + literal_attention(attention.fn, normed, 3)
            else:
                with torch.no_grad():
                    x = x + mlp.fn(torch.from_numpy(normed)).numpy()
    scores = (x @ result.weight.detach().numpy()[0] + result.bias.item()).reshape(5, 5, 5, 5)
    for axis in range(4):
        scores = literal_resize(scores, axis, 10)
    expected = scores.reshape(100, 100)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_batch_of_volumes_is_its_volumes_one_by_one(tiny: TransforMatcher) -> None:
    frames = torch.cat([normalise(np.ascontiguousarray(texture(k, 80, 80))) for k in range(3)])
    with torch.no_grad():
        query, reference = tiny.levels(frames, "query"), tiny.levels(frames.flip(0), "reference")
        together = tiny.scores(query, reference)
        for i in range(3):
            alone = tiny.scores(query[i : i + 1], reference[i : i + 1])[0]
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


# -- the read-out ---------------------------------------------------------------------------------


def test_answers_follow_the_specification(whole: TransforMatcher) -> None:
    """At the paper's size: a reach of 0.05, in training 0.1, and a deviation of 10 cells."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(-9, 9, (900, 900)).astype(np.float32)
    points = np.float32([[0, 0], [239, 239], [120.5, 33.25], [7.9, 200], [120, 256]])
    norm = points / 120 - 1
    given = torch.from_numpy(points), torch.from_numpy(scores)
    found = whole.transfer(*given).numpy()
    expected = literal_transfer(scores, norm, 15, reach=0.05, sigma=10) * 120 + 120
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.isfinite(found[:4]).all()
    assert np.isnan(found[4]).all()  # no cell within 6 px
    training = whole.transfer(*given, whole.training_reach).numpy()
    expected = literal_transfer(scores, norm, 15, reach=0.1, sigma=10) * 120 + 120
    np.testing.assert_allclose(training, expected, atol=2e-3)
    assert np.abs(training - found)[:4].max() > 0.01


@pytest.mark.parametrize("size", [64, 80, 160, 240, 480])
def test_every_point_of_the_frame_is_answered(size: int) -> None:
    """Though the reach is little more than half the diagonal of a cell."""
    matcher = TransforMatcher("resnet_small", init="random", depth=1, input_size=size)
    n = 2 * matcher.cells
    middles = (torch.arange(n - 1) + 0.5) / (n - 1) * size
    points = torch.cartesian_prod(middles, middles)
    positions = torch.ones(n * n, 2)
    moved = matcher._sample(points / (size / 2) - 1, positions, matcher.reach)
    torch.testing.assert_close(moved, torch.ones_like(moved))


def test_a_shifted_image_is_followed() -> None:
    """By two cells, before any training: what is at x in the query is at x - 32."""
    matcher = TransforMatcher("resnet_small", init="head", backbone_weights=SMALL_BACKBONE, depth=1)
    wide = texture(0, 240, 304)
    points = [[100, 60], [150, 130.5], [200, 200]]
    found = answer(matcher.eval(), wide[:, :240], wide[:, 32:272], points)
    np.testing.assert_allclose(found - points, [[-32, 0]] * 3, atol=8)


def test_by_default_all_blocks_of_the_last_two_stages_are_taken() -> None:
    assert TransforMatcher("resnet18", init="random", depth=1).layers == (5, 6, 7, 8)
    small = TransforMatcher("resnet_small", init="random", depth=1)
    assert small.layers == (5, 6)
    frame = torch.zeros(1, 3, 240, 240)
    with torch.no_grad():
        assert small.levels(frame, "query").shape == (1, 192, 225)


def test_each_role_has_a_trunk_of_its_own(tiny: TransforMatcher) -> None:
    image = Image.from_pixels(tiny_pixels(0, 60, 70))
    (query,), (reference,) = (tiny.encode([image], role) for role in ("query", "reference"))
    assert (query.levels - reference.levels).abs().max() > 0.01


def test_features_that_are_not_finite_are_an_error(tiny: TransforMatcher) -> None:
    broken = copy.deepcopy(tiny)
    broken.backbone.query.conv1.weight.data[0, 0, 0, 0] = float("nan")
    image = Image.from_pixels(tiny_pixels(0, 40, 50))
    with pytest.raises(NemfError, match=f"{image.hash[:12]} are not finite"):
        broken.encode([image], "query")


def test_its_protocol_is_chm_s() -> None:
    """Squashed to 240, target thresholds, PF-WILLOW over a -2 padding: as CHM's code scores."""
    protocol = PROTOCOLS[TransforMatcher.card.official_protocol]
    assert (protocol.plan.direction, protocol.frame.side) == ("src2trg", 240)
    assert protocol.bases["pfwillow"] == "kps_extent_padded_2"


# -- weights --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny: TransforMatcher, tmp_path: Path) -> Callable[..., Path]:
    """``saved(change)`` writes the tiny matcher as the official code would, after
    ``change(state)``."""

    def save(change: Callable[[dict[str, Tensor]], Any] = lambda state: None) -> Path:
        state = as_doubled_trunk(tiny.state_dict())
        state["backbone.fc.weight"] = torch.ones(5, 96)
        state["match2match.posenc"] = torch.zeros(5, 5, 5, 5, 6)
        for block in range(2):
            state[f"match2match.trans_nc.{block}.0.fn.pos_emb.freqs"] = torch.ones(2)
        change(state)
        torch.save(state, tmp_path / "tm.pt")
        return tmp_path / "tm.pt"

    return save


BARE = {key: TINY[key] for key in ("backbone", "layers", "input_size")}


def test_a_file_of_the_official_names_comes_back_with_its_sizes(
    tiny: TransforMatcher, saved: Callable[..., Path]
) -> None:
    twin = nemf.build_matcher("transformatcher", **BARE, weights=saved())
    assert twin.weights_hash == tiny.weights_hash
    assert not twin.random_weights
    pair = tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]]
    np.testing.assert_array_equal(answer(twin, *pair), answer(tiny, *pair))


def test_a_checkpoint_of_ours_comes_back(tiny: TransforMatcher, tmp_path: Path) -> None:
    torch.save({"state_dict": tiny.state_dict()}, tmp_path / "ours.pth")
    assert TransforMatcher(**BARE, weights=tmp_path / "ours.pth").weights_hash == tiny.weights_hash


def test_the_official_keys_at_the_paper_s_sizes() -> None:
    head = TransforMatcher("resnet_small", init="random").match2match
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    first = {k: v for k, v in shapes.items() if not k.startswith("trans_nc") or ".0." in k[:11]}
    assert len({key.split(".")[1] for key in shapes if key.startswith("trans_nc")}) == 6
    assert first == {
        **{"to_embedding.1.weight": (16, 2), "to_embedding.1.bias": (16,)},
        **{"to_original.0.weight": (1, 16), "to_original.0.bias": (1,)},
        **{f"trans_nc.0.{k}.norm.{part}": (16,) for k in (0, 1) for part in ("weight", "bias")},
        "trans_nc.0.0.fn.to_qkv.weight": (96, 16),
        "trans_nc.0.0.fn.to_q_attn_logits.weight": (1, 4),
        "trans_nc.0.0.fn.to_k_attn_logits.weight": (1, 2),
        **{"trans_nc.0.0.fn.to_r.weight": (4, 2), "trans_nc.0.0.fn.to_r.bias": (4,)},
        **{"trans_nc.0.0.fn.to_out.weight": (16, 32), "trans_nc.0.0.fn.to_out.bias": (16,)},
        **{"trans_nc.0.1.fn.0.weight": (64, 16), "trans_nc.0.1.fn.0.bias": (64,)},
        **{"trans_nc.0.1.fn.2.weight": (16, 64), "trans_nc.0.1.fn.2.bias": (16,)},
    }


HEAD = "match2match."


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda s: s.pop(f"{HEAD}trans_nc.1.0.fn.to_out.bias"),
            r"this TransforMatcher on resnet_small: 1 missing \(match2match.trans_nc.1.0.fn.to_out",
        ),
        (lambda s: s.update({f"{HEAD}extra": torch.ones(2)}), "1 unexpected .match2match.extra"),
        (
            lambda s: s.update({"backbone.layer9.weight": torch.ones(2)}),
            "2 unexpected .backbone.query.layer9.weight",
        ),
        (
            lambda s: s.update({f"{HEAD}to_original.0.bias": torch.full((1,), float("nan"))}),
            r"damaged: 1 not finite \(match2match.to_original.0.bias\)",
        ),
        (
            lambda s: s.pop(f"{HEAD}to_embedding.1.weight"),
            "no TransforMatcher checkpoint .*to_embedding",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_explained(
    saved: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=rf"tm\.pt.*{complaint}"):
        TransforMatcher(**BARE, weights=saved(change))


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"depth": 3}, "has depth 2, not 3: leave depth out"),
        ({"width": 16}, "has width 6, not 16"),
        ({"heads": 8}, "has heads 3, not 8"),
        ({"layers": (6,)}, r"misshapen .match2match.to_embedding.1.weight \(6, 2\) for \(6, 1\)"),
        ({"layers": (6, 4)}, "layers must be increasing ids"),
        ({"init": "random"}, "not both"),
        ({"input_size": 8}, "input_size must be at least 32 px"),
    ],
)
def test_keywords_that_disagree_with_the_file(
    saved: Callable[..., Path], keywords: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=complaint):
        TransforMatcher(**BARE | {"weights": saved()} | keywords)


@pytest.mark.parametrize("name", ["width", "depth", "heads"])
def test_sizes_are_positive(name: str) -> None:
    with pytest.raises(NemfError, match=f"{name} must be at least 1, not 0"):
        TransforMatcher(**TINY | {name: 0}, init="random")


# -- training -------------------------------------------------------------------------------------


def test_the_scores_begin_as_the_mean_correlation(tmp_path: Path) -> None:
    trunk = build_backbone("resnet_small", init="random", upto=6, seed=5)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    matcher = TransforMatcher(**TINY, init="head", backbone_weights=tmp_path / "trunk.pth")
    assert torch.equal(matcher.backbone.reference.conv1.weight, trunk.conv1.weight)
    assert matcher.backbone.query.conv1.weight is not matcher.backbone.reference.conv1.weight
    volume = torch.rand(1, 5, 5, 5, 5, 2, generator=torch.manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(matcher.match2match(volume), 40 * volume.mean(5))


def test_the_loss_is_the_mean_squared_distance_of_the_answers(tiny: TransforMatcher) -> None:
    """In halves of the side, with the reach of training."""
    batch = batch_of(3, side=80)
    apart = []
    with torch.no_grad():
        loss = tiny.loss(batch)["loss_keypoints"].item()
        for i in range(3):
            query = tiny.levels(batch.src[i : i + 1], "query")
            reference = tiny.levels(batch.trg[i : i + 1], "reference")
            (scores,) = tiny.scores(query, reference)
            for k in range(2 + i):
                found = tiny.transfer(batch.src_kps[i, k : k + 1], scores, 0.1)[0]
                apart.append(float(((found - batch.trg_kps[i, k]) / 40).square().sum()))
    assert len(apart) == 9
    assert loss == pytest.approx(np.mean(apart), rel=1e-5)


def test_training_learns_a_pair_by_heart() -> None:
    matcher = TransforMatcher(**TINY, init="random").train()
    with torch.no_grad():  # begin worse than by the correlation
        matcher.match2match.to_original[0].weight.fill_(0.5)
    batch = batch_of(2, side=80)
    optimiser = torch.optim.Adam([p for p in matcher.parameters() if p.requires_grad], lr=2e-2)
    seen = []
    for _ in range(30):
        loss = matcher.loss(batch)["loss_keypoints"]
        seen.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert seen[-1] < 0.3 * seen[0]


def test_gradients_reach_every_part_of_the_head(tiny: TransforMatcher) -> None:
    matcher = copy.deepcopy(tiny).train()
    matcher.loss(batch_of(2, side=80))["loss_keypoints"].backward()
    linear = [m for m in matcher.match2match.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 2 + 2 * 7
    for layer in linear:
        assert layer.weight.grad.isfinite().all()
        assert layer.weight.grad.abs().max() > 0
