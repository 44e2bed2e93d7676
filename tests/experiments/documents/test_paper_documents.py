"""The study's tables in the documents."""

from __future__ import annotations

import re
from pathlib import Path

from experiments.documents import tables as documents
from experiments.paper.compare import read_studies
from tests.experiments.paper.paper_results import write_study


def test_tables_of_the_documents(tmp_path: Path) -> None:
    assert documents.accuracies(tmp_path) == documents.NOTHING
    write_study(tmp_path, ran=lambda c: c.section in ("tuning", "grid"))
    lines = documents.accuracies(tmp_path).splitlines()
    assert lines[0] == "| method | backpropagation trains | LeNet-5, Digits |"
    assert lines[-2] == "| **ZO-Feat-Cls1** | last two FC | 96.10 ± 0.10 |"
    integers = documents.integers(tmp_path).splitlines()
    assert integers[-2] == "| **ZO-Feat-Cls1** | last two FC | 95.60 ± 0.10 (-0.50) |"
    assert "Cls1 over Full ZO | +18.10 ± 0.06" in documents.scenes(tmp_path, turned=False)
    assert documents.scenes(tmp_path, turned=True) == documents.NOTHING  # nothing was fine-tuned
    assert "| over Full ZO: at least 5.2 points | Digits, FP32 |" in documents.kept(tmp_path)
    assert "+18.1 to +18.1 points" in documents.claimed(tmp_path)


def test_paper_numbers_are_the_abstracts(tmp_path: Path) -> None:
    found = re.findall(r"\| ([^|]*) \| [^|]* \|$", documents.claimed(tmp_path), re.MULTILINE)
    assert found[1:] == [
        "+5.2 to +9.5 points",
        "+5.2 to +9.5 points",
        "0.072 to 1.7 %",
        "1.46 to 1.60x",
        "1.38 to 1.42x",
    ]


def test_studies_that_are_there(tmp_path: Path) -> None:
    assert read_studies(tmp_path) == []
    write_study(tmp_path)
    assert [found.preset for found in read_studies(tmp_path)] == ["cpu"]
