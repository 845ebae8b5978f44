"""The one thread that touches an agent: transports hand it commands, it hands back results.

NIXL must not be used by two threads, some of its calls block, and none of its events can be awaited, so it is
polled: often while things happen, ever more seldom while nothing does, and hardly at all once the agent's own file
descriptors can tell when to look again. UCXX's descriptor can always be made to tell.
"""

import contextlib
import os
import queue
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.transfer.exchange import Agent, Exchange
from tracehaul.wire.errors import TransferError, TransferLost

NAP_MIN_S = 200e-6
NAP_SHARE = 0.05
"""Nap for this share of the time since something last happened: adds that much delay, at most."""
QUIET_S = 0.05
"""Without an event for so long, wait for one by the agent's file descriptors, where it has them."""
BLIND_NAP_MAX_S = 5e-3
"""Longest nap where it has none: how long a peer's first request after a quiet time can lie unseen."""
WATCHFUL_NAP_MAX_S = 0.1
"""Longest nap where it has: probes and quarantines are looked after at least so often."""
COMMAND_TIMEOUT_S = 30.0

T = TypeVar("T")
Command = Callable[[Exchange], None]
log = Log(__name__)


class Poller:
    """Runs an :class:`Exchange` over an agent, both made, used and destroyed in its own thread."""

    def __init__(self, name: str, make_agent: Callable[[], Agent]) -> None:
        """Blocks until the agent is there.

        Raises:
            TransferError: it cannot be made.
        """
        self._make_agent = make_agent
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._started: Future[Exchange] = Future()
        self.ended: Future[None] = Future()
        """Done when the thread has ended: with an exception if that was its own failure."""
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()
        self.exchange = self._started.result(timeout=COMMAND_TIMEOUT_S)

    def submit(self, command: Command) -> None:
        """Have ``command`` called in the thread, soon and in order. It must not raise.

        The queue has no limit of its own: a transfer submits two commands in its life, and transfers are limited.

        Raises:
            TransferLost: the thread has ended.
        """
        if self._stopping or not self._thread.is_alive():
            raise TransferLost("this side closed its transport")
        self._commands.put(command)
        os.eventfd_write(self._wake_fd, 1)

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
        """Destroy the agent and end every transfer; :meth:`join` waits for it. Harmless if that is done."""
        self._stopping = True
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def join(self) -> None:
        """Block until the thread has ended, at most COMMAND_TIMEOUT_S."""
        self._thread.join(COMMAND_TIMEOUT_S)
        if not self._thread.is_alive() and self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _main(self) -> None:
        try:
            exchange = Exchange(self._make_agent())
        except Exception as error:
            self._started.set_exception(error)
            return
        self._started.set_result(exchange)
        try:
            self._loop(exchange)
            failure = None
        except Exception as error:
            # A bug here must not leave callers waiting for a thread that is gone.
            log.error("the data plane of this process failed", error=error)
            failure = error
            self._stopping = True
        reason = "this side closed its transport" if failure is None else "the data plane of this process failed"
        try:
            exchange.close(TransferLost(reason) if failure is None else TransferError(reason))
            self._run(exchange)
        except Exception as error:
            failure = failure or error
        if failure is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(failure)

    def _loop(self, exchange: Exchange) -> None:
        anything = select.poll()
        for fd in (self._wake_fd, *exchange.wake_fds):
            anything.register(fd, select.POLLIN)
        nap_max_s = WATCHFUL_NAP_MAX_S if exchange.wake_fds else BLIND_NAP_MAX_S
        last_s = clock.perf_s()
        command: Command | None = None
        while True:
            commanded = self._run(exchange, command)
            if self._stopping:
                return
            now_s = clock.perf_s()
            if exchange.step(now_s) or commanded:
                last_s = now_s
            quiet_s = now_s - last_s
            command = None
            waking = exchange.arm()
            if waking == "busy":
                continue
            if waking == "armed" or quiet_s > QUIET_S:
                woken = [fd for fd, _ in anything.poll(nap_max_s * 1000)]
                if self._wake_fd in woken:
                    os.eventfd_read(self._wake_fd)
                if woken:
                    last_s = clock.perf_s()
                continue
            # While things happen the agent's descriptors are nearly always readable, and poll counts in milliseconds.
            with contextlib.suppress(queue.Empty):
                command = self._commands.get(timeout=max(NAP_MIN_S, quiet_s * NAP_SHARE))

    def _run(self, exchange: Exchange, command: Command | None = None) -> bool:
        """Carry out ``command`` and all that wait; whether there was any."""
        commanded = False
        while True:
            if command is not None:
                command(exchange)
                commanded = True
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return commanded
