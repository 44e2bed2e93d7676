"""All calls that are timed; here those of kernels that do not multiply matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zo_kernels as zk
from experiments.benchmarks.cases import NOISES, WEIGHT, Case, Shared
from experiments.benchmarks.models import DTYPES
from experiments.benchmarks.product_cases import convolutions, linears
from experiments.benchmarks.section import BOUNDS, Bench, require
from zo_kernels import reference
from zo_kernels.paths import STAGED_NOISE


def exact_update(
    s: Shared, w: Tensor, queries: int, noise: str, tensor: int, key: Tensor
) -> Tensor:
    """`update_` of w in float64."""
    wide = w.double()
    total = s.decay * wide
    for query, c in enumerate(s.coeff(queries)):
        total += c * reference.sample(w.shape, key, tensor=tensor, query=query, noise=noise)
    return wide - s.lr * total


# ---- kernels that walk over weights


def weights(s: Shared, width: int) -> Iterator[Case]:
    """`perturbed_weights`: one read, two writes."""
    for given, written in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        for noise in NOISES:

            def call(w: Tensor, noise: str = noise, to: str = written) -> Tensor:
                settings: dict[str, Any] = {"tensor": 1, "noise": noise, "dtype": DTYPES[to]}
                return zk.perturbed_weights(w, s.key, s.eps, **settings, backend=s.backend)

            def verify(w: Tensor, noise: str = noise, to: str = written, call: Any = call) -> float:
                exact = reference.perturbed_weights(w.double(), s.key, s.eps, tensor=1, noise=noise)
                return require("halves", call(w), exact, BOUNDS[to])

            size = width * width
            yield Case(
                "perturbed_weights",
                f"{width}x{width} {given}->{written} {noise}",
                lambda dtype=DTYPES[given]: s.normal(width, width, dtype=dtype, scale=WEIGHT),  # type: ignore[misc]
                call,
                verify,
                size * (DTYPES[given].itemsize + 2 * DTYPES[written].itemsize),
                elements=size,
                instructions=STAGED_NOISE[noise],
            )


def staging(s: Shared, shapes: dict[str, list[tuple[int, ...]]]) -> Iterator[Case]:
    """`stage_`: many weights in one launch, with and without a pending update."""
    for what, sizes in shapes.items():
        for dtype in DTYPES:
            for noise in NOISES:
                for pending in (False, True):
                    yield _stage(s, what, sizes, dtype, noise, pending)


def _stage(
    s: Shared, what: str, sizes: list[tuple[int, ...]], dtype: str, noise: str, pending: bool
) -> Case:
    places, size = list(range(len(sizes))), sum(torch.Size(shape).numel() for shape in sizes)
    waiting: dict[str, Any] = {}
    if pending:
        names = ("before", "coeff", "lr", "weight_decay", "skip")
        waiting = dict(zip(names, (s.before, s.coeff(1), s.lr, s.decay, s.skip), strict=True))
        waiting["groups"] = [0] * len(sizes)

    def make() -> tuple[list[Tensor], list[Tensor]]:
        params = [s.normal(*shape, dtype=DTYPES[dtype], scale=WEIGHT) for shape in sizes]
        room = [-(-2 * p.numel() // 64) * 64 for p in params]
        memory = torch.full((sum(room),), torch.nan, dtype=DTYPES[dtype], device=s.device)
        parts = torch.split(memory, room)
        return params, [
            m[: 2 * p.numel()].view(2, *p.shape) for m, p in zip(parts, params, strict=True)
        ]

    def call(given: tuple[list[Tensor], list[Tensor]]) -> None:
        params, outs = given
        scales = [1.0] * len(params)
        settings: dict[str, Any] = {"noise": noise, "backend": s.backend, **waiting}
        zk.stage_(outs, params, s.key, s.eps, tensors=places, scales=scales, **settings)

    def verify(given: tuple[list[Tensor], list[Tensor]]) -> float:
        params, outs = given
        old = [p.clone() for p in params]
        call(given)
        errors = []
        for i, (w, p, out) in enumerate(zip(old, params, outs, strict=True)):
            if pending:
                exact = exact_update(s, w, 1, noise, i, s.before)
                errors.append(require("updated weights", p, exact, BOUNDS[dtype]))
            wide = p.double()  # the halves are of what was stored
            exact = reference.perturbed_weights(wide, s.key, s.eps, tensor=i, noise=noise)
            errors.append(require("halves", out, exact, BOUNDS[dtype]))
        return max(errors)

    return Case(
        "stage_",
        f"{what} {dtype} {noise}{' pending' if pending else ''}",
        make,
        call,
        verify,
        size * DTYPES[dtype].itemsize * (4 if pending else 3),
        elements=size * (2 if pending else 1),
        instructions=STAGED_NOISE[noise],
    )


def updates(s: Shared, width: int) -> Iterator[Case]:
    """`update_`: one read and one write, whatever Q is."""
    for dtype in DTYPES:
        for noise in NOISES:
            for queries in (1, 4):
                coeff = s.coeff(queries)

                def call(w: Tensor, coeff: Tensor = coeff, noise: str = noise) -> None:
                    places: dict[str, Any] = {"tensors": [1], "groups": [0], "scales": [1.0]}
                    rates = (s.lr, s.decay, s.skip)
                    zk.update_([w], s.key, coeff, *rates, **places, noise=noise, backend=s.backend)

                def verify(
                    w: Tensor, q: int = queries, n: str = noise, d: str = dtype, call: Any = call
                ) -> float:
                    exact = exact_update(s, w, q, n, 1, s.key)
                    call(w)
                    return require("updated weights", w, exact, BOUNDS[d])

                size = width * width
                yield Case(
                    "update_",
                    f"{width}x{width} {dtype} {noise} Q={queries}",
                    lambda dtype=DTYPES[dtype]: s.normal(width, width, dtype=dtype, scale=WEIGHT),  # type: ignore[misc]
                    call,
                    verify,
                    2 * size * DTYPES[dtype].itemsize,
                    elements=queries * size,
                    instructions=STAGED_NOISE[noise],
                )


# ---- norms and losses


def layer_norms(s: Shared, rows: int, width: int) -> Iterator[Case]:
    """`paired_layer_norm`: one read, one write."""
    for name, dtype in DTYPES.items():

        def make(dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor, Tensor]:
            w, b = (s.normal(2, width, dtype=dtype) for _ in range(2))
            return s.normal(2 * rows, width, dtype=dtype), w, b

        def call(given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            return zk.paired_layer_norm(*given, halves=2, epsilon=1e-5, backend=s.backend)

        def vendor(given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
            x, w, b = given
            return [F.layer_norm(p, [width], w[h], b[h]) for h, p in enumerate(x.chunk(2))]

        def verify(
            given: tuple[Tensor, Tensor, Tensor], name: str = name, vendor: Any = vendor
        ) -> float:
            exact = torch.cat(vendor(tuple(t.double() for t in given)))
            return require("normalised rows", call(given), exact, BOUNDS[name])

        size = 4 * rows * width * dtype.itemsize
        yield Case(
            "paired_layer_norm",
            f"{rows}x{width} {name}",
            make,
            call,
            verify,
            size,
            vendor=vendor,
            vendor_what="torch, half by half",
        )


def batch_norms(s: Shared, batch: int, channels: int, size: int) -> Iterator[Case]:
    """`paired_batch_norm` with a ReLU: the statistics of a half, then its values: two reads."""
    for name, dtype in DTYPES.items():
        for format in (torch.contiguous_format, torch.channels_last):

            def make(dtype: torch.dtype = dtype, format: Any = format) -> Any:
                w, b = (s.normal(2, channels, dtype=dtype) for _ in range(2))
                x = s.normal(2 * batch, channels, size, size, dtype=dtype)
                return x.contiguous(memory_format=format), w, b

            def call(given: Any) -> Tensor:
                settings: dict[str, Any] = {"halves": 2, "epsilon": 1e-5, "relu": True}
                return zk.paired_batch_norm(*given, **settings, backend=s.backend)[0]

            def vendor(given: Any) -> list[Tensor]:
                x, w, b = given
                return [
                    F.batch_norm(p, None, None, w[h], b[h], True).relu()
                    for h, p in enumerate(x.chunk(2))
                ]

            def verify(given: Any, name: str = name, call: Any = call, v: Any = vendor) -> float:
                exact = torch.cat(v(tuple(t.double() for t in given)))
                return require("normalised images", call(given), exact, BOUNDS[name])

            last = " channels_last" if format is torch.channels_last else ""
            yield Case(
                "paired_batch_norm",
                f"{batch}x{channels}x{size}x{size} {name}{last} relu",
                make,
                call,
                verify,
                3 * 2 * batch * channels * size * size * dtype.itemsize,
                vendor=vendor,
                vendor_what="torch, half by half, and ReLU",
            )


def losses(s: Shared, rows: int, classes: int) -> Iterator[Case]:
    """`paired_cross_entropy` (one read) and its backward (one read, one write)."""
    for name, dtype in DTYPES.items():

        def make(dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            x = s.normal(2, rows, classes, dtype=dtype)
            y = torch.randint(classes, (rows,), device=s.device)
            return x, y, x.float().logsumexp(-1), torch.full((2,), 0.5, device=s.device)

        def forward(given: Any) -> Tensor:
            return zk.paired_cross_entropy(given[0], given[1], backend=s.backend)[0]

        def backward(given: Any) -> Tensor:
            return zk.paired_cross_entropy_backward(*given, backend=s.backend)

        def plain(given: Any) -> Tensor:
            x, y = given[0], given[1]
            return torch.stack([F.cross_entropy(half, y) for half in x])

        def verify(given: Any, forward: Any = forward, plain: Any = plain) -> float:
            exact = plain((given[0].double(), given[1]))
            return require("losses", forward(given), exact, BOUNDS["fp32"])

        def verify_backward(given: Any, name: str = name, backward: Any = backward) -> float:
            x = given[0].double().requires_grad_()
            with torch.enable_grad():
                (exact,) = torch.autograd.grad(0.5 * plain((x, given[1])).sum(), x)
            return require("gradients", backward(given), exact, BOUNDS[name])

        size, where = 2 * rows * classes * dtype.itemsize, f"{rows}x{classes} {name}"
        what = "torch, half by half"
        cross = Case("paired_cross_entropy", where, make, forward, verify, size)
        cross.vendor, cross.vendor_what = plain, what
        yield cross
        yield Case(
            "paired_cross_entropy_backward", where, make, backward, verify_backward, 2 * size
        )


LENET = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 784), (120,), (84, 120), (84,), (10, 84)]


def all_cases(bench: Bench) -> Iterator[Case]:
    """Every kernel; reduced, the smallest shapes that still use it."""
    s = Shared(bench)
    if bench.reduced:
        yield from weights(s, 8)
        yield from staging(s, {"two small": [(4, 8), (5,)]})
        yield from updates(s, 8)
        yield from linears(s, 16, 8)
        yield from convolutions(s, 1, 4, [16])
        yield from layer_norms(s, 2, 16)
        yield from batch_norms(s, 2, 2, 2)
        yield from losses(s, 4, 8)
        return
    yield from linears(s, 4096, 1 << 20)
    yield from weights(s, 4096)
    yield from updates(s, 4096)
    yield from staging(s, {"LeNet-5": LENET, "4096x4096": [(4096, 4096)]})
    yield from convolutions(s, 256, 32, [16, 32, 64])
    yield from layer_norms(s, 8192, 4096)
    yield from batch_norms(s, 256, 64, 32)
    yield from losses(s, 8192, 1000)
