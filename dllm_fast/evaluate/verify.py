"""``dllm-fast verify``: whether a patched model, with its real weights, gives what the published code gives.

Three comparisons:

- *Logits*: the patched forward and the model's own, each against the same weights in a wider dtype. The patched
  forward's error may be twice that of the model's own.
- *Tokens*: `generate` against LLaDA's sampler on the model's own forward (`published`) and against Fast-dLLM's two
  caches (`fast_dllm`). At the first step that commits different tokens, the gap between the candidates shows whether
  rounding made the difference. Comparing two log-probabilities reads two logits and two normalisers, and rounding may
  move each of the four by as much as a logit.
- *GSM8K*: `dllm_fast.evaluate.gsm8k`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from dllm_fast.config import show_config
from dllm_fast.decoding.fast_dllm import PLAIN, fast_dllm
from dllm_fast.decoding.published import published_generate
from dllm_fast.decoding.schedules import Schedule, Threshold, Uniform
from dllm_fast.decoding.text import encode
from dllm_fast.evaluate.gsm8k import EXAMPLES, PROBLEMS, PUBLISHED, published_name, read_problems, score
from dllm_fast.generate import generate
from dllm_fast.patch import patched, unpatch

GEN_LENGTH, BLOCK_LENGTH = 64, 32
ALLOWED = 2  # the patched model sums in another order: its error may be this many times the model's own
QUANTITIES = 4  # a comparison of two log-probabilities reads so many, each with a logit's error
WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
PROMPTS = (
    "Why does the moon look larger near the horizon?",
    "Write a short poem about a lighthouse in winter.",
    "Tom has 3 boxes with 12 pencils each and gives away 7 pencils. How many are left?",
    "Name three rivers in Europe and the seas that they flow into.",
    "Translate into French: The train leaves at half past nine.",
    "Write a Python function that reverses the words of a sentence.",
    "What is the difference between a virus and a bacterium?",
    "Complete the list: Monday, Tuesday, Wednesday,",
    "And it came to pass in those days, that",
    "Explain to a child how a bicycle stays upright.",
    "A shirt costs $40 and is sold at 15% off. What does it cost now?",
    "Give two arguments for and two against daylight saving time.",
    "Summarise in one sentence: The meeting was moved from Friday to Monday because the room was being painted.",
    "What is the capital of Australia, and why is it not Sydney?",
    "Sort these numbers: 17, 4, 23, 9, 11.",
    "Correct the grammar: She don't likes neither tea or coffee.",
    "List the ingredients of a simple vegetable soup.",
    "If all bloops are razzies and some razzies are lazzies, are all bloops lazzies?",
    "Who wrote the play in which a prince speaks with a skull?",
    "The old man opened the door and",
)


@dataclass(frozen=True)
class Rule:
    """One way to generate: `generate`'s cache and schedule, and the same for the published code."""

    name: str
    cache: str
    schedule: Schedule
    published: dict


RULES = (
    Rule(f"LLaDA's sampler, {GEN_LENGTH} steps", "none", Uniform(GEN_LENGTH), {"steps": GEN_LENGTH}),
    Rule(f"LLaDA's sampler, {GEN_LENGTH // 4} steps", "none", Uniform(GEN_LENGTH // 4), {"steps": GEN_LENGTH // 4}),
    *(
        Rule(f"Fast-dLLM's {cache} cache, {name}", cache, schedule, published)
        for cache in ("prefix", "dual")
        for name, schedule, published in (
            (f"{GEN_LENGTH // 2} steps", Uniform(GEN_LENGTH // 2), {"steps": GEN_LENGTH // 2}),
            ("threshold 0.9", Threshold(0.9), {"threshold": 0.9}),
        )
    ),
)


@dataclass
class Logits:
    """What `compare_logits` found. ``errors`` is None if the weights in a wider dtype do not fit into memory."""

    apart: float  # the largest absolute value of patched - own
    largest: float  # the largest absolute value of the own logits
    errors: "Errors | None" = None

    @property
    def differ(self) -> bool:
        # Written so that NaN differs, and so does any difference if the model's own logits have no rounding error.
        return self.errors is not None and not self.errors.patched <= ALLOWED * self.errors.own

    @property
    def rounding(self) -> float:
        """How far rounding may move a logit."""
        return self.apart if self.errors is None else ALLOWED * self.errors.own_largest


@dataclass
class Errors:
    """Errors of logits against the same weights in a wider dtype: root mean squares, and the model's own largest."""

    own: float
    patched: float
    own_largest: float


@dataclass
class Difference:
    """The first step at which a prompt's tokens differ from the published code's."""

    prompt: int
    step: int
    position: int  # in the sequence
    gap: float  # between the candidates there, in nats


@dataclass
class Agreement:
    """One rule's result: the number of prompts with the same tokens, and the first difference of each other one."""

    rule: str
    same: int
    differences: list[Difference]


class Record:
    """A `generate` streamer that keeps the sequence after each step."""

    def __init__(self):
        self.states: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_draft(self, value: torch.Tensor, sequence: torch.Tensor) -> None:
        self.states.append(sequence.clone())

    def end(self) -> None:
        pass


def prompt_ids(tokenizer, mask_id: int) -> list[torch.Tensor]:
    """Ids [P] of each of `PROMPTS`, as a chat's question if the tokenizer has a chat template."""
    texts = list(PROMPTS)
    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in texts
        ]
    return [torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in encode(tokenizer, texts, mask_id)]


@torch.no_grad()
def _logits(model: nn.Module, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(ids[None]).logits[0].to("cpu", copy=True) for ids in sequences]


def _largest_difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(some, others))


def _rms(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(some, others))
    return math.sqrt(squares / sum(a.numel() for a in some))


def compare_logits(model: nn.Module, prompts: list[torch.Tensor], mask_id: int, impl: str) -> Logits:
    """Compare logits of each prompt with a masked block after it. ``model`` is unpatched, before and after."""
    dtype = next(model.parameters()).dtype
    sequences = [torch.cat((ids, ids.new_full((BLOCK_LENGTH,), mask_id))) for ids in prompts]
    own = _logits(model, sequences)
    with patched(model, impl):
        fast = _logits(model, sequences)
    apart = _largest_difference(own, fast)
    largest = max(float(logits.abs().max()) for logits in own)
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    buffers = [(module, name, value) for module in model.modules() for name, value in module._buffers.items()]
    try:
        truth = _logits(model.to(WIDER.get(dtype, dtype)), sequences)
    except torch.OutOfMemoryError:
        return Logits(apart, largest)
    finally:
        for parameter, own_dtype in dtypes:  # restores every value exactly: the wider dtype can hold them
            parameter.data = parameter.data.to(own_dtype)
        for module, name, value in buffers:
            module._buffers[name] = value
    return Logits(apart, largest, Errors(_rms(own, truth), _rms(fast, truth), _largest_difference(own, truth)))


def compare_tokens(model: PreTrainedModel, prompts: list[torch.Tensor], mask_id: int, impl: str) -> list[Agreement]:
    """Compare each rule's tokens, step by step, with the published code's. ``model`` is unpatched, before and after."""
    published = [[_published_states(model, rule, ids, mask_id) for ids in prompts] for rule in RULES]
    with patched(model, impl):
        fast = [[_fast_states(model, rule, ids, mask_id) for ids in prompts] for rule in RULES]
    results = []
    for rule, theirs, ours in zip(RULES, published, fast):
        differences = []
        for i, (a, b) in enumerate(zip(theirs, ours)):
            step = next((s for s, (x, y) in enumerate(zip(a, b)) if not torch.equal(x, y)), None)
            if step is not None:
                differences.append(Difference(i, step, *_gap(model, rule, prompts[i], mask_id, step, a, b)))
            elif len(a) != len(b):  # the same tokens, in another number of steps
                differences.append(Difference(i, min(len(a), len(b)), len(prompts[i]), math.inf))
        results.append(Agreement(rule.name, len(prompts) - len(differences), differences))
    return results


def _published(model: PreTrainedModel, rule: Rule, ids: torch.Tensor, mask_id: int, watch: Callable) -> torch.Tensor:
    """The published code's sequence. Each step calls ``watch(sequence [L], block, the block's logits [T, V])``."""
    options = {"gen_length": GEN_LENGTH, "block_length": BLOCK_LENGTH, "mask_id": mask_id, **rule.published}
    if rule.cache != "none":
        plain = PLAIN[model.config.model_type](model)
        return fast_dllm(plain, ids, cache=rule.cache, watch=watch, **options)[0]
    return published_generate(
        lambda x, mask: model(x).logits, ids[None], watch=lambda x, block, y: watch(x[0], block, y[0]), **options
    )[0][0]


def _published_states(model: PreTrainedModel, rule: Rule, ids: torch.Tensor, mask_id: int) -> list[torch.Tensor]:
    states = []
    end = _published(model, rule, ids, mask_id, lambda x, block, logits: states.append(x.to("cpu", copy=True)))
    return [*states[1:], end.cpu()]


def _fast_states(model: PreTrainedModel, rule: Rule, ids: torch.Tensor, mask_id: int) -> list[torch.Tensor]:
    record = Record()
    generate(
        model, ids[None], gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH, schedule=rule.schedule, cache=rule.cache,
        mask_id=mask_id, streamer=record,
    )  # fmt: skip
    return record.states


def _gap(
    model: PreTrainedModel, rule: Rule, ids: torch.Tensor, mask_id: int, step: int,
    theirs: list[torch.Tensor], ours: list[torch.Tensor],
) -> tuple[int, float]:  # fmt: skip
    """(position, nats) of the widest gap between candidates where the two committed different tokens at ``step``."""
    watched: list[tuple[torch.Tensor, slice, torch.Tensor] | None] = []

    def watch(x, block, logits):
        wanted = len(watched) == step
        watched.append((x.to("cpu", copy=True), block, logits.double().to("cpu", copy=True)) if wanted else None)

    _published(model, rule, ids, mask_id, watch)
    at_step = watched[step]
    assert at_step is not None
    before, block, logits = at_step
    logp = logits.log_softmax(-1)
    logits[:, mask_id] = float("-inf")
    confidence = logp.gather(1, logits.argmax(-1)[:, None])[:, 0]
    candidate = before[block] == mask_id
    their_tokens = theirs[step][block]
    our_tokens = ours[step][block]
    committed = candidate & (their_tokens != mask_id)
    passed_over = candidate & ~committed
    lowest_committed = confidence[committed].min()
    highest_passed_over = confidence[passed_over].max() if passed_over.any() else lowest_committed
    gaps = {}
    for i in (their_tokens != our_tokens).nonzero()[:, 0].tolist():
        if their_tokens[i] != mask_id and our_tokens[i] != mask_id:  # both commit the position, with different tokens
            gaps[i] = float(logits[i, their_tokens[i]] - logits[i, our_tokens[i]])
        else:  # only one commits it: how far its confidence is from the one that decides
            gap = confidence[i] - highest_passed_over if committed[i] else lowest_committed - confidence[i]
            if "threshold" in rule.published:
                gap = min(gap, (confidence[i] - math.log(rule.published["threshold"])).abs())
            gaps[i] = float(gap)
    widest = max(gaps, key=lambda i: gaps[i])
    return block.start + widest, gaps[widest]


def verify(
    model: PreTrainedModel,
    tokenizer,
    name: str,
    mask_id: int,
    impl: str = "auto",
    gsm8k: str | None = None,
    gsm8k_examples: str | None = None,
    batch_size: int = 8,
) -> bool:
    """Print all three comparisons of a model, patched or not. Returns whether anything differs by more than rounding.

    Args:
        name: the model's path. If it ends with a published model's name, GSM8K uses that one's settings and accuracy.
        gsm8k: a JSONL file with ``question`` and ``answer``; its first 100 are asked. None: GSM8K is left out.
        gsm8k_examples: a file like it; its first four come before each question. None: no examples.
        batch_size: problems answered together.

    Raises:
        ValueError: a file is malformed, or `dllm_fast.patch` refuses the model.
    """
    problems = None if gsm8k is None else read_problems(gsm8k, PROBLEMS)
    examples = [] if gsm8k_examples is None else read_problems(gsm8k_examples, EXAMPLES)
    unpatch(model)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    prompts = [ids.to(device) for ids in prompt_ids(tokenizer, mask_id)]
    print(f"{name}: {type(model).__module__.split('.')[0]}'s {type(model).__name__}, {dtype}, on {device}")
    logits = compare_logits(model, prompts, mask_id, impl)
    differs = print_logits(logits)
    for agreement in compare_tokens(model, prompts, mask_id, impl):
        differs |= print_tokens(agreement, logits.rounding)
    if problems is None:
        print("GSM8K: left out; --gsm8k FILE (JSONL with question and answer) includes it")
    else:
        with patched(model, impl):
            differs |= print_score(model, tokenizer, problems, examples, published_name(name), batch_size)
    if differs:
        print("\nSOMETHING DIFFERS by more than rounding. Please report it, with all of the above, the command, the")
        print("weights' name and revision, and all of the following:\n")
        show_config()
    else:
        print("nothing differs by more than rounding")
    return differs


def print_logits(logits: Logits) -> bool:
    relative = f"patched − own {logits.apart / logits.largest:.1e} of the largest logit"
    if logits.errors is None:
        print(f"logits: {relative}; not judged, because the weights in a wider dtype do not fit into memory")
        return False
    own = logits.errors.own / logits.largest
    fast = logits.errors.patched / logits.largest
    verdict = f"DIFFER: more than {ALLOWED} times the model's own error" if logits.differ else "within rounding"
    print(f"logits: {relative}, root mean square errors: own {own:.1e}, patched {fast:.1e}: {verdict}")
    return logits.differ


def print_tokens(agreement: Agreement, rounding: float) -> bool:
    limit = QUANTITIES * rounding
    beyond = [x for x in agreement.differences if not x.gap <= limit]  # NaN is beyond too
    ties = len(agreement.differences) - len(beyond)
    rest = f"; {ties} differ where the candidates are within rounding ({limit:.1e} nats)" if ties else ""
    prompts = agreement.same + len(agreement.differences)
    print(f"{agreement.rule}: {agreement.same} of {prompts} prompts have the same tokens{rest}")
    for x in beyond:
        print(f"  DIFFERS: prompt {x.prompt}, step {x.step}, position {x.position}: candidates {x.gap:.1e} nats apart")
    return bool(beyond)


def print_score(model, tokenizer, problems: list, examples: list, name: str | None, batch_size: int) -> bool:
    result = score(model, tokenizer, problems, examples, name, batch_size)
    line = f"GSM8K's first {result.asked}: {100 * result.right / result.asked:.1f} % right"
    if name is None:
        print(f"{line}; accuracies are published for {', '.join(PUBLISHED)} only")
        return False
    line += f", published {PUBLISHED[name].accuracy} % of all"
    if result.chance is None:
        print(f"{line}; not judged: the published prompt has {EXAMPLES} worked examples (--gsm8k-examples FILE)")
        return False
    print(f"{line}; {'DIFFERS: ' if result.differs else ''}chance of such a count {result.chance:.3f}")
    return result.differs
