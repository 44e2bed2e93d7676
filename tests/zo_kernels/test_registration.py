"""The ops as torch sees them: schemas, fakes, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zo_kernels._weights import FEW, f64
from zo_kernels import perturb_, perturbed_weights, sample, update_


def scalars(device: Any) -> tuple[Tensor, Tensor]:
    return torch.tensor([3, 4], device=device), f64(0.125, device)


def op(name: str) -> Any:
    return getattr(torch.ops.zo_kernels, name).default


@pytest.mark.parametrize("kind", ["normal", "rademacher", "sparse_int8", "bits"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (4, 3, 2, 2)], ids=str)
def test_opcheck_sample(shape: Any, kind: str, backend: str, device: Any) -> None:
    key, _ = scalars(device)
    args = ([*shape], key, 2, 1, kind, "noise", 0.25, 7, 3, backend)
    torch.library.opcheck(op("sample"), args)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["same", "bf16"])
@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_opcheck_perturbed_weights(
    make: Any, dtype: torch.dtype | None, backend: str, device: Any
) -> None:
    """The fake's strides are the real ones for every memory format."""
    key, eps = scalars(device)
    for start, stop in ((0, 2), (1, 4)):
        w = make(torch.float32, device)
        args = (w, key, eps, 2, start, stop, "normal", 0.5, dtype, backend)
        torch.library.opcheck(op("perturbed_weights"), args)


@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_opcheck_perturb_(make: Any, backend: str, device: Any) -> None:
    key, alpha = scalars(device)
    w = make(torch.float32, device)
    torch.library.opcheck(op("perturb_"), (w, key, alpha, 2, 1, "rademacher", backend))


def test_opcheck_update_(backend: str, device: Any) -> None:
    key, one = scalars(device)
    dtypes = [torch.float32, torch.bfloat16, torch.float64] * 2
    params = [make(d, device) for make, d in zip(FEW.values(), dtypes, strict=True)]
    vector = one.expand(2).contiguous()
    skip = torch.zeros((), device=device)
    rest = ([*range(6)], [0, 1] * 3, [1.0] * 6, "normal", "sgd", [], None, backend)
    torch.library.opcheck(op("update_"), (params, key, vector, vector, vector, skip, *rest))


def a_step(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A layer's pair and its update: what a compiled training step contains."""

    def step(x: Tensor, w: Tensor, key: Tensor, eps: Tensor, lr: Tensor, skip: Tensor) -> Any:
        halves = perturbed_weights(w, key, eps, tensor=1, backend=backend)
        y = torch.stack([F.linear(x, halves[0]), F.linear(x, halves[1])]).relu()
        losses = y.square().mean((1, 2))
        coeff = ((losses[0] - losses[1]).double() / (2 * eps)).reshape(1)
        perturb_(w, key, eps, tensor=2, noise="rademacher", backend=backend)
        update_(
            [w], key, coeff, lr, lr, skip, tensors=[1], groups=[0], scales=[1.0], backend=backend
        )
        return losses, y + sample((9,), key, tensor=3, backend=backend)

    return step


def arguments(device: Any) -> list[Tensor]:
    torch.manual_seed(5)
    x, w = torch.randn(6, 17, device=device), torch.randn(9, 17, device=device)
    key, eps = scalars(device)
    return [x, w, key, eps, f64([0.01], device), torch.zeros((), device=device)]


def check_compiled(compiler: str, backend: str, device: Any) -> None:
    """Values and the changed weight equal eager's, for several steps without recompiling."""
    torch._dynamo.reset()
    step = a_step(backend)
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    eager_args, compiled_args = arguments(device), arguments(device)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            want, got = step(*eager_args), compiled(*compiled_args)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(compiled_args[1], eager_args[1])
            for args in (eager_args, compiled_args):
                args[2] = args[2] + torch.tensor([0, 1], device=device)
    assert not torch.equal(eager_args[1], arguments(device)[1])


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    check_compiled("aot_eager", backend, device)


@pytest.mark.slow
def test_compiles_with_inductor(device: Any) -> None:
    check_compiled("inductor", "auto", device)
