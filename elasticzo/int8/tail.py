"""The tail's integer update: a gradient's highest `b_bp` bits."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from elasticzo.head import Head
from elasticzo.session import Session
from elasticzo.settings import check_integer, check_saved
from zo_kernels import int8_gradient_update_
from zo_kernels.int8 import ROUNDINGS

MIN_BITS, MAX_BITS = -8, 7


class Trained(Protocol):
    """What the update reads of an `ElasticZOInt8`: the weights of its tail, and their gradients."""

    session: Session
    trained: Head

    @property
    def backend(self) -> str: ...

    @property
    def gradients(self) -> dict[str, Tensor]: ...


class Int8Tail:
    """`w = clip(w - R(G, bits(G) - b_bp))`: NITI's update of the tail; exponents play no part.

    Args:
        model: whose tail it trains.
        b_bp: bits of an update, in [-8, 7]; they play the learning rate. May change at any time.
            Below 0 (not in NITI) even the largest gradient moves its weight only at times.
        rounding: R: "pseudo", "nearest" or "stochastic".
    Source: NITI (arXiv:2009.13108).
    """

    def __init__(self, model: Trained, b_bp: int, rounding: str = "pseudo") -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {tuple(ROUNDINGS)}, got {rounding!r}")
        self.model = model
        self.rounding = rounding
        self.b_bp = b_bp

    @property
    def b_bp(self) -> int:
        return self._b_bp

    @b_bp.setter
    def b_bp(self, value: int) -> None:
        check_integer("b_bp", value, MIN_BITS, MAX_BITS)
        self._b_bp = value

    def step(self) -> None:
        """Update the tail from what `model.backward` left, which is then used up.

        Raises: RuntimeError where there was no backward since the last step.
        """
        model = self.model
        for head, w in model.trained:
            gradient = model.gradients.pop(head.name, None)
            if gradient is None:
                raise RuntimeError(
                    "bp.step without model.backward since the last step (zo.step ends a step: it "
                    "comes last)"
                )
            int8_gradient_update_(
                w,
                gradient,
                b_bp=self._b_bp,
                rounding=self.rounding,
                key=model.session.key,
                tensor=head.index,
                backend=model.backend,
            )

    def zero_grad(self) -> None:
        """Forget a backward that no step used."""
        self.model.gradients.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"b_bp": self._b_bp, "rounding": self.rounding}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved `b_bp`.

        Raises: ValueError where an entry is missing, unknown or out of range, or the rounding of
            the saved run is another.
        """
        check_saved("Int8Tail", state_dict, self.state_dict(), {"rounding": self.rounding})
        self.b_bp = state_dict["b_bp"]
