"""How much memory a training step will hold, before anything runs.

The liveness model: the step itself runs on a copy of the model that has shapes and no memory, and
every storage counts from its birth to its last use. So weights, the halves `W+` and `W-` while they
are staged, activations that are alive, what autograd saves for the tail, gradients and temporaries
count because the code holds them; the optimiser's state by the number of its tensors.

Not counted: what torch's allocator does not see (CUDA's context, cuBLAS's and cuDNN's workspaces,
fragments), what cuDNN's recurrent layers keep for their backward, copies of the generator's state
(5 KB each on the CPU), temporaries of an optimiser that
is not fused, and of noise that is not made by a kernel (the reference backend; on the CPU weights
that are not float32).

Counted too much: torch adds in place, and to tensors without memory beside them, where gradients of
a branch meet, and where a bias follows a product over three dimensions (as in a GRU).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from elasticzo.forward.trees import Unbatched, unbatched
from elasticzo.losses import pair_losses
from elasticzo.memory.tracker import Peak, Tracker, tracked
from elasticzo.module import ZOModule
from elasticzo.optim import OPTIMIZERS, HeadOptimizer
from elasticzo.settings import check_state_tensors

STATE_TENSORS = 2  # a parameter of the tail: Adam's moments; momentum has 1, plain SGD 0
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class StepMemory:
    """Peaks of a training step.

    Attributes:
        first: of the first step, whose forward checks that every head parameter is perturbed.
        steady: of every later one.
    """

    first: Peak
    steady: Peak

    @property
    def peak(self) -> Peak:
        """The larger of the two: what a run needs."""
        return max(self.first, self.steady, key=lambda p: p.bytes)


def training_memory(
    model: ZOModule,
    inputs: Any,
    loss: Loss | None = None,
    targets: Any = (),
    state_tensors: int = STATE_TENSORS,
    device: torch.device | str | None = None,
    rule: str = "sgd",
) -> StepMemory:
    """Peak bytes of a training step of a wrapped model: forward, losses, backward, both updates.

    Nothing is computed and the model stays as it is; what is held afterwards is nothing. On the CPU
    convolutions and LSTMs run by themselves on a few samples, to see what they hold.

    Args:
        model: with its cut, pairing and path.
        inputs: one batch as the model takes it, or a tuple of inputs. Values play no part: tensors
            of the meta device or expanded ones will do.
        loss: as `pair_losses` takes it; None is the cross-entropy of an output `[B, C]`, and the
            mean of any other.
        targets: of the loss, or a tuple of them.
        state_tensors: tensors of the tail's optimiser for each of its parameters.
        device: where it is to run; None is where the model is. A model on the meta device, or on
            the CPU, can be planned for any device that this machine has.
        rule: of the head's optimiser, one of `elasticzo.optim.OPTIMIZERS`: "momentum" keeps one
            tensor a weight, "adam" two.
    Raises: ValueError where a forward depends on values; what the model's own forward raises.

    >>> from elasticzo import ElasticZO
    >>> from elasticzo.models import LeNet5
    >>> model = ElasticZO(LeNet5(), tail=1)
    >>> training_memory(model, torch.zeros(32, 1, 28, 28)).peak.parts["weights"] // 4
    107786
    """
    if not isinstance(model, ZOModule) or model.integer:
        raise TypeError(f"model must be an ElasticZO, got {type(model).__name__}")
    check_state_tensors(state_tensors)
    with tracked(check_device(device or model.session.device)) as (tracker, fake):
        twin = shadow(model, fake, tracker.device).train()
        twin.moved(tracker.device)
        twin.forget_forwards()
        return step_memory(twin, tracker, fake, inputs, loss, targets, state_tensors, rule)


def step_memory(
    twin: ZOModule,
    tracker: Tracker,
    fake: FakeTensorMode,
    inputs: Any,
    loss: Loss | None,
    targets: Any,
    state_tensors: int,
    rule: str = "sgd",
) -> StepMemory:
    """Two steps of a wrapped model without memory."""
    tracker.note((list(twin.parameters()), list(twin.buffers())), "weights")
    tracker.note(list(twin.session.tensors()))
    given, wanted = (
        without_memory(as_tuple(tree), fake, tracker.device) for tree in (inputs, targets)
    )
    tail = list(twin.tail_parameters())
    hooked: list[Any] = list(tail)
    for p in hooked:
        p.register_post_accumulate_grad_hook(lambda p: tracker.note(p.grad, "gradients"))
    tracker.note(([_plain(x) for x in pytree.tree_leaves(given)], wanted), "inputs")
    states = [torch.zeros_like(p) for p in tail for _ in range(state_tensors)]
    tracker.note(states, "optimizer")
    momentum = {"momentum": 0.5} if rule == "momentum" else {}
    zo = OPTIMIZERS[rule](twin, lr=0.0, **momentum)
    kept = [zo.state_of(p) for p in twin.head_parameters()]
    tracker.note(kept, "optimizer")
    peaks = []
    with values_absent():
        for _ in range(2):
            peaks.append(_step(twin, zo, tail, tracker, given, loss, wanted))
    return StepMemory(*peaks)


def _step(
    twin: ZOModule,
    zo: HeadOptimizer,
    tail: list[nn.Parameter],
    tracker: Tracker,
    inputs: tuple[Any, ...],
    loss: Loss | None,
    targets: tuple[Any, ...],
) -> Peak:
    """One step as a training loop does it; its peak."""
    tracker.restart()
    outputs = twin(*inputs)
    if loss is None:
        loss, targets = _likely_loss(outputs)
        tracker.note(targets, "inputs")
    losses = pair_losses(loss, outputs, *targets, reduction=twin.reduction)
    twin.backward(losses)  # type: ignore[operator]
    for p in tail:
        p.grad = None
    zo.step(losses)
    tracker.note(list(twin.session.learnt.values()), "optimizer")  # from the first step on
    return tracker.restart()


def inference_memory(
    model: nn.Module, inputs: Any, device: torch.device | str | None = None
) -> Peak:
    """Peak bytes of one plain pass in `eval()` without gradients.

    Args:
        model: any module; of an `ElasticZO` the wrapped one.
        inputs, device: as of `training_memory`.
    Raises: ValueError where the forward depends on values.
    """
    net = model.get_submodule("module") if isinstance(model, ZOModule) else model
    there = next((t.device for t in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    with tracked(check_device(device or there)) as (tracker, fake):
        twin = shadow(net, fake, tracker.device).eval()
        given = without_memory(as_tuple(inputs), fake, tracker.device)
        tracker.note((list(twin.parameters()), list(twin.buffers())), "weights")
        plain = pytree.tree_map(_plain, given)
        tracker.note(plain, "inputs")
        tracker.restart()
        with torch.no_grad(), values_absent():
            twin(*plain)
        return tracker.restart()


# ---- without memory


class _Bare(TorchFunctionMode):
    """Copies of tensors have their shape and strides, and no memory."""

    def __init__(self, fake: FakeTensorMode, device: torch.device) -> None:
        super().__init__()
        self.fake, self.device = fake, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.clone:  # of a parameter
            return _bare(args[0], self.fake, self.device)
        if func is Tensor.__deepcopy__:
            t, memo = args
            if id(t) not in memo:
                memo[id(t)] = _bare(t, self.fake, self.device)
            return memo[id(t)]
        return func(*args, **(kwargs or {}))


def _bare(t: Tensor, fake: FakeTensorMode, device: torch.device) -> Tensor:
    described = fake.from_tensor(t.detach(), static_shapes=True)
    there = torch.empty_like(described, device=device)
    return there.requires_grad_(t.requires_grad)


def shadow(model: Any, fake: FakeTensorMode, device: torch.device) -> Any:
    """A copy of a module, or of anything that can be copied, whose tensors have no memory."""
    with _Bare(fake, device):
        return copy.deepcopy(model)


def without_memory(tree: Any, fake: FakeTensorMode, device: torch.device) -> Any:
    """Inputs of the same shapes that have no memory, and would be dense."""

    def bare(x: Any) -> Any:
        if isinstance(x, Unbatched):
            return unbatched(bare(x.tensor))
        return _bare(x, fake, device) if isinstance(x, Tensor) else x

    return pytree.tree_map(bare, tree)


def _plain(x: Any) -> Any:
    return x.tensor if isinstance(x, Unbatched) else x


def as_tuple(tree: Any) -> tuple[Any, ...]:
    return tree if isinstance(tree, tuple) else (tree,)


@contextmanager
def values_absent() -> Iterator[None]:
    """Says what is meant where a forward asks a tensor without memory for its value.

    What a model is warned of it is warned of when it runs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            "the memory of this model cannot be predicted: its forward depends on values of "
            f"tensors ({error.func})"
        ) from error


def _likely_loss(outputs: Any) -> tuple[Loss, tuple[Tensor, ...]]:
    """Cross-entropy for logits `[halves, B, C]`, the mean for anything else; and targets."""
    if isinstance(outputs, Tensor) and outputs.dim() == 3:
        labels = torch.zeros(outputs.shape[1], dtype=torch.int64, device=outputs.device)
        return F.cross_entropy, (labels,)
    return _mean, ()


def _mean(output: Any) -> Tensor:
    leaves = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    return torch.stack([x.float().mean() for x in leaves if x.is_floating_point()]).mean()


def check_device(device: torch.device | str) -> torch.device:
    """The device that a prediction is for.

    Raises: ValueError for the meta device, on which nothing runs, or one that is not there.
    """
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("the model is on the meta device: device must say where it is to run")
    if device.type != "cuda":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0)
