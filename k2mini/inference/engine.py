"""The engine: a thread that answers requests which other threads bring."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from k2mini.data.prompts import room
from k2mini.inference.decoding import Step
from k2mini.inference.request import End, Prompt, QueueFullError, Request
from k2mini.inference.scheduler import Scheduler
from k2mini.nn.llama import Llama

log = logging.getLogger(__name__)
T = TypeVar("T")
ENDS = "the engine ends, and takes nothing new"


class Engine:
    """Answers requests in the thread that calls `run`, in the order in which they came.

    Args:
        queue: requests that may wait.
        how: arguments of `Scheduler`.
    """

    def __init__(self, model: Llama, *, queue: int = 64, **how: Any) -> None:
        self._scheduler, self._queue = Scheduler(model, **how), queue
        self.model, self.capacity, self.adapters = model, self._scheduler.capacity, self._scheduler.adapters
        self.cache = self._scheduler.cache
        self.slots, self.counts, self.alone = len(self._scheduler.slots), self._scheduler.counts, self._scheduler.alone
        self._waiting: deque[Request] = deque()
        self._cancelled: set[Request] = set()
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._open, self._drain = True, True

    def submit(self, request: Request) -> None:
        """Take a request in, from any thread.

        Raises ValueError where it is empty or too long, a token is none of the model's or the adapter is unknown;
        QueueFullError where too many wait.
        """
        self._scheduler.adapter(request.adapter)
        if odd := [token for token in request.tokens if not 0 <= token < self.model.config.vocab_size]:
            raise ValueError(f"the prompt has token {odd[0]}, which the model does not know")
        if not (request.score_only and 0 < len(request.tokens) <= self.capacity):
            room(len(request.tokens), 1, self.capacity)
        with self._wake:
            if not self._open:
                raise QueueFullError(ENDS)
            if len(self._waiting) >= self._queue + self._scheduler.free:
                raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later")
            request.deliver = partial(_told, request.deliver)
            self._waiting.append(request)
            self.counts.requests += 1
            self.counts.waiting = len(self._waiting)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """End a request, from any thread; its slot is free before the next step."""
        with self._wake:
            self._cancelled.add(request)
            self._wake.notify()

    def between(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` in the engine's thread, between two steps; from any thread."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)

        with self._wake:
            if self._open:
                self._work.append(run)
                self._wake.notify()
            else:
                future.set_exception(RuntimeError(ENDS))
        return future

    def stop(self, drain: bool = True) -> None:
        """Let `run` return: once all requests are answered, or, without `drain`, at once, cancelling them."""
        with self._wake:
            self._open, self._drain = False, drain and self._drain
            self._wake.notify()

    def run(self) -> None:
        """Answer requests until `stop`."""
        while True:
            if not self._drain:
                with self._wake:
                    running = {slot.row.request for slot in self._scheduler.slots if slot.row is not None}
                    self._cancelled |= {*self._waiting} | running
            try:
                done = not self.step()
            except Exception as error:  # the next request may fare better: memory is free again
                log.exception("a step of the engine failed")
                self._scheduler.fail(f"{error}")
                continue
            with self._wake:
                if not done or self._waiting or self._work or self._cancelled:
                    continue
                if not self._open:
                    return
                self._wake.wait()

    def step(self) -> bool:
        """Take what has come, then one step. Returns whether there was anything to do."""
        self._take()
        return self._scheduler.step()

    def _take(self) -> None:
        """What other threads have asked for: work, cancelled requests, new ones."""
        while True:
            with self._wake:
                work = self._work.popleft() if self._work else None
            if work is None:
                break
            work()
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()
            dropped = [request for request in self._waiting if request in cancelled]
            self._waiting = deque(request for request in self._waiting if request not in cancelled)
        for request in dropped:
            self.counts.cancelled += 1
            request.deliver(End("cancelled"))
        self._scheduler.cancel(cancelled)
        while self._scheduler.free:
            with self._wake:
                if not self._waiting:
                    break
                request = self._waiting.popleft()
            try:
                self._scheduler.admit(request)
            except Exception as error:  # of this one, before it has a slot
                request.deliver(End("error", f"{error}"))
        self.counts.waiting = len(self._waiting)
        self.counts.slots_busy = self.slots - self._scheduler.free


def _told(deliver: Callable[[Prompt | Step | End], bool | None], event: Prompt | Step | End) -> bool:
    """Whether an answer is to end: what `deliver` says, or that it has failed, which must not end other answers."""
    try:
        return bool(deliver(event))
    except Exception:
        log.exception("a request could not be told; it ends")
        return True
