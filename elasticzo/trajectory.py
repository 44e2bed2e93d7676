"""The trajectory log: a run of the head as (step, learning rates, losses), to be replayed.

One header line, then one line a step, both JSON, chained by checksums; the header has a digest of
the head's first weights. Replaying it from those gives the head's parameters bit for bit on the
same backend: `z` is made again from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elasticzo.files import whole
from elasticzo.lines import append, from_lines, to_lines
from elasticzo.module import ZOModule
from elasticzo.optim.step import Step
from elasticzo.settings import check_integer

FORMATS = ("elasticzo-trajectory-2", "elasticzo-int8-trajectory-2")
OLD = ("elasticzo-trajectory-1", "elasticzo-int8-trajectory-1")  # nothing of theirs can be checked
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
        self.header, self._check = open_log(self.path, header, resume, model.step_index)
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
        lines, check = to_lines(records, self._check)
        append(self.path, lines)
        self._steps, self._check = [], check

    def _entry(self, numbers: Iterator[float], shapes: list[torch.Size]) -> dict[str, Any]:
        """The fields of a step, nested as their tensors were."""
        found: dict[str, Any] = {}
        for (name, kind), shape in zip(self._fields.items(), shapes, strict=True):
            values: Any = [kind(v) for v in islice(numbers, shape.numel())]
            for size in reversed(shape[1:]):
                values = [values[i : i + size] for i in range(0, len(values), size)]
            found[name] = values if shape else values[0]
        return found


def open_log(
    path: Path, header: dict[str, Any], resume: bool, step: int
) -> tuple[dict[str, Any], str]:
    """Begin a log, or cut the one that is there back to the records before `step`.

    Returns: the header of the file, and the checksum of its last line.
    """
    if not (resume and path.exists()):
        if path.exists():
            raise FileExistsError(f"{path} exists; give another path, or resume=True")
        return header, _write(path, [header])
    found, records = read_trajectory(path, header["format"])
    # Where a log began and with which packages is for the reader; the rest makes the run.
    reader = {"start", "fresh", "versions", *({"first_weights"} if step > found["start"] else ())}
    settings = [k for k in {**header, **found} if k not in reader]
    keys = [k for k in settings if header.get(k) != found.get(k)]
    if keys:
        raise ValueError(f"{path} is the log of another run: {', '.join(keys)} differ")
    kept = [r for r in records if r["step"] < step]
    missing = set(range(found["start"], step)) - {r["step"] for r in kept}
    if missing:
        raise ValueError(f"{path} has no record of step {min(missing)}: it cannot go on")
    return found, _write(path, [found, *kept])


def _write(path: Path, records: list[dict[str, Any]]) -> str:
    lines, check = to_lines(records)
    with whole(path) as temporary:
        temporary.write_bytes(lines)
    return check


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
    known = FORMATS if log_format is None else (log_format,)
    found = _format(path)
    if found in OLD:
        raise ValueError(
            f"{path} is a log of format {found!r}, without checksums and a digest of the first "
            "weights: nothing of it can be checked; replay it with the version that its header "
            "names, or move it away to begin another"
        )
    if found not in known:
        raise ValueError(f"{path} is not a trajectory log ({' or '.join(known)})")
    (header, *records), _ = from_lines(path)
    return header, records


def _format(path: Path) -> str | None:
    """What a file says that it is, be it damaged or not."""
    with path.open("rb") as file:
        try:
            return str(json.loads(file.readline())["format"])
        except (KeyError, TypeError, ValueError):
            return None


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
        steps: how many records to replay, of those that are there; None is all.
        batches: the model's inputs at each step, a tensor or a tuple of arguments, or a list of
            those where a step had micro-batches; they are needed where weights are learnt by noise
            of "node", whose update depends on what the layers read.
    Returns: the step after the last record.
    Determinism: bit for bit, of floats on the backend that the header names, of integers on any.
    Raises: ValueError where the log is damaged, does not fit the model or its weights, or records
        are missing; nothing is moved then.
    """
    header, records = read_trajectory(path)
    try:
        make_again = model.replayer(header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    start = int(header["start"])
    if steps is not None:
        check_integer(f"steps of {path}", steps, 0, len(records))
    records = records[:steps]
    for expected, record in enumerate(records, start):
        if record["step"] != expected:
            raise ValueError(f"{path}: step {expected} is missing, found {record['step']}")
    inputs = None if batches is None else iter(batches)
    if inputs is None and "node" in header.get("directions", {}).get("kinds", {}).values():
        raise ValueError(
            f"{path}: weights were learnt by noise of nodes, whose update depends on what the "
            "layers read: give batches, the inputs of each step"
        )
    with nullcontext() if inputs is None else _undone(model):
        for record in records:
            model.go_to(int(header["seed"]), record["step"])
            if inputs is not None:
                _forward_again(model, next(inputs, None), record["step"])
            make_again(record)
    model.go_to(int(header["seed"]), start + len(records))
    return start + len(records)


@contextmanager
def _undone(model: ZOModule) -> Iterator[None]:
    """Where this raises (batches end, or do not fit), weights, buffers and place are as before."""
    tensors = {id(t): t for _, t in [*model.head.named(), *model.named_buffers()]}
    before = [(t, t.clone()) for t in tensors.values()]
    place, training = (model.seed, model.step_index), model.training
    try:
        yield
    except BaseException:
        for t, value in before:
            t.copy_(value)
        model.train(training).go_to(*place)
        raise


def _forward_again(model: ZOModule, inputs: Any, step: int) -> None:
    """The forwards of a step, for what layers keep of them."""
    if inputs is None:
        raise ValueError(f"batches end before step {step}")
    model.train()
    for one in inputs if isinstance(inputs, list) else [inputs]:
        model(*(one if isinstance(one, tuple) else (one,)))
