"""What went wrong silently once, or nearly: sequences, tied and swapped weights, failed steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elasticzo.losses
from elasticzo import ZOSGD, ElasticZO, capture_step, pair_losses
from elasticzo.forward.layers import weights
from elasticzo.forward.precision import precision_of, vendor_precision

X, Y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


def test_a_sequence_may_use_a_module_twice() -> None:
    relu = nn.ReLU()
    model = ElasticZO(nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu), tail=0).train()
    first = model(X)
    assert torch.equal(first, model(X)) and bool((first >= 0).all())


class Backwards(nn.Sequential):
    def __iter__(self) -> Any:
        return reversed(list(self._modules.values()))


def test_a_sequence_with_an_order_of_its_own_keeps_it() -> None:
    torch.manual_seed(0)
    model = ElasticZO(Backwards(nn.Linear(8, 3), nn.Linear(8, 8)), tail=0).train()
    assert torch.equal(model(X), model(X)) and model(X).shape == (2, 4, 3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(7, 6, padding_idx=0)
        self.o = nn.Linear(6, 7, bias=False)
        self.o.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.e(x).mean(1))  # type: ignore[no-any-return]


def test_a_tied_padding_row_stays_still_on_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", 8)
    tokens = torch.tensor([[1, 2], [3, 4]])
    outputs = []
    for path in ("staged", "fused"):
        torch.manual_seed(0)
        model = ElasticZO(Tied(), tail=0, eps=0.1, path=path, backend="reference").train()
        model(tokens)
        outputs.append(model(tokens))
    torch.testing.assert_close(*outputs)


class ReadsBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x) + self.fc.bias))  # type: ignore[no-any-return]


def test_a_bias_that_the_module_around_reads_is_perturbed_once() -> None:
    outputs = []
    for path in ("staged", "fused"):
        torch.manual_seed(0)
        net = nn.Sequential(ReadsBias())
        model = ElasticZO(net, tail=0, eps=0.1, path=path, backend="reference").train()
        model(X)
        outputs.append(model(X))
    torch.testing.assert_close(*outputs)


def deferred(**settings: Any) -> tuple[ElasticZO, ZOSGD]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 3))
    model = ElasticZO(net, tail=0, eps=1e-2, **settings).train()
    return model, ZOSGD(model, lr=1e-2, defer=True)


def step(model: ElasticZO, zo: ZOSGD) -> None:
    zo.step(pair_losses(F.cross_entropy, model(X), Y))


def test_a_failed_staging_keeps_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory for the halves: the update waits for the next try."""
    monkeypatch.setattr("elasticzo.forward.staging.SMALL", 0)
    (plain, a), (failing, b) = deferred(), deferred()
    step(plain, a)
    step(failing, b)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):

        def full(*args: Any, **kwargs: Any) -> Tensor:
            raise MemoryError

        patch.setattr(torch, "empty_strided", full)
        failing(X)
    step(plain, a)
    step(failing, b)
    assert all(torch.equal(*p) for p in zip(plain.parameters(), failing.parameters(), strict=True))


def test_a_batch_that_fails_between_chunks_loses_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("runs in the interpreter")
    monkeypatch.setattr(weights, "CHUNK_BYTES", 4 * 2 * 8 * 128)
    given = {"backend": "triton", "path": "staged"}
    (plain, a), (failing, b) = deferred(**given), deferred(**given)
    monkeypatch.setattr("elasticzo.forward.staging.SMALL", 0)
    for _ in range(2):
        step(plain, a)
        step(failing, b)
    with pytest.raises(RuntimeError):
        failing(X[:, :5])
    assert all(
        torch.equal(p, q)
        for p, q in zip(plain.head_parameters(), failing.head_parameters(), strict=True)
    )


def test_wrapping_again_and_moving_apply_what_waits() -> None:
    model, zo = deferred()
    step(model, zo)
    before = model.module[0].weight.clone()
    again = ElasticZO(model.unwrap(), tail=1).train()
    assert not torch.equal(before, again.module[0].weight)
    model, zo = deferred()
    step(model, zo)
    model.double()
    zo.step(pair_losses(F.cross_entropy, model(X.double()), Y))
    assert model.module[0].weight.dtype == torch.float64


def test_a_captured_step_tells_trees_apart_and_notices_changes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 3)
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.norm(self.fc(x["a"] - x["b"]))  # type: ignore[no-any-return]

    model = ElasticZO(Two(), tail=0).train()
    zo = ZOSGD(model, lr=torch.tensor(0.1))
    x = {"a": X, "b": -X}
    captured = capture_step(zo, F.cross_entropy, x, Y)
    captured(x, Y)
    with pytest.raises(ValueError, match="captured for inputs of the form"):
        captured({"c": X, "d": X}, Y)
    model.module.norm.eval()
    with pytest.raises(RuntimeError, match="capture it again"):
        captured(x, Y)
    model.module.norm.train()
    captured(x, Y)
    zo.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(RuntimeError, match="capture it again"):
        captured(x, Y)


def test_the_kernel_of_cross_entropy_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a subclass, a hook, a patched forward; and for a gradient of the gradient."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("runs in the interpreter")
    monkeypatch.setattr(elasticzo.losses, "_loss_backend", lambda device: "triton")
    logits = torch.randn(2, 4, 3, requires_grad=True)
    plain = pair_losses(nn.CrossEntropyLoss(), logits, Y)
    hooked = nn.CrossEntropyLoss()
    hooked.register_forward_hook(lambda m, args, out: 2 * out)
    torch.testing.assert_close(pair_losses(hooked, logits, Y), 2 * plain)

    def penalty(losses: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
        return torch.autograd.grad(losses.sum() + 10 * g.square().sum(), logits)[0]

    wanted = penalty(pair_losses(lambda x, y: F.cross_entropy(x, y), logits, Y))
    torch.testing.assert_close(penalty(plain), wanted)


@pytest.mark.parametrize("path", ["staged", "fused"])
def test_a_named_compute_dtype_goes_before_autocast(path: str) -> None:
    outputs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        given = {"path": path, "backend": "reference", "compute_dtype": torch.float32}
        model = ElasticZO(net, tail=0, eps=1e-2, **given).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs.append(model(X))
    assert torch.equal(*outputs)


def test_torch_s_newer_precision_settings_are_read_and_put_back() -> None:
    cuda, known = torch.device("cuda"), torch.backends
    before = known.cuda.matmul.fp32_precision, known.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        known.cuda.matmul.fp32_precision = "tf32"
        known.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        assert (precision_of(cuda, False, None), precision_of(cuda, True, None)) == ("tf32", "ieee")
        with vendor_precision(cuda, "ieee"):
            assert precision_of(cuda, False, None) == "ieee"
        assert precision_of(cuda, False, None) == "tf32"
    finally:
        known.cuda.matmul.fp32_precision = before[0]
        known.cudnn.conv.fp32_precision = before[1]  # type: ignore[attr-defined]


def test_eps_that_vanishes_in_tf32_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    nn.init.uniform_(net[0].weight, 0.5, 1.0)
    model = ElasticZO(net, tail=0, eps=1e-5, compute_dtype="tf32").train()
    with pytest.raises(ValueError, match="vanishes in tf32"):
        model(X)


def double(m: nn.Module, args: Any) -> None:
    with torch.no_grad():
        m.weight.mul_(2.0)  # type: ignore[operator]


def test_a_small_weight_written_in_the_forward_is_staged_anew() -> None:
    outputs = []
    for small in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        model = ElasticZO(net, tail=0, eps=1e-2).train()
        model(X)
        net[1].register_forward_pre_hook(double)
        with pytest.MonkeyPatch.context() as patch:
            if not small:
                patch.setattr("elasticzo.forward.staging.SMALL", 0)
            outputs.append(model(X))
    torch.testing.assert_close(*outputs)


def test_unbatched_images_and_empty_inputs_on_every_path() -> None:
    for net, x, pairing in (
        (nn.Conv2d(1, 2, 3), torch.randn(1, 5, 5), "sequential"),
        (nn.Linear(3, 4), torch.randn(2, 0, 3), "stacked"),
    ):
        outputs = []
        for path in ("staged", "fused"):
            given = {"pairing": pairing, "path": path, "backend": "reference", "eps": 1e-2}
            model = ElasticZO(nn.Sequential(net), tail=0, **given).train()
            outputs.append(model(x))
            model.unwrap()
        torch.testing.assert_close(*outputs)
