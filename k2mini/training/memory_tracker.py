"""How many bytes an allocator keeps for the tensors of a step, and how many a rank receives, without a GPU."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from k2mini.distributed import local_part

SMALL, PAGES = 2**20, (20 * 2**20, 2**21)  # what CUDA's allocator maps at a time, and for blocks of up to SMALL bytes


class _Addresses:
    """One stream's addresses, given out as by CUDA's allocator with expandable segments: the smallest gap that fits.

    A gap is split, and joined with the gaps beside it; where none fits, the end grows.
    """

    def __init__(self) -> None:
        self._gaps: dict[int, int] = {}  # their sizes, by where they begin
        self._end = self.most = 0

    def take(self, size: int) -> int:
        _, start = min(((gap, at) for at, gap in self._gaps.items() if gap >= size), default=(0, self._end))
        if start == self._end:
            self._end += size
            self.most = max(self.most, self._end)
        elif rest := self._gaps.pop(start) - size:
            self._gaps[start + size] = rest
        return start

    def give(self, start: int, size: int) -> None:
        size += self._gaps.pop(start + size, 0)
        before = next((at for at, gap in self._gaps.items() if at + gap == start), start)
        size += self._gaps.pop(before, 0)
        if before + size == self._end:
            self._end = before
        else:
            self._gaps[before] = size


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all tensor storages that exist, and of what FSDP communicates, within its `with` block.

    A storage is added when an operation returns a tensor on it, and subtracted when its last reference is gone. FSDP
    frees gathered weights by resizing their storage to 0 bytes, so resizing is counted as well. What one stream has
    freed CUDA's allocator gives to that stream alone: FSDP gathers, reduces and computes on three, and the peak of each
    stays reserved. On a CPU these streams do nothing but say whose turn it is.

    Args:
        model, optimizer: their parameters and state exist from the start.
        replicas: whole copies of the model, between which gradients are summed.
        offloaded: parameters, gradients and state are in the host's memory, which is not counted.

    Attributes:
        peak: the bytes of tensors.
        received: bytes from other ranks. Of n ranks in a ring each receives (n - 1) / n of what is gathered or reduced;
            an all-reduce takes twice that.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, replicas: int = 1, *, offloaded: bool = False
    ) -> None:
        super().__init__()
        self._model, self._replicas, self.received = model, replicas, 0
        self._offloaded, self._host = offloaded, set[int]()
        self._moves_to_host: bool | None = None
        self._sizes: dict[int, tuple[int, torch.cpu.Stream]] = {}
        self._blocks: dict[int, tuple[_Addresses, int, int]] = {}
        self._streams = defaultdict[tuple[torch.cpu.Stream, bool], _Addresses](_Addresses)
        self._now: Counter[torch.cpu.Stream] = Counter()
        self._peaks: Counter[torch.cpu.Stream] = Counter()
        self._broken_down = self._gradients = 0
        weights = [local_part(parameter) for parameter in model.parameters()]
        moments = [local_part(v) for state in optimizer.state.values() for v in state.values() if v.ndim]
        self._given = {} if offloaded else {"parameters": _bytes(weights), "optimiser": _bytes(moments)}
        for tensor in (*weights, *moments):
            self._see(tensor, on_host=offloaded)

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = (part for part in tree_iter((args, kwargs)) if self._host and isinstance(part, Tensor))
        on_host = self._moves_to_host
        if on_host is None:  # nothing but FSDP's moves has tensors on both sides
            on_host = any(local_part(part).untyped_storage()._cdata in self._host for part in given)
        tree_map_only(Tensor, partial(self._see, on_host=on_host), out)
        if func in (torch.ops.c10d._allgather_base_.default, torch.ops.c10d._reduce_scatter_base_.default):
            self.received += abs(args[0].nbytes - args[1].nbytes)  # the whole less the rank's own part
        elif func is torch.ops.c10d.allreduce_.default:
            whole = sum(tensor.nbytes for tensor in args[0])
            self.received += 2 * (self._replicas - 1) * whole // self._replicas
        return out

    def __enter__(self) -> MemoryTracker:
        self._resize = resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._count(storage, size)
            return result

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        if self._offloaded:  # FSDP sends by `to`, which does nothing where host and device are both the CPU
            Tensor.to = self._to  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._offloaded:
            del Tensor.to
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def _see(self, tensor: Tensor, *, on_host: bool = False) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes and storage._cdata not in self._host:
            weakref.finalize(storage, self._forget, storage._cdata)
            if on_host:
                self._host.add(storage._cdata)
            else:
                self._count(storage, storage.nbytes())

    @property
    def _to(self) -> Any:
        to = Tensor.to

        def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """On the other side, where FSDP asks for it: from the host on the device, or the other way round."""
            if "non_blocking" not in kwargs:
                return to(tensor, *args, **kwargs)
            self._moves_to_host = tensor.untyped_storage()._cdata not in self._host
            copy = tensor.clone()
            self._moves_to_host = None
            return copy

        return moved

    @property
    def peak(self) -> int:
        """The most bytes of each stream, added up."""
        return sum(self._peaks.values())

    @property
    def reserved(self) -> int:
        """The most bytes that CUDA's allocator maps for each stream, with the gaps between tensors, added up."""
        return sum(-(-each.most // PAGES[small]) * PAGES[small] for (_, small), each in self._streams.items())

    def _place(self, key: int, stream: torch.cpu.Stream, size: int) -> None:
        if key in self._blocks:
            addresses, start, length = self._blocks.pop(key)
            addresses.give(start, length)
        if size:
            length = -(-size // 512) * 512
            addresses = self._streams[stream, length <= SMALL]
            self._blocks[key] = addresses, addresses.take(length), length

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        before, stream = self._sizes.get(storage._cdata, (0, torch.cpu.current_stream()))
        self._place(storage._cdata, stream, size)
        self._sizes[storage._cdata] = size, stream
        self._now[stream] += size - before
        self._peaks[stream] = max(self._peaks[stream], self._now[stream])
        if self.peak > 1.01 * self._broken_down:  # walking over all gradients at every new peak would take long
            self._broken_down = self.peak
            gradients = [local_part(p.grad) for p in self._model.parameters() if p.grad is not None]
            self._gradients = _bytes([part for part in gradients if part.untyped_storage()._cdata not in self._host])

    def kinds(self) -> dict[str, int]:
        """The bytes of the peak, by kind; gradients were looked at within a hundredth of it."""
        rest = self.peak - self._gradients - sum(self._given.values())
        return {**self._given, "gradients": self._gradients, "activations and gathered weights": rest}

    def _forget(self, key: int) -> None:
        self._host.discard(key)
        if key in self._sizes:
            size, stream = self._sizes.pop(key)
            self._now[stream] -= size
            self._place(key, stream, 0)


def _bytes(tensors: list[Tensor]) -> int:
    storages = {storage._cdata: storage.nbytes() for tensor in tensors for storage in [tensor.untyped_storage()]}
    return sum(storages.values())  # FSDP's gradients of one unit are views of one storage
