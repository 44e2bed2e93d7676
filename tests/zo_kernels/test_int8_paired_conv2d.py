"""Integer convolutions of both halves against their model, on every backend, bit for bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zo_kernels._int8_operands import NOISE, TENSOR, assert_same, expected, halves_of, int8
from tests.zo_kernels._int8_weights import key_on
from tests.zo_kernels.test_paired_conv2d import CASES, FEW, LAST, VIEWS
from zo_kernels import int8_paired_conv1d, int8_paired_conv2d, int8_range
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")


def operands(sizes: Any, halves: int, device: Any) -> tuple[Tensor, Tensor]:
    rows, channels, outputs, size, kernel = sizes
    x = int8(halves * rows, channels, *size, device=device)
    return x, int8(outputs, channels, *kernel, device=device)


def run(x: Tensor, w: Tensor, backend: str, noisy: bool = True, **kwargs: Any) -> Any:
    args = {"tensor": TENSOR, "backend": backend} | NOISE | kwargs
    return int8_paired_conv2d(x, w, key_on(w.device) if noisy else None, **args)


def check(x: Tensor, w: Tensor, backend: str, **kwargs: Any) -> None:
    before = x.clone(), w.clone()
    acc, bits = run(x, w, backend, **kwargs)
    assert_same((acc, bits), expected(x, w, **kwargs))
    halves = kwargs.get("stop", 2) - kwargs.get("start", 0)
    assert torch.equal(bits, int8_range(acc, halves=halves, backend="reference"))
    last = x.is_contiguous(memory_format=LAST) and not x.is_contiguous()
    assert acc.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "plain"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_twin(case: Any, noisy: bool, backend: str, device: Any) -> None:
    sizes, geometry = case
    check(*operands(sizes, 2, device), backend, noisy=noisy, **geometry)


@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pool"])
@pytest.mark.parametrize("formats", ["both", "x", "w"])
@pytest.mark.parametrize("case", FEW.values(), ids=FEW)
def test_channels_last(case: Any, formats: str, pool: bool, backend: str, device: Any) -> None:
    sizes, geometry = case
    x, w = operands(sizes, 2, device)
    x = x if formats == "w" else x.to(memory_format=LAST)
    w = w if formats == "x" else w.to(memory_format=LAST)
    check(x, w, backend, pool=pool, **geometry)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("after", ["", "relu", "pool", "relu-pool"])
def test_queries_relu_pool_shared(after: str, shared: bool, backend: str, device: Any) -> None:
    sizes, geometry = CASES["everything"]
    x, w = operands(sizes, 1 if shared else 4, device)
    given = {"stop": 4, "shared": shared, "relu": "relu" in after, "pool": "pool" in after}
    check(x, w, backend, **given, **geometry)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_any_range_of_halves(shared: bool, backend: str, device: Any) -> None:
    x, w = operands((2, 3, 5, (4, 5), (2, 3)), 1 if shared else 4, device)
    for start in range(4):
        for stop in range(start + 1, 5):
            here = x if shared else x[: 2 * (stop - start)]
            given = {"start": start, "stop": stop, "shared": shared, "pool": True}
            check(here, w, backend, padding=1, **given)


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pooling_drops_what_is_odd(stride: int, kernel: int, backend: str, device: Any) -> None:
    """Also from the range: what falls does not count."""
    for size in ((7, 8), (8, 6), (9, 11)):
        x, w = operands((2, 2, 3, size, (kernel, kernel)), 2, device)
        check(x, w, backend, pool=True, stride=stride, padding=kernel // 2)
    x = torch.zeros(2, 1, 3, 3, dtype=torch.int8, device=device)
    x[0, 0, 2, 1] = x[1, 0, 0, 0] = 100
    w = torch.ones(1, 1, 1, 1, dtype=torch.int8, device=device)
    assert run(x, w, backend, noisy=False, pool=True)[1].tolist() == [0, 7]
    assert run(x, w, backend, noisy=False)[1].tolist() == [7, 7]


@pytest.mark.parametrize("width", [*range(1, 20), 28])
def test_every_way_to_cut_a_row_into_blocks(width: int) -> None:
    pytest.importorskip("numba")
    x, w = operands((1, 3, 17, (3, width), (2, 1)), 2, "cpu")
    check(x, w, "numba")
    if width > 1:
        check(x, w, "numba", pool=True, padding=(1, 0), relu=True)


@pytest.mark.parametrize("channels", [3, 32])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view: Any, channels: int, backend: str, device: Any) -> None:
    x, w = operands((2, channels, 5, (5, 4), (2, 3)), 2, device)
    check(view(x), view(w), backend, padding=1)
    check(view(x), view(w), backend, padding=1, noisy=False)


@pytest.mark.parametrize("shape", [(5, 3, 3, 2), (17, 1, 5, 5), (3, 32, 2, 2)], ids=str)
def test_noise_is_that_of_staged_halves(shape: Any, backend: str, device: Any) -> None:
    """An impulse for each weight of a row shows what staging would write."""
    w = int8(*shape, device=device)
    impulses = torch.eye(w[0].numel(), dtype=torch.int8, device=device).reshape(-1, *shape[1:])
    acc, _ = run(impulses, w, backend, shared=True, stop=3, r_max=127)
    acc = acc.reshape(3, -1, shape[0]).mT.reshape(3, *shape)
    want = torch.stack(halves_of(w, 0, 3, True, p_zero=NOISE["p_zero"], r_max=127))
    assert torch.equal(acc.cpu().long(), want)


def test_all_zero(backend: str, device: Any) -> None:
    x = torch.zeros(4, 3, 5, 5, dtype=torch.int8, device=device)
    acc, bits = run(x, int8(6, 3, 3, 3, device=device), backend, padding=1)
    assert not acc.any() and bits.tolist() == [0, 0]


@needs_triton
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pool"])
def test_launch_does_not_show(pool: bool, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, and 64-bit offsets where 32 would do."""
    module = importlib.import_module("zo_kernels.triton.int8_conv")
    x, w = operands((2, 5, 33, (7, 6), (3, 3)), 2, device)
    given = {"padding": 1, "pool": pool}
    want = expected(x, w, **given)
    monkeypatch.setattr(module, "INT32_MAX", 0)
    for numbers in (*module.TILES[::2], module.GATHERED[1], (32, 16, 64, 4, 2)):
        tile = module.Tile(*numbers)
        monkeypatch.setattr(module, "tile_for", lambda *_, tile=tile: tile)
        assert_same(run(x, w, "triton", **given), want)
        assert_same(run(x.to(memory_format=LAST), w, "triton", **given), want)


@needs_triton
def test_a_tile_holds_rows_and_outputs_or_is_the_largest() -> None:
    module = importlib.import_module("zo_kernels.triton.int8_conv")
    for lines, tiles, most in ((True, module.TILES, 64), (False, module.GATHERED, 32)):
        assert list(tiles) == sorted(tiles, key=lambda t: (t.cols, t.rows))
        for rows in (0, 1, 64, 65, 128, 129, 10**6):
            for outputs in (1, 16, 17, 33, 64, 512):
                tile = module.tile_for(rows, outputs, lines)
                assert tile in tiles and tile.depth == module.DEPTH
                assert min(outputs, most) <= tile.cols <= most
                assert tile.cols == 16 or tile.cols < 2 * outputs
                assert tile.rows == (64 if rows <= 64 else 128)


@needs_triton
def test_offsets_may_lie_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Rows of x, then its channels, then rows of w begin at bytes 2^30 and 2^31."""
    distance = 1 << 30
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 4 << 30:
            pytest.skip("needs 4 GiB")
        memory = torch.empty(2 * distance + 64, dtype=torch.int8, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "rows", np.int8, "w+", shape=(2 * distance + 64,))
        memory = torch.from_numpy(file)
    given = {"shared": True, "start": 1, "stop": 3, "padding": 1}
    x, w = int8(1, 3, 3, 3, device=device), int8(3, 3, 3, 3, device=device)
    far = memory.as_strided((1, 3, 3, 3), (1, distance, 3, 1))
    far.copy_(x)
    assert_same(run(far, w, "triton", **given), expected(x, w, **given))
    three, w1 = int8(3, 1, 3, 3, device=device), w[:, :1].contiguous()
    far = memory.as_strided((3, 1, 3, 3), (distance, 9, 3, 1))
    far.copy_(three)
    assert_same(run(far, w1, "triton", **given), expected(three, w1, **given))
    assert_same(run(x[:, :1], far, "triton", **given), expected(x[:, :1], three, **given))


def test_last_query(backend: str, device: Any) -> None:
    x, w = operands((1, 2, 3, (4, 4), (3, 3)), 2, device)
    check(x, w, backend, start=2**25 - 2, stop=2**25)


GEOMETRIES: dict[str, dict[str, int]] = {
    "plain": {},
    "everything": {"stride": 2, "padding": 3, "dilation": 2},
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("shape", [(4, 3, 3), (3, 32, 2)], ids=str)
def test_1d(shape: Any, geometry: Any, last: bool, backend: str, device: Any) -> None:
    x, w = int8(2 * 2, shape[1], 9, device=device), int8(*shape, device=device)
    x = x.mT.contiguous().mT if last else x
    args = {"tensor": TENSOR, "backend": backend, "relu": True} | NOISE | geometry
    found = int8_paired_conv1d(x, w, key_on(device), **args)
    assert_same(found, expected(x, w, relu=True, **geometry))
    assert (found[0].mT if last else found[0]).is_contiguous()
