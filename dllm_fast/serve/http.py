"""The server's process: an event loop with the application in it."""

import asyncio
import signal
from dataclasses import dataclass

import uvicorn

from dllm_fast.serve.app import make_app
from dllm_fast.serve.gate import Gate, Limits
from dllm_fast.serve.worker import Served


@dataclass(frozen=True)
class Address:
    """drain: seconds that running requests have when the server is told to end."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 60.0


def run(served: Served, limits: Limits, address: Address) -> int:
    """Serve until SIGTERM or Ctrl-C; then take no new requests, finish those that run, and return."""

    def end(*_) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)  # uvicorn has handlers of its own while it serves, and calls this afterwards
    return asyncio.run(serve(served, limits, address))


async def serve(served: Served, limits: Limits, address: Address) -> int:
    gate = Gate(served, limits)
    async with gate:
        app = make_app(served, limits, gate)
        config = uvicorn.Config(
            app, host=address.host, port=address.port, lifespan="off", access_log=False, log_level="warning",
            timeout_graceful_shutdown=int(address.drain), timeout_keep_alive=30,
        )  # fmt: skip
        server = uvicorn.Server(config)
        print(f"{limits.name} on {gate.ready.device} at http://{address.host}:{address.port}/", flush=True)
        await server.serve()
    return 0
