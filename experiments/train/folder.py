"""The folder of a run: configuration, metrics, checkpoint, result; one process at a time.

config.json       the resolved configuration, what it runs on, the command
metrics.jsonl     a line every `log_steps` steps ("train") and every test ("test")
trajectory.jsonl  what `elasticzo.replay` rebuilds the head from
checkpoint.pt     the state after the last `checkpoint_steps`
result.json       written at the end: a run that has it is finished

Damage is noticed: of configuration and result by a digest in them, of the metrics by one in the
checkpoint and in the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from elasticzo.checkpoint import load_checkpoint, save_checkpoint
from experiments.files import finite, read_checked, write_checked

CONFIG, METRICS, CHECKPOINT, RESULT = (
    "config.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "result.json",
)
# What a person does about a damaged file.
BEGIN_ANEW = "delete it: without a checkpoint the run begins anew, and nothing is lost"
FINISH_AGAIN = "delete it and give the same command again: the checkpoint has all but the result"
ELSEWHERE = "give another --out, or move the folder away"
TRAJECTORY, CURVES, TENSORBOARD = "trajectory.jsonl", "curves.png", "tensorboard"


class RunFolder:
    """Opens the folder of a run without writing anything into it.

    Args:
        path: of the folder; made by `start`.
        identity: what decides the weights of the run.
        resume: whether a run that is there may go on.
    Raises: ValueError where another configuration is there, or any with `resume=False`.
    """

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.identity = identity
        self._lock: int | None = None
        self._metrics: IO[bytes] | None = None
        self.state: dict[str, Any] | None = None
        self.data: str | None = None  # digest of the samples, as far as a run is there
        found = self._found()
        if found is None:
            return
        if not resume:
            raise ValueError(f"out must hold no run with --no-resume, got {path}, which holds one")
        # A field that one side lacks (another version of the command) differs, too.
        names = sorted({*found, *identity})
        differ = [k for k in names if found.get(k, "missing") != identity.get(k, "missing")]
        if differ:
            changes = "; ".join(
                f"{k} was {found.get(k, 'missing')!r}, is {identity.get(k, 'missing')!r}"
                for k in differ
            )
            raise ValueError(
                f"{path} holds a run of another configuration: {changes}; give another --out"
            )

    def _found(self) -> dict[str, Any] | None:
        """The identity of the run that is there; reads its checkpoint."""
        if (self.path / CHECKPOINT).exists():
            state = load_checkpoint(self.path / CHECKPOINT)
            if not isinstance(state.get("identity"), dict) or "metrics_bytes" not in state:
                raise ValueError(f"{self.path / CHECKPOINT} is not of the training command")
            self.state, self.data = state, state.get("data")
            return dict(state["identity"])
        if (self.path / CONFIG).exists():
            config = read_checked(self.path / CONFIG, BEGIN_ANEW)
            self.data = config.get("data")
            return dict(config["identity"])
        return None

    def take_data(self, digest: str) -> None:
        """The run is on these samples.

        Raises: ValueError where it began on others.
        """
        if self.data not in (None, digest):
            raise ValueError(
                f"{self.path} holds a run on other samples (digest {self.data}, those of now have "
                f"{digest}): give it the ones that it began with, or another --out"
            )
        self.data = digest

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run."""
        path = self.path / RESULT
        return read_checked(path, FINISH_AGAIN) if path.exists() else None

    # ---- writing

    def start(self, description: dict[str, Any]) -> None:
        """Make and lock the folder, cut the metrics back to the checkpoint.

        Raises: ValueError while another process writes there, or when metrics are missing.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ValueError(f"{self.path} is in use by another process") from error
        for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while writing
            leftover.unlink()
        if not (self.path / CONFIG).exists():
            config = {**description, "data": self.data, "identity": self.identity}
            write_checked(self.path / CONFIG, config)
        size = 0 if self.state is None else int(self.state["metrics_bytes"])
        path = self.path / METRICS
        self._metrics = path.open("ab")
        if path.stat().st_size < size:
            self.close()
            raise ValueError(f"{path} must have at least {size} bytes, as the checkpoint says")
        wanted = None if self.state is None else self.state.get("metrics_digest")
        if wanted is not None and _digest(path, size) != wanted:
            self.close()
            raise ValueError(f"{path} does not match its digest in the checkpoint: {ELSEWHERE}")
        self._metrics.truncate(size)

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the metrics; what is not finite becomes null."""
        assert self._metrics is not None
        self._metrics.write(json.dumps(finite(line), allow_nan=False).encode() + b"\n")
        self._metrics.flush()

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; the metrics so far are on the disk before it is."""
        assert self._metrics is not None
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        size = os.fstat(self._metrics.fileno()).st_size
        of_run = {"identity": self.identity, "data": self.data, "metrics_bytes": size}
        of_run["metrics_digest"] = _digest(self.path / METRICS, size)
        save_checkpoint(self.path / CHECKPOINT, {**state, **of_run})

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write the result; returns it as it is read from now on."""
        digest = _digest(self.path / METRICS)
        write_checked(self.path / RESULT, {**result, "data": self.data, "metrics_digest": digest})
        return read_checked(self.path / RESULT, FINISH_AGAIN)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """All lines of one kind, "train" or "test"."""
        return [line for line in read_metrics(self.path / METRICS) if line["kind"] == kind]


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; a last one that a kill cut off is left out."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is no JSON: {ELSEWHERE}") from error


def metrics_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, "train" or "test", of a finished run.

    Raises: ValueError where they are not those that its result is of.
    """
    path = folder / METRICS
    if _digest(path) != read_checked(folder / RESULT, FINISH_AGAIN)["metrics_digest"]:
        raise ValueError(f"{path} does not match its digest in {RESULT}: {ELSEWHERE}")
    return [line for line in read_metrics(path) if line["kind"] == kind]


def _digest(path: Path, size: int = -1) -> str:
    """Of the first `size` bytes."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()
