"""The contract that every registered matcher keeps. A matcher that fails to build is a failure."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nemf
from nemf.cards import MatcherCard, available_matchers, matcher_entry_point, read_card
from nemf.errors import NemfError, WeightsNotFound
from nemf.matcher import Matcher
from nemf.pairs import Image, Matches
from nemf.scoring import PROTOCOLS
from tests.conftest import tiny_pixels

# What makes a matcher small and free of weights files; everything else runs with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "copy": {},
    "nearest": {"backbone": "resnet_small", "init": "random"},
    "hpf": {"backbone": "resnet_small", "layers": (2, 6), "init": "random"},
    "scot": {"backbone": "resnet_small", "layers": (4, 6), "init": "random"},
    "ncnet": {
        **{"backbone": "resnet_small", "kernel_sizes": (3, 3), "channels": (4, 1)},
        **{"input_size": 128, "init": "random"},
    },
    "chm": {"backbone": "resnet_small", "input_size": 128, "init": "random"},
    "dhpf": {"backbone": "resnet_small", "input_size": 128, "init": "random"},
    "mmnet": {"backbone": "resnet_small", "init": "random"},
    "dinov2_nn": {"backbone": "dinov2_tiny", "init": "random", "input_size": 224},
    "cats": {"backbone": "resnet_small", "layers": (0, 3, 6), "init": "random"},
    "catspp": {
        **{"backbone": "resnet_small", "layers": (3, 4, 5, 6), "input_size": 128},
        **{"affinity_dim": 16, "query_dim": 32, "init": "random"},
    },
    "transformatcher": {
        **{"backbone": "resnet_small", "input_size": 128, "depth": 2, "init": "random"},
    },
    "scorrsan": {"backbone": "resnet_small", "width": 128, "init": "random"},
    "nemf": {
        **{"backbone": "resnet_small", "layers": (2, 4, 6), "init": "random"},
        **{"proj_dim": 32, "mlp_ratio": 1, "iterations": 3},
    },
}
NAMES = sorted(available_matchers())


@cache
def built(name: str) -> Matcher:
    return nemf.build_matcher(name, **SMALL.get(name, {}))


@pytest.fixture(params=NAMES)
def matcher(request: pytest.FixtureRequest) -> Matcher:
    return built(request.param)


def image(seed: int, height: int = 96, width: int = 120, canvas: Any = None) -> Image:
    pixels = tiny_pixels(seed, height, width)
    return dataclasses.replace(Image.from_pixels(pixels, "cat"), canvas=canvas or (height, width))


def queries(seed: int, n: int, height: int = 96, width: int = 120) -> torch.Tensor:
    xy = np.random.default_rng(seed).uniform(4, [width - 5, height - 5], (n, 2))
    return torch.from_numpy(xy.astype(np.float32))


def answer(matcher: Matcher, pairs: list[tuple[Image, Image, torch.Tensor]]) -> list[Matches]:
    with torch.no_grad():
        encoded_q = [matcher.encode([q], "query")[0] for q, _, _ in pairs]
        encoded_r = [matcher.encode([r], "reference")[0] for _, r, _ in pairs]
        return matcher.match(encoded_q, encoded_r, [p for _, _, p in pairs])


def test_every_registered_matcher_is_tested() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    ours = set(project["project"]["entry-points"]["nemf.matchers"])
    assert set(SMALL) == ours
    assert set(NAMES) >= ours  # other packages may have joined


def test_answers_have_the_promised_form(matcher: Matcher) -> None:
    (found,) = answer(matcher, [(image(1), image(2, 80, 100), queries(3, 7))])
    assert isinstance(found, Matches)
    assert found.points.shape == (7, 2)
    assert found.points.dtype == torch.float32
    assert not torch.isinf(found.points).any()
    if found.confidence is not None:
        assert found.confidence.shape == (7,)
    if found.flow is not None:
        assert found.flow.shape == (2, 96, 120)


def test_a_batch_equals_its_pairs_one_by_one(matcher: Matcher) -> None:
    pairs = [(image(k), image(k + 10, 70 + k, 90), queries(k, 3 + k)) for k in range(3)]
    together = answer(matcher, pairs)
    alone = [answer(matcher, [pair])[0] for pair in pairs]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.points, b.points, rtol=0, atol=1e-3, equal_nan=True)


def test_the_order_of_keypoints_does_not_matter(matcher: Matcher) -> None:
    points = queries(5, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    (plain,) = answer(matcher, [(image(1), image(2), points)])
    (mixed,) = answer(matcher, [(image(1), image(2), points[order])])
    torch.testing.assert_close(mixed.points, plain.points[order], rtol=0, atol=1e-3, equal_nan=True)


def test_inputs_are_not_changed(matcher: Matcher) -> None:
    a, b, points = image(1), image(2), queries(3, 5)
    before = a.pixels.copy(), b.pixels.copy(), points.clone()
    first = answer(matcher, [(a, b, points)])[0].points.clone()
    again = answer(matcher, [(a, b, points)])[0].points
    np.testing.assert_array_equal(a.pixels, before[0])
    np.testing.assert_array_equal(b.pixels, before[1])
    torch.testing.assert_close(points, before[2], rtol=0, atol=0)
    torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)


def test_features_can_be_used_again(matcher: Matcher) -> None:
    """A cached encoding serves several pairs: match must not change it."""
    a, b, points = image(1), image(2), queries(3, 5)
    with torch.no_grad():
        (q,) = matcher.encode([a], "query")
        (r,) = matcher.encode([b], "reference")
        first = matcher.match([q], [r], [points])[0].points.clone()
        second = matcher.match([q], [r], [points])[0].points
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [0, 1, 40])
def test_any_number_of_queries(matcher: Matcher, n: int) -> None:
    (found,) = answer(matcher, [(image(1), image(2), queries(3, n))])
    assert found.points.shape == (n, 2)


@pytest.mark.parametrize("size", [(32, 32), (33, 150), (310, 64), (1500, 2000)])
def test_any_image_size(matcher: Matcher, size: tuple[int, int]) -> None:
    pair = (image(1, *size), image(2, size[1], size[0]), queries(3, 4, *size))
    (found,) = answer(matcher, [pair])
    assert found.points.shape == (4, 2)


def test_queries_on_the_border_are_answered_or_nan(matcher: Matcher) -> None:
    corners = torch.tensor([[0, 0], [119, 0], [0, 95], [119, 95], [59.5, 47.5]])
    (found,) = answer(matcher, [(image(1), image(2), corners)])
    inside = found.points[~torch.isnan(found.points).any(1)]
    assert ((inside > -60) & (inside < 180)).all()


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_pictures_without_content_are_answered_inside_or_nan(matcher: Matcher, grey: int) -> None:
    flat = [Image.from_pixels(np.full((96, 120, 3), grey, np.uint8)) for _ in range(2)]
    (found,) = answer(matcher, [(*flat, queries(3, 4))])
    inside = found.points[~torch.isnan(found.points).any(1)]
    assert ((inside > -60) & (inside < 180)).all()


def test_answers_are_x_y_pixels_of_the_reference_image(matcher: Matcher) -> None:
    """In a wide image the axes cannot be taken for each other, nor pixels for shares."""
    (found,) = answer(matcher, [(image(1), image(2, 64, 500), queries(3, 12))])
    answered = found.points[~torch.isnan(found.points).any(1)]
    assert len(answered) > 0
    assert ((answered > -60) & (answered < torch.tensor([560, 124]))).all()
    assert answered.abs().max() > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_agrees_with_the_cpu(matcher: Matcher) -> None:
    """Within a pixel: rounding may flip a decision of a random network here and there."""
    pair = (image(1), image(2, 80, 100), queries(3, 20))
    (expected,) = answer(matcher, [pair])
    on_gpu = nemf.build_matcher(matcher.card.name, **SMALL.get(matcher.card.name, {})).cuda()
    (found,) = answer(on_gpu, [(pair[0], pair[1], pair[2].cuda())])
    away = (found.points.cpu() - expected.points).norm(dim=1).nan_to_num()
    assert (away < 1e-2).float().mean() > 0.9


def test_a_canvas_keeps_coordinates_in_the_image(matcher: Matcher) -> None:
    """Padding must not shift the frame: on a canvas the answers stay in original pixels."""
    a, b = image(1, canvas=(130, 140)), image(2, 80, 100, canvas=(130, 140))
    (found,) = answer(matcher, [(a, b, queries(3, 6))])
    answered = found.points[~torch.isnan(found.points).any(1)]
    assert ((answered > -15) & (answered < 155)).all()


def test_roles_matter_only_where_the_class_says_so(matcher: Matcher) -> None:
    if matcher.uses_role:
        pytest.skip(f"{matcher.card.name} encodes by role")
    a, b, points = image(1), image(2), queries(3, 5)
    with torch.no_grad():
        q, r = matcher.encode([a], "reference"), matcher.encode([b], "query")
        swapped = matcher.match(q, r, [points])[0].points
    plain = answer(matcher, [(a, b, points)])[0].points
    torch.testing.assert_close(swapped, plain, rtol=0, atol=0, equal_nan=True)


def test_lists_of_different_length_are_refused(matcher: Matcher) -> None:
    with torch.no_grad():
        (q,) = matcher.encode([image(1)], "query")
    with pytest.raises(ValueError, match=r"zip|length|argument"):
        matcher.match([q], [q, q], [queries(1, 2)])


def test_it_never_touches_the_global_random_state(matcher: Matcher) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state().clone()
    answer(matcher, [(image(1), image(2), queries(3, 4))])
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_survive_saving_and_loading(matcher: Matcher) -> None:
    twin = nemf.build_matcher(matcher.card.name, **SMALL.get(matcher.card.name, {}))
    twin.load_state_dict(matcher.state_dict())
    assert twin.weights_hash == matcher.weights_hash
    pair = (image(1), image(2), queries(3, 5))
    torch.testing.assert_close(
        answer(twin, [pair])[0].points, answer(matcher, [pair])[0].points, equal_nan=True
    )


def test_random_weights_are_declared(matcher: Matcher) -> None:
    assert matcher.random_weights == (SMALL.get(matcher.card.name, {}).get("init") == "random")


@pytest.mark.parametrize("name", [name for name in NAMES if "init" in SMALL.get(name, {})])
def test_weights_are_never_drawn_silently(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMF_WEIGHTS", raising=False)
    with pytest.raises(WeightsNotFound, match=r"no weights for .*weights=FILE"):
        nemf.build_matcher(name, **{k: v for k, v in SMALL[name].items() if k != "init"})


@pytest.mark.parametrize("name", [name for name in NAMES if "init" in SMALL.get(name, {})])
def test_random_weights_are_the_same_every_time(name: str) -> None:
    before = torch.get_rng_state()
    again = nemf.build_matcher(name, **SMALL[name])
    assert torch.equal(torch.get_rng_state(), before)
    assert again.weights_hash == built(name).weights_hash
    if "init_seed" in inspect.signature(type(again).__init__).parameters:
        other = nemf.build_matcher(name, **SMALL[name], init_seed=1)
        assert other.weights_hash != again.weights_hash


def test_the_weights_hash_sees_one_changed_value() -> None:
    matcher = nemf.build_matcher("nearest", **SMALL["nearest"])
    before = matcher.weights_hash
    next(iter(matcher.parameters())).data.view(-1)[0] += 1e-3
    assert matcher.weights_hash != before


def test_the_one_call_api(matcher: Matcher, tmp_path: Any) -> None:
    from PIL import Image as PILImage

    a, b, points = tiny_pixels(1, 96, 120), tiny_pixels(2, 96, 120), [[10, 20], [60.5, 40]]
    PILImage.fromarray(a).save(tmp_path / "a.png")
    from_path = nemf.match(matcher, tmp_path / "a.png", PILImage.fromarray(b), points)
    from_array = nemf.match(matcher, a, b, np.array(points))
    torch.testing.assert_close(from_path.points, from_array.points, equal_nan=True)
    assert nemf.match(matcher, a, b, []).points.shape == (0, 2)


@pytest.mark.parametrize("points", [[[1, 2, 3]], [1, 2], [[np.nan, 1]], [[np.inf, 1]]])
def test_the_one_call_api_refuses_bad_points(matcher: Matcher, points: Any) -> None:
    pixels = tiny_pixels(1, 40, 40)
    with pytest.raises(NemfError, match="points must be finite"):
        nemf.match(matcher, pixels, pixels, points)


def test_the_one_call_api_names_an_unreadable_image(matcher: Matcher, tmp_path: Any) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(NemfError, match=r"x\.jpg"):
        nemf.match(matcher, tmp_path / "x.jpg", tmp_path / "x.jpg", [[1, 1]])


# -- cards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_parsed_card_is_the_real_one(name: str) -> None:
    card = available_matchers()[name]
    assert card == matcher_entry_point(name).load().card
    assert card.name == name
    assert card.official_protocol in PROTOCOLS
    assert card.licence_of_original


def test_unknown_matchers_and_keywords_are_named() -> None:
    with pytest.raises(NemfError, match=r"unknown matcher 'nope'.*copy"):
        nemf.build_matcher("nope")
    with pytest.raises(NemfError, match="colour"):
        nemf.build_matcher("copy", colour=3)


def test_a_file_without_a_literal_card_is_named(tmp_path: Any) -> None:
    file = tmp_path / "m.py"
    file.write_text("x = 1\n")
    with pytest.raises(NemfError, match=r"m\.py: holds no CARD"):
        read_card(file)
    file.write_text("CARD = MatcherCard(name=input())\n")
    with pytest.raises(NemfError, match=r"m\.py: CARD must be"):
        read_card(file)
    file.write_text("CARD = MatcherCard(name='x')\n")
    with pytest.raises(NemfError, match="missing"):
        read_card(file)


def test_cards_are_plain_data() -> None:
    for card in available_matchers().values():
        assert isinstance(card, MatcherCard)
        assert all(isinstance(v, str | int | bool | None) for v in card.as_dict().values())


# -- copy, by hand --------------------------------------------------------------------------------


def test_copy_scales_by_the_image_sizes() -> None:
    pair = (image(1, 50, 100), image(2, 100, 50), torch.tensor([[10.0, 20.0], [0.0, 49.0]]))
    (found,) = answer(nemf.build_matcher("copy"), [pair])
    assert found.points.tolist() == [[5.0, 40.0], [0.0, 98.0]]


@pytest.mark.parametrize("target", ["Missing", "CARD"])
def test_an_entry_point_that_names_no_matcher_is_told(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("mine", f"baselines.copy:{target}", "nemf.matchers")
    monkeypatch.setattr("nemf.registry.matcher_entry_point", lambda name: point)
    with pytest.raises(NemfError, match=rf"'mine': its entry point 'baselines.copy:{target}'"):
        nemf.build_matcher("mine")
