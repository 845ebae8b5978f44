"""The one thread that touches a NIXL agent: transports hand it commands, it hands back results.

NIXL must not be used by two threads, some of its calls block, and none of its events can be awaited, so it is
polled: often while things happen, ever more seldom while nothing does.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from tracehaul.runtime import clock
from tracehaul.transfer.exchange import Agent, Exchange
from tracehaul.wire.errors import TransferError, TransferLost

NAP_MIN_S = 100e-6
NAP_MAX_S = 5e-3
"""Also the longest that a peer's first request after a quiet time can lie unseen."""
NAP_SHARE = 0.05
"""Nap for this share of the time since something last happened: adds that much delay, at most."""
COMMANDS_MAX = 16384
COMMAND_TIMEOUT_S = 30.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Poller:
    """Runs an :class:`Exchange` over an agent, both made, used and destroyed in its own thread."""

    def __init__(self, name: str, make_agent: Callable[[], Agent]) -> None:
        """Blocks until the agent is there.

        Raises:
            TransferError: it cannot be made.
        """
        self._make_agent = make_agent
        self._commands: queue.Queue[Callable[[Exchange], None]] = queue.Queue(COMMANDS_MAX)
        self._wake = threading.Event()
        self._stopping = False
        self._started: Future[Exchange] = Future()
        self._thread = threading.Thread(target=self._main, name=f"nixl-{name}", daemon=True)
        self._thread.start()
        self.exchange = self._started.result(timeout=COMMAND_TIMEOUT_S)

    def submit(self, command: Callable[[Exchange], None]) -> None:
        """Have ``command`` called in the thread, soon and in order. It must not raise.

        Raises:
            TransferLost: the thread has ended.
            TransferError: too many commands wait.
        """
        if self._stopping or not self._thread.is_alive():
            raise TransferLost("this side closed its transport")
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            raise TransferError(f"{COMMANDS_MAX} commands wait for the data plane") from None
        self._wake.set()

    def ask(self, question: Callable[[Exchange], T]) -> T:
        """Result of ``question`` in the thread; its exception propagates. Blocks, usually for some milliseconds."""
        answer: Future[T] = Future()

        def command(exchange: Exchange) -> None:
            try:
                answer.set_result(question(exchange))
            except Exception as error:
                answer.set_exception(error)

        self.submit(command)
        return answer.result(timeout=COMMAND_TIMEOUT_S)

    def stop(self) -> None:
        """Destroy the agent and end every transfer; :meth:`join` waits for it."""
        self._stopping = True
        self._wake.set()

    def join(self) -> None:
        """Block until the thread has ended, at most COMMAND_TIMEOUT_S."""
        self._thread.join(COMMAND_TIMEOUT_S)

    def _main(self) -> None:
        try:
            exchange = Exchange(self._make_agent())
        except Exception as error:
            self._started.set_exception(error)
            return
        self._started.set_result(exchange)
        reason: TransferError = TransferLost("this side closed its transport")
        try:
            self._loop(exchange)
        except Exception:
            # A bug here must not leave callers waiting for a thread that is gone.
            _log.exception("the data plane of this process failed")
            reason = TransferError("the data plane of this process failed")
            self._stopping = True
        exchange.close(reason)
        self._drain(exchange)

    def _loop(self, exchange: Exchange) -> None:
        last_s = clock.perf_s()
        while not self._stopping:
            commanded = self._drain(exchange)
            now_s = clock.perf_s()
            if exchange.step(now_s) or commanded:
                last_s = now_s
            if self._wake.wait(min(NAP_MAX_S, max(NAP_MIN_S, (now_s - last_s) * NAP_SHARE))):
                self._wake.clear()

    def _drain(self, exchange: Exchange) -> bool:
        commanded = False
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return commanded
            command(exchange)
            commanded = True
