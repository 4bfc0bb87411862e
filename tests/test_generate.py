"""The loop: LLaDA's published tokens, schedules, caches, padding, noise, guidance, end of text, streaming."""

import copy
import functools
import inspect
import itertools

import pytest
import torch
import transformers
from tiny import EOS, MASK, VOCAB

import dllm_fast
from dllm_fast import Factor, Pyramid, Threshold, Uniform
from dllm_fast.decoding.published import published_generate
from dllm_fast.decoding.request import plan_blocks


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def published(model, ids, mask=None, **options):
    dllm_fast.unpatch(model)
    return published_generate(lambda x, m: model(x, attention_mask=m).logits, ids, mask, mask_id=MASK, **options)


@pytest.fixture
def left(device):
    mask = torch.ones(3, 24, dtype=torch.int64, device=device)
    mask[0, :3], mask[2, :11] = 0, 0
    return mask


@pytest.mark.parametrize("block_length", [8, 16, 32])
@pytest.mark.parametrize("steps", [8, 32], ids="steps-{}".format)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5], ids="cfg-{}".format)
def test_uniform_gives_the_published_tokens(either, ids, left, block_length, steps, cfg_scale):
    options = {"gen_length": 32, "block_length": block_length, "cfg_scale": cfg_scale}
    for mask in (None, left):
        expected, nfe = published(either, ids, mask, steps=steps, **options)
        out = dllm_fast.generate(dllm_fast.patch(either), ids, mask, schedule=Uniform(steps), cache="none", **options)
        assert torch.equal(out.sequences, expected)
        assert (out.nfe, out.nfe_full, out.nfe_block) == (nfe, nfe, 0)
        assert nfe == steps * (2 if cfg_scale else 1)


@pytest.mark.parametrize("rule", [{"pyramid": 1}, {"pyramid": 3}, {"threshold": 0.05}, {"threshold": 0.9}], ids=str)
def test_other_schedules_give_the_plain_loops_tokens(either, ids, rule):
    expected, nfe = published(either, ids[:1], gen_length=32, block_length=16, **rule)
    schedule = Pyramid(rule["pyramid"]) if "pyramid" in rule else Threshold(rule["threshold"])
    out = dllm_fast.generate(
        dllm_fast.patch(either), ids[:1], gen_length=32, block_length=16, schedule=schedule, cache="none"
    )
    assert torch.equal(out.sequences, expected) and out.nfe == nfe


def test_pyramid_takes_8_steps_for_32_positions(llada, ids):
    dllm_fast.patch(llada)
    out = dllm_fast.generate(llada, ids, gen_length=32, block_length=32, schedule=Pyramid(1), cache="none")
    assert out.nfe == 8


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy", "random"])
@pytest.mark.parametrize(
    "schedule", [Uniform(8), Pyramid(2), Threshold(0.3), Factor(1.0)], ids=lambda s: type(s).__name__
)
def test_every_combination_fills_every_position(either, ids, padded, cache, confidence, schedule):
    dllm_fast.patch(either)
    for temperature, cfg_scale in ((0.0, 0.0), (0.8, 1.0)):
        out = dllm_fast.generate(
            either, ids, padded, gen_length=16, block_length=8, schedule=schedule, confidence=confidence,
            temperature=temperature, cfg_scale=cfg_scale, cache=cache, seed=3,
        )  # fmt: skip
        assert out.sequences.shape == (3, 40) and torch.equal(out.sequences[:, :24], ids)
        assert not (out.sequences == MASK).any()
        assert out.nfe == out.nfe_full + out.nfe_block
        passes = 2 if cfg_scale else 1
        assert out.nfe_full == (out.nfe if cache == "none" else 2 * passes)
        assert 2 * passes <= out.nfe <= 16 * passes


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_rows_tokens_are_those_it_gets_alone(either, ids, padded, cache, temperature):
    """Same seed and row index: row 0 of a batch against itself alone; greedy, every row against itself unpadded."""
    dllm_fast.patch(either)
    options = {"gen_length": 16, "block_length": 8, "cache": cache, "temperature": temperature, "seed": 5}
    options["schedule"] = Threshold(0.1)
    batch = dllm_fast.generate(either, ids, padded, **options).sequences[:, 24:]
    for row in range(3 if temperature == 0 else 1):
        prompt = ids[row][padded[row].bool()][None]
        assert torch.equal(dllm_fast.generate(either, prompt, **options).sequences[0, prompt.shape[1] :], batch[row])


def test_padding_on_the_right_is_padding_on_the_left(either, ids, device):
    dllm_fast.patch(either)
    prompt, pad = ids[:1, :15], torch.full((1, 9), EOS, device=device)
    ones, zeros = torch.ones_like(prompt), torch.zeros_like(pad)
    a = dllm_fast.generate(
        either, torch.cat((prompt, pad), 1), torch.cat((ones, zeros), 1), gen_length=16, block_length=8
    )
    b = dllm_fast.generate(
        either, torch.cat((pad, prompt), 1), torch.cat((zeros, ones), 1), gen_length=16, block_length=8
    )
    assert torch.equal(a.sequences[:, 24:], b.sequences[:, 24:])
    assert torch.equal(a.sequences[:, :24], torch.cat((prompt, pad), 1))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_refreshed_at_every_step_is_no_cache(either, ids, cache):
    """With one step per block, every forward is full, so the cache changes nothing."""
    dllm_fast.patch(either)
    options = {"gen_length": 16, "block_length": 2, "schedule": Uniform(8)}
    exact = dllm_fast.generate(either, ids, cache="none", **options)
    cached = dllm_fast.generate(either, ids, cache=cache, **options)
    assert torch.equal(exact.sequences, cached.sequences) and cached.nfe_block == 0


def test_seeds_decide_the_noise(either, ids):
    dllm_fast.patch(either)
    run = functools.partial(dllm_fast.generate, either, ids, gen_length=16, block_length=8, temperature=1.0)
    assert torch.equal(run(seed=1).sequences, run(seed=1).sequences)
    assert not torch.equal(run(seed=1).sequences, run(seed=2).sequences)
    torch.manual_seed(0)
    first = run().sequences
    assert not torch.equal(first, run().sequences)
    torch.manual_seed(0)
    assert torch.equal(first, run().sequences)


def test_masks_in_the_prompt_are_filled_and_nothing_else(either, ids):
    dllm_fast.patch(either)
    gaps = ids.clone()
    gaps[0, 4:9] = gaps[0, 20:24] = MASK
    gaps[1, 13] = MASK
    for cache in ("none", "prefix", "dual"):
        for gen_length in (0, 8):
            out = dllm_fast.generate(either, gaps, gen_length=gen_length, block_length=4, cache=cache).sequences
            assert not (out == MASK).any()
            assert torch.equal(out[:, :24][gaps != MASK], gaps[gaps != MASK])
    alone = dllm_fast.generate(either, gaps[1:2], gen_length=0, block_length=4, cache="prefix").sequences
    both = dllm_fast.generate(either, gaps[:2], gen_length=0, block_length=4, cache="prefix").sequences
    assert torch.equal(alone[0], both[1])


def test_blocks_cover_open_positions_once_and_in_order():
    open_ = torch.zeros(12, dtype=torch.bool)
    open_[[1, 2, 6, 11]] = True
    assert plan_blocks(open_, 4) == [(1, 2), (6, 1), (8, 1)]
    assert plan_blocks(open_, 16) == [(-4, 4)] and plan_blocks(open_ & False, 4) == []


def test_end_of_text_stops_a_row_and_fills_the_rest(llada, ids):
    dllm_fast.patch(llada)
    llada.model.transformer.ff_out.weight.data[EOS] = 0
    free = dllm_fast.generate(llada, ids, gen_length=32, block_length=8, cache="none")
    tokens = free.sequences[0, 24:].tolist()
    eos = tokens[9]  # in the second block, so this row needs no third and fourth block
    out = dllm_fast.generate(llada, ids[:1], gen_length=32, block_length=8, cache="none", eos_id=eos)
    first = tokens.index(eos)
    assert out.sequences[0, 24:].tolist() == tokens[:first] + [eos] * (32 - first)
    assert out.nfe < free.nfe


@pytest.mark.parametrize("pad", [None, 3])
@pytest.mark.parametrize("kind", [list, tuple])
def test_the_first_of_several_ends_of_text_stops_a_row(llada, ids, kind, pad):
    """Alone, in a batch and through `generate_many`; later ids become the end-of-text id, or ``pad_id``."""
    dllm_fast.patch(llada)
    options = {"gen_length": 32, "block_length": 8, "cache": "none", "schedule": Uniform(16)}
    free = dllm_fast.generate(llada, ids, **options).sequences[:, 24:].tolist()
    ends = [free[0][9], free[0][20], free[1][3], EOS]
    expected = []
    for row in free:
        first = next((at for at, token in enumerate(row) if token in ends), len(row))
        rest = row[min(first, 31)] if pad is None else pad
        expected.append(row[: first + 1] + [rest] * (31 - first))
    assert sum(row != cut for row, cut in zip(free, expected)) >= 2
    options |= {"eos_id": kind(ends), "pad_id": pad}
    out = dllm_fast.generate(llada, ids, **options)
    assert out.sequences[:, 24:].tolist() == expected
    many = dllm_fast.generate_many(llada, ids.tolist(), batch_size=2, **options)
    assert [row.sequence[24:].tolist() for row in many] == expected


def test_an_end_of_text_in_the_prompt_ends_nothing(llada, ids):
    """Nor does filling a gap after it. An end of text in a gap ends the masked positions after it, not given tokens."""
    dllm_fast.patch(llada)
    gaps = ids[:1].clone()
    gaps[0, 2], gaps[0, 6:10], gaps[0, 15:18] = EOS, MASK, MASK
    options = {"gen_length": 8, "block_length": 4, "cache": "none"}
    free = dllm_fast.generate(llada, gaps, **options).sequences[0].tolist()
    absent = next(token for token in range(VOCAB) if token not in free)
    assert dllm_fast.generate(llada, gaps, eos_id=[EOS, absent], **options).sequences[0].tolist() == free
    end = free[7]
    first = 6 + free[6:8].index(end)
    expected = [token if at <= first or gaps.tolist()[0][at : at + 1] not in ([], [MASK]) else end
                for at, token in enumerate(free)]  # fmt: skip
    assert dllm_fast.generate(llada, gaps, eos_id=(end,), **options).sequences[0].tolist() == expected


class Recorder:
    def __init__(self):
        self.put_, self.drafts, self.ended = [], [], 0

    def put(self, value):
        self.put_.append(value.tolist())

    def put_draft(self, value, sequence):
        self.drafts.append((value.tolist(), sequence.tolist()))

    def end(self):
        self.ended += 1


def test_streamers_get_the_prompt_then_whole_blocks_in_order(llada, ids):
    dllm_fast.patch(llada)
    seen = Recorder()
    out = dllm_fast.generate(llada, ids[:1], gen_length=24, block_length=8, schedule=Uniform(6), streamer=seen)
    assert [len(x) for x in seen.put_] == [24, 8, 8, 8] and seen.ended == 1
    assert list(itertools.chain(*seen.put_)) == out.sequences[0].tolist()
    assert len(seen.drafts) == 6 and all(len(draft) == 8 for draft, _ in seen.drafts)
    hidden = [sequence.count(MASK) for _, sequence in seen.drafts]
    assert hidden == [20, 16, 12, 8, 4, 0]
    gaps = ids[:1].clone()
    gaps[0, 5:9] = MASK
    seen = Recorder()
    out = dllm_fast.generate(llada, gaps, gen_length=0, block_length=4, streamer=seen)
    assert [len(x) for x in seen.put_] == [5, 19] and list(itertools.chain(*seen.put_)) == out.sequences[0].tolist()


def test_transformers_streamers_print_the_text(llada, ids, capsys):
    from tokenizers import Tokenizer, decoders, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.decoder = decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    dllm_fast.patch(llada)
    streamers = [transformers.TextStreamer]
    streamers += [transformers.TextDiffusionStreamer] if hasattr(transformers, "TextDiffusionStreamer") else []
    for cls in streamers:
        run = functools.partial(dllm_fast.generate, llada, ids[:1], gen_length=16, block_length=8)
        out = run(streamer=cls(tokenizer, skip_prompt=True))
        printed = capsys.readouterr().out
        final = printed.rsplit("\033[J", 1)[-1] if cls is not transformers.TextStreamer else printed
        assert tokenizer.decode(out.sequences[0, -1:]) in final
        assert tokenizer.decode(out.sequences[0, 24:25]) in printed


def test_custom_generate_works_through_transformers(llada, ids):
    dllm_fast.patch(llada)
    expected = dllm_fast.generate(llada, ids, gen_length=16, block_length=8, schedule=Uniform(4)).sequences
    call = functools.partial(llada.generate, ids, custom_generate=dllm_fast.custom_generate)
    assert torch.equal(call(gen_length=16, block_length=8, schedule=Uniform(4)), expected)
    assert torch.equal(call(max_new_tokens=16, block_length=8, schedule=Uniform(4)), expected)
    parameters = inspect.signature(dllm_fast.custom_generate).parameters
    assert {*inspect.signature(dllm_fast.generate).parameters} - {*parameters} == {"attention_mask"}
    seen = Recorder()
    streaming = functools.partial(dllm_fast.custom_generate, streamer=seen)
    llada.generate(ids[:1], custom_generate=streaming, gen_length=16, block_length=8)
    assert seen.ended == 1


def test_generate_leaves_the_model_and_the_arguments_as_they_were(either, ids, padded):
    dllm_fast.patch(either).train()
    state = {name: tensor.clone() for name, tensor in either.state_dict().items()}
    ids_before, mask_before = ids.clone(), padded.clone()
    trained = dllm_fast.generate(either, ids, padded, gen_length=8, block_length=8).sequences
    assert either.training and torch.equal(ids, ids_before) and torch.equal(padded, mask_before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in either.state_dict().items())
    assert torch.equal(dllm_fast.generate(either.eval(), ids, padded, gen_length=8, block_length=8).sequences, trained)


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@HALVES
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_half_precision_fills_every_position(either, ids, padded, dtype, cache):
    dllm_fast.patch(either.to(dtype))
    out = dllm_fast.generate(either, ids, padded, gen_length=16, block_length=8, schedule=Uniform(8), cache=cache)
    assert not (out.sequences == MASK).any() and out.nfe == 8


def sure(logits, confidence):
    """The confidence of the most probable token other than [MASK], [L], from logits [L, V] fp64."""
    probability = logits.softmax(-1)
    entropy = torch.special.entr(probability).sum(-1)
    best, second = probability.index_fill(1, torch.tensor(MASK, device=logits.device), 0.0).topk(2).values.T
    return {"probability": best, "margin": best - second, "entropy": -entropy}[confidence]


@torch.no_grad()
@HALVES
@pytest.mark.parametrize("confidence, threshold", [("probability", 0.1), ("margin", 0.02), ("entropy", -4.2)])
@pytest.mark.parametrize("schedule", [Uniform, Threshold], ids=lambda s: s.__name__)
def test_half_precision_decides_as_exactly_as_the_model_itself(either, ids, dtype, confidence, threshold, schedule):
    """At each step, the tokens and positions written are the best ones by the model in fp64, given the tokens before.
    Each value may have twice the error of the model's own forward in this dtype, so a difference of two, four times."""
    own, wide = copy.deepcopy(either).to(dtype), copy.deepcopy(either)
    wide.load_state_dict(own.state_dict())  # then the buffers, which it lacks, become fp64
    wide.double()
    seen = Recorder()
    dllm_fast.generate(
        dllm_fast.patch(either.to(dtype)), ids[:1], gen_length=16, block_length=8, cache="none", confidence=confidence,
        schedule=Uniform(8) if schedule is Uniform else Threshold(threshold), streamer=seen,
    )  # fmt: skip
    x = torch.cat((ids[0], ids.new_full((16,), MASK)))
    for _, after in seen.drafts:
        after = torch.tensor(after, device=x.device)
        open_ = x == MASK
        open_[32:] &= not open_[:32].any()
        kept, left = open_ & (after != MASK), open_ & (after == MASK)
        assert kept.any() and torch.equal(after[~kept], x[~kept])
        truth, rounded = (model(x[None]).logits[0].double() for model in (wide, own))
        best = truth.index_fill(1, torch.tensor(MASK, device=x.device), float("-inf")).max(-1).values
        lost = (best - truth.gather(1, after[:, None])[:, 0])[kept]
        assert (lost <= 4 * (rounded - truth)[kept].abs().max()).all()
        value = sure(truth, confidence)
        off = 2 * (sure(rounded, confidence) - value).abs().max()  # a few open positions alone may err little by luck
        assert not left.any() or value[kept].min() >= value[left].max() - 2 * off
        if schedule is Uniform:
            assert kept.sum() == 2
        else:
            assert (value[left] < threshold + off).all()
            assert kept.sum() == 1 or (value[kept] >= threshold - off).all()
        x = after
    assert not (x == MASK).any()
