"""The server as a process: it listens, and on SIGTERM lets requests end before it does."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from tamis.async_llm import AsyncLLM
from tamis.errors import ConfigError
from tamis.server import logs
from tamis.server.admission import Admission
from tamis.server.app import create_app
from tamis.server.settings import Settings

_log = logging.getLogger(__name__)

_GRACE_S = 5.0
"""After the requests that did not end in time were ended: for sending their errors."""


def serve(llm: AsyncLLM, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new requests, let open ones end, and return.

    Raises:
        ConfigError: the address cannot be listened on.
        RequestError: the model has no tokenizer.
    """
    logs.configure(settings.log_format)
    app = create_app(llm, settings)
    with listening(settings) as listener:
        host, port = listener.getsockname()[:2]
        _log.info("listening", extra={"fields": {"host": host, "port": port}})
        server = DrainingServer(app, llm, app.state.service.admission, settings)
        server.run(sockets=[listener])
    _log.info("stopped")


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """A socket that listens where the settings say.

    Raises:
        ConfigError: that cannot be.
    """
    host, port = settings.host, settings.port
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    with listener:
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it: the system drops those whose peers take nothing any more.
            wait_ms = round(1000 * settings.write_timeout)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, wait_ms)
        yield listener


class DrainingServer(uvicorn.Server):
    """A uvicorn server that gives open requests their time, and then an error.

    The first signal begins that; a second one ends open requests at once.
    """

    def __init__(
        self, app: object, llm: AsyncLLM, admission: Admission, settings: Settings
    ) -> None:
        wait_s = settings.drain_timeout + _GRACE_S
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=round(wait_s),
        )
        super().__init__(config)
        self._llm = llm
        self._admission = admission
        self._drain_s = settings.drain_timeout

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT stop the server and nothing else.

        Only a process's main thread is told of signals; in others, `drain` is for the caller.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.drain)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def drain(self) -> None:
        """Take nothing new in, and stop when what is open has ended; must run in the loop."""
        loop = asyncio.get_running_loop()
        wait_s = 0.0 if self._admission.draining else self._drain_s
        fields = {"open_requests": self._admission.n_open, "at_most_s": wait_s}
        _log.info("draining", extra={"fields": fields})
        self._admission.draining = True
        self.should_exit = True
        loop.call_later(wait_s, lambda: loop.create_task(self._end_open()))

    async def _end_open(self) -> None:
        if self._llm.alive:
            await self._llm.abort_all("the server stops")
