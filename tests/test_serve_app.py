"""The HTTP application without its process: keys under a prefix, and what a worker's events become."""

import asyncio
import dataclasses
import json
import multiprocessing

import pytest

from dllm_fast.loading import load_tokenizer
from dllm_fast.serve.messages import Accepted, Block, Draft, Failed, Ready, Refused
from dllm_fast.serve.worker import Served, Worker

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
http = pytest.importorskip("dllm_fast.serve.http", reason="the extra serve is not installed", exc_type=ImportError)
fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

Gate, Limits, make_app = http.Gate, http.Limits, http.make_app
NAME, KEY = "llada-sentences", "a secret"
PROMPT = {"model": NAME, "prompt": "A king sees a bear."}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "A king sees a bear."}]}


@pytest.fixture
def gate():
    """One whose worker was not started: requests wait for ever."""
    gate = Gate(Served(NAME), Limits(NAME))
    gate.tokenizer = load_tokenizer(NAME)
    gate.tokenizer.chat_template = "{{ messages[0].content }}"
    gate.ready = Ready("cpu", 256, gate.tokenizer.mask_token_id, (gate.tokenizer.eos_token_id,))
    gate.characters = 10_000
    return gate


def ask(gate, body, *events):
    """The reply to ``body`` from a worker that tells ``events``."""
    gate.worker.submit = lambda request, tell: [tell(dataclasses.replace(e, number=request.number)) for e in events]

    async def asked():
        transport = httpx.ASGITransport(make_app(gate.served, gate.limits, gate), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/v1/chat/completions" if "messages" in body else "/v1/completions", json=body)

    return asyncio.run(asked())


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


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_drain_leaves_unfinished_is_answered(gate, stream):
    """503, or an error in a stream that has begun; and then the server ends."""

    async def served():
        config = uvicorn.Config(make_app(gate.served, gate.limits, gate), port=0, lifespan="off", log_level="warning")
        server = http.Server(config, gate, drain=0.2)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/completions"
        async with httpx.AsyncClient(timeout=30) as client:
            asked = asyncio.create_task(client.post(url, json=PROMPT | {"stream": stream}))
            while not gate.worker.pending:
                await asyncio.sleep(0.01)
            if stream:
                (pending,) = gate.worker.pending.values()
                pending.tell(Accepted(pending.request.number))
            server.should_exit = True
            reply = await asked
        await running
        return reply

    reply = asyncio.run(served())
    assert reply.status_code == (200 if stream else 503)
    error, *end = [line.removeprefix("data: ") for line in reply.text.strip().split("\n\n")]
    assert json.loads(error)["error"]["message"] == "the server is ending" and end == ["[DONE]"] * stream
    assert gate.rows == 0 and not gate.worker.pending
    assert ask(gate, PROMPT).status_code == 503


@pytest.mark.parametrize("again, status", [(False, 500), (True, 503)])
def test_a_failure_has_its_own_status_whatever_was_before(gate, again, status):
    gate.worker.restarts = 1 - again
    reply = ask(gate, PROMPT, Failed(0, "model: logits are NaN", again))
    assert reply.status_code == status and ("retry-after" in reply.headers) == again


def test_a_place_is_given_back_where_a_request_cannot_be_sent(gate):
    assert ask(gate, PROMPT, None).status_code == 500  # which `replace` does not take
    assert gate.rows == 0 and not gate.worker.pending


def test_the_connection_is_closed_in_the_thread_that_sends():
    """Closed in the one that hears, it could be gone between the check and the write of a message."""
    worker, calls = Worker(Served(NAME)), []
    worker.loop = type("Loop", (), {"call_soon_threadsafe": lambda _, function, *args: calls.append(function)})()
    worker.connection, theirs = multiprocessing.Pipe()
    theirs.close()
    worker._hear(worker.connection)
    assert not worker.connection.closed and calls == [worker._died]
    worker.started, worker.closing = asyncio.Future(loop=asyncio.new_event_loop()), True
    worker.started.set_result(None)
    worker._died()
    assert worker.connection.closed


def test_drafts_of_a_worker_that_begins_again_are_not_sent_before_it_is_as_far(gate):
    ids = gate.tokenizer("A king sees a bear and a wolf.", add_special_tokens=False).input_ids[:8]
    first, second = Block(0, 0, 0, ids[:4], 4, False), Block(0, 0, 4, ids[4:], 8, True)
    old, live = Draft(0, 0, 0, ids[:4]), Draft(0, 0, 4, ids[4:])
    body = PROMPT | {"stream": True, "drafts": True, "max_tokens": 8, "block_length": 4}
    events = [Accepted(0), old, first, live, Accepted(0), old, first, live, second]
    lines = [line.removeprefix("data: ") for line in ask(gate, body, *events).text.strip().split("\n\n")]
    drafts = [json.loads(line)["choices"][0].get("draft") for line in lines[:-1]]
    sent = [[gate.tokenizer.decode([i]) for i in part] for part in (ids[:4], ids[4:])]
    assert drafts == [sent[0], None, sent[1], sent[1], None]


@pytest.mark.parametrize(
    "body, events, param",
    [
        (PROMPT | {"max_tokens": 10_000}, [], "max_tokens"),
        (CHAT | {"max_tokens": 10_000}, [], "max_tokens"),
        (CHAT | {"max_completion_tokens": 10_000}, [], "max_completion_tokens"),
        (CHAT | {"max_completion_tokens": 13}, [Refused(0, "gen_length=13 is odd")], "max_completion_tokens"),
        (CHAT, [Refused(0, "prompt: id 101 is outside the vocabulary")], "messages"),
        (PROMPT, [Refused(0, "prompt: id 101 is outside the vocabulary")], "prompt"),
        (PROMPT, [Refused(0, "schedule: no")], "schedule"),
    ],
)
def test_an_error_names_a_field_that_was_sent(gate, body, events, param):
    error = ask(gate, body, *events).json()["error"]
    assert error["param"] == param
    assert events or error["message"].startswith(f"{param}: ")
