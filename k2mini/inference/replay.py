"""A step of decoding as one CUDA graph: hundreds of launches become one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from k2mini.nn.kv_cache import KVCache


class Replayed:
    """Runs a step as it stands the first time, then captures it, then replays what was captured.

    Args:
        step: reads and writes tensors that stay where they are, and takes one token of each row into the cache.
        cache: fixed, with room for all steps; otherwise the step is captured again whenever it has grown.
    """

    def __init__(self, step: Callable[[], None], cache: KVCache) -> None:
        self._step, self._cache = step, cache
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capacity = -1  # of the cache when the step ran last

    def __call__(self) -> None:
        """The next step."""
        self._cache.reserve(self._cache.length + 1)
        if self._capacity != self._cache.capacity:  # libraries take their memory, and compilers compile, outside
            self._graph, self._capacity = None, self._cache.capacity
            self._step()
            return
        if self._graph is None:
            self._graph = self._captured()
        else:
            self._cache.length += 1
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
