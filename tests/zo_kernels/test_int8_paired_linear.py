"""Integer products of both halves against their model, on every backend, bit for bit."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zo_kernels._int8_operands import NOISE, TENSOR, assert_same, expected, halves_of, int8
from tests.zo_kernels._int8_weights import key_on
from zo_kernels import int8_matmul, int8_paired_linear, int8_range
from zo_kernels.ops.checks import MAX_DEPTH
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")
# rows of a half, depth, features
SHAPES = {
    "one": (1, 1, 1),
    "odd": (5, 3, 7),
    "aligned": (16, 128, 32),
    "more": (17, 129, 33),
    "less": (15, 63, 31),
    "rows": (65, 40, 17),
    "lenet": (3, 84, 10),
    "no-rows": (0, 5, 3),
    "no-features": (3, 5, 0),
    "no-depth": (3, 0, 4),
}


def run(x: Tensor, w: Tensor, backend: str, noisy: bool = True, **kwargs: Any) -> Any:
    args = {"tensor": TENSOR, "backend": backend} | NOISE | kwargs
    return int8_paired_linear(x, w, key_on(w.device) if noisy else None, **args)


def check(x: Tensor, w: Tensor, backend: str, **kwargs: Any) -> None:
    before = x.clone(), w.clone()
    found = run(x, w, backend, **kwargs)
    assert_same(found, expected(x, w, **kwargs))
    halves = kwargs.get("stop", 2) - kwargs.get("start", 0)
    assert torch.equal(found[1], int8_range(found[0], halves=halves, backend="reference"))
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "plain"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twin(shape: Any, shared: bool, noisy: bool, backend: str, device: Any) -> None:
    rows, depth, features = shape
    x = int8(rows if shared else 2 * rows, depth, device=device)
    w = int8(features, depth, device=device)
    check(x, w, backend, shared=shared, noisy=noisy)


@pytest.mark.parametrize("relu", [False, True], ids=["sums", "relu"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_any_range_of_halves(shared: bool, relu: bool, backend: str, device: Any) -> None:
    """Two queries; each range is a part of all."""
    x, w = int8(3 if shared else 15, 21, device=device), int8(9, 21, device=device)
    for start in range(5):
        for stop in range(start + 1, 6):
            x_here = x if shared else x[: 3 * (stop - start)]
            check(x_here, w, backend, start=start, stop=stop, shared=shared, relu=relu)


@pytest.mark.parametrize("p_zero", [0.0, 65535 / 65536])
@pytest.mark.parametrize("r_max", [1, 127])
def test_noise_settings(r_max: int, p_zero: float, backend: str, device: Any) -> None:
    x, w = int8(6, 130, device=device), int8(5, 130, device=device)
    check(x, w, backend, r_max=r_max, p_zero=p_zero)


def test_noise_is_that_of_staged_halves(backend: str, device: Any) -> None:
    """The rows of a unit matrix show `clip(w +- z)`, which saturates."""
    w = torch.tensor([-127, -120, 0, 120, 127], dtype=torch.int8, device=device)
    w = w[:, None].expand(5, 70)
    acc, _ = run(torch.eye(70, dtype=torch.int8, device=device), w, backend, shared=True, r_max=127)
    halves = torch.stack(halves_of(w, 0, 2, True, p_zero=NOISE["p_zero"], r_max=127))
    assert torch.equal(acc.reshape(2, 70, 5).mT.cpu().long(), halves)
    assert int(halves.min()) == -127 and int(halves.max()) == 127


def test_all_zero(backend: str, device: Any) -> None:
    x, w = torch.zeros(8, 20, dtype=torch.int8, device=device), int8(9, 20, device=device)
    acc, bits = run(x, w, backend)
    assert not acc.any() and bits.tolist() == [0, 0]
    acc, bits = run(int8(8, 20, device=device), torch.zeros_like(w), backend, noisy=False)
    assert not acc.any() and bits.tolist() == [0, 0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("relu", [False, True], ids=["sums", "relu"])
def test_bits_at_powers_of_two(relu: bool, sign: int, backend: str, device: Any) -> None:
    """Each half its own: sums of 128 and 129, alone or rectified away."""
    x = torch.tensor([[1, 1], [sign, sign]], dtype=torch.int8, device=device)
    for last, want in ((0, 7), (1, 7), (2, 8)):
        w = torch.tensor([[127, last], [0, 1]], dtype=torch.int8, device=device)
        _, bits = run(x, w, backend, noisy=False, relu=relu)
        assert bits.tolist() == [want, 0 if relu and sign < 0 else want]


def test_largest_sums_fit(backend: str, device: Any) -> None:
    """As many products of 127 and 127 as int32 holds."""
    x = torch.full((2, MAX_DEPTH), 127, dtype=torch.int8, device=device)
    x[1] = -127
    w = torch.full((1, MAX_DEPTH), 127, dtype=torch.int8, device=device)
    acc, bits = run(x, w, backend, noisy=False)
    assert acc.flatten().tolist() == [127**2 * MAX_DEPTH, -(127**2) * MAX_DEPTH]
    assert bits.tolist() == [31, 31] and 127**2 * (MAX_DEPTH + 1) >= 2**31


VIEWS: dict[str, Any] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "some-rows": lambda t: t.repeat_interleave(2, 0)[::2],
    "some-columns": lambda t: t.repeat_interleave(3, 1)[:, ::3],
    "misaligned": lambda t: torch.nn.functional.pad(t, (1, 2))[:, 1:-2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("depth", [33, 64])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view: Any, depth: int, backend: str, device: Any) -> None:
    x, w = int8(10, depth, device=device), int8(18, depth, device=device)
    check(view(x), w, backend)
    check(x, view(w), backend)
    check(view(x), view(w), backend, noisy=False, shared=True)


TILES = [(32, 32, 32, 4, 2), (64, 16, 64, 8, 2)]


@needs_triton
def test_launch_does_not_show(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, and 64-bit offsets where 32 would do."""
    module = importlib.import_module("zo_kernels.triton.int8_linear")
    x, w = int8(2 * 37, 48, device=device), int8(35, 48, device=device)
    want = expected(x, w)
    for name in ("TILES", "RAGGED"):
        for tile in getattr(module, name):
            monkeypatch.setattr(module, "tile_for", lambda *_, tile=tile: tile)
            assert_same(run(x, w, "triton"), want)
    monkeypatch.setattr(module, "INT32_MAX", 0)
    for numbers in TILES:
        tile = module.Tile(*numbers)
        monkeypatch.setattr(module, "tile_for", lambda *_, tile=tile: tile)
        assert_same(run(x, w, "triton"), want)


@needs_triton
def test_a_tile_holds_the_rows_or_is_the_largest() -> None:
    module = importlib.import_module("zo_kernels.triton.int8_linear")
    for ragged, tiles in ((False, module.TILES), (True, module.RAGGED)):
        assert list(tiles) == sorted(tiles)
        for rows in (0, 1, 16, 17, 128, 129, 10**6):
            tile = module.tile_for(rows, ragged)
            assert tile in tiles and (tile.rows >= rows or tile == tiles[-1])
            assert all(t.rows < rows for t in tiles[: tiles.index(tile)])
            assert module.tile_for(rows, ragged, along=False) == tile._replace(stages=2)


@needs_triton
def test_what_is_read_along_decides_whether_operands_are_ragged() -> None:
    """Outputs, or rows, that are no multiple of 16 do so only where memory runs along them."""
    module = importlib.import_module("zo_kernels.triton.int8_linear")
    x, w = int8(4, 64), int8(16, 64)
    down, across = int8(64, 16).t(), int8(60, 64).t()  # [16, 64] and [64, 60] in columns
    assert not module._is_ragged(x, w)
    assert not module._is_ragged(x, w[:10])
    assert not module._is_ragged(x, down)
    assert not module._is_ragged(across[:, :50], int8(50, 64).t())
    views = ((x[:, 1:], w[:, 1:]), (x, w[:, :60]), (x[1:, 1:], w[1:, 1:]))
    views = (*views, (x, down[:10]), (across[:50], int8(60, 64).t()), (x[:, :60], w[:, :60]))
    assert all(module._is_ragged(*views_of) for views_of in views)


@needs_triton
@pytest.mark.parametrize("view", ["rows", "columns"])
def test_a_launch_takes_the_tile_of_its_operands(
    view: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeNet's fc1 has 120 outputs of 400 inputs: lines of 400 bytes, read 16 at a time."""
    module = importlib.import_module("zo_kernels.triton.int8_linear")
    seen, tile_for = [], module.tile_for

    def spy(*args: Any) -> Any:
        seen.append(args)
        return tile_for(*args)

    monkeypatch.setattr(module, "tile_for", spy)
    x, w = int8(2 * 3, 400, device=device), int8(120, 400, device=device)
    columns = view == "columns"
    check(x, w.t().contiguous().t() if columns else w, "triton", noisy=not columns)
    assert seen == [(3, columns, not columns)]


@needs_triton
def test_offsets_may_lie_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Rows of x, then of w, begin at bytes 2^30 and 2^31."""
    distance = 1 << 30
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 4 << 30:
            pytest.skip("needs 4 GiB")
        memory = torch.empty(2 * distance + 64, dtype=torch.int8, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "rows", np.int8, "w+", shape=(2 * distance + 64,))
        memory = torch.from_numpy(file)
    far = memory.as_strided((3, 20), (distance, 1))
    x, w = int8(3, 20, device=device), int8(3, 20, device=device)
    far.copy_(x)
    given = {"shared": True, "start": 1, "stop": 3}
    assert_same(run(far, w, "triton", **given), expected(x, w, **given))
    far.copy_(w)
    assert_same(run(x, far, "triton", **given), expected(x, w, **given))


@pytest.mark.parametrize("order", ["nn", "tn", "nt"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matmul(shape: Any, order: str, backend: str, device: Any) -> None:
    """`err w` and `err^T x`, without copies."""
    rows, depth, cols = shape
    a = int8(depth, rows, device=device).mT if order[0] == "t" else int8(rows, depth, device=device)
    b = int8(cols, depth, device=device).mT if order[1] == "t" else int8(depth, cols, device=device)
    acc, bits = int8_matmul(a, b, backend=backend)
    exact = (a.cpu().double() @ b.cpu().double()).to(torch.int32)
    assert_same((acc, bits), (exact, int8_range(exact)))
    assert bits.shape == ()


def test_threads_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    module = importlib.import_module("zo_kernels.cpu.int8_products")
    monkeypatch.setattr(module, "PARALLEL_FROM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for rows in (1, 65, 300):
        check(int8(2 * rows, 20), int8(18, 20), "numba", relu=True)


PORTABLE = """
import sys, torch
from numba.core.registry import cpu_target
from zo_kernels import int8_paired_conv2d, int8_paired_linear
found = "+avx512vnni" in cpu_target.target_context.codegen().magic_tuple()[2]
torch.manual_seed(1)
x, w = (torch.randint(-128, 128, s, dtype=torch.int8) for s in ((12, 37), (19, 37)))
total = int8_paired_linear(x, w, None, backend="numba")[0]
image, kernel = x[:2, :36].reshape(2, 1, 6, 6), w[:, :9].reshape(19, 1, 3, 3)
other = int8_paired_conv2d(image, kernel, None, padding=1, relu=True, pool=True, backend="numba")[0]
assert torch.equal(total, torch.cat([h.int() @ w.int().T for h in x.split(6)]))
print(found, total.flatten().tolist(), other.flatten().tolist())
"""


def test_machines_without_dot_products_agree() -> None:
    """Compiled for this machine, and for one that has no wide vectors."""
    pytest.importorskip("numba")
    results = []
    for settings in ({}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}):
        done = subprocess.run(
            [sys.executable, "-c", PORTABLE],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | settings,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.split(" ", 1))
    assert results[1][0] == "False" and results[0][1] == results[1][1]
