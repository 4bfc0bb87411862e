"""Block-causal models: tokens of the published samplers, transcribed, in any batch; and what such models refuse."""

import plain_blocks
import pytest
import torch
from needs import missing, needs_backend, needs_cpp, needs_triton
from others import make
from tiny import EOS, MASK

import dllm_fast
from dllm_fast import Drift, Dynamic, Edit, Every, Sequential, Static, Threshold, Uniform, Window

pytestmark = needs_backend
BLOCK = 4
IMPLS = ["torch", *([] if missing("cpp") else ["cpp"])]


def sdar(block: int = BLOCK, dtype=torch.float32):
    """SDAR's architecture, which is Qwen3's, with small random weights."""
    model = make("qwen3").to(dtype)
    model.config.block_causal = block
    return model


def logits_of(model):
    """Its own forward, under the mask that it is given."""

    def logits(ids, seen):
        return model(input_ids=ids[None], attention_mask=seen[None, None]).logits[0]

    return logits


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, EOS, (length,), generator=torch.Generator().manual_seed(100 * seed + length))


@pytest.mark.parametrize("length", [1, 3, 4, 9, 16])
@pytest.mark.parametrize("gen_length", [8, 13])
def test_tokens_and_forwards_of_the_published_sampler(length, gen_length):
    model, ids = sdar(dtype=torch.float64), prompt(length)
    expected = plain_blocks.run(logits_of(model), ids, gen_length, BLOCK, MASK, plain_blocks.dynamic(0.1))
    found = dllm_fast.generate(dllm_fast.patch(model), ids[None], gen_length=gen_length, schedule=Threshold(0.1))
    assert torch.equal(found.sequences[0], expected.ids)
    assert found.nfe == found.steps == expected.steps and found.nfe_full == 1
    # The prompt and the first block, then each other block with the one before it, then blocks.
    blocks = -(-(length + gen_length) // BLOCK) - length // BLOCK
    prefill = (length // BLOCK + 1) * BLOCK
    assert found.positions == prefill + BLOCK * (blocks - 1) + BLOCK * (found.nfe - 1)


OPTIONS = [
    ({"schedule": Threshold(0.15), "temperature": 1.0}, plain_blocks.dynamic(0.15)),
    ({"schedule": Threshold(0.05), "confidence": "margin"}, plain_blocks.dynamic(0.05)),
    ({"schedule": Threshold(0.1), "cfg_scale": 0.7}, plain_blocks.dynamic(0.1)),
    ({"schedule": Dynamic(0.15, 2)}, plain_blocks.dynamic(0.15, 2)),
    ({"schedule": Dynamic(0.15, 3), "temperature": 0.5}, plain_blocks.dynamic(0.15, 3)),
    ({"schedule": Static(3), "temperature": 1.0}, plain_blocks.static(3)),
    ({"schedule": Sequential(2)}, plain_blocks.sequential(2)),
    ({"schedule": Sequential(1), "temperature": 1.0}, plain_blocks.sequential(1)),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_options(number, impl):
    options, choose = OPTIONS[number]
    model, prompts = sdar(8), [prompt(n, 1) for n in (5, 8, 19)]
    plain = {name: value for name, value in options.items() if name != "schedule"}
    expected = [
        plain_blocks.run(logits_of(model), ids, 20, 8, MASK, choose, seed=7, row=row, **plain).ids
        for row, ids in enumerate(prompts)
    ]
    dllm_fast.patch(model, impl=impl)
    found = dllm_fast.generate_many(model, prompts, batch_size=2, gen_length=20, seed=7, **options)
    for completion, ids in zip(found, expected, strict=True):
        assert torch.equal(completion.sequence, ids)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("threshold", "edit"), [(0.1, (0.12, 16)), (0.3, (0.0, 3)), (0.05, (0.2, 1)), (0.1, (0.1, 0)), (0.1, (1.0, 16))]
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_are_edited_as_llada21_does(threshold, edit, temperature, impl):
    model, prompts = sdar(8), [prompt(n, 3) for n in (5, 8, 19)]
    expected = [
        plain_blocks.run(
            logits_of(model), ids, 20, 8, MASK, plain_blocks.dynamic(threshold), seed=7, row=row, edit=edit,
            temperature=temperature,
        )
        for row, ids in enumerate(prompts)
    ]  # fmt: skip
    options = {"schedule": Threshold(threshold), "remask": Edit(*edit), "temperature": temperature, "seed": 7}
    found = dllm_fast.generate_many(dllm_fast.patch(model, impl), prompts, batch_size=2, gen_length=20, **options)
    for one, plain in zip(found, expected, strict=True):
        assert torch.equal(one.sequence, plain.ids) and one.steps == plain.steps


def test_edits_change_tokens_and_take_steps():
    """Or the test above would say nothing."""
    model, ids = dllm_fast.patch(sdar(8)), prompt(5, 3)[None]
    options = {"gen_length": 35, "schedule": Threshold(0.1)}
    without = dllm_fast.generate(model, ids, **options)
    edited = dllm_fast.generate(model, ids, remask=Edit(0.0, 8), **options)
    assert edited.nfe > without.nfe and not torch.equal(edited.sequences, without.sequences)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side, impl):
    model, rows = sdar(), [prompt(n, 2) for n in (2, 7, 12, 8)]
    expected = [plain_blocks.run(logits_of(model), ids, 9, BLOCK, MASK, plain_blocks.dynamic(0.1)) for ids in rows]
    padded, mask = torch.full((len(rows), 12), EOS), torch.zeros(len(rows), 12, dtype=torch.int64)
    for row, ids in enumerate(rows):
        at = slice(12 - len(ids), None) if side == "left" else slice(len(ids))
        padded[row, at], mask[row, at] = ids, 1
    found = dllm_fast.generate(dllm_fast.patch(model, impl), padded, mask, gen_length=9, schedule=Threshold(0.1))
    for row, one in enumerate(expected):
        assert torch.equal(found.sequences[row, 12:], one.ids[-9:])
    assert found.row_nfe == [one.steps for one in expected]


def test_masks_inside_a_prompt():
    """Blocks with a [MASK] are filled from left to right; those between that have none are not evaluated alone."""
    model, ids = sdar(dtype=torch.float64), prompt(22, 3)
    ids[[1, 2, 13]] = MASK
    expected = plain_blocks.run(logits_of(model), ids, 6, BLOCK, MASK, plain_blocks.dynamic(0.1))
    found = dllm_fast.generate(dllm_fast.patch(model), ids[None], gen_length=6, schedule=Threshold(0.1))
    assert torch.equal(found.sequences[0], expected.ids) and found.nfe == expected.steps
    assert found.nfe_full == 3  # for the blocks of 0, of 12, and of 20, which do not follow those before them


@pytest.mark.parametrize("speculate", [2, 4])
def test_speculation_gives_the_same_tokens_in_fewer_forwards(speculate):
    model, rows = dllm_fast.patch(sdar(16)), [prompt(n, 4) for n in (3, 10, 20)]
    options = {"gen_length": 40, "schedule": Threshold(0.9), "batch_size": 2}
    alone = list(dllm_fast.generate_many(model, rows, **options))
    drafted = list(dllm_fast.generate_many(model, rows, speculate=speculate, **options))
    for one, other in zip(alone, drafted, strict=True):
        assert torch.equal(one.sequence, other.sequence) and one.steps == other.steps
    assert sum(one.nfe for one in drafted) < sum(one.nfe for one in alone)


def test_the_end_of_the_text():
    model, ids = sdar(), prompt(6, 5)
    dllm_fast.patch(model)
    whole = dllm_fast.generate(model, ids[None], gen_length=22, schedule=Threshold(0.1)).sequences[0]
    end = int(whole[6 + 7])
    first = int((whole[6:] == end).nonzero()[0]) + 6
    found = dllm_fast.generate(model, ids[None], gen_length=22, schedule=Threshold(0.1), eos_id=end).sequences[0]
    assert torch.equal(found[: first + 1], whole[: first + 1]) and bool((found[first:] == end).all())


def test_streams_the_answer_and_no_more():
    class Streamer:
        def __init__(self):
            self.ids = []

        def put(self, ids):
            self.ids += ids.flatten().tolist()

        def end(self):
            pass

    streamer, ids = Streamer(), prompt(6, 6)
    found = dllm_fast.generate(dllm_fast.patch(sdar()), ids[None], gen_length=9, streamer=streamer)
    assert streamer.ids == found.sequences[0].tolist()


def test_blocks_are_the_models_own():
    model, ids = dllm_fast.patch(sdar()), prompt(6)[None]
    own = dllm_fast.generate(model, ids, gen_length=8)
    assert torch.equal(own.sequences, dllm_fast.generate(model, ids, gen_length=8, block_length=BLOCK).sequences)
    assert torch.equal(own.sequences, model.generate(ids, max_new_tokens=8).sequences)
    dllm_fast.warmup(model, 6, gen_length=8, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 8}, "block_length=8: the model is block-causal, in blocks of 4"),
        ({"cache": "none"}, "cache='none': a block-causal model has an exact cache"),
        ({"cache": "prefix"}, "cache='prefix': a block-causal"),
        ({"refresh": Every(2)}, r"refresh=Every\(blocks=2\): a block-causal"),
        ({"refresh": Window(4, 0)}, r"refresh=Window\(before=4, after=0\): a block-causal"),
        ({"refresh": Drift(0.1)}, r"refresh=Drift\(tau=0.1\): a block-causal"),
        ({"skip_committed": True}, "skip_committed=True: a block-causal"),
        ({"suffix_length": 4}, "suffix_length=4: a block-causal model sees nothing behind a block"),
        ({"suffix_length": 0, "suffix_sample": 2}, "suffix_sample=2: a block-causal"),
        ({"remask": Edit(), "schedule": Static(2)}, r"remask=Edit.* not known beforehand, as for schedule=Static"),
        ({"remask": Edit(), "speculate": 2}, "remask=Edit.* not known beforehand, as for speculate=2"),
        ({"gen_length": 600}, "exceed the model's 512 positions"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refused(options, message):
    model = dllm_fast.patch(sdar())
    with pytest.raises(ValueError, match=message):
        dllm_fast.generate(model, prompt(5)[None], **{"gen_length": 8, **options})
    with pytest.raises(ValueError, match=message):
        next(iter(dllm_fast.generate_many(model, [prompt(5)], **{"gen_length": 8, **options})))


@pytest.mark.parametrize("block", [0, -4, 2.0, True, "4"])
def test_a_config_without_sense_is_refused(block):
    model = make("qwen3")
    model.config.block_causal = block
    with pytest.raises(ValueError, match=f"block_causal={block!r}"):
        dllm_fast.patch(model)


def test_the_exact_refresh_is_no_choice():
    from dllm_fast.decoding.refresh import Exact

    with pytest.raises(ValueError, match=r"refresh=Exact.*block-causal"):
        dllm_fast.generate(dllm_fast.patch(make("qwen3")), prompt(5)[None], gen_length=32, refresh=Exact())


@needs_triton
@pytest.mark.usefixtures("strict_interpreter")
def test_triton_gives_the_tokens_of_pytorch():
    ids = torch.stack([prompt(6), prompt(6, 1)])
    options = {"gen_length": 10, "schedule": Threshold(0.2)}
    expected = dllm_fast.generate(dllm_fast.patch(sdar(), impl="torch"), ids, **options)
    assert torch.equal(
        dllm_fast.generate(dllm_fast.patch(sdar(), impl="triton"), ids, **options).sequences, expected.sequences
    )


@needs_cpp
@pytest.mark.parametrize("schedule", [Threshold(0.1), Uniform(20)])
def test_seats_are_given_to_waiting_prompts(schedule):
    """Rows that begin while others are in the middle of their answers: steps of two kinds in one batch."""
    model = dllm_fast.patch(sdar())
    rows = [prompt(n, 8) for n in (1, 2, 3, 4, 13, 14, 25, 30)]
    rows = [row if len(row) > 4 or schedule != Uniform(20) else prompt(4 * len(row), 8) for row in rows]
    rows = [row[: len(row) // 4 * 4] if schedule == Uniform(20) else row for row in rows]
    options = {"gen_length": 20, "schedule": schedule, "temperature": 0.5, "seed": 1}
    together = list(dllm_fast.generate_many(model, rows, batch_size=3, **options))
    for index, row in enumerate(rows):
        (alone,) = dllm_fast.generate_many(model, [row], noise_rows=[index], **options)
        assert torch.equal(alone.sequence, together[index].sequence) and alone.nfe == together[index].nfe
