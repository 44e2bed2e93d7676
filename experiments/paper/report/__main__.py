"""Writes the study's results as one page: `python -m experiments.paper.report`.

Pictures and styles are inside: the page needs no other file and no network.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import tyro

from experiments.commands import RESULTS
from experiments.files import write_text
from experiments.paper.compare import read_studies
from experiments.paper.floors import Floor, floors
from experiments.paper.report.blocks import Cell, Kind, Row, Table
from experiments.paper.report.claims import claims
from experiments.paper.report.others import other_chapters
from experiments.paper.report.study import chapters, missing
from experiments.paper.ways import COMMAND as SAMPLES
from experiments.paper.ways import chapter, read_ways

HERE = Path(__file__).parent
COMMAND = "python -m experiments.paper.report"
KINDS: dict[str, Kind] = {"kept": "kept", "broken": "broken", "not measured": "unknown"}


@dataclass(frozen=True)
class ReportConfig:
    """One page of all results that are there; what is missing is named."""

    results: Path = RESULTS
    """Folder of the results."""
    out: Path = Path("docs/report/index.html")
    """The page."""


def floor_table(found: Sequence[Floor]) -> Table:
    rows: list[Row] = [
        [f.promise, f.of, f.measured, Cell(f.status, KINDS[f.status])] for f in found
    ]
    caption = (
        "Of ElasticZO, the better of ZO-Feat-Cls2 and ZO-Feat-Cls1, from scratch: points of test "
        "accuracy, mean ± standard error of the differences seed by seed."
    )
    return Table(["floor", "of", "measured", "status"], rows, caption)


def page(results: Path) -> str:
    """The text of the page."""
    studies = read_studies(results)
    others, absent = other_chapters(results)
    for preset in ("cpu", "gpu"):
        if all(runs.preset != preset for runs in studies):
            absent.append(
                f"Study, preset {preset}: python -m experiments.paper --preset {preset} "
                "--data-dir DIR"
            )
    ways = read_ways(results)
    if ways is None:
        absent.append(f"Study, preset samples: {SAMPLES}")
    samples = [] if ways is None else [chapter(ways)]
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(
        command=COMMAND,
        style=(HERE / "page.css").read_text(),
        claims=claims(studies, results),
        floors=floor_table(floors(studies, results)),
        chapters=samples + [part for runs in studies for part in chapters(runs)] + others,
        absent=absent,
        missing=[
            line
            for runs in [*studies, *([] if ways is None else [ways.samples])]
            for line in missing(runs)
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """2 where the folder of the results is not there or a file is damaged."""
    config = tyro.cli(ReportConfig, args=arguments, prog=COMMAND)
    try:
        if not config.results.is_dir():
            raise ValueError(f"results must be a folder, got {config.results}")
        write_text(config.out, page(config.results))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
