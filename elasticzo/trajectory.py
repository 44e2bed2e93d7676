"""The trajectory log: a run of the head as (step, learning rates, losses), to be replayed.

One header line, then one line a step, both JSON. Replaying it from the head's first weights gives
the head's parameters bit for bit on the same backend: `z` is made again from the seed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elasticzo.files import whole
from elasticzo.module import ZOModule
from elasticzo.optim.step import Step
from elasticzo.settings import check_integer

FORMATS = ("elasticzo-trajectory-1", "elasticzo-int8-trajectory-1")
CAPACITY = 1024
MAX_CAPACITY = 1 << 24


class TrajectoryLog:
    """Writes a run of `zo` to a file.

    Steps are collected on the device; `drain` writes them out (and is called when `capacity` of
    them wait; the last steps are yours to drain), so that a step itself waits for nothing.

    Args:
        path: of the file; made new unless `resume`.
        zo: the optimiser whose steps are written, of floats or integers; `zo.attach(log)` is done
            here.
        resume: go on behind the record of step `zo.model.step_index - 1`, dropping later ones.
        capacity: steps that wait at most.
    Raises: FileExistsError for a file that is there, ValueError for one of another run.
    """

    def __init__(
        self, path: str | Path, zo: Step, resume: bool = False, capacity: int = CAPACITY
    ) -> None:
        check_integer("capacity", capacity, 1, MAX_CAPACITY, "[1, 2^24]")
        self.path, model = Path(path), zo.model
        self._fields = zo.fields()
        exact = all(kind is int for kind in self._fields.values())  # a run in integers
        self._dtype, self._capacity = torch.int64 if exact else torch.float64, capacity
        # Of each step: its numbers on the device, their shapes, what the host knows.
        self._steps: list[tuple[Tensor, list[torch.Size], dict[str, Any]]] = []
        header = zo.header() | {"versions": package_versions()}
        self.header = open_log(self.path, header, resume, model.step_index)
        zo.attach(self)

    def record(self, step: Mapping[str, Any]) -> None:
        """Take note of one step; waits for the device only when `capacity` of them wait."""
        if len(self._steps) == self._capacity:
            self.drain()
        tensors = [step[name].detach() for name in self._fields]
        row = torch.cat([t.reshape(-1).to(self._dtype) for t in tensors])
        host = {k: v for k, v in step.items() if not isinstance(v, Tensor)}
        self._steps.append((row, [t.shape for t in tensors], host))

    def drain(self) -> None:
        """Write the collected steps and flush them to the disk."""
        if not self._steps:
            return
        numbers = iter(torch.cat([row for row, *_ in self._steps]).tolist())
        records = [self._entry(numbers, shapes) | host for _, shapes, host in self._steps]
        append_records(self.path, records)
        self._steps = []

    def _entry(self, numbers: Iterator[float], shapes: list[torch.Size]) -> dict[str, Any]:
        """The fields of a step, nested as their tensors were."""
        found: dict[str, Any] = {}
        for (name, kind), shape in zip(self._fields.items(), shapes, strict=True):
            values: Any = [kind(v) for v in islice(numbers, shape.numel())]
            for size in reversed(shape[1:]):
                values = [values[i : i + size] for i in range(0, len(values), size)]
            found[name] = values if shape else values[0]
        return found


def open_log(path: Path, header: dict[str, Any], resume: bool, step: int) -> dict[str, Any]:
    """Begin a log, or cut the one that is there back to the records before `step`.

    Returns: the header of the file.
    """
    if not (resume and path.exists()):
        if path.exists():
            raise FileExistsError(f"{path} exists; give another path, or resume=True")
        _write(path, [header])
        return header
    found, records = read_trajectory(path, header["format"])
    # Where a log began and with which packages is for the reader; the rest makes the run.
    settings = [k for k in {**header, **found} if k not in ("start", "fresh", "versions")]
    keys = [k for k in settings if header.get(k) != found.get(k)]
    if keys:
        raise ValueError(f"{path} is the log of another run: {', '.join(keys)} differ")
    kept = [r for r in records if r["step"] < step]
    missing = set(range(found["start"], step)) - {r["step"] for r in kept}
    if missing:
        raise ValueError(f"{path} has no record of step {min(missing)}: it cannot go on")
    _write(path, [found, *kept])
    return found


def _write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def append_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write lines to the disk."""
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def package_versions() -> dict[str, str]:
    """Of the packages that a log names."""
    names = ("torch", "triton", "numpy", "numba", "elasticzo")
    return {name: version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def read_trajectory(
    path: str | Path, log_format: str | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a log; a last line that was cut off by a crash is left out.

    Args:
        log_format: the one that it must have; None is any.
    Raises: FileNotFoundError, ValueError for a file that is no log.
    """
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True)
    known = FORMATS if log_format is None else (log_format,)
    try:
        header = json.loads(lines[0])
        if header["format"] not in known:
            raise ValueError
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trajectory log ({' or '.join(known)})") from error
    return header, list(_records(path, lines[1:]))


def _records(path: Path, lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=2):
        try:
            yield json.loads(line)
        except ValueError as error:
            if number == len(lines) + 1:
                return
            raise ValueError(f"{path}: line {number} is corrupt") from error


@torch.no_grad()
def replay(
    path: str | Path,
    model: ZOModule,
    steps: int | None = None,
    batches: Iterable[Any] | None = None,
) -> int:
    """Rebuild the head's weights from the log of a run.

    Args:
        path: the log.
        model: as the run began with: the same cut, scales, estimator and first weights.
        steps: how many records to replay; None is all.
        batches: the model's inputs at each step, a tensor or a tuple of arguments, or a list of
            those where a step had micro-batches; they are needed where weights are learnt by noise
            of "node", whose update depends on what the layers read.
    Returns: the step after the last record.
    Determinism: bit for bit, of floats on the backend that the header names, of integers on any.
    Raises: ValueError where the header does not fit the model, or records are missing.
    """
    header, records = read_trajectory(path)
    try:
        make_again = model.replayer(header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expected = int(header["start"])
    inputs = None if batches is None else iter(batches)
    if inputs is None and "node" in header.get("directions", {}).get("kinds", {}).values():
        raise ValueError(
            f"{path}: weights were learnt by noise of nodes, whose update depends on what the "
            "layers read: give batches, the inputs of each step"
        )
    for record in records[:steps]:
        if record["step"] != expected:
            raise ValueError(f"{path}: step {expected} is missing, found {record['step']}")
        model.go_to(int(header["seed"]), expected)
        if inputs is not None:
            _forward_again(model, next(inputs, None), expected)
        make_again(record)
        expected += 1
    model.go_to(int(header["seed"]), expected)
    return expected


def _forward_again(model: ZOModule, inputs: Any, step: int) -> None:
    """The forwards of a step, for what layers keep of them."""
    if inputs is None:
        raise ValueError(f"batches end before step {step}")
    model.train()
    for one in inputs if isinstance(inputs, list) else [inputs]:
        model(*(one if isinstance(one, tuple) else (one,)))
