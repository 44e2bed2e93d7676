"""Shared by all tests: where kernels run, one seed a test, poisoned memory.

Without a CUDA device, `backend="triton"` runs in Triton's interpreter on CPU tensors. The choice is
made when a kernel module is imported, so it is made here, before any of them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(min(2, torch.get_num_threads()))

# A background job starts with the keyboard's interrupt ignored; tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

BACKENDS = ("reference", "numba", "triton")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation in turn, where its package is installed."""
    if request.param != "reference":
        pytest.importorskip(request.param)
    return str(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """CUDA where there is one; the CPU otherwise, and always for the CPU's own backend."""
    on_cpu = "backend" in request.fixturenames and request.getfixturevalue("backend") == "numba"
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")


def _poison(t: torch.Tensor) -> torch.Tensor:
    """NaN, or for integers a value that no kernel would write by chance."""
    return t.fill_(float("nan") if t.is_floating_point() else 0x55)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(t) if caller.startswith("zo_kernels") else t

    return empty


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that zo_kernels allocates begins as NaN: an element nobody writes shows."""
    # What a default device concerns, torch looks up once, by what it finds then.
    torch.utils._device._device_constructors()
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
