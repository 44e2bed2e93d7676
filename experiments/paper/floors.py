"""What the study must show, and whether it does: gains, controls, memory.

ElasticZO is the better of ZO-Feat-Cls2 and ZO-Feat-Cls1, by mean test accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments.files import read_json
from experiments.paper.compare import (
    ARITHMETIC_TITLES,
    DATA_TITLES,
    MODEL_TITLES,
    SHORT_TITLES,
    Mean,
    Runs,
    Scene,
    gain_text,
)
from experiments.train.recipes import CONTROLS

GAIN = 5.2  # points over Full ZO
ERRORS = 2.0  # standard errors over the control
MEMORY = 0.017  # of Cls2 over Full ZO
OVER_FULL_ZO = f"over Full ZO: at least {GAIN} points"
OVER_CONTROL = f"over its control: more than {ERRORS:g} standard errors"
MEMORY_OF_CLS2 = f"peak memory of Cls2 over Full ZO's: at most {100 * MEMORY:.1f} %"

Status = Literal["kept", "broken", "not measured"]


@dataclass(frozen=True)
class Floor:
    """A promise and what came of it.

    Attributes:
        promise: in words, with its bound.
        of: data set and arithmetic, or network.
        measured: the figure, or what is missing.
    """

    promise: str
    of: str
    measured: str
    status: Status


def gain_floor(runs: Runs, scene: Scene, arithmetic: str) -> Floor:
    """ElasticZO over Full ZO."""
    best = runs.best(scene, arithmetic)
    gain = runs.gain(scene, arithmetic, best, "full-zo") if best else None
    of = _of(scene, arithmetic)
    if best is None or gain is None:
        return Floor(OVER_FULL_ZO, of, "needs runs of Full ZO, Cls2 and Cls1", "not measured")
    status: Status = "kept" if gain.mean >= GAIN else "broken"
    return Floor(OVER_FULL_ZO, of, f"{SHORT_TITLES[best]}: {_points(gain)}", status)


def control_floor(runs: Runs, scene: Scene, arithmetic: str) -> Floor:
    """ElasticZO over the same tail on a head that stays random."""
    best = runs.best(scene, arithmetic)
    gain = runs.gain(scene, arithmetic, best, CONTROLS[best]) if best else None
    of = _of(scene, arithmetic)
    if best is None or gain is None or gain.error is None:
        missing = "needs runs of Cls2, Cls1 and the control over at least two seeds"
        return Floor(OVER_CONTROL, of, missing, "not measured")
    status: Status = "kept" if gain.mean > ERRORS * gain.error else "broken"
    return Floor(OVER_CONTROL, of, f"{SHORT_TITLES[best]}: {_points(gain)}", status)


def memory_floors(folder: Path) -> list[Floor]:
    """Peak memory of a step of Cls2 over one of Full ZO, for each elastic curve that is there and
    each network of the grid of measured peaks."""
    found = []
    for content in elastic_curves(folder):
        over = overhead(content)
        of = _curve_title(content)
        if over is None:
            found.append(
                Floor(MEMORY_OF_CLS2, of, "needs the cuts of Cls2 and Full ZO", "not measured")
            )
            continue
        status: Status = "kept" if over <= MEMORY else "broken"
        found.append(Floor(MEMORY_OF_CLS2, of, f"{100 * over:+.3f} %, measured peaks", status))
    for network, overheads in grid_overheads(folder).items():
        low, high = 100 * min(overheads), 100 * max(overheads)
        status = "kept" if max(overheads) <= MEMORY else "broken"
        of = f"{MODEL_TITLES.get(network, network)}, {len(overheads)} settings"
        measured = f"{low:+.3f} to {high:+.3f} %, measured peaks"
        found.append(Floor(MEMORY_OF_CLS2, of, measured, status))
    if not found:
        return [Floor(MEMORY_OF_CLS2, "any network", "needs an elastic curve", "not measured")]
    return found


def elastic_curves(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Of results that are no rehearsal."""
    for path in sorted(folder.glob("elastic_*.json")):
        content = read_json(path)
        if not content.get("reduced"):
            yield content


def overhead(curve: Mapping[str, Any]) -> float | None:
    """Measured peak of Cls2 over that of Full ZO, less 1."""
    peaks = {p["recipe"]: p["measured_bytes"] for p in curve["points"]}
    if not {"cls2", "full-zo"} <= peaks.keys():
        return None
    return float(peaks["cls2"] / peaks["full-zo"] - 1)


def grid_overheads(folder: Path) -> dict[str, list[float]]:
    """Measured peak of Cls2 over that of Full ZO, less 1, by network: of every batch, pairing and
    tail optimiser of `experiments.studies.memory_model`."""
    path = folder / "memory_model.json"
    rows = read_json(path)["rows"] if path.exists() else []
    full = {(r["network"], r["batch"], r["pairing"]): r for r in rows if r["method"] == "full-zo"}
    found: dict[str, list[float]] = {}
    for row in rows:
        over = full.get((row["network"], row["batch"], row["pairing"]))
        if row["method"] == "cls2" and over is not None:
            found.setdefault(row["network"], []).append(row["measured"] / over["measured"] - 1)
    return found


def floors(studies: Sequence[Runs], folder: Path) -> list[Floor]:
    """All floors: from scratch with each arithmetic of its own, then memory."""
    found: list[Floor] = []
    if not studies:
        found = [
            Floor(promise, "any data set", "needs the study", "not measured")
            for promise in (OVER_FULL_ZO, OVER_CONTROL)
        ]
    for runs in studies:
        for scene in runs.scenes:
            for arithmetic in runs.arithmetics:
                if scene.rotate is None and arithmetic != "int8-float":
                    pair = (
                        gain_floor(runs, scene, arithmetic),
                        control_floor(runs, scene, arithmetic),
                    )
                    found += pair if len(studies) == 1 else [_named(f, runs) for f in pair]
    return found + memory_floors(folder)


def _named(floor: Floor, runs: Runs) -> Floor:
    return replace(floor, of=f"{floor.of}, preset {runs.preset}")


def _of(scene: Scene, arithmetic: str) -> str:
    return f"{scene.title}, {ARITHMETIC_TITLES[arithmetic]}"


def _curve_title(curve: Mapping[str, Any]) -> str:
    model = MODEL_TITLES.get(curve["model"], curve["model"])
    data = next(iter(curve["settings"].values()))["data"]
    return f"{model} on {DATA_TITLES.get(data, data)}, batch {curve['batch_size']}"


def _points(gain: Mean) -> str:
    return f"{gain_text(gain, gain.n)} (n = {gain.n})"
