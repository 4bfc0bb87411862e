"""A server in this process, with its worker process, for tests that talk to it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import uvicorn

from dllm_fast.serve.app import make_app
from dllm_fast.serve.gate import Gate, Limits
from dllm_fast.serve.worker import Served


class Running:
    """A server in a thread: its address, its gate, and waits for what it does."""

    def __init__(self, served: Served, limits: Limits):
        self.gate = Gate(served, limits)
        self.served, self.limits, self.error = served, limits, None
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
        self.started.set()

    async def _serve(self) -> None:
        async with self.gate:
            app = make_app(self.served, self.limits, self.gate)
            self.server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
            task = asyncio.create_task(self.server.serve())
            while not self.server.started:
                await asyncio.sleep(0.01)
            self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
            self.started.set()
            await task

    def until(self, reached, seconds: float = 60.0) -> None:
        """Wait until ``reached()``."""
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.005)

    def idle(self) -> bool:
        load = self.gate.worker.load
        return self.gate.worker.up and self.gate.rows == load.seated == load.waiting == 0


@contextlib.contextmanager
def serving(served: Served, limits: Limits) -> Iterator[Running]:
    running = Running(served, limits)
    running.thread.start()
    running.started.wait(300)
    try:
        if running.error is not None:
            raise running.error
        yield running
    finally:
        if running.error is None:
            running.server.should_exit = True
        running.thread.join(60)
