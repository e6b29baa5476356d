"""A sharded model whose ranks run their own data, in passes of their own number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from k2mini.distributed import World


@contextmanager
def uneven(model: object, world: World) -> Iterator[None]:
    """Let each rank run its own data through a sharded model, in as many passes as that takes.

    A pass gathers weights from all ranks. So each is announced, and a rank that has left the block runs one token for
    every pass that others announce, until nobody does. In the block there are no other collectives. A model that is
    not sharded needs nothing of this.

    Args:
        model: a `Llama`, or what stands in its place.
    """
    if world.size == 1 or not isinstance(model, FSDPModule):
        yield
        return
    shared: Any = model
    hidden, inference = shared.hidden, False  # what weights were gathered into in inference mode is used in no other

    def announce(*_: Any) -> None:
        nonlocal inference
        inference = torch.is_inference_mode_enabled()
        world.all_reduce(1)

    def announced(*arguments: Any, **how: Any) -> Tensor:
        announce()
        return hidden(*arguments, **how)

    shared.hidden = announced
    hook = shared.register_forward_pre_hook(announce, prepend=True)  # before FSDP's own, which gathers weights
    try:
        yield
        while world.all_reduce(0)[0]:
            with torch.inference_mode(inference), torch.no_grad():
                hidden(torch.zeros(1, 1, dtype=torch.int64, device=world.device))
    finally:
        hook.remove()
        shared.hidden = hidden
