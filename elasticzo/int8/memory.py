"""How much memory an integer training step will hold, before anything runs.

The same liveness model as `elasticzo.memory`. The room in which products work on the CPU (packed
weights, a padded image) is not counted: it shows below about 16 images of LeNet-5, whose
activations are smaller than a packed layer. A float loss is not counted either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elasticzo.int8.optimizer import Int8ZO
from elasticzo.int8.tail import Int8Tail
from elasticzo.int8.tensor import Int8Tensor
from elasticzo.int8.wrapper import ElasticZOInt8
from elasticzo.memory.liveness import StepMemory, shadow, values_absent, without_memory
from elasticzo.memory.tracker import Peak, Tracker, tracked


def int8_training_memory(
    model: ElasticZOInt8, inputs: Int8Tensor, source: str = "plus"
) -> StepMemory:
    """Peak bytes of an integer training step: forward, losses, backward, both updates.

    Args:
        model: with its cut and pairing; it stays as it is.
        inputs: one batch; its values play no part.
        source: halves that the tail learns from.
    """
    if not isinstance(model, ElasticZOInt8):
        raise TypeError(f"model must be an ElasticZOInt8, got {type(model).__name__}")
    device = model.session.device
    with tracked(device) as (tracker, fake), values_absent():
        twin = shadow(model, fake, device).train()
        twin.forget_forwards()
        x = _held(twin, tracker, Int8Tensor(*without_memory(_parts(inputs), fake, device)))
        y = torch.zeros(len(x.q), dtype=torch.int64, device=device)
        tracker.note(y, "inputs")
        zo, tail = Int8ZO(twin, b_zo=1), twin.tail_optimizer(b_bp=4)
        peaks = [_step(twin, zo, tail, tracker, x, y, source) for _ in range(2)]
    return StepMemory(*peaks)


def _step(
    twin: ElasticZOInt8,
    zo: Int8ZO,
    tail: Int8Tail,
    tracker: Tracker,
    x: Int8Tensor,
    y: Tensor,
    source: str,
) -> Peak:
    """One step as a training loop does it; its peak."""
    tracker.restart()
    logits = twin(x)
    losses = twin.losses(logits, y)
    twin.backward(logits, y, source)
    tracker.note(twin.gradients, "gradients")
    tail.step()
    zo.step(losses)
    return tracker.restart()


def int8_inference_memory(model: ElasticZOInt8, inputs: Int8Tensor) -> Peak:
    """Peak bytes of one plain pass in `eval()`."""
    device = model.session.device
    with tracked(device) as (tracker, fake), values_absent():
        twin = shadow(model, fake, device).eval()
        twin.forget_forwards()
        x = _held(twin, tracker, Int8Tensor(*without_memory(_parts(inputs), fake, device)))
        tracker.restart()
        twin(x)
        return tracker.restart()


def _parts(x: Int8Tensor) -> tuple[Tensor, Tensor]:
    return x.q, x.exponent


def _held(twin: ElasticZOInt8, tracker: Tracker, x: Int8Tensor) -> Int8Tensor:
    tracker.note((list(twin.parameters()), list(twin.buffers())), "weights")
    tracker.note(_parts(x), "inputs")
    return x
