"""``dllm-fast serve``, asked by OpenAI's own client."""

import contextlib
import dataclasses
import json
import socket
import threading

import pytest
import torch

import dllm_fast
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.text import answer_text
from dllm_fast.loading import load_tokenizer

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")
serving = pytest.importorskip("serving", reason="the extra serve is not installed", exc_type=ImportError)

NAME = "llada-sentences"
PROMPT = "An honest queen teaches three lazy wolves. past, passive, negative, question:\n"
OTHER = "A proud king sees two old bears. future, negative:\n"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
KEY = "a secret"
OPTIONS = {"gen_length": 52, "block_length": 13}
ENDLESS = {"block_length": 4, "schedule": "first-hitting", "cache": "none", "eos_id": []}
SLOW = {"max_tokens": 208, "extra_body": ENDLESS}  # a forward a token


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    template = tmp_path_factory.mktemp("templates") / "chat.jinja"
    template.write_text(TEMPLATE)
    served = serving.Served(NAME, "float32", seats=4, options=Options.of_call("serve", OPTIONS))
    with serving.serving(served, serving.Limits(NAME, (KEY, "another"), chat_template=str(template))) as running:
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


CASES = {
    "default": ({}, {}),
    "drawn": ({"temperature": 1.0, "seed": 5, "n": 3}, {"temperature": 1.0, "seed": 5, "rows": 3}),
    "options": (
        {"max_tokens": 40, "extra_body": {"block_length": 8, "schedule": "uniform=10", "cache": "prefix"}},
        {"gen_length": 40, "block_length": 8, "schedule": dllm_fast.Uniform(10), "cache": "prefix"},
    ),
    "policies": (
        {"extra_body": {"refresh": "window=13,4", "remask": "verify=0.5", "confidence": "margin", "cfg_scale": 0.5}},
        {"refresh": dllm_fast.Window(13, 4), "remask": dllm_fast.Verify(0.5), "confidence": "margin", "cfg_scale": 0.5},
    ),
    "no end": ({"extra_body": {"eos_id": []}}, {"eos_id": []}),
    "two ends": ({"extra_body": {"eos_id": [1, 9]}}, {"eos_id": [1, 9]}),
    "drafted": ({"extra_body": {"speculate": 3, "schedule": "uniform=52"}}, {"schedule": dllm_fast.Uniform(52)}),
}


@pytest.mark.parametrize("asked, options", CASES.values(), ids=CASES)
def test_the_text_is_that_of_generate(client, local, asked, options):
    texts, out = expected(local, **options)
    reply = client.completions.create(model=NAME, prompt=PROMPT, **asked)
    assert [choice.text for choice in reply.choices] == texts
    assert [choice.index for choice in reply.choices] == list(range(len(texts)))
    if "speculate" not in asked.get("extra_body", {}):  # which takes fewer forwards
        assert reply.usage.nfe == sum(out.row_nfe)
    streamed = [""] * len(texts)
    for chunk in client.completions.create(model=NAME, prompt=PROMPT, stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_several_prompts_and_ids_are_rows_of_a_batch(client, local):
    model, tokenizer = local
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in (PROMPT, OTHER)]
    reply = client.completions.create(model=NAME, prompt=prompts, n=2, temperature=1.0, seed=3)
    doubled = [prompts[0], prompts[0], prompts[1], prompts[1]]
    eos_ids = [tokenizer.eos_token_id]
    done = dllm_fast.generate_many(model, doubled, **OPTIONS, temperature=1.0, seed=3, eos_id=eos_ids)
    rows = [(row.sequence.tolist()[len(ids) :], ids) for row, ids in zip(done, doubled, strict=True)]
    assert [choice.text for choice in reply.choices] == [answer_text(tokenizer, ids, eos_ids) for ids, _ in rows]
    assert reply.usage.prompt_tokens == sum(map(len, doubled))


def test_without_a_seed_answers_are_drawn_anew(client):
    texts = {client.completions.create(model=NAME, prompt=OTHER, temperature=2.0).choices[0].text for _ in range(4)}
    assert len(texts) > 1


def test_chat_streams_blocks_and_usage(client, local):
    texts, out = expected(local)
    asked = {"model": NAME, "messages": [{"role": "user", "content": PROMPT.rstrip("\n")}]}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == texts[0] and whole.choices[0].finish_reason == "stop"
    parts = [{"type": "text", "text": PROMPT[:10]}, {"type": "text", "text": PROMPT[10:].rstrip("\n")}]
    asked["messages"] = [{"role": "user", "content": parts}]
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].delta.content for chunk in pieces) == texts[0] and len(pieces) == 4
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None, None, None, "stop"]
    assert not last.choices and last.usage.model_extra == whole.usage.model_extra
    assert last.usage.nfe == out.nfe
    assert last.usage.tokens_per_forward == round(last.usage.completion_tokens / out.nfe, 3)
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_drafts_are_steps_of_the_live_block(client, local):
    tokenizer = local[1]
    asked = {"max_tokens": 12, "extra_body": {"drafts": True, "schedule": "uniform=6", "block_length": 6, "eos_id": []}}
    drafts, text = [], ""
    for chunk in client.completions.create(model=NAME, prompt=PROMPT, stream=True, **asked):
        if (draft := getattr(chunk.choices[0], "draft", None)) is not None:
            drafts.append(draft)
            assert chunk.choices[0].text == ""
        text += chunk.choices[0].text
    assert [draft.count(None) for draft in drafts] == [4, 2, 0] * 2
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(drafts[2] + drafts[5]) == text and len(ids) == 12


@pytest.mark.parametrize("stop", [" wolves", [" taught by", "never there"], ["."]], ids=str)
def test_a_stop_string_ends_the_answer_before_it(client, local, stop):
    stops = [stop] if isinstance(stop, str) else stop
    (text,), _ = expected(local, until=stops)
    reply = client.completions.create(model=NAME, prompt=PROMPT, stop=stop)
    assert reply.choices[0].text == text and reply.choices[0].finish_reason == "stop"
    size = len(local[1](text + stops[0], add_special_tokens=False).input_ids)
    assert reply.usage.completion_tokens == size
    pieces = client.completions.create(model=NAME, prompt=PROMPT, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == text


def test_lengths_are_cut_to_what_was_asked_for(client, local):
    texts, _ = expected(local, gen_length=13)
    reply = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=5)
    assert reply.usage.completion_tokens == 5 and texts[0].startswith(reply.choices[0].text)
    assert reply.choices[0].finish_reason == "length"


def test_requests_at_the_same_time_get_their_own_tokens(client, local, running):
    """More than there are seats, of different lengths and seeds, some with other options."""
    cases = [{"temperature": 1.0 * (n % 3 > 0), "seed": n % 2, "max_tokens": 13 * (1 + n % 4)} for n in range(24)]
    found = [None] * len(cases)

    def ask(n):
        reply = client.completions.create(model=NAME, prompt=(PROMPT, OTHER)[n % 2], **cases[n])
        found[n] = reply.choices[0].text

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, case in enumerate(cases):
        options = {"gen_length": case["max_tokens"], "temperature": case["temperature"], "seed": case["seed"]}
        assert [found[n]] == expected(local, (PROMPT, OTHER)[n % 2], **options)[0]


def test_a_short_request_takes_a_seat_while_a_long_one_runs(client, running):
    stream = client.completions.create(model=NAME, prompt=PROMPT, stream=True, **SLOW)
    next(iter(stream))
    client.completions.create(model=NAME, prompt=OTHER)
    running.until(lambda: running.gate.rows == 1)  # the long one is still there
    stream.close()


# Faults


WRONG = [
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -5}, 400, "max_tokens"),
    ({"max_tokens": 10**9}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": 1e300}, 400, "temperature"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 1 << 63}, 400, "seed"),
    ({"n": 0}, 400, "n"),
    ({"n": "3"}, 400, "n"),
    ({"stop": [""]}, 400, "stop"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [1, -2]}, 400, "prompt"),
    ({"prompt": [1, 10**30]}, 400, "prompt"),
    ({"prompt": [99999]}, 400, "prompt"),
    ({"prompt": ["a", 3]}, 400, "prompt"),
    ({"prompt": "wolf " * 100_000}, 400, "prompt"),
    ({"prompt": "a wolf sees a bear. " * 60}, 400, "prompt"),
    ({"top_p": 0.5}, 400, "top_p"),
    ({"logprobs": 3}, 400, "logprobs"),
    ({"suffix": "end"}, 400, "suffix"),
    ({"drafts": True}, 400, "drafts"),
    ({"model": "another"}, 404, "model"),
    ({"unknown": 1}, 400, "unknown"),
    ({"schedule": "magic=3"}, 400, "schedule"),
    ({"schedule": "uniform=1000000000"}, 400, "schedule"),
    ({"schedule": "uniform=3"}, 400, "schedule"),
    ({"schedule": "threshold=-0.5"}, 400, "schedule"),
    ({"block_length": 0}, 400, "block_length"),
    ({"block_length": 300}, 400, "max_tokens"),
    ({"cache": "triple"}, 400, "cache"),
    ({"cache": "none", "refresh": "every=2"}, 400, "refresh"),
    ({"refresh": "drift=-1"}, 400, "refresh"),
    ({"suffix_sample": 3}, 400, "suffix_sample"),
    ({"suffix_length": 10**12}, 400, "suffix_length"),
    ({"suffix_length": 4, "max_tokens": 13}, 400, "suffix_length"),
    ({"skip_committed": True, "speculate": 2}, 400, "skip_committed"),
    ({"speculate": 10**6}, 400, "speculate"),
    ({"eos_id": 10**6}, 400, "eos_id"),
    ({"eos_id": [1, 10**6]}, 400, "eos_id"),
    ({"cfg_scale": 1e30}, 400, "cfg_scale"),
]


def post(running, body, path="completions", key=KEY, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}", **headers}
    return httpx.post(f"{running.url}/v1/{path}", content=content, headers=headers, timeout=60)


@pytest.mark.parametrize("fields, status, param", WRONG, ids=lambda x: str(x)[:60])
def test_bad_input_names_its_field(running, fields, status, param):
    reply = post(running, {"model": NAME, "prompt": PROMPT, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert error["message"] and error["type"] == "invalid_request_error" and set(error) == {
        "message", "type", "param", "code"
    }  # fmt: skip


@pytest.mark.parametrize(
    "content, path",
    [
        (b"{", "completions"),
        (b"[]", "completions"),
        (b"null", "chat/completions"),
        (b'{"model": 1', "completions"),
        (b'{"model":"llada-sentences","prompt":"\\ud800"}', "completions"),
        (b'{"model":"llada-sentences","prompt":"a","\\ud800":1}', "completions"),
        (b'{"model":"llada-sentences","prompt":"a","temperature":NaN}', "completions"),
        (b'{"model":"llada-sentences","prompt":"a","seed":' + b"9" * 5000 + b"}", "completions"),
        (b"[" * 100_000, "completions"),
        (b"\xff\xfe", "completions"),
        (b'{"model":"llada-sentences","messages":[]}', "chat/completions"),
        (b'{"model":"llada-sentences","messages":[{"role":"user"}]}', "chat/completions"),
    ],
    ids=range(12),
)
def test_malformed_bodies_are_refused(running, content, path):
    reply = post(running, content, path)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_openais_client_raises_its_own_errors(client, running):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=NAME, prompt=PROMPT, max_tokens=100_000)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "max_tokens")
    assert httpx.get(f"{running.url}/v1/models").status_code == 401
    for key in ("wrong", KEY + "!", "\xe9"):
        assert post(running, {"model": NAME, "prompt": PROMPT}, key=key).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert [model.id for model in client.models.list()] == [NAME]
    assert post(running, {"model": NAME, "prompt": OTHER}, key="another").status_code == 200


def test_a_body_over_the_limit_is_not_read(running):
    assert post(running, b" " * (1 << 20) + b"{}").status_code == 413
    parts = (b" " * 65536 for _ in range(40))  # without a length
    headers = {"authorization": f"Bearer {KEY}"}
    with contextlib.suppress(httpx.WriteError):  # it was still sending
        assert httpx.post(f"{running.url}/v1/completions", content=parts, headers=headers).status_code == 413


def test_too_many_requests_are_turned_away(client, running):
    running.gate.limits = dataclasses.replace(running.gate.limits, waiting=1)
    with pytest.raises(openai.BadRequestError, match="6 choices are more than the 5"):
        client.completions.create(model=NAME, prompt=PROMPT, n=6)
    stream = client.completions.create(model=NAME, prompt=PROMPT, stream=True, n=5, **SLOW)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(model=NAME, prompt=PROMPT)
    assert raised.value.response.headers["retry-after"] == "1"
    stream.close()
    running.until(running.idle)
    assert client.completions.create(model=NAME, prompt=OTHER).choices[0].text


def test_a_request_that_takes_too_long_is_ended(client, running):
    running.gate.limits = dataclasses.replace(running.gate.limits, timeout=0.05)
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model=NAME, prompt=PROMPT, **SLOW)
    assert raised.value.status_code == 504
    with pytest.raises(openai.APIError, match=r"not finished after 0\.05 seconds"):
        list(client.completions.create(model=NAME, prompt=PROMPT, stream=True, **SLOW))


def test_a_client_that_vanishes_frees_its_seats(client, local, running):
    """Of a stream, and of an answer that is still waited for; its neighbours' tokens stay."""
    gone = running.gate.metrics.gone._value.get()
    for stream in (True, False):
        body = {"model": NAME, "prompt": PROMPT, "n": 4, "stream": stream, "max_tokens": 208, **SLOW["extra_body"]}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + content)
            running.until(lambda: running.gate.worker.load.seated == 4)
        running.until(running.idle)
    assert running.gate.metrics.gone._value.get() == gone + 2
    assert client.completions.create(model=NAME, prompt=PROMPT).choices[0].text == expected(local)[0][0]


def test_a_worker_that_is_killed_loses_nothing(client, local, running):
    """Streams go on where they were, and answers that were accepted come, with the tokens of `generate`."""
    asked = {"model": NAME, "prompt": PROMPT, "temperature": 1.0, "seed": 2, "max_tokens": 120}
    options = {"schedule": dllm_fast.FirstHitting(), "cache": "none", "gen_length": 120, "block_length": 4}
    texts, _ = expected(local, **options, eos_id=[], temperature=1.0, seed=2)
    whole = []

    def ask():
        whole.append(client.completions.create(extra_body=ENDLESS, **asked).choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(5)]  # more than seats
    streamed = ""
    for n, chunk in enumerate(client.completions.create(stream=True, extra_body=ENDLESS, **asked)):
        streamed += chunk.choices[0].text
        if n == 0:
            for thread in threads:
                thread.start()
            running.until(lambda: running.gate.rows == 6)
            running.gate.worker.process.kill()
    for thread in threads:
        thread.join()
    assert streamed == texts[0] and whole == texts * 5
    assert running.gate.worker.restarts == 1


def test_metrics_and_health(client, running):
    client.completions.create(model=NAME, prompt=OTHER)
    assert httpx.get(f"{running.url}/health").json()["status"] == "ok"
    found = dict(
        line.rsplit(" ", 1) for line in httpx.get(f"{running.url}/metrics").text.splitlines() if line[0] != "#"
    )
    assert float(found["dllm_fast_seats"]) == 4 and float(found["dllm_fast_worker_up"]) == 1
    assert float(found['dllm_fast_requests_total{path="/v1/completions",status="200"}']) > 0
    assert float(found["dllm_fast_completion_tokens_total"]) > 0 and float(found["dllm_fast_forwards_total"]) > 0


def test_the_description_is_openapi_and_paths_that_are_not_there_are_openais_errors(running):
    paths = httpx.get(f"{running.url}/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"} <= set(paths)
    assert httpx.get(f"{running.url}/nowhere").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{running.url}/v1/completions", headers={"authorization": f"Bearer {KEY}"}).status_code == 405
