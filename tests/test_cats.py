"""CATs: what it answers by construction, its checkpoints, and the official code's answers."""

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
from baselines.cats import CATs
from nemf.aggregation import unit
from nemf.backbones import build_backbone, normalise
from nemf.datasets import dataset_class
from nemf.errors import NemfError, WeightsNotFound
from nemf.pairs import Image, Matches
from tests.conftest import official_checkpoint, tiny_pixels

SMALL: dict[str, Any] = {"backbone": "resnet_small", "layers": (0, 3, 6)}
TINY = SMALL | {"feature_size": 8, "proj_dim": 32, "depth": 2, "heads": 4, "mlp_ratio": 2}


@pytest.fixture(scope="module")
def small() -> CATs:
    return CATs(**SMALL, init="random").eval()


@pytest.fixture(scope="module")
def plain() -> CATs:
    """CATs whose transformer adds nothing: the flow follows the filtered correlation."""
    matcher = CATs(**SMALL | {"layers": (6,)}, init="random").eval()
    for parameter in matcher.decoder.proj.parameters():
        parameter.data.zero_()
    return matcher


def texture(seed: int, height: int = 256, width: int = 320) -> np.ndarray:
    """uint8 (H, W, 3): blotches of about 16 px, no two places alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    picture = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
    return np.asarray(picture)


def answer(matcher: CATs, query: np.ndarray, reference: np.ndarray, points: Any) -> np.ndarray:
    return nemf.match(matcher, query, reference, points).points.numpy()


# -- what the answer must be ----------------------------------------------------------------------


def test_a_shifted_image_is_followed(plain: CATs) -> None:
    """By two cells: what is at x in the query is at x - 32 in the reference."""
    wide = texture(0)
    points = [[100, 60], [150, 130.5], [200, 200]]
    found = answer(plain, wide[:, :256], wide[:, 32:288], points)
    np.testing.assert_allclose(found - points, [[-32, 0]] * 3, atol=4)


def test_answers_are_in_pixels_of_the_original_images(plain: CATs) -> None:
    """The reference is the query stretched to 512 x 384; both fill the squashed frame alike."""
    query = texture(1)[:, :256]
    stretched = np.asarray(PIL.Image.fromarray(query).resize((512, 384)))
    points = np.array([[60.0, 70.0], [128.0, 200.0]])
    np.testing.assert_allclose(answer(plain, query, stretched, points), points * [2, 1.5], atol=6)
    np.testing.assert_allclose(answer(plain, stretched, query, points * [2, 1.5]), points, atol=4)


def test_the_official_read_out_is_the_upsampled_flow_at_whole_pixels(small: CATs) -> None:
    flow = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32))
    dense = F.interpolate(flow[None], (256, 256), mode="bilinear", align_corners=False)[0] * 16
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    pixels = torch.stack([x, y], -1).reshape(-1, 2).float()
    expected = pixels + dense.flatten(1).T
    official = copy.copy(small)
    official.official = True
    torch.testing.assert_close(small.transfer(pixels, flow), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(official.transfer(pixels, flow), expected, rtol=0, atol=1e-4)
    inside = pixels + torch.from_numpy(np.random.default_rng(1).uniform(0, 0.99, pixels.shape))
    found = official.transfer(inside.float(), flow)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_official_read_out_truncates_toward_zero_and_clamps() -> None:
    matcher = CATs(**SMALL, init="random", official=True)
    still = torch.zeros(2, 16, 16)
    points = torch.tensor([[-3.0, 255.9], [-0.9, 300.0], [7.99, 8.0]])
    assert matcher.transfer(points, still).tolist() == [[0, 255], [0, 255], [7, 8]]


def test_between_pixels_the_flow_is_linear_and_beyond_the_centres_constant(small: CATs) -> None:
    flow = torch.zeros(2, 16, 16)
    flow[0] = torch.arange(16.0)  # x displacement of column c: c cells
    points = torch.tensor([[7.5, 0.0], [23.5, 9.0], [11.25, 9.0], [-2.0, 0.0], [260.0, 255.0]])
    moved = small.transfer(points, flow)
    expected = [0, 16, 16 * 3.75 / 16, 0, 16 * 15]  # the centre of column c is 16 c + 7.5
    np.testing.assert_allclose((moved - points)[:, 0], expected, atol=1e-4)
    assert not (moved - points)[:, 1].any()


def test_the_query_is_the_papers_target(small: CATs) -> None:
    """The flow is that of the stages called one by one with the query as target."""
    query, reference = texture(2)[:, :256], texture(3)[:, :256]
    with torch.no_grad():
        sides = []
        for pixels in (reference, query):
            levels = small.levels(normalise(pixels))
            sides += [[unit(x) for x in levels], small.project(levels)]
        (flow,) = small.flow(small.refine(*sides))
        points = torch.tensor([[20.0, 30.0], [130.5, 77.25]])
        expected = small.transfer(points, flow)
    np.testing.assert_allclose(answer(small, query, reference, points), expected, atol=1e-3)


def test_a_stack_of_pairs_gives_the_same(small: CATs) -> None:
    """The path of a GPU, on the CPU."""
    images = [Image.from_pixels(tiny_pixels(k, 60 + k, 80)) for k in range(4)]
    features = [small.encode([image], "query")[0] for image in images]
    points = [torch.rand(k + 1, 2, generator=torch.manual_seed(k)) * 60 for k in range(4)]
    alone = small.match(features, features[::-1], points)
    with torch.no_grad():
        stacked = small._match(list(zip(features, features[::-1], points, strict=True)))
    for a, b in zip(alone, stacked, strict=True):
        torch.testing.assert_close(a.points, b.points, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (32, 32), (1500, 2000)])
@pytest.mark.parametrize("value", [0, 255])
def test_images_without_content_are_answered(
    small: CATs, size: tuple[int, int], value: int
) -> None:
    blank = np.full((*size, 3), value, np.uint8)
    other = tiny_pixels(0, 40, 50)
    for found in (
        answer(small, blank, other, [[0, 0]]),
        answer(small, other, blank, [[49, 39]]),
        answer(small, blank, blank, [[0, 0]]),
    ):
        assert np.isfinite(found).all()


def test_features_that_are_not_finite_are_an_error(small: CATs) -> None:
    broken = copy.deepcopy(small)
    broken.feature_extraction.backbone.conv1.weight.data[0, 0, 0, 0] = float("nan")
    image = Image.from_pixels(tiny_pixels(0, 40, 50))
    with pytest.raises(NemfError, match=f"{image.hash[:12]} are not finite"):
        broken.encode([image], "query")


def test_gradients_reach_every_part_of_the_head() -> None:
    matcher = CATs(**TINY, init="random").train()
    frames = torch.cat([normalise(texture(k)[:, :256]) for k in range(4)])
    levels = matcher.levels(frames)
    projected = matcher.project(levels)
    units = [unit(x) for x in levels]
    source, target = ([x[half] for x in units] for half in (slice(2), slice(2, 4)))
    flow = matcher.flow(matcher.refine(source, projected[:2], target, projected[2:]))
    assert flow.shape == (2, 2, 8, 8)
    flow.square().mean().backward()
    for name, parameter in matcher.named_parameters():
        if name.startswith(("feature_extraction.", "decoder.norm.")):
            assert parameter.grad is None
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [("resnet18", (2, 4, 6)), ("resnet18", (8,)), ("resnet50", (0, 16)), ("resnet_small", (1,))],
)
def test_any_trunk_and_layers(backbone: str, layers: tuple[int, ...]) -> None:
    matcher = CATs(backbone, layers, init="random").eval()
    found = answer(matcher, tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]])
    assert np.isfinite(found).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees(small: CATs) -> None:
    images = [Image.from_pixels(tiny_pixels(k, 60, 80)) for k in range(4)]
    points = [torch.rand(5, 2) * 60 for _ in images]

    def run(matcher: CATs) -> list[Matches]:
        features = matcher.encode(images, "query")
        return matcher.match(features, features[::-1], points)

    on_gpu = run(copy.deepcopy(small).cuda())
    for a, b in zip(run(small), on_gpu, strict=True):
        torch.testing.assert_close(a.points, b.points.cpu(), rtol=0, atol=0.05)


# -- weights --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> CATs:
    return CATs(**TINY, init="random").eval()


@pytest.fixture
def saved(tiny: CATs, tmp_path: Path) -> Callable[..., Path]:
    """``saved(change)`` writes the tiny matcher's state dict after ``change(state)``."""

    def save(change: Callable[[dict[str, Tensor]], Any] = lambda state: None) -> Path:
        state = dict(tiny.state_dict())
        change(state)
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "cats.pth")
        return tmp_path / "cats.pth"

    return save


def test_a_checkpoint_comes_back_with_its_sizes(tiny: CATs, saved: Callable[..., Path]) -> None:
    twin = nemf.build_matcher("cats", **SMALL, heads=4, weights=saved())
    assert twin.weights_hash == tiny.weights_hash
    assert not twin.random_weights
    assert not twin.training
    pair = tiny_pixels(1, 50, 60), tiny_pixels(2, 50, 60), [[3, 4], [50.5, 30]]
    np.testing.assert_array_equal(answer(twin, *pair), answer(tiny, *pair))


def test_what_lies_deeper_and_the_classifier_are_accepted(
    tiny: CATs, saved: Callable[..., Path]
) -> None:
    """Layers up to id 5 leave out the last block of the file, id 6."""
    trunk = "feature_extraction.backbone."

    def change(state: dict[str, Tensor]) -> None:
        assert f"{trunk}layer3.1.conv1.weight" in state
        state |= {f"{trunk}fc.weight": torch.ones(5, 96), f"{trunk}fc.bias": torch.ones(5)}
        for key in [k for k in state if k.endswith("num_batches_tracked")]:
            del state[key]  # as in old files

    twin = CATs("resnet_small", (0, 3, 5), heads=4, weights=saved(change))
    ours, theirs = twin.state_dict(), tiny.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    left_out = [key for key in theirs if key not in ours]
    assert left_out
    assert all(key.startswith(f"{trunk}layer3.1.") for key in left_out)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("decoder.blocks.1.norm4.bias"), "1 missing .decoder.blocks.1.norm4.bias"),
        (lambda s: s.update({"decoder.extra": torch.ones(2)}), "1 unexpected .decoder.extra"),
        (
            lambda s: s.update({"feature_extraction.backbone.layer9.x": torch.ones(2)}),
            "1 unexpected .feature_extraction.backbone.layer9.x",
        ),
        (
            lambda s: s.update({"decoder.proj.bias": torch.ones(3)}),
            r"1 misshapen .decoder.proj.bias \(3,\) for \(64,\)",
        ),
        (
            lambda s: s.update({"x_normal": torch.full((8,), float("nan"))}),
            r"damaged: 1 not finite \(x_normal\)",
        ),
        (lambda s: s.pop("decoder.pos_embed_x"), "no CATs checkpoint .*decoder.pos_embed_x"),
        (lambda s: s.update({"decoder.pos_embed_x": torch.ones(2)}), "no CATs checkpoint"),
    ],
)
def test_a_file_that_does_not_fit_is_explained(
    saved: Callable[..., Path], change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=rf"cats\.pth.*{complaint}"):
        CATs(**SMALL, heads=4, weights=saved(change))


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"layers": (3, 6)}, r"3 levels of \(24, 48, 96\) channels.*layers=\(3, 6\).*\(48, 96\)"),
        ({"backbone": "resnet18"}, r"\(24, 48, 96\) channels.*resnet18 have \(64, 128, 256\)"),
        ({"depth": 1}, "has depth 2, not 1: leave depth out"),
        ({"feature_size": 16}, "has feature_size 8, not 16"),
        ({"heads": 7}, "96 wide: that must be even and a multiple of heads = 7"),
        ({"init": "random"}, "not both"),
        ({"backbone_weights": "x.pth"}, "goes with init='head' or 'random' only"),
    ],
)
def test_keywords_that_disagree_with_the_file(
    saved: Callable[..., Path], keywords: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(NemfError, match=complaint):
        CATs(**SMALL | {"heads": 4, "weights": saved()} | keywords)


@pytest.mark.parametrize(
    "keywords",
    [{"feature_size": 0}, {"depth": 0}, {"mlp_ratio": -1}, {"heads": 0}, {"input_size": 0}],
)
def test_sizes_are_positive(keywords: dict[str, Any]) -> None:
    name, value = next(iter(keywords.items()))
    with pytest.raises(NemfError, match=f"{name} must be at least 1, not {value}"):
        CATs(**SMALL, init="random", **keywords)


def test_weights_are_never_drawn_silently(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match="weights=FILE"):
        nemf.build_matcher("cats")
    with pytest.raises(NemfError, match="init must be 'head', 'random'"):
        nemf.build_matcher("cats", init="imagenet")
    with pytest.raises(NemfError, match=r"gone\.pth"):
        nemf.build_matcher("cats", weights=tmp_path / "gone.pth")


def test_a_learned_trunk_under_a_random_head(tmp_path: Path) -> None:
    trunk = build_backbone("resnet_small", init="random", upto=6, seed=5)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    matcher = CATs(**SMALL, init="random", backbone_weights=tmp_path / "trunk.pth")
    loaded = matcher.feature_extraction.backbone
    assert torch.equal(loaded.conv1.weight, trunk.conv1.weight)
    assert not loaded.is_random
    assert matcher.random_weights  # the head


# -- the official code's answers ------------------------------------------------------------------


@pytest.fixture(scope="module")
def official_file(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the authors release it, with the goldens' weights."""
    return official_checkpoint(shared, "cats", tmp_path_factory.mktemp("cats") / "model_best.pth")


@pytest.fixture(scope="module")
def official(official_file: Path) -> CATs:
    return nemf.build_matcher("cats", weights=official_file, official=True)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    with np.load(shared / "goldens" / "cats_flow_small.npz") as file:
        return {key.removeprefix("small_"): value for key, value in file.items()}


def official_flow(matcher: CATs, golden: dict[str, np.ndarray]) -> Tensor:
    sides = []
    for name in ("src", "trg"):
        levels = matcher.levels(normalise(golden[f"{name}_u8"]).to(matcher.x_normal))
        sides += [[unit(x) for x in levels], matcher.project(levels)]
    with torch.no_grad():
        return matcher.flow(matcher.refine(*sides))


@pytest.mark.real
def test_an_official_file_is_taken_whole(official: CATs, official_file: Path) -> None:
    """Every key of ours is in the file with its value; what is left out is layer4 and fc."""
    state = torch.load(official_file, weights_only=True)["state_dict"]
    ours = official.state_dict()
    assert len(state) == 674
    assert all(torch.equal(value, state[key]) for key, value in ours.items())
    trunk = "feature_extraction.backbone."
    left_out = [key for key in state if key not in ours]
    assert all(key.startswith((f"{trunk}layer4.", f"{trunk}fc.")) for key in left_out)
    assert not official.random_weights


@pytest.mark.real
def test_official_features(official: CATs, golden: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        levels = official.levels(normalise(golden["src_u8"]))
    found = [[x.mean().item(), x.std().item()] for x in levels]
    np.testing.assert_allclose(found, golden["feat_mean_std"], rtol=1e-6, atol=1e-6)


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_flow(official: CATs, golden: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """The golden was made in float32: the temperature of 0.02 turns its rounding into up to 2e-3
    cells for some weights, for these into 4e-5, whichever precision it is compared with."""
    flow = official_flow(copy.deepcopy(official).to(dtype), golden)
    np.testing.assert_allclose(flow.numpy(), golden["flow"], rtol=0, atol=2e-4)


@pytest.mark.real
def test_official_keypoints(official: CATs, golden: dict[str, np.ndarray]) -> None:
    """Through the public interface, from the image to its answer."""
    n = int(golden["n"])
    assert (golden["trg_kps"][0, :, :n] % 1 > 0).any()  # so that truncation shows
    points, expected = golden["trg_kps"][0, :, :n].T, golden["est_src_kps"][0, :, :n].T
    found = answer(official, golden["trg_u8"], golden["src_u8"], points)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.real
def test_exact_keypoints_differ_from_the_official_by_truncation_only(
    official: CATs, golden: dict[str, np.ndarray]
) -> None:
    exact = copy.copy(official)
    exact.official = False
    points = golden["trg_kps"][0, :, : int(golden["n"])].T
    images = golden["trg_u8"], golden["src_u8"]
    found = answer(exact, *images, np.trunc(points))
    np.testing.assert_array_equal(found, answer(official, *images, points))
    assert np.abs(answer(exact, *images, points) - found).max() > 0.1


@pytest.mark.real
@pytest.mark.parametrize("name", ["spair", "pfpascal", "pfwillow"])
def test_images_are_squashed_as_the_official_loader_does(
    official: CATs, name: str, shared: Path
) -> None:
    """PNG (PF-WILLOW) exactly; JPEG decoders may differ by one grey level before the resize."""
    goldens = shared / "goldens"
    dataset = dataset_class(name)(goldens / "fake_datasets", "test", outside="keep")
    tolerance = 1e-6 if name == "pfwillow" else 1.01 / 255 / 0.224
    with np.load(goldens / "loaders_cats.npz") as file:
        for i, pair in enumerate(dataset):
            for side in ("src", "trg"):
                frame = official._frame(Image.from_pixels(dataset.pixels(getattr(pair, side))))
                found = frame.flatten()[file[f"{name}_{i}_{side}_img_idx"]]
                expected = file[f"{name}_{i}_{side}_img_val"]
                np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
