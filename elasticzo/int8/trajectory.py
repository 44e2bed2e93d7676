"""The trajectory log of an integer run: a step is its signs and settings.

One header line, then one line a step, both JSON, as the float log's. Replaying it from the head's
first weights gives the head's weights bit for bit, on any backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elasticzo.int8.optimizer import Int8ZO, apply_signs
from elasticzo.int8.wrapper import ElasticZOInt8
from elasticzo.trajectory import (
    append_records,
    check_capacity,
    open_log,
    package_versions,
    read_trajectory,
)

FORMAT = "elasticzo-int8-trajectory-1"
CAPACITY = 1024


class Int8TrajectoryLog:
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
        self, path: str | Path, zo: Int8ZO, resume: bool = False, capacity: int = CAPACITY
    ) -> None:
        check_capacity(capacity)
        self.path = Path(path)
        self.zo = zo
        model = zo.model
        size = (capacity, 1 + model.queries)
        self._ring = torch.zeros(size, dtype=torch.int64, device=model._key.device)
        self._settings: list[dict[str, Any]] = []  # known on the host, one a filled row
        self.header = open_log(self.path, _header(zo), resume, model.step_index)
        zo.attach(self)

    def record(self, step: Tensor, signs: Tensor) -> None:
        """Take note of one step; waits for the device only when the ring is full."""
        if len(self._settings) == len(self._ring):
            self.drain()
        row = self._ring[len(self._settings)]
        row[0], row[1:] = step, signs
        model = self.zo.model
        self._settings.append({"r_max": model.r_max, "p_zero": model.p_zero, "b_zo": self.zo.b_zo})

    def drain(self) -> None:
        """Write the collected steps and flush them to the disk."""
        rows = self._ring[: len(self._settings)].tolist()
        records = [
            {"step": row[0], "signs": row[1:], **settings}
            for row, settings in zip(rows, self._settings, strict=True)
        ]
        if records:
            append_records(self.path, records)
        self._settings = []


def _header(zo: Int8ZO) -> dict[str, Any]:
    """All that a replay depends on."""
    model = zo.model
    return {
        "format": FORMAT,
        "seed": model.seed,
        "start": model.step_index,
        "queries": model.queries,
        "rounding": zo.rounding,
        "head": [
            {"name": name, "index": model._layer(name).tensor, "scale": model._scale[name]}
            for name, _ in model.named_head_parameters()
        ],
        "versions": package_versions(),
    }


@torch.no_grad()
def replay_int8(path: str | Path, model: ElasticZOInt8, steps: int | None = None) -> int:
    """Rebuild the head's weights from the log of a run.

    Args:
        path: the log.
        model: as the run began with: the same cut, scale and first weights.
        steps: how many records to replay; None is all.
    Returns: the step after the last record.
    Determinism: bit for bit, on any backend.
    Raises: ValueError where the header does not fit the model, or records are missing.
    """
    header, records = read_trajectory(path, FORMAT)
    head = [
        {"name": name, "index": model._layer(name).tensor, "scale": model._scale[name]}
        for name, _ in model.named_head_parameters()
    ]
    if header["head"] != head:
        raise ValueError(f"{path}: the log is of a head {header['head']}, this model has {head}")
    device = model._key.device
    expected = int(header["start"])
    for record in records[:steps]:
        if record["step"] != expected:
            raise ValueError(f"{path}: step {expected} is missing, found {record['step']}")
        model.go_to(int(header["seed"]), expected)
        model.set_noise(int(record["r_max"]), float(record["p_zero"]))
        signs = torch.tensor(record["signs"], dtype=torch.int32).to(device)
        if not model.cut.everything:
            apply_signs(model, model._key, signs, int(record["b_zo"]), header["rounding"])
        expected += 1
    model.go_to(int(header["seed"]), expected)
    return expected


__all__ = ["Int8TrajectoryLog", "replay_int8"]
