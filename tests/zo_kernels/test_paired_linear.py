"""Both halves of a linear layer against float64, on every backend; the kernel's launch and edges.

In the interpreter "tf32" and "tf32x3" change nothing: its products are those of numpy in fp32.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests._budget import NORMAL_ERROR, assert_rounded, assert_within_budget
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import bits, f64, same_bits
from zo_kernels import paired_linear, perturbed_weights
from zo_kernels.registry import has_triton, interpreted

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

SEED, STEP, TENSOR, BIAS_TENSOR = 2**40 + 7, 2**31 + 9, 5, 2**31 + 6
EPS, SCALE, BIAS_SCALE = 0.5, 0.375, -0.75  # large, and exact in fp32 (test_perturbed_weights.py)
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": FP32, "bf16": BF16}
NOISES = ("normal", "rademacher")
# (rows of a half, outputs, inputs): 1, odd, around blocks of 16, 32, 64 and 128, empty
SHAPES = {
    "one": (1, 1, 1),
    "odd": (3, 5, 7),
    "blocks": (64, 64, 128),
    "beyond": (17, 33, 129),
    "many-rows": (300, 65, 33),
    "long": (2, 3, 515),
    "no-inputs": (3, 5, 0),
    "no-outputs": (3, 0, 5),
    "no-rows": (0, 5, 7),
}
SIX = {name: SHAPES[name] for name in ("one", "beyond", "no-inputs")}


def key_on(device: Any) -> Tensor:
    return torch.tensor([SEED, STEP], dtype=torch.int64, device=device)


def run(x: Tensor, w: Tensor, bias: Tensor | None, backend: str, **kwargs: Any) -> Tensor:
    args = {"tensor": TENSOR, "bias_tensor": BIAS_TENSOR, "scale": SCALE}
    args |= {"bias_scale": BIAS_SCALE, "backend": backend} | kwargs
    return paired_linear(x, w, bias, key_on(w.device), f64(EPS, w.device), **args)


def inputs(
    shape: tuple[int, int, int], halves: int, dtype: torch.dtype = FP32, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[halves * rows, K]`, w `[N, K]`, bias `[N]`."""
    rows, outputs, cols = shape
    sizes = (halves * rows, cols), (outputs, cols), (outputs,)
    x, w, bias = (torch.randn(s, dtype=torch.float64).to(device, dtype) for s in sizes)
    return x, w, bias


def truncates(backend: str) -> bool:
    """Triton's interpreter drops the low bits in a cast from fp32 to bf16; hardware rounds."""
    return backend == "triton" and interpreted()


def narrow(t: Tensor, dtype: torch.dtype, truncate: bool) -> Tensor:
    if truncate and dtype == BF16 and t.dtype == FP32:
        t = (t.contiguous().view(torch.int32) & -0x10000).view(FP32)
    return t.to(dtype)


def tf32(t: Tensor) -> Tensor:
    return (t.contiguous().view(torch.int32) & -0x2000).view(FP32)


def expected(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    halves: range,
    noise: str,
    *,
    shared: bool = False,
    relu: bool = False,
    dtype: torch.dtype | None = None,
    cut: Any = None,
) -> Tensor:
    """In float64; with `dtype` in its arithmetic: operands rounded, `cut` applied, sums in fp32."""
    wide = torch.float64 if dtype is None else FP32
    cut = cut or (lambda t: t.to(dtype or torch.float64).to(wide))
    results = []
    for i, half in enumerate(halves):
        where = {"query": half // 2, "noise": noise}
        sign = EPS * (-1) ** half
        z = model(w.shape, SEED, STEP, tensor=TENSOR, **where).to(wide)
        rows = x if shared else x.tensor_split(len(halves))[i]
        y = cut(rows.cpu().to(wide)) @ cut(w.cpu().to(wide) + sign * SCALE * z).T
        if bias is not None:
            z = model(bias.shape, SEED, STEP, tensor=BIAS_TENSOR, **where).to(wide)
            y = y + bias.cpu().to(wide) + sign * BIAS_SCALE * z
        results.append(y.relu() if relu else y)
    return torch.cat(results).to(dtype or wide)


def noise_error(x: Tensor, noise: str) -> float:
    """How far the error of a normal can move a result."""
    if noise != "normal" or not x.numel():
        return 0.0
    reach = SCALE * x.double().abs().sum(1).max().item() + abs(BIAS_SCALE)
    return EPS * NORMAL_ERROR * reach


def check(x: Tensor, w: Tensor, bias: Tensor | None, backend: str, **kwargs: Any) -> None:
    before = [t.clone() for t in (x, w)]
    noise, stop = kwargs.get("noise", "normal"), kwargs.get("stop", 2)
    start, dtype = kwargs.get("start", 0), kwargs.get("compute_dtype") or x.dtype
    given = {name: kwargs[name] for name in ("shared", "relu") if name in kwargs}
    y = run(x, w, bias, backend, **kwargs)
    assert y.dtype == dtype and y.is_contiguous()
    halves = range(start, stop)
    precision = kwargs.get("precision", "ieee")
    truncate = truncates(backend)
    cut = tf32 if precision == "tf32" and dtype == FP32 else None
    if truncate and dtype == BF16:
        cut = lambda t: narrow(t, BF16, True).float()  # noqa: E731
    exact = expected(x, w, bias, halves, noise, **given)
    low = expected(x, w, bias, halves, noise, dtype=dtype, cut=cut, **given)
    assert_within_budget(y, low, exact, extra=noise_error(x, noise))
    assert same_bits(x, before[0]) and same_bits(w, before[1])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twin(shape: Any, noise: str, dtype: torch.dtype, backend: str, device: Any) -> None:
    check(*inputs(shape, 2, dtype, device), backend, noise=noise)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shape", SIX.values(), ids=SIX)
def test_queries_bias_relu_shared(
    shape: Any, relu: bool, with_bias: bool, shared: bool, backend: str, device: Any
) -> None:
    x, w, bias = inputs(shape, 1 if shared else 4, device=device)
    for noise in NOISES:
        given = {"noise": noise, "stop": 4, "shared": shared, "relu": relu}
        check(x, w, bias if with_bias else None, backend, **given)


@pytest.mark.parametrize("compute", DTYPES.values(), ids=lambda d: f"compute-{d}"[14:])
@pytest.mark.parametrize("x_dtype", DTYPES.values(), ids=lambda d: f"x-{d}"[8:])
@pytest.mark.parametrize("w_dtype", DTYPES.values(), ids=lambda d: f"w-{d}"[8:])
def test_compute_dtype(w_dtype: Any, x_dtype: Any, compute: Any, backend: str, device: Any) -> None:
    x, w, bias = inputs((5, 33, 70), 2, device=device)
    check(x.to(x_dtype), w.to(w_dtype), bias.to(w_dtype), backend, compute_dtype=compute)


@pytest.mark.parametrize("rows", [2, 70, 300])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precision(precision: str, rows: int, backend: str, device: Any) -> None:
    x, w, bias = inputs((rows, 33, 130), 2, device=device)
    if precision == "tf32x3":  # as good as fp32, but for the product of the low parts
        exact = expected(x, w, bias, range(2), "normal")
        y = run(x, w, bias, backend, precision=precision)
        size = expected(x.abs(), w.abs() + 1, None, range(2), "rademacher").abs().max().item()
        assert (y.cpu().double() - exact).abs().max().item() <= 2.0**-19 * size
    else:
        check(x, w, bias, backend, precision=precision)


def test_tf32_of_the_reference_is_coarser_than_fp32() -> None:
    x, w, bias = inputs((20, 33, 130), 2)
    exact = expected(x, w, bias, range(2), "normal")
    modes = ("ieee", "tf32x3", "tf32")
    ys = [run(x, w, bias, "reference", precision=mode).double() for mode in modes]
    ieee, x3, one = ((y - exact).abs().max().item() for y in ys)
    assert one > 100 * ieee and x3 < 10 * ieee


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(5, 7), (33, 130), (3, 257), (6, 1)], ids=str)
def test_noise_is_that_of_perturbed_weights(
    shape: Any, noise: str, dtype: torch.dtype, backend: str, device: Any
) -> None:
    """x = identity shows the operands of the products: those that staging would write."""
    w = torch.randn(shape, device=device)
    eye = torch.eye(shape[1], device=device)
    given = {"noise": noise, "stop": 3}
    y = run(eye, w, None, backend, shared=True, compute_dtype=dtype, **given)
    staged = perturbed_weights(
        *(w, key_on(device), f64(EPS, device)),
        **({"tensor": TENSOR, "scale": SCALE, "dtype": dtype, "backend": backend} | given),
    )
    y = y.reshape(3, shape[1], shape[0]).mT
    if noise == "rademacher" or interpreted():
        assert torch.equal(y, staged)
    else:  # sums may be contracted differently
        assert_rounded(y, staged.double(), 1.0, EPS * SCALE * NORMAL_ERROR)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_of_the_bias_is_that_of_perturbed_weights(
    noise: str, backend: str, device: Any
) -> None:
    bias = torch.randn(300, device=device)
    x, w = torch.zeros(1, 3, device=device), torch.zeros(300, 3, device=device)
    y = run(x, w, bias, backend, noise=noise, shared=True, stop=4)
    z = [model(bias.shape, SEED, STEP, tensor=BIAS_TENSOR, query=q, noise=noise) for q in (0, 1)]
    exact = torch.stack([bias.cpu() + s * EPS * BIAS_SCALE * z[q] for q in (0, 1) for s in (1, -1)])
    assert_rounded(y, exact, 0.5, EPS * abs(BIAS_SCALE) * NORMAL_ERROR + 1e-7)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("noise", NOISES)
def test_any_range_of_halves_is_a_part_of_all(
    noise: str, shared: bool, backend: str, device: Any
) -> None:
    x, w, bias = inputs((3, 5, 70), 1 if shared else 5, device=device)
    whole = run(x, w, bias, backend, noise=noise, shared=shared, stop=5)
    for start in range(5):
        for stop in range(start + 1, 6):
            rows = slice(3 * start, 3 * stop)
            given = {"noise": noise, "shared": shared, "start": start, "stop": stop}
            part = run(x if shared else x[rows], w, bias, backend, **given)
            torch.testing.assert_close(part, whole[rows], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "view", ["transposed", "some-rows", "some-columns", "expanded", "backwards-bias"]
)
def test_strides(view: str, backend: str, device: Any) -> None:
    x, w, bias = inputs((3, 20, 40), 2, device=device)
    views = {
        "transposed": lambda t: t.t().contiguous().t(),
        "some-rows": lambda t: t.repeat_interleave(3, 0)[::3],
        "some-columns": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda t: t[:1].expand(t.shape),
    }
    change = views.get(view, lambda t: t)
    x, w, bias = change(x), change(w), bias.repeat_interleave(2)[::2]
    check(x, w, bias, backend)
    contiguous = run(x.contiguous(), w.contiguous(), bias.contiguous(), backend)
    torch.testing.assert_close(run(x, w, bias, backend), contiguous, rtol=0, atol=1e-5)


def test_relu_keeps_nan(backend: str, device: Any) -> None:
    x, w, bias = inputs((2, 3, 5), 2, device=device)
    x[1, 2] = float("nan")
    y = run(x, w, bias, backend, relu=True)
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any() and (y[[0, 2, 3]] >= 0).all()


def test_tf32x3_keeps_infinities_and_nan(backend: str, device: Any) -> None:
    """The low part of an infinity is NaN, which must not reach the sum."""
    x, w, bias = inputs((5, 20, 40), 2, device=device)
    x[0, 3], x[1, 4] = float("inf"), -float("inf")
    x.view(torch.int32)[2, 5] = 0x7FFFFFFF  # the NaN that GPUs make: rounding up would wrap it
    x[3, 6] = 1e37
    for precision in ("ieee", "tf32x3"):
        y = run(x, w, bias, backend, precision=precision)
        assert y[:2].isinf().all() and y[2].isnan().all() and y[3:].isfinite().all()


def integers(device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """With signs, sums of these are exact in any order."""
    sizes = (2 * 70, 150), (70, 150), (70,)
    x, w, bias = (torch.randint(-4, 5, size, device=device).float() for size in sizes)
    return x, w, bias


TILES = [(16, 16, 32, 4, 1), (32, 64, 64, 4, 2), (128, 32, 128, 8, 2)]


@needs_triton
def test_launch_does_not_show(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, and 64-bit offsets where 32 would do."""
    module = importlib.import_module("zo_kernels.triton.linear")
    x, w, bias = integers(device)
    given = {"noise": "rademacher", "stop": 2, "precision": "tf32"}
    first = run(x, w, bias, "triton", **given)
    assert torch.equal(first, run(x, w, bias, "reference", **given))
    normals = run(x, w, bias, "triton")
    monkeypatch.setattr(module, "INT32_MAX", 0)
    assert torch.equal(first, run(x, w, bias, "triton", **given))
    for tile in TILES:
        monkeypatch.setattr(module, "TILES", dict.fromkeys(module.TILES, (module.Tile(*tile),)))
        assert torch.equal(first, run(x, w, bias, "triton", **given))
        torch.testing.assert_close(normals, run(x, w, bias, "triton"), rtol=0, atol=1e-3)


@needs_triton
def test_a_tile_holds_the_rows_or_is_the_largest() -> None:
    module = importlib.import_module("zo_kernels.triton.linear")
    for name, tiles in module.TILES.items():
        compute = BF16 if name in ("bf16", "mixed") else FP32
        w = FP32 if name == "mixed" else compute
        precision = "ieee" if compute == BF16 else name
        assert [tile.rows for tile in tiles] == sorted({tile.rows for tile in tiles})
        for rows in (0, 1, 16, 17, 64, 65, 128, 129, 256, 257, 10**6):
            tile = module.tile_for(rows, compute, w, compute, precision)
            smaller = [t for t in tiles if t.rows < tile.rows]
            assert tile.rows >= min(rows, tiles[-1].rows)
            assert all(t.rows < rows for t in smaller) and tile.depth in (32, 64, 128)


@needs_triton
def test_tiles_of_ragged_sizes_and_of_amd_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("zo_kernels.triton.linear")
    bf16, mixed = (10**6, BF16, BF16, BF16, "ieee"), (10**6, FP32, FP32, BF16, "ieee")
    assert module.tile_for(*bf16).rows == 256 and module.tile_for(*bf16, True).rows == 128
    assert module.tile_for(*mixed).stages == 3
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert module.tile_for(*mixed)[:4] == module.tiles_of("mixed")[-1][:4]
    assert module.tile_for(*mixed).stages == 2


@needs_triton
@pytest.mark.parametrize(
    ("case", "ragged"),
    [
        ("aligned", False),
        ("transposed", False),
        ("K", True),
        ("N", True),
        ("stride", True),
        ("address", True),
    ],
)
def test_a_launch_knows_what_is_ragged(
    case: str, ragged: bool, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("zo_kernels.triton.linear")
    tile_for, seen = module.tile_for, []

    def spy(*args: Any) -> Any:
        seen.append(args[-1])
        return tile_for(*args)

    monkeypatch.setattr(module, "tile_for", spy)
    x, w, _ = inputs((16, 48, 64), 2, BF16, device)
    wide = torch.zeros(48, 72, dtype=BF16, device=device)
    views = {
        "transposed": (x.t().contiguous().t(), w.t().contiguous().t()),
        "K": (x[:, :63].contiguous(), w[:, :63].contiguous()),
        "N": (x, w[:47]),
        "stride": (x, wide[:, :64]),
        "address": (torch.zeros(33 * 64, dtype=BF16, device=device)[4:-60].view(32, 64), w),
    }
    run(*views.get(case, (x, w)), None, "triton")
    assert seen == [ragged]


@needs_triton
def test_rows_of_the_weight_may_begin_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Row 2 begins at element 2^31."""
    distance = 1 << 30
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 8 << 30:
            pytest.skip("needs 8 GiB")
        memory = torch.empty(2 * distance + 64, dtype=BF16, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "rows", np.int16, "w+", shape=(2 * distance + 64,))
        memory = torch.from_numpy(file).view(BF16)
    far = memory.as_strided((3, 9), (distance, 1))
    x, w, _ = inputs((2, 3, 9), 2, BF16, device)
    far.copy_(w)
    assert torch.equal(run(x, far, None, "triton"), run(x, w, None, "triton"))
    far.copy_(x[:3])
    given = {"shared": True, "start": 1}
    assert torch.equal(run(far, w, None, "triton", **given), run(x[:3], w, None, "triton", **given))


def test_last_query(backend: str, device: Any) -> None:
    x, w, _ = inputs((2, 3, 9), 2, device=device)
    y = run(x, w, None, backend, start=2**25 - 2, stop=2**25)
    exact = expected(x, w, None, range(2**25 - 2, 2**25), "normal")
    assert (y.cpu().double() - exact).abs().max() < 1e-5


def test_the_result_of_bits_is_exact_in_each_precision(backend: str, device: Any) -> None:
    """bfloat16 operands are exact in tf32: the precision does not matter to them."""
    x, w, bias = inputs((3, 20, 40), 2, BF16, device)
    ys = [run(x, w, bias, backend, precision=p) for p in ("ieee", "tf32", "tf32x3")]
    assert all(torch.equal(bits(y), bits(ys[0])) for y in ys)
