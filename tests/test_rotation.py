"""Rotated images: quarter turns, an independent library, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from elasticzo.data import rotate_images


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("turns", [-1, 0, 1, 2, 3, 4])
def test_quarter_turns_are_exact(turns: int) -> None:
    x = images(3, 2, 28, 28)
    before = x.clone()
    assert torch.equal(rotate_images(x, 90.0 * turns), torch.rot90(x, turns, (2, 3)))
    assert torch.equal(x, before)


def test_half_a_turn_of_a_rectangle() -> None:
    x = images(2, 1, 9, 17)
    assert torch.equal(rotate_images(x, 180.0), torch.rot90(x, 2, (2, 3)))


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (2, 3, 11, 20)])
@pytest.mark.parametrize("degrees", [30.0, 45.0, -12.5])
def test_as_scipy_rotates(shape: tuple[int, ...], degrees: float) -> None:
    x = torch.zeros(shape, dtype=torch.uint8)
    x[:, :, 3:-3, 3:-3] = images(*shape)[:, :, 3:-3, 3:-3]  # scipy cuts the rim off otherwise
    exact = ndimage.rotate(x.double().numpy(), degrees, axes=(3, 2), reshape=False, order=1)
    assert np.abs(rotate_images(x, degrees).double().numpy() - exact).max() <= 0.5 + 1e-4


def test_the_same_whatever_stands_beside_it() -> None:
    x = images(4100, 1, 6, 6)  # more than one chunk
    turned = rotate_images(x, 30.0)
    assert torch.equal(turned, rotate_images(x, 30.0))
    assert torch.equal(turned[4095:], rotate_images(x[4095:], 30.0))


def test_refuses() -> None:
    with pytest.raises(TypeError, match=r"x must be uint8, got torch.float32"):
        rotate_images(torch.zeros(1, 1, 4, 4), 30.0)
    with pytest.raises(ValueError, match=r"must have shape \[N, C, H, W\], N > 0, got \[4, 4\]"):
        rotate_images(images(4, 4), 30.0)
    with pytest.raises(ValueError, match=r"got \[0, 1, 4, 4\]"):
        rotate_images(images(0, 1, 4, 4), 30.0)
    with pytest.raises(ValueError, match="degrees must be finite, got nan"):
        rotate_images(images(1, 1, 4, 4), math.nan)
