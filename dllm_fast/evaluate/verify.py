"""``dllm-fast verify``: whether a model's own weights give, patched, what the published code gives.

Three comparisons. *Logits*: the patched forward and the model's own, each against the same weights in a wider dtype;
the patched one may be off by twice what the model's own is. *Tokens*: `generate` against LLaDA's sampler on the model's
own forward (`published`) and against Fast-dLLM's two caches (`fast_dllm`). Where a step first leaves other tokens, the
gap between the candidates says whether rounding decided: a comparison of two log-probabilities reads two logits and two
normalisers, each off by as much as a logit may be. *GSM8K*: `dllm_fast.evaluate.gsm8k`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dllm_fast.config import show_config
from dllm_fast.decoding.fast_dllm import PlainLLaDA, PlainModernBert, fast_dllm
from dllm_fast.decoding.published import published_generate
from dllm_fast.decoding.schedules import Schedule, Threshold, Uniform
from dllm_fast.decoding.text import encode
from dllm_fast.evaluate.gsm8k import EXAMPLES, PROBLEMS, PUBLISHED, published_name, read_problems, score
from dllm_fast.generate import generate
from dllm_fast.patch import patched, unpatch

GEN_LENGTH, BLOCK_LENGTH = 64, 32
ALLOWED = 2  # times the model's own error is what a patched model's may be: summed in another order
QUANTITIES = 4  # each off by a logit's error, in a comparison of two log-probabilities
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
    """One way to generate: `generate`'s cache and schedule, and the same for the code that it is held to."""

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
    """Largest absolute values of patched − own and of the logits; and of the errors against the same weights in a wider
    dtype the root mean squares, and the model's own largest: None where those weights do not fit into memory."""

    apart: float
    largest: float
    own_error: float | None = None
    patched_error: float | None = None
    own_largest_error: float | None = None

    @property
    def differ(self) -> bool:
        # Also true of NaN, and of logits with no rounding at all that are apart.
        return self.own_error is not None and not self.patched_error <= ALLOWED * self.own_error

    @property
    def rounding(self) -> float:
        """How far rounding may move a logit."""
        return self.apart if self.own_largest_error is None else ALLOWED * self.own_largest_error


@dataclass
class Difference:
    """The first step at which a prompt's tokens are not those of the published code."""

    prompt: int
    step: int
    position: int  # in the sequence
    gap: float  # in nats, of the candidates there


@dataclass
class Agreement:
    """What came out under one rule: ``same`` prompts with the same tokens, and the others' first differences."""

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
    """Ids [P] of each of `PROMPTS`, as a chat's question where the tokenizer has a template for chats."""
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


def _apart(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(some, others))


def _rms(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(some, others))
    return math.sqrt(squares / sum(a.numel() for a in some))


def compare_logits(model: nn.Module, prompts: list[torch.Tensor], mask_id: int, impl: str) -> Logits:
    """Logits of each prompt and a masked block after it. ``model`` is not patched, and is what it was afterwards."""
    dtype = next(model.parameters()).dtype
    sequences = [torch.cat((ids, ids.new_full((BLOCK_LENGTH,), mask_id))) for ids in prompts]
    own = _logits(model, sequences)
    with patched(model, impl):
        fast = _logits(model, sequences)
    largest = max(float(logits.abs().max()) for logits in own)
    narrow = [(parameter, parameter.dtype) for parameter in model.parameters()]
    buffers = [(module, name, value) for module in model.modules() for name, value in module._buffers.items()]
    try:
        truth = _logits(model.to(WIDER.get(dtype, dtype)), sequences)
    except torch.OutOfMemoryError:
        return Logits(_apart(own, fast), largest)
    finally:
        for parameter, was in narrow:  # exactly what they were: the wider dtype holds every value
            parameter.data = parameter.data.to(was)
        for module, name, value in buffers:
            module._buffers[name] = value
    return Logits(_apart(own, fast), largest, _rms(own, truth), _rms(fast, truth), _apart(own, truth))


def compare_tokens(model: nn.Module, prompts: list[torch.Tensor], mask_id: int, impl: str) -> list[Agreement]:
    """Each rule's tokens, step by step, of the patched model and of the published code. ``model`` is not patched."""
    found = [[_published_states(model, rule, ids, mask_id) for ids in prompts] for rule in RULES]
    with patched(model, impl):
        fast = [[_fast_states(model, rule, ids, mask_id) for ids in prompts] for rule in RULES]
    results = []
    for rule, theirs, ours in zip(RULES, found, fast):
        differences = []
        for i, (a, b) in enumerate(zip(theirs, ours)):
            step = next((s for s, (x, y) in enumerate(zip(a, b)) if not torch.equal(x, y)), None)
            if step is not None:
                differences.append(Difference(i, step, *_gap(model, rule, prompts[i], mask_id, step, a, b)))
            elif len(a) != len(b):  # the same tokens in another number of steps
                differences.append(Difference(i, min(len(a), len(b)), len(prompts[i]), math.inf))
        results.append(Agreement(rule.name, len(prompts) - len(differences), differences))
    return results


def _published(model: nn.Module, rule: Rule, ids: torch.Tensor, mask_id: int, watch: Callable) -> torch.Tensor:
    """The published code's sequence; ``watch`` sees the sequence [L], the block and its logits [T, V] at each step."""
    options = {"gen_length": GEN_LENGTH, "block_length": BLOCK_LENGTH, "mask_id": mask_id, **rule.published}
    if rule.cache != "none":
        plain = PlainModernBert(model) if model.config.model_type == "modernbert" else PlainLLaDA(model)
        return fast_dllm(plain, ids, cache=rule.cache, watch=watch, **options)[0]
    return published_generate(
        lambda x, mask: model(x).logits, ids[None], watch=lambda x, live, y: watch(x[0], live, y[0]), **options
    )[0][0]


def _published_states(model: nn.Module, rule: Rule, ids: torch.Tensor, mask_id: int) -> list[torch.Tensor]:
    states = []
    end = _published(model, rule, ids, mask_id, lambda x, live, logits: states.append(x.to("cpu", copy=True)))
    return [*states[1:], end.cpu()]


def _fast_states(model: nn.Module, rule: Rule, ids: torch.Tensor, mask_id: int) -> list[torch.Tensor]:
    record = Record()
    generate(
        model, ids[None], gen_length=GEN_LENGTH, block_length=BLOCK_LENGTH, schedule=rule.schedule, cache=rule.cache,
        mask_id=mask_id, streamer=record,
    )  # fmt: skip
    return record.states


def _gap(model: nn.Module, rule: Rule, ids: torch.Tensor, mask_id: int, step: int, theirs, ours) -> tuple[int, float]:
    """Where the two chose differently at ``step``, and by how many nats: the widest such gap."""
    seen: list[tuple[torch.Tensor, slice, torch.Tensor] | None] = []

    def watch(x, live, logits):
        here = len(seen) == step
        seen.append((x.to("cpu", copy=True), live, logits.double().to("cpu", copy=True)) if here else None)

    _published(model, rule, ids, mask_id, watch)
    before, live, logits = seen[step]
    logp = logits.log_softmax(-1)
    logits[:, mask_id] = float("-inf")
    confidence = logp.gather(1, logits.argmax(-1)[:, None])[:, 0]
    candidate = before[live] == mask_id
    theirs, ours = theirs[step][live], ours[step][live]
    kept = candidate & (theirs != mask_id)
    lowest_kept = confidence[kept].min()
    highest_left = confidence[candidate & ~kept].max() if (candidate & ~kept).any() else lowest_kept
    gaps = {}
    for i in (theirs != ours).nonzero()[:, 0].tolist():
        if theirs[i] != mask_id and ours[i] != mask_id:  # both keep it, with two tokens
            gaps[i] = float(logits[i, theirs[i]] - logits[i, ours[i]])
        else:  # one keeps it: how far its confidence is from what decides
            gap = confidence[i] - highest_left if kept[i] else lowest_kept - confidence[i]
            if "threshold" in rule.published:
                gap = min(gap, (confidence[i] - math.log(rule.published["threshold"])).abs())
            gaps[i] = float(gap)
    widest = max(gaps, key=gaps.get)
    return live.start + widest, gaps[widest]


def verify(
    model: nn.Module,
    tokenizer,
    name: str,
    mask_id: int,
    impl: str = "auto",
    gsm8k: str | None = None,
    gsm8k_examples: str | None = None,
    batch_size: int = 8,
) -> bool:
    """Print all three comparisons of a patched or unpatched model; whether anything differs by more than rounding.

    Args:
        name: of the model; where it ends in a published one's, that one's settings and accuracy are taken for GSM8K.
        gsm8k: a JSONL file with ``question`` and ``answer``, of which the first 100 are asked. None: left out.
        gsm8k_examples: one whose first four come before each question. None: no examples.
        batch_size: problems answered together.

    Raises:
        ValueError: a file is not as it should be, or `dllm_fast.patch` refuses.
    """
    problems = None if gsm8k is None else read_problems(gsm8k, PROBLEMS)
    examples = [] if gsm8k_examples is None else read_problems(gsm8k_examples, EXAMPLES)
    unpatch(model)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    prompts = [ids.to(device) for ids in prompt_ids(tokenizer, mask_id)]
    print(f"{name}: {type(model).__module__.split('.')[0]}'s {type(model).__name__}, {dtype}, on {device}")
    logits = compare_logits(model, prompts, mask_id, impl)
    differs = print_logits(logits)
    for found in compare_tokens(model, prompts, mask_id, impl):
        differs |= print_tokens(found, logits.rounding)
    if problems is None:
        print("GSM8K: left out, as there is no --gsm8k FILE (JSONL with question and answer)")
    else:
        with patched(model, impl):
            differs |= print_score(model, tokenizer, problems, examples, published_name(name), batch_size)
    if differs:
        print(
            "\nSOMETHING DIFFERS by more than rounding. Please report it: all of the above, the command, which weights"
        )
        print("(name and revision), and what follows.\n")
        show_config()
    else:
        print("nothing differs by more than rounding")
    return differs


def print_logits(logits: Logits) -> bool:
    relative = f"patched − own {logits.apart / logits.largest:.1e} of the largest logit"
    if logits.own_error is None:
        print(f"logits: {relative}; not judged, as the weights in a wider dtype do not fit into memory")
        return False
    own, fast = logits.own_error / logits.largest, logits.patched_error / logits.largest
    verdict = (
        f"DIFFER: more than {ALLOWED} times the model's own error" if logits.differ else "as exact as the model's own"
    )
    print(f"logits: {relative}, root mean square errors: own {own:.1e}, patched {fast:.1e}: {verdict}")
    return logits.differ


def print_tokens(found: Agreement, rounding: float) -> bool:
    limit = QUANTITIES * rounding
    beyond = [x for x in found.differences if not x.gap <= limit]
    ties = len(found.differences) - len(beyond)
    rest = f"; {ties} part where candidates are within rounding ({limit:.1e} nats)" if ties else ""
    print(f"{found.rule}: {found.same} of {found.same + len(found.differences)} prompts have the same tokens{rest}")
    for x in beyond:
        print(f"  DIFFERS: prompt {x.prompt}, step {x.step}, position {x.position}: candidates {x.gap:.1e} nats apart")
    return bool(beyond)


def print_score(model, tokenizer, problems: list, examples: list, name: str | None, batch_size: int) -> bool:
    found = score(model, tokenizer, problems, examples, name, batch_size)
    line = f"GSM8K's first {found.asked}: {100 * found.right / found.asked:.1f} % right"
    if name is None:
        print(f"{line}; no accuracy is published for a model of this name ({', '.join(PUBLISHED)})")
        return False
    line += f", published {PUBLISHED[name].accuracy} % of all"
    if found.chance is None:
        print(f"{line}; not judged: the published prompt has {EXAMPLES} worked examples, --gsm8k-examples FILE")
        return False
    print(f"{line}; {'DIFFERS: ' if found.differs else ''}chance of such a count {found.chance:.3f}")
    return found.differs
