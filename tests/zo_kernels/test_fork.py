"""Ops that work in threads finish in a forked child, whose parent's threads are not there."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, and compared by numpy: an operator that torch divides among its OpenMP
# threads would hang in the child, whatever it is.
SCRIPT = """
import multiprocessing, sys
import numpy as np, torch
from zo_kernels import int8_paired_linear, perturbed_weights
from zo_kernels.cpu import int8_products, sweeps

torch.set_num_threads(2)
rng = np.random.default_rng(0)
x, w = (rng.integers(-127, 128, shape, dtype=np.int8) for shape in ((4096, 256), (64, 256)))
expected = x.astype(np.int32) @ w.astype(np.int32).T
assert expected.size * 256 >= int8_products.PARALLEL_FROM  # else no thread takes part
weight = torch.zeros(sweeps.PARALLEL_FROM)
key, eps = torch.tensor([3, 5]), torch.tensor(1.0, dtype=torch.float64)

def check():
    given = (torch.from_numpy(x), torch.from_numpy(w))
    found, _ = int8_paired_linear(*given, None, start=0, stop=1, backend="numba")
    assert np.array_equal(found.numpy(), expected)
    return perturbed_weights(weight, key, eps, tensor=0, backend="numba").numpy()

def child(before):
    assert sweeps.pool_of.cache_info().currsize == 0
    assert np.array_equal(check(), before)
    assert sweeps.pool_of.cache_info().currsize == 1  # threads of its own

before = check()
assert sweeps.pool_of.cache_info().currsize == 1
process = multiprocessing.get_context("fork").Process(target=child, args=(before,))
process.start()
process.join(60)
if process.exitcode is None:
    process.kill()
    sys.exit("the child hangs")
sys.exit(process.exitcode)
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_finishes() -> None:
    pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
