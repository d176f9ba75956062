"""Convolutions over many axes against loops over every tap and every cell."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemf import convolution
from nemf.convolution import convolve, doubled


def by_cells(volume: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The definition: out[b, o, i] = bias[o] + sum over c, p of weight[o, c, p] x[b, c, i + p - r],
    one product at a time, nothing outside."""
    sizes, kernel = volume.shape[2:], weight.shape[2:]
    out = np.zeros((len(volume), len(weight), *sizes))
    for b, o, c in itertools.product(*(range(n) for n in (len(volume), *weight.shape[:2]))):
        for cell in itertools.product(*map(range, sizes)):
            for tap in itertools.product(*map(range, kernel)):
                there = tuple(i + p - k // 2 for i, p, k in zip(cell, tap, kernel, strict=True))
                if all(0 <= i < n for i, n in zip(there, sizes, strict=True)):
                    out[(b, o, *cell)] += weight[(o, c, *tap)] * volume[(b, c, *there)]
    return out + bias.reshape(-1, *[1] * len(sizes))


def by_taps(volume: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The sum over the taps of shifted volumes: the same, faster."""
    sizes, kernel = volume.shape[2:], weight.shape[2:]
    padded = np.pad(volume, [(0, 0), (0, 0), *((k // 2, k // 2) for k in kernel)])
    out = np.zeros((len(volume), len(weight), *sizes))
    for tap in itertools.product(*map(range, kernel)):
        shifted = padded[(..., *(slice(p, p + n) for p, n in zip(tap, sizes, strict=True)))]
        out += np.einsum("bc...,oc->bo...", shifted, weight[(..., *tap)])
    return out


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [((3, 2, 3, 4), (3, 3, 3, 3)), ((2, 3, 2, 2), (1, 3, 5, 3)), ((2, 2, 2, 3, 2, 2), (3,) * 6)],
)
def test_every_cell_by_hand(sizes: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    volume, weight, bias = drawn(0, 1, 2, *sizes), drawn(1, 2, 2, *kernel), drawn(2, 2)
    expected = by_cells(*(x.numpy() for x in (volume, weight, bias)))
    np.testing.assert_allclose(convolve(volume, weight, bias), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Four to six axes, kernels larger than the volume among them, whichever way it is cut."""
    n_axes = data.draw(st.integers(4, 6))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=n_axes, max_size=n_axes))
    kernel = data.draw(st.lists(st.sampled_from([1, 3, 5]), min_size=n_axes, max_size=n_axes))
    batch, c_in, c_out = (data.draw(st.integers(1, 3)) for _ in range(3))
    volume, weight = drawn(0, batch, c_in, *sizes), drawn(1, c_out, c_in, *kernel)
    expected = by_taps(volume.numpy(), weight.numpy())
    np.testing.assert_allclose(convolve(volume, weight), expected, atol=1e-10)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_every_cut_gives_the_same(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, weight = drawn(0, 2, 3, 4, 5, 3, 2, 3, 4), drawn(1, 2, 3, 3, 5, 1, 3, 1, 3)
    monkeypatch.setattr(convolution, "_cut", lambda _: cut)
    expected = by_taps(volume.numpy(), weight.numpy())
    np.testing.assert_allclose(convolve(volume, weight), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "kernel", "cut"),
    [
        ((1, 16), (5, 5, 5, 5), 1),  # 5 channels in, 16 out
        ((16, 16), (5, 5, 5, 5), 1),  # 80, 16: no more than 16, 80
        ((16, 1), (5, 5, 5, 5), 0),  # 16, 5
        ((1, 1), (5, 5, 5, 5), 0),  # 1, 5
        ((1, 1), (3, 3, 5, 5, 5, 5), 1),  # 3, 15
    ],
)
def test_the_cheapest_cut(channels: tuple[int, int], kernel: tuple[int, ...], cut: int) -> None:
    c_in, c_out = channels
    assert convolution._cut(torch.empty(c_out, c_in, *kernel)) == cut


@pytest.mark.parametrize(
    ("channels", "sizes", "kernel"),
    [
        ((1, 2), (2, 3, 2, 2), (3, 3, 1, 3)),
        ((2, 2), (2, 2, 3, 2), (3, 3, 3, 1)),
        ((2, 1), (2, 2, 2, 2), (3, 3, 3, 3)),
        ((1, 1), (2, 1, 2, 2, 2, 2), (3, 3, 1, 3, 3, 1)),
    ],
)
def test_gradients(
    channels: tuple[int, int], sizes: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    c_in, c_out = channels
    inputs = drawn(0, 2, c_in, *sizes), drawn(1, c_out, c_in, *kernel), drawn(2, c_out)
    assert torch.autograd.gradcheck(convolve, [x.requires_grad_() for x in inputs])


def test_inputs_are_not_changed() -> None:
    inputs = drawn(0, 1, 2, 3, 3, 3, 3), drawn(1, 1, 2, 3, 3, 3, 3), drawn(2, 1)
    before = [x.clone() for x in inputs]
    convolve(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("volume", "weight", "complaint"),
    [
        ((1, 2, 3, 3, 3, 3), (1, 1, 3, 3, 3, 3), "do not belong together"),
        ((1, 1, 3, 3, 3, 3), (1, 1, 3, 3, 3), "do not belong together"),
        ((1, 1, 3, 3, 3), (1, 1, 3, 3, 3), "do not belong together"),
        ((1, 1, 3, 3, 3, 3), (1, 1, 3, 2, 3, 3), r"odd sides, not \(3, 2, 3, 3\)"),
    ],
)
def test_shapes_that_mean_nothing(
    volume: tuple[int, ...], weight: tuple[int, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        convolve(torch.zeros(volume), torch.zeros(weight))


def test_doubling_is_linear_between_the_outermost_cells() -> None:
    """Along every axis: of n cells cell k lies at k (2n - 1) / (n - 1) of the doubled ones."""
    volume = drawn(0, 2, 3, 2, 3, 4, 5)
    expected = volume.numpy()
    for axis in range(2, 6):
        n = expected.shape[axis]
        place = np.arange(n) * (2 * n - 1) / (n - 1)
        expected = np.apply_along_axis(
            lambda line, place=place, n=n: np.interp(np.arange(2 * n), place, line), axis, expected
        )
    np.testing.assert_allclose(doubled(volume), expected, atol=1e-12)
    np.testing.assert_allclose(doubled(volume[0, 0]), expected[0, 0], atol=1e-12)
