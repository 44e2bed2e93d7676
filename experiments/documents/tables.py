"""The documents' tables, made from the committed results: `python -m experiments.documents.tables`.

Text between `<!-- NAME -->` and `<!-- /NAME -->` in README.md and docs/results.md is written anew;
`--check` only says whether it is what the results give.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.documents import int8_tables
from experiments.files import write_text
from experiments.paper import documents

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
README = ROOT / "README.md"
STUDY = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Config:
    """Write the tables of README.md and docs/results.md from experiments/results."""

    check: bool = False
    """Change nothing; exit with 1 where a document differs."""


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def accuracy_table() -> str:
    """Test accuracy on MNIST, mean and standard error over the seeds."""
    methods = _read("accuracy_mnist.json")["methods"]
    lines = ["| method | backpropagation trains | test accuracy |", "|---|---|---|"]
    for key, (title, trained) in documents.NAMES.items():
        row = methods[key]
        value = f"{row['mean']:.2f} ± {row['standard_error']:.2f} %"
        lines.append(f"| {title} | {trained} | {value} |")
    return "\n".join(lines)


def cost_table() -> str:
    """A whole step on the CPU against two plain forwards."""
    batches = _read("step_cpu.json")["batches"]
    lines = [
        "| batch | two plain forwards | ElasticZO step | MeZO-style step |",
        "|---|---|---|---|",
    ]
    for batch, row in batches.items():
        lines.append(
            f"| {batch} | {row['two_forwards_ms']:.2f} ms "
            f"| {row['elasticzo_step_over_two_forwards']:.2f}x "
            f"| {row['mezo_style_step_over_two_forwards']:.2f}x |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy_table,
    "cost": cost_table,
    "int8": lambda: int8_tables.accuracy(RESULTS),
    "int8-cost": lambda: int8_tables.cost(RESULTS),
    "paper": lambda: documents.accuracies(RESULTS),
    "paper-int8": lambda: documents.integers(RESULTS),
    "claims": lambda: documents.claimed(RESULTS),
    "floors": lambda: documents.kept(RESULTS),
    "scratch": lambda: documents.scenes(RESULTS, turned=False),
    "finetune": lambda: documents.scenes(RESULTS, turned=True),
    "int8-gap": lambda: documents.gaps(RESULTS),
}
# What each document must have; further tables are written where they are.
DOCUMENTS: Mapping[Path, tuple[str, ...]] = {
    README: ("paper", "cost", "paper-int8", "int8-cost"),
    STUDY: ("claims", "floors", "scratch", "finetune", "int8-gap", "accuracy", "int8"),
}


def render(text: str, document: Path = README) -> str:
    """A document with all its tables as the results give them."""
    for name in DOCUMENTS[document]:
        if f"<!-- {name} -->" not in text:
            raise ValueError(f"{document.name} has no <!-- {name} --> ... <!-- /{name} -->")
    for name, table in TABLES.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        if found is not None:
            text = f"{text[: found.start(1)]}{table()}\n{text[found.end(1) :]}"
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
