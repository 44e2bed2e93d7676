"""What the commands share: where results lie, what is refused, exit statuses, how a run stops."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from elasticzo.data import DownloadError

RESULTS = Path(__file__).parent / "results"
USAGE_ERROR = 2
REFUSED = (ValueError, TypeError, OSError, ImportError, DownloadError)
Item = TypeVar("Item")
Found = TypeVar("Found")


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""

    def __init__(self, number: int, step: int, steps: int, folder: Path) -> None:
        self.signal = signal.Signals(number)
        super().__init__(
            f"interrupted ({self.signal.name}) at step {step} of {steps}; checkpoint in {folder}"
        )


class StopSignals(AbstractContextManager["StopSignals"]):
    """Notes SIGINT and SIGTERM, so that a step is finished first; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def plain_console() -> Console:
    """Prints lines as they are."""
    return Console(highlight=False, soft_wrap=True)


def tracked(items: Sequence[Item], title: str, console: Console) -> Iterable[Item]:
    """The items, with a bar on a terminal that goes with the last."""
    hidden = not console.is_terminal
    return track(items, title, console=console, disable=hidden, transient=True)


def run_command(
    work: Callable[[], Found],
    finish: Callable[[Found], int | None],
    console: Console,
    again: str = "; the same command goes on",
) -> int:
    """The exit status of a command: that of `finish` (None is 0), 2 for what is refused, by the
    command or by the system (a full disk, say), 128 + signal where it was interrupted.

    Args:
        work: may refuse by `REFUSED`, and be interrupted.
        finish: says and writes what came of it; may refuse, too.
        again: what a person reads after an interruption.
    """
    try:
        return finish(work()) or 0
    except REFUSED as error:
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return USAGE_ERROR
    except Interrupted as stop:
        console.print(f"{stop}{again}", markup=False)
        return 128 + stop.signal.value


def _sentence(error: Exception) -> str:
    """Of what the system refused: the place, and why."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
