"""One whole training step as a CUDA graph: forward pair, losses, tail, both optimisers, the gate.

A step of a small network is hundreds of launches of a few microseconds; a graph repeats them
without Python. Everything that changes from step to step lives on the device (noise key, learning
rates, losses, the flag that skips), so a replay equals an eager step bit for bit, and a
learning-rate schedule goes on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elasticzo.buffers import all_buffers, generator_state
from elasticzo.forward.draws import noticing
from elasticzo.losses import pair_losses
from elasticzo.optim import HeadOptimizer
from elasticzo.optim.tail import check_of
from elasticzo.wrapper import ElasticZO
from zo_kernels.triton.table import Table, hold_tables

# Entries of a parameter group that no step reads: what schedulers note there.
NOTES = ("params", "initial_lr", "max_lr", "min_lr", "name")


class CapturedStep:
    """A step that repeats itself: `losses = step(x, y)`; made by `capture_step`.

    Attributes:
        losses: `[2Q]`, or `[2Q, B]` by sample, of the last step. On CUDA the next step overwrites
            them: clone to keep.
        captured: whether it is a CUDA graph; on other devices it runs eagerly.
        graph: that one.
    """

    def __init__(
        self,
        zo: HeadOptimizer,
        loss: Callable[..., Tensor],
        inputs: tuple[Any, ...],
        targets: tuple[Any, ...],
        tail: torch.optim.Optimizer | None,
        source: str,
        warmup: int,
    ) -> None:
        assert isinstance(zo.model, ElasticZO)
        self.zo, self.model, self.tail = zo, zo.model, tail
        self.loss, self.source = loss, source
        _refuse(zo, tail)
        device = self.model.session.device
        self._inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
        self._targets = pytree.tree_map_only(Tensor, torch.clone, targets)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._tables: list[Table] = []
        log, zo.log = zo.log, None  # rehearsals are no steps
        try:
            with _put_back(zo, tail):
                self._rehearse(device, warmup)
            if device.type == "cuda":
                self._capture()
        finally:
            zo.log = log
        self._fixed = _fixed(zo, tail)

    @property
    def captured(self) -> bool:
        return self.graph is not None

    def __call__(self, inputs: Any, targets: Any) -> Tensor:
        """One step on this batch; `[2Q]` losses.

        Raises: ValueError for a batch of another shape or dtype than the captured one;
            RuntimeError where parameters or settings of an optimiser changed since the capture.
        """
        _fill(self._inputs, _as_tuple(inputs), "inputs")
        _fill(self._targets, _as_tuple(targets), "targets")
        if _fixed(self.zo, self.tail) != self._fixed:
            raise RuntimeError(
                "parameters moved, or a setting of an optimiser other than lr changed, since the "
                "step was captured: capture it again"
            )
        if self.graph is None:
            self.losses = self._step()
            return self.losses
        self.graph.replay()
        self._note()
        return self.losses

    def _step(self) -> Tensor:
        """What is captured."""
        if self.tail is not None:
            self.tail.zero_grad(set_to_none=True)
        outputs = self.model(*self._inputs)
        reduction = self.model.reduction
        losses = pair_losses(self.loss, outputs, *self._targets, reduction=reduction)
        self.model.backward(losses, self.source)
        feedback = self.model.estimator.feedback is not None
        if feedback:  # its second pass meets the tail that the first one met
            self.zo.step(losses)
        if self.tail is not None:
            self.tail.step()
        if not feedback:
            self.zo.step(losses)
        return losses.detach()

    def _rehearse(self, device: torch.device, warmup: int) -> None:
        """Real steps, undone by the caller: they verify the model, compile kernels, fill caches."""
        with noticing(device) as drew:
            if device.type != "cuda":
                self.losses = self._step()
            else:
                side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    for _ in range(max(warmup, 1)):
                        self.losses = self._step()
                torch.cuda.current_stream(device).wait_stream(side)
            draws = self.model.engine.mixes_generator or drew()
        if draws:
            names = ", ".join(_drawing_modules(self.model.module, self._inputs)) or "the model"
            raise RuntimeError(
                f"a captured step would repeat the same random numbers: {names} draws from torch's "
                "generator; use nn.Dropout (whose masks come from the counter), or run eagerly"
            )

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with hold_tables() as self._tables, torch.cuda.graph(graph):
            self.losses = self._step()
        self.graph = graph

    def _note(self) -> None:
        """What an eager step does on the host besides."""
        session, zo = self.model.session, self.zo
        session.stepped = True
        if session.pending is not None:
            session.pending.mark()
        for optimizer in (zo, self.tail):
            if optimizer is not None:
                optimizer._opt_called = True  # type: ignore[attr-defined]
        if zo.log is not None:
            zo.log.record(zo.entry(session.key[1] - 1, session.last_found, self.losses))


def capture_step(
    zo: HeadOptimizer,
    loss: Callable[..., Tensor],
    inputs: Any,
    targets: Any,
    *,
    tail: torch.optim.Optimizer | None = None,
    source: str = "mean",
    warmup: int = 3,
) -> CapturedStep:
    """Capture forward pair, losses, the tail's backward and both optimisers in one CUDA graph.

    On another device the same object runs the step eagerly, so that a script needs no branch.

    Args:
        zo: the optimiser of the head, its learning rates 0-d tensors on the device.
        loss: as for `pair_losses`.
        inputs, targets: a batch (a tensor, or a tuple of positional arguments); later ones must
            have its shapes and dtypes. Weights, state and noise are as before afterwards.
        tail: from `model.tail_optimizer`, its learning rates tensors, too; None for Full ZO.
        source: of the tail's gradient, as for `model.backward`.
        warmup: rehearsals before the capture.
    Raises: ValueError for a learning rate that is a Python number, or an optimiser that is read on
        the host; RuntimeError naming modules that draw from torch's generator.

    >>> from elasticzo import ZOSGD, ElasticZO, capture_step
    >>> model = ElasticZO(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), tail=0).train()
    >>> zo = ZOSGD(model, lr=torch.tensor(1e-3))
    >>> x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    >>> step = capture_step(zo, nn.functional.cross_entropy, x, y)
    >>> tuple(step(x, y).shape)
    (2,)
    """
    if not zo.model.training:
        raise RuntimeError("capture_step captures a training step: call model.train() first")
    batch = (_as_tuple(inputs), _as_tuple(targets))
    return CapturedStep(zo, loss, *batch, tail, source, warmup)


def _as_tuple(tree: Any) -> tuple[Any, ...]:
    return tree if isinstance(tree, tuple) else (tree,)


def _fill(static: tuple[Any, ...], given: tuple[Any, ...], what: str) -> None:
    """Copy a batch into the memory that the graph reads."""
    (mine, shape), (theirs, came) = pytree.tree_flatten(static), pytree.tree_flatten(given)
    if shape != came:
        raise ValueError(f"the step was captured for {what} of the form {shape}, got {came}")
    kinds = [
        [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else t for t in leaves]
        for leaves in (mine, theirs)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the step was captured for {what} {kinds[0]}, got {kinds[1]}")
    for to, t in zip(mine, theirs, strict=True):
        if isinstance(to, Tensor) and to is not t:
            to.copy_(t, non_blocking=True)


def _refuse(zo: HeadOptimizer, tail: torch.optim.Optimizer | None) -> None:
    """What a captured step cannot do."""
    device = zo.model.session.device
    if tail is None and zo.model.cut.tail_parameters:
        raise ValueError(
            "the model has a tail: give its optimiser, capture_step(..., tail=model.tail_optimizer("
            "...))"
        )
    if tail is not None:
        check_of(zo.model, tail)
    for who, optimizer in (("zo", zo), ("tail", tail)):
        for i, group in enumerate(optimizer.param_groups if optimizer is not None else []):
            lr = group["lr"]
            if not isinstance(lr, Tensor) or lr.dim() != 0 or lr.device != device:
                came = f"on {lr.device}" if isinstance(lr, Tensor) else f"the number {lr!r}"
                raise ValueError(
                    f"lr of group {i} of {who} must be a 0-d tensor on {device}, so that a "
                    f"schedule reaches the captured step; it is {came}"
                )
            if who == "tail" and device.type == "cuda" and not group.get("fused"):
                raise ValueError(
                    "the tail's optimiser must skip steps on the device: build it by model."
                    "tail_optimizer, of a class that has a fused form (SGD, Adam, AdamW, Adagrad)"
                )
            if "capturable" in group:
                group["capturable"] = True


def _fixed(zo: HeadOptimizer, tail: torch.optim.Optimizer | None) -> tuple[Any, ...]:
    """What a graph has for good: addresses of all that it reads or writes, and numbers."""
    optimizers = [optimizer for optimizer in (zo, tail) if optimizer is not None]
    settings = tuple(
        (name, value.data_ptr() if isinstance(value, Tensor) else value)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, value in group.items()
        if name not in NOTES
    )
    state = tuple(value.data_ptr() for value in _states(*optimizers))
    net = zo.model.get_submodule("module")
    where = tuple(t.data_ptr() for ts in (net.parameters(), net.buffers()) for t in ts)
    modes = tuple(
        (m.training, getattr(m, "p", None), getattr(m, "momentum", None))
        for m in zo.model.modules()
    )
    return settings, state, where, modes, zo.clip


def _states(*optimizers: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """Tensors that optimisers keep for parameters."""
    for optimizer in optimizers:
        for state in optimizer.state.values() if optimizer is not None else ():
            yield from (t for t in state.values() if isinstance(t, Tensor))


class _put_back:
    """Weights, buffers, optimisers and noise after the rehearsals as before them."""

    def __init__(self, zo: HeadOptimizer, tail: torch.optim.Optimizer | None) -> None:
        self.zo, self.tail = zo, tail
        self.net, self.session = zo.model.get_submodule("module"), zo.model.session

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.net.parameters()
        yield from (m._buffers[name] for m, name in all_buffers(self.net))  # type: ignore[misc]
        yield from _states(self.zo, self.tail)

    def __enter__(self) -> None:
        self.session.flush()
        self.before = [(t, t.detach().clone()) for t in self._tensors()]
        self.grads = [(p, p.grad) for p in self.net.parameters()]
        self.session.forget()
        self.stack = ExitStack()
        self.stack.enter_context(self.session.untouched())

    @torch.no_grad()
    def __exit__(self, *error: Any) -> None:
        session, known = self.session, {id(t): old for t, old in self.before}
        for t in self._tensors():
            # State that an optimiser made during the rehearsals began at zero.
            t.copy_(known[id(t)]) if id(t) in known else t.zero_()
        if session.pending is not None:
            session.pending.cancel(to_come=error[0] is None and session.device.type == "cuda")
        for p, grad in self.grads:
            p.grad = grad
        self.stack.close()


def _drawing_modules(model: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """The innermost modules whose forward moves torch's generator."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[str] = []
    open_: list[tuple[Tensor, int]] = []
    handles = []
    for name, module in model.named_modules():

        def enter(m: nn.Module, args: Any) -> None:
            open_.append((generator_state(device), len(found)))

        def leave(m: nn.Module, args: Any, output: Any, name: str = name) -> None:
            before, inner = open_.pop()
            if len(found) == inner and not torch.equal(before, generator_state(device)):
                found.append(f"{name or 'the model'} ({type(m).__name__})")

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
