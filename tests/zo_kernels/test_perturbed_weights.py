"""Perturbed halves against `w +- eps * scale * z` in float64, on every backend and layout."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests._budget import NORMAL_ERROR, assert_rounded, assert_within_budget
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import ALL, EXPANDED, FEW, LAYOUTS, VIEWS, bits, f64, same_bits
from zo_kernels import perturbed_weights
from zo_kernels.registry import has_triton, interpreted

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

SEED, STEP, TENSOR = 2**40 + 7, 2**31 + 9, 5
# Large, so that a wrong z is far outside every budget; exact in fp32, as the interpreter passes
# Python floats to a kernel in fp32.
EPS, SCALE = 0.5, 0.375
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
NOISES = ("normal", "rademacher")


def key_on(device: torch.device) -> Tensor:
    return torch.tensor([SEED, STEP], dtype=torch.int64, device=device)


def perturb(w: Tensor, backend: str, **kwargs: Any) -> Tensor:
    args = {"tensor": TENSOR, "scale": SCALE, "backend": backend} | kwargs
    return perturbed_weights(w, key_on(w.device), f64(EPS, w.device), **args)


def exact_halves(w: Tensor, noise: str, stop: int, scale: float = SCALE) -> Tensor:
    """`[stop, *w.shape]` float64."""
    halves = []
    for half in range(stop):
        z = model(w.shape, SEED, STEP, tensor=TENSOR, query=half // 2, noise=noise).double()
        halves.append(w.cpu().double() + (-1) ** half * EPS * scale * z)
    return torch.stack(halves)


def plain_halves(w: Tensor, noise: str, stop: int, dtype: torch.dtype) -> Tensor:
    """The same in plain torch, in the precision that an op works in."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    z = torch.stack(
        [
            (-1) ** h * model(w.shape, SEED, STEP, tensor=TENSOR, query=h // 2, noise=noise)
            for h in range(stop)
        ]
    )
    return (w.cpu().to(wide) + EPS * SCALE * z.to(torch.float32).to(wide)).to(dtype)


def truncates(backend: str) -> bool:
    """Triton's interpreter drops the low bits in a cast from fp32 to bf16; hardware rounds."""
    return backend == "triton" and interpreted()


def noise_error(noise: str) -> float:
    return EPS * SCALE * NORMAL_ERROR if noise == "normal" else 0.0


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_twin(make: Any, dtype: torch.dtype, noise: str, backend: str, device: Any) -> None:
    w = make(dtype, device)
    before = w.clone()
    halves = perturb(w, backend, noise=noise, stop=4)
    exact = exact_halves(w, noise, 4)
    assert halves.dtype == dtype and same_bits(w, before)
    if dtype == torch.bfloat16:
        ulps = 1.0 if truncates(backend) else 0.5
        assert_rounded(halves, exact, ulps, extra=noise_error(noise) + 1e-6)
    else:
        plain = plain_halves(w, noise, 4, dtype)
        assert_within_budget(halves, plain, exact, extra=noise_error(noise))


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES.values()], ids=["fp16", *DTYPES])
@pytest.mark.parametrize("source", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_output_dtype(
    make: Any, source: torch.dtype, dtype: torch.dtype, backend: str, device: Any
) -> None:
    """The sum is made wide and rounded once."""
    w = make(source, device)
    halves = perturb(w, backend, dtype=dtype)
    assert halves.dtype == dtype
    ulps = 1.0 if truncates(backend) and dtype == torch.bfloat16 else 0.5
    slop = 0.0 if source == dtype == torch.float64 else 2e-6
    assert_rounded(halves, exact_halves(w, "normal", 2), ulps, noise_error("normal") + slop)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_bf16_output_is_the_fp32_one_rounded(make: Any, backend: str, device: Any) -> None:
    w = make(torch.float32, device)
    wide, narrow = (perturb(w, backend, dtype=d) for d in (torch.float32, torch.bfloat16))
    if truncates(backend):
        wide = (bits(wide) & -0x10000).view(torch.float32)
    assert same_bits(wide.bfloat16(), narrow)


@pytest.mark.parametrize("make", (LAYOUTS | EXPANDED).values(), ids=LAYOUTS | EXPANDED)
def test_halves_have_the_memory_format_of_the_weight(make: Any, backend: str, device: Any) -> None:
    w = make(torch.float32, device)
    for dtype in (torch.float32, torch.bfloat16):
        for start in (0, 1):
            halves = perturb(w, backend, start=start, dtype=dtype)
            assert halves.shape == (2 - start, *w.shape)
            assert halves[0].stride() == torch.empty_like(w).stride()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_any_range_of_halves_is_a_part_of_all(
    make: Any, noise: str, backend: str, device: Any
) -> None:
    w = make(torch.float32, device)
    whole = perturb(w, backend, noise=noise, stop=5)
    for start in range(5):
        for stop in range(start + 1, 6):
            part = perturb(w, backend, noise=noise, start=start, stop=stop)
            assert torch.equal(part, whole[start:stop]), (start, stop)


def test_last_query(backend: str, device: Any) -> None:
    """The halves of query 2^24 - 1, the largest there is."""
    w = torch.randn(3, 9, device=device)
    stop = 2**25
    halves = perturb(w, backend, start=stop - 2, stop=stop)
    z = model(w.shape, SEED, STEP, tensor=TENSOR, query=2**24 - 1)
    assert_rounded(halves[0], w.cpu() + EPS * SCALE * z, 0.5, noise_error("normal") + 2e-7)


@pytest.mark.parametrize("name", ["channels-last", "conv-transposed", "sliced-kernel"])
@pytest.mark.parametrize("noise", NOISES)
def test_memory_format_does_not_show(noise: str, name: str, backend: str, device: Any) -> None:
    w = VIEWS[name](torch.float32, device)
    a, b = (perturb(x, backend, noise=noise) for x in (w, w.contiguous()))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", EXPANDED)
def test_an_expanded_weight_is_its_copy(name: str, backend: str, device: Any) -> None:
    w = EXPANDED[name](torch.float32, device)
    assert torch.equal(perturb(w, backend), perturb(w.contiguous(), backend))


@pytest.mark.parametrize("scale", [0.3, -1.5, 0.0, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_scale(dtype: torch.dtype, scale: float, backend: str, device: Any) -> None:
    if truncates(backend):  # see EPS, SCALE
        scale = float(np.float32(scale))
    w = torch.randn(5, 9, dtype=dtype, device=device)
    halves = perturb(w, backend, noise="rademacher", scale=scale)
    # eps * scale is rounded, the sum is rounded.
    exact = exact_halves(w, "rademacher", 2, scale)
    assert_rounded(halves, exact, 0.5, extra=EPS * abs(scale) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_signs_give_equal_bits_everywhere(
    make: Any, dtype: torch.dtype, backend: str, device: Any
) -> None:
    """`eps * scale * (+-1)` is exact: one rounding, whether fused or not."""
    w = make(dtype, device)
    out = torch.float32 if truncates(backend) and dtype == torch.bfloat16 else None
    scale = SCALE if dtype == torch.float64 else 0.7
    a, b = (
        perturb(x, name, noise="rademacher", stop=6, scale=scale, dtype=out)
        for x, name in ((w, backend), (w.cpu(), "reference"))
    )
    assert same_bits(a, b)


@needs_triton
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_launch_does_not_show(
    make: Any, noise: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block sizes, and 64-bit offsets where 32 would do."""
    module = import_module("zo_kernels.triton.weights")
    w = make(torch.float32, device)
    first = perturb(w, "triton", noise=noise, stop=3)
    monkeypatch.setattr(module, "INT32_MAX", 0)
    assert torch.equal(first, perturb(w, "triton", noise=noise, stop=3))
    for block in (256, 512, 2048):
        monkeypatch.setattr(module, "BLOCK", block)
        assert torch.equal(first, perturb(w, "triton", noise=noise, stop=3))


@needs_triton
def test_halves_may_begin_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Half 2 begins at element 2^31: its offset, not only the element's, needs 64 bits."""
    distance, count = 1 << 30, 3
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 8 << 30:
            pytest.skip("needs 8 GiB")
        memory = torch.empty(2 * distance + 64, dtype=torch.float16, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "halves", np.float16, "w+", shape=(2 * distance + 64,))
        memory = torch.from_numpy(file)
    w = torch.randn(64, device=device)
    out = memory.as_strided((count, 64), (distance, 1))
    module = import_module("zo_kernels.triton.weights")
    module._launch(w, out, key_on(device), f64(EPS, device), TENSOR, 0, count, "normal", SCALE)
    assert torch.equal(out, perturb(w, "triton", stop=count, dtype=torch.float16))
