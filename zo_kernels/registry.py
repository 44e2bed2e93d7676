"""What all ops share on the host: registration, checks of arguments, the choice of a backend."""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zo_kernels.triton.shim import HAS_TRITON, interpreted

BACKENDS = ("auto", "triton", "numba", "reference")
NOISES = ("normal", "rademacher")
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
MAX_QUERIES = 1 << 24

_LIBRARY = torch.library.Library("zo_kernels", "DEF")


def register(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define one op from its schema and return what callers bind once.

    In eager mode the implementation is called as it is: the dispatcher would cost as much as the
    whole update of a small layer. Under torch.compile, or where a dispatch mode looks on (fake
    tensors, tracing, profilers of operators), the registered op is called.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zo_kernels::{name}", fake, lib=_LIBRARY)
    handle = getattr(torch.ops.zo_kernels, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return handle(*args)
        return implementation(*args)

    return call


@cache
def has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@cache
def _resolve(backend: str, device_type: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        if device_type == "cuda":
            backend = "triton"
        else:
            backend = "numba" if device_type == "cpu" and has_numba() else "reference"
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' needs the triton package (Linux); it is not installed")
    if backend == "triton" and device_type != "cuda" and not interpreted():
        raise ValueError(
            f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {device_type} ones"
        )
    if backend == "numba" and device_type != "cpu":
        raise ValueError(f"backend 'numba' needs CPU tensors, got {device_type} ones")
    if backend == "numba" and not has_numba():
        raise ValueError("backend 'numba' needs the numba package: pip install elasticzo[cpu]")
    return backend


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """The backend that would run: "triton", "numba" or "reference".

    Args:
        backend: "auto" or a name to force; nothing is ever replaced silently.
        device: where the tensors live.
    Raises:
        ValueError: an unknown backend, or one that cannot run there.
    """
    return _resolve(backend, torch.device(device).type)


@cache
def twin(op: str, backend: str) -> Callable[..., Any]:
    """The implementation of `op` for a resolved backend other than "triton"."""
    module = {"numba": "zo_kernels.cpu", "reference": "zo_kernels.reference"}[backend]
    implementation: Callable[..., Any] = getattr(importlib.import_module(module), op)
    return implementation


def check_tensor(
    name: str,
    t: Any,
    *,
    shape: Sequence[int] | None = None,
    dtype: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    vector: bool = False,
) -> None:
    """Raise `TypeError` or `ValueError` that says what `name` must be and what came.

    `vector`: it must be one-dimensional without gaps, as kernels read it through a bare pointer.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if shape is not None and list(t.shape) != list(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(t.shape)}")
    if dtype is not None and t.dtype not in dtype:
        wanted = " or ".join(str(d) for d in dtype)
        raise TypeError(f"{name} must be {wanted}, got {t.dtype}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")
    if vector and (t.ndim != 1 or not t.is_contiguous()):
        raise ValueError(
            f"{name} must be one-dimensional and contiguous, got shape {list(t.shape)} "
            f"with strides {list(t.stride())}"
        )


def check_key(key: Any, device: torch.device | None = None) -> None:
    check_tensor("key", key, shape=[2], dtype=[torch.int64], device=device, vector=True)


def check_indices(tensor: int, query: int = 0) -> None:
    if not 0 <= tensor < 1 << 32:
        raise ValueError(f"tensor index must be in [0, 2^32), got {tensor}")
    if not 0 <= query < MAX_QUERIES:
        raise ValueError(f"query must be in [0, 2^24), got {query}")


def check_noise(noise: str, known: Sequence[str] = NOISES) -> None:
    if noise not in known:
        raise ValueError(f"noise must be one of {tuple(known)}, got {noise!r}")


def check_in_place(name: str, w: Tensor) -> None:
    """In-place ops bypass autograd and torch's own checks: refuse what they would refuse."""
    if torch.is_grad_enabled() and w.requires_grad:
        raise RuntimeError(
            f"{name} is changed in place and requires grad: call under torch.no_grad()"
        )
    if w.numel() and any(s == 0 and n > 1 for n, s in zip(w.shape, w.stride(), strict=True)):
        raise ValueError(
            f"{name} is changed in place and must not be expanded, got shape {list(w.shape)} "
            f"with strides {list(w.stride())}"
        )


__all__ = [
    "BACKENDS",
    "NOISES",
    "WEIGHT_DTYPES",
    "check_in_place",
    "check_indices",
    "check_key",
    "check_noise",
    "check_tensor",
    "has_numba",
    "register",
    "resolve_backend",
    "twin",
]
