"""A server in this process, with its worker process, for tests that talk to it; their fixtures."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import openai
import pytest
import torch
import uvicorn

import dllm_fast
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.text import answer_text
from dllm_fast.loading import load_tokenizer
from dllm_fast.serve.app import make_app
from dllm_fast.serve.gate import Gate, Limits
from dllm_fast.serve.worker import Served

NAME = "llada-sentences"
PROMPT = "An honest queen teaches three lazy wolves. past, passive, negative, question:\n"
OTHER = "A proud king sees two old bears. future, negative:\n"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
KEY = "a secret"
OPTIONS = {"gen_length": 52, "block_length": 13}
ENDLESS = {"block_length": 4, "schedule": "first-hitting", "cache": "none", "eos_id": []}
SLOW = {"max_tokens": 208, "extra_body": ENDLESS}  # a forward a token


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


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    template = tmp_path_factory.mktemp("templates") / "chat.jinja"
    template.write_text(TEMPLATE)
    served = Served(NAME, "float32", seats=4, options=Options.of_call("serve", OPTIONS))
    with serving(served, Limits(NAME, (KEY, "another"), chat_template=str(template))) as running:
        yield running


@pytest.fixture(scope="module")
def local():
    """The same model in this process, and its tokenizer."""
    return dllm_fast.from_pretrained(NAME, dtype=torch.float32), load_tokenizer(NAME)


@pytest.fixture
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(autouse=True)
def left_idle(running):
    """No test leaves a row seated, waiting or counted."""
    limits = running.gate.limits
    yield
    running.gate.limits = limits
    running.until(running.idle)


def expected(local, prompt=PROMPT, rows=1, until=(), **options):
    """(texts, output) of `generate`."""
    model, tokenizer = local
    ids = tokenizer([prompt] * rows, return_tensors="pt", add_special_tokens=False).input_ids
    eos_ids = options.pop("eos_id", [tokenizer.eos_token_id])
    out = dllm_fast.generate(model, ids, eos_id=eos_ids, **{**OPTIONS, **options})
    return [answer_text(tokenizer, row[ids.shape[1] :].tolist(), eos_ids, until) for row in out.sequences], out
