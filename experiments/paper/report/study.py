"""The study's own chapters: from scratch, fine-tuning, integers, tuning, what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from experiments.paper.compare import (
    ARITHMETIC_TITLES,
    DATA_TITLES,
    METHOD_TITLES,
    MODEL_TITLES,
    SHORT_TITLES,
    Runs,
    Scene,
    accuracy_text,
    gain_text,
    mean_of,
    same_run,
)
from experiments.paper.report.blocks import Block, Cell, Row, Table, made_by
from experiments.paper.report.pictures import dots
from experiments.train.recipes import CONTROLS

NOT_ROTATED = (
    "Fine-tuning is of images alone: the networks of upright images go on with all images turned "
    "by one angle. Point clouds are not fine-tuned here."
)

RECIPES = (
    "This preset does not tune: every method trains with its recipe, the defaults of the training "
    "command, found on held-out training images (docs/decisions.md; the sweeps are below)."
)


def chapters(runs: Runs) -> list[Block]:
    """All of one results file."""
    upright = [scene for scene in runs.scenes if scene.rotate is None]
    turned = [scene for scene in runs.scenes if scene.rotate is not None]
    name = f"preset {runs.preset}"
    found = [
        Block(
            f"Training from scratch ({name})",
            ["The control of a method is the same tail on a head that stays random.",
             _how_tuned(runs)],
            parts=[_accuracy_block(runs, scene) for scene in upright],
        ),
        Block(
            f"Fine-tuning ({name})",
            [NOT_ROTATED],
            parts=[_accuracy_block(runs, scene) for scene in turned],
        ),
    ]  # fmt: skip
    if any(a != "fp32" for a in runs.arithmetics):
        found.append(_integers(runs))
    found.append(_tuning(runs))
    return found


def _how_tuned(runs: Runs) -> str:
    if runs.content["tuning"]:
        return (
            "Every method was tuned by the same number of trials on held-out training samples; "
            "the tuning record is below."
        )
    return RECIPES


def _accuracy_block(runs: Runs, scene: Scene) -> Block:
    picture = dots(runs, scene)
    tables = [accuracy_table(runs, scene), gain_table(runs, scene)]
    return Block(
        f"{MODEL_TITLES.get(scene.model, scene.model)} on {scene.title}",
        command=runs.content["command"],
        tables=tables,
        pictures=[] if picture is None else [picture],
        made=made_by(runs.content),
    )


def accuracy_table(runs: Runs, scene: Scene) -> Table:
    """Mean and standard deviation of every method and arithmetic."""
    seeds = len(runs.content["seeds"])
    rows: list[Row] = []
    if scene.rotate is not None:
        before = [mean_of(list(runs.before(scene, a).values())) for a in runs.arithmetics]
        rows.append(["no fine-tuning", *(accuracy_text(value, seeds) for value in before)])
    for method in runs.methods:
        means = [runs.mean(scene, a, method) for a in runs.arithmetics]
        rows.append([METHOD_TITLES[method], *(accuracy_text(value, seeds) for value in means)])
    task = runs.task(scene)
    epochs = task["epochs"] if scene.rotate is None else task["finetune_epochs"]
    return Table(
        ["test accuracy", *(ARITHMETIC_TITLES[a] for a in runs.arithmetics)],
        rows,
        f"In %, mean ± standard deviation, n = {seeds} or as in brackets; "
        f"{epochs} epoch{'s' * (epochs != 1)}, batch {task['batch_size']}.",
    )


def gain_table(runs: Runs, scene: Scene) -> Table:
    """ElasticZO over Full ZO and over its control, seed by seed."""
    seeds = len(runs.content["seeds"])
    rows: list[Row] = []
    for method in (m for m in ("cls2", "cls1") if m in runs.methods):
        for over in ("full-zo", CONTROLS[method]):
            gains = [runs.gain(scene, a, method, over) for a in runs.arithmetics]
            title = f"{SHORT_TITLES[method]} over {SHORT_TITLES[over]}"
            rows.append([title, *(gain_text(value, seeds) for value in gains)])
    return Table(
        ["gain", *(ARITHMETIC_TITLES[a] for a in runs.arithmetics)],
        rows,
        f"In points, mean ± standard error of the differences seed by seed, n = {seeds} or as in "
        "brackets.",
    )


# ---- integers


def _integers(runs: Runs) -> Block:
    text = ["The integer loss is a cross-entropy in fixed point; the float loss is taken in "
            "float64 on the same int8 logits, and its sign alone is used.",
            "Full BP and the controls use no sign of a loss difference: both losses are one run, "
            "which was done once. Points of test accuracy, mean ± standard error of the "
            "differences seed by seed."]  # fmt: skip
    return Block(
        f"Integers against floats (preset {runs.preset})",
        text,
        runs.content["command"],
        [integer_table(runs, scene) for scene in runs.scenes],
        made=made_by(runs.content),
    )


def integer_table(runs: Runs, scene: Scene) -> Table:
    """INT8 less FP32, and what the float loss would add."""
    seeds = len(runs.content["seeds"])
    both = "int8-float" in runs.arithmetics
    rows: list[Row] = []
    for method in runs.methods:
        floats = runs.difference(scene, method, "int8", "fp32")
        row = [METHOD_TITLES[method], gain_text(floats, seeds)]
        if both and same_run("int8-float", method):
            row.append("same run")
        elif both:
            row.append(gain_text(runs.difference(scene, method, "int8-float", "int8"), seeds))
        rows.append(row)
    head = [scene.title, "INT8 less FP32", *(["float less integer loss"] if both else [])]
    return Table(head, rows)


# ---- tuning


def _tuning(runs: Runs) -> Block:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in runs.content["tuning"]:
        key = (record["section"], record["data"], record["arithmetic"], record.get("rotate"))
        groups.setdefault(key, []).append(record)
    tables = [_tuning_table(key, records) for key, records in groups.items()]
    text = ["Settings that were tried, with their accuracies on held-out training samples, mean "
            "over the tuning's seeds; the one in bold was taken. The first is the recipe of the "
            "training command; factors are of the head's and the tail's rate (int8: of the share "
            "of weights that moves, and bits of the tail's update). Both losses of int8 take the "
            "settings found with the integer one."]  # fmt: skip
    if not tables:
        text = [RECIPES]
    return Block(
        f"Tuning record (preset {runs.preset})",
        text,
        runs.content["command"],
        tables,
        made=made_by(runs.content),
    )


def _tuning_table(key: tuple[Any, ...], records: list[Mapping[str, Any]]) -> Table:
    section, data, arithmetic, rotate = key
    rows: list[Row] = []
    for record in records:
        row: list[str | Cell] = [METHOD_TITLES[record["method"]]]
        for tried in record["tried"]:
            found = mean_of(tried["accuracies"])
            text = "not run" if found is None else f"{found.mean:.2f}"
            chosen = tried["name"] == record["chosen"]
            row.append(Cell(f"{tried['name']}: {text}", "best" if chosen else ""))
        rows.append(row)
    widest = max(len(row) for row in rows)
    turned = "" if rotate is None else f" turned {rotate:g}°"
    kind = "fine-tuning" if section.startswith("finetune") else "from scratch"
    precision = "FP32" if arithmetic == "fp32" else "INT8"
    caption = f"{DATA_TITLES.get(data, data)}{turned}, {precision}, {kind}"
    return Table(["held-out %", *([""] * (widest - 1))], rows, caption, folded=True)


# ---- what is not there


def missing(runs: Runs) -> list[str]:
    """A line for each group of planned runs that have no result, with the reasons."""
    groups: Counter[tuple[str, ...]] = Counter()
    for line in runs.content["missing"]:
        turned = "" if line.get("rotate") is None else f" turned {line['rotate']:g}°"
        name = DATA_TITLES.get(line["data"], line["data"])
        precision = ARITHMETIC_TITLES[line["arithmetic"]]
        groups[line["section"], f"{name}{turned}", precision, line["why"]] += 1
    return [
        f"preset {runs.preset}, {section}, {name}, {precision}: {count} "
        f"run{'s' * (count > 1)} ({why})"
        for (section, name, precision, why), count in groups.items()
    ]
