"""The server: its socket, the engine's thread, and how both end."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from k2mini.errors import StoppedBySignalError, end, need_extra
from k2mini.inference.compile import COMPILING
from k2mini.serving.app import App
from k2mini.serving.service import Service

log = logging.getLogger(__name__)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; a port of 0 is any that is free. Raises ValueError where there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]  # which has the address again
        raise ValueError(f"{host}, port {port}: {why}; --port and --host name another") from None


def serve(app: App, listening: socket.socket, load: Callable[[], Service], ready: Callable[[Service], None]) -> None:
    """Answer requests until a signal: the first lets those that were accepted end, a second one tells them why not.

    Args:
        load: makes the service, in the engine's thread; until then the server says that it loads.
        ready: called once it is there.

    Raises StoppedBySignalError at the end, ValueError where the extra is not installed, and what `load` raises.
    """
    try:
        import uvicorn
    except ImportError:
        raise need_extra("serve") from None
    # Every part of an answer takes Python's lock several times from the engine's thread, which would keep it for 5 ms.
    sys.setswitchinterval(1e-4)
    failed: list[BaseException] = []
    signals: list[int] = []
    left = "every accepted request was answered"

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            nonlocal left
            signals.append(sig)
            self.force_exit = self.should_exit or app.service is None
            if app.service is None:
                left, self.should_exit = "the model was not loaded yet", True
            elif app.draining:
                left, self.should_exit = f"requests cut off: {app.active}", True
                app.service.stop()
            elif app.active:
                log.info("requests still to be answered: %d; a second signal cuts them off", app.active)
            app.draining = True

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = self.should_exit or bool(failed) or (app.draining and not app.active)
            return await super().on_tick(counter)

    def work() -> None:
        try:
            app.service = service = load()
            ready(service)  # only now: whoever reads of it may ask
            service.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="engine", daemon=True)
    thread.start()
    plain: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "off", "loop": "asyncio", "server_header": False}
    quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}  # the app logs
    Server(uvicorn.Config(app, timeout_graceful_shutdown=5, **plain, **quiet)).run(sockets=[listening])
    if failed:
        raise failed[0]
    if app.service is not None:
        app.service.stop()
        thread.join()
    if signals:
        stopped = StoppedBySignalError(signals[0], left)
        if app.service is None or any(each.name == COMPILING for each in threading.enumerate()):
            os._exit(end(stopped) or 0)  # Python's own end aborts what another thread loads or compiles, and says so
        raise stopped
