"""What a person sees while a run goes on: a bar on a terminal, a line per test elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# The accuracy is unknown until the first test.
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=None),
    TextColumn("{task.completed}/{task.total}"),
    TextColumn("loss {task.fields[loss]}"),
    TextColumn("acc {task.fields[accuracy]}"),
    TextColumn("{task.fields[speed]} steps/s"),
    TimeRemainingColumn(),
)


class Reporter:
    """Says nothing: for runs inside a study, and the base of those that speak."""

    def start(self, title: str, step: int, steps: int) -> None:
        """A run begins (or goes on) at `step`."""

    def train(self, line: dict[str, Any]) -> None:
        """A line of the log: loss so far and speed."""

    def test(self, line: dict[str, Any], epochs: int) -> None:
        """A test at the end of an epoch."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def stop(self) -> None:
        """The run ended or was interrupted; may be called twice."""


class ConsoleReporter(Reporter):
    """A progress bar where the console is a terminal, else one line a test."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.task = TaskID(0)

    def start(self, title: str, step: int, steps: int) -> None:
        self.title, self.steps = title, steps
        if not self.console.is_terminal:
            return
        self.progress = Progress(*COLUMNS, console=self.console)
        method = title.partition(" ")[0]  # the bar needs the room of a narrow terminal
        self.task = self.progress.add_task(
            method, total=steps, completed=step, loss="-", accuracy="-", speed="-"
        )
        self.progress.start()

    def train(self, line: dict[str, Any]) -> None:
        if self.progress is None:
            return
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        if line["skipped"]:
            loss += f" ({line['skipped']} steps skipped)"
        speed = f"{1000 / line['ms_per_step']:.0f}"
        self.progress.update(self.task, completed=line["step"], loss=loss, speed=speed)

    def test(self, line: dict[str, Any], epochs: int) -> None:
        accuracy = f"{line['test_accuracy']:.2f} %"
        if self.progress is not None:
            self.progress.update(self.task, completed=line["step"], accuracy=accuracy)
            return
        loss = "-" if line["train_loss"] is None else f"{line['train_loss']:.4f}"
        self.note(
            f"{self.title}: epoch {line['epoch']}/{epochs}, step {line['step']}/{self.steps}, "
            f"loss {loss}, accuracy {accuracy}, {line['seconds']:.1f} s"
        )

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
