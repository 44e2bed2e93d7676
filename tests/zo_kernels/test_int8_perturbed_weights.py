"""`clip(w +- z)` of int8 weights against the noise's model, on every backend and layout."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zo_kernels._int8_weights import int8_weight, key_on
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import ALL, EXPANDED, FEW, LAYOUTS
from tests.zo_kernels.test_layout import Recorder
from zo_kernels import int8_perturbed_weights, sample
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

TENSOR = 2**31 + 5
NOISE = {"p_zero": 0.33, "r_max": 15}


def perturb(w: Tensor, backend: str, **kwargs: Any) -> Tensor:
    args = {"tensor": TENSOR, "backend": backend} | NOISE | kwargs
    return int8_perturbed_weights(w, key_on(w.device), **args)


def exact(w: Tensor, start: int, stop: int, **noise: Any) -> Tensor:
    seed, step = key_on("cpu").tolist()
    halves = []
    for half in range(start, stop):
        where = {"tensor": TENSOR, "query": half // 2, "noise": "sparse_int8"} | NOISE | noise
        z = model(w.shape, seed, step, **where)
        halves.append((w.cpu().long() + (-z if half % 2 else z)).clamp(-127, 127))
    return torch.stack(halves).to(torch.int8)


@pytest.mark.parametrize("name", ALL)
def test_twin(name: str, backend: str, device: Any) -> None:
    w = int8_weight(name, device)
    before = w.clone()
    halves = perturb(w, backend, stop=4)
    assert halves.dtype == torch.int8 and torch.equal(w, before)
    assert torch.equal(halves.cpu(), exact(w, 0, 4))


@pytest.mark.parametrize("p_zero", [0.0, 0.5, 65535 / 65536])
@pytest.mark.parametrize("r_max", [1, 2, 127])
def test_noise_settings(r_max: int, p_zero: float, backend: str, device: Any) -> None:
    w = int8_weight("3x1025", device)
    halves = perturb(w, backend, r_max=r_max, p_zero=p_zero)
    assert torch.equal(halves.cpu(), exact(w, 0, 2, r_max=r_max, p_zero=p_zero))


def test_noise_is_that_of_sample(backend: str, device: Any) -> None:
    """The division by products gives the noise's very integers: half 0 of a weight of 0 is z."""
    w = torch.zeros(65, 1025, dtype=torch.int8, device=device)
    for p_zero, r_max in ((0.1, 127), (0.77, 90)):
        z = perturb(w, backend, stop=1, p_zero=p_zero, r_max=r_max)[0]
        noise = {"noise": "sparse_int8", "p_zero": p_zero, "r_max": r_max}
        assert torch.equal(z, sample(w.shape, key_on(device), tensor=TENSOR, **noise))


def test_saturates(backend: str, device: Any) -> None:
    for value in (-128, -127, -120, 120, 127):
        w = torch.full((4, 33), value, dtype=torch.int8, device=device)
        halves = perturb(w, backend, r_max=127)
        assert torch.equal(halves.cpu(), exact(w, 0, 2, r_max=127))
        assert int(halves.min()) >= -127 and int(halves.abs().max()) == 127


@pytest.mark.parametrize("name", FEW)
def test_any_range_of_halves_is_a_part_of_all(name: str, backend: str, device: Any) -> None:
    w = int8_weight(name, device)
    whole = perturb(w, backend, stop=5)
    for start in range(5):
        for stop in range(start + 1, 6):
            assert torch.equal(perturb(w, backend, start=start, stop=stop), whole[start:stop])


@pytest.mark.parametrize("name", LAYOUTS | EXPANDED)
def test_halves_have_the_memory_format_of_the_weight(name: str, backend: str, device: Any) -> None:
    w = int8_weight(name, device)
    for start in (0, 1):
        halves = perturb(w, backend, start=start)
        assert halves.shape == (2 - start, *w.shape)
        assert halves[0].stride() == torch.empty_like(w).stride()


@needs_triton
@pytest.mark.parametrize("name", FEW)
def test_launch_does_not_show(name: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block sizes, and 64-bit offsets where 32 would do."""
    module = import_module("zo_kernels.triton.int8_weights")
    w = int8_weight(name, device)
    first = perturb(w, "triton", stop=3)
    for limit, block in ((0, 2048), (2**31 - 1, 256), (2**31 - 1, 1024), (0, 4096)):
        monkeypatch.setattr(module, "INT32_MAX", limit)
        monkeypatch.setattr(module, "BLOCK", block)
        assert torch.equal(first, perturb(w, "triton", stop=3))


@needs_triton
@pytest.mark.parametrize(("elements", "wide"), [(1000, False), (2**30, True)])
def test_knows_when_offsets_need_64_bits(
    elements: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kernel = import_module("zo_kernels.triton.int8_weights"), Recorder()
    monkeypatch.setattr(module, "_int8_perturbed_weights_kernel", kernel)
    w = torch.empty(elements, dtype=torch.int8, device="meta")
    out = torch.empty(2, elements, dtype=torch.int8, device="meta")
    module._launch(w, out, torch.empty(2, dtype=torch.int64, device="meta"), 0, 0, 2, 0.5, 1)
    assert kernel.kwargs["INT64"] is wide


@needs_triton
def test_halves_may_begin_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Half 2 begins at element 2^31: its offset, not only the element's, needs 64 bits."""
    distance, count = 1 << 30, 3
    if device.type == "cuda":
        memory = torch.empty(2 * distance + 64, dtype=torch.int8, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "halves", np.int8, "w+", shape=(2 * distance + 64,))
        memory = torch.from_numpy(file)
    w = int8_weight("1d-1040", device)[:64]
    out = memory.as_strided((count, 64), (distance, 1))
    module = import_module("zo_kernels.triton.int8_weights")
    module._launch(w, out, key_on(device), TENSOR, 0, count, *NOISE.values())
    assert torch.equal(out, perturb(w, "triton", stop=count))
