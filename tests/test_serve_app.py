"""The HTTP application without its process: keys under a prefix, and what a worker's events become."""

import asyncio

import pytest

from dllm_fast.serve.worker import Served

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
http = pytest.importorskip("dllm_fast.serve.http", reason="the extra serve is not installed", exc_type=ImportError)
fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

Gate, Limits, make_app = http.Gate, http.Limits, http.make_app
NAME, KEY = "llada-sentences", "a secret"
PROMPT = {"model": NAME, "prompt": "A king sees a bear."}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "A king sees a bear."}]}


def mounted(app):
    parent = fastapi.FastAPI()
    parent.mount("/llm", app)
    return {"app": parent}


PREFIXED = {"mounted": mounted, "root_path": lambda app: {"app": app, "root_path": "/llm"}}


@pytest.mark.parametrize("prefixed", PREFIXED.values(), ids=PREFIXED)
def test_a_key_is_asked_for_under_a_prefix(prefixed):
    gate = Gate(Served(NAME), Limits(NAME, (KEY,)))
    transport = httpx.ASGITransport(**prefixed(make_app(gate.served, gate.limits, gate)))

    async def statuses(**headers):
        async with httpx.AsyncClient(transport=transport, base_url="http://server/llm", headers=headers) as client:
            replies = [await client.get("/v1/models"), await client.post("/v1/completions", content=b"{}")]
            return [reply.status_code for reply in replies]

    assert asyncio.run(statuses()) == [401, 401]
    assert asyncio.run(statuses(authorization=f"Bearer {KEY}")) == [200, 400]
    assert b'path="/v1/completions",status="400"' in gate.metrics.text()
