"""Decoding with compiled blocks: one graph for all layers, in shapes that stay from token to token."""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2mini.nn.decode_ops import check_compiler
from k2mini.nn.llama import Block, Llama
from k2mini.nn.lora import StackedLora
from k2mini.nn.slots import SlotBatch, SlotLayer, Slots

# On a CPU, what several products read, such as the normalised input, is computed once, not for every row of a weight.
# A product and its addition to a sum are one instruction.
ON_CPU: dict[str, Any] = {"realize_reads_threshold": 1, "cpp.enable_floating_point_contract_flag": "fast"}
# On a GPU, int8 weights are then read inside of a row's product, with the norm before it and what follows.
ON_GPU: dict[str, Any] = {"coordinate_descent_tuning": True}
TOGETHER = 6  # blocks in one graph on a CPU, at most; calls of many take a tenth of the time of a small model
ROWS = (1, 2, 4, 8)  # on a CPU code is compiled for so many rows: others are filled up, and more run as they are
COMPILING = "compile"  # the name of the thread

log = logging.getLogger(__name__)


class Compiled:
    """A model's blocks for single tokens, compiled: called with the blocks and what a block is called with.

    Attributes:
        rows: how many rows there is code for, on a CPU.
    """

    def __init__(self, run: Callable[..., Tensor], rows: Sequence[int] = ROWS) -> None:
        self._run, self.rows = run, list(rows)

    def __call__(
        self, blocks: nn.ModuleList, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Any
    ) -> Tensor:
        """All blocks, some at a time: one graph serves every group, since the weights are its inputs."""
        # Numbers of rows, caches that double as they grow, models: more than dynamo's 8, past which it stops compiling.
        torch._dynamo.config.recompile_limit = 64  # of this thread
        most = TOGETHER if x.device.type == "cpu" else 1
        size = next(size for size in range(most, 0, -1) if len(blocks) % size == 0)
        for begin in range(0, len(blocks), size):
            numbers = range(begin, begin + size)
            caches = [cache.layer(number) for number in numbers]
            if isinstance(caches[0], SlotLayer) and x.device.type == "cpu":  # one graph for all widths
                torch._dynamo.maybe_mark_dynamic(caches[0].mask, 3)
            x = self._run([blocks[number] for number in numbers], x, cos, sin, mask, caches)
        return x


def compile_decoding(model: Llama, *, rows: Sequence[int] = ROWS) -> None:
    """Let single tokens run through compiled code, on CPU and GPU alike.

    Prompts do not: their lengths differ. The first token takes some seconds, and another few for each of `ROWS`.

    Args:
        rows: as how many at a time, on a CPU; `compile_behind` adds to them.

    Raises ValueError where there is no compiler.
    """
    with suppress(OSError, RuntimeError):  # what is compiled is kept where a restart of the machine does not clear it
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k2mini" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    check_compiler(model.device)
    options = ON_CPU if model.device.type == "cpu" else ON_GPU
    model.model.decode_blocks = Compiled(torch.compile(_group, dynamic=False, options=options), rows)
    model.decode_logits = torch.compile(_logits, dynamic=False, options=options)


def compiled_rows(model: Llama, rows: int) -> int:
    """As how many rows so many are decoded by compiled code on a CPU; 0: by none."""
    compiled = model.model.decode_blocks
    found = [each for each in compiled.rows if rows <= each < 2 * rows] if isinstance(compiled, Compiled) else []
    return min(found, default=0)


def compile_behind(model: Llama, cache: Slots) -> threading.Thread:
    """Compile for one number of rows after another, in a thread, while others go on using the model.

    Args:
        cache: the slots that it will be for; what they hold stays as it is.

    Returns: the thread.
    """
    kept: dict[int, Any] = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    for layer in model.modules():
        if isinstance(layer, StackedLora):
            kept |= {id(part): part for part in (layer.adapters, layer.stacked_a, layer.stacked_b)}
    shadow = copy.deepcopy(model, kept)
    compiled, logits, threads = model.model.decode_blocks, model.decode_logits, torch.get_num_threads()
    assert isinstance(compiled, Compiled)
    assert logits is not None

    @torch.inference_mode()
    def work() -> None:
        torch.set_num_threads(threads)
        if sys.platform == "linux":  # there it is of this thread, and of the compilers that it starts
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            for rows in ROWS[: (cache.number - 1).bit_length() + 1]:
                route = torch.zeros(rows, dtype=torch.int64)
                for layer in shadow.modules():
                    if isinstance(layer, StackedLora):
                        layer.route = route
                batch = SlotBatch(cache, [(0, 0)] * rows, fixed=True)
                batch.places = torch.full_like(batch.places, cache.spare)  # where nothing is overwritten
                logits(shadow, shadow.hidden(torch.zeros(1, rows, dtype=torch.int64), cache=batch)[0])
                compiled.rows.append(rows)
                log.info("compiled code answers up to %d at a time", rows)
        except Exception:
            log.exception("compiling failed; answers are made without")

    thread = threading.Thread(target=work, name=COMPILING, daemon=True)
    thread.start()
    return thread


def _group(blocks: Sequence[Block], x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, caches: Sequence[Any]) -> Tensor:
    for block, cache in zip(blocks, caches, strict=True):
        x = block(x, cos, sin, mask, cache)
    return x


def _logits(model: Llama, hidden: Tensor) -> Tensor:
    return model.logits(hidden)
