"""The documents' tables, made from the committed results: `python -m experiments.documents.tables`.

Text between `<!-- NAME -->` and `<!-- /NAME -->` in README.md and docs/results.md is written anew;
`--check` only says whether it is what the results give.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import tyro

from experiments.commands import RESULTS
from experiments.files import read_json, write_text
from experiments.paper.compare import MODEL_TITLES, Runs, Scene, accuracy_text, read_studies
from experiments.paper.floors import floors
from experiments.paper.report import measured
from experiments.paper.report.blocks import Table
from experiments.paper.report.claims import claims
from experiments.paper.report.study import accuracy_table, gain_table, integer_table
from experiments.paper.ways import COMMAND as SAMPLES
from experiments.paper.ways import promises, read_ways
from experiments.train.plots import standard_error

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
STUDY = ROOT / "docs" / "results.md"
# Title of a method, and what backpropagation trains.
NAMES: Mapping[str, tuple[str, str]] = {
    "full-zo": ("Full ZO", "nothing"),
    "frozen-cls2": ("control: last FC on a frozen random head", "last FC"),
    "cls2": ("**ZO-Feat-Cls2**", "last FC"),
    "frozen-cls1": ("control: last two FC on a frozen random head", "last two FC"),
    "cls1": ("**ZO-Feat-Cls1**", "last two FC"),
    "full-bp": ("Full BP", "everything"),
}
INT8_METHODS = ("full-zo", "cls2", "cls1", "full-bp")
NOTHING = "No results yet: `python -m experiments.paper --preset cpu --data-dir DIR`."


@dataclass(frozen=True)
class Config:
    """Write the tables of README.md and docs/results.md from experiments/results."""

    check: bool = False
    """Change nothing; exit with 1 where a document differs."""


def markdown(table: Table) -> str:
    """The table, and its caption below."""
    rows = [[v if isinstance(v, str) else v.text for v in row] for row in table.rows]
    lines = [f"| {' | '.join(row)} |" for row in (table.head, *rows)]
    lines.insert(1, "|---" * len(table.head) + "|")
    return "\n".join([*lines, "", table.caption] if table.caption else lines)


# ---- the study


def accuracies(results: Path) -> str:
    """FP32 from scratch: methods and data sets; mean and standard deviation."""
    return _by_data(results, "fp32")


def integers(results: Path) -> str:
    """INT8 with the integer loss from scratch; in brackets what it has over FP32, in points."""
    return _by_data(results, "int8")


def _by_data(results: Path, arithmetic: str) -> str:
    runs = _study(results)
    if runs is None:
        return NOTHING
    seeds = len(runs.content["seeds"])
    there = [s for s in runs.scenes if s.rotate is None and _any(runs, s, arithmetic)]
    rows = []
    for method in runs.methods:
        row = [*NAMES[method]]
        for scene in there:
            text = accuracy_text(runs.mean(scene, arithmetic, method), seeds)
            gap = runs.difference(scene, method, arithmetic, "fp32")
            if arithmetic != "fp32" and gap is not None:
                text += f" ({gap.mean:+.2f})"
            row.append(text)
        rows.append(row)
    titles = [f"{MODEL_TITLES.get(s.model, s.model)}, {s.title}" for s in there]
    return markdown(Table(["method", "backpropagation trains", *titles], rows))


def scenes(results: Path, turned: bool) -> str:
    """Accuracies and gains of every data set, from scratch or fine-tuned."""
    runs = _study(results)
    if runs is None:
        return NOTHING
    parts = []
    for scene in runs.scenes:
        if (scene.rotate is not None) == turned and _any(runs, scene):
            parts.append(f"#### {MODEL_TITLES.get(scene.model, scene.model)}, {scene.title}")
            parts += [markdown(accuracy_table(runs, scene)), markdown(gain_table(runs, scene))]
    return "\n\n".join(parts) or NOTHING


def gaps(results: Path) -> str:
    """INT8 less FP32, and the float loss less the integer one."""
    runs = _study(results)
    if runs is None:
        return NOTHING
    there = [scene for scene in runs.scenes if _any(runs, scene, "int8")]
    tables = [markdown(integer_table(runs, scene)) for scene in there]
    return "\n\n".join(tables) or NOTHING


def claimed(results: Path) -> str:
    """The abstract's figures and ours."""
    return markdown(claims(read_studies(results), results))


def kept(results: Path) -> str:
    """The floors and what came of them."""
    rows = [[f.promise, f.of, f.measured, f.status] for f in floors(read_studies(results), results)]
    return markdown(Table(["floor", "of", "measured", "status"], rows))


def _study(results: Path) -> Runs | None:
    """The study on the CPU: what a reader can repeat."""
    return next((runs for runs in read_studies(results) if runs.preset == "cpu"), None)


def _any(runs: Runs, scene: Scene, arithmetic: str | None = None) -> bool:
    """Whether anything of it has run."""
    chosen = runs.arithmetics if arithmetic is None else [arithmetic]
    return any(runs.rows(scene, a, m) for a in chosen for m in runs.methods)


def samples(results: Path, gains: bool = False) -> str:
    """What learns from every sample beside the paper's method, from scratch."""
    ways = read_ways(results)
    if ways is None:
        return f"No results yet: `{SAMPLES}`."
    return markdown((ways.gain_table if gains else ways.accuracy_table)(turned=False))


def samples_promises(results: Path) -> str:
    """What it is to reach, and what came of it."""
    ways = read_ways(results)
    return f"No results yet: `{SAMPLES}`." if ways is None else markdown(promises(ways))


def samples_turned(results: Path) -> str:
    """The same of fine-tuning on turned images."""
    ways = read_ways(results)
    if ways is None or not ways.titles(turned=True)[0]:
        return f"No results yet: `{SAMPLES}`."
    return "\n\n".join(markdown(t(turned=True)) for t in (ways.accuracy_table, ways.gain_table))


# ---- other results


def _spread(values: list[float], text: str = "{:.2f}") -> str:
    """Mean and standard error."""
    return f"{text.format(mean(values))} ± {standard_error(values):.2f}"


def accuracy(results: Path) -> str:
    """Test accuracy on MNIST, over the seeds."""
    methods = read_json(results / "accuracy_mnist.json")["methods"]
    rows = [[*names, f"{_spread(methods[m]['accuracies'])} %"] for m, names in NAMES.items()]
    return markdown(Table(["method", "backpropagation trains", "test accuracy"], rows))


def int8_accuracy(results: Path) -> str:
    """FP32 and INT8 over the seeds that both have, and their difference seed by seed."""
    head, rows = ["method"], {method: [_int8_title(method)] for method in INT8_METHODS}
    for name, title in (("mnist", "MNIST"), ("fashion_mnist", "Fashion-MNIST")):
        floats, integers = (
            read_json(results / f"accuracy_{name}{end}.json")["methods"] for end in ("", "_int8")
        )
        head += [f"{title}, FP32", "INT8", "difference"]
        for method, row in rows.items():
            ours = integers[method]["accuracies"]
            theirs = floats[method]["accuracies"][: len(ours)]
            gap = [a - b for a, b in zip(ours, theirs, strict=True)]
            row += [f"{_spread(theirs)} %", f"{_spread(ours)} %", _spread(gap, "{:+.2f}")]
    return markdown(Table(head, list(rows.values())))


def _int8_title(method: str) -> str:
    return NAMES[method][0] + " (NITI)" * (method == "full-bp")


def cost(results: Path) -> str:
    """A whole step on the CPU against two plain forwards."""
    (table,) = measured.step_cpu(read_json(results / "step_cpu.json"))
    return markdown(table)


def int8_cost(results: Path) -> str:
    """A step on the CPU: time and peak memory of FP32 over INT8."""
    content = read_json(results / "int8_step_cpu.json")
    smaller = {
        (row["batch"], row["method"]): f"{row['ratio']:.2f}x"
        for row in content["memory"]
        if row["pairing"] == "stacked"
    }
    rows = [
        [
            str(row["batch"]),
            NAMES[row["method"]][0],
            *(f"{row[kind]['us'] / 1000:.2f} ms" for kind in ("fp32", "int8")),
            f"{row['speedup']['median']:.2f}x",
            smaller[row["batch"], row["method"]],
        ]
        for row in content["time"]
    ]
    return markdown(Table(["batch", "method", "FP32", "INT8", "faster", "smaller (peak)"], rows))


# ---- the documents

TABLES: Mapping[str, Callable[[Path], str]] = {
    "accuracy": accuracy,
    "cost": cost,
    "int8": int8_accuracy,
    "int8-cost": int8_cost,
    "paper": accuracies,
    "paper-int8": integers,
    "samples": samples,
    "samples-gains": partial(samples, gains=True),
    "samples-turned": samples_turned,
    "samples-promises": samples_promises,
    "claims": claimed,
    "floors": kept,
    "scratch": partial(scenes, turned=False),
    "finetune": partial(scenes, turned=True),
    "int8-gap": gaps,
}
# What each document must have; further tables are written where they are.
DOCUMENTS: Mapping[Path, tuple[str, ...]] = {
    README: ("samples", "paper", "cost", "paper-int8", "int8-cost"),
    STUDY: (
        "samples",
        "samples-promises",
        "samples-gains",
        "samples-turned",
        "claims",
        "floors",
        "scratch",
        "finetune",
        "int8-gap",
        "accuracy",
        "int8",
    ),
}


def render(text: str, document: Path = README) -> str:
    """A document with all its tables as the results give them."""
    for name in DOCUMENTS[document]:
        if f"<!-- {name} -->" not in text:
            raise ValueError(f"{document.name} has no <!-- {name} --> ... <!-- /{name} -->")
    for name, table in TABLES.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        if found is not None:
            text = f"{text[: found.start(1)]}{table(RESULTS)}\n{text[found.end(1) :]}"
        elif f"<!-- {name} -->" in text:
            raise ValueError(f"{document.name}: <!-- {name} --> has no <!-- /{name} -->")
    return text


def main(config: Config) -> int:
    differs = False
    for document in DOCUMENTS:
        before = document.read_text()
        after = render(before, document)
        differs |= before != after
        if not config.check:
            write_text(document, after)
    return int(config.check and differs)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
