"""Both halves of a convolution against float64, on every backend; the kernel's launch and edges.

In the interpreter "tf32" and "tf32x3" change nothing: its products are those of numpy in fp32.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests._budget import NORMAL_ERROR, assert_rounded, assert_within_budget
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import f64, same_bits
from tests.zo_kernels.test_paired_linear import (
    BF16,
    BIAS_SCALE,
    BIAS_TENSOR,
    DTYPES,
    EPS,
    FP32,
    NOISES,
    SCALE,
    SEED,
    STEP,
    TENSOR,
    key_on,
    narrow,
    tf32,
    truncates,
)
from zo_kernels import paired_conv2d, perturbed_weights
from zo_kernels.registry import has_triton, interpreted

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")
HAS_NUMBA = importlib.util.find_spec("numba") is not None
LAST = torch.channels_last
# (rows of a half, channels, outputs, size, kernel), geometry
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "one": ((1, 1, 1, (1, 1), (1, 1)), {}),
    "odd": ((2, 3, 5, (7, 9), (3, 3)), {"padding": 1}),
    "lenet": ((2, 1, 6, (9, 8), (5, 5)), {"padding": (2, 2)}),
    "everything": (
        (3, 5, 7, (9, 11), (3, 2)),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)},
    ),
    "one-tap": ((2, 32, 17, (5, 4), (3, 3)), {"padding": [1, 0]}),
    "1x1": ((2, 64, 33, (5, 3), (1, 1)), {"stride": 2}),
    "many-rows": ((3, 4, 65, (8, 9), (3, 3)), {}),
    "only-padding": ((1, 2, 3, (2, 1), (2, 3)), {"padding": 3, "stride": 2}),
    "no-rows": ((0, 3, 5, (5, 5), (3, 3)), {}),
}
FEW = {name: CASES[name] for name in ("odd", "everything", "one-tap")}


def run(x: Tensor, w: Tensor, bias: Tensor | None, backend: str, **kwargs: Any) -> Tensor:
    args = {"tensor": TENSOR, "bias_tensor": BIAS_TENSOR, "scale": SCALE}
    args |= {"bias_scale": BIAS_SCALE, "backend": backend} | kwargs
    return paired_conv2d(x, w, bias, key_on(w.device), f64(EPS, w.device), **args)


def inputs(
    sizes: tuple[Any, ...], halves: int, dtype: torch.dtype = FP32, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[halves * rows, Ci, IH, IW]`, w `[Co, Ci, KH, KW]`, bias `[Co]`."""
    rows, channels, outputs, size, kernel = sizes
    shapes = (halves * rows, channels, *size), (outputs, channels, *kernel), (outputs,)
    x, w, bias = (torch.randn(s, dtype=torch.float64).to(device, dtype) for s in shapes)
    return x, w, bias


def expected(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    halves: range,
    noise: str,
    *,
    shared: bool = False,
    relu: bool = False,
    pool: bool = False,
    dtype: torch.dtype | None = None,
    cut: Any = None,
    **geometry: Any,
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
        operands = cut(rows.cpu().to(wide)), cut(w.cpu().to(wide) + sign * SCALE * z)
        y = F.conv2d(*operands, **geometry)
        if bias is not None:
            z = model(bias.shape, SEED, STEP, tensor=BIAS_TENSOR, **where).to(wide)
            y = y + (bias.cpu().to(wide) + sign * BIAS_SCALE * z)[:, None, None]
        y = y.relu() if relu else y
        results.append(F.max_pool2d(y, 2) if pool else y)
    return torch.cat(results).to(dtype or wide)


def noise_error(x: Tensor, w: Tensor, noise: str, **geometry: Any) -> float:
    """How far the error of a normal can move a result."""
    if noise != "normal" or not x.numel():
        return 0.0
    ones = torch.ones_like(w[:1].cpu(), dtype=torch.float64)
    patches = F.conv2d(x.cpu().double().abs(), ones, **geometry)
    return EPS * NORMAL_ERROR * (SCALE * patches.max().item() + abs(BIAS_SCALE))


def check(x: Tensor, w: Tensor, bias: Tensor | None, backend: str, **kwargs: Any) -> Tensor:
    before = [t.clone() for t in (x, w)]
    noise, stop = kwargs.get("noise", "normal"), kwargs.get("stop", 2)
    start, dtype = kwargs.get("start", 0), kwargs.get("compute_dtype") or x.dtype
    geometry = {n: kwargs[n] for n in ("stride", "padding", "dilation") if n in kwargs}
    given = geometry | {n: kwargs[n] for n in ("shared", "relu", "pool") if n in kwargs}
    y = run(x, w, bias, backend, **kwargs)
    assert y.dtype == dtype
    halves = range(start, stop)
    cut = tf32 if kwargs.get("precision") == "tf32" and dtype == FP32 else None
    if truncates(backend) and dtype == BF16:
        cut = lambda t: narrow(t, BF16, True).float()  # noqa: E731
    exact = expected(x, w, bias, halves, noise, **given)
    low = expected(x, w, bias, halves, noise, dtype=dtype, cut=cut, **given)
    assert_within_budget(y, low, exact, extra=noise_error(x, w, noise, **geometry))
    last = x.is_contiguous(memory_format=LAST) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    assert same_bits(x, before[0]) and same_bits(w, before[1])
    return y


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twin(case: Any, noise: str, dtype: torch.dtype, backend: str, device: Any) -> None:
    sizes, geometry = case
    check(*inputs(sizes, 2, dtype, device), backend, noise=noise, **geometry)


@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pool"])
@pytest.mark.parametrize("formats", ["both", "x", "w"])
@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
def test_channels_last(case: Any, formats: str, pool: bool, backend: str, device: Any) -> None:
    sizes, geometry = case
    x, w, bias = inputs(sizes, 2, device=device)
    x = x if formats == "w" else x.to(memory_format=LAST)
    w = w if formats == "x" else w.to(memory_format=LAST)
    check(x, w, bias, backend, pool=pool, **geometry)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("after", ["", "relu", "relu-pool"])
@pytest.mark.parametrize("noise", NOISES)
def test_queries_bias_relu_pool_shared(
    noise: str, after: str, with_bias: bool, shared: bool, backend: str, device: Any
) -> None:
    sizes, geometry = CASES["everything"]
    x, w, bias = inputs(sizes, 1 if shared else 4, device=device)
    given = {"noise": noise, "stop": 4, "shared": shared}
    given |= {"relu": "relu" in after, "pool": "pool" in after}
    check(x, w, bias if with_bias else None, backend, **given, **geometry)


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pooling_drops_what_is_odd(stride: int, kernel: int, backend: str, device: Any) -> None:
    for size in ((7, 8), (8, 9)):
        x, w, bias = inputs((2, 2, 3, size, (kernel, kernel)), 2, device=device)
        geometry = {"stride": stride, "padding": kernel // 2}
        y = check(x, w, bias, backend, pool=True, **geometry)
        whole = run(x, w, bias, backend, **geometry)
        assert torch.equal(y, F.max_pool2d(whole, 2)) or backend == "triton"
        torch.testing.assert_close(y, F.max_pool2d(whole, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("compute", DTYPES.values(), ids=lambda d: f"compute-{d}"[14:])
@pytest.mark.parametrize("x_dtype", DTYPES.values(), ids=lambda d: f"x-{d}"[8:])
@pytest.mark.parametrize("w_dtype", DTYPES.values(), ids=lambda d: f"w-{d}"[8:])
def test_compute_dtype(w_dtype: Any, x_dtype: Any, compute: Any, backend: str, device: Any) -> None:
    sizes, geometry = CASES["odd"]
    x, w, bias = inputs(sizes, 2, device=device)
    given = {"compute_dtype": compute, "relu": True, "pool": True} | geometry
    check(x.to(x_dtype), w.to(w_dtype), bias.to(w_dtype), backend, **given)


@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_precision(precision: str, case: Any, backend: str, device: Any) -> None:
    sizes, geometry = case
    x, w, bias = inputs(sizes, 2, device=device)
    if precision == "tf32x3":  # as good as fp32, but for the product of the low parts
        exact = expected(x, w, bias, range(2), "normal", **geometry)
        y = run(x, w, bias, backend, precision=precision, **geometry)
        size = expected(x.abs(), w.abs() + 1, None, range(2), "rademacher", **geometry).abs().max()
        assert (y.cpu().double() - exact).abs().max() <= 2.0**-19 * size
    else:
        check(x, w, bias, backend, precision=precision, **geometry)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(5, 3, 3, 2), (17, 1, 5, 5), (3, 32, 2, 2)], ids=str)
def test_noise_is_that_of_perturbed_weights(
    shape: Any, noise: str, dtype: torch.dtype, backend: str, device: Any
) -> None:
    """An impulse for each weight of a row shows what staging would write."""
    w = torch.randn(shape, device=device)
    impulses = torch.eye(w[0].numel(), device=device).reshape(-1, *shape[1:])
    given = {"noise": noise, "stop": 3}
    y = run(impulses, w, None, backend, shared=True, compute_dtype=dtype, **given)
    staged = perturbed_weights(
        *(w, key_on(device), f64(EPS, device)),
        **({"tensor": TENSOR, "scale": SCALE, "dtype": dtype, "backend": backend} | given),
    )
    y = y.reshape(3, -1, shape[0]).mT.reshape(3, *shape)
    if noise == "rademacher" or interpreted():
        assert torch.equal(y, staged)
    else:  # sums may be contracted differently
        assert_rounded(y, staged.double(), 1.0, EPS * SCALE * NORMAL_ERROR)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_of_the_bias_is_that_of_perturbed_weights(
    noise: str, backend: str, device: Any
) -> None:
    bias = torch.randn(140, device=device)
    x, w = torch.zeros(1, 1, 1, 1, device=device), torch.zeros(140, 1, 1, 1, device=device)
    y = run(x, w, bias, backend, noise=noise, shared=True, stop=4)
    z = [model(bias.shape, SEED, STEP, tensor=BIAS_TENSOR, query=q, noise=noise) for q in (0, 1)]
    exact = torch.stack([bias.cpu() + s * EPS * BIAS_SCALE * z[q] for q in (0, 1) for s in (1, -1)])
    tolerance = EPS * abs(BIAS_SCALE) * NORMAL_ERROR + 1e-7
    assert_rounded(y[:, :, 0, 0], exact, 0.5, tolerance)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("noise", NOISES)
def test_any_range_of_halves_is_a_part_of_all(
    noise: str, shared: bool, backend: str, device: Any
) -> None:
    x, w, bias = inputs((2, 3, 5, (4, 5), (2, 3)), 1 if shared else 4, device=device)
    given = {"noise": noise, "shared": shared, "pool": True, "padding": 1}
    whole = run(x, w, bias, backend, stop=4, **given)
    for start in range(4):
        for stop in range(start + 1, 5):
            rows = slice(2 * start, 2 * stop)
            x_here = x if shared else x[rows]
            part = run(x_here, w, bias, backend, start=start, stop=stop, **given)
            torch.testing.assert_close(part, whole[rows], rtol=0, atol=2e-5)


VIEWS: dict[str, Any] = {
    "some-rows": lambda t: t.repeat_interleave(3, 0)[::3],
    "some-channels": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "sliced": lambda t: F.pad(t, (1, 2, 0, 3))[:, :, : t.shape[2], 1 : 1 + t.shape[3]],
    "every-second": lambda t: t.repeat_interleave(2, 3).repeat_interleave(2, 2)[:, :, ::2, ::2],
    "transposed": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view: Any, channels: int, backend: str, device: Any) -> None:
    sizes, geometry = (2, channels, 5, (5, 4), (2, 3)), {"padding": 1}
    x, w, bias = inputs(sizes, 2, device=device)
    x, w, bias = view(x), view(w), bias.repeat_interleave(2)[::2]
    check(x, w, bias, backend, **geometry)
    contiguous = run(x.contiguous(), w.contiguous(), bias, backend, **geometry)
    torch.testing.assert_close(run(x, w, bias, backend, **geometry), contiguous, rtol=0, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_nan_stays_where_it_reaches(relu: bool, backend: str, device: Any) -> None:
    x, w, bias = inputs((1, 2, 3, (6, 6), (1, 1)), 2, device=device)
    x[1, 1, 2, 5] = float("nan")
    whole = run(x, w, bias, backend, relu=relu).isnan()
    assert whole[1, :, 2, 5].all() and whole.sum() == 3
    pooled = run(x, w, bias, backend, relu=relu, pool=True).isnan()
    assert pooled[1, :, 1, 2].all() and pooled.sum() == 3


def integers(device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """With signs, sums of these are exact in any order."""
    sizes = (2 * 2, 5, 7, 6), (33, 5, 3, 3), (33,)
    x, w, bias = (torch.randint(-4, 5, size, device=device).float() for size in sizes)
    return x, w, bias


TILES = [(32, 16, 64, 4, 2), (64, 64, 128, 8, 2)]


@needs_triton
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pool"])
def test_launch_does_not_show(pool: bool, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, and 64-bit offsets where 32 would do."""
    module = importlib.import_module("zo_kernels.triton.conv")
    x, w, bias = integers(device)
    given = {"noise": "rademacher", "precision": "tf32", "padding": 1, "pool": pool}
    first = run(x, w, bias, "triton", **given)
    assert torch.equal(first, run(x, w, bias, "reference", **given))
    if HAS_NUMBA:
        assert torch.equal(first.cpu(), run(x.cpu(), w.cpu(), bias.cpu(), "numba", **given))
    normals = run(x, w, bias, "triton", padding=1, pool=pool)
    monkeypatch.setattr(module, "INT32_MAX", 0)
    assert torch.equal(first, run(x, w, bias, "triton", **given))
    last = x.to(memory_format=LAST)
    assert torch.equal(first, run(last, w, bias, "triton", **given))
    for tile in TILES:
        monkeypatch.setattr(module, "TILES", dict.fromkeys(module.TILES, (module.Tile(*tile),)))
        monkeypatch.setattr(module, "GATHERED_COLS", {})
        assert torch.equal(first, run(x, w, bias, "triton", **given))
        again = run(x, w, bias, "triton", padding=1, pool=pool)
        torch.testing.assert_close(normals, again, rtol=0, atol=1e-3)


@needs_triton
def test_a_tile_holds_rows_and_outputs_or_is_the_largest() -> None:
    module = importlib.import_module("zo_kernels.triton.conv")
    for kind, tiles in module.TILES.items():
        assert list(tiles) == sorted(tiles, key=lambda t: (t.cols, t.rows))
        compute = BF16 if kind in ("bf16", "mixed") else FP32
        w = FP32 if kind == "mixed" else compute
        precision = "ieee" if compute == BF16 else kind
        for lines in (False, True):
            most = tiles[-1].cols if lines else module.GATHERED_COLS.get(kind, tiles[-1].cols)
            for rows in (0, 1, 64, 65, 128, 129, 10**6):
                for outputs in (1, 16, 17, 33, 64, 512):
                    tile = module.tile_for(rows, outputs, lines, compute, w, compute, precision)
                    assert tile in tiles and tile.depth == module.DEPTH
                    assert min(outputs, most) <= tile.cols <= most
                    assert tile.cols == 16 or tile.cols < 2 * outputs
                    assert tile.rows == (64 if rows <= 64 else 128)


@needs_triton
def test_offsets_may_lie_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Rows of x, then its channels, then rows of w begin at elements 2^30 and 2^31."""
    distance = 1 << 30
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 8 << 30:
            pytest.skip("needs 8 GiB")
        memory = torch.empty(2 * distance + 64, dtype=BF16, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "rows", np.int16, "w+", shape=(2 * distance + 64,))
        memory = torch.from_numpy(file).view(BF16)
    near = (9, 3, 1)
    given = {"shared": True, "start": 1, "stop": 3, "padding": 1}
    x, w, _ = inputs((1, 3, 3, (3, 3), (3, 3)), 1, BF16, device)
    far = memory.as_strided((1, 3, 3, 3), (1, distance, 3, 1))
    far.copy_(x)
    assert torch.equal(run(far, w, None, "triton", **given), run(x, w, None, "triton", **given))
    three = torch.randn(3, 1, 3, 3, device=device).to(BF16)
    far = memory.as_strided((3, 1, 3, 3), (distance, *near))
    far.copy_(three)
    w1 = w[:, :1].contiguous()
    want = run(three, w1, None, "triton", **given)
    assert torch.equal(run(far, w1, None, "triton", **given), want)
    want = run(x[:, :1], three, None, "triton", **given)
    assert torch.equal(run(x[:, :1], far, None, "triton", **given), want)


def test_last_query(backend: str, device: Any) -> None:
    x, w, _ = inputs((1, 2, 3, (4, 4), (3, 3)), 2, device=device)
    y = run(x, w, None, backend, start=2**25 - 2, stop=2**25)
    exact = expected(x, w, None, range(2**25 - 2, 2**25), "normal")
    assert (y.cpu().double() - exact).abs().max() < 1e-5
