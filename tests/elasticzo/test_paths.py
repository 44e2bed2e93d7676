"""Fused, staged, in chunks, reference: one step, whatever path its layers take; and who chooses."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, directions, pair_losses
from elasticzo.forward.layers import weights
from elasticzo.forward.staging import Staging
from elasticzo.points import two_sided
from zo_kernels import paths

needs_triton = pytest.mark.usefixtures("triton")


@pytest.fixture
def triton() -> None:
    pytest.importorskip("triton")


class Small(nn.Sequential):
    """LeNet-5 in small: what follows a convolution goes into its kernel."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(6, 20),
            nn.ReLU(),
            nn.Linear(20, 5),
        )


class Residual(nn.Module):
    """A residual block with BatchNorm, stride and a 1x1 shortcut, then LayerNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.shortcut = nn.Conv2d(4, 8, 1, 2)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.body(x) + self.shortcut(x)).relu().mean((2, 3))
        return self.out(self.norm(x))  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], nn.Module]] = {"lenet": Small, "residual": Residual}
# Where kernels run: a device, or the CPU with Triton's interpreter.
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3])


def train(
    net: str, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[Tensor, ElasticZO]:
    """Losses of two steps `[2, 2Q]`, and the model behind them."""
    torch.manual_seed(0)
    defer = settings.pop("defer", False)
    device = GPU if settings.get("backend") == "triton" else torch.device("cpu")
    model = ElasticZO(NETS[net]().to(device, dtype), tail=1, eps=1e-2, seed=3, **settings).train()
    zo = ZOSGD(model, lr=1e-2, defer=defer)
    sgd = model.tail_optimizer(torch.optim.SGD, lr=0.1)
    history = []
    for _ in range(2):
        losses = pair_losses(F.cross_entropy, model(X.to(device, dtype)), Y.to(device))
        model.backward(losses)
        sgd.step()
        sgd.zero_grad()
        zo.step(losses)
        history.append(losses.detach().cpu())
    return torch.stack(history), model.cpu()


@needs_triton
@pytest.mark.parametrize(
    ("pairing", "noise"), [("stacked", "normal"), ("sequential", "rademacher")]
)
@pytest.mark.parametrize("net", NETS)
def test_fused_staged_and_reference_agree(net: str, pairing: str, noise: str) -> None:
    """Against float64: paths differ from it by fp32's rounding, and from each other no more."""
    given = {"pairing": pairing, "noise": noise}
    exact, wide = train(net, torch.float64, backend="reference", **given)
    low, plain = train(net, backend="reference", **given)
    budget = 4 * (low.double() - exact).abs().max().item() + 1e-6
    for path in ("fused", "staged"):
        losses, model = train(net, backend="triton", path=path, **given)
        assert not any(layer.by_half for layer in model.engine.plan.layers.values())
        assert (losses.double() - exact).abs().max().item() <= budget, path
        for (name, a), b, c in zip(
            model.state_dict().items(),
            wide.state_dict().values(),
            plain.state_dict().values(),
            strict=True,
        ):
            error = (c.double() - b).abs().max().item()
            # g differs by the losses' error / (2 eps), and moves a weight by lr * |z| of it.
            reach = 4 * error + 1e-6 + 1e-2 * 5 * budget / 1e-2
            assert (a.double() - b).abs().max().item() <= reach, (path, name)


@needs_triton
def test_the_first_step_takes_the_path_of_the_others() -> None:
    """Resuming starts with a first forward: its bits must be those of a later one."""
    run = {"backend": "triton", "path": "fused", "queries": 2}
    torch.manual_seed(0)
    model = ElasticZO(Small().to(GPU), tail=0, eps=1e-2, **run).train()
    first, second = model(X.to(GPU)), model(X.to(GPU))
    assert torch.equal(first, second)


@needs_triton
def test_a_kernel_takes_relu_and_pooling_along(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, bool]] = []
    plain = weights.paired_conv2d

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((kwargs.get("relu", False), kwargs["pool"]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(weights, "paired_conv2d", spy)
    relus: list[str] = []
    torch.manual_seed(0)
    model = ElasticZO(Small().to(GPU), tail=0, eps=1e-2, backend="triton", path="fused").train()
    x = X.to(GPU)
    model(x)  # watched: every module runs
    assert calls[:2] == [(False, False)] * 2  # then the first half alone
    assert not any(layer.by_half for layer in model.engine.plan.layers.values())
    calls.clear()
    y = model(x)
    assert calls == [(True, True), (True, True)]
    handle = model.module[1].register_forward_hook(lambda *a: relus.append("seen"))
    watched = model(x)
    handle.remove()
    assert relus == ["seen"]  # a hook sees its module run
    torch.testing.assert_close(y, watched)


@needs_triton
@pytest.mark.parametrize(("noise", "defer"), [("normal", True), ("rademacher", False)])
def test_chunks_do_not_show(noise: str, defer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide layer's halves exist a chunk of rows at a time; the bits stay."""

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 5))
        given = {"backend": "triton", "path": "staged", "noise": noise, "eps": 1e-2}
        model = ElasticZO(net.to(GPU), tail=0, **given).train()
        zo = ZOSGD(model, lr=1e-2, defer=defer)
        x = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).to(GPU)
        for _ in range(3):
            losses = pair_losses(F.cross_entropy, model(x), Y.to(GPU))
            zo.step(losses)
        return losses, model.state_dict()

    monkeypatch.setattr("elasticzo.forward.staging.SMALL", 0)
    whole, trained = run()
    monkeypatch.setattr(weights, "CHUNK_BYTES", 30000)
    parts: list[int] = []
    plain = Staging.rows

    def spy(self: Any, rows: Tensor, *args: Any) -> Tensor:
        parts.append(rows.shape[0])
        return plain(self, rows, *args)

    monkeypatch.setattr(Staging, "rows", spy)
    losses, same = run()
    # 300 x 20 x 2 x 4 bytes = 2 chunks of 256 and 44 rows; the first forward is watched, whole.
    assert parts == [256, 44] * 2
    torch.testing.assert_close(losses, whole, rtol=0, atol=1e-6)
    for name in trained:
        torch.testing.assert_close(same[name], trained[name], rtol=0, atol=1e-4)


def test_one_layer_s_halves_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of staged halves is given back before the next layer takes some."""
    alive: list[weakref.ref[Tensor]] = []
    plain = directions.perturbed_weights

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        assert all(ref() is None for ref in alive)
        halves = plain(*args, **kwargs)
        alive.append(weakref.ref(halves))
        return halves

    monkeypatch.setattr("elasticzo.forward.staging.SMALL", 0)
    monkeypatch.setattr(directions, "perturbed_weights", spy)
    net = nn.Sequential(*[nn.Linear(30, 30, bias=False) for _ in range(4)])
    model = ElasticZO(net, tail=0, eps=1e-2).train()
    model(torch.randn(5, 30))
    alive.clear()
    model(torch.randn(5, 30))
    assert len(alive) == 4


# ---- the choice


def work(rows: int, **changes: Any) -> paths.Work:
    bf16 = torch.bfloat16
    given: dict[str, Any] = {"noise": "normal", "x_dtype": bf16, "w_dtype": bf16, "compute": bf16}
    n = 4096
    return paths.Work(rows, n, n, 1, x=rows * n, y=rows * n, shared=False, **(given | changes))


@pytest.mark.parametrize("device", paths.DEVICES.values(), ids=paths.DEVICES)
def test_few_rows_are_fused_and_many_staged(device: paths.Device) -> None:
    for noise in ("normal", "rademacher"):
        few, many = (paths.seconds(work(rows, noise=noise), device) for rows in (1, 1 << 16))
        assert few["fused"] < few["staged"] and many["staged"] < many["fused"]


def test_predictions_by_hand() -> None:
    """One program's worth: 16 x 32 outputs of 64 inputs, on a device of round numbers."""
    device = paths.Device(memory=1e9, bf16=1e12, tf32=1e12, fp32=1e12, alu=1e9, sms=1)
    few = paths.Work(16, 32, 64, 1, 1024, 512, False, "normal", *[torch.bfloat16] * 3)
    predicted = paths.seconds(few, device)
    noise = 32 * 64 * paths.FUSED_NOISE["normal"] / 1e9
    products = 2 * 2 * 16 * 32 * 64 / 1e12 / paths.FUSED_PART["bf16"]
    assert predicted["fused"] == pytest.approx(noise + products + paths.LAUNCH)
    staging = 32 * 64 * paths.STAGED_NOISE["normal"] / 1e9
    vendor = (2 * 1024 * 2 + 2 * 512 * 2 + 2 * 32 * 64 * 2) / 1e9
    assert predicted["staged"] == pytest.approx(staging + vendor + 2 * paths.LAUNCH)


def test_a_staged_convolution_joins_its_halves() -> None:
    """The library runs once a half, and its outputs are read and written again."""
    device = paths.DEVICES["H200"]
    given = [1 << 20, 16, 144, 1, 1 << 24, 1 << 24]
    kinds = [torch.bfloat16] * 3
    layer, conv, shared = (
        paths.seconds(paths.Work(*given, share, "normal", *kinds, convolution=is_conv), device)
        for is_conv, share in ((False, False), (True, False), (True, True))
    )
    joined = 2 * 2 * (1 << 24) * 2 / device.memory + 2 * paths.LAUNCH
    assert conv["staged"] - layer["staged"] == pytest.approx(joined)
    assert shared["staged"] < layer["staged"]


def test_devices_are_known_by_name() -> None:
    assert paths.device_named("NVIDIA H200") is paths.DEVICES["H200"]
    assert paths.device_named("NVIDIA A100-SXM4-80GB") is paths.DEVICES["A100"]
    assert paths.device_named("a device of tomorrow") is paths.DEVICES["H100"]


def test_on_the_cpu_layers_are_staged() -> None:
    model = ElasticZO(Small(), tail=0, backend="reference", eps=1e-2).train()
    layer = model.engine.plan.layers["7"]
    assert layer.path == "auto" and layer.fusable
    current = model.engine.new_pass(two_sided(1))
    assert weights.path_of(current, layer, torch.randn(12, 24), None) == "staged"


PATHS: dict[str, tuple[Any, str]] = {
    "unknown": ("quick", r"path must be one of \('auto', 'fused', 'staged'\).*'quick'"),
    "unknown-name": ({"conv9": "fused"}, r"over paired layers \(0, 3, 7, 9\), got 'conv9'"),
    "unknown-path": ({"0": "quick"}, r"got '0': 'quick'"),
}


@pytest.mark.parametrize("name", PATHS)
def test_wrong_paths(name: str) -> None:
    path, message = PATHS[name]
    with pytest.raises(ValueError, match=message):
        ElasticZO(Small(), tail=0, path=path)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "it has 2 groups"),
        (nn.Conv2d(4, 4, 3, padding="same"), r"its padding is 'same' \(zeros\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "(reflect)"),
        (nn.Conv3d(4, 4, 3), "a Conv3d has no fused kernel"),
    ],
    ids=["groups", "same", "reflect", "3d"],
)
def test_what_cannot_be_fused(layer: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=f"path 'fused' is not possible for '0': .*{reason}"):
        ElasticZO(nn.Sequential(layer), tail=0, path={"0": "fused"})
    ElasticZO(nn.Sequential(layer), tail=0, path="fused")  # wherever there is one


@pytest.mark.parametrize("wanted", ["ieee", "tf32", "tf32x3"])
def test_precisions_are_compute_dtypes(wanted: str) -> None:
    model = ElasticZO(Small(), tail=0, compute_dtype=wanted, eps=1e-2).train()
    assert model.compute_dtype is torch.float32 and model.precision == wanted
    assert torch.isfinite(model(X)).all()


def test_torch_s_settings_for_tensor_cores_do_not_reach_the_cpu() -> None:
    """cuDNN may use tf32 by default; a fused layer on the CPU is fp32 nevertheless."""
    assert torch.backends.cudnn.allow_tf32
    fused, staged = (
        train("lenet", backend="reference", path=path)[0] for path in ("fused", "staged")
    )
    torch.testing.assert_close(fused, staged, rtol=0, atol=2e-6)
