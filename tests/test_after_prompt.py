"""Blocks that are counted from the end of the prompt, as D2F's are: tokens, forwards and positions of plain loops under
the published mask, in any batch; and what such models refuse."""

import copy
import random
import re

import others
import plain_blocks
import plain_loop
import pytest
import torch
import torch.nn.functional as F
from needs import needs_cpp, needs_triton
from rows import batched, seated
from test_pipeline import draw, evaluated_from, follow
from tiny import EOS, MAKERS, MASK

import dllm_fast
from dllm_fast import D2F, Drift, Edit, Every, MultiBlock, Threshold, Uniform, backend
from dllm_fast.patch import bound_family

BLOCK = 4
NAMES = ["llada-gqa", "qwen3", "qwen2-shifted"]


class Masked(plain_loop.Memory):
    """A forward of a native LLaDA, of everything, under a mask. Its own has none, and no fp64 norms."""

    def __init__(self, family):
        super().__init__(family, family.positions, False)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of ids [L] under a mask [L, L] bool."""
        self.mask, every = mask, list(range(len(ids)))
        return self.logits(ids, every, every)

    def attend(self, layer, q, at, seen):
        group = self.family.heads // self.family.kv_heads
        keys, values = (x[layer, seen].repeat_interleave(group, 1).transpose(0, 1) for x in (self.keys, self.values))
        return F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=self.mask).transpose(0, 1)


def make(name: str, block: int, impl: str = "torch", origin: str = "prompt", dtype=torch.float64):
    """A patched model in blocks, and its logits [L, V] of ids [L] under a mask [L, L] bool."""
    model = others.made(name).to(dtype)
    model.config.block_causal, model.config.block_causal_origin = block, origin
    own = copy.deepcopy(model)
    dllm_fast.patch(model, impl)
    if name in MAKERS:
        return model, Masked(bound_family(model))

    def logits(ids, seen):
        z = own(input_ids=ids[None], attention_mask=seen[None, None]).logits[0]
        return others.moved(z) if name in others.SHIFTED else z

    return model, logits


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, EOS, (length,), generator=torch.Generator().manual_seed(100 * seed + length))


class Evaluate:
    """What a step of a pipeline evaluates: at first the prompt too; then the live blocks, and before them those that
    the step before has filled. All of it sees all that it may."""

    def __init__(self, logits, length: int, block: int, cfg_scale: float, shifted: bool):
        self.logits, self.prompt, self.block, self.cfg_scale, self.positions = logits, length, block, cfg_scale, 0
        self.shifted = shifted

    def __call__(self, ids, open_, asked):
        self.positions += (asked.stop - evaluated_from(asked, self.shifted)) * (2 if self.cfg_scale else 1)
        seen = plain_blocks.causal_blocks(asked.stop, self.block, self.prompt)
        z = self.logits(ids[: asked.stop], seen)
        if not self.cfg_scale:
            return z
        base = self.logits(ids.masked_fill(~open_, MASK)[: asked.stop], seen)
        return base + (self.cfg_scale + 1) * (z - base)


def draw_request(seed: int):
    """A pipeline's, with answers that need not be whole blocks."""
    request = draw(random.Random(seed), "dual")
    request.options["gen_length"] += seed % 2
    return request


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 2 else pytest.mark.long) for n in range(16)])
def test_tokens_forwards_and_positions_of_the_published_loops(name, seed):
    """Of each row as if it were alone, in a padded batch, and with fewer seats than prompts."""
    request = draw_request(seed)
    options, block = request.options, request.options["block_length"]
    model, logits = make(name, block)
    whole = options | {"gen_length": -(-options["gen_length"] // block) * block}
    expected, positions = [], 0
    for row, ids in enumerate(request.prompts):
        evaluate = Evaluate(logits, len(ids), block, options["cfg_scale"], name in others.SHIFTED)
        tokens, nfe, own = follow(evaluate, ids, row, whole)
        expected.append((tokens[: len(ids) + options["gen_length"]], nfe))
        positions += own
    assert batched(model, request) == (expected, positions), str(request)
    assert seated(model, request, 2) == expected


@pytest.mark.parametrize(("name", "origin"), [*((name, "prompt") for name in NAMES), ("llada-gqa", "start")])
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 2 else pytest.mark.long) for n in range(12)])
def test_one_block_after_the_other(name, origin, seed):
    """A LLaDA can have its blocks from the first position on too, as a model that runs its own forward."""
    request = draw_request(seed)
    options = request.options
    del options["pipeline"]
    block = options["block_length"]
    model, logits = make(name, block, origin=origin)
    plain = {key: options[key] for key in ("confidence", "temperature", "seed", "cfg_scale")}
    choose = plain_blocks.dynamic(options["schedule"].threshold)
    passes, expected, positions = (2 if options["cfg_scale"] else 1), [], 0
    for row, ids in enumerate(request.prompts):
        first = len(ids) if origin == "prompt" else 0
        found = plain_blocks.run(logits, ids, options["gen_length"], block, MASK, choose, row=row, first=first, **plain)
        expected.append((found.ids.tolist(), passes * found.steps))
        # Each step evaluates its block; the first one all that is before, the first of each other block the one before.
        begin = first + (len(ids) - first) // block * block
        blocks = -(-(len(found.ids) - begin) // block)
        more = found.steps - blocks if name in others.SHIFTED else 0  # left neighbours
        positions += passes * (begin + block * (blocks - 1 + found.steps) + more)
    assert batched(model, request) == (expected, positions), str(request)
    assert seated(model, request, 2) == expected


def test_blocks_matter():
    """The tokens are others under the other masks, or the tests above would say nothing."""
    found, ids = set(), prompt(10, 1)[None]
    for block, origin in ((BLOCK, "prompt"), (BLOCK, "start"), (None, "start")):
        model = MAKERS["llada"]()
        model.config.block_causal, model.config.block_causal_origin = block, origin
        options = {"gen_length": 24, "block_length": BLOCK, "schedule": Threshold(0.05)}
        found.add(tuple(dllm_fast.generate(dllm_fast.patch(model), ids, **options).sequences[0].tolist()))
    assert len(found) == 3


OPTIONS = [
    {"pipeline": D2F(0.25, 0.5)},
    {"pipeline": MultiBlock(0.5, 2)},
    {},
    {"temperature": 0.7, "seed": 3},
    {"cfg_scale": 0.7},
    {"remask": Edit(0.05, 3)},
]


@needs_cpp
@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_ops_give_the_same(name, number):
    prompts, found = [prompt(n) for n in (1, 9, 14, 30)], []
    for impl in ("torch", "cpp"):
        model, _ = make(name, 8, impl, dtype=torch.float32)
        options = {"gen_length": 20, "schedule": Threshold(0.1), **OPTIONS[number]}
        done = dllm_fast.generate_many(model, prompts, batch_size=3, **options)
        found.append([(one.sequence.tolist(), one.nfe) for one in done])
    assert found[0] == found[1]


@needs_triton
@pytest.mark.long
@pytest.mark.usefixtures("strict_interpreter")
@pytest.mark.parametrize("pipeline", [D2F(0.25, 0.5), None], ids=str)
def test_triton_gives_the_same(pipeline):
    prompts, found = [prompt(n) for n in (3, 10)], []
    for impl in ("torch", "triton"):
        model, _ = make("llada", BLOCK, impl, dtype=torch.float32)
        options = {"gen_length": 8, "schedule": Threshold(0.05), "pipeline": pipeline}
        found.append([one.sequence.tolist() for one in dllm_fast.generate_many(model, prompts, **options)])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("schedule", [Threshold(0.9), Uniform(24)], ids=str)
def test_speculation_gives_the_same_tokens_in_fewer_forwards(name, schedule):
    model, _ = make(name, 8)
    prompts, options = [prompt(n, 4) for n in (3, 10, 20)], {"gen_length": 24, "schedule": schedule, "batch_size": 2}
    alone = list(dllm_fast.generate_many(model, prompts, **options))
    drafted = list(dllm_fast.generate_many(model, prompts, speculate=3, **options))
    for one, other in zip(alone, drafted, strict=True):
        assert torch.equal(one.sequence, other.sequence) and one.steps == other.steps
    assert sum(one.nfe for one in drafted) < sum(one.nfe for one in alone)


def test_rows_leave_and_others_take_their_seats():
    """Rows that begin while others are in the middle of their answers, each with its own end of a prompt."""
    model, _ = make("llada", BLOCK)
    prompts = [prompt(n, 8) for n in (1, 2, 3, 13, 14, 25, 30)]
    for pipeline in (None, D2F(0.25, 0.5)):
        options = {"gen_length": 18, "schedule": Threshold(0.1), "temperature": 0.5, "seed": 1, "pipeline": pipeline}
        together = list(dllm_fast.generate_many(model, prompts, batch_size=3, **options))
        for index, ids in enumerate(prompts):
            (alone,) = dllm_fast.generate_many(model, [ids], noise_rows=[index], **options)
            assert torch.equal(alone.sequence, together[index].sequence) and alone.nfe == together[index].nfe


@pytest.mark.parametrize("origin", ["start", "prompt"])
def test_a_lladas_own_call_has_no_blocks(origin):
    """It is the one before `patch`."""
    model = MAKERS["llada"]()
    model.config.block_causal, model.config.block_causal_origin = BLOCK, origin
    ids, mask = prompt(22).view(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[1, :3] = 0
    with torch.no_grad():
        expected = model(ids).logits, model(ids, mask).logits[:, 3:]
        dllm_fast.patch(model)
        found = model(ids).logits, model(ids, mask).logits[:, 3:]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


def test_a_folder_says_it(tmp_path):
    model = MAKERS["llada"]()
    model.config.block_causal, model.config.block_causal_origin = BLOCK, "prompt"
    model.save_pretrained(tmp_path)
    loaded, ids = dllm_fast.from_pretrained(tmp_path), prompt(9)[None]
    assert bound_family(loaded).block == BLOCK and bound_family(loaded).after_prompt
    dllm_fast.warmup(loaded, [5, 9], gen_length=6, progress=False)
    found = dllm_fast.generate(loaded, ids, gen_length=6, schedule=Threshold(0.1), eos_id=EOS)
    assert torch.equal(found.sequences, loaded.generate(ids, max_new_tokens=6, schedule="threshold=0.1").sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 8}, "block_length=8: the model is block-causal, in blocks of 4"),
        ({"cache": "none"}, "cache='none': a block-causal model has an exact cache"),
        ({"refresh": Every(2)}, "refresh=Every(blocks=2): a block-causal"),
        ({"refresh": Drift(0.1)}, "refresh=Drift(tau=0.1): a block-causal"),
        ({"skip_committed": True}, "skip_committed=True: a block-causal"),
        ({"suffix_length": 4}, "suffix_length=4: a block-causal model sees nothing behind a block"),
        ({"speculate": 2, "pipeline": D2F()}, "pipeline=D2F(add=0.1, activate=0.95, blocks=None): is not to be had"),
        ({"gen_length": 506}, "a prompt of 5 and gen_length=506 exceed the model's 512 positions"),
        (
            {"input_ids": torch.tensor([[1, MASK, 2]])},
            "input_ids: a [MASK] inside a prompt, which a model with config.block_causal_origin='prompt' does not fill",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refused(options, message):
    model, _ = make("llada", BLOCK)
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.generate(model, **{"input_ids": prompt(5)[None], "gen_length": 8, **options})


def test_a_shifted_model_has_no_drafts():
    model, _ = make("qwen2-shifted", BLOCK)
    message = "speculate=2: the model is block-causal, and its head predicts the next position"
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.generate(model, prompt(5)[None], gen_length=8, speculate=2)


def test_what_is_for_bidirectional_models():
    model, _ = make("llada", BLOCK)
    for function in (dllm_fast.generate_plain, dllm_fast.generate_flow):
        with pytest.raises(ValueError, match=f"model: it is block-causal, and {function.__name__} is for"):
            function(model, prompt(5)[None], gen_length=8)


@pytest.mark.parametrize(
    ("block", "origin", "message"),
    [
        (0, "start", "model.config.block_causal=0 is not a positive number of positions"),
        (4, "end", "model.config.block_causal_origin='end' is not one of 'start', 'prompt'"),
        (4, None, "model.config.block_causal_origin=None is not one of 'start', 'prompt'"),
        (None, "prompt", "model.config.block_causal_origin='prompt': model.config.block_causal does not say how long"),
    ],
)
def test_a_config_without_sense_is_refused(block, origin, message):
    for model in (MAKERS["llada"](), *([others.make("qwen3")] if backend.is_available() else [])):
        model.config.block_causal, model.config.block_causal_origin = block, origin
        with pytest.raises(ValueError, match=re.escape(message)):
            dllm_fast.patch(model)
