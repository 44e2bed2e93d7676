"""Stacking, splitting and joining of nested inputs and outputs along the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from elasticzo.buffers import has_values

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Unbatched:
    """A model input whose dimension 0 is not the batch; made by `unbatched`."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def unbatched(tensor: Tensor) -> Unbatched:
    """Declare that dimension 0 of this model input is not the batch (an attention mask, say).

    >>> mask = unbatched(torch.zeros(7, 7))
    >>> mask.tensor.shape
    torch.Size([7, 7])
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"unbatched expects a Tensor, got {type(tensor).__name__}")
    return Unbatched(tensor)


def strip(tree: Any) -> Any:
    """The inputs without their `unbatched` marks."""
    if not any(isinstance(x, Unbatched) for x in pytree.tree_leaves(tree)):
        return tree  # as given: a model may keep or change its lists
    return pytree.tree_map(lambda x: x.tensor if isinstance(x, Unbatched) else x, tree)


def same_plain(values: Sequence[Any]) -> bool:
    """Whether the halves agree on a value that is no tensor and can hide none."""
    return all(isinstance(v, PLAIN) and v == values[0] for v in values)


def check_leaves(tree: Any, what: str) -> None:
    """Refuse objects that hide tensors from the wrapper (a dataclass, say)."""
    for x in pytree.tree_leaves(tree):
        inside = vars(x).values() if hasattr(x, "__dict__") and not isinstance(x, Tensor) else ()
        if isinstance(x, Unbatched):
            continue
        if any(isinstance(v, Tensor) for v in inside):
            raise TypeError(
                f"{what} holds tensors in a {type(x).__name__}, which the wrapper cannot look "
                "into: use tuples, lists and dictionaries, or register the type with torch's pytree"
            )


def stack_inputs(tree: Any, n: int) -> tuple[Any, set[int], dict[int, tuple[Tensor, int, Tensor]]]:
    """Repeat every batched tensor n times along dimension 0.

    Returns: the stacked tree, the ids of the tensors that are shared by all halves, and those that
    carry the batch, by id: (stacked, its version, one half).
    Raises: ValueError for an input whose dimension 0 is not the batch and is not declared;
        RuntimeError in inference mode, whose tensors do not tell whether they were written.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "a training forward of stacked halves cannot run under torch.inference_mode(): use "
            "torch.no_grad(), or pairing='sequential'"
        )
    leaves, spec = pytree.tree_flatten(tree)
    batch = next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim() > 0), None)
    if batch is None:
        raise ValueError("a stacked forward needs a tensor input whose dimension 0 is the batch")
    shared: set[int] = set()
    batched: dict[int, tuple[Tensor, int, Tensor]] = {}
    stacked = []
    for x in leaves:
        if isinstance(x, Unbatched):
            shared.add(id(x.tensor))
            x = x.tensor
        elif isinstance(x, Tensor) and x.dim() > 0:
            if x.shape[0] != batch:
                raise ValueError(
                    f"an input of shape {list(x.shape)} does not have the batch ({batch}) as "
                    "dimension 0; declare it with elasticzo.unbatched(...), or use "
                    "pairing='sequential'"
                )
            half, x = x, torch.cat([x] * n)
            batched[id(x)] = (x, x._version, half)
        stacked.append(x)
    return pytree.tree_unflatten(stacked, spec), shared, batched


def samples_of(tree: Any) -> int | None:
    """The length of dimension 0 of the first input that is not declared `unbatched`."""
    first = first_tensor([x for x in pytree.tree_leaves(tree) if not isinstance(x, Unbatched)])
    return None if first is None else first.shape[0]


def split_half(tree: Any, n: int, half: int, shared: set[int], name: str, dim: int = 0) -> Any:
    """The part of one half: tensors as long as the stacked batch are cut, others are shared."""
    first = first_tensor(tree)
    if first is None:
        return tree
    total = first.shape[dim]
    if total % n:
        raise ValueError(
            f"{name!r} got a batch of {total} that does not divide into {n} halves: its dimension "
            f"{dim} is not the batch; use pairing='sequential'"
        )

    def part(x: Any) -> Any:
        if isinstance(x, PackedSequence):
            raise ValueError(f"{name!r} got a PackedSequence: use pairing='sequential'")
        batched = isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == total
        return x.chunk(n, dim)[half] if batched and id(x) not in shared else x

    return pytree.tree_map(part, tree, is_leaf=lambda x: isinstance(x, PackedSequence))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same, NaN included; without values, they do."""
    same = ((a == b) | ((a != a) & (b != b))).all()
    return not has_values(same) or bool(same)


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor of a tree that has dimensions."""
    return next(
        (x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.dim() > 0), None
    )


def join(trees: Sequence[Any], merge: Callable[[Sequence[Any]], Any]) -> Any:
    """Merge the outputs of the halves leaf by leaf."""
    flat = [pytree.tree_flatten(tree) for tree in trees]
    specs = {str(spec) for _, spec in flat}
    if len(specs) != 1:
        raise ValueError(f"the halves returned outputs of different structure: {sorted(specs)}")
    merged = [merge(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    return pytree.tree_unflatten(merged, flat[0][1])


def stack_leaves(parts: Sequence[Any]) -> Any:
    """One leaf of the outputs of halves run one by one: tensors stacked, plain values equal."""
    if isinstance(parts[0], Tensor):
        return torch.stack(list(parts))
    if not same_plain(parts):
        raise ValueError(
            f"the model returned a {type(parts[0]).__name__} that differs between the halves, or "
            "may hold tensors: return tensors in tuples, lists or dictionaries"
        )
    return parts[0]


class InputsStay:
    """Runs a model on the same inputs again and again, and refuses one that writes them.

    Args:
        closely: look at values, too: a write through `.data` has no version.
        own: they are copies, to be written as the model likes.
    """

    def __init__(self, inputs: tuple[Any, Any], closely: bool, own: bool) -> None:
        self.args, self.kwargs = inputs
        tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and not own]
        self.versions = [(x, x._version) for x in tensors if not x.is_inference()]
        self.copies = [(x, x.clone()) for x in tensors if closely]

    def run(self, model: Callable[..., Any], half: int) -> Any:
        output = model(*self.args, **self.kwargs)
        wrote = any(x._version != version for x, version in self.versions)
        if wrote or not all(same_values(x, copy) for x, copy in self.copies):
            for x, copy in self.copies:
                x.data.copy_(copy)
            raise ValueError(
                "the model writes its input in place: the next half would start from it; clone the "
                "input inside the model"
            )
        return output


def unstack_outputs(tree: Any, n: int) -> Any:
    """`[n * B, ...]` -> `[n, B, ...]` for every tensor of the output."""

    def split(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return stack_leaves([x])
        if x.dim() == 0 or x.shape[0] % n:
            raise ValueError(
                f"the model returned a tensor of shape {list(x.shape)}, whose dimension 0 is not "
                f"the batch of {n} halves; use pairing='sequential'"
            )
        return x.reshape(n, x.shape[0] // n, *x.shape[1:])

    return pytree.tree_map(split, tree)
