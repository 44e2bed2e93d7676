"""Chapters from the other results: each from its JSON, and the pictures that lie beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.files import read_json
from experiments.paper.report import measured
from experiments.paper.report.blocks import Block, Table, made_by
from experiments.paper.report.generic import generic_tables
from experiments.paper.report.pictures import beside

Content = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Results that the page shows where they are there, and names where they are not.

    Attributes:
        pattern: of the JSON's name.
        title: of the chapter.
        text: what is to be seen.
        command: that makes it.
        tables: from its content; by default whatever is regular in it.
        captions: of pictures by how their name goes on after the JSON's.
    """

    pattern: str
    title: str
    text: str
    command: str
    tables: Callable[[Content], Sequence[Table]] = generic_tables
    captions: Mapping[str, str] = field(default_factory=dict)


SOURCES = (
    Source(
        "elastic_*.json",
        "Elastic curve",
        "Accuracy, memory and time over the cut C, from Full BP (C = 0) to Full ZO. Peaks are "
        "measured in the allocator; the prediction is made before anything runs.",
        "python -m experiments.studies.elastic --data-dir DIR",
        measured.elastic,
    ),
    Source(
        "memory_model.json",
        "Predicted against measured memory",
        "The liveness model's peak of a step less the measured one, the largest of each row.",
        "python -m experiments.studies.memory_model",
        measured.memory_model,
    ),
    Source(
        "breakdown_*.json",
        "Where the time of a step goes",
        "Stages of a training step of LeNet-5, medians.",
        "python -m experiments.studies.breakdown",
        measured.breakdown,
    ),
    Source(
        "step_cpu.json",
        "A step against two plain forwards",
        "Full ZO on LeNet-5, FP32: both halves, losses and update, over two plain forwards.",
        "python -m experiments.benchmarks.step_cpu",
        measured.step_cpu,
    ),
    Source(
        "int8_step_cpu.json",
        "A step in integers against one in floats",
        "Time and memory of a training step of LeNet-5, INT8 against FP32, in one run.",
        "python -m experiments.benchmarks.int8_step_cpu",
        measured.int8_step,
    ),
    Source(
        "integer_signs.json",
        "Sign of the integer loss in real runs",
        "Share of steps in which the sign of L+ - L- is not that of float64 on the same logits, "
        "by fractional bits F.",
        "python -m experiments.studies.integer_signs --data-dir DIR",
        measured.integer_signs,
    ),
    Source(
        "integer_loss.json",
        "Sign of the integer loss on synthetic logits",
        "The same on normal logits: harder than real ones, since both halves differ by little.",
        "python -m experiments.studies.integer_loss",
        measured.integer_loss,
    ),
    Source(
        "estimator_*.json",
        "What the estimator does",
        "g z averaged over directions against the true gradient; what directions, noise, eps and "
        "the pass that feeds the tail change.",
        "python -m experiments.estimator --data-dir DIR",
        measured.nothing,
        measured.ESTIMATOR,
    ),
    Source(
        "by_sample_*.json",
        "What directions of samples and nodes know of the gradient",
        "One estimate by one pair of passes against the gradient of the same batch, by the size of "
        "the batch: only directions of samples gain by it. Lines are theory.",
        "python -m experiments.estimator.by_sample --data mnist --data-dir DIR",
    ),
    Source(
        "batches_*.json",
        "What a large batch is worth",
        "Full ZO at equal epochs over the size of the batch; rates follow one rule.",
        "python -m experiments.studies.batches --data-dir DIR",
    ),
    Source(
        "directions_cpu.json",
        "What each kind of direction costs",
        "A step by Adam in the head over two plain forwards of the same network; launches of a "
        "device; peak memory, predicted and measured.",
        "python -m experiments.benchmarks.directions_cpu",
        measured.directions,
    ),
    Source(
        "random_walk_*.json",
        "Does the head descend",
        "The head's steps beside steps of the same size whose sign a coin decides: what the method "
        "has over the walk its projected gradients earned, what the walk lacks of the frozen head "
        "is the price of moving.",
        "python -m experiments.studies.random_walk --data-dir DIR",
        measured.random_walk,
    ),
    Source(
        "sweep_*.json",
        "How the float recipes were found",
        "Held-out accuracy over the head's learning rate and eps.",
        "python -m experiments.studies.sweep --data-dir DIR",
        measured.nothing,
    ),
    Source(
        "int8_sweep_*.json",
        "How the integer recipes were found",
        "Held-out accuracy of the recipe and of one change at a time.",
        "python -m experiments.studies.sweep --precision int8 --data-dir DIR",
        measured.int8_sweep,
    ),
    Source(
        "accuracy_*.json",
        "Defaults of the training command",
        "Not tuned by the study's budget, more seeds: mean and standard error.",
        "python -m experiments.studies.accuracy --data-dir DIR",
        measured.accuracy,
    ),
)


def other_chapters(folder: Path) -> tuple[list[Block], list[str]]:
    """The chapters, and a line for each source that is not there."""
    found, missing = [], []
    for source in SOURCES:
        files = sorted(folder.glob(source.pattern))
        parts = [part for part in (_part(source, path) for path in files) if part is not None]
        if parts:
            found.append(Block(source.title, [source.text], parts=parts))
        else:
            missing.append(f"{source.title}: {source.command}")
    return found, missing


def _part(source: Source, path: Path) -> Block | None:
    """One file; None of a rehearsal."""
    content = read_json(path)
    if content.get("reduced"):
        return None
    pictures = [
        beside(picture, source.captions.get(picture.stem.removeprefix(path.stem), source.title))
        for picture in sorted(path.parent.glob(f"{path.stem}*.png"))
        if _belongs(picture, path)
    ]
    try:
        tables = source.tables(content)
    except KeyError as error:
        raise ValueError(f"{path.name} is not of a known layout: {error} is missing") from error
    return Block(
        path.name,
        command=content.get("command", source.command),
        tables=tables,
        pictures=pictures,
        made=made_by(content),
    )


def _belongs(picture: Path, path: Path) -> bool:
    """Whether no other results file has a longer name that the picture's begins with."""
    others = (other.stem for other in path.parent.glob(f"{path.stem}_*.json"))
    return not any(picture.stem.startswith(other) for other in others)
