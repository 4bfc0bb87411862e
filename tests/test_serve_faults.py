"""``dllm-fast serve`` and what goes wrong: bad input, too much of it, clients that leave, a worker that is killed."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_serve_exit import heeds_ctrl_c

import dllm_fast

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
serving = pytest.importorskip("serving", reason="the extra serve is not installed", exc_type=ImportError)

KEY, NAME, PROMPT, OTHER = serving.KEY, serving.NAME, serving.PROMPT, serving.OTHER
ENDLESS, SLOW, expected = serving.ENDLESS, serving.SLOW, serving.expected
running, local, client, left_idle = serving.running, serving.local, serving.client, serving.left_idle

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
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.5}, 400, "top_p"),
    ({"top_k": -1}, 400, "top_k"),
    ({"min_p": 0.5}, 400, "min_p"),
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
    bearer = f"Bearer {key}".encode(errors="surrogatepass")
    headers = {"content-type": "application/json", "authorization": bearer, **headers}
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
    for key in ("wrong", KEY + "!", "\xe9", "\ud800"):
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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("kept", [False, True], ids=["any length", "short"])
def test_no_request_of_the_description_is_a_server_error(running, path, kept):
    """Requests made from the server's own OpenAPI, for the model that is there; half of them with a short answer."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    statuses = []

    @hypothesis.given(case=schema[path]["POST"].as_strategy())
    @hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    def ask(case):
        if isinstance(case.body, dict):
            case.body["model"] = NAME
            if kept:
                case.body |= {"max_tokens": 13, "block_length": 13, "schedule": "threshold=0.5"}
                case.body.pop("max_completion_tokens", None)
        reply = case.call(headers={"authorization": f"Bearer {KEY}"}, timeout=60)
        statuses.append(reply.status_code)
        assert reply.status_code < 500, reply.text
        assert reply.status_code == 200 or reply.json()["error"]["message"]

    ask()
    assert len(statuses) >= 100 and (200 in statuses or not kept)


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_lets_what_runs_end(sent, code):
    """The command itself: a stream that has begun is sent to its end, nobody else is let in, and it exits."""
    command = [sys.executable, "-m", "dllm_fast.cli.main", "serve", "--model", NAME, "--port", "0", "--seats", "2"]
    root = Path(dllm_fast.__file__).parents[1]
    environment = os.environ | {"DLLM_FAST_API_KEY": KEY}
    pipe = {"stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipe, cwd=root, env=environment, preexec_fn=heeds_ctrl_c)
    try:
        url = re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            stream = client.completions.create(model=NAME, prompt=PROMPT, stream=True, **SLOW)
            pieces = iter(stream)
            tokens = [next(pieces).choices[0]]
            process.send_signal(sent)
            tokens += [piece.choices[0] for piece in pieces]
        assert tokens[-1].finish_reason == "length" and len(tokens) > 40
        assert process.wait(60) == code
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()
        process.wait()
