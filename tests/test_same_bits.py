"""The short form of `tests.same_bits`: what must agree on any machine, from one run to another.

That a change of the code keeps the bits of floats is asked on one machine, by the whole script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.same_bits import INT8_NETS, MODELS, Parts, run_float, run_int8

STEPS = 3
# Integers are the same everywhere: (network, tail) -> weights, records of the log.
INT8_BITS: dict[tuple[str, Any], tuple[str, str]] = {
    ("small_net", 0): ("30447f7f9692fe76", "61f39e2936759e17"),
    ("small_net", 1): ("b74a2e56aa6bf09b", "529354cbc42a4343"),
    ("small_net", "all"): ("d7acbd68fc47936c", "bc1ee6a6440f5d43"),
    ("point_net", 0): ("e457c8bb3d99235f", "afef0aae10083afb"),
    ("point_net", 1): ("ec34d9a563e4622f", "7b29cd20430a2049"),
    ("point_net", "all"): ("3b2dad0d7e68a2bb", "bc1ee6a6440f5d43"),
}


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize(
    ("name", "pairing"), [(name, case.pairings[0]) for name, case in MODELS.items()]
)
def test_deferred_captured_and_replayed_runs_have_the_bits_of_the_plain_one(
    name: str, pairing: str, tmp_path: Path
) -> None:
    plain, *others = [
        _run(name, pairing, form, tmp_path) for form in ("at once", "deferred", "captured")
    ]
    for other in others:
        if "refused" in other:
            assert "draws from torch's generator" in other["refused"]
            continue
        assert {k: other[k] for k in ("weights", "tail", "losses", "log", "replayed")} == {
            k: plain[k] for k in ("weights", "tail", "losses", "log", "replayed")
        }


def _run(name: str, pairing: str, form: str, folder: Path) -> Parts:
    here = folder / form.replace(" ", "_")
    here.mkdir()
    return run_float(MODELS[name], pairing, form, STEPS, here)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize("tail", [0, 1, "all"])
@pytest.mark.parametrize("name", list(INT8_NETS))
def test_integer_runs_have_the_bits_that_are_stored(
    name: str, tail: Any, pairing: str, backend: str, tmp_path: Path
) -> None:
    pytest.importorskip(backend if backend != "reference" else "torch")
    parts = run_int8(name, pairing, tail, STEPS, tmp_path, backend)
    assert (parts["weights"], parts["log"]) == INT8_BITS[name, tail]
