"""What sections share: the device, the time that is left, cases that are refused, skipped or fail.

A case is verified before it is timed. One that is wrong is refused: it gets no time, the others go
on, and the command ends with 1. A case that needs more memory than there is, or comes after the
time budget, is skipped with a note.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from experiments.timing import Contestant, Timings, measure

Row = dict[str, Any]
COMPILED_ROWS = 4096  # kernels are the same for more of them
# Norm of the error over that of float64's result, for one product: rounded operands and result.
# tf32 operands are cut off, not rounded, on tensor cores: twice 2^-11 on average.
BOUNDS = {"fp32": 1e-5, "ieee": 1e-5, "tf32x3": 1e-5, "tf32": 3e-3, "bf16": 1e-2}


class Refused(Exception):
    """A result is wrong: it must not be timed."""


class Warmed(Exception):
    """The case ran once, to compile its kernels; nothing is to be timed."""


def relative_error(came: Tensor, exact: Tensor) -> float:
    """`|came - exact| / |exact|` in float64; infinite where an element is not finite."""
    if not bool(torch.isfinite(came).all()):
        return float("inf")
    scale = float(exact.double().norm())
    return float((came.double() - exact.double()).norm()) / max(scale, 1e-300)


def require(what: str, came: Tensor, exact: Tensor, bound: float) -> float:
    """The relative error, which must be within `bound`; NaN never is.

    Raises: Refused.
    """
    error = relative_error(came, exact)
    if not error <= bound:
        raise Refused(f"{what}: the relative error {error:.3g} exceeds {bound:.3g}")
    return error


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory begins as NaN: an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what has no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


@dataclass
class Bench:
    """One run of the command.

    Attributes:
        device: where everything runs. reduced: tiny, in the interpreter where there is no GPU.
        deadline: of the section that runs now, by `time.monotonic`.
        part: (i, n) runs each n-th case once and times none: kernels get compiled.
        tell: called with a line at every case.
        refused, failed: what went wrong, in words.
    """

    device: torch.device
    reduced: bool
    deadline: float = float("inf")
    part: tuple[int, int] | None = None
    tell: Callable[[str], None] = lambda line: None
    refused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cases: int = 0

    @property
    def backend(self) -> str:
        """Kernels: on the CPU in the interpreter."""
        return "triton"

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def check(self, verify: Callable[[], Any]) -> Any:
        """Verify, with poisoned memory; nothing while kernels only get compiled."""
        if self.part is not None:
            return None
        with poisoned():
            return verify()

    def times(
        self, contestants: Mapping[str, Contestant], seconds: float = 0.4, least: int = 5
    ) -> Timings:
        """Time contestants in turn. Raises: Warmed after one call of each, if that is wanted."""
        if self.part is not None:
            for run in contestants.values():
                run(0)
            raise Warmed
        rounds = (1, 1) if self.reduced else (least, 100)
        return measure(contestants, self.device, seconds, rounds)

    def case(self, label: str, run: Callable[[], Row], *, clean: bool = False) -> Row:
        """The row of one case, or why there is none.

        Args:
            clean: give its memory back to the device afterwards.
        """
        self.cases += 1
        if self.part is not None and self.cases % self.part[1] != self.part[0]:
            return {}
        if time.monotonic() > self.deadline:
            return {"skipped": "the time budget was used up"}
        self.tell(label)
        try:
            return run()
        except Warmed:
            return {}
        except Refused as error:
            self.refused.append(f"{label}: {error}")
            return {"refused": str(error)}
        except Exception as error:
            if out_of_memory(error):
                clean = True
                return {"skipped": f"out of memory: {str(error).splitlines()[0][:200]}"}
            self.failed.append(f"{label}: {type(error).__name__}: {error}")
            return {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        finally:
            self._tidy(clean)

    def _tidy(self, clean: bool) -> None:
        """Give memory back: wanted, or because half of it is taken."""
        if not self.cuda:
            return
        # An error of a kernel would show here again; the case has noted it.
        with suppress(RuntimeError):
            total = torch.cuda.get_device_properties(self.device).total_memory
            if clean or torch.cuda.memory_reserved(self.device) > total / 2:
                gc.collect()
                torch.cuda.empty_cache()


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device has no memory left."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def usable(rows: list[Row], key: str) -> list[Row]:
    """The rows that have a measurement."""
    return [row for row in rows if key in row]
