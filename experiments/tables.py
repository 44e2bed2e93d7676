"""The README's tables, made from the committed results: `python -m experiments.tables`.

Text between `<!-- NAME -->` and `<!-- /NAME -->` is written anew; `--check` only says whether it is
what the results give.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
README = ROOT / "README.md"
NAMES = {
    "full-zo": ("Full ZO", "nothing"),
    "frozen-cls2": ("control: last FC on a frozen random head", "last FC"),
    "cls2": ("**ZO-Feat-Cls2**", "last FC"),
    "frozen-cls1": ("control: last two FC on a frozen random head", "last two FC"),
    "cls1": ("**ZO-Feat-Cls1**", "last two FC"),
    "full-bp": ("Full BP", "everything"),
}


@dataclass(frozen=True)
class Config:
    """Write the README's tables from experiments/results."""

    check: bool = False
    """Change nothing; exit with 1 where the README differs."""


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def accuracy_table() -> str:
    """Test accuracy on MNIST, mean and standard error over the seeds."""
    methods = _read("accuracy_mnist.json")["methods"]
    lines = ["| method | backpropagation trains | test accuracy |", "|---|---|---|"]
    for key, (title, trained) in NAMES.items():
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


TABLES: dict[str, Callable[[], str]] = {"accuracy": accuracy_table, "cost": cost_table}


def render(text: str) -> str:
    """The README with all tables as the results give them."""
    for name, table in TABLES.items():
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        if found is None:
            raise ValueError(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
        text = f"{text[: found.start(1)]}{table()}\n{text[found.end(1) :]}"
    return text


def main(config: Config) -> int:
    before = README.read_text()
    after = render(before)
    if config.check:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
