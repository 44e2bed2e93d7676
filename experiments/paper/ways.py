"""What a head learns from, side by side: the paper's one number a batch, one a sample, feedback.

The paper's rows are those of the study of its methods (preset cpu), the others of preset samples:
the same sets, lengths, seeds and number of trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.paper.compare import (
    MODEL_TITLES,
    Mean,
    Runs,
    Scene,
    accuracy_text,
    gain_text,
    mean_of,
    paired,
    read_study,
)
from experiments.paper.report.blocks import Block, Row, Table, made_by

COMMAND = "python -m experiments.paper --preset samples --data-dir DIR"
WEIGHT = "one number a batch (the paper)"
AUTO = "one number a sample"
FEEDBACK = "every sample, by learnt feedback"
EXACT = "every sample, exactly at its end, below by learnt feedback"
EXACT_ZERO = "at its end alone, exactly (control: M = 0)"


@dataclass(frozen=True)
class Way:
    """A row: a method, and by whose noise its head learns (None: the paper's, or no head)."""

    title: str
    learns: str
    method: str
    directions: str | None = None


WAYS = (
    Way("Full ZO", WEIGHT, "full-zo"),
    Way("Full ZO", AUTO, "full-zo", "auto"),
    Way("Full ZO", FEEDBACK, "full-zo", "feedback"),
    Way("Cls2", "nothing: frozen (control)", "frozen-cls2"),
    Way("Cls2", WEIGHT, "cls2"),
    Way("Cls2", AUTO, "cls2", "auto"),
    Way("Cls2", "the last layer alone, exactly (control, M = 0)", "cls2", "feedback-zero"),
    Way("Cls2", "every sample, by random feedback (control)", "cls2", "feedback-random"),
    Way("Cls2", FEEDBACK, "cls2", "feedback"),
    Way("Cls2", EXACT_ZERO, "cls2", "feedback-exact-zero"),
    Way("Cls2", EXACT, "cls2", "feedback-exact"),
    Way("Cls1", "nothing: frozen (control)", "frozen-cls1"),
    Way("Cls1", WEIGHT, "cls1"),
    Way("Cls1", AUTO, "cls1", "auto"),
    Way("Cls1", FEEDBACK, "cls1", "feedback"),
    Way("Cls1", EXACT_ZERO, "cls1", "feedback-exact-zero"),
    Way("Cls1", EXACT, "cls1", "feedback-exact"),
    Way("a loss of its own for each layer", "every sample, by BP inside of layers", "local"),
    Way("Full BP", "every sample, by BP", "full-bp"),
)
BY_NAME = {(way.method, way.directions): way for way in WAYS}
# Least test accuracy in %, and most points behind Full BP, by set.
LEAST: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("full-zo", "auto"): {"mnist": 92.0, "fashion-mnist": 78.0, "modelnet10": 60.0},
    ("cls2", "auto"): {"mnist": 95.0, "fashion-mnist": 83.0},
    ("cls1", "auto"): {"mnist": 97.5, "fashion-mnist": 86.5},
    ("full-zo", "feedback"): {"mnist": 97.0, "fashion-mnist": 85.0},
}
BEHIND: Mapping[str, float] = {
    "mnist": 0.5, "fashion-mnist": 1.6, "modelnet10": 2.0, "cifar10": 5.0,
}  # fmt: skip
LEARNT = tuple(way for way in WAYS if way.directions in ("feedback", "feedback-exact"))


class Ways:
    """Both studies as one. Args: folder of the results; samples: of preset samples."""

    def __init__(self, folder: Path, samples: Runs) -> None:
        self.samples, self.paper = samples, read_study(folder, "cpu")
        self.seeds = len(samples.content["seeds"])
        self.scenes = [scene for scene in samples.scenes if self._any(scene)]

    def _any(self, scene: Scene) -> bool:
        return any(self.samples.rows(scene, "fp32", w.method, w.directions) for w in WAYS)

    def accuracies(self, scene: Scene, way: Way) -> dict[int, float]:
        """Test accuracy in % by seed; the paper's study serves what this one has not run."""
        own = self.samples.accuracies(scene, "fp32", way.method, way.directions)
        if way.directions is not None or self.paper is None:
            return own
        other = self.paper.accuracies(scene, "fp32", way.method)
        return own if len(own) >= len(other) else other

    def gain(self, scene: Scene, way: Way, over: Way) -> Mean | None:
        """Points over another way, seed by seed."""
        return paired(self.accuracies(scene, way), self.accuracies(scene, over))

    def titles(self, turned: bool) -> tuple[list[Scene], list[str]]:
        there = [scene for scene in self.scenes if (scene.rotate is not None) == turned]
        return there, [f"{MODEL_TITLES.get(s.model, s.model)}, {s.title}" for s in there]

    def accuracy_table(self, turned: bool) -> Table:
        """Mean and standard deviation of every way."""
        there, titles = self.titles(turned)
        rows: list[Row] = []
        for way in WAYS:
            found = [mean_of(list(self.accuracies(s, way).values())) for s in there]
            if any(value is not None for value in found):
                texts = [accuracy_text(value, self.seeds) for value in found]
                rows.append([way.title, way.learns, *texts])
        caption = (
            f"Test accuracy in %, mean ± standard deviation, n = {self.seeds} or as in brackets."
        )
        return Table(["method", "the head learns of", *titles], rows, caption)

    def gain_table(self, turned: bool) -> Table:
        """Learnt feedback over everything else with its cut, and over Full BP."""
        there, titles = self.titles(turned)
        rows: list[Row] = []
        for way in LEARNT:
            others = [w for w in WAYS if w is not way and w.method in _beside(way.method)]
            for over in others:
                gains = [self.gain(s, way, over) for s in there]
                if any(gain is not None for gain in gains):
                    texts = [gain_text(gain, self.seeds) for gain in gains]
                    name = f"{way.title}: {way.learns}"
                    rows.append([name, f"{over.title}: {over.learns}", *texts])
        caption = (
            "In points, mean ± standard error of the differences seed by seed, "
            f"n = {self.seeds} or as in brackets."
        )
        return Table(["way", "over", *titles], rows, caption)


def promises(ways: Ways) -> Table:
    """What learning from every sample is to reach from scratch, and whether it does."""
    rows: list[Row] = []
    full_bp = BY_NAME["full-bp", None]
    for scene in ways.titles(turned=False)[0]:
        for key, least in LEAST.items():
            way, found = BY_NAME[key], mean_of(list(ways.accuracies(scene, BY_NAME[key]).values()))
            if scene.data in least:
                promise = f"{way.title}, {way.learns}: at least {least[scene.data]:g} %"
                kept = found is not None and found.mean >= least[scene.data]
                rows.append([promise, scene.title, *_came(found, kept, ways, accuracy_text)])
        for way in (w for w in LEARNT if w.method != "full-zo" and scene.data in BEHIND):
            gap, most = ways.gain(scene, way, full_bp), BEHIND[scene.data]
            promise = f"{way.title}, {way.learns}: at most {most:g} points behind Full BP"
            kept = gap is not None and -gap.mean <= most
            rows.append([promise, scene.title, *_came(gap, kept, ways, gain_text)])
    return Table(["to reach", "of", "measured", "status"], rows)


def _came(
    found: Mean | None, kept: bool, ways: Ways, text: Callable[[Mean | None, int], str]
) -> list[str]:
    status = "not measured" if found is None else ("kept" if kept else "broken")
    return [text(found, ways.seeds), status]


def _beside(method: str) -> Sequence[str]:
    """Methods that a cut is compared with."""
    return (method, f"frozen-{method}", "local", "full-bp")


def read_ways(folder: Path) -> Ways | None:
    """None where preset samples has not run."""
    samples = read_study(folder, "samples")
    return None if samples is None else Ways(folder, samples)


def chapter(ways: Ways) -> Block:
    """Of the page."""
    parts: Mapping[str, bool] = {"From scratch": False, "Fine-tuning, turned images": True}
    return Block(
        "Learning from every sample",
        [
            "Not the paper's method: the same cut and the same two passes a step, but the head "
            "learns from each sample instead of one number a batch. Feedback needs a loss that has "
            "a gradient by the outputs, one number a sample does not."
        ],
        COMMAND,
        tables=[promises(ways)],
        parts=[
            Block(title, tables=[ways.accuracy_table(turned), ways.gain_table(turned)])
            for title, turned in parts.items()
            if ways.titles(turned)[0]
        ],
        made=made_by(ways.samples.content),
    )
