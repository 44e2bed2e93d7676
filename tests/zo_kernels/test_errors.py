"""Every message of a public function: what was expected, and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from zo_kernels import perturb_, perturbed_weights, resolve_backend, sample, update_
from zo_kernels import registry as lib

KEY = torch.tensor([1, 2])
EPS = torch.tensor(0.1, dtype=torch.float64)
VECTOR = torch.ones(2, dtype=torch.float64)
SKIP = torch.zeros(())
META = torch.zeros(3, 4, device="meta")
HUGE = torch.zeros(1, device="meta").as_strided((2**20, 2**15), (2**15, 1))


def call_sample(shape: Any = (3, 4), key: Any = KEY, **kwargs: Any) -> Any:
    return sample(shape, key, **{"tensor": 0} | kwargs)


def call_perturbed(w: Any = None, key: Any = KEY, eps: Any = EPS, **kwargs: Any) -> Any:
    w = torch.zeros(3, 4) if w is None else w
    return perturbed_weights(w, key, eps, **{"tensor": 0} | kwargs)


def call_perturb(w: Any = None, key: Any = KEY, alpha: Any = EPS, **kwargs: Any) -> Any:
    w = torch.zeros(3, 4) if w is None else w
    return perturb_(w, key, alpha, **{"tensor": 0} | kwargs)


def call_update(w: Any = None, **kwargs: Any) -> Any:
    w = torch.zeros(3, 4) if w is None else w
    args = {"key": KEY, "coeff": VECTOR, "lr": VECTOR, "weight_decay": VECTOR, "skip": SKIP}
    args |= {"tensors": [0], "groups": [0], "scales": [1.0]}
    return update_([w], **args | kwargs)


def strided() -> torch.Tensor:
    return torch.ones(4, dtype=torch.float64)[::2]


GAPS = "must be one-dimensional and contiguous, got shape [2] with strides [2]"
GROUPS = "a tensor may have at most 2^32 groups of noise, got 8589934592 for shape "
CASES: dict[str, tuple[Any, type[Exception], str]] = {
    # sample
    "key-type": (lambda: call_sample(key=[1, 2]), TypeError, "key must be a Tensor, got list"),
    "key-shape": (
        lambda: call_sample(key=KEY[:1]),
        ValueError,
        "key must have shape [2], got [1]",
    ),
    "key-dtype": (
        lambda: call_sample(key=KEY.int()),
        TypeError,
        "key must be torch.int64, got torch.int32",
    ),
    "key-gaps": (
        lambda: call_sample(key=torch.tensor([[1, 0], [2, 0]])[:, 0]),
        ValueError,
        f"key {GAPS}",
    ),
    "noise": (
        lambda: call_sample(noise="gauss"),
        ValueError,
        "noise must be one of ('normal', 'rademacher', 'sparse_int8', 'bits'), got 'gauss'",
    ),
    "tensor-negative": (
        lambda: call_sample(tensor=-1),
        ValueError,
        "tensor index must be in [0, 2^32), got -1",
    ),
    "tensor-large": (
        lambda: call_sample(tensor=2**32),
        ValueError,
        "tensor index must be in [0, 2^32), got 4294967296",
    ),
    "query-negative": (
        lambda: call_sample(query=-1),
        ValueError,
        "query must be in [0, 2^24), got -1",
    ),
    "query-large": (
        lambda: call_sample(query=2**24),
        ValueError,
        "query must be in [0, 2^24), got 16777216",
    ),
    "purpose": (
        lambda: call_sample(purpose="fun"),
        ValueError,
        "purpose must be one of ('noise', 'rounding', 'dropout', 'data', 'left', 'right', "
        "'sample_left', 'sample_right', 'node'), got 'fun'",
    ),
    "p_zero-negative": (
        lambda: call_sample(p_zero=-0.1),
        ValueError,
        "p_zero must be in [0, 1), got -0.1",
    ),
    "p_zero-one": (
        lambda: call_sample(p_zero=1.0),
        ValueError,
        "p_zero must be in [0, 1), got 1.0",
    ),
    "r_max-zero": (lambda: call_sample(r_max=0), ValueError, "r_max must be in [1, 127], got 0"),
    "r_max-large": (
        lambda: call_sample(r_max=128),
        ValueError,
        "r_max must be in [1, 127], got 128",
    ),
    "sample-groups": (
        lambda: call_sample(shape=(2**20, 2**15)),
        ValueError,
        f"{GROUPS}[1048576, 32768]",
    ),
    "backend": (
        lambda: call_sample(backend="cuda"),
        ValueError,
        "backend must be one of ('auto', 'triton', 'numba', 'reference'), got 'cuda'",
    ),
    "numba-device": (
        lambda: resolve_backend("numba", "cuda"),
        ValueError,
        "backend 'numba' needs CPU tensors, got cuda ones",
    ),
    # perturbed_weights
    "w-type": (lambda: call_perturbed(w=3.0), TypeError, "w must be a Tensor, got float"),
    "w-dtype": (
        lambda: call_perturbed(w=torch.zeros(3, dtype=torch.float16)),
        TypeError,
        "w must be torch.float32 or torch.float64 or torch.bfloat16, got torch.float16",
    ),
    "w-device": (lambda: call_perturbed(w=META), ValueError, "key must be on meta, got cpu"),
    "eps-device": (
        lambda: call_perturbed(w=META, key=KEY.to("meta")),
        ValueError,
        "eps must be on meta, got cpu",
    ),
    "eps-shape": (
        lambda: call_perturbed(eps=VECTOR),
        ValueError,
        "eps must have shape [], got [2]",
    ),
    "eps-dtype": (
        lambda: call_perturbed(eps=EPS.float()),
        TypeError,
        "eps must be torch.float64, got torch.float32",
    ),
    "weights-noise": (
        lambda: call_perturbed(noise="bits"),
        ValueError,
        "noise must be one of ('normal', 'rademacher'), got 'bits'",
    ),
    "halves-empty": (
        lambda: call_perturbed(start=2, stop=2),
        ValueError,
        "halves need 0 <= start < stop, got start=2, stop=2",
    ),
    "halves-negative": (
        lambda: call_perturbed(start=-1),
        ValueError,
        "halves need 0 <= start < stop, got start=-1, stop=2",
    ),
    "halves-stop": (
        lambda: call_perturbed(start=0, stop=-4),
        ValueError,
        "halves need 0 <= start < stop, got start=0, stop=-4",
    ),
    "halves-query": (
        lambda: call_perturbed(start=2**25, stop=2**25 + 1),
        ValueError,
        "query must be in [0, 2^24), got 16777216",
    ),
    "out-dtype": (
        lambda: call_perturbed(dtype=torch.int8),
        TypeError,
        "dtype must be one of (torch.float32, torch.float64, torch.bfloat16, torch.float16), got "
        "torch.int8",
    ),
    "weights-groups": (
        lambda: call_perturbed(w=HUGE, key=KEY.to("meta"), eps=EPS.to("meta")),
        ValueError,
        f"{GROUPS}[1048576, 32768]",
    ),
    # perturb_
    "alpha-shape": (
        lambda: call_perturb(alpha=VECTOR),
        ValueError,
        "alpha must have shape [], got [2]",
    ),
    "alpha-dtype": (
        lambda: call_perturb(alpha=EPS.float()),
        TypeError,
        "alpha must be torch.float64, got torch.float32",
    ),
    "perturb-grad": (
        lambda: call_perturb(w=torch.zeros(3, requires_grad=True)),
        RuntimeError,
        "w is changed in place and requires grad: call under torch.no_grad()",
    ),
    "perturb-expanded": (
        lambda: call_perturb(w=torch.zeros(1, 4).expand(3, 4)),
        ValueError,
        "w is changed in place and must not be expanded, got shape [3, 4] with strides [0, 1]",
    ),
    "perturb-query": (
        lambda: call_perturb(query=2**24),
        ValueError,
        "query must be in [0, 2^24), got 16777216",
    ),
    # update_
    "lengths": (
        lambda: call_update(groups=[0, 0]),
        ValueError,
        "params, tensors, groups and scales must have one length, got 1, 1, 2, 1",
    ),
    "coeff-dtype": (
        lambda: call_update(coeff=VECTOR.float()),
        TypeError,
        "coeff must be torch.float64, got torch.float32",
    ),
    "coeff-ndim": (
        lambda: call_update(coeff=EPS),
        ValueError,
        "coeff must be one-dimensional and contiguous, got shape [] with strides []",
    ),
    "coeff-gaps": (lambda: call_update(coeff=strided()), ValueError, f"coeff {GAPS}"),
    "coeff-empty": (
        lambda: call_update(coeff=VECTOR[:0]),
        ValueError,
        "coeff must have at least one query, got none",
    ),
    "lr-gaps": (lambda: call_update(lr=strided()), ValueError, f"lr {GAPS}"),
    "decay-gaps": (
        lambda: call_update(weight_decay=strided()),
        ValueError,
        f"weight_decay {GAPS}",
    ),
    "decay-shape": (
        lambda: call_update(weight_decay=VECTOR[:1]),
        ValueError,
        "weight_decay must have shape [2], got [1]",
    ),
    "skip-shape": (
        lambda: call_update(skip=torch.zeros(1)),
        ValueError,
        "skip must have shape [], got [1]",
    ),
    "skip-dtype": (
        lambda: call_update(skip=torch.zeros((), dtype=torch.bool)),
        TypeError,
        "skip must be torch.float32, got torch.bool",
    ),
    "param-dtype": (
        lambda: call_update(w=torch.zeros(3, dtype=torch.int8)),
        TypeError,
        "params[0] must be torch.float32 or torch.float64 or torch.bfloat16, got torch.int8",
    ),
    "param-device": (lambda: call_update(w=META), ValueError, "params[0] must be on cpu, got meta"),
    "update-grad": (
        lambda: call_update(w=torch.zeros(3, requires_grad=True)),
        RuntimeError,
        "params[0] is changed in place and requires grad: call under torch.no_grad()",
    ),
    "update-expanded": (
        lambda: call_update(w=torch.zeros(3, 1).expand(3, 4)),
        ValueError,
        "params[0] is changed in place and must not be expanded, got shape [3, 4] with strides "
        "[1, 0]",
    ),
    "update-tensor": (
        lambda: call_update(tensors=[-3]),
        ValueError,
        "tensor index must be in [0, 2^32), got -3",
    ),
    "group": (lambda: call_update(groups=[2]), ValueError, "groups[0] must be in [0, 2), got 2"),
    "group-negative": (
        lambda: call_update(groups=[-1]),
        ValueError,
        "groups[0] must be in [0, 2), got -1",
    ),
    "update-noise": (
        lambda: call_update(noise="sparse_int8"),
        ValueError,
        "noise must be one of ('normal', 'rademacher'), got 'sparse_int8'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_message(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_in_place_under_no_grad_is_allowed() -> None:
    w = torch.zeros(3, 4, requires_grad=True)
    with torch.no_grad():
        call_perturb(w=w)
        call_update(w=w)
    assert w.count_nonzero() == w.numel()


ABSENT = {
    "triton": (
        {"has_triton": lambda: False},
        "triton",
        "backend 'triton' needs the triton package (Linux); it is not installed",
    ),
    "cpu-tensors": (
        {"has_triton": lambda: True, "interpreted": lambda: False},
        "triton",
        "backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got cpu ones",
    ),
    "numba": (
        {"has_numba": lambda: False},
        "numba",
        "backend 'numba' needs the numba package: pip install elasticzo[cpu]",
    ),
}


@pytest.mark.parametrize(("patches", "backend", "message"), ABSENT.values(), ids=ABSENT)
def test_a_forced_backend_is_never_replaced(
    patches: dict[str, Any], backend: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in patches.items():
        monkeypatch.setattr(lib, name, value)
    lib._resolve.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            resolve_backend(backend, "cpu")
    finally:
        lib._resolve.cache_clear()


def test_auto_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "has_triton", lambda: True)
    lib._resolve.cache_clear()
    try:
        assert resolve_backend("auto", "cuda") == "triton"
        assert resolve_backend("auto", "cpu") == ("numba" if lib.has_numba() else "reference")
        monkeypatch.setattr(lib, "has_numba", lambda: False)
        lib._resolve.cache_clear()
        assert resolve_backend("auto", "cpu") == "reference"
    finally:
        lib._resolve.cache_clear()
