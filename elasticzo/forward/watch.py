"""The watch over the first forward: who read which weight of the head, and whether perturbed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from elasticzo.buffers import has_values
from elasticzo.head import Head, HeadParameter

# Methods that ask what a tensor is, and attributes that are views of it. All else reads values:
# `item` and `x[0] = w`, too, which give no tensor.
ASKS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset"),
    *("element_size", "get_device", "data_ptr", "has_names", "type", "storage", "untyped_storage"),
    *("__len__", "__hash__", "__repr__", "result_type", "can_cast", "broadcast_shapes"),
)
VIEWS = ("data", "T", "mT", "H", "mH", "real", "imag")
ENOUGH = 1 << 14  # elements, to see whether half of a weight moves
MEDIAN = {"normal": 0.6745, "rademacher": 1.0}  # of |z|


class Watch:
    """What is seen.

    Attributes:
        consumed: names of the weights that someone read perturbed.
        read_raw: names of those that someone read as they are.
        tail_ran: the tail module that ran last.
    """

    def __init__(self, head: Head, goes_on: bool = False) -> None:
        self._goes_on = goes_on  # a run that has steps behind it is not stopped by its weights
        self.consumed: set[str] = set()
        self.read_raw: set[str] = set()
        self.tail_ran: str | None = None
        self._raw = {id(p): name for name, p in head.named()}
        self._swapped: dict[int, str] = {}  # perturbed weights by id
        self._held: list[Tensor] = []  # keeps those ids unique
        self._aside = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The pass itself reads weights."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def consume(self, head: HeadParameter) -> None:
        """Someone has the perturbed weight."""
        self.consumed.add(head.name)
        if self.tail_ran is not None:
            raise ValueError(
                f"the tail must come after the whole head: {self.tail_ran!r} (tail) ran before "
                f"{head.name!r} (head)"
            )

    def swap(self, w: Tensor, head: HeadParameter, known: bool) -> None:
        """A perturbed weight stands in a module: reading it is what counts, but where it was
        `known` to be read before."""
        if not known:
            self.consumed.discard(head.name)
        self._swapped[id(w)] = head.name
        self._held.append(w)

    def read(self, leaves: Sequence[Any]) -> None:
        """A function of torch gave a tensor from these arguments."""
        if self._aside:
            return
        for leaf in leaves:
            if id(leaf) in self._swapped:
                self.consumed.add(self._swapped[id(leaf)])
            elif id(leaf) in self._raw:
                self.read_raw.add(self._raw[id(leaf)])

    def wrong(self, head: Head) -> set[str]:
        """Weights of the head that nobody read perturbed, or somebody as they are."""
        return (set(head.parameters) - self.consumed) | self.read_raw

    def check_perturbed(
        self,
        w: Tensor,
        dtype: torch.dtype,
        head: HeadParameter,
        eps: Tensor,
        noise: str,
        precision: str | None,
    ) -> None:
        """Refuse an eps that rounding to the compute dtype swallows.

        A perturbation of the median |z| decides, so that the draw of this step does not; of large
        weights, elements all over it.
        """
        looked = w.detach().reshape(-1)[:: (w.numel() // ENOUGH) | 1]
        tf32 = precision == "tf32" and w.dim() > 1 and dtype == torch.float32
        wide, named = looked.to(torch.promote_types(w.dtype, torch.float32)), str(dtype)
        typical = (eps * (head.scale * MEDIAN[noise])).to(wide.dtype)
        still, plus, minus = (t.to(dtype) for t in (wide, wide + typical, wide - typical))
        if tf32:
            still, plus, minus = (_tf32(t) for t in (still, plus, minus))
            named = "tf32"
        moves = torch.count_nonzero(still != plus) + torch.count_nonzero(still != minus)
        if looked.numel() and has_values(moves) and moves < looked.numel():
            self._swallowed(
                f"eps={float(eps):g} (scale {head.scale:g}) vanishes in {named} for "
                f"{head.name!r}: more than half of its elements do not move; use a larger eps or a "
                "wider dtype"
            )

    def check_moved(self, layer: str, before: Tensor, after: Tensor, eps: Tensor) -> None:
        """Refuse an eps that rounding of a layer's outputs swallows."""
        stay = before.numel() - torch.count_nonzero(before != after)
        if before.numel() and has_values(stay) and stay > 0.75 * before.numel():
            self._swallowed(
                f"eps={float(eps):g} vanishes in the {before.dtype} outputs of {layer!r}: more "
                "than three quarters of them do not move; use a larger eps or a wider dtype"
            )

    def _swallowed(self, what: str) -> None:
        if not self._goes_on:
            raise ValueError(what)
        warnings.warn(f"the run goes on, but {what}", stacklevel=2)

    @contextmanager
    def over(self, model: nn.Module, tail: Sequence[str]) -> Iterator[None]:
        """Watch a forward of the model; `tail`: names of the tail's parameters."""
        owners = {name.rpartition(".")[0] for name in tail}
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if name in owners:

                    def note(m: nn.Module, args: Any, *, name: str = name) -> None:
                        self.tail_ran = name

                    stack.callback(module.register_forward_pre_hook(note).remove)
            stack.enter_context(_Reads(self))
            yield


class _Reads(TorchFunctionMode):
    """Notes which weights a forward really reads."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not asks(func):
            self.watch.read(pytree.tree_leaves((args, kwargs)))
        return result


def asks(func: Any) -> bool:
    """Whether a function of torch asks what a tensor is, and reads nothing that it holds."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", "") not in VIEWS
    return name in ASKS or (name.startswith("is_") and name != "is_nonzero")


def _tf32(t: Tensor) -> Tensor:
    """What tensor cores read of fp32: a mantissa of 10 bits."""
    return t.contiguous().view(torch.int32) & -0x2000
