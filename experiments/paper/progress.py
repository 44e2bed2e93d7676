"""How far the whole study is, and how long it will take."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from experiments.paper.cells import Cell

COLUMNS = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))


class Meter(AbstractContextManager["Meter"]):
    """A bar over all runs of the study on a terminal, a line for each run elsewhere.

    Args:
        steps: of each run, about.
        processes: that run at a time.
    """

    def __init__(self, steps: Mapping[Cell, int], processes: int, console: Console) -> None:
        self.steps, self.processes, self.console = dict(steps), processes, console
        self.left = dict.fromkeys(steps)  # an ordered set
        self.runs = len(self.left)
        self.at: dict[Cell, int] = {}  # steps of the runs that go on
        self._spent: dict[tuple[str, ...], list[float]] = {}  # seconds and steps of finished runs
        self._bar = Progress(*COLUMNS, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=sum(steps.values()), left="")

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def tick(self, cell: Cell, step: int) -> None:
        """A run is at a step."""
        if cell in self.left:
            self.at[cell] = step
            self._show()

    def learn(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """What a finished run cost, for the estimate of the time left."""
        spent = self._spent.setdefault(_kind(cell), [0.0, 0.0])
        spent[0] += result["seconds"]
        spent[1] += result["steps"]

    def end(self, cell: Cell, text: str, result: Mapping[str, Any] | None) -> None:
        """A run has ended: with a result, or with a reason for none."""
        self.left.pop(cell, None)
        self.at.pop(cell, None)
        if result is not None:
            self.learn(cell, result)
        self.console.print(
            f"{self.runs - len(self.left)}/{self.runs} {cell}: {text}{self._remaining()}",
            markup=False,
        )
        self._show()

    def _show(self) -> None:
        done = sum(self.steps.values()) - sum(self._steps_left(c) for c in self.left)
        finished = self.runs - len(self.left)
        self._bar.update(
            self._task, completed=done, description=f"runs {finished}/{self.runs}",
            left=self._remaining().removeprefix("; "),
        )  # fmt: skip

    def _steps_left(self, cell: Cell) -> int:
        return max(0, self.steps[cell] - self.at.get(cell, 0))

    def _remaining(self) -> str:
        """From the seconds a step of runs of the same kind, or of all so far."""
        if not self._spent or not self.left:
            return ""
        total = [sum(column) for column in zip(*self._spent.values(), strict=True)]
        seconds = 0.0
        for cell in self.left:
            spent, steps = self._spent.get(_kind(cell), total)
            seconds += self._steps_left(cell) * spent / max(1.0, steps)
        minutes = seconds / self.processes / 60
        return f"; about {minutes:.0f} min left" if minutes >= 1 else "; about a minute left"


def _kind(cell: Cell) -> tuple[str, ...]:
    return cell.model, cell.arithmetic, cell.method
