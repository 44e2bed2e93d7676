"""`ElasticZOInt8`: a network in integers, its head perturbed, its tail open to backpropagation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.cut import Tail, resolve_cut, warn_of_empty_head
from elasticzo.head import Head, HeadParameter, Slot, resolve_scale
from elasticzo.int8.backward import aligned_sum, half_gradients
from elasticzo.int8.estimator import Sparse, signs
from elasticzo.int8.network import Int8Network
from elasticzo.int8.optimizer import replayer
from elasticzo.int8.passes import Forward, Noise, Tape
from elasticzo.int8.settings import (
    check_order,
    check_perturbation,
    check_settings,
    check_state,
    check_tail,
    check_trained,
)
from elasticzo.int8.tail import Int8Tail
from elasticzo.int8.tensor import Int8Tensor, check_input
from elasticzo.module import ZOModule
from elasticzo.ownership import check_free
from elasticzo.session import Session
from zo_kernels import integer_cross_entropy, integer_softmax_error
from zo_kernels.int8 import check_logits, check_target

SOURCES = ("plus", "minus", "mean")


class ElasticZOInt8(ZOModule):
    """Train the first layers by zeroth-order optimisation and the last by backpropagation, in
    integers.

    In `train()` a forward runs the network at `clip(w + z_q)` and `clip(w - z_q)` for every query
    and returns an `Int8Tensor` `[2Q, B, C]` whose halves have their own exponents; in `eval()` it
    is the network itself, `[B, C]`. A step uses the sign of L+ - L-. See `Int8ZO`.

    Args:
        model: a float model, converted once on the CPU (see `Int8Network`); it is only read.
            Weights frozen before stay frozen: neither perturbed nor updated.
        tail: what backpropagation trains: module names, the number of last Linear / Conv layers, 0
            (Full ZO) or "all" (integer backpropagation everywhere, one pass).
        r_max: largest perturbation of an int8 weight, in [1, 127].
        p_zero: share in [0, 1) of the weights that a step leaves alone.
        queries: directions a step, Q.
        seed: of the run, in [0, 2^63).
        fraction_bits: F of the integer loss, in [0, 16].
        loss: "integer", or "float": float64, for comparison; a step uses its sign alone, too.
        backend: "auto", "triton", "numba" or "reference".
        pairing: "stacked" (the halves as one batch) or "sequential" (one after the other); equal.
        scale: {name pattern of weights: s}: the share of weights perturbed, `1 - p_zero`, is s
            times that in these layers (at most 1); 0 leaves a layer alone. The last match wins.
        drop_biases: convert a model with biases that are not zero, without them; warns of those
            that are not small (see `Int8Network`).
    Shapes: `[B, ...]` samples of one exponent.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8); NITI (arXiv:2009.13108).
    """

    integer = True

    def __init__(
        self,
        model: nn.Module,
        tail: Tail,
        r_max: int = 15,
        p_zero: float = 0.5,
        queries: int = 1,
        seed: int = 0,
        fraction_bits: int = 12,
        loss: str = "integer",
        backend: str = "auto",
        pairing: str = "stacked",
        scale: Mapping[str, float] | None = None,
        drop_biases: bool = False,
    ) -> None:
        super().__init__()
        check_settings(queries, seed, fraction_bits, loss, backend, pairing)
        check_perturbation(r_max, p_zero)
        if isinstance(model, nn.Module):
            check_free(model)
        self.network = Int8Network(model, drop_biases)
        self.cut = resolve_cut(model, tail)
        check_tail(self.cut, self.network.layers)
        self.estimator = signs(r_max, p_zero, queries, backend)
        self.fraction_bits, self.loss, self.pairing = fraction_bits, loss, pairing
        names = [f"{name}.weight" if name else "weight" for name in self.network.layers]
        self._of = dict(zip(names, self.network.layers, strict=True))
        head = [name for name in names if name in self.cut.head_parameters]
        tail = [name for name in names if name in self.cut.tail_parameters]
        warn_of_empty_head(head, self.cut)
        check_trained(self.cut, tail)
        check_order(names, head, tail)
        self.head = self._weights(resolve_scale(head, scale))
        self.trained = self._weights(dict.fromkeys(tail, 1.0))
        self.wanted_backend = backend
        self.session = Session(seed, None, torch.device("cpu"))
        self._tapes: list[Tape] = []
        self._output: Tensor | None = None  # logits that the tapes belong to
        self._gradients: dict[str, Tensor] = {}
        # The layers are children under their own names, so states are those of any module, also of
        # one around this. An attribute goes before a child of its name: layers may have any.
        self._modules = self.network.tree._modules
        self.to(next(model.parameters()).device)

    def _weights(self, scales: Mapping[str, float]) -> Head:
        """Weights by name, each with its scale."""
        layers = {name: self.network.layers[self._of[name]] for name in scales}
        found = [HeadParameter(name, layers[name].tensor, s) for name, s in scales.items()]
        return Head(found, {name: Slot(name, layer, "weight") for name, layer in layers.items()})

    # ---- what it is

    @property
    def direction(self) -> Sparse:
        assert isinstance(self.estimator.direction, Sparse)
        return self.estimator.direction

    @property
    def r_max(self) -> int:
        return self.direction.r_max

    @property
    def p_zero(self) -> float:
        return self.direction.p_zero

    def set_noise(self, r_max: int | None = None, p_zero: float | None = None) -> None:
        """Change the perturbation between two steps: schedules do it.

        Raises: RuntimeError between a forward and its step, which must see the same `z`;
            ValueError for values out of range.
        """
        r_max = self.r_max if r_max is None else r_max
        p_zero = self.p_zero if p_zero is None else p_zero
        check_perturbation(r_max, p_zero)
        if (r_max, p_zero) != (self.r_max, self.p_zero):
            self.set_direction(Sparse(r_max, p_zero))

    def noise_of(self, name: str) -> Noise:
        """The perturbation of a head parameter, its scale included."""
        return Noise(self.direction.zeros(self.head.parameters[name]), self.r_max)

    def fixed(self) -> dict[str, Any]:
        return {"loss": self.loss, "fraction_bits": self.fraction_bits}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """What `backward` left for the tail's update, by name."""
        return self._gradients

    @property
    def effective_pairing(self) -> str:
        return self.pairing

    def named_tail_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """int8 weights that backpropagation trains."""
        return self.trained.named()

    def extra_repr(self) -> str:
        head = sum(w.numel() for w in self.head_parameters())
        tail = sum(w.numel() for w in self.tail_parameters())
        return (
            f"head={head} weights (ZO), tail={tail} (BP), r_max={self.r_max}, "
            f"p_zero={self.p_zero:g}, queries={self.queries}, loss={self.loss}, "
            f"pairing={self.pairing}, backend={self.backend}"
        )

    # ---- the forward

    def forward(self, x: Int8Tensor) -> Int8Tensor:
        """`train()`: `[2Q, B, C]` with exponents `[2Q]`; `eval()`: `[B, C]` and `[]`."""
        check_input(x, self.session.device)
        if not self.training:
            out = Forward(self.network, None, 0, 1, {}, frozenset(), self.backend).run(x)
            return Int8Tensor(out.q, out.exponent.reshape(()))
        noise = {
            self._of[head.name]: self.noise_of(head.name)
            for head in self.head.parameters.values()
            if head.scale
        }
        key = None if self.cut.everything else self.session.key
        keep = frozenset(block.name for block in self._tail_blocks())
        step = 1 if self.pairing == "sequential" else self.halves
        outputs, self._tapes = [], []
        for start in range(0, self.halves, step):
            run = Forward(self.network, key, start, start + step, noise, keep, self.backend)
            outputs.append(run.run(x))
            self._tapes.append(run.tape)
        q = torch.cat([out.q for out in outputs]) if len(outputs) > 1 else outputs[0].q
        exponent = torch.cat([out.exponent for out in outputs])
        self._output = q.view(self.halves, -1, *q.shape[1:])
        self.session.note_forward()
        return Int8Tensor(self._output, exponent)

    def _tail_blocks(self) -> list[Any]:
        """Blocks from the first one that backpropagation trains on."""
        blocks = self.network.blocks
        trained = {self._of[name] for name in self.trained.parameters}
        places = [i for i, block in enumerate(blocks) if block.name in trained]
        return blocks[places[0] :] if places else []

    # ---- losses and the tail

    def losses(self, logits: Int8Tensor, y: Tensor) -> Tensor:
        """Cross-entropy summed over the batch: `[2Q]` int64 in bits of 2^-F, or float64 in nats."""
        if self.loss == "integer":
            return integer_cross_entropy(
                logits.q, logits.exponent, y, fraction_bits=self.fraction_bits, backend=self.backend
            )
        check_logits(logits.q, logits.exponent, y, self.fraction_bits)
        if y.device.type == "cpu":
            check_target(y, logits.q.shape[2])
        values = logits.dequantize().log_softmax(2)
        label = y.reshape(1, -1, 1).expand(values.shape[0], -1, 1)
        return -values.gather(2, label).sum((1, 2))

    def backward(self, logits: Int8Tensor, y: Tensor, source: str = "plus") -> None:
        """Integer backpropagation into the tail, from the last training forward.

        Args:
            logits: what that forward returned.
            y: `[B]` int64 labels.
            source: halves that the tail learns from: "plus", "minus", or "mean" of both. More than
                one half are summed at one exponent (`aligned_sum`).
        """
        if source not in SOURCES:
            raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
        if self._output is None or logits.q is not self._output:
            raise ValueError("logits must be those of the last training forward")
        if self.gradients:
            raise RuntimeError("backward was called before: one forward and backward a step")
        blocks = self._tail_blocks()
        if not blocks:
            return
        error, exponent = integer_softmax_error(
            logits.q,
            logits.exponent,
            y,
            fraction_bits=self.fraction_bits,
            key=self.session.key,
            tensor=len(self.network.blocks),
            backend=self.backend,
        )
        first, stride = {"plus": (0, 2), "minus": (1, 2), "mean": (0, 1)}[source]
        trained = frozenset(self._of[name] for name in self.trained.parameters)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for half in range(first if self.halves > 1 else 0, self.halves, stride):
            tape = next(t for t in reversed(self._tapes) if t.first <= half)
            place = half - tape.first if tape.count > 1 else 0
            own = Int8Tensor(error[half], exponent[half])
            found = half_gradients(blocks, tape.kept, trained, own, place, tape.count, self.backend)
            for name, sums in found.items():
                parts.setdefault(name, []).extend(sums)
        for name in self.trained.parameters:
            self.gradients[name] = aligned_sum(parts[self._of[name]])

    def tail_optimizer(self, b_bp: int, rounding: str = "pseudo") -> Int8Tail:
        """The tail's update, `w = clip(w - R(G, bits(G) - b_bp))`."""
        return Int8Tail(self, b_bp, rounding)

    def replayer(self, header: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
        return replayer(self, header)

    def forget_forwards(self) -> None:
        """What was kept of a forward is not needed any more, or belongs to other weights."""
        super().forget_forwards()
        self._drop()

    def end_step(self, found: Tensor | None) -> None:
        super().end_step(found)
        self._drop()

    def _drop(self) -> None:
        self._tapes, self._output, self._gradients = [], None, {}

    # ---- nn.Module

    def get_submodule(self, target: str) -> nn.Module:
        """A layer by its name, which may be that of an attribute (`head`, say)."""
        return self.network.tree.get_submodule(target) if target else self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """torch calls this before it loads the layers, also from a state of a module around."""
        check_state(state_dict, self.state_dict(prefix=prefix))
        self.forget_forwards()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def moved(self, device: torch.device) -> None:
        super().moved(device)
        self.forget_forwards()
