"""The server under load: many clients at once, of whom some leave, and its throughput beside `generate_many`'s.

    python -m bench.generation.serving --clients 200 --seconds 120

The server is a process with a worker process of its own; the clients are in a third one, on the same cores.

Throughput: in turns, `generate_many` answers a list of prompts, and as many clients ask the server for one each.
Load: every client asks, waits for its answer and asks again. Some read a stream, and of these some leave in the middle;
some send what is malformed. At half time the worker process is killed. Every answer is compared with
`generate_many`'s for the same seed.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch

import dllm_fast
from bench.common import machine, require_idle
from dllm_fast.decoding.text import answer_text
from dllm_fast.loading import end_of_text, load_tokenizer

NAMES, THINGS = ("Tom", "Maria", "Ann", "Sam"), ("apples", "books", "pens", "eggs")
CASES = 64  # requests that differ
LEAVING, STREAMING, MALFORMED = 0.1, 0.5, 0.02  # shares of the clients' requests


@dataclass(frozen=True)
class Case:
    """A request that the server gets, and the answer that it should give."""

    prompt: str
    options: dict
    text: str


@dataclass
class Tally:
    """What the clients saw. lost: answers that were accepted and did not come whole."""

    statuses: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: int = 0
    lost: int = 0
    left: int = 0


def make_cases(model, tokenizer, length: int) -> list[Case]:
    """Half of them are greedy; the others draw, with a seed that they share."""
    draw, eos_ids = random.Random(0), end_of_text(model, tokenizer)
    found = []
    for number in range(CASES):
        amount, more = draw.randint(2, 99), draw.randint(2, 9)
        prompt = f"{draw.choice(NAMES)} has {amount} {draw.choice(THINGS)} and buys {more} more." * draw.randint(1, 3)
        options = {"max_tokens": length, "temperature": number % 2 * 0.7, "seed": 7}
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        given = {"gen_length": length, "temperature": options["temperature"], "seed": 7, "eos_id": eos_ids}
        answer = dllm_fast.generate(model, ids, **given).sequences[0, ids.shape[1] :].tolist()
        found.append(Case(prompt, options, answer_text(tokenizer, answer, eos_ids)))
    return found


class Server:
    """``dllm-fast serve`` as a process."""

    def __init__(self, name: str, seats: int, waiting: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dllm_fast.cli.main", "serve", "--model", name, "--port", str(port)]
        self.process = subprocess.Popen([*command, "--seats", str(seats), "--waiting", str(waiting)])

    def wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, "the server ended"
            try:
                return httpx.get(f"{self.url}/health").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.2)
        raise SystemExit("the server did not begin")

    @property
    def worker(self) -> int:
        """The process that holds the model."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return next(int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes())

    def memory(self) -> int:
        """MiB of both processes."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (self.process.pid, self.worker)]
        return sum(pages) * os.sysconf("SC_PAGESIZE") >> 20

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


async def ask(client: httpx.AsyncClient, name: str, case: Case, tally: Tally, draw: random.Random) -> None:
    """One request of a client, in one of the ways of clients."""
    body = {"model": name, "prompt": case.prompt, "stream": draw.random() < STREAMING, **case.options}
    if draw.random() < MALFORMED:
        reply = await client.post("/v1/completions", content=json.dumps(body)[: draw.randint(1, 40)])
        tally.statuses[reply.status_code] += 1
        return
    leaves = body["stream"] and draw.random() < LEAVING / STREAMING
    began = time.perf_counter()
    text, ended = "", False
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        tally.statuses[reply.status_code] += 1
        if reply.status_code != 200:
            await reply.aread()
            return
        if not body["stream"]:
            content = json.loads(await reply.aread())
            text, ended = content["choices"][0]["text"], True
            tally.tokens += content["usage"]["completion_tokens"]
        else:
            async for line in reply.aiter_lines():
                if leaves and line:
                    tally.left += 1
                    return  # which closes the connection
                if line == "data: [DONE]":
                    ended = True
                elif line:
                    text += json.loads(line[6:])["choices"][0]["text"]
    tally.seconds.append(time.perf_counter() - began)
    tally.lost += not ended
    tally.wrong += ended and text != case.text


async def load(url: str, name: str, cases: list[Case], clients: int, seconds: float, kill) -> Tally:
    tally, end = Tally(), time.perf_counter() + seconds

    async def one(number: int) -> None:
        draw = random.Random(number)
        while time.perf_counter() < end:
            try:
                await ask(client, name, draw.choice(cases), tally, draw)
            except httpx.HTTPError as error:
                tally.lost += 1
                print(f"lost: {error!r}")

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, headers=headers) as client:
        asyncio.get_running_loop().call_later(seconds / 2, kill)
        await asyncio.gather(*(one(number) for number in range(clients)))
    return tally


async def ask_all(url: str, name: str, cases: list[Case]) -> float:
    """Seconds until all are answered, who ask at the same time."""
    limits = httpx.Limits(max_connections=len(cases), max_keepalive_connections=len(cases))
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def one(case: Case) -> None:
            reply = await client.post("/v1/completions", json={"model": name, "prompt": case.prompt, **case.options})
            assert reply.json()["choices"][0]["text"] == case.text

        began = time.perf_counter()
        await asyncio.gather(*(one(case) for case in cases))
        return time.perf_counter() - began


def throughput(server: Server, name: str, model, tokenizer, cases: list[Case], args) -> dict:
    """Seconds for the same greedy requests, in turns."""
    greedy = [case for case in cases if not case.options["temperature"]]
    asked = [greedy[n % len(greedy)] for n in range(args.clients)]
    prompts = [tokenizer(case.prompt, add_special_tokens=False).input_ids for case in asked]
    options = {"gen_length": args.length, "eos_id": end_of_text(model, tokenizer), "batch_size": args.seats}
    ours, theirs = [], []
    for _ in range(args.rounds):
        began = time.perf_counter()
        for _ in dllm_fast.generate_many(model, prompts, **options):
            pass
        theirs.append(time.perf_counter() - began)
        ours.append(asyncio.run(ask_all(server.url, name, asked)))
    ratios = [many / served for many, served in zip(theirs, ours)]
    return {
        "generate_many_s": statistics.median(theirs), "server_s": statistics.median(ours),
        "ratio": statistics.median(ratios), "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llada-gsm8k")
    add("--clients", type=int, default=200)
    add("--seconds", type=float, default=120.0)
    add("--seats", type=int, default=16)
    add("--length", type=int, default=128)
    add("--rounds", type=int, default=3)
    add("--force", action="store_true", help="measure on a busy machine too")
    args = parser.parse_args(arguments)
    require_idle(args.force)
    print(machine(torch.device("cpu"), torch.float32))
    server = Server(args.model, args.seats, args.clients)
    model, tokenizer = dllm_fast.from_pretrained(args.model, dtype=torch.float32), load_tokenizer(args.model)
    cases = make_cases(model, tokenizer, args.length)
    server.wait()

    speed = throughput(server, args.model, model, tokenizer, cases, args)
    print(
        f"{args.clients} requests of {args.length} tokens, {args.seats} rows at a time, median of {args.rounds} turns: "
        f"generate_many {speed['generate_many_s']:.2f} s, the server {speed['server_s']:.2f} s, "
        f"{speed['ratio']:.2f} of its throughput ({speed['ratios'][0]:.2f} to {speed['ratios'][-1]:.2f})"
    )
    memory = server.memory()
    tally = asyncio.run(
        load(server.url, args.model, cases, args.clients, args.seconds, lambda: os.kill(server.worker, signal.SIGKILL))
    )
    later = server.memory()
    found = sorted(tally.seconds)
    p50, p99 = (found[int(share * (len(found) - 1))] for share in (0.5, 0.99))
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    kept = sum(float(line.split()[1]) for line in lines if line.startswith(("dllm_fast_seated", "dllm_fast_waiting")))
    code = server.end()
    print(
        f"{args.clients} clients for {args.seconds:.0f} s: {dict(sorted(tally.statuses.items()))} by status, "
        f"{len(found)} answers read to the end, {tally.wrong} of them not generate's, {tally.lost} lost; "
        f"{tally.left} clients left in the middle; the worker was killed once\n"
        f"seconds an answer: median {p50:.2f}, 99 % {p99:.2f}; MiB of both processes: {memory} before, {later} after; "
        f"rows left {kept:.0f}; exit code after SIGTERM {code}"
    )
    report = {"clients": args.clients, "seconds": args.seconds, "statuses": tally.statuses, "answers": len(found)}
    report |= {"wrong": tally.wrong, "lost": tally.lost, "left": tally.left, "p50_s": p50, "p99_s": p99, **speed}
    print(json.dumps(report))
    assert not (tally.wrong or tally.lost or any(status >= 500 for status in tally.statuses)), "see above"


if __name__ == "__main__":
    main()
