"""The paper's static memory model (our reading): every buffer is held all the time.

With P parameters, A activations a sample (outputs of convolutions, linear layers, ReLUs, pools and
normalisations; neither input nor flatten), Acc int32 accumulators a sample (outputs of convolutions
and linear layers), a batch of B, and of the layers that backpropagation trains P_BP parameters and
O_BP outputs a sample, in bytes:

    Full ZO       4 (P + A B)
    ElasticZO     4 (P + A B) + 4 (P_BP + O_BP B)
    Full BP       8 (P + A B)
    INT8 Full ZO  P + A B + 4 Acc B

What the training step really holds is `elasticzo.memory`'s: it lets go of what nobody needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elasticzo.cut import COUNTED, Tail, resolve_cut
from elasticzo.memory.liveness import shadow, without_memory
from elasticzo.memory.tracker import tracked

aten = torch.ops.aten
WRITES = frozenset({
    aten.convolution.default, aten.addmm.default, aten.mm.default, aten.relu.default,
    aten.relu_.default, aten.max_pool2d_with_indices.default, aten.avg_pool2d.default,
    aten.amax.default, aten.adaptive_max_pool2d.default, aten._adaptive_avg_pool2d.default,
    aten.native_batch_norm.default, aten.native_layer_norm.default,
})  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Numbers, not bytes.

    Attributes:
        parameters: P, by name.
        activations: A, of one sample.
        outputs: of one sample, of each convolution and linear layer by name; their sum is Acc.
    """

    parameters: Mapping[str, int]
    activations: int
    outputs: Mapping[str, int]


class _Outputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the outputs of the ops that write an activation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in WRITES:
            first: Tensor = result[0] if isinstance(result, tuple) else result
            self.total += first.numel()
        return result


def sizes(net: nn.Module, example: Tensor) -> Sizes:
    """Count on one sample like those of `example`; nothing is computed."""
    outputs: dict[str, int] = {}
    device = torch.device("cpu")
    with tracked(device) as (_, fake), torch.no_grad():
        twin = shadow(net, fake, device).eval()
        for name, module in twin.named_modules():
            if isinstance(module, COUNTED):

                def note(m: nn.Module, args: Any, output: Tensor, *, name: str = name) -> None:
                    outputs[name] = output.numel()

                module.register_forward_hook(note)
        with _Outputs() as found:
            twin(without_memory(example[:1], fake, device))
    parameters = {name: p.numel() for name, p in net.named_parameters()}
    return Sizes(parameters, found.total, outputs)


def static_bytes(
    net: nn.Module, example: Tensor, tail: Tail, precision: str = "fp32", of: Sizes | None = None
) -> int | None:
    """Bytes of a method on a batch like `example`; None where the model says nothing.

    Args:
        tail: what backpropagation trains, as `ElasticZO` takes it: 0 is Full ZO, "all" is Full BP.
        precision: "fp32" or "int8" (Full ZO alone).
        of: the sizes, where they were counted before.
    """
    found, batch = of or sizes(net, example), len(example)
    cut = resolve_cut(net, tail)
    weights, activations = sum(found.parameters.values()), found.activations * batch
    if precision == "int8":
        accumulators = 4 * sum(found.outputs.values()) * batch
        return None if cut.tail_parameters else weights + activations + accumulators
    if cut.everything:
        return 8 * (weights + activations)
    tail_weights = sum(found.parameters[name] for name in cut.tail_parameters)
    tail_outputs = sum(n for name, n in found.outputs.items() if name in cut.tail_modules)
    return 4 * (weights + activations) + 4 * (tail_weights + batch * tail_outputs)
