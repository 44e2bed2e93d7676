"""The convolution over points with its maximum: never the sums of all points, and the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.zo_kernels._int8_operands import NOISE, TENSOR, assert_same, expected, int8
from tests.zo_kernels._int8_weights import key_on
from zo_kernels import int8_paired_conv1d, int8_paired_conv1d_max, int8_range

pytestmark = pytest.mark.usefixtures("poison")
# (channels, outputs, points, kernel), geometry
CASES: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "one": ((1, 1, 1, 1), {}),
    "point-net": ((5, 37, 150, 1), {}),
    "wide": ((3, 16, 131, 4), {"padding": 3, "stride": 2, "dilation": 2}),
    "chunks": ((2, 5, 64, 1), {}),
    "one-more": ((2, 5, 65, 1), {}),
}


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twin(case: Any, shared: bool, relu: bool, backend: str, device: Any) -> None:
    (channels, outputs, points, kernel), geometry = case
    x = int8(2 if shared else 6, channels, points, device=device)
    w = int8(outputs, channels, kernel, device=device)
    given = {"start": 1, "stop": 4, "shared": shared}
    found = int8_paired_conv1d_max(
        *(x, w, key_on(device)), tensor=TENSOR, relu=relu, backend=backend, **NOISE, **given,
        **geometry,
    )  # fmt: skip
    sums, _ = expected(x, w, relu=relu, **given, **geometry)
    best = sums.amax(2)
    assert_same(found, (best, int8_range(best, halves=3, backend="reference")))


@pytest.mark.parametrize("last", [False, True], ids=["points", "channels"])
def test_without_noise_and_any_strides(last: bool, backend: str, device: Any) -> None:
    x, w = int8(4, 6, 70, device=device), int8(9, 6, 1, device=device)
    x = x.mT.contiguous().mT if last else x
    acc, bits = int8_paired_conv1d_max(x, w, None, backend=backend)
    sums, _ = int8_paired_conv1d(x, w, None, backend="reference")
    assert_same((acc, bits), (sums.amax(2), int8_range(sums.amax(2), halves=2)))


def test_negative_maxima_and_an_empty_batch(backend: str, device: Any) -> None:
    x = torch.full((2, 3, 66), 100, dtype=torch.int8, device=device)
    w = torch.full((4, 3, 1), -3, dtype=torch.int8, device=device)
    acc, bits = int8_paired_conv1d_max(x, w, None, backend=backend)
    assert acc.unique().tolist() == [-900] and bits.tolist() == [10, 10]
    acc, bits = int8_paired_conv1d_max(x[:0], w, None, backend=backend)
    assert acc.shape == (0, 4) and bits.tolist() == [0, 0]


def test_what_is_wrong_is_said() -> None:
    x, w = int8(4, 3, 9), int8(5, 3, 2)
    with pytest.raises(ValueError, match=r"^x must have three dimensions, got shape \[3, 9\]$"):
        int8_paired_conv1d_max(x[0], w, None)
    with pytest.raises(ValueError, match=r"^x must have equally many rows for 3 halves, got 4$"):
        int8_paired_conv1d_max(x, w, None, stop=3)
