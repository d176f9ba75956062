"""The parts that CATs and NeMF share, against naive restatements in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import nemf.aggregation
from nemf.aggregation import Aggregator, correlate, mutual_filter, soft_argmax, to_flow, unit

SIZES = [
    {"n_levels": 3},
    {"n_levels": 2, "repeat": 2},
    {"n_levels": 1, "depth": 2},
    {"n_levels": 2, "depth": 2, "heads": 4, "mlp_ratio": 1.5},
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def aggregator(**sizes: float) -> Aggregator:
    """Tokens of width 8 on a 2 x 2 grid, float64, no parameter at a special value."""
    model = Aggregator(**{"feature_size": 2, "proj_dim": 4, "heads": 2} | sizes).double()
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=k))
    return model


def inputs(model: Aggregator, pairs: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    levels = model.pos_embed_x.shape[1]
    return (
        random(pairs, levels * model.repeat, 4, 4, seed=seed),
        random(pairs, levels, 4, 4, seed=seed + 1),
        random(pairs, levels, 4, 4, seed=seed + 2),
    )


# -- a naive restatement, one pair ----------------------------------------------------------------


def linear(state: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(state: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(state: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    hidden = linear(state, f"{name}.fc1", x)
    erf = np.vectorize(math.erf)(hidden / math.sqrt(2))
    return linear(state, f"{name}.fc2", hidden * (1 + erf) / 2)


def attention(state: dict[str, np.ndarray], name: str, x: np.ndarray, heads: int) -> np.ndarray:
    """Tokens (n, width); rows of qkv are ordered (q, k, v) x head x dimension."""
    n, width = x.shape
    dim = width // heads
    rows = linear(state, f"{name}.qkv", x)
    mixed = np.zeros((n, width))
    for head in range(heads):
        q, k, v = (
            rows[:, part * width + head * dim : part * width + (head + 1) * dim]
            for part in range(3)
        )
        for i in range(n):
            logits = k @ q[i] / math.sqrt(dim)
            weight = np.exp(logits - logits.max())
            mixed[i, head * dim : (head + 1) * dim] = weight / weight.sum() @ v
    return linear(state, f"{name}.proj", mixed)


def naive_trunk(model: Aggregator, costs: np.ndarray, projected: np.ndarray) -> np.ndarray:
    """costs (L, N, positions), projected (n_levels, N, proj_dim)."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    heads = model.blocks[0].attn.heads
    x = np.zeros((len(costs), 4, 8))
    for level in range(len(costs)):
        own = level // model.repeat
        for position in range(4):
            row, col = divmod(position, 2)
            token = np.concatenate([costs[level, position], projected[own, position]])
            code_x = state["pos_embed_x"][0, own, 0, col]
            code_y = state["pos_embed_y"][0, own, row, 0]
            x[level, position] = token + np.concatenate([code_x, code_y])
    for i in range(len(model.blocks)):
        name = f"blocks.{i}"
        for level in range(len(x)):
            normed = layer_norm(state, f"{name}.norm1", x[level])
            x[level] += attention(state, f"{name}.attn", normed, heads)
        if len(x) > 1:
            x = x + mlp(state, f"{name}.mlp2", layer_norm(state, f"{name}.norm4", x))
            for position in range(4):
                normed = layer_norm(state, f"{name}.norm3", x[:, position])
                x[:, position] += attention(state, f"{name}.attn_multiscale", normed, heads)
        x = x + mlp(state, f"{name}.mlp", layer_norm(state, f"{name}.norm2", x))
    return linear(state, "proj", x)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_aggregator_is_the_papers(sizes: dict[str, float]) -> None:
    model = aggregator(**sizes)
    correlation, src, trg = inputs(model)
    c = correlation[0].numpy()
    first = naive_trunk(model, c.transpose(0, 2, 1), trg[0].numpy()).transpose(0, 2, 1) + c
    expected = naive_trunk(model, first, src[0].numpy()) + c
    found = model(correlation, src, trg)
    np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-10, atol=1e-10)


def test_repeating_is_having_the_same_level_several_times() -> None:
    model = aggregator(n_levels=2, repeat=3)
    correlation, src, trg = inputs(model)
    spread = aggregator(n_levels=6)
    state = model.state_dict()
    for key in ("pos_embed_x", "pos_embed_y"):
        state[key] = state[key].repeat_interleave(3, 1)
    spread.load_state_dict(state)
    expected = spread(correlation, src.repeat_interleave(3, 1), trg.repeat_interleave(3, 1))
    torch.testing.assert_close(model(correlation, src, trg), expected)


def test_the_aggregator_treats_pairs_alone() -> None:
    model = aggregator(n_levels=2, repeat=2)
    batch = inputs(model, pairs=3)
    together = model(*batch)
    for i in range(3):
        alone = model(*(x[i : i + 1] for x in batch))
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_inference_in_parts_changes_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = aggregator(n_levels=2, repeat=2)
    batch = inputs(model, pairs=2)
    expected = model(*batch)
    monkeypatch.setattr(nemf.aggregation, "TOKENS_AT_ONCE", tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(*batch), expected)


def test_every_used_parameter_gets_a_gradient() -> None:
    model = aggregator(n_levels=2)
    batch = inputs(model)
    for x in batch:
        x.requires_grad_()
    model(*batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("norm."):
            assert not parameter.requires_grad
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
    assert all(x.grad.abs().max() > 0 for x in batch)


def test_initialising_uses_the_given_generator_only() -> None:
    before = torch.get_rng_state()
    models = [Aggregator(feature_size=2, proj_dim=4, heads=2, n_levels=2) for _ in range(2)]
    torch.set_rng_state(before)
    for model in models:
        model.initialise(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    weight = models[0].blocks[0].mlp.fc1.weight
    assert 0.015 < weight.std() < 0.025
    assert torch.equal(models[0].blocks[0].norm3.weight, torch.ones(8))
    assert not models[0].blocks[0].attn.qkv.bias.any()


@pytest.mark.parametrize("sizes", [{"proj_dim": 5}, {"heads": 3}])
def test_a_width_that_cannot_be_divided_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="wide: that must be even and a multiple of heads"):
        Aggregator(**{"feature_size": 2, "proj_dim": 4, "heads": 2} | sizes)


# -- the functions --------------------------------------------------------------------------------


def test_unit_by_hand() -> None:
    features = torch.tensor([[[3.0, 0.0, 1e-3], [4.0, 0.0, 0.0]]])  # (1, 2 channels, 3 positions)
    shrunk = 1e-3 / math.sqrt(2e-6)  # the 1e-6 is inside the root
    expected = torch.tensor([[[0.6, 0.0, shrunk], [0.8, 0.0, 0.0]]])
    torch.testing.assert_close(unit(features), expected, rtol=1e-6, atol=0)


def test_correlations_have_the_source_in_rows() -> None:
    src, trg = random(2, 5, 2, 3), random(2, 5, 3, 3, seed=1)
    found = correlate(src, trg)
    assert found.shape == (2, 6, 9)
    for s in range(6):
        for t in range(9):
            expected = src[1, :, s // 3, s % 3] @ trg[1, :, t // 3, t % 3]
            assert found[1, s, t].item() == pytest.approx(expected.item())


def test_mutual_filter_by_hand() -> None:
    c = torch.tensor([[0.5, -0.2], [1.0, 0.4]])
    # maxima of the rows: .5, 1; of the columns: 1, .4
    expected = torch.tensor([[0.5 * 1.0 * 0.5, -0.2 * -0.4 * -0.5], [1.0, 0.4 * 0.4 * 1.0]])
    torch.testing.assert_close(mutual_filter(c[None])[0], expected)


def test_mutual_filter_restated() -> None:
    c = random(2, 3, 4, 5)
    expected = c**3 / (c.max(3, keepdim=True).values * c.max(2, keepdim=True).values)
    torch.testing.assert_close(mutual_filter(c), expected)


def test_mutual_filter_with_something_added_to_the_maxima() -> None:
    c = torch.tensor([[0.5, -0.2], [1.0, 0.4]])
    expected = torch.tensor(
        [[0.5**3 / (0.6 * 1.1), -(0.2**3) / (0.6 * 0.5)], [1 / 1.1**2, 0.4**3 / (1.1 * 0.5)]]
    )
    torch.testing.assert_close(mutual_filter(c[None], 0.1)[0], expected)
    assert not mutual_filter(torch.zeros(1, 3, 3), 1e-5).any()


def test_mutual_filter_without_a_positive_maximum() -> None:
    assert not mutual_filter(torch.zeros(1, 3, 3)).any()
    c = torch.tensor([[-0.5, -0.25], [-0.5, -0.5]])  # negative maxima are used as they are
    maxima = torch.tensor([[-0.25 * -0.5, -0.25 * -0.25], [-0.5 * -0.5, -0.5 * -0.25]])
    torch.testing.assert_close(mutual_filter(c), c**3 / maxima)


def test_mutual_filter_of_half_precision_does_not_underflow() -> None:
    c = torch.full((2, 2), 6e-8, dtype=torch.float16)  # the smallest positive number there
    found = mutual_filter(c)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, c.float())


def test_mutual_filter_can_be_differentiated() -> None:
    c = random(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(mutual_filter, c)
    zero = torch.zeros(1, 2, 2, requires_grad=True)
    mutual_filter(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_soft_argmax_restated() -> None:
    cost = 0.05 * random(2, 12, 12).numpy()
    x_normal, y_normal = np.array([-1.0, -0.2, 0.3, 0.9]), np.array([-0.8, 0.1, 1.1])
    found = soft_argmax(*(torch.from_numpy(a) for a in (cost, x_normal, y_normal)))
    assert found.shape == (2, 2, 3, 4)
    for b in range(2):
        for t in range(12):
            weight = np.exp(cost[b, :, t] / 0.02 - (cost[b, :, t] / 0.02).max())
            weight /= weight.sum()
            x = sum(weight[s] * x_normal[s % 4] for s in range(12))
            y = sum(weight[s] * y_normal[s // 4] for s in range(12))
            np.testing.assert_allclose(found[b, :, t // 4, t % 4], [x, y], rtol=1e-12)


def test_soft_argmax_keeps_its_precision_under_autocast() -> None:
    cost, line = random(1, 256, 256).float(), torch.linspace(-1, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = soft_argmax(cost, line, line)
    torch.testing.assert_close(found, soft_argmax(cost, line, line), rtol=0, atol=1e-6)


def test_to_flow_by_hand() -> None:
    points = torch.zeros(1, 2, 3, 3)  # every target cell looks at the middle, cell (1, 1)
    points[0, :, 2, 0] = torch.tensor([1.0, -1.0])  # but row 2, column 0 at the upper right
    flow = to_flow(points)[0]
    assert flow[:, 0, 0].tolist() == [1.0, 1.0]
    assert flow[:, 1, 2].tolist() == [-1.0, 0.0]
    assert flow[:, 2, 0].tolist() == [2.0, -2.0]


def test_one_clear_match_per_cell_is_found() -> None:
    """The flow points from the target's grid into the source."""
    source_of = np.random.default_rng(0).permutation(16)  # of each target cell, on a 4 x 4 grid
    cost = torch.zeros(1, 16, 16)
    cost[0, source_of, range(16)] = 1.0
    line = torch.linspace(-1, 1, 4)
    flow = to_flow(soft_argmax(cost, line, line))[0]
    for t, s in enumerate(source_of):
        expected = [s % 4 - t % 4, s // 4 - t // 4]
        np.testing.assert_allclose(flow[:, t // 4, t % 4], expected, atol=1e-5)
