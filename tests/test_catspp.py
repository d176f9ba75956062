"""CATs++: its convolutions and attention restated, its read-out, official checkpoints, training."""

from __future__ import annotations

import copy
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
from baselines.catspp import CATsPP, Conv4d
from nemf.backbones import build_backbone, normalise
from nemf.errors import NemfError
from nemf.pairs import Image
from nemf.supervision import PairBatch, collate_pairs
from tests.conftest import tiny_pixels
from tests.test_cats import texture

SMALL: dict[str, Any] = {"backbone": "resnet_small", "layers": (3, 4, 5, 6), "input_size": 256}
# Three levels of 4, 8 and 16 cells, aggregated at 2, 4 and 8.
TINY = SMALL | {"layers": (1, 2, 4, 5, 6), "input_size": 64, "affinity_dim": 6, "query_dim": 8}
UNSIZED = {"backbone": "resnet_small", "layers": (1, 2, 4, 5, 6)}


@pytest.fixture(scope="module")
def tiny() -> CATsPP:
    return CATsPP(**TINY, init="random").eval()


@pytest.fixture(scope="module")
def plain() -> CATsPP:
    """The aggregation adds nothing: the flow follows the mean correlation of each level."""
    return CATsPP(**SMALL, init="head", backbone_weights=trunk_file()).eval()


def trunk_file() -> Path:
    import experiments

    return Path(experiments.__file__).parent / "weights" / "resnet_small.pth"


def answer(matcher: CATsPP, query: np.ndarray, reference: np.ndarray, points: Any) -> np.ndarray:
    return nemf.match(matcher, query, reference, points).points.numpy()


# -- the convolution ------------------------------------------------------------------------------


def literal_conv4d(state: dict[str, np.ndarray], name: str, x: np.ndarray, strides: Any) -> Any:
    """(O, ...) from ``x`` (C, h, w, u, v): the sum of two convolutions, tap by tap, each over the
    maxima of the other pair of axes; NumPy, float64."""
    found = []
    for part, stride, window in (
        ("query_conv", *strides),
        ("supp_conv", *strides[::-1]),
    ):
        volume = x if part == "query_conv" else x.transpose(0, 3, 4, 1, 2)
        c, h, w, u, v = volume.shape
        pooled = np.full((c, h, w, -(-u // window), -(-v // window)), -np.inf)
        for k in range(u):
            for m in range(v):
                cell = pooled[..., k // window, m // window]
                np.maximum(cell, volume[..., k, m], out=cell)
        weight, bias = state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"]
        side = weight.shape[2]
        padded = np.pad(pooled, [(0, 0), *[(side // 2, side // 2)] * 2, (0, 0), (0, 0)])
        total = 0
        for p in range(side):
            for q in range(side):
                seen = padded[:, p : p + h : stride, q : q + w : stride]
                total = total + np.einsum("oc,chwuv->ohwuv", weight[:, :, p, q], seen)
        total = total + bias[:, None, None, None, None]
        found.append(total if part == "query_conv" else total.transpose(0, 3, 4, 1, 2))
    return found[0] + found[1]


def cell_of_conv4d(conv: Conv4d, x: np.ndarray, o: int, at: tuple[int, ...], strides: Any) -> float:
    """One value of one output channel, product by product."""
    i, j, k, m = at
    s, z = strides
    h, w, u, v = x.shape[1:]
    total = conv.query_conv.bias[o].item() + conv.supp_conv.bias[o].item()
    for part, (first, size, stride), (other, extent, window) in (
        ("query_conv", ((i, j), (h, w), s), ((k, m), (u, v), z)),
        ("supp_conv", ((k, m), (u, v), z), ((i, j), (h, w), s)),
    ):
        weight = getattr(conv, part).weight.detach().numpy()
        for c, p, q in np.ndindex(weight.shape[1:]):
            a, b = (
                n * stride + tap - weight.shape[2] // 2
                for n, tap in zip(first, (p, q), strict=True)
            )
            if not (0 <= a < size[0] and 0 <= b < size[1]):
                continue
            highest = -np.inf
            for d in range(other[0] * window, min((other[0] + 1) * window, extent[0])):
                for e in range(other[1] * window, min((other[1] + 1) * window, extent[1])):
                    place = (a, b, d, e) if part == "query_conv" else (d, e, a, b)
                    highest = max(highest, x[(c, *place)])
            total += weight[o, c, p, q] * highest
    return total


@pytest.mark.parametrize(
    ("sizes", "kernels", "strides"),
    [
        ((3, 4, 2, 3), (3, 3), (1, 1)),
        ((6, 4, 4, 6), (3, 3), (2, 2)),
        ((4, 6, 3, 2), (3, 3), (2, 1)),
        ((8, 4, 3, 3), (5, 3), (4, 1)),
        ((5, 7, 5, 3), (3, 3), (2, 2)),  # windows that stick out
        ((3, 3, 2, 2), (5, 3), (1, 1)),
    ],
)
def test_the_convolution_value_by_value(sizes: Any, kernels: Any, strides: Any) -> None:
    torch.manual_seed(0)
    conv = Conv4d(2, 3, kernels, strides).double()
    x = np.random.default_rng(0).normal(size=(2, *sizes))
    found = conv(torch.from_numpy(x)[None])[0].detach().numpy()
    steps = (strides[0], strides[0], strides[1], strides[1])
    assert found.shape == (3, *(-(-n // s) for n, s in zip(sizes, steps, strict=True)))
    for o, *at in np.ndindex(found.shape):
        assert found[o, *at] == pytest.approx(cell_of_conv4d(conv, x, o, at, strides), abs=1e-12)
    state = {f"x.{k}": v.numpy() for k, v in conv.state_dict().items()}
    np.testing.assert_allclose(literal_conv4d(state, "x", x, strides), found, atol=1e-12)


def test_the_convolution_can_be_differentiated() -> None:
    torch.manual_seed(0)
    conv = Conv4d(1, 2, (3, 3), (2, 1)).double()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 4, 2, 2, 3))).requires_grad_()
    assert torch.autograd.gradcheck(conv, x)


# -- a literal restatement ------------------------------------------------------------------------


def group_norm(state: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    normed = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    scale, shift = (state[f"{name}.{k}"].reshape(-1, 1, 1, 1, 1) for k in ("weight", "bias"))
    return normed * scale + shift


def gelu(x: np.ndarray) -> np.ndarray:
    return F.gelu(torch.from_numpy(x)).numpy()


def literal_transformer(
    state: dict[str, np.ndarray], name: str, x: np.ndarray, affinity: np.ndarray, stride: int
) -> np.ndarray:
    """``x`` (C, h, w, u, v), tokens are the cells (u, v), ``affinity`` (D, u, v)."""
    heads, u, v = len(x), *x.shape[3:]
    y = group_norm(state, f"{name}.norm1", x)
    qk = literal_conv4d(state, f"{name}.qk.conv.0", y, (stride, 1))
    qk = group_norm(state, f"{name}.qk.conv.1", qk)
    values = literal_conv4d(state, f"{name}.v.0", y, (1, 1))
    values = group_norm(state, f"{name}.v.1", values)
    queries, keys = [], []
    for k in range(u):
        for m in range(v):
            token = np.concatenate([qk[..., k, m].ravel(), affinity[:, k, m]])
            both = state[f"{name}.qk.linear.weight"] @ token + state[f"{name}.qk.linear.bias"]
            code = state[f"{name}.pos_embed"][0, k * v + m, 0]
            half = len(both) // 2
            per_head = [[part[c::heads] + code for c in range(heads)] for part in
                        (both[:half], both[half:])]  # fmt: skip
            queries.append(per_head[0])
            keys.append(per_head[1])
    queries, keys = np.array(queries), np.array(keys)  # (tokens, heads, d)
    attended = np.empty_like(x)
    for head in range(heads):
        for token in range(u * v):
            scores = keys[:, head] @ queries[token, head] / np.sqrt(queries.shape[2])
            share = np.exp(scores - scores.max())
            share /= share.sum()
            mixed = sum(s * values[head][..., t // v, t % v] for t, s in enumerate(share))
            attended[head][..., token // v, token % v] = mixed
    x = x + attended
    y = group_norm(state, f"{name}.norm2", x)
    y = gelu(literal_conv4d(state, f"{name}.mlp.mlp.0", y, (1, 1)))
    return x + literal_conv4d(state, f"{name}.mlp.mlp.2", y, (1, 1))


def literal_doubled(volume: np.ndarray) -> np.ndarray:
    for axis in range(1, 5):
        moved = np.moveaxis(volume, axis, 0)
        place = np.linspace(0, len(moved) - 1, 2 * len(moved))
        low = np.minimum(place.astype(int), len(moved) - 2)
        part = (place - low).reshape(-1, *[1] * (volume.ndim - 1))
        volume = np.moveaxis(moved[low] * (1 - part) + moved[low + 1] * part, 0, axis)
    return volume


def literal_map(matcher: CATsPP, src: Tensor, trg: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The mean aggregated cost (t, t, s, s) of two frames (1, 3, S, S) and the flow (2, t, t)."""
    state = {k.removeprefix("hpn_learner."): v.numpy() for k, v in matcher.state_dict().items()}
    taps = {}
    for side, frame in (("src", src), ("trg", trg)):
        with torch.no_grad():
            found = matcher.backbone.taps(frame, matcher.layers)
        taps[side] = {k: x[0].numpy() for k, x in zip(matcher.layers, found, strict=True)}

    def affinity(side: str, level: int, layer: int) -> np.ndarray:
        weight, bias = (state[f"affinity_proj.{level}.0.{k}"] for k in ("weight", "bias"))
        x = np.pad(taps[side][layer], [(0, 0), (1, 1), (1, 1)])
        n = taps[side][layer].shape[1]
        total = sum(
            np.einsum("oc,chw->ohw", weight[:, :, p, q], x[:, p : p + n : 2, q : q + n : 2])
            for p in range(3)
            for q in range(3)
        )
        return np.maximum(total + bias[:, None, None], 0)

    swap = (0, 3, 4, 1, 2)
    coarser = None
    for level, layers in enumerate([(5, 6), (4,), (1, 2)]):
        stack = []
        for layer in layers:
            a, b = (
                taps[side][layer] / (np.sqrt((taps[side][layer] ** 2).sum(0)) + 1e-5)
                for side in ("trg", "src")
            )
            stack.append(np.maximum(np.einsum("chw,cuv->hwuv", a, b), 0))
        x = literal_conv4d(state, f"early_conv.{level}.conv4d.0.0", np.array(stack), (2, 2))
        x = np.maximum(group_norm(state, f"early_conv.{level}.conv4d.0.1", x), 0)
        if coarser is not None:
            x = x + literal_doubled(coarser)
        name, stride = f"transformers.{level}.layer.0", 2**level
        of_src, of_trg = (affinity(side, level, layers[-1]) for side in ("src", "trg"))
        by_source = literal_transformer(state, name, x, of_src, stride)
        by_target = literal_transformer(state, name, x.transpose(swap), of_trg, stride)
        coarser = x + by_source + by_target.transpose(swap)
    cost = coarser.mean(0)
    flow = np.empty((2, *cost.shape[:2]))
    for r, c in np.ndindex(cost.shape[:2]):
        share = np.exp((cost[r, c] - cost[r, c].max()) / 0.02)
        share /= share.sum()
        x = (share.sum(0) * state["x_normal"]).sum()
        y = (share.sum(1) * state["y_normal"]).sum()
        last = len(cost) - 1
        flow[:, r, c] = (x + 1) * last / 2 - c, (y + 1) * last / 2 - r
    return cost, flow


def uneven(matcher: CATsPP) -> CATsPP:
    """A copy in which no parameter has the value it begins with."""
    changed = copy.deepcopy(matcher).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.hpn_learner.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise
    return changed


def test_cost_and_flow_follow_the_specification(tiny: CATsPP) -> None:
    """Three levels, with the strides and kernels of the paper's."""
    matcher = uneven(tiny)
    src, trg = (normalise(texture(k, 64, 64)).double() for k in (0, 1))
    cost, flow = literal_map(matcher, src, trg)
    with torch.no_grad():
        found = matcher.aggregate(*matcher.embed(src), *matcher.embed(trg))
    assert found.shape == (1, 64, 64)
    np.testing.assert_allclose(found[0].T.reshape(8, 8, 8, 8), cost, atol=1e-9)
    np.testing.assert_allclose(matcher.flow(found)[0].detach(), flow, atol=1e-6)


def test_pairs_are_aggregated_alone(tiny: CATsPP) -> None:
    frames = torch.cat([normalise(texture(k, 64, 64)) for k in range(4)])
    with torch.no_grad():
        together = tiny.aggregate(*tiny.embed(frames[:2]), *tiny.embed(frames[2:]))
        for i in range(2):
            alone = tiny.aggregate(
                *tiny.embed(frames[i : i + 1]), *tiny.embed(frames[2 + i : 3 + i])
            )
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_exchanging_the_images_transposes_the_cost(tiny: CATsPP) -> None:
    """The first convolutions aside the network does not know which image is which: with both
    planes of these alike, and the strides of both images, it does not at all."""
    matcher = uneven(tiny)
    for step in matcher.hpn_learner.early_conv:
        conv = step.conv4d[0][0]
        conv.supp_conv.load_state_dict(conv.query_conv.state_dict())
    a, b = (matcher.embed(normalise(texture(k, 64, 64)).double()) for k in (0, 1))
    with torch.no_grad():
        torch.testing.assert_close(matcher.aggregate(*a, *b), matcher.aggregate(*b, *a).mT)


# -- what the answer must be ----------------------------------------------------------------------


def test_a_shifted_image_is_followed(plain: CATsPP) -> None:
    """By two cells: what is at x in the query is at x - 32 in the reference."""
    wide = texture(0)
    points = [[100, 60], [150, 130.5], [200, 200]]
    found = answer(plain, wide[:, :256], wide[:, 32:288], points)
    np.testing.assert_allclose(found - points, [[-32, 0]] * 3, atol=6)


def test_answers_are_in_pixels_of_the_original_images(plain: CATsPP) -> None:
    query = texture(1)[:, :256]
    stretched = np.asarray(PIL.Image.fromarray(query).resize((512, 384)))
    points = np.array([[60.0, 70.0], [128.0, 200.0]])
    np.testing.assert_allclose(answer(plain, query, stretched, points), points * [2, 1.5], atol=8)
    np.testing.assert_allclose(answer(plain, stretched, query, points * [2, 1.5]), points, atol=6)


def test_the_query_is_the_papers_target(tiny: CATsPP) -> None:
    query, reference = texture(2, 64, 64), texture(3, 64, 64)
    with torch.no_grad():
        cost = tiny.aggregate(*tiny.embed(normalise(reference)), *tiny.embed(normalise(query)))
        (flow,) = tiny.flow(cost)
        points = torch.tensor([[20.0, 30.0], [50.5, 7.25]])
        expected = tiny.transfer(points, flow)
    np.testing.assert_allclose(answer(tiny, query, reference, points), expected, atol=1e-3)


def test_the_official_read_out_is_the_upsampled_flow_at_whole_pixels(plain: CATsPP) -> None:
    flow = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32))
    dense = F.interpolate(flow[None], (256, 256), mode="bilinear", align_corners=False)[0] * 16
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    pixels = torch.stack([x, y], -1).reshape(-1, 2).float()
    expected = pixels + dense.flatten(1).T
    official = copy.copy(plain)
    official.official = True
    inside = pixels + torch.from_numpy(np.random.default_rng(1).uniform(0, 0.99, pixels.shape))
    for matcher, points in ((plain, pixels), (official, pixels), (official, inside.float())):
        torch.testing.assert_close(matcher.transfer(points, flow), expected, rtol=0, atol=1e-4)
    assert (plain.transfer(inside.float(), flow) - expected).abs().max() > 0.5


def test_the_official_read_out_truncates_toward_zero_and_clamps() -> None:
    matcher = CATsPP(**TINY, init="random", official=True)
    points = torch.tensor([[-3.0, 63.9], [-0.9, 300.0], [7.99, 8.0]])
    assert matcher.transfer(points, torch.zeros(2, 8, 8)).tolist() == [[0, 63], [0, 63], [7, 8]]


@pytest.mark.parametrize("value", [0, 255])
def test_images_without_content_are_answered(tiny: CATsPP, value: int) -> None:
    blank, other = np.full((50, 60, 3), value, np.uint8), tiny_pixels(0, 40, 50)
    for pair in ((blank, other), (other, blank), (blank, blank)):
        assert np.isfinite(answer(tiny, *pair, [[0, 0], [30, 20]])).all()


def test_features_that_are_not_finite_are_an_error(tiny: CATsPP) -> None:
    broken = copy.deepcopy(tiny)
    broken.backbone.conv1.weight.data[0, 0, 0, 0] = float("nan")
    image = Image.from_pixels(tiny_pixels(0, 40, 50))
    with pytest.raises(NemfError, match=f"{image.hash[:12]} are not finite"):
        broken.encode([image], "query")


@pytest.mark.parametrize(
    ("backbone", "layers", "sides"),
    [
        ("resnet18", (3, 6, 8), [4, 8, 16]),
        ("resnet50", (15, 16), [4]),
        ("resnet_small", (1,), [32]),
    ],
)
def test_any_trunk_and_layers(backbone: str, layers: tuple[int, ...], sides: list[int]) -> None:
    matcher = CATsPP(backbone, layers, init="random", input_size=128).eval()
    assert matcher.sides == sides
    found = answer(matcher, tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]])
    assert np.isfinite(found).all()


# -- weights --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny: CATsPP, tmp_path: Path) -> Callable[..., Path]:
    """``saved(change)`` writes the tiny matcher's state dict after ``change(state)``."""

    def save(change: Callable[[dict[str, Tensor]], Any] = lambda state: None) -> Path:
        state = dict(tiny.state_dict())
        change(state)
        content = {"epoch": 3, "state_dict": state, "best_loss": 0.5, "optimizer": {"lr": [3e-4]}}
        torch.save(content, tmp_path / "model_best.pth")
        return tmp_path / "model_best.pth"

    return save


def conv(name: str, c_in: int, c_out: int, kernels: tuple[int, int] = (3, 3)) -> dict[str, Any]:
    shapes: dict[str, Any] = {}
    for part, kernel in zip(("query_conv", "supp_conv"), kernels, strict=True):
        shapes |= {f"{name}.{part}.weight": (c_out, c_in, kernel, kernel)}
        shapes |= {f"{name}.{part}.bias": (c_out,)}
    return shapes


def norm(name: str) -> dict[str, Any]:
    return {f"{name}.weight": (4,), f"{name}.bias": (4,)}


def test_the_official_keys() -> None:
    """Names and shapes in the paper's setting, as specified."""
    expected: dict[str, Any] = {"x_normal": (32,), "y_normal": (32,)}
    levels = [(3, 2048, 64, 3), (23, 1024, 256, 3), (4, 512, 1024, 5)]
    for level, (n_taps, channels, tokens, kernel) in enumerate(levels):
        expected |= conv(f"early_conv.{level}.conv4d.0.0", n_taps, 4)
        expected |= norm(f"early_conv.{level}.conv4d.0.1")
        expected |= {f"affinity_proj.{level}.0.weight": (128, channels, 3, 3)}
        expected |= {f"affinity_proj.{level}.0.bias": (128,)}
        layer, kernels = f"transformers.{level}.layer.0", (kernel, 3)
        for name in ("qk.conv", "v"):
            expected |= conv(f"{layer}.{name}.0", 4, 4, kernels) | norm(f"{layer}.{name}.1")
        expected |= conv(f"{layer}.mlp.mlp.0", 4, 16, kernels)
        expected |= conv(f"{layer}.mlp.mlp.2", 16, 4, kernels)
        expected |= norm(f"{layer}.norm1") | norm(f"{layer}.norm2")
        expected |= {f"{layer}.qk.linear.weight": (1024, 384), f"{layer}.qk.linear.bias": (1024,)}
        expected |= {f"{layer}.pos_embed": (1, tokens, 1, 128)}
    matcher = CATsPP(init="random")
    shapes = {key: tuple(value.shape) for key, value in matcher.state_dict().items()}
    head = {k.removeprefix("hpn_learner."): v for k, v in shapes.items() if "hpn_learner" in k}
    assert head == expected
    trunk = [key for key in shapes if not key.startswith("hpn_learner.")]
    assert {key.split(".")[0] for key in trunk} == {"backbone"}
    assert shapes["backbone.layer3.22.conv3.weight"] == (1024, 256, 1, 1)
    assert shapes["backbone.layer4.2.bn3.running_var"] == (2048,)
    assert matcher.sides == [16, 32, 64]
    strides = [
        [conv.stride[0] for conv in (layer[0].qk.conv[0].query_conv, layer[0].qk.conv[0].supp_conv)]
        for layer in (transformer.layer for transformer in matcher.hpn_learner.transformers)
    ]
    assert strides == [[1, 1], [2, 1], [4, 1]]


def test_a_checkpoint_comes_back_with_its_sizes(tiny: CATsPP, saved: Callable[..., Path]) -> None:
    twin = nemf.build_matcher("catspp", **UNSIZED, weights=saved())
    assert twin.weights_hash == tiny.weights_hash
    assert (twin.input_size, twin.affinity_dim, twin.feature_size) == (64, 6, 8)
    assert not twin.random_weights
    assert not twin.training
    pair = tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]]
    np.testing.assert_array_equal(answer(twin, *pair), answer(tiny, *pair))


def test_the_classifier_and_missing_counters_are_accepted(
    tiny: CATsPP, saved: Callable[..., Path]
) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state |= {"backbone.fc.weight": torch.ones(5, 96), "backbone.fc.bias": torch.ones(5)}
        for key in [k for k in state if k.endswith("num_batches_tracked")]:
            del state[key]  # as in old files

    assert CATsPP(**UNSIZED, weights=saved(change)).weights_hash == tiny.weights_hash


PREFIX = "hpn_learner."


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda s: s.pop(f"{PREFIX}transformers.1.layer.0.norm2.bias"),
            r"this CATs\+\+ on resnet_small: 1 missing .*transformers.1.layer.0.norm2.bias",
        ),
        (
            lambda s: s.update({f"{PREFIX}transformers.0.layer.1.norm1.bias": torch.ones(4)}),
            "1 unexpected .*transformers.0.layer.1.norm1.bias",
        ),
        (
            lambda s: s.update({"backbone.layer9.weight": torch.ones(2)}),
            "1 unexpected .backbone.layer9.weight",
        ),
        (
            lambda s: s.update({f"{PREFIX}y_normal": torch.ones(3)}),
            r"1 misshapen .hpn_learner.y_normal \(3,\) for \(8,\)",
        ),
        (
            lambda s: s.update({f"{PREFIX}x_normal": torch.full((8,), float("nan"))}),
            r"damaged: 1 not finite \(hpn_learner.x_normal\)",
        ),
        (lambda s: s.pop(f"{PREFIX}x_normal"), r"no CATs\+\+ checkpoint .*x_normal"),
        (
            lambda s: s.update({f"{PREFIX}affinity_proj.0.0.weight": torch.ones(2, 3)}),
            r"no CATs\+\+ checkpoint \(level 0 is not whole\)",
        ),
        (
            lambda s: s.pop(f"{PREFIX}early_conv.2.conv4d.0.0.query_conv.weight"),
            r"no CATs\+\+ checkpoint \(level 2 is not whole\)",
        ),
        (lambda s: s.update({f"{PREFIX}x_normal": torch.ones(())}), r"no CATs\+\+ checkpoint"),
    ],
)
def test_a_file_that_does_not_fit_is_explained(
    saved: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=rf"model_best\.pth.*{complaint}"):
        CATsPP(**UNSIZED, weights=saved(change))


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        (
            {"layers": (1, 2, 4, 6)},
            r"levels of .layers, channels. \[.2, 96., .* but \[\[6\], .* are \[.1, 96., .1, 48., ",
        ),
        ({"backbone": "resnet18"}, r"of resnet18 are \[\(2, 256\), \(1, 128\), \(2, 64\)\]"),
        ({"channels": 2}, "has channels 4, not 2: leave channels out"),
        ({"input_size": 128}, "has input_size 64, not 128"),
        ({"init": "random"}, "not both"),
        ({"backbone_weights": "x.pth"}, "goes with init='head' or 'random' only"),
    ],
)
def test_keywords_that_disagree_with_the_file(
    saved: Callable[..., Path], keywords: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=complaint):
        CATsPP(**UNSIZED | {"weights": saved()} | keywords)


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"channels": 0}, "channels must be at least 1, not 0"),
        ({"affinity_dim": -1}, "affinity_dim must be at least 1, not -1"),
        ({"query_dim": 6}, "query_dim 6 must be a multiple of channels 4"),
        ({"input_size": 80}, "input_size must be a multiple of 32 px, .* not 80"),
        ({"layers": (0, 4, 6)}, r"after its stem, .* not in the stages \[0, 2, 3\]"),
        ({"layers": (2, 6)}, r"half the resolution .* not in the stages \[1, 3\]"),
        ({"layers": (6, 4)}, "increasing ids from 0 to 6"),
        (
            {"backbone": "resnet18", "layers": (2, 4, 6, 8)},
            r"one to 3 stages of resnet18 .* not in the stages \[1, 2, 3, 4\]",
        ),
    ],
)
def test_sizes_and_layers_that_mean_nothing(keywords: dict[str, Any], complaint: str) -> None:
    with pytest.raises(NemfError, match=complaint):
        CATsPP(**TINY | keywords, init="random")


def test_a_learned_trunk_under_a_random_head(tmp_path: Path) -> None:
    trunk = build_backbone("resnet_small", init="random", upto=6, seed=5)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    matcher = CATsPP(**TINY, init="random", backbone_weights=tmp_path / "trunk.pth")
    assert torch.equal(matcher.backbone.conv1.weight, trunk.conv1.weight)
    assert not matcher.backbone.is_random
    assert matcher.random_weights  # the head


# -- training -------------------------------------------------------------------------------------


def batch_of(n_pairs: int, side: int = 64) -> PairBatch:
    """Pairs of which the target is the source, shifted by 8 px; the first has fewer keypoints."""
    samples = []
    for k in range(n_pairs):
        wide = texture(20 + k, side, side + 16)
        src, trg = (normalise(np.ascontiguousarray(wide[:, x : x + side]))[0] for x in (8, 0))
        kps = np.random.default_rng(k).uniform(4, side - 14, (2 + k, 2)).astype(np.float32)
        points = torch.from_numpy(kps)
        samples.append((src, trg, points, points + torch.tensor([8.0, 0]), k))
    return collate_pairs(samples)


def test_the_loss_is_the_mean_distance_from_the_labels(tiny: CATsPP) -> None:
    """One keypoint teaches the cells within 17/16 of a cell of 8 px."""
    frames = batch_of(1)
    kps = torch.tensor([[[30.0, 20.0]]]), torch.tensor([[[20.0, 36.0]]])
    batch = PairBatch(
        frames.src, frames.trg, *kps, torch.ones(1, 1, dtype=torch.bool), frames.seeds
    )
    with torch.no_grad():
        cost = tiny.aggregate(*tiny.embed(batch.src), *tiny.embed(batch.trg))
        flow = tiny.flow(cost)[0].numpy()
        loss = tiny.loss(batch)["loss_flow"].item()
    label = np.array([(30 - 20) / 8, (20 - 36) / 8])
    taught = [(r, c) for r in (3, 4, 5) for c in (1, 2, 3)]  # centres 8 (n + 1/2), reach 8.5 px
    expected = [np.linalg.norm(flow[:, r, c] - label) for r, c in taught]
    assert tiny.supervised(batch)["loss_flow"].item() == len(taught)
    assert loss == pytest.approx(np.mean(expected), rel=1e-4)


def test_half_of_the_affinity_is_dropped_in_training_by_the_pair_s_seed() -> None:
    matcher = CATsPP(**TINY | {"affinity_dim": 400}, init="random")
    kept = matcher._kept_channels(torch.tensor([7, 8, 7]))
    assert kept.shape == (3, 2, 3, 400)
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert kept.mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0, 0], kept[0, 1])
    batch = batch_of(2)
    with torch.no_grad():
        evaluated = [matcher.eval().loss(batch)["loss_flow"].item() for _ in range(2)]
        trained = [matcher.train().loss(batch)["loss_flow"].item() for _ in range(2)]
    assert evaluated[0] == evaluated[1]
    assert trained[0] == trained[1] != evaluated[0]


def test_a_dropped_channel_has_no_influence(tiny: CATsPP, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is multiplied by zero could be anything: here the target's channels of level 1."""
    matcher = copy.deepcopy(tiny).train()
    kept = torch.ones(2, 2, 3, 6)
    kept[:, 1, 1] = 0
    monkeypatch.setattr(matcher, "_kept_channels", lambda seeds: kept)
    batch = batch_of(2)
    with torch.no_grad():
        loss = matcher.loss(batch)["loss_flow"]
        (src_taps, src), (trg_taps, trg) = matcher.embed(batch.src), matcher.embed(batch.trg)
        trg[1] = torch.zeros_like(trg[1])
        flow = matcher.flow(matcher.aggregate(src_taps, src, trg_taps, trg))
        monkeypatch.setattr(matcher, "flow", lambda cost: flow)
        assert matcher.loss(batch)["loss_flow"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_training_learns_pairs_by_heart() -> None:
    matcher = CATsPP(**TINY, init="random").train()
    batch = batch_of(2)
    optimiser = torch.optim.AdamW([p for p in matcher.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for _ in range(25):
        loss = matcher.loss(batch)["loss_flow"]
        seen.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert min(seen[-3:]) < 0.4 * seen[0]


def test_gradients_reach_every_part_of_the_head(tiny: CATsPP) -> None:
    matcher = copy.deepcopy(tiny).train()
    batch = batch_of(2)
    cost = matcher.aggregate(*matcher.embed(batch.src), *matcher.embed(batch.trg))
    (matcher.flow(cost).square().mean() + cost.square().mean()).backward()
    for name, parameter in matcher.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
