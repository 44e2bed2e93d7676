"""The documents' tables are what the committed results give."""

from __future__ import annotations

import pytest

from experiments.documents.tables import DOCUMENTS, README, STUDY, Config, main, render


def test_the_documents_show_the_committed_results() -> None:
    assert main(Config(check=True)) == 0, "run: python -m experiments.documents.tables"


def test_a_number_typed_by_hand_is_found() -> None:
    text = README.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 256 | Full ZO"))
    assert render(text.replace(row, row.replace("x |", "9x |", 1))) == text


def test_a_missing_table_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"README.md has no <!-- samples -->"):
        render("nothing")
    with pytest.raises(ValueError, match=r"results.md has no <!-- samples -->"):
        render("nothing", STUDY)
    with pytest.raises(ValueError, match=r"README.md: <!-- cost --> has no <!-- /cost -->"):
        render("".join(f"<!-- {name} -->" for name in DOCUMENTS[README]))
