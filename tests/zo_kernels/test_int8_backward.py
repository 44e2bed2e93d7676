"""What the integer backward needs of convolutions, on every backend, against float64's autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zo_kernels._int8_operands import int8
from tests.zo_kernels._integer_model import ROUNDINGS, clip, rounded
from tests.zo_kernels._noise_model import model
from tests.zo_kernels.test_int8_use import op
from tests.zo_kernels.test_paired_conv2d import CASES, LAST
from zo_kernels import (
    int8_conv2d_gradient,
    int8_conv2d_max_pool,
    int8_gradient_update_,
    int8_range,
    int8_unpool,
)

pytestmark = pytest.mark.usefixtures("poison")
BACKWARD = {
    **{name: CASES[name] for name in ("one", "odd", "lenet", "everything", "1x1", "only-padding")},
    "wide": ((2, 5, 35, (6, 13), (2, 7)), {"dilation": (2, 1), "stride": (2, 1)}),
    "tall": ((2, 3, 17, (9, 4), (3, 1)), {"padding": (1, 0)}),
    "points": ((2, 19, 33, (1, 21), (1, 1)), {}),
    "no-rows": CASES["no-rows"],
}


def gradient_model(error: Tensor, x: Tensor, kernel: Any, geometry: Any) -> Tensor:
    w = torch.zeros(error.shape[1], x.shape[1], *kernel).double().requires_grad_()
    F.conv2d(x.cpu().double(), w, **geometry).backward(error.cpu().double())
    assert w.grad is not None
    return w.grad


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("case", BACKWARD.values(), ids=BACKWARD)
def test_gradient(case: Any, last: bool, backend: str, device: Any) -> None:
    (rows, channels, outputs, size, kernel), geometry = case
    x = int8(rows, channels, *size, device=device)
    shape = F.conv2d(x.cpu().float(), torch.zeros(outputs, channels, *kernel), **geometry).shape
    error = int8(*shape, device=device)
    if last:
        x, error = (t.to(memory_format=LAST) for t in (x, error))
    found = int8_conv2d_gradient(error, x, kernel, backend=backend, **geometry)
    assert found.dtype == torch.int32 and found.is_contiguous()
    assert torch.equal(found.cpu().double(), gradient_model(error, x, kernel, geometry))


def test_gradient_of_parts_and_of_extremes(backend: str, device: Any) -> None:
    """Views of larger tensors; all -127: the offset of 128 is undone to the bit."""
    x = torch.full((4, 3, 8, 9), -127, dtype=torch.int8, device=device)
    error = torch.full((4, 40, 6, 7), -127, dtype=torch.int8, device=device)
    found = int8_conv2d_gradient(error[1:3, 3:24], x[1:3], 3, backend=backend)
    assert found.shape == (21, 3, 3, 3) and bool((found == 127 * 127 * 2 * 42).all())


def test_gradient_on_two_threads() -> None:
    pytest.importorskip("numba")
    x, error = int8(9, 16, 32, 33), int8(9, 40, 32, 33)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(int8_conv2d_gradient(error, x, 3, padding=1, backend="numba"))
    torch.set_num_threads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0].double(), gradient_model(error, x, (3, 3), {"padding": 1}))


POOLED = {**{name: CASES[name] for name in ("odd", "lenet", "many-rows")}}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("case", POOLED.values(), ids=POOLED)
def test_max_pool(case: Any, relu: bool, last: bool, backend: str, device: Any) -> None:
    (rows, channels, outputs, size, kernel), geometry = case
    x = int8(2 * rows, channels, *size, device=device)
    w = int8(outputs, channels, *kernel, device=device)
    w[0] = 0  # a channel of equal sums: the first place
    x = x.to(memory_format=LAST) if last else x
    acc, bits, places = int8_conv2d_max_pool(x, w, 2, relu=relu, backend=backend, **geometry)
    assert (acc.dtype, bits.dtype, places.dtype) == (torch.int32, torch.int32, torch.uint8)
    assert acc.stride() == places.stride()
    sums = F.conv2d(x.cpu().double(), w.cpu().double(), **geometry)
    best, flat = F.max_pool2d(sums, 2, return_indices=True)
    assert torch.equal(acc.cpu().double(), best.relu() if relu else best)
    row, col = flat // sums.shape[3], flat % sums.shape[3]
    assert torch.equal(places.cpu().long(), 2 * (row % 2) + col % 2)
    assert not bool(places[:, 0].any())
    assert torch.equal(bits, int8_range(acc, halves=2, backend="reference"))


@pytest.mark.parametrize("size", [(6, 8), (7, 9)], ids=["even", "odd"])
def test_unpool(size: tuple[int, int], backend: str, device: Any) -> None:
    """Autograd of max_pool2d, through the places of its maxima."""
    acc = torch.randperm(2 * 3 * size[0] * size[1]).reshape(2, 3, *size).double().requires_grad_()
    y, flat = F.max_pool2d(acc, 2, return_indices=True)
    places = (2 * (flat // size[1] % 2) + flat % size[1] % 2).to(device, torch.uint8)
    error = int8(2, 3, 4, 3).mT  # of any strides
    y.backward(error.double())
    found = int8_unpool(error.to(device), places, size, backend=backend)
    assert found.dtype == torch.int8 and found.is_contiguous()
    assert acc.grad is not None and torch.equal(found.cpu().double(), acc.grad)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("b_bp", [-3, 0, 4, 7])
def test_update(b_bp: int, rounding: str, backend: str, device: Any) -> None:
    """Against Python's integers; weights and gradients of any strides."""
    w = int8(5, 7, 3, 2).to(memory_format=LAST)
    gradient = torch.randint(-(2**20), 2**20, (3, 7, 5, 2), dtype=torch.int32).transpose(0, 2)
    gradient[0, 0, 0, 0] = 2**20
    key, to = torch.tensor([3, 4]), w.clone().to(device)
    seen = to._version
    int8_gradient_update_(
        *(to, gradient.to(device)), b_bp=b_bp, rounding=rounding, key=key.to(device), tensor=6,
        backend=backend,
    )  # fmt: skip
    words = model(w.shape, 3, 4, tensor=6, query=0, noise="bits", purpose="rounding")
    triples = zip(w.flatten().tolist(), gradient.flatten().tolist(), words.flatten().tolist(),
                  strict=True)  # fmt: skip
    want = [clip(x - clip(rounded(g, 20 - b_bp, rounding, u))) for x, g, u in triples]
    assert to.flatten().tolist() == want and to._version > seen


def test_update_of_small_gradients(backend: str, device: Any) -> None:
    """Nothing is shifted up; zeros move nothing; an empty weight is none."""
    for size, change in ((3, 3), (0, 0)):
        w = torch.full((4,), 126, dtype=torch.int8, device=device)
        gradient = torch.full((4,), -size, dtype=torch.int32, device=device)
        int8_gradient_update_(w, gradient, b_bp=7, backend=backend)
        assert w.tolist() == [min(126 + change, 127)] * 4
    int8_gradient_update_(w[:0], gradient[:0], b_bp=7, backend=backend)


def test_opcheck(backend: str, device: Any) -> None:
    x, w = int8(4, 3, 5, 6, device=device), int8(4, 3, 3, 2, device=device)
    for images in (x, x.to(memory_format=LAST)):
        args = (images, w, 2, [2, 1], [1, 0], [1, 2], True, backend)
        torch.library.opcheck(op("int8_conv2d_max_pool"), args)
    error = int8(4, 4, 3, 5, device=device)
    args = (error, x, [3, 2], [1, 1], [0, 0], [1, 1], backend)
    torch.library.opcheck(op("int8_conv2d_gradient"), args)
    places = torch.zeros(4, 4, 3, 5, dtype=torch.uint8, device=device)
    torch.library.opcheck(op("int8_unpool"), (error, places, [7, 10], backend))
    gradient, key = torch.ones(4, 3, dtype=torch.int32, device=device), torch.tensor([1, 2])
    noise = ("stochastic", key.to(device), 3, backend)
    torch.library.opcheck(
        op("int8_gradient_update_"), (int8(4, 3, device=device), gradient, 3, *noise)
    )
    points, kernel = int8(4, 3, 9, device=device), int8(5, 3, 2, device=device)
    noise = (torch.tensor([1, 2], device=device), 3, 0, 2, False)
    args = (points, kernel, *noise, 2, 1, 1, 0.25, 9, True, backend)
    torch.library.opcheck(op("int8_paired_conv1d_max"), args)


X, E = torch.zeros(2, 3, 5, 5, dtype=torch.int8), torch.zeros(2, 4, 3, 3, dtype=torch.int8)
PLACES = torch.zeros(2, 4, 3, 3, dtype=torch.uint8)
NEAR: dict[str, tuple[Any, type[Exception], str]] = {
    "x": (
        lambda: int8_conv2d_gradient(E, X.int(), 3),
        TypeError,
        r"x must be torch.int8, got torch.int32",
    ),
    "error": (
        lambda: int8_conv2d_gradient(E, X, 2),
        ValueError,
        r"error must have shape \[2, 4, 4, 4\], got \[2, 4, 3, 3\]",
    ),
    "dimensions": (
        lambda: int8_conv2d_gradient(E, X[0], 3),
        ValueError,
        r"x must have four dimensions, got shape \[3, 5, 5\]",
    ),
    "depth": (
        lambda: int8_conv2d_gradient(
            torch.empty(1, 1, 400, 400, dtype=torch.int8, device="meta"),
            torch.empty(1, 1, 400, 400, dtype=torch.int8, device="meta"), 1,
        ),
        ValueError,
        r"a sum may have at most 133144 products in int32, got 160000",
    ),
    "kernel": (
        lambda: int8_conv2d_gradient(E, X, 0),
        ValueError,
        r"kernel must be an integer >= 1 or two of them, got 0",
    ),
    "channels": (
        lambda: int8_conv2d_gradient(E, X[:, :0], 3),
        ValueError,
        r"only the batch may be empty, got shapes \[2, 4, 3, 3\] of error and \[2, 0, 5, 5\] of x",
    ),
    "gradient": (
        lambda: int8_gradient_update_(E, E, b_bp=1),
        TypeError,
        r"gradient must be torch.int32, got torch.int8",
    ),
    "b-bp": (
        lambda: int8_gradient_update_(E, E.int(), b_bp=8),
        ValueError,
        r"b_bp must be in \[-24, 7\], got 8",
    ),
    "stochastic": (
        lambda: int8_gradient_update_(E, E.int(), b_bp=1, rounding="stochastic"),
        ValueError,
        r"rounding 'stochastic' needs a key, got None",
    ),
    "halves": (
        lambda: int8_conv2d_max_pool(X, torch.zeros(4, 3, 3, 3, dtype=torch.int8), 3),
        ValueError,
        r"x must have equally many rows for 3 halves, got 2",
    ),
    "places": (
        lambda: int8_unpool(E, PLACES.to(torch.int8), (6, 6)),
        TypeError,
        r"places must be torch.uint8, got torch.int8",
    ),
    "size": (
        lambda: int8_unpool(E, PLACES, (6, 8)),
        ValueError,
        r"size must be \(height, width\) in \[6, 7\] and \[6, 7\], got \[6, 8\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "raised", "message"), NEAR.values(), ids=NEAR)
def test_message(call: Any, raised: type[Exception], message: str) -> None:
    with pytest.raises(raised, match=f"^{message}$"):
        call()
