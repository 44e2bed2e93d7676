"""`Int8ZO`: the zeroth-order step in integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elasticzo.int8.settings import check_perturbation, check_signs
from elasticzo.int8.wrapper import ElasticZOInt8
from elasticzo.settings import check_draws, check_integer, check_long, check_saved
from zo_kernels import int8_update_, integer_projected_sign
from zo_kernels.int8 import ROUNDINGS

if TYPE_CHECKING:
    from elasticzo.int8.trajectory import Int8TrajectoryLog

MAX_BITS = 31


class Int8ZO:
    """`w = clip(w - shift(sum_q sign(L+_q - L-_q) z_q))` on the head.

    The shift is `max(0, bits(Q r_max) - b_zo)` to the right, a constant while the settings stay.

    Args:
        model: whose head it trains.
        b_zo: bits of an update, in [0, 31]; they play the learning rate. May change between steps.
        rounding: of the shift: "nearest", "pseudo" or "stochastic".
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """

    def __init__(self, model: ElasticZOInt8, b_zo: int, rounding: str = "nearest") -> None:
        if not isinstance(model, ElasticZOInt8):
            raise TypeError(f"model must be an ElasticZOInt8, got {type(model).__name__}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {tuple(ROUNDINGS)}, got {rounding!r}")
        self.model = model
        self.rounding = rounding
        self.b_zo = b_zo
        self.signs = torch.zeros(model.queries, dtype=torch.int32, device=model._key.device)
        self._log: Int8TrajectoryLog | None = None

    @property
    def b_zo(self) -> int:
        return self._b_zo

    @b_zo.setter
    def b_zo(self, value: int) -> None:
        check_integer("b_zo", value, 0, MAX_BITS)
        self._b_zo = value

    def step(self, losses: Tensor) -> None:
        """Update the head from the losses of the halves, and go on to the next `z`.

        Args:
            losses: `[2Q]`, int64 or floating; a loss that is not a number counts as no direction.
        Raises: RuntimeError without a training forward since the last step.
        """
        model = self.model
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses must be a Tensor, got {type(losses).__name__}")
        if list(losses.shape) != [model.halves]:
            raise ValueError(f"losses must have shape [{model.halves}], got {list(losses.shape)}")
        if model._forwards == 0:
            raise RuntimeError(
                "zo.step without a training forward since the last step: call model(x) in train() "
                "first"
            )
        if not model.cut.everything:
            self.signs = _signs(losses.detach(), model.backend)
            apply_signs(model, model._key, self.signs, self._b_zo, self.rounding)
        if self._log is not None:
            self._log.record(model._key[1], self.signs)
        model._key.add_(model._next)
        model.forget_forwards()

    def attach(self, log: Int8TrajectoryLog | None) -> None:
        """Write every step from now on to a trajectory log (None detaches)."""
        self._log = log

    def _settings(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        model = self.model
        return {
            "queries": model.queries,
            "rounding": self.rounding,
            "scale": dict(model._scale),
            "loss": model.loss,
            "fraction_bits": model.fraction_bits,
        }

    def state_dict(self) -> dict[str, Any]:
        """Seed, step, and the settings of the next step."""
        model = self.model
        return {
            "seed": model.seed,
            "step": model.step_index,
            "b_zo": self._b_zo,
            "r_max": model.r_max,
            "p_zero": model.p_zero,
            "signs": self.signs.clone(),
            **self._settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run: the noise goes on where it stood.

        Raises: ValueError where an entry is missing, unknown or out of range, or where the settings
            of the saved run are others; nothing is loaded then.
        """
        model = self.model
        check_saved("Int8ZO", state_dict, self.state_dict(), self._settings())
        check_draws(model.queries, state_dict["seed"])
        check_long("step", state_dict["step"])
        check_integer("b_zo", state_dict["b_zo"], 0, MAX_BITS)
        check_perturbation(state_dict["r_max"], state_dict["p_zero"])
        check_signs(state_dict["signs"], model.queries)
        model.go_to(state_dict["seed"], state_dict["step"])
        model.set_noise(state_dict["r_max"], state_dict["p_zero"])
        self.b_zo = state_dict["b_zo"]
        self.signs = state_dict["signs"].to(model._key.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_log": None}  # a copy writes no log


def _signs(losses: Tensor, backend: str) -> Tensor:
    if not losses.is_floating_point():
        return integer_projected_sign(losses.to(torch.int64), backend=backend)
    plus, minus = losses[0::2], losses[1::2]
    return (plus > minus).to(torch.int32) - (plus < minus).to(torch.int32)


def apply_signs(model: ElasticZOInt8, key: Tensor, signs: Tensor, b_zo: int, rounding: str) -> None:
    """The update of the head; layers of one perturbation in one launch."""
    groups: dict[float, list[str]] = {}
    for name, _ in model.named_head_parameters():
        if model._scale[name]:
            groups.setdefault(model.noise_of(name).p_zero, []).append(name)
    for p_zero, names in groups.items():
        layers = [model._layer(name) for name in names]
        int8_update_(
            [layer.weight for layer in layers],
            key,
            signs,
            tensors=[layer.tensor for layer in layers],
            p_zero=p_zero,
            r_max=model.r_max,
            b_zo=b_zo,
            rounding=rounding,
            backend=model.backend,
        )


__all__ = ["Int8ZO", "apply_signs"]
