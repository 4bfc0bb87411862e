"""What a request passes before it is served: key, size, model, text to ids, room in the queue."""

import asyncio
import hmac
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dllm_fast.decoding.text import encode
from dllm_fast.errors import require_utf8
from dllm_fast.loading import load_tokenizer
from dllm_fast.serve.bodies import Chat, Completion
from dllm_fast.serve.messages import Ready, Request
from dllm_fast.serve.metrics import Metrics
from dllm_fast.serve.refusals import Refusal, of_value_error
from dllm_fast.serve.worker import Served, Worker

LOOSE = 4  # tokenizers may drop characters, spaces for instance: so many times more are still looked at
ENDING = "the server is ending"


@dataclass(frozen=True)
class Limits:
    """name: the model's in requests. keys: API keys, any of which will do; none: everybody is served.

    waiting: rows that may wait for a seat. timeout: seconds of a request. body: bytes of one.
    """

    name: str
    keys: tuple[str, ...] = ()
    waiting: int = 256
    timeout: float = 600.0
    body: int = 1 << 20
    chat_template: str | None = None


class Gate:
    """The worker, what is known of its model, and the rows that were let in."""

    def __init__(self, served: Served, limits: Limits):
        self.served, self.limits = served, limits
        self.worker = Worker(served)
        self.metrics = Metrics(self.worker)
        self.rows = 0  # let in and not finished
        self.ended = False  # whether nobody is let in any more
        self.encoder = ThreadPoolExecutor(1, "encoder")  # tokenizers are not made for several threads
        self.began = int(time.time())
        self.mark = secrets.token_hex(4)  # in the ids of answers, which differ between replicas

    async def __aenter__(self) -> "Gate":
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.served.model, self.served.trust_remote_code)
        if self.limits.chat_template is not None:
            self.tokenizer.chat_template = Path(self.limits.chat_template).read_text(encoding="utf-8")
        try:
            self.ready: Ready = await self.worker.start()
        except BaseException:  # of a signal, too: Python would wait for the worker at its exit
            await self.worker.close()
            raise
        self.characters = LOOSE * self.ready.positions * max(map(len, self.tokenizer.get_vocab()))
        return self

    async def __aexit__(self, *_) -> None:
        await self.worker.close()

    def give_up(self) -> None:
        """Refuse all requests: those that are not finished and those that come."""
        self.ended = True
        self.worker.give_up(ENDING)

    def admits(self, header: bytes) -> bool:
        """Whether the Authorization ``header`` has one of the keys."""
        if not self.limits.keys:
            return True
        given = header.removeprefix(b"Bearer ")
        return any([hmac.compare_digest(given, key.encode()) for key in self.limits.keys])

    def check(self, body: Completion | Chat, choices: int) -> None:
        """Raise Refusal if the model is another, or so many choices are too many now or ever."""
        if body.model != self.limits.name:
            text = f"model: {body.model[:64]!r} is not served here; {self.limits.name!r} is"
            raise Refusal(404, text, "model", "model_not_found")
        if self.ended:
            raise Refusal(503, ENDING)
        room = self.served.seats + self.limits.waiting
        if choices > room:
            raise Refusal(400, f"n: {choices} choices are more than the {room} that this server takes", "n")
        if self.rows + choices > room:
            raise Refusal(429, f"all {room} places are taken; try again later", code="server_busy")

    async def request(self, body: Completion | Chat) -> tuple[Request, int]:
        """The request for the worker, and how many tokens an answer may have. Raises Refusal."""
        name = "prompt" if isinstance(body, Completion) else "messages"
        repeat = body.n or 1
        count = len(body.prompts) if isinstance(body, Completion) else 1
        self.check(body, count * repeat)
        try:
            options = body.options(self.served.options, self.ready.eos_ids, self.ready.mask_id)
        except ValueError as error:
            raise of_value_error(error, body.field) from None
        length = body.length or options.gen_length
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self.encoder, self.ids, body, name)
        except ValueError as error:
            raise Refusal(400, str(error), name) from None
        for prompt in ids:
            self.check_length(len(prompt), options.gen_length, body)
        if (body.drafts or body.stream_options) and not body.stream:
            field = "drafts" if body.drafts else "stream_options"
            raise Refusal(400, f"{field}: only of a stream", field)
        ids = [prompt for prompt in ids for _ in range(repeat)]
        if options.seed is None:  # drawn here, so that a worker that begins the request again gives the same tokens
            options = replace(options, seed=secrets.randbits(63))
        told = bool(body.stream or body.stops)
        number = next(self.worker.numbers)
        return Request(number, ids, options, told, bool(body.drafts)), length

    def ids(self, body: Completion | Chat, name: str) -> list[list[int]]:
        """The prompts' ids. Raises ValueError."""
        if isinstance(body, Chat):
            if not self.tokenizer.chat_template:
                raise ValueError("messages: this model has no chat template; start the server with --chat-template")
            messages = [message.plain() for message in body.messages]
            self.check_characters(sum(len(message["content"]) for message in messages), body)
            try:
                texts = [str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))]
            except Exception as error:  # a template says in this way that it takes no such roles, for instance
                raise ValueError(f"messages: the chat template refuses them: {error}") from None
        else:
            prompts = body.prompts
            if not isinstance(prompts[0], str):
                if any(self.ready.mask_id in prompt for prompt in prompts):
                    raise ValueError(f"prompt: {self.ready.mask_id} is the mask id")
                return prompts  # type: ignore[return-value]
            texts = [str(text) for text in prompts]
            self.check_characters(max(map(len, texts)), body)
        found = encode(self.tokenizer, [require_utf8(name, text) for text in texts], self.ready.mask_id)
        if not all(found):
            raise ValueError(f"{name}: an empty prompt")
        return found

    def check_characters(self, longest: int, body: Completion | Chat) -> None:
        """Refuse what is too long even if all its tokens are the longest ones, before it costs anything."""
        if longest > self.characters:
            self.check_length(self.ready.positions, 1, body)

    def check_length(self, prompt: int, answer: int, body: Completion | Chat) -> None:
        positions = self.ready.positions
        if prompt + answer > positions:
            text = f"{prompt} tokens and {answer} of the answer's blocks are more than {positions} positions"
            param = body.field("input_ids" if prompt >= positions else "gen_length")
            raise Refusal(400, f"{param}: {text}", param, "context_length_exceeded")
