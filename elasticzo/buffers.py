"""What a forward may move besides weights: buffers, and torch's random generators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

BufferSlot = tuple[nn.Module, str]
_NOT_READ = torch.zeros(0, dtype=torch.uint8, device="cpu")


def address(t: Tensor) -> int:
    """Where a tensor lies in memory; 0 of one that has shape and no memory."""
    return 0 if isinstance(t, FakeTensor) else t.data_ptr()


def has_values(t: Tensor) -> bool:
    """Whether there is something to read."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def all_buffers(model: nn.Module) -> list[BufferSlot]:
    """Every buffer of a model as (module, local name)."""
    return [
        (module, name)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


class BufferSnapshot:
    """Values of buffers, to be put back: in place, into the very tensors they were in."""

    def __init__(self, slots: Iterable[BufferSlot]) -> None:
        self.saved: list[tuple[nn.Module, str, Tensor, Tensor, int]] = []
        for module, name in slots:
            buffer = module._buffers[name]
            if buffer is not None:
                self.saved.append((module, name, buffer, buffer.clone(), buffer._version))

    def __len__(self) -> int:
        return len(self.saved)

    def restore(self) -> None:
        for i, (module, name, buffer, value, _) in enumerate(self.saved):
            module._buffers[name] = buffer
            buffer.copy_(value)
            self.saved[i] = (module, name, buffer, value, buffer._version)

    @contextmanager
    def unless_done(self) -> Iterator[None]:
        """Put the values back where what follows raises."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def restore_where(self, condition: Tensor) -> None:
        """Put the values back where the device scalar `condition` is true, without waiting."""
        for module, name, buffer, value, _ in self.saved:
            now = module._buffers[name]
            assert now is not None
            module._buffers[name] = buffer
            buffer.copy_(torch.where(condition, value, now))

    def only(self, slots: Iterable[BufferSlot]) -> BufferSnapshot:
        """The same of some of the buffers."""
        found, wanted = BufferSnapshot([]), {(id(module), name) for module, name in slots}
        found.saved = [saved for saved in self.saved if (id(saved[0]), saved[1]) in wanted]
        return found

    def add(self, other: BufferSnapshot) -> None:
        """What the other has of buffers that this one has not."""
        known = {(id(saved[0]), saved[1]) for saved in self.saved}
        self.saved += [saved for saved in other.saved if (id(saved[0]), saved[1]) not in known]

    def moved(self) -> list[BufferSlot]:
        """The buffers that changed since; a write through `.data` has no version. Reads the
        device."""
        return [
            (module, name)
            for module, name, buffer, value, version in self.saved
            if module._buffers[name] is not buffer
            or buffer._version != version
            or (has_values(buffer) and not torch.equal(buffer, value))
        ]

    def values(self) -> list[Tensor]:
        """The present values of the same buffers, cloned."""
        now = [module._buffers[name] for module, name, *_ in self.saved]
        return [t.clone() for t in now if t is not None]

    def write_mean(self, halves: Sequence[Sequence[Tensor]]) -> None:
        """Set each buffer to its mean over the halves; counts are taken from the first."""
        for (module, name, buffer, *_), values in zip(
            self.saved, zip(*halves, strict=True), strict=True
        ):
            module._buffers[name] = buffer
            if buffer.is_floating_point():
                buffer.copy_(torch.stack(values).mean(0))
            else:
                buffer.copy_(values[0])


def generator_state(device: torch.device) -> Tensor:
    """State of torch's default generator of a device, on the host.

    While a graph is captured it cannot be read; the rehearsals have shown that nothing draws.
    """
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _NOT_READ
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
