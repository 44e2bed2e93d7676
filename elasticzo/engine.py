"""Running a model for the halves of the pair: module forwards are taken over during a pass.

Nothing of the model is replaced for good: outside a training forward it is the model it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from elasticzo.dropout import dropout
from elasticzo.paired import run_paired
from elasticzo.passes import Pass
from elasticzo.plan import CLOSED, Layer, Plan, compute_dtype
from elasticzo.sequence import run_sequence
from elasticzo.state import (
    BufferSnapshot,
    Slot,
    generator_state,
    set_generator_state,
)
from elasticzo.trees import has_tensor, join, same_plain, split_half


class NotByHalf(Exception):
    """A fallback whose halves cannot be joined: the module around it must run by half instead."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.name)
        self.layer = layer


class UsesGenerator(Exception):
    """The model drew from torch's generator while its halves ran stacked."""


class _Reads(TorchFunctionMode):
    """Notes which swapped weights a forward really reads."""

    def __init__(self, current: Pass) -> None:
        super().__init__()
        self.current = current

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        current = self.current
        if not current.staging and has_tensor(result):  # `.shape`, `.dtype` read no value
            for leaf in pytree.tree_leaves((args, kwargs)):
                if id(leaf) in current.watched:
                    current.consumed.add(current.watched[id(leaf)])
                elif id(leaf) in current.raw:
                    current.read_raw.add(current.raw[id(leaf)])
        return result


@contextmanager
def taken_over(
    model: nn.Module,
    plan: Plan,
    current: Pass,
    moving: Sequence[Slot],
    compiled: bool = False,
) -> Iterator[None]:
    """Take over the forwards of the plan's layers for one pass.

    Where the model around them is `compiled`, they are marked as not to be traced.
    """
    call = _call_untraced if compiled else _call
    patched: list[tuple[nn.Module, Any]] = []
    with ExitStack() as stack:
        if current.verify:
            stack.enter_context(_Reads(current))
        try:
            for layer in plan.layers.values():
                if layer.kind == "sequence" and (compiled or current.verify):
                    continue  # nothing to be traced around, or watched
                before = layer.module.__dict__.get("forward")
                patched.append((layer.module, before))
                original = layer.module.forward
                layer.module.__dict__["forward"] = partial(call, current, layer, original, moving)
            yield
        finally:
            for module, before in reversed(patched):
                if before is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = before


def _call(
    current: Pass,
    layer: Layer,
    forward: Callable[..., Any],
    moving: Sequence[Slot],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What a layer's module runs instead of its own forward."""
    if layer.kind == "fallback":
        return _run_fallback(current, layer, forward, moving, args, kwargs)
    if layer.kind == "sequence":
        return run_sequence(current, layer.module, *args, **kwargs)
    x = args[0] if args else kwargs["input"]
    n = current.count
    if n > 1 and (x.dim() == 0 or x.shape[0] % n):
        raise ValueError(
            f"{layer.name!r} got an input of shape {list(x.shape)}, which does not divide into {n} "
            "halves: dimension 0 is not the batch there; use pairing='sequential'"
        )
    if layer.kind == "dropout":
        return dropout(current, layer.module, layer.index, x)
    return run_paired(current, layer, x)


_call_untraced: Callable[..., Any] = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]


@contextmanager
def _swapped(current: Pass, layer: Layer) -> Iterator[None]:
    """The parameters of a fallback, perturbed for the half that runs."""
    computed_in = compute_dtype(current.key.device, current.wanted)
    restore: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, local, head in layer.swaps:
            if (id(module), local) in current.swapped:
                continue
            p = module._parameters[local]
            assert p is not None
            known = head.name in current.consumed
            w = current.stage(p, head, computed_in=computed_in if p.dim() > 1 else None)[0]
            if current.verify:
                if not known:
                    current.consumed.discard(head.name)  # reading it is what counts
                current.watched[id(w)] = head.name
                current.held.append(w)
            module._parameters[local] = w  # type: ignore[assignment]
            current.swapped.add((id(module), local))
            restore.append((module, local, p))
        yield
    finally:
        for module, local, p in restore:
            module._parameters[local] = p
            current.swapped.discard((id(module), local))
        for module in {m for m, _, _ in restore if isinstance(m, nn.RNNBase)}:
            module._init_flat_weights()  # it holds its weights a second time


def _run_fallback(
    current: Pass,
    layer: Layer,
    forward: Callable[..., Any],
    moving: Sequence[Slot],
    args: Any,
    kwargs: Any,
) -> Any:
    if current.half is not None:
        with _swapped(current, layer):
            return forward(*args, **kwargs)
    if not has_tensor((args, kwargs)):
        raise NotByHalf(layer)
    inside = {id(m) for m in layer.module.modules()}
    slots = [(m, name) for m, name in moving if id(m) in inside]
    shared = current.unbatched | {id(b) for b in layer.module.buffers()}
    args, kwargs = _mask_rows(layer, args, kwargs)
    shared |= _square_masks(layer, args, kwargs)
    _check_roles(current, layer, args, kwargs, shared)
    states = _take_states(layer, args, kwargs)

    def run(half: int) -> Any:
        a, k = split_half((args, kwargs), current.halves, half, shared, layer.name)
        if states is not None:
            part = split_half(states, current.halves, half, shared, layer.name, dim=1)
            a, k = a[:1], {"hx": part}
        a, k = _flat_masks(layer, a, k)
        with _swapped(current, layer):
            return forward(*a, **k)

    device = current.key.device
    if current.generator_state is not None:
        _check_generator(current)
    outputs = each_half(current, slots, run)
    if current.generator_state is not None:
        current.generator_state = generator_state(device)
    return _join_outputs(layer, outputs, (args, kwargs), current.halves)


def _take_states(layer: Layer, args: Any, kwargs: Any) -> Any:
    """Initial states of a recurrent module: their batch is dimension 1."""
    if not isinstance(layer.module, nn.RNNBase):
        return None
    return args[1] if len(args) > 1 else kwargs.get("hx")


def _check_roles(current: Pass, layer: Layer, args: Any, kwargs: Any, shared: set[int]) -> None:
    """A tensor as long as the stacked batch may be a table of just that length. What attention and
    recurrent modules take is known, and so are the model's own inputs; of anything else but the
    first argument nothing is guessed: the module around decides."""
    if isinstance(layer.module, CLOSED):
        return
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    for x in leaves[1:]:
        same_length = x.shape[0] == leaves[0].shape[0]
        if same_length and x is not leaves[0] and id(x) not in shared | current.batched.keys():
            raise NotByHalf(layer)


def _mask_rows(layer: Layer, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """An attention mask `[B * heads, L, S]` as `[B, heads, L, S]`, so that it divides by rows."""
    return _map_mask(
        layer, args, kwargs, 3, lambda m, mask: mask.reshape(-1, m.num_heads, *mask.shape[1:])
    )


def _flat_masks(layer: Layer, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _map_mask(layer, args, kwargs, 4, lambda m, mask: mask.flatten(0, 1))


def _map_mask(
    layer: Layer, args: Any, kwargs: Any, dim: int, change: Callable[[Any, Tensor], Tensor]
) -> tuple[Any, Any]:
    if not isinstance(layer.module, nn.MultiheadAttention):
        return args, kwargs
    if len(args) > 5 and isinstance(args[5], Tensor) and args[5].dim() == dim:
        return (*args[:5], change(layer.module, args[5]), *args[6:]), kwargs
    mask = kwargs.get("attn_mask")
    if isinstance(mask, Tensor) and mask.dim() == dim:
        kwargs = {**kwargs, "attn_mask": change(layer.module, mask)}
    return args, kwargs


def _square_masks(layer: Layer, args: Any, kwargs: Any) -> set[int]:
    """An attention mask `[L, S]` has no batch, even where L happens to equal it."""
    if not isinstance(layer.module, nn.MultiheadAttention):
        return set()
    mask = args[5] if len(args) > 5 else kwargs.get("attn_mask")
    return {id(mask)} if isinstance(mask, Tensor) and mask.dim() == 2 else set()


def each_half(current: Pass, slots: Sequence[Slot], run: Callable[[int], Any]) -> list[Any]:
    """`run(half)` for every half, each from the same buffers and the same generator state.

    Afterwards floating buffers hold their mean over the halves, and the generator has moved once.
    """
    device = current.key.device
    snapshot = BufferSnapshot(slots)
    before = generator_state(device)
    outputs, buffers = [], []
    for half in range(current.halves):
        if half:
            snapshot.restore()
            if not torch.equal(generator_state(device), before):
                set_generator_state(device, before)
        with current.only(half):
            outputs.append(run(half))
        if slots:
            buffers.append(snapshot.values())
    if slots and current.halves > 1:
        snapshot.write_mean(buffers)
    return outputs


def _check_generator(current: Pass) -> None:
    """Complain when something drew from torch's generator since the last look."""
    assert current.generator_state is not None
    if not torch.equal(generator_state(current.key.device), current.generator_state):
        raise UsesGenerator


def _join_outputs(layer: Layer, outputs: list[Any], inputs: Any, n: int) -> Any:
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 0]
    batch = leaves[0].shape[0] // n
    if isinstance(layer.module, nn.RNNBase):
        results, states = zip(*outputs, strict=True)
        return torch.cat(results), join(states, lambda parts: torch.cat(list(parts), 1))

    def merge(parts: Sequence[Any]) -> Any:
        if not isinstance(parts[0], Tensor):
            if not same_plain(parts):
                raise NotByHalf(layer)
            return parts[0]
        if parts[0].dim() == 0 or parts[0].shape[0] != batch:
            raise NotByHalf(layer)
        return torch.cat(list(parts))

    return join(outputs, merge)


def run_stacked(model: nn.Module, current: Pass, args: Any, kwargs: Any) -> Any:
    """One call of the model with stacked inputs; the generator must stay as it is."""
    device = current.key.device
    current.generator_state = generator_state(device)
    output = model(*args, **kwargs)
    _check_generator(current)
    return output


__all__ = ["NotByHalf", "UsesGenerator", "each_half", "run_stacked", "taken_over"]
