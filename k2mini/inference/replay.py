"""Steps of decoding as CUDA graphs: hundreds of launches become one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from k2mini.inference.rows import Row, Slot
from k2mini.inference.sampling import Sampling, sample
from k2mini.nn.llama import Llama
from k2mini.nn.slots import WIDTH, SlotBatch, Slots

MOST_GRAPHS = 16


class Replayed:
    """Runs a step as it stands the first time, then captures it, then replays what was captured.

    Args:
        step: reads and writes tensors that stay where they are.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step, self._ran = step, False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """The next step."""
        if not self._ran:  # libraries take their memory, and compilers compile, outside of a graph
            self._step()
            self._ran = True  # only now: one that was cut off or failed runs once more
            return
        self._graph = self._graph or self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._step()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph


class SlotGraphs:
    """One token of every slot at once, busy or not: a graph for each width of attention and way of choosing.

    Attributes:
        adapters: (S,) int64, of each slot, as `StackedLora.route` wants it.
    """

    def __init__(self, model: Llama, cache: Slots, vocab_size: int | None) -> None:
        self._model, self._cache, self._vocab_size = model, cache, vocab_size
        number, device = cache.number, model.device
        # What the host says in a step, of each slot: token, place, length of the prompt, draw (the bits of a float64),
        # number of its adapter.
        self._said = torch.zeros(5, number, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._inputs = torch.zeros(5, number, dtype=torch.int64, device=device)
        self.adapters = self._inputs[4]
        self._history = torch.zeros(0, dtype=torch.int64, device=device)
        self._spare = cache.spare
        self._graphs: dict[Hashable, tuple[Replayed, list[Tensor]]] = {}

    def __call__(self, pairs: Sequence[tuple[Slot, Row]], sampling: Sampling | None) -> tuple[Tensor, Tensor | None]:
        """The next step.

        Args:
            sampling: how all rows choose; None: not all alike, so that they do not choose here.

        Returns: the logits, (S, V), and what was chosen with whether these were finite, (2, S) int64.
        """
        said = self._said.numpy()  # the same memory: a tensor's elements are slow to write
        said[1] = self._cache.spare
        for slot, row in pairs:
            drawn = row.draws.numpy().view("int64")[len(row.new)] if row.draws is not None else 0
            said[:, slot.number] = (row.new[-1], row.length, len(row.prompt), drawn, row.adapter)
        self._inputs.copy_(self._said, non_blocking=True)
        if sampling is not None and (sampling.looks_back or sampling.counts_new):
            self._note(pairs)
        parts = max(row.length for _, row in pairs) // WIDTH + 1
        width = min(WIDTH << (parts - 1).bit_length(), self._cache.spare)  # few different ones, by doubling
        if self._spare != self._cache.spare or len(self._graphs) > MOST_GRAPHS:
            self._graphs.clear()
            self._spare = self._cache.spare  # it has grown: its tensors are others
        key = (sampling, width)
        if key not in self._graphs:
            found: list[Tensor] = []
            self._graphs[key] = Replayed(lambda: self._step(sampling, width, found)), found
        step, found = self._graphs[key]
        step()
        return found[0], found[1] if sampling is not None else None

    def _note(self, pairs: Sequence[tuple[Slot, Row]]) -> None:
        """Bring the history up to date, but for the newest tokens, which a step adds itself."""
        if self._history.shape[-1] != self._cache.spare + 1:
            self._history = self._inputs.new_zeros(self._cache.number, self._cache.spare + 1)
            for _, row in pairs:
                row.noted = 0
        for slot, row in pairs:
            if row.noted < row.length:
                new = torch.tensor((row.prompt + row.new)[row.noted : row.length])
                self._history[slot.number, row.noted : row.length] = new.to(self._history.device, non_blocking=True)
            row.noted = row.length + 1

    def _step(self, sampling: Sampling | None, width: int, found: list[Tensor]) -> None:
        tokens, places, starts, draws, _ = self._inputs
        model = self._model
        # cuDNN's attention of single queries takes half of the others' time, and grouped ones. It plans for each shape,
        # which is slow, and therefore off elsewhere (`gpu.use_gpu`); here shapes are few.
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(True)
        try:
            hidden = model.hidden(tokens[None], cache=SlotBatch.of_all(self._cache, places, width))[0]  # (S, D)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
        found[:] = [(model.decode_logits or Llama.logits)(model, hidden)[:, : self._vocab_size]]
        if sampling is None:
            return
        history = new = None
        if sampling.looks_back or sampling.counts_new:
            self._history[torch.arange(len(places), device=places.device), places] = tokens
            at = torch.arange(width, device=places.device)
            history = torch.where(at <= places[:, None], self._history[:, :width], -1)
            new = torch.where(at >= starts[:, None], history, -1) if sampling.counts_new else None
        finite = found[0].amax(dim=-1).isfinite().long()
        found.append(torch.stack([sample(found[0], sampling, draws.view(torch.float64), history, new), finite]))
