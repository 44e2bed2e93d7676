"""`Int8ZO`: the zeroth-order step in integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from elasticzo.int8.estimator import Sparse
from elasticzo.int8.settings import check_perturbation, check_signs
from elasticzo.module import ZOModule
from elasticzo.optim.header import check_head, describe_head, first_weights
from elasticzo.optim.step import Log, Step
from elasticzo.settings import check_integer, check_long, check_saved
from zo_kernels import int8_update_
from zo_kernels.int8 import ROUNDINGS

FORMAT = "elasticzo-int8-trajectory-2"
MAX_BITS = 31


class Int8ZO(Step):
    """`w = clip(w - shift(sum_q sign(L+_q - L-_q) z_q))` on the head.

    The shift is `max(0, bits(Q r_max) - b_zo)` to the right, a constant while the settings stay.

    Args:
        model: whose head it trains.
        b_zo: bits of an update, in [0, 31]; they play the learning rate. May change between steps.
        rounding: of the shift: "nearest", "pseudo" or "stochastic".
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """

    def __init__(self, model: ZOModule, b_zo: int, rounding: str = "nearest") -> None:
        if not isinstance(model, ZOModule) or not model.integer:
            raise TypeError(f"model must be an ElasticZOInt8, got {type(model).__name__}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {tuple(ROUNDINGS)}, got {rounding!r}")
        self.model, self.rounding, self.b_zo = model, rounding, b_zo
        device = model.session.device
        self.projected_gradient = torch.zeros(model.queries, dtype=torch.int32, device=device)
        self.log: Log | None = None

    @property
    def signs(self) -> Tensor:
        """`[Q]` int32, of the last step: what a gradient is here."""
        return self.projected_gradient

    @property
    def b_zo(self) -> int:
        return self._b_zo

    @b_zo.setter
    def b_zo(self, value: int) -> None:
        check_integer("b_zo", value, 0, MAX_BITS)
        self._b_zo = value

    def _take(self, losses: Any) -> Tensor:
        """int64 or floating; a loss that is not a number counts as no direction."""
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses must be a Tensor, got {type(losses).__name__}")
        if losses.is_complex():
            raise TypeError(f"losses must be integers or floating, got {losses.dtype}")
        halves = self.model.halves
        if list(losses.shape) != [halves]:
            raise ValueError(f"losses must have shape [{halves}], got {list(losses.shape)}")
        return losses.detach()

    def _not_finite(self, losses: Tensor, a: Tensor | None = None) -> None:
        """Integers are finite, and of a float that is none the sign is 0."""

    def _update(self, a: Tensor, found: Any) -> None:
        self.update_by(a)

    def update_by(self, signs: Tensor) -> None:
        """Move the weights by the signs `[Q]`; layers of one perturbation in one launch."""
        model, direction = self.model, self.model.estimator.direction
        assert isinstance(direction, Sparse)
        for p_zero, members in direction.alike(model.head):
            int8_update_(
                [w for _, w in members],
                model.session.key,
                signs,
                tensors=[head.index for head, _ in members],
                p_zero=p_zero,
                r_max=direction.r_max,
                b_zo=self._b_zo,
                rounding=self.rounding,
                backend=model.backend,
            )

    # ---- the log

    def header(self) -> dict[str, Any]:
        model, slots = self.model, self.model.head.slots
        return {
            "format": FORMAT,
            "seed": model.seed,
            "start": model.step_index,
            "queries": model.queries,
            "rounding": self.rounding,
            "head": describe_head(model.head),
            "first_weights": first_weights(model.head),
            "exponents": {s.name: int(s.module.get_buffer("exponent")) for s in slots},
        }

    def fields(self) -> dict[str, type]:
        return {"step": int, "signs": int}

    def entry(self, step: Tensor, found: Any, losses: Tensor) -> dict[str, Any]:
        return {"step": step, "signs": self.signs, **self._noise(), "b_zo": self._b_zo}

    def _noise(self) -> dict[str, Any]:
        direction = self.model.estimator.direction
        assert isinstance(direction, Sparse)
        return {"r_max": direction.r_max, "p_zero": direction.p_zero}

    # ---- state

    def _settings(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        model = self.model
        return {
            "queries": model.queries,
            "rounding": self.rounding,
            "scale": {name: head.scale for name, head in model.head.parameters.items()},
            **model.fixed(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Seed, step, and the settings of the next step."""
        model = self.model
        return {
            "seed": model.seed,
            "step": model.step_index,
            "b_zo": self._b_zo,
            **self._noise(),
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
        check_long("seed", state_dict["seed"])
        check_long("step", state_dict["step"])
        check_integer("b_zo", state_dict["b_zo"], 0, MAX_BITS)
        check_perturbation(state_dict["r_max"], state_dict["p_zero"])
        check_signs(state_dict["signs"], model.queries)
        model.go_to(state_dict["seed"], state_dict["step"])
        model.set_direction(Sparse(state_dict["r_max"], state_dict["p_zero"]))
        self.b_zo = state_dict["b_zo"]
        self.projected_gradient = state_dict["signs"].to(model.session.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "log": None}  # a copy writes no log


def replayer(model: ZOModule, header: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """What makes a step of a log again, from its record.

    Raises: ValueError where the log is not of this model.
    """
    if header["format"] != FORMAT:
        raise ValueError(f"expected a log of format {FORMAT}, got {header['format']!r}")
    zo = Int8ZO(model, b_zo=0, rounding=header["rounding"])
    ours = zo.header()
    check_head(header, ours)
    for what in ("queries", "exponents"):
        if header[what] != ours[what]:
            raise ValueError(
                f"the log is of another model: {what} was {header[what]}, is {ours[what]}"
            )

    def make_again(record: Mapping[str, Any]) -> None:
        model.set_direction(Sparse(int(record["r_max"]), float(record["p_zero"])))
        zo.b_zo = int(record["b_zo"])
        signs = torch.tensor(record["signs"], dtype=torch.int32, device=model.session.device)
        if not model.cut.everything:
            zo.update_by(signs)

    return make_again
