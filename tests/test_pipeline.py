"""Several blocks at once: tokens, forwards and positions of the published loops, written out, in any batch."""

import random
import re

import others
import plain_blocks
import plain_loop
import pytest
import torch
from needs import missing
from plain_pipeline import Answer, Delayed, d2f, d3llm
from rows import Request, batched, seated
from tiny import EOS, MAKERS, MASK

import dllm_fast
from dllm_fast import D2F, DiffusionGenerationConfig, MultiBlock, Threshold, Uniform
from dllm_fast.decoding.spelling import pipeline_of, spell
from dllm_fast.generate import Completion
from dllm_fast.patch import bound_family

CACHES = ("none", "dual", "prefix")


class Bidirectional:
    """What a step of a bidirectional model evaluates: everything; with the dual cache the live blocks alone, until some
    at the front are filled; with d3LLM's cache what `Delayed` says. Of a shifted model the left neighbour of the live
    blocks too, which predicts their first position."""

    def __init__(self, family, prompt, options):
        self.cache, self.cfg_scale, self.positions = options["cache"], options["cfg_scale"], 0
        length, block, pipeline = len(prompt) + options["gen_length"], options["block_length"], options["pipeline"]
        memory = plain_loop.Memory if family.layerwise else others.OwnMemory
        self.memories = [memory(family, length, False) for _ in range(2 if self.cfg_scale else 1)]
        self.left = int(family.shifted)
        if self.cache == "prefix":
            blocks = [range(len(prompt)), *(range(i, i + block) for i in range(len(prompt), length, block))]
            delay = 1 if pipeline.delay is None else pipeline.delay
            self.delayed = Delayed(self.behind_cache, blocks, MASK, delay, pipeline.refresh or 10_000)

    def __call__(self, ids, open_, asked):
        if self.cache == "prefix":
            return self.delayed(ids, open_, asked)
        whole = self.cache == "none" or asked.step == 0 or asked.filled is not None
        return self.evaluate(ids, open_, range(len(ids)) if whole else range(asked.first - self.left, asked.stop))

    def evaluate(self, ids, open_, positions):
        positions = list(positions)
        self.positions += len(positions) * len(self.memories)
        states = ids, ids.masked_fill(~open_, MASK)
        each = [one.logits(state, positions, list(range(len(ids)))) for one, state in zip(self.memories, states)]
        z = each[0] if len(each) == 1 else each[1] + (self.cfg_scale + 1) * (each[0] - each[1])
        z = others.moved(z) if self.left else z
        return z.new_full((len(ids), z.shape[1]), torch.nan).index_copy(0, torch.tensor(positions), z)

    def behind_cache(self, ids, open_, start, cache, asked):
        """`Delayed.forward`. Nothing but the cache is left of the forwards before."""
        assert start == (0 if cache is None else cache.shape[-3])
        for n, one in enumerate(self.memories):
            for m, buffer in enumerate((one.keys, one.values)):
                buffer.fill_(torch.nan)
                if cache is not None:
                    buffer[:, :start] = cache[n, m]
        logits = self.evaluate(ids, open_, range(start - self.left * (start == asked.first), len(ids)))
        return logits, torch.stack([torch.stack((one.keys, one.values)) for one in self.memories])


class BlockCausal:
    """A block-causal model's own forward of everything up to the last live block."""

    def __init__(self, model, block: int, shifted: bool):
        self.model, self.block, self.shifted, self.positions = model, block, shifted, 0

    def __call__(self, ids, open_, asked):
        self.positions += asked.stop - evaluated_from(asked, self.shifted)
        seen = plain_blocks.causal_blocks(asked.stop, self.block)
        logits = self.model(input_ids=ids[None, : asked.stop], attention_mask=seen[None, None]).logits[0]
        return others.moved(logits) if self.shifted else logits


def evaluated_from(asked, shifted: bool) -> int:
    """Where a step with an exact cache begins: at first at 0; then at the blocks that the step before has filled, or at
    the live ones, of a shifted model one to the left."""
    if asked.step == 0:
        return 0
    return max(0, asked.first - shifted) if asked.filled is None else asked.filled


@torch.no_grad()
def follow(evaluate, prompt, row, options, grid=False):
    """(tokens, NFE, positions) by the plain loop of the options' pipeline, with the noise of ``row``."""
    pipeline, select = options["pipeline"], {"confidence": options.get("confidence", "probability")}
    select |= {"temperature": options.get("temperature", 0.0), "seed": options["seed"]}
    lengths = options["gen_length"], options["block_length"]

    class OfRow(Answer):
        def predict(self, asked):
            self.select = select | {"row": torch.full((len(self.masked(range(asked.first, asked.stop))),), row)}
            return super().predict(asked)

    answer = OfRow(evaluate, prompt, *lengths, MASK, grid)
    threshold = options["schedule"].threshold
    if isinstance(pipeline, D2F):
        found = d2f(answer, threshold, pipeline.add, pipeline.activate, pipeline.blocks)
    else:
        found = d3llm(answer, threshold, pipeline.add, pipeline.blocks)
    passes = 2 if options.get("cfg_scale") else 1
    return found.ids[: len(prompt) + lengths[0]].tolist(), passes * found.nfe, evaluate.positions


def draw(rng: random.Random, cache: str, longest: int = 14) -> Request:
    """Prompts of any length, and a pipeline of either kind."""
    block = rng.choice((2, 4, 5))
    options = {"block_length": block, "gen_length": block * rng.randint(1, 6), "cache": cache}
    options["seed"] = rng.randrange(99)
    options["confidence"] = rng.choice(["probability", "margin", "entropy", "entropy"])
    limits = (-4.2, -3.8, -3.0) if options["confidence"] == "entropy" else (0.03, 0.06, 0.2)
    options["schedule"] = Threshold(rng.choice(limits))
    add = rng.choice((0.1, 0.5, 0.7, 1.0))
    activate = rng.choice((0.3, 0.95, 1.0))
    options["pipeline"] = rng.choice([D2F(add, activate), D2F(add, activate, rng.randint(1, 3)), MultiBlock(add)])
    options["temperature"] = rng.choice([0.0, 0.0, 0.7])
    options["cfg_scale"] = rng.choice([0.0, 0.0, 1.5])
    prompts = [torch.tensor([rng.randrange(EOS) for _ in range(rng.randint(1, longest))]) for _ in range(3)]
    request = Request(prompts, options, rng.random() < 0.5)
    if cache == "prefix":
        delay, refresh = rng.choice([None, 0, 1, 2, 3]), rng.choice([None, None, 1, 3, 4])
        options["pipeline"] = MultiBlock(add, rng.choice([None, None, None, 1, 2]), delay, refresh)
    return request


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llada-gqa", "modernbert", *sorted(others.SHIFTED)])
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 2 else pytest.mark.long) for n in range(9)])
def test_tokens_forwards_and_positions_of_the_published_loops(name, cache, seed):
    """Of each row as if it were alone, in a padded batch, and with fewer seats than prompts."""
    request = draw(random.Random(100 * seed + CACHES.index(cache)), cache)
    model = dllm_fast.patch(others.made(name).double(), impl="torch")
    family = bound_family(model)
    expected = []
    for row, prompt in enumerate(request.prompts):
        expected.append(follow(Bidirectional(family, prompt, request.options), prompt, row, request.options))
    done, positions = batched(model, request)
    assert done == [found[:2] for found in expected], str(request)
    assert positions == sum(found[2] for found in expected)
    assert seated(model, request, 2) == done


@pytest.mark.parametrize("name", ["qwen3", "qwen2-shifted"])
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 3 else pytest.mark.long) for n in range(8)])
def test_of_a_block_causal_model_the_cache_is_exact(name, seed):
    request = draw(random.Random(seed), "dual", 19)
    block = request.options["block_length"]
    request.options |= {"cfg_scale": 0.0, "gen_length": request.options["gen_length"] + seed % 2}
    model = others.made(name).double()
    model.config.block_causal = block
    expected = [
        follow(BlockCausal(model, block, name in others.SHIFTED), prompt, row, request.options, grid=True)
        for row, prompt in enumerate(request.prompts)
    ]
    done, positions = batched(dllm_fast.patch(model), request)
    assert done == [found[:2] for found in expected], str(request)
    assert positions == sum(found[2] for found in expected)
    assert seated(model, request, 2) == done


@pytest.mark.parametrize(
    "pipeline, cache", [(D2F(0.5, 0.9, 3), "dual"), (MultiBlock(0.5), "dual"), (MultiBlock(0.5, delay=1), "prefix")]
)
def test_the_compiled_ops_give_the_same(pipeline, cache):
    if reason := missing("cpp"):
        pytest.skip(reason)
    model = MAKERS["llada"]()
    ids = torch.randint(0, EOS, (3, 9), generator=torch.Generator().manual_seed(1))
    options = {"gen_length": 24, "block_length": 8, "schedule": Threshold(0.1), "pipeline": pipeline, "cache": cache}
    found = []
    for impl in ("torch", "cpp"):
        with dllm_fast.patched(model, impl):
            out = dllm_fast.generate(model, ids, **options)
        found.append((out.sequences.tolist(), out.row_nfe, out.positions))
    assert found[0] == found[1]


def test_it_takes_fewer_forwards_and_all_blocks_can_be_live():
    model = dllm_fast.patch(MAKERS["llada"]())
    ids = torch.randint(0, EOS, (1, 9), generator=torch.Generator().manual_seed(1))
    options = {"gen_length": 32, "block_length": 4, "schedule": Threshold(1e-9)}
    assert dllm_fast.generate(model, ids, **options).nfe == 8  # a block a step
    assert dllm_fast.generate(model, ids, pipeline=D2F(), **options).nfe == 8  # no sooner than its predecessor's tokens
    slow = options | {"schedule": Threshold(1.0)}
    assert dllm_fast.generate(model, ids, **slow).nfe == 32
    out = dllm_fast.generate(model, ids, pipeline=D2F(0.25, 0.25), **slow)
    # Each step adds a block, and each live one commits a token: the last is added by the eighth step and takes four.
    assert out.nfe == out.steps == 8 + 3 and out.tokens_per_forward == 32 / 11
    assert dllm_fast.generate(model, ids, pipeline=D2F(0.25, 0.25, 1), **slow).nfe == 32
    assert dllm_fast.generate(model, ids, pipeline=D2F(1.0, 1.0), **slow).nfe == 32


def test_one_block_after_the_other_is_what_it_is_without():
    """With ``add=1`` a block is added when the one before is filled."""
    model = dllm_fast.patch(MAKERS["modernbert"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(1))
    for cache in ("none", "dual"):
        options = {"gen_length": 24, "block_length": 8, "schedule": Threshold(0.1), "cache": cache}
        expected = dllm_fast.generate(model, ids, **options)
        for pipeline in (D2F(1.0, 1.0), MultiBlock(1.0), D2F(0.1, 0.5, 1)):
            out = dllm_fast.generate(model, ids, pipeline=pipeline, **options)
            assert torch.equal(out.sequences, expected.sequences)
            assert (out.row_nfe, out.positions) == (expected.row_nfe, expected.positions)


@pytest.mark.parametrize("pipeline", [D2F(0.25, 0.25), MultiBlock(0.25), MultiBlock(0.25, delay=2)], ids=str)
def test_a_text_ends_when_all_before_its_end_is_there(pipeline):
    """An end of text in a later block ends nothing until the blocks before it, and its own, are filled."""
    model = dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (4, 9), generator=torch.Generator().manual_seed(3))
    options = {"gen_length": 40, "block_length": 4, "schedule": Threshold(0.06), "pipeline": pipeline}
    options["cache"] = "prefix" if pipeline.delay else "dual"
    free = dllm_fast.generate(model, ids, **options)
    assert free.row_tokens == [40] * 4
    ends = free.sequences[0, 9 + 17].item(), free.sequences[2, 9 + 30].item()
    out = dllm_fast.generate(model, ids, eos_id=ends, pad_id=7, **options)
    shorter = 0
    for row in range(4):
        answer = free.sequences[row, 9:].tolist()
        end = next((at for at, token in enumerate(answer) if token in ends), len(answer) - 1)
        assert out.sequences[row, 9:].tolist() == answer[: end + 1] + [7] * (len(answer) - end - 1)
        assert out.row_tokens[row] == end + 1
        shorter += out.row_nfe[row] < free.row_nfe[row]
        alone = dllm_fast.generate(model, ids[row : row + 1], eos_id=ends, pad_id=7, **options)
        assert alone.nfe == out.row_nfe[row]
    assert shorter


def test_tokens_per_forward_of_every_output():
    model = dllm_fast.patch(MAKERS["llada"]())
    ids = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(3))
    options = {"gen_length": 16, "block_length": 8, "schedule": Threshold(0.1)}
    out = dllm_fast.generate(model, ids, **options)
    assert out.row_tokens == [16, 16] and out.tokens_per_forward == 32 / sum(out.row_nfe)
    many = list(dllm_fast.generate_many(model, list(ids), **options))
    assert [one.tokens_per_forward for one in many] == [16 / nfe for nfe in out.row_nfe]
    assert Completion(0, ids[0], 0, 0, 0, 0).tokens_per_forward == 0.0  # nothing to fill
    ids[0, 3:5] = MASK
    assert dllm_fast.generate(model, ids, **options).row_tokens == [18, 16]
    end = int(out.sequences[1, 9 + 5])
    first = out.sequences[1, 9:].tolist().index(end)
    cut = dllm_fast.generate(model, ids[1:], eos_id=end, **options)
    assert cut.row_tokens == [first + 1] and cut.tokens_per_forward == (first + 1) / cut.nfe
    plain = dllm_fast.generate_plain(model, ids[1:], eos_id=end, **options)
    answer = plain.sequences[0, 9:].tolist()
    assert plain.row_tokens == [answer.index(end) + 1 if end in answer else 16]
    assert dllm_fast.generate_flow(model, ids[1:], gen_length=6, steps=3).tokens_per_forward == 2.0


class Streamer:
    def __init__(self):
        self.text, self.drafts = [], []

    def put(self, ids):
        self.text += ids.flatten().tolist()

    def put_draft(self, draft, sequence):
        self.drafts.append(sequence.tolist())

    def end(self):
        self.text.append("end")


def test_a_streamer_has_whole_blocks_in_order():
    model, streamer = dllm_fast.patch(MAKERS["llada"]()), Streamer()
    ids = torch.randint(0, EOS, (1, 9), generator=torch.Generator().manual_seed(3))
    options = {"gen_length": 32, "block_length": 8, "schedule": Threshold(0.1), "pipeline": D2F(0.25, 0.5)}
    out = dllm_fast.generate(model, ids, streamer=streamer, **options)
    assert streamer.text == [*out.sequences[0].tolist(), "end"]
    assert len(streamer.drafts) == out.nfe and streamer.drafts[-1] == out.sequences[0].tolist()


def test_a_scripts_default_device_and_dtype_change_nothing():
    model = dllm_fast.patch(MAKERS["llada"]())
    ids = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(3))
    options = {"gen_length": 32, "block_length": 8, "schedule": Threshold(0.1), "temperature": 0.5, "seed": 0}
    options["pipeline"] = D2F(0.25, 0.5, 3)
    expected = dllm_fast.generate(model, ids, **options).sequences
    with torch.device("meta"):
        assert torch.equal(dllm_fast.generate(model, ids, **options).sequences, expected)


def test_warmup_takes_every_kind_of_step():
    given = {"gen_length": 16, "block_length": 8, "schedule": Threshold(0.1), "pipeline": MultiBlock()}
    for cache, kinds in (("dual", ["full", "block"]), ("prefix", ["full", "block"]), ("none", ["full"])):
        told: list[str] = []
        progress = lambda what, done, total, told=told: told.append(what)  # noqa: E731
        dllm_fast.warmup(dllm_fast.patch(MAKERS["modernbert"]()), 9, 2, progress=progress, cache=cache, **given)
        assert [what.split(",")[0] for what in told] == ["compiling", *(f"taking {kind} steps" for kind in kinds)]


def test_it_is_spelt():
    for text, pipeline in {
        "d2f": D2F(),
        "d2f=0.5": D2F(0.5),
        "d2f=0.1,0.95,4": D2F(0.1, 0.95, 4),
        "multi-block=0.3,2": MultiBlock(0.3, 2),
        "multi-block=0.3,,2": MultiBlock(0.3, delay=2),
        "multi-block=0.1,3,0,10": MultiBlock(0.1, 3, 0, 10),
    }.items():
        assert pipeline_of(text) == pipeline == pipeline_of(spell(pipeline))
    assert spell(D2F()) == "d2f=0.1,0.95" and spell(MultiBlock(0.3, 2)) == "multi-block=0.3,2"
    assert spell(MultiBlock(refresh=4)) == "multi-block=0.1,,,4"
    config = DiffusionGenerationConfig(pipeline="multi-block=0.2", schedule="threshold=0.9")
    assert config.pipeline == MultiBlock(0.2) and config.to_dict()["pipeline"] == "multi-block=0.2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": Uniform(4)}, "is not to be had with schedule=Uniform(steps=4), which is no Threshold"),
        ({"schedule": dllm_fast.Dynamic(0.5, 2)}, "with schedule=Dynamic(threshold=0.5, tokens=2), which is no"),
        ({"cache": "prefix"}, "is not to be had with cache='prefix'"),
        (
            {"pipeline": MultiBlock(delay=1)},
            "delay=1, refresh=None): delay is an option of cache='prefix', not of cache='dual'",
        ),
        (
            {"pipeline": MultiBlock(refresh=2), "cache": "none"},
            "refresh is an option of cache='prefix', not of cache='none'",
        ),
        ({"refresh": dllm_fast.Window(4)}, "is not to be had with refresh=Window(before=4, after=0)"),
        ({"remask": dllm_fast.Verify()}, "is not to be had with remask=Verify(threshold=0.7)"),
        ({"speculate": 2}, "is not to be had with speculate=2"),
        ({"skip_committed": True}, "is not to be had with skip_committed=True"),
        ({"suffix_length": 8}, "is not to be had with suffix_length=8"),
        ({"pipeline": "d2f"}, "pipeline='d2f' is not one of D2F, MultiBlock"),
        ({"input_ids": torch.tensor([[1, MASK, 2]])}, "input_ids: a [MASK] inside a prompt, which pipeline=D2F("),
    ],
)
def test_refused(options, message):
    model = dllm_fast.patch(MAKERS["llada"]())
    given = {"input_ids": torch.ones(1, 5, dtype=torch.int64), "gen_length": 16, "block_length": 8, "pipeline": D2F()}
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.generate(model, **given | options)


def test_values_and_models_that_are_refused():
    for make_one, message in (
        (lambda: D2F(0.0), "D2F: add=0.0 is not a number above 0 and up to 1"),
        (lambda: D2F(activate=1.5), "D2F: activate=1.5 is not a number above 0 and up to 1"),
        (lambda: MultiBlock(blocks=0), "MultiBlock: blocks=0 is not a positive whole number"),
        (lambda: MultiBlock(delay=-1), "MultiBlock: delay=-1 is not a whole number from 0 up"),
        (lambda: MultiBlock(refresh=0), "MultiBlock: refresh=0 is not a positive whole number"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_one()
    model = dllm_fast.patch(MAKERS["llada"]())
    with pytest.raises(ValueError, match="gen_length=13 is not a multiple of block_length=8, as pipeline"):
        model.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=13, block_length=8, pipeline="d2f")
