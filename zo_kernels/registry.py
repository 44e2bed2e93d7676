"""What all ops share on the host: how they are declared, the choice of a backend, checks."""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "numba", "reference")
COLUMNS = {"triton": "triton", "numba": "cpu", "reference": "reference"}  # folders by backend
NOISES = ("normal", "rademacher")
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
OUT_DTYPES = (*WEIGHT_DTYPES, torch.float16)
PRODUCT_DTYPES = (torch.float32, torch.bfloat16)
MAX_QUERIES = 1 << 24
# Annotations as a schema has them. Integers are no SymInt: a kernel is specialised by them.
TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Sequence[Tensor]": "Tensor[]",
    "Shape": "SymInt[]",
    "Pair": "int[]",
    "int | None": "int?",
    "Sequence[int]": "int[]",
    "Sequence[float]": "float[]",
    "torch.dtype | None": "ScalarType?",
    "tuple[Tensor, Tensor]": "(Tensor, Tensor)",
    "tuple[Tensor, Tensor, Tensor]": "(Tensor, Tensor, Tensor)",
    "None": "()",
}

P = ParamSpec("P")
R = TypeVar("R")
_LIBRARY = torch.library.Library("zo_kernels", "DEF")


def schema(name: str, function: Callable[..., Any], mutates: Sequence[str]) -> str:
    """The schema of an op from its signature; it has no defaults, and none by keyword only."""
    parts: list[str] = []
    for parameter, annotation in function.__annotations__.items():
        kind: str = TYPES.get(annotation) or annotation
        if parameter in mutates:
            mark = "abc"[mutates.index(parameter)]
            kind = kind.replace("Tensor", f"Tensor({mark}!)")
        parts.append(f"{kind} {parameter}")
    *arguments, result = parts
    return f"{name}({', '.join(arguments)}) -> {result.removesuffix(' return')}"


def _apart(result: Any, args: Any) -> Any:
    """Torch wants no result of a registered op to share memory with its arguments."""
    if not isinstance(result, tuple):
        return result
    held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
    return tuple(t.clone() if t.untyped_storage().data_ptr() in held else t for t in result)


class _Arguments(NamedTuple):
    """How an op is called: the first of its arguments by place, the others by keyword."""

    names: list[str]
    places: list[str]
    defaults: dict[str, Any]
    kinds: list[str]  # annotations, by place

    @classmethod
    def of(cls, function: Callable[..., Any]) -> _Arguments:
        parameters = inspect.signature(function).parameters.values()
        by_place = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        names, places = [p.name for p in parameters], [p.name for p in by_place]
        return cls(names, places, defaults, [p.annotation for p in by_place])

    def placed(self, args: Any, kwargs: Any) -> Any:
        """`args`, and what of their rest came by keyword, or not at all."""
        left = self.places[len(args) :]
        return (*args, *(kwargs.pop(k) if k in kwargs else self.defaults[k] for k in left))

    def by_name(self, args: Any, kwargs: Any) -> dict[str, Any]:
        return {**self.defaults, **dict(zip(self.places, args, strict=True)), **kwargs}


@cache
def implementation(file: str, name: str, backend: str) -> Callable[..., Any]:
    """The function `name` of a file in the column of a resolved backend."""
    module = importlib.import_module(f"zo_kernels.{COLUMNS[backend]}.{file}")
    found: Callable[..., Any] = getattr(module, name)
    return found


def _runner(name: str, file: str, arguments: _Arguments, like: str | None) -> Callable[..., Any]:
    """What calls the function of the column of a backend: `(backend, args, kwargs)`."""
    at = arguments.places.index(like) if like else 0
    kinds = [*enumerate(arguments.kinds)]
    tensors = [i for i, kind in kinds if kind in ("Tensor", "Tensor | None")]
    lists = [i for i, kind in kinds if kind == "Sequence[Tensor]"]

    @cache
    def choose(backend: str, device: torch.device) -> Callable[..., Any]:
        return implementation(file, name, _resolve(backend, device.type))

    def run(backend: str, args: Any, kwargs: Any) -> Any:
        function = choose(backend, args[at].device)
        for i in tensors:  # no op has a backward of its own
            t = args[i]
            if t is not None and t.requires_grad:
                args = (*args[:i], t.detach(), *args[i + 1 :])
        for i in lists:
            if any(w.requires_grad for w in args[i]):
                args = (*args[:i], [w.detach() for w in args[i]], *args[i + 1 :])
        return function(*args, **kwargs)

    return run


def _torch_op(
    schema: str, arguments: _Arguments, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """The op as torch knows it: all arguments by place, defaults filled in."""
    name, count = schema.split("(", 1)[0], len(arguments.places)

    def registered(*args: Any) -> Any:
        named = dict(zip(arguments.names[count:-1], args[count:-1], strict=True))
        return _apart(run(args[-1], args[:count], named), args)

    def meta(*args: Any) -> Any:
        return fake(**dict(zip(arguments.names, args, strict=True)))

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, registered, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zo_kernels::{name}", meta, lib=_LIBRARY)
    handle: Callable[..., Any] = getattr(torch.ops.zo_kernels, name).default
    return handle


def _nothing(**_: Any) -> None:
    """The fake of an op that only changes its arguments."""


def op(
    *,
    like: str | None = None,
    mutates: Sequence[str] = (),
    fake: Callable[..., Any] = _nothing,
    touched: Callable[..., Sequence[Tensor]] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare an op by its signature, its words and its checks, which are the function's body.

    The function of the same name, in the file of the same name of the backend's column, is then
    called with the same arguments (but for `backend`) and gives the result: as it is in eager mode,
    where the dispatcher would cost as much as the whole update of a small layer. Under
    torch.compile, or where a dispatch mode looks on (fake tensors, tracing, profilers of
    operators), the registered op is called.

    Args:
        like: the positional argument on whose device it runs; the first one by default.
        mutates: arguments that it changes in place.
        touched: whose versions rise, from all arguments by name; those that it changes by default.
        fake: its results without values, from all arguments by name; None where it has none.
    """

    def declare(check: Callable[P, R]) -> Callable[P, R]:
        name, arguments = check.__name__, _Arguments.of(check)
        run = _runner(name, check.__module__.rpartition(".")[2], arguments, like)
        handle = _torch_op(schema(name, check, mutates), arguments, run, fake)
        count, names = len(arguments.places), arguments.names
        changed = [names.index(k) for k in mutates]
        pairs = [k for k in names if check.__annotations__[k] == "Pair"]

        @wraps(check)
        def call(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            if len(args) < count:
                args = arguments.placed(args, kwargs)
            if torch.compiler.is_compiling() or looked_on():
                given = arguments.by_name(args, kwargs)
                two = {k: [given[k]] * 2 for k in pairs if isinstance(given[k], int)}
                result = handle(**(given | two))
            else:
                result = run(kwargs.pop("backend", "auto"), args, kwargs)
            if mutates and not torch.compiler.is_compiling():
                found = [args[i] if i < count else kwargs.get(names[i], ()) for i in changed]
                for t in touched(**arguments.by_name(args, kwargs)) if touched else found:
                    torch.autograd.graph.increment_version(t)
            return result

        return call

    return declare


def looked_on() -> bool:
    """Whether a dispatch mode wants to see every op. One with `passive = True` does not."""
    modes = range(torch._C._len_torch_dispatch_stack())
    return any(not getattr(torch._C._get_dispatch_stack_at(i), "passive", False) for i in modes)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (decided when they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


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
    if backend == "triton" and not has_triton():
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
