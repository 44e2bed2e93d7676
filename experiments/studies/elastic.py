"""The elastic curve: `python -m experiments.studies.elastic --data-dir DIR`.

For every cut C of a network, from Full BP (C = 0) to Full ZO (C = L, all layers): test accuracy
after a short training, peak memory of a step measured and predicted, and the time of a step.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from elasticzo.memory import inference_memory, training_memory
from elasticzo.memory.budget import cuts
from experiments.commands import RESULTS, plain_console, run_command, tracked
from experiments.files import write_json
from experiments.studies.study import in_own_folder, made_by, run_all, shared, without_places
from experiments.timing import Timings, measure
from experiments.train.config import Data, Method, Model, TrainConfig
from experiments.train.data import load_data
from experiments.train.learner import FloatLearner
from experiments.train.memory import measure_step
from experiments.train.network import build_model
from experiments.train.plots import draw_elastic

Key = tuple[int, int]  # cut, seed
COMMAND = "python -m experiments.studies.elastic"
TOLERANCE = 0.05  # of a prediction, relative to the measured peak
CLS2_OVERHEAD = 0.017  # of memory over Full ZO, the paper's largest


@dataclass(frozen=True)
class ElasticConfig:
    """Accuracy, memory and time over the cut."""

    data_dir: Path | None = None
    """Folder of the data set's files; not needed for digits."""
    model: Model = "lenet5"
    """Network."""
    data: Data = "mnist"
    """Images, or clouds for pointnet."""
    epochs: int | None = None
    """Passes over the training images, >= 1. Default: the training command's."""
    seeds: int = 1
    """Seeds 0 to seeds - 1, >= 1."""
    batch_size: int = 64
    """Images a step, >= 1."""
    train_images: int | None = None
    """Train on the first so many images only. Default: all."""
    pairing: Literal["stacked", "sequential"] = "stacked"
    """Both halves as one batch, or one after the other."""
    every: int = 1
    """Cuts between two points of the curve, >= 1; Full ZO and Full BP are always there."""
    seconds: float = 5.0
    """That the rounds of timing may take together; five rounds are done anyway."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""
    threads: int | None = None
    """CPU threads of torch, >= 1. Default: torch's own."""
    reduced: bool = False
    """A few steps on the digits, to see that everything runs: no figures of interest."""
    out: Path = Path("runs/elastic")
    """Folder of the runs; a finished one is not repeated."""
    results: Path = RESULTS
    """Folder of elastic_<data>_<model>.json and .png."""


def method_of(cut: int, layers: int) -> Method:
    """The recipe whose cut is nearest: its learning rates serve the cuts between."""
    if cut == 0:
        return "full-bp"
    tail = layers - cut
    return ("full-zo", "cls2", "cls1")[min(tail, 2)]


def configurations(study: ElasticConfig) -> dict[Key, TrainConfig]:
    """A run for every cut and seed."""
    for name in ("seeds", "every"):
        if getattr(study, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(study, name)}")
    with torch.device("meta"):
        all_cuts = cuts(build_model(TrainConfig(model=study.model, data=study.data)))
    layers = len(all_cuts) - 1
    kept = [(c, tail) for c, tail in all_cuts if c % study.every == 0 or c == layers]
    given = shared(study)
    if study.reduced:
        few = 2 * study.batch_size
        given |= {"data": "digits", "data_dir": None, "epochs": 1, "train_images": few}
    runs: dict[Key, TrainConfig] = {}
    for seed in range(study.seeds):
        for cut, tail in kept:
            method = method_of(cut, layers)
            config = TrainConfig(method=method, tail=(str(tail),), seed=seed, **given)
            runs[cut, seed] = in_own_folder(config, study.out / config.data)
    return runs


def memory_of(config: TrainConfig) -> dict[str, Any]:
    """Measured and predicted peak of a training step, and the predicted one of a plain pass."""
    learner = FloatLearner(config, load_data(config))
    momentum = config.tail_optimizer == "sgd"
    x, _ = learner.inputs.train(0)
    predicted = training_memory(learner.model, x, state_tensors=1 if momentum else 2).peak
    del learner
    measured = measure_step(config)
    return {
        "predicted_bytes": predicted.bytes,
        "predicted_parts": dict(predicted.parts),
        "measured_bytes": measured["bytes"],
        "measure": measured["measure"],
        "error": predicted.bytes / measured["bytes"] - 1,
    }


def times_of(configs: Mapping[int, TrainConfig], seconds: float, least: int = 5) -> Timings:
    """Seconds of a step of every cut, in turn."""
    data = load_data(next(iter(configs.values())))
    learners = {str(cut): FloatLearner(config, data) for cut, config in configs.items()}

    def step(learner: FloatLearner, i: int) -> None:
        learner.step_index %= learner.steps  # rates and order of the run go round
        learner.step()

    contestants = {cut: (lambda i, one=one: step(one, i)) for cut, one in learners.items()}
    device = next(iter(learners.values())).device
    return measure(contestants, device, seconds, (least, 200))


def points_of(
    study: ElasticConfig,
    runs: Mapping[Key, TrainConfig],
    results: Mapping[Key, dict[str, Any]],
    console: Console,
) -> list[dict[str, Any]]:
    """A point of the curve for each cut."""
    configs = {cut: config for (cut, seed), config in runs.items() if seed == 0}
    times = times_of(configs, study.seconds, 1 if study.reduced else 5)
    points = []
    for cut in tracked(list(configs), "memory", console):
        learner = FloatLearner(configs[cut], load_data(configs[cut]))
        points.append(
            {
                "cut": cut,
                "tail": configs[cut].tail,
                "trains": learner.model.cut.named,
                "tail_parameters": sum(p.numel() for p in learner.model.tail_parameters()),
                "recipe": configs[cut].method,
                "accuracies": [results[cut, s]["test_accuracy"] for s in range(study.seeds)],
                **memory_of(configs[cut]),
                "step": times.row(str(cut)),
                "over_full_zo": times.ratio(str(cut), str(max(configs))),
            }
        )
    return points


def checks(points: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Each promise in words, and whether it is kept."""
    full = points[-1]
    kept = {
        f"predictions within {TOLERANCE:.0%} of the measured peaks": all(
            abs(p["error"]) <= TOLERANCE for p in points
        )
    }
    cls2 = [p for p in points if p["recipe"] == "cls2"]
    for kind in ("measured", "predicted"):
        for p in cls2:
            over = p[f"{kind}_bytes"] / full[f"{kind}_bytes"] - 1
            kept[f"{kind} memory of Cls2 over Full ZO at most 1.7 % ({100 * over:+.3f} %)"] = (
                over <= CLS2_OVERHEAD
            )
    return kept


def write_results(
    study: ElasticConfig,
    runs: Mapping[Key, TrainConfig],
    results: Mapping[Key, dict[str, Any]],
    points: list[dict[str, Any]],
) -> Path:
    """The JSON and the picture; the path without its ending."""
    first = next(iter(runs.values()))
    path = study.results / f"elastic_{first.data.replace('-', '_')}_{study.model}"
    learner = FloatLearner(first, load_data(first))
    plain = inference_memory(learner.model, learner.inputs.train(0)[0])
    summary = {
        "command": command(study, first.data),
        "reduced": study.reduced,
        "model": study.model,
        "batch_size": study.batch_size,
        "seeds": list(range(study.seeds)),
        "settings": {cut: without_places(c) for (cut, seed), c in runs.items() if seed == 0},
        "inference_bytes": plain.bytes,
        "points": points,
        "checks": checks(points),
        **made_by(results),
    }
    write_json(path.with_suffix(".json"), summary)
    title = f"{study.model} on {first.data}, batch {study.batch_size}, {study.pairing}"
    draw_elastic(path.with_suffix(".png"), title, points, plain.bytes)
    return path


def command(study: ElasticConfig, data: str) -> str:
    """What to type to run it again; folders are the reader's."""
    given = f"--model {study.model} --data {data} --seeds {study.seeds}"
    given += f" --batch-size {study.batch_size} --pairing {study.pairing}"
    for name in ("epochs", "train_images", "threads"):
        if getattr(study, name) is not None:
            given += f" --{name.replace('_', '-')} {getattr(study, name)}"
    if study.every > 1:
        given += f" --every {study.every}"
    place = "" if data == "digits" else " --data-dir DIR"
    return f"{COMMAND} {given}{' --reduced' * study.reduced}{place}"


def table(points: Sequence[Mapping[str, Any]]) -> Table:
    """A line a cut."""
    names = ("C", "parameters", "accuracy %", "peak MB", "predicted", "error %", "ms", "x Full ZO")
    shown = Table(box=None, pad_edge=False)
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    for p in points:
        mean = sum(p["accuracies"]) / len(p["accuracies"])
        shown.add_row(
            str(p["cut"]),
            f"{p['tail_parameters']:,}",
            f"{mean:.2f}",
            f"{p['measured_bytes'] / 1e6:,.2f}",
            f"{p['predicted_bytes'] / 1e6:,.2f}",
            f"{100 * p['error']:+.2f}",
            f"{p['step']['us'] / 1e3:.2f}",
            f"{p['over_full_zo']['median']:.2f}",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, report; 1 where a promise is not kept, else as the training command."""
    study = tyro.cli(ElasticConfig, args=arguments, prog=COMMAND)
    console = plain_console()
    runs: dict[Key, TrainConfig] = {}
    results: dict[Key, dict[str, Any]] = {}

    def work() -> list[dict[str, Any]]:
        runs.update(configurations(study))
        results.update(run_all(runs, COMMAND, console))
        return points_of(study, runs, results, console)

    def finish(points: list[dict[str, Any]]) -> int:
        console.print(table(points))
        kept = checks(points)
        for promise, holds in kept.items():
            console.print(f"{'kept' if holds else 'NOT KEPT'}: {promise}", markup=False)
        path = write_results(study, runs, results, points)
        console.print(f"written: {path}.json and .png", markup=False)
        return 0 if all(kept.values()) else 1

    return run_command(work, finish, console)


if __name__ == "__main__":
    sys.exit(main())
