"""What clients may send: OpenAI's fields, and `generate`'s options under their own names.

A field is refused if nobody knows it, and so is a value of OpenAI's that would have to be honoured and cannot be.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dllm_fast.decoding.options import BLOCK, CACHE_DTYPES, CACHES, OPTIONS, Options
from dllm_fast.decoding.spelling import SPELLED, policy_of
from dllm_fast.decoding.values import require
from dllm_fast.kernels.checks import CONFIDENCES

STEPS = 4096  # of a schedule: planning an ancestral grid costs memory and time, before a single forward
DRAFTS = 16  # states that `speculate` may ask for
STOPS = 16

Whole = Annotated[int, Field(ge=0, lt=1 << 31)]
Positive = Annotated[int, Field(ge=1, lt=1 << 31)]
Prompt = Annotated[list[Whole], Field(min_length=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Spelled = Annotated[str, Field(max_length=64)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is padded


class Body(BaseModel):
    """What both kinds of completions take."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: Annotated[str, Field(max_length=512)]
    # OpenAI's
    max_tokens: Positive | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # Taken with the value that changes nothing
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # For the sender's own records
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # dllm_fast's
    drafts: bool | None = Field(None, description="stream the live block after each step, as `draft` of a choice")
    block_length: Positive | None = None
    schedule: Spelled | None = Field(None, description="uniform=32, pyramid=1, threshold=0.9, factor=1, ...")
    confidence: Literal[tuple(CONFIDENCES)] | None = None  # type: ignore[valid-type]
    top_k: Whole | None = Field(None, description="draw from so many of the most probable tokens; 0: from all")
    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    cache: Literal[CACHES] | None = None  # type: ignore[valid-type]
    refresh: Spelled | None = Field(None, description="block, every=4, window=32,0 or drift=0.2")
    remask: Spelled | None = Field(None, description="remdm=0.1, verify=0.7 or p2=1")
    suffix_length: Whole | None = None
    suffix_sample: Whole | None = None
    skip_committed: bool | None = None
    speculate: Annotated[int, Field(ge=0, le=DRAFTS)] | Literal["auto"] | None = None
    cache_dtype: Literal[CACHE_DTYPES[1:]] | None = None  # type: ignore[valid-type]
    pipeline: Spelled | None = Field(None, description="d2f=0.1,0.95 or multi-block=0.1,,1; see docs/semantics.md")
    eos_id: Whole | list[Whole] | None = Field(None, description="[]: none; default: the model's")
    suppress_tokens: Whole | list[Whole] | None = None
    defer_tokens: Whole | list[Whole] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def length(self) -> int | None:
        """How many tokens an answer may have."""
        return self.max_tokens

    def field(self, option: str) -> str | None:
        """The field that gives one of `generate`'s options, or what is called like it in an error; None: none does."""
        name = {"gen_length": "max_tokens", "input_ids": "prompt"}.get(option, option)
        return name if name in type(self).model_fields else None

    def options(self, served: Options, eos_ids: tuple[int, ...], mask_id: int) -> Options:
        """`generate`'s, where a field is not given the ``served`` one. The answer's length is rounded up to whole
        blocks. Raises ValueError that begins with an option's name."""
        given = {name: getattr(served, name) for name in OPTIONS}
        given |= {"eos_id": eos_ids, "mask_id": mask_id}
        for name in OPTIONS:
            value = getattr(self, name, None)
            if value is not None:
                given[name] = policy_of(name, value) if name in SPELLED else value
        steps = getattr(given["schedule"], "steps", 0)
        require(steps <= STEPS, f"schedule: steps={steps} is more than {STEPS}")
        block = BLOCK if given["block_length"] is None else given["block_length"]
        require(isinstance(block, int) and block > 0, f"block_length={block!r} is not a positive whole number")
        given["gen_length"] = -(-(self.length or served.gen_length) // block) * block
        return Options.of_call("completions", given)


class Completion(Body):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Annotated[list[Prompt], Field(min_length=1)] | Prompt
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item,return-value]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Annotated[str, Field(max_length=64)]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """What a chat template is given."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class Chat(Body):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None

    @property
    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def field(self, option: str) -> str | None:
        if option == "gen_length" and self.max_completion_tokens:
            return "max_completion_tokens"
        return "messages" if option in ("input_ids", "prompt") else super().field(option)
