"""The trajectory log: a run of the head as (step, learning rates, losses), to be replayed.

One header line, then one line a step, both JSON. Replaying it from the head's first weights gives
the head's parameters bit for bit on the same backend: `z` is made again from the seed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elasticzo.losses import projected_gradients
from elasticzo.settings import check_integer
from zo_kernels import update_

if TYPE_CHECKING:
    from elasticzo.optimizer import ZOSGD
    from elasticzo.wrapper import ElasticZO

FORMAT = "elasticzo-trajectory-1"
CAPACITY = 1024
MAX_CAPACITY = 1 << 24


class TrajectoryLog:
    """Writes a run of `zo` to a file.

    Steps are collected in a ring buffer on the device; `drain` writes them out (and is called when
    the ring is full; the last steps are yours to drain), so that a step itself waits for nothing.

    Args:
        path: of the file; made new unless `resume`.
        zo: the optimiser whose steps are written; `zo.attach(log)` is done here.
        resume: go on behind the record of step `zo.model.step_index - 1`, dropping later ones.
        capacity: steps the ring holds.
    Raises: FileExistsError for a file that is there, ValueError for one of another run.
    """

    def __init__(
        self, path: str | Path, zo: ZOSGD, resume: bool = False, capacity: int = CAPACITY
    ) -> None:
        check_capacity(capacity)
        self.path = Path(path)
        model = zo.model
        self.header = _header(zo)
        width = 2 + 2 * len(zo.param_groups) + model.halves
        self._groups = len(zo.param_groups)
        self._ring = torch.zeros(capacity, width, dtype=torch.float64, device=model._key.device)
        self._filled = 0
        self.header = open_log(self.path, self.header, resume, model.step_index)
        zo.attach(self)

    def record(
        self, step: Tensor, skipped: Tensor, rates: Tensor, decays: Tensor, losses: Tensor
    ) -> None:
        """Take note of one step; waits for the device only when the ring is full."""
        if self._filled == self._ring.shape[0]:
            self.drain()
        row = self._ring[self._filled]
        row[0], row[1] = step, skipped
        row[2 : 2 + self._groups] = rates
        row[2 + self._groups : 2 + 2 * self._groups] = decays
        row[2 + 2 * self._groups :] = losses
        self._filled += 1

    def drain(self) -> None:
        """Write the collected steps and flush them to the disk."""
        if self._filled == 0:
            return
        records = []
        for row in self._ring[: self._filled].tolist():
            values, groups = row[2:], self._groups
            record = {
                "step": int(row[0]),
                "lr": values[:groups],
                "weight_decay": values[groups : 2 * groups],
                "losses": values[2 * groups :],
                "skipped": int(row[1]),
            }
            records.append(record)
        append_records(self.path, records)
        self._filled = 0


def check_capacity(capacity: Any) -> None:
    check_integer("capacity", capacity, 1, MAX_CAPACITY, "[1, 2^24]")


def open_log(path: Path, header: dict[str, Any], resume: bool, step: int) -> dict[str, Any]:
    """Begin a log, or cut the one that is there back to the records before `step`.

    Returns: the header of the file.
    """
    if not (resume and path.exists()):
        if path.exists():
            raise FileExistsError(f"{path} exists; give another path, or resume=True")
        _write_whole(path, json.dumps(header) + "\n")
        return header
    found, records = read_trajectory(path, header["format"])
    # Where a log began and with which packages is for the reader; the rest makes the run.
    settings = [k for k in header if k not in ("start", "versions")]
    keys = [k for k in settings if header[k] != found.get(k)]
    if keys:
        raise ValueError(f"{path} is the log of another run: {', '.join(keys)} differ")
    kept = [r for r in records if r["step"] < step]
    missing = set(range(found["start"], step)) - {r["step"] for r in kept}
    if missing:
        raise ValueError(f"{path} has no record of step {min(missing)}: it cannot go on")
    _write_whole(path, "".join(json.dumps(r) + "\n" for r in [found, *kept]))
    return found


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


def _header(zo: ZOSGD) -> dict[str, Any]:
    """All that a replay depends on; the parameters as `ZOSGD` updates them."""
    model = zo.model
    names = {id(p): name for name, p in model.named_head_parameters()}
    targets = zo._targets()
    head = [
        {
            "name": names[id(p)],
            "index": targets.tensors[i],
            "group": targets.groups[i],
            "scale": targets.scales[i],
            "still_row": dict(targets.still).get(i),
        }
        for i, p in enumerate(targets.params)
    ]
    return {
        "format": FORMAT,
        "seed": model.seed,
        "start": model.step_index,
        "eps": model.eps,
        "noise": model.noise,
        "queries": model.queries,
        "clip": zo.clip,
        "head": head,
        "backend": model.backend,
        "versions": package_versions(),
    }


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def read_trajectory(
    path: str | Path, log_format: str = FORMAT
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a log; a last line that was cut off by a crash is left out.

    Raises: FileNotFoundError, ValueError for a file that is no log.
    """
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True)
    try:
        header = json.loads(lines[0])
        if header["format"] != log_format:
            raise ValueError
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a trajectory log ({log_format})") from error
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
def replay(path: str | Path, model: ElasticZO, steps: int | None = None) -> int:
    """Rebuild the head's parameters from the log of a run.

    Args:
        path: the log.
        model: an `ElasticZO` as the run began with: the same cut, scales and first weights.
        steps: how many records to replay; None is all.
    Returns: the step after the last record.
    Determinism: bit for bit on the backend that the header names.
    Raises: ValueError where the header does not fit the model, or records are missing.
    """
    header, records = read_trajectory(path)
    _check_fits(header, model)
    names = dict(model.named_head_parameters())
    head = header["head"]
    params = [names[h["name"]] for h in head]
    device = model._key.device
    still = [
        (p[h["still_row"]], p[h["still_row"]].clone())
        for p, h in zip(params, head, strict=True)
        if h["still_row"] is not None
    ]
    key = torch.tensor([header["seed"], 0], dtype=torch.int64, device=device)
    eps = torch.tensor(header["eps"], dtype=torch.float64, device=device)
    expected = header["start"]
    for record in records[:steps]:
        if record["step"] != expected:
            raise ValueError(f"{path}: step {expected} is missing, found {record['step']}")
        expected += 1
        if record["skipped"]:
            continue
        key[1] = record["step"]
        g = projected_gradients(torch.tensor(record["losses"], dtype=torch.float64), eps.cpu())
        clip = header["clip"] if header["clip"] is not None else math.inf
        update_(
            params,
            key,
            (g.clamp(-clip, clip) / header["queries"]).to(device),
            torch.tensor(record["lr"], dtype=torch.float64, device=device),
            torch.tensor(record["weight_decay"], dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float32, device=device),
            tensors=[h["index"] for h in head],
            groups=[h["group"] for h in head],
            scales=[h["scale"] for h in head],
            noise=header["noise"],
            backend=header["backend"],
        )
        for row, value in still:
            row.copy_(value)
    model._seed = int(header["seed"])
    model._key.copy_(torch.tensor([model._seed, expected], dtype=torch.int64))
    return int(expected)


def _check_fits(header: dict[str, Any], model: ElasticZO) -> None:
    names = [name for name, _ in model.named_head_parameters()]
    logged = [h["name"] for h in header["head"]]
    missing = [name for name in logged if name not in names]
    if missing:
        raise ValueError(f"the log updates {missing[0]!r}, which is not in this model's head")
    if header["backend"] != model.backend:
        raise ValueError(
            f"the log was made on backend {header['backend']!r}, this model runs "
            f"{model.backend!r}: give backend={header['backend']!r}"
        )


def _write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = [
    "TrajectoryLog",
    "append_records",
    "check_capacity",
    "open_log",
    "package_versions",
    "read_trajectory",
    "replay",
]
