"""The answer to an accepted request: JSON once it is there, or server-sent events while it comes.

A client that leaves, or a request that takes too long, frees its seats at the next block.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Coroutine
from typing import Any

from starlette.responses import Response

from dllm_fast.serve.bodies import Chat, Completion
from dllm_fast.serve.gate import Gate
from dllm_fast.serve.messages import Accepted, Block, Draft, Failed, Refused, Request
from dllm_fast.serve.refusals import Refusal, json_response, of_value_error
from dllm_fast.serve.text import Answer

FAREWELL = 5.0  # seconds for the last words to a client that may not be reading
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Reply(Response):
    """Serves ``request`` when it is called, as ASGI applications are."""

    def __init__(self, gate: Gate, body: Completion | Chat, request: Request, length: int):
        self.gate, self.asked, self.request = gate, body, request
        self.chat = isinstance(body, Chat)
        self.created, self.began = int(time.time()), time.perf_counter()
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{gate.mark}-{request.number}"
        eos_ids = request.options.eos_id
        known = gate.tokenizer, gate.ready.mask_id, eos_ids if isinstance(eos_ids, list | tuple) else (eos_ids,)
        self.answers = [Answer(*known, body.stops, length) for _ in request.prompts]
        self.streaming = False  # whether the head was sent
        self.background = None

    async def __call__(self, scope, receive, send) -> None:
        gate, number, rows = self.gate, self.request.number, len(self.request.prompts)
        try:
            gate.check(self.asked, rows)  # others may have come while the prompt was read
        except Refusal as refusal:
            await refusal.response(scope, receive, send)
            return
        events: asyncio.Queue = asyncio.Queue()
        tasks = [asyncio.create_task(self._tell(events, send)), asyncio.create_task(_gone(receive))]
        gate.rows += rows
        try:
            gate.worker.submit(self.request, events.put_nowait)
            timeout = gate.limits.timeout
            done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gate.rows -= rows
            gate.worker.forget(number)
            for task in tasks:
                task.cancel()
            ended, _ = await asyncio.gather(*tasks, return_exceptions=True)
        if tasks[0] in done:
            if isinstance(ended, Refusal):
                await self._refuse(ended, scope, receive, send)
            elif isinstance(ended, BaseException):
                raise ended
        elif done:
            gate.metrics.gone.inc()
        else:
            late = Refusal(504, f"not finished after {timeout} seconds", code="timeout")
            await self._refuse(late, scope, receive, send)

    async def _refuse(self, refusal: Refusal, scope, receive, send) -> None:
        """Say why there is no answer, or no more of it."""
        if self.streaming:
            words: Coroutine = self._end(send, refusal.content)
        else:
            words = refusal.response(scope, receive, send)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(words, FAREWELL)

    # Events to words

    async def _tell(self, events: asyncio.Queue, send) -> None:
        """Send the answers of all choices. Raises Refusal."""
        stream = bool(self.asked.stream)
        unfinished = set(range(len(self.answers)))
        while unfinished:
            event = await events.get()
            if isinstance(event, Refused):
                raise of_value_error(event.error, self.asked.field)
            if isinstance(event, Failed):
                raise Refusal(503 if event.again else 500, event.error)
            if isinstance(event, Accepted):
                if stream and not self.streaming:  # a worker that took over from another accepts it again
                    await self._begin(send)
            elif event.choice in unfinished:
                if isinstance(event, Draft):
                    await self._draft(event, send)
                    continue
                await self._block(event, unfinished, send if stream else None)
        self.gate.worker.finish(self.request.number)
        self._count()
        if not stream:
            choices = [self._choice(n, answer.text, answer.finish) for n, answer in enumerate(self.answers)]
            content = self._content(choices) | {"usage": self.usage}
            await json_response(content)({"type": "http"}, None, send)  # type: ignore[arg-type]
            return
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            await self._line(send, json.dumps(self._content([]) | {"usage": self.usage}))
        await self._end(send)

    async def _block(self, block: Block, unfinished: set[int], send) -> None:
        """Take in a finished block, and send what is new to ``send`` unless that is None."""
        answer, choice = self.answers[block.choice], block.choice
        if not any(answer.ids for answer in self.answers):
            self.gate.metrics.first.observe(time.perf_counter() - self.began)
        answer.take(block)
        if answer.finish is not None:
            unfinished.discard(choice)
            if not block.done:
                self.gate.worker.stop(self.request.number, choice)
        if send is not None and ((text := answer.news()) or answer.finish):
            await self._event(send, self._choice(choice, text, answer.finish))

    async def _draft(self, draft: Draft, send) -> None:
        """Send the live block, unless a worker that took over from another is still at an earlier one."""
        answer = self.answers[draft.choice]
        if draft.begin >= len(answer.ids):
            choice = self._choice(draft.choice, "", None)
            await self._event(send, choice | {"draft": answer.draft(draft)})

    def _choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        common = {"index": index, "finish_reason": finish, "logprobs": None}
        if not self.chat:
            return common | {"text": text}
        return common | {"delta" if self.asked.stream else "message": {"role": "assistant", "content": text}}

    def _content(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if self.asked.stream else "chat.completion"
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.asked.model, "choices": choices
        }  # fmt: skip

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, and forwards: those of all choices, each as if it were alone."""
        prompt = sum(map(len, self.request.prompts))
        tokens = sum(answer.tokens for answer in self.answers)
        nfe = sum(answer.nfe for answer in self.answers)
        counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        return counts | {"nfe": nfe, "tokens_per_forward": round(tokens / nfe, 3) if nfe else 0.0}

    def _count(self) -> None:
        metrics, usage = self.gate.metrics, self.usage
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.tokens.inc(usage["completion_tokens"])
        metrics.forwards.inc(usage["nfe"])
        metrics.seconds.observe(time.perf_counter() - self.began)
        for answer in self.answers:
            metrics.nfe.observe(answer.nfe)

    # Server-sent events

    async def _begin(self, send) -> None:
        self.streaming = True
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})

    async def _event(self, send, choice: dict[str, Any]) -> None:
        await self._line(send, json.dumps(self._content([choice])))

    async def _line(self, send, data: str, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

    async def _end(self, send, error: dict[str, Any] | None = None) -> None:
        if error is not None:
            await self._line(send, json.dumps(error))
        await self._line(send, "[DONE]", more=False)


async def _gone(receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
