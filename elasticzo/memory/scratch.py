"""What an op on the CPU holds while it runs, above its inputs and outputs.

Convolutions: oneDNN works on copies in blocked layouts; LeNet-5's first convolution writes 16
channels where 6 are wanted. Which copies, the processor and the shapes decide; so the op itself is
run on two samples and on four, and each of its allocations continued on the straight line through
the two. Sums and products of two dtypes: torch copies what is not of the common one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler_legacy
from torch.utils import _pytree as pytree

FEW = (2, 4)  # samples
# A 1x1 convolution on one thread: torch takes another implementation from 16 samples on.
FEW_POINTWISE = (16, 18)
# Ops with scratch: which of their arguments have the batch in front, and which is the weight.
SCRATCH_OPS: dict[Any, tuple[tuple[int, ...], int]] = {
    torch.ops.aten.convolution.default: ((0,), 1),
    torch.ops.aten.convolution_backward.default: ((0, 1), 2),
}

# Ops of two operands that are brought to a common dtype first; on a GPU in registers.
ARITHMETIC = ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
PROMOTING = frozenset(getattr(torch.ops.aten, name) for name in (*ARITHMETIC, *COMPARISONS))
SUMS = (torch.ops.aten.sum,)  # integers are copied to int64 first


def copies_inside(func: Any, args: Any) -> int:
    """Bytes of the operands' copies in the common dtype that an op makes for itself."""
    kind = func.overloadpacket
    tensors = [x for x in args[:2] if isinstance(x, Tensor)]
    if kind in SUMS and tensors and not tensors[0].is_floating_point():
        wanted = torch.int64
    elif kind in PROMOTING and len(tensors) == 2:
        wanted = torch.result_type(*tensors)
    else:
        return 0
    return sum(t.numel() * wanted.itemsize for t in tensors if t.dim() and t.dtype != wanted)


def peak_inside(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes that `func` holds at most above what was held before, its outputs among them.

    Args:
        func: one of `SCRATCH_OPS`.
        args, kwargs: as it is called; of tensors the shapes are looked at, not the values.
    """
    places, weight = SCRATCH_OPS[func]
    batch: int = args[places[0]].shape[0]
    pointwise = args[weight].shape[2:].numel() == 1
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batched = {id(args[i]) for i in places}
    call = tuple(_described(x, id(x) in batched) if isinstance(x, Tensor) else x for x in leaves)
    low, high = FEW_POINTWISE if pointwise and batch >= FEW_POINTWISE[0] else FEW
    threads = torch.get_num_threads()
    if batch <= high:
        return max(accumulate(_moves(func, call, spec, batch, threads)), default=0)
    few, more = (_moves(func, call, spec, n, threads) for n in (low, high))
    if len(few) != len(more):  # it works otherwise on more samples: the larger run speaks
        return max(accumulate(more), default=0) * batch // high
    pairs = zip(few, more, strict=True)
    moves = [a + (b - a) * (batch - low) // (high - low) for a, b in pairs]
    return max(accumulate(moves), default=0)


@lru_cache(maxsize=1024)
def _moves(
    func: Any, call: tuple[Any, ...], spec: Any, batch: int, threads: int
) -> tuple[int, ...]:
    """Allocations (> 0) and frees (< 0) of one call on a batch of this size."""
    leaves = [_zeros(x, batch) if _is_description(x) else x for x in call]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with torch.no_grad():
        return allocations(lambda: func(*args, **kwargs))


def _described(t: Tensor, batched: bool) -> tuple[Any, ...]:
    """Shape (without the batch), strides, dtype, and whether the batch is in front."""
    return tuple(t.shape[1:] if batched else t.shape), t.stride(), t.dtype, batched


def _is_description(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 4 and isinstance(x[2], torch.dtype)


def _zeros(described: Any, batch: int) -> Tensor:
    shape, strides, dtype, batched = described
    t = torch.empty_strided(
        (batch, *shape) if batched else shape, strides, dtype=dtype, device="cpu"
    )
    t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,)).zero_()
    return t


def allocations(run: Callable[[], object]) -> tuple[int, ...]:
    """Bytes that torch's CPU allocator gives out (> 0) and takes back (< 0) in this thread while
    `run` runs, in order.

    By the older of torch's profilers: it starts in a microsecond and says nothing.
    """
    profiler: Any = profiler_legacy
    profiler._enable_profiler_legacy(profiler.profile(profile_memory=True).config())
    try:
        kept = run()
    finally:
        records = profiler._disable_profiler_legacy()
    del kept
    events = (e for thread in records for e in thread if e.kind() == "memory_alloc")
    return tuple(e.cpu_memory_usage() for e in events)
