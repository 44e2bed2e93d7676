"""Memory of tensors in compiled code, by address: an array made from a tensor costs 2 to 4 us, as
much as a small layer's products. Whoever passes an address keeps the tensor alive."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from functools import lru_cache

from numba import types
from numba.extending import intrinsic
from torch import Tensor

Span = tuple[int, int]  # address, elements


@lru_cache(maxsize=4096)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def extent(t: Tensor) -> int:
    """Elements of memory from the first of a tensor, which is not empty, to its last."""
    return _extent(tuple(t.shape), t.stride())


def span(t: Tensor) -> Span:
    """Where a tensor that is not empty lies."""
    return t.data_ptr(), extent(t)


def _pointer(kind):
    def typed(typing_context, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), generate

    return typed


octets = intrinsic(_pointer(types.int8))  # for numba's carray
spots = intrinsic(_pointer(types.uint8))
words = intrinsic(_pointer(types.int32))
