"""The paper's formulas against arithmetic by hand (our reading of its memory model)."""

from __future__ import annotations

import pytest
import torch

from elasticzo.models import LeNet5
from experiments.studies.static_memory import sizes, static_bytes

P, A, ACC = 107_786, 18_058, 8_054  # of LeNet-5: parameters, and of a sample
FC3, FC2 = 84 * 10 + 10, 120 * 84 + 84


def test_counts_of_lenet() -> None:
    found = sizes(LeNet5(), torch.zeros(3, 1, 28, 28))
    assert sum(found.parameters.values()) == P
    assert found.activations == A == 2 * 4_704 + 1_176 + 2 * 3_136 + 784 + 2 * 120 + 2 * 84 + 10
    assert found.outputs == {"conv1": 4_704, "conv2": 3_136, "fc1": 120, "fc2": 84, "fc3": 10}
    assert sum(found.outputs.values()) == ACC


@pytest.mark.parametrize("batch", [1, 32, 256])
def test_formulas(batch: int) -> None:
    net, x = LeNet5(), torch.zeros(batch, 1, 28, 28)
    full = 4 * (P + A * batch)
    assert static_bytes(net, x, 0) == full
    assert static_bytes(net, x, 1) == full + 4 * (FC3 + 10 * batch)
    assert static_bytes(net, x, 2) == full + 4 * (FC3 + FC2 + 94 * batch)
    assert static_bytes(net, x, "all") == 2 * full
    assert static_bytes(net, x, 0, "int8") == P + A * batch + 4 * ACC * batch
    assert static_bytes(net, x, 1, "int8") is None  # the model says nothing


@pytest.mark.parametrize(("batch", "ratio"), [(32, 1.598), (256, 1.458)])
def test_ratios(batch: int, ratio: float) -> None:
    net, x = LeNet5(), torch.zeros(batch, 1, 28, 28)
    full, int8 = static_bytes(net, x, 0), static_bytes(net, x, 0, "int8")
    assert full is not None and int8 is not None
    assert round(full / int8, 3) == ratio


def test_what_the_tail_adds() -> None:
    net, x = LeNet5(), torch.zeros(256, 1, 28, 28)
    full, tail = static_bytes(net, x, 0), static_bytes(net, x, 1)
    assert full is not None and tail is not None
    assert round(100 * (tail / full - 1), 4) == 0.0721
