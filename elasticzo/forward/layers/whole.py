"""Any other module: a half at a time, its perturbed parameters swapped in while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elasticzo.forward.halves import NotByHalf, check_generator, each_half, look
from elasticzo.forward.passes import Layer, Pass
from elasticzo.forward.precision import compute_dtype
from elasticzo.forward.trees import first_tensor, join, same_plain, split_half

# Modules that read parameters of their children directly: the whole subtree is swapped.
CLOSED = (nn.MultiheadAttention, nn.RNNBase)
# What their arguments and results are is known, unless a subclass has a forward of its own.
FORWARDS = (
    nn.MultiheadAttention.forward,
    nn.RNN.forward,
    nn.LSTM.forward,
    nn.GRU.forward,
)


def _known(layer: Layer, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    return isinstance(layer.module, kind) and type(layer.module).forward in FORWARDS


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
            watch = current.watch
            known = watch is not None and head.name in watch.consumed
            w = current.stage(p, head, computed_in=computed_in if p.dim() > 1 else None)[0]
            if watch is not None:
                watch.swap(w, head, known)
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


def run_whole(
    current: Pass, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """A module that no handler knows, a half at a time."""
    if current.half is not None:
        current.note_read(layer.name, (args, kwargs))
        with _swapped(current, layer):
            return forward(*args, **kwargs)
    first = first_tensor((args, kwargs))
    if first is None or first.shape[0] % current.halves:
        raise NotByHalf(layer)
    inside = {id(m) for m in layer.module.modules()}
    slots = [(m, name) for m, name in current.moving if id(m) in inside]
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
        current.note_read(layer.name, (a, k))
        with _swapped(current, layer):
            return forward(*a, **k)

    if current.generator_state is not None:
        check_generator(current)
    outputs = each_half(current, slots, run)
    if current.generator_state is not None:
        look(current)
    return _join_outputs(layer, outputs, (args, kwargs), current.halves)


def _take_states(layer: Layer, args: Any, kwargs: Any) -> Any:
    """Initial states of a recurrent module: their batch is dimension 1."""
    if not _known(layer, nn.RNNBase):
        return None
    return args[1] if len(args) > 1 else kwargs.get("hx")


def _check_roles(current: Pass, layer: Layer, args: Any, kwargs: Any, shared: set[int]) -> None:
    """A tensor as long as the stacked batch may be a table of just that length. What attention and
    recurrent modules take is known, and so are the model's own inputs; of anything else but the
    first argument nothing is guessed: the module around decides."""
    if _known(layer, CLOSED):
        return
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
    if isinstance(layer.module, CLOSED):  # a forward of its own: any of them may be the states
        given = {id(x) for x in leaves}
        if len(given) > 1 and given - shared - current.batched.keys():
            raise NotByHalf(layer)
        return
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
    if not _known(layer, nn.MultiheadAttention):
        return args, kwargs
    if len(args) > 5 and isinstance(args[5], Tensor) and args[5].dim() == dim:
        return (*args[:5], change(layer.module, args[5]), *args[6:]), kwargs
    mask = kwargs.get("attn_mask")
    if isinstance(mask, Tensor) and mask.dim() == dim:
        kwargs = {**kwargs, "attn_mask": change(layer.module, mask)}
    return args, kwargs


def _square_masks(layer: Layer, args: Any, kwargs: Any) -> set[int]:
    """An attention mask `[L, S]` has no batch, even where L happens to equal it."""
    if not _known(layer, nn.MultiheadAttention):
        return set()
    mask = args[5] if len(args) > 5 else kwargs.get("attn_mask")
    return {id(mask)} if isinstance(mask, Tensor) and mask.dim() == 2 else set()


def _join_outputs(layer: Layer, outputs: list[Any], inputs: Any, n: int) -> Any:
    leaves = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() > 0]
    batch = leaves[0].shape[0] // n
    if _known(layer, nn.RNNBase):
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
