"""Runs side by side in processes of their own, that stop when they are asked to and go on later."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from experiments.commands import Interrupted, StopSignals
from experiments.paper.cells import Cell
from experiments.train.config import TrainConfig
from experiments.train.report import Reporter
from experiments.train.run import train

Outcome = tuple[str, Any]  # "done" and the result, "failed" and why, or "stopped" and None
Ticks = Callable[[Cell, int], None]
POLL = 0.5  # seconds between two looks at the bar and the signals

_ticks: Any = None  # of a worker: a pipe for (cell, step)
_stop: Any = None  # of a worker: an event, set when the study is to stop


class Stopped(Exception):
    """The study was asked to stop; what is finished is kept."""


class _Steps(Reporter):
    """Says which step a run is at; ends the run where the study is to stop."""

    def __init__(self, cell: Cell, ticks: Ticks, stopping: Callable[[], bool]) -> None:
        self.cell, self.ticks, self.stopping = cell, ticks, stopping

    def start(self, title: str, step: int, steps: int) -> None:
        self.ticks(self.cell, step)

    def train(self, line: dict[str, Any]) -> None:
        self.ticks(self.cell, line["step"])
        if self.stopping():
            raise Stopped


def _run(cell: Cell, config: TrainConfig, command: str, reporter: Reporter) -> Outcome:
    try:
        return "done", train(config, command, reporter)
    except (Interrupted, Stopped, KeyboardInterrupt):
        return "stopped", None
    except Exception as error:  # one run must not cost the others: it is reported as missing
        return "failed", f"{type(error).__name__}: {error}"


def _begin(ticks: Any, stop: Any) -> None:
    """A worker starts: the study tells it to stop, not the keyboard; it ends with the study."""
    global _ticks, _stop
    _ticks, _stop = ticks, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _work(cell: Cell, config: TrainConfig, command: str) -> Outcome:
    reporter = _Steps(cell, lambda cell, step: _ticks.put((cell, step)), _stop.is_set)
    return _run(cell, config, command, reporter)


class Pool:
    """Trains configurations with `processes` at a time.

    Args:
        processes: 1 runs in this process.
        command: what a person types to run the study again; stored with each run.
        ticks: told the step that a run is at.
    """

    def __init__(self, processes: int, command: str, ticks: Ticks) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, got {processes}")
        self.processes, self.command, self.ticks = processes, command, ticks

    def run(self, configs: Mapping[Cell, TrainConfig]) -> Iterator[tuple[Cell, Outcome]]:
        """Each run as it ends.

        Raises: Stopped after SIGINT or SIGTERM; checkpoints are kept.
        """
        yield from self._here(configs) if self.processes == 1 else self._beside(configs)

    def _here(self, configs: Mapping[Cell, TrainConfig]) -> Iterator[tuple[Cell, Outcome]]:
        for cell, config in configs.items():
            outcome = _run(cell, config, self.command, _Steps(cell, self.ticks, lambda: False))
            if outcome[0] == "stopped":
                raise Stopped
            yield cell, outcome

    def _beside(self, configs: Mapping[Cell, TrainConfig]) -> Iterator[tuple[Cell, Outcome]]:
        if not configs:
            return
        with self._workers() as (executor, ticks), StopSignals() as signals:
            waiting: dict[Future[Outcome], Cell] = {
                executor.submit(_work, cell, config, self.command): cell
                for cell, config in configs.items()
            }
            while waiting:
                done, _ = wait(waiting, POLL, FIRST_COMPLETED)
                while not ticks.empty():
                    self.ticks(*ticks.get())
                for future in done:
                    cell, outcome = waiting.pop(future), future.result()
                    if outcome[0] != "stopped":
                        yield cell, outcome
                if signals.received is not None:
                    raise Stopped

    @contextmanager
    def _workers(self) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
        """New processes; however this ends, the runs that go on stop first."""
        context = multiprocessing.get_context("spawn")
        ticks, stop = context.SimpleQueue(), context.Event()
        executor = ProcessPoolExecutor(self.processes, context, _begin, (ticks, stop))
        try:
            yield executor, ticks
        finally:
            stop.set()
            executor.shutdown(cancel_futures=True)
