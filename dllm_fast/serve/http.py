"""The server's process: an event loop with the application in it."""

import asyncio
import math
import signal
import socket
from dataclasses import dataclass

import uvicorn

from dllm_fast.serve.app import make_app
from dllm_fast.serve.gate import Gate, Limits
from dllm_fast.serve.reply import FAREWELL
from dllm_fast.serve.worker import Served


@dataclass(frozen=True)
class Address:
    """drain: seconds that running requests have when the server is told to end."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 60.0


class Server(uvicorn.Server):
    """uvicorn's, which cancels what runs when its time is over; this one has ``gate`` answer it before that."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain: float):
        config.timeout_graceful_shutdown = math.ceil(drain + FAREWELL)
        super().__init__(config)
        self.gate, self.drain = gate, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.drain, self.gate.give_up)
        await super().shutdown(sockets)


def run(served: Served, limits: Limits, address: Address) -> int:
    """Serve until SIGTERM or Ctrl-C; then take no new requests, finish those that run, and return."""

    def end(*_) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)  # uvicorn has handlers of its own while it serves, and calls this afterwards
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address.host, address.port))  # before the model is loaded: an address in use is told at once
        return asyncio.run(serve(served, limits, address, listening))


async def serve(served: Served, limits: Limits, address: Address, listening: socket.socket) -> int:
    gate = Gate(served, limits)
    async with gate:
        app = make_app(served, limits, gate)
        config = uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning", timeout_keep_alive=30)
        host, port = listening.getsockname()[:2]
        print(f"{limits.name} on {gate.ready.device} at http://{host}:{port}/", flush=True)
        await Server(config, gate, address.drain).serve(sockets=[listening])
    return 0
