"""The process that holds the model, and its handle in the HTTP process.

Generation has a process of its own: HTTP, JSON and text would take turns with it under Python's lock. If it dies, the
handle starts another and asks it again for everything that was not finished; the seeds are known, so the tokens are
the same, and nobody notices but by the time.
"""

import asyncio
import contextlib
import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import torch
from transformers.utils import logging as transformers_logging

from dllm_fast.decoding.memory import require_memory
from dllm_fast.decoding.options import BLOCK, Options
from dllm_fast.errors import USERS, one_line
from dllm_fast.loading import end_of_text, from_pretrained, load_tokenizer, mask_of
from dllm_fast.patch import bound_family
from dllm_fast.serve.loop import Loop
from dllm_fast.serve.messages import Broken, Cancel, Failed, Load, Ready, Request

TRIES = 3  # workers that a request may see die: it could be what kills them
PAUSE = 1.0  # seconds before a worker that could not be started is started again, doubled each time
PAUSES = 5  # how often, before requests are given up


@dataclass(frozen=True)
class Served:
    """The model that is served, and how: `from_pretrained`'s arguments, and the rows that run at a time.

    length: positions of a prompt with its answer, at most; None: the model's own.
    options: `generate`'s, where a request does not say otherwise.
    """

    model: str
    dtype: str = "auto"
    device: str = "cpu"
    impl: str = "auto"
    weights: str | None = None
    trust_remote_code: bool = False
    seats: int = 16
    length: int | None = None
    options: Options = field(default_factory=Options)


def work(connection: Connection, served: Served) -> None:
    """The worker process: load the model, tell that it is ready, and serve until the connection is closed."""
    # A Ctrl-C or a process manager signals all processes of a group; this one has requests to finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        loop, ready = load(connection, served)
    except Exception as error:
        connection.send(Broken(one_line(error) if isinstance(error, USERS) else f"{type(error).__name__}: {error}"))
        return
    connection.send(ready)
    threading.Thread(target=hear, args=(connection, loop), daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody is left to answer
        loop.run()


def load(connection: Connection, served: Served) -> tuple[Loop, Ready]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dtype = served.dtype if served.dtype == "auto" else getattr(torch, served.dtype)
    arguments = served.device, served.impl, served.trust_remote_code, served.weights
    model = from_pretrained(served.model, dtype, *arguments)
    tokenizer = load_tokenizer(served.model, served.trust_remote_code)
    family = bound_family(model)
    mask_id = mask_of(served.options.mask_id, model, tokenizer)
    positions = min(family.positions, served.length or family.positions)
    block = family.block or served.options.block_length or BLOCK
    require_memory(family, replace(served.options, block_length=block), served.seats, positions, block)
    loop = Loop(model, served.seats, connection.send, positions)
    return loop, Ready(str(family.head()[0].device), positions, mask_id, tuple(end_of_text(model, tokenizer)))


def hear(connection: Connection, loop: Loop) -> None:
    """Hand the loop what comes, until that is None or the other end is gone."""
    message: Request | Cancel | None
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message = None
        loop.put(message)
        if message is None:
            return


def end(process: multiprocessing.process.BaseProcess, seconds: float) -> None:
    """Wait so long for a worker process to end, then kill it: it ignores SIGTERM, and Python would wait for it."""
    process.join(seconds)
    process.kill()
    process.join()


@dataclass
class Pending:
    """A request that is not finished."""

    request: Request
    tell: Callable[[object], None]
    deaths: int = 0  # of workers that had it


class Worker:
    """The handle: starts the process, sends it requests, and gives their events to those who asked. All methods are
    called in the event loop's thread."""

    def __init__(self, served: Served):
        self.served = served
        self.ready: Ready | None = None  # what the first worker told
        self.up = False  # whether a worker is there now
        self.load = Load(0, 0)
        self.restarts = 0
        self.pending: dict[int, Pending] = {}
        self.numbers = itertools.count()
        self.failures = 0  # of starts, one after the other
        self.closing = False
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None

    async def start(self) -> Ready:
        """Start the process, and wait until it has loaded the model. Raises ValueError with the reason if it fails."""
        self.loop = asyncio.get_running_loop()
        self.started: asyncio.Future[Ready] = self.loop.create_future()
        self._spawn()
        self.ready = await self.started
        return self.ready

    def submit(self, request: Request, tell: Callable[[object], None]) -> None:
        """Have a request served; ``tell`` is called with each of its events, in the event loop's thread."""
        self.pending[request.number] = Pending(request, tell)
        if self.up:
            self._send(request)

    def forget(self, number: int) -> None:
        """No event of a request is wanted any more. If it is not finished, its seats are free at the next block."""
        if self.pending.pop(number, None) is not None and self.up:
            self._send(Cancel(number))

    def stop(self, number: int, choice: int) -> None:
        """One choice of a request needs no more tokens."""
        if self.up:
            self._send(Cancel(number, choice))

    def finish(self, number: int) -> None:
        """A request has had its last event."""
        self.pending.pop(number, None)

    def give_up(self, reason: str) -> None:
        """All requests that are not finished fail."""
        for pending in list(self.pending.values()):
            pending.tell(Failed(pending.request.number, reason, again=True))

    async def close(self) -> None:
        """End the process, at once if it is still loading the model."""
        self.closing = True
        if self.process is not None:
            if self.up:
                self._send(None)
            seconds = 10.0 if self.up else 0.0
            await asyncio.get_running_loop().run_in_executor(None, end, self.process, seconds)

    # The process

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork, nor do threads
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.served), daemon=True, name="dllm-fast worker")
        self.process.start()
        theirs.close()
        threading.Thread(target=self._hear, args=(self.connection,), daemon=True).start()

    def _hear(self, connection: Connection) -> None:
        """A thread: hand over what comes, until the worker's end is closed."""

        def hand_over(function, *arguments) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self.loop.call_soon_threadsafe(function, *arguments)

        try:
            while True:
                hand_over(self._take, connection.recv())
        except (EOFError, OSError):
            hand_over(self._died)

    def _take(self, message) -> None:
        if isinstance(message, Ready):
            self.up, self.failures = True, 0
            if not self.started.done():
                self.started.set_result(message)
            for pending in list(self.pending.values()):
                self._send(pending.request)
        elif isinstance(message, Broken):
            if not self.started.done():
                self.closing = True
                self.started.set_exception(ValueError(message.error))
        else:
            for event in message:
                if isinstance(event, Load):
                    self.load = event
                elif event.number in self.pending:
                    self.pending[event.number].tell(event)

    def _died(self) -> None:
        """Start another worker, unless this one was closed; requests that saw too many die are given up."""
        assert self.connection is not None
        self.connection.close()  # in the thread that sends: closed in another, it may be gone between check and write
        was_up, self.up, self.load = self.up, False, Load(0, 0)
        if not self.started.done():
            self.started.set_exception(ValueError("the worker process died while it loaded the model"))
            return
        if self.closing:
            return
        self.restarts += was_up
        self.failures += not was_up
        for pending in list(self.pending.values()):
            pending.deaths += was_up
            if pending.deaths >= TRIES or self.failures > PAUSES:
                died = f"the worker process died {pending.deaths} times"
                pending.tell(Failed(pending.request.number, died, again=True))
        pause = 0.0 if was_up else PAUSE * 2 ** min(self.failures, PAUSES)
        self.loop.call_later(pause, self._restart)

    def _restart(self) -> None:
        if not self.closing:
            self._spawn()

    def _send(self, message: Request | Cancel | None) -> None:
        assert self.connection is not None
        with contextlib.suppress(OSError):  # it died, and `_died` will ask the next one
            self.connection.send(message)
