"""A run from its configuration to its result, whatever interrupts it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from elasticzo import TrajectoryLog
from elasticzo.int8 import Int8TrajectoryLog
from experiments.commands import Interrupted, StopSignals
from experiments.train.config import PAPER, TrainConfig
from experiments.train.data import digest_of, load_data
from experiments.train.directions import summary
from experiments.train.environment import commit, hardware, machine, peak_memory, versions
from experiments.train.folder import CURVES, TENSORBOARD, TRAJECTORY, RunFolder
from experiments.train.learner import learner_for
from experiments.train.plots import draw_curves
from experiments.train.report import Reporter
from experiments.train.resolve import as_json, identity, resolve
from experiments.train.start import first_weights


class Run:
    """One run: everything that can be refused is refused before its folder is touched.

    Args:
        config: as given or resolved.
        command: what a person types to start it again; stored.
        reporter: who tells a person.
    Raises: ValueError, FileNotFoundError that name what was expected and what came.
    """

    def __init__(
        self, config: TrainConfig, command: str | None = None, reporter: Reporter | None = None
    ) -> None:
        self.config = config = resolve(config)
        self.command = command
        self.reporter = reporter or Reporter()
        assert config.out is not None
        self.folder = RunFolder(config.out, identity(config), config.resume)
        self.device = torch.device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.seconds = 0.0  # of training, without tests and checkpoints
        self._interval = (0, 0.0)  # step and seconds of the last line of the log
        self._board: Any = None

    @property
    def title(self) -> str:
        c = self.config
        by = "" if c.directions in (None, PAPER["directions"]) else f" by {c.directions}"
        return f"{c.method}{by} on {c.data}, seed {c.seed}"

    def go(self) -> dict[str, Any]:
        """Train to the end; the result, also of a run that was finished before.

        Raises: Interrupted after SIGINT or SIGTERM.
        """
        if self.folder.result is not None:
            self.reporter.note(f"{self.title}: finished before, see {self.folder.path}")
            return self.folder.result
        if self.device.type == "cuda":  # the same bits on every start
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        data = load_data(self.config)
        self.folder.take_data(digest_of(data))
        self.learner = learner_for(self.config, data)
        self.learner.probe()
        if self.folder.state is not None:
            self._go_on(self.folder.state)
        elif self.config.start_from is not None:
            self.learner.model.load_state_dict(first_weights(self.config))
        self.folder.start(self._description())
        try:
            return self._train()
        finally:
            self.reporter.stop()
            self.folder.close()
            if self._board is not None:
                self._board.close()

    # ---- beginning

    def _go_on(self, state: dict[str, Any]) -> None:
        self.learner.load(state)
        self.seconds = float(state["seconds"])
        before = {**state["versions"], **state.get("machine", {})}
        now = {**versions(), **(machine(self.device) if "machine" in state else {})}
        changes = [f"{k} from {before.get(k)} to {v}" for k, v in now.items() if before.get(k) != v]
        if changes:
            self.reporter.note(
                f"warning: changed since the checkpoint: {'; '.join(changes)}; last bits may differ"
            )
        self.reporter.note(f"going on at step {self.learner.step_index} of {self.learner.steps}")

    def _description(self) -> dict[str, Any]:
        kinds, replay = self.learner.kinds(), self.learner.replay()
        return {
            "config": as_json(self.config),
            "command": self.command,
            "device": self.config.device,
            "hardware": hardware(self.device),
            "backend": self.learner.model.backend,
            "pairing": self.learner.model.effective_pairing,
            **({"directions": kinds} if kinds else {}),
            **({"replay": replay} if replay else {}),
            "versions": versions(),
            "commit": commit(),
        }

    def _open_logs(self) -> TrajectoryLog | Int8TrajectoryLog | None:
        step = self.learner.step_index
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.folder.path / TENSORBOARD
            self._board = SummaryWriter(folder, purge_step=step or None)
        if not self.config.trajectory or not any(
            True for _ in self.learner.model.head_parameters()
        ):
            return None
        return self.learner.trajectory(self.folder.path / TRAJECTORY)

    # ---- the loop

    def _train(self) -> dict[str, Any]:
        learner, config = self.learner, self.config
        log = self._open_logs()
        self._interval = (learner.step_index, self.seconds)
        kinds = self.learner.kinds()
        if kinds:
            self.reporter.note(f"directions: {summary(kinds)} (of the head's {len(kinds)} weights)")
        self.reporter.start(self.title, learner.step_index, learner.steps)
        with StopSignals() as stop:
            if config.start_from is not None and learner.step_index == 0:
                self._log_test(0, None)
            started = time.perf_counter()
            while learner.step_index < learner.steps:
                learner.step()
                step = learner.step_index
                last = step == learner.steps
                ends_epoch = step % learner.steps_per_epoch == 0
                logs = step % config.log_steps == 0 or last
                saves = step % config.checkpoint_steps == 0 or last or stop.received is not None
                if not (logs or ends_epoch or saves):
                    continue
                if logs:
                    values = learner.read()  # waits for the device: the clock is right
                self.seconds += time.perf_counter() - started
                if logs:
                    self._log_train(values)
                if ends_epoch:
                    self._test(step // learner.steps_per_epoch, last)
                if saves:
                    self._save(log)
                if stop.received is not None and not last:
                    raise Interrupted(stop.received, step, learner.steps, self.folder.path)
                started = time.perf_counter()
        return self._finish()

    def _log_train(self, values: dict[str, Any]) -> None:
        learner = self.learner
        step, seconds = learner.step_index, self.seconds
        head, tail = learner.rates()
        since_step, since_seconds = self._interval
        self._interval = (step, seconds)
        line: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": step / learner.steps_per_epoch,
            **values,
            "lr_head": head,
            "lr_tail": tail,
            "seconds": round(seconds, 4),
            "ms_per_step": 1000 * (seconds - since_seconds) / (step - since_step),
        }
        self.folder.log(line)
        self._curve(step, {k: line[k] for k in ("loss", "lr_head", "lr_tail", "ms_per_step")})
        self.reporter.train(line)

    def _test(self, epoch: int, last: bool) -> None:
        if epoch % self.config.eval_epochs and not last:
            return
        # Of the whole last batch, not since the last line: that sum belongs to the log.
        train_loss = float(self.learner.losses.mean())
        self._log_test(epoch, train_loss if train_loss == train_loss else None)

    def _log_test(self, epoch: int, train_loss: float | None) -> None:
        accuracy, loss = self.learner.evaluate()
        line: dict[str, Any] = {
            "kind": "test",
            "step": self.learner.step_index,
            "epoch": epoch,
            "test_accuracy": accuracy,
            "test_loss": loss,
            "train_loss": train_loss,
            "seconds": round(self.seconds, 4),
        }
        self.folder.log(line)
        self._curve(line["step"], {k: line[k] for k in ("test_accuracy", "test_loss")})
        assert self.config.epochs is not None
        self.reporter.test(line, self.config.epochs)

    def _curve(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items() if self._board is not None else ():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def _save(self, log: TrajectoryLog | Int8TrajectoryLog | None) -> None:
        if log is not None:
            log.drain()
        if self._board is not None:
            self._board.flush()
        state = self.learner.state()
        on = {"versions": versions(), "machine": machine(self.device)}
        self.folder.save({**state, "seconds": self.seconds, **on})

    # ---- the end

    def _finish(self) -> dict[str, Any]:
        tests, lines = self.folder.metrics("test"), self.folder.metrics("train")
        times = [line["ms_per_step"] for line in lines]
        times = times[1:] or times  # the first holds compilation and warm-up
        result = {
            **self._description(),
            "test_accuracy": tests[-1]["test_accuracy"],
            "test_loss": tests[-1]["test_loss"],
            "start_accuracy": tests[0]["test_accuracy"] if tests[0]["step"] == 0 else None,
            "best_test_accuracy": max(line["test_accuracy"] for line in tests),
            "steps": self.learner.steps,
            "skipped": self.learner.skipped,
            "seconds": round(self.seconds, 3),
            "ms_per_step": statistics.median(times),
            "peak_memory": peak_memory(self.device),
        }
        if self.config.plot:
            draw_curves(self.folder.path / CURVES, self.title, lines, tests)
        return self.folder.finish(result)


def train(
    config: TrainConfig, command: str | None = None, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Run a configuration to its end; see `Run`."""
    return Run(config, command, reporter).go()
