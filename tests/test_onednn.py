"""oneDNN's products equal torch's, and are left alone where they would be wrong to use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemf import onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="a torch build without oneDNN"
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_it_takes_float32_without_gradients_only() -> None:
    x = random(2, 3)
    assert not onednn.takes(x)  # gradients are on
    with torch.no_grad():
        assert onednn.takes(x)
        assert not onednn.takes(x.double())
        assert not onednn.takes(x[:0])
        assert not onednn.takes(x.to("meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not onednn.takes(x)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 3, 7), (3000, 7), (2, 700, 2, 7), (0, 7)])
def test_linear_layers_are_the_same(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(7, 5)
    x = random(*shape)
    before = x.clone()
    expected = layer(x)
    with torch.no_grad():
        found = onednn.linear(layer, x)
    torch.testing.assert_close(found, expected.detach())
    assert torch.equal(x, before)


def test_a_product_of_strided_input_is_the_same() -> None:
    layer = nn.Linear(6, 4)
    x = random(6, 9, 5).permute(2, 1, 0)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(onednn.linear(layer, x), expected)


def test_several_layers_stay_in_its_layout() -> None:
    first, second = nn.Linear(6, 4), nn.Linear(3, 4)
    seen = []

    def layers(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = first(x).relu_() + second(y)
        seen.append(total.is_mkldnn)
        return total

    x, y = random(10, 6), random(10, 3)
    expected = onednn.apply(layers, x, y)
    with torch.no_grad():
        torch.testing.assert_close(onednn.apply(layers, x, y), expected)
    assert seen == [False, True]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_parts_make_up_the_whole(size: int) -> None:
    x = random(2, 9, 3)
    calls = []

    def softmax(part: torch.Tensor) -> torch.Tensor:
        calls.append(part.shape[1])
        return part.softmax(2)

    with torch.no_grad():
        torch.testing.assert_close(onednn.in_parts(softmax, x, size, dim=1), x.softmax(2))
    assert sum(calls) == 9
    assert max(calls) == min(size, 9)
