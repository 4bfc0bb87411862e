"""Suppressed tokens, and deferred ones, whose confidence counts as -inf: options of LLaDA's evaluations."""

import itertools

import pytest
import torch
from needs import needs_triton
from tiny import EOS, MASK, VOCAB, make_llada, make_modernbert

import dllm_fast
from dllm_fast import P2, Factor, Pyramid, ReMDM, Threshold, Uniform, Verify, ops
from dllm_fast.decoding.published import published_generate

GEN = {"gen_length": 32, "block_length": 16}


@pytest.fixture
def left():
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[0, :3], mask[2, :11] = 0, 0
    return mask


@torch.no_grad()
def published(model, ids, mask=None, **options):
    dllm_fast.unpatch(model)
    return published_generate(lambda x, m: model(x, attention_mask=m).logits, ids, mask, mask_id=MASK, **options)[0]


def favourites(model, ids, **options) -> list[int]:
    """The ids that a plain run chooses, most frequent first."""
    return by_frequency(published(model, ids, **{"steps": 32, **GEN, **options}))


def by_frequency(sequences) -> list[int]:
    answer = sequences[:, 24:]
    return torch.bincount(answer.flatten(), minlength=VOCAB).argsort(descending=True, stable=True).tolist()


def sets_of(best: list[int]) -> list[dict]:
    return [
        {"suppress_tokens": best[:2]},
        {"defer_tokens": best[:2]},
        {"suppress_tokens": best[1:2], "defer_tokens": best[:3:2]},
    ]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5], ids="cfg-{}".format)
@pytest.mark.parametrize("make", [make_llada, make_modernbert], ids=["llada", "modernbert"])
def test_the_published_tokens(make, ids, left, cfg_scale):
    plain_options = {**GEN, "steps": 8, "cfg_scale": cfg_scale}
    compared = set()
    for seed in range(
        20
    ):  # try models until each option has changed tokens; if everything is deferred, nothing changes
        model = make(seed)
        plain = published(model, ids, left, **plain_options)
        for chosen in sets_of(by_frequency(plain)):
            if tuple(chosen) in compared:
                continue
            expected = published(model, ids, left, **plain_options, **chosen)
            for impl in ("torch", "auto"):
                with dllm_fast.patched(model, impl=impl):
                    options = {**GEN, "schedule": Uniform(8), "cache": "none", "cfg_scale": cfg_scale, **chosen}
                    out = dllm_fast.generate(model, ids, left, **options)
                assert torch.equal(out.sequences, expected)
                assert not torch.isin(out.sequences[:, 24:], torch.tensor(chosen.get("suppress_tokens", []))).any()
            if not torch.equal(expected, plain):
                compared.add(tuple(chosen))
        if len(compared) == len(sets_of([])):
            break
    assert len(compared) == len(sets_of([])), f"only these changed anything: {compared}"


@pytest.mark.parametrize("rule", [{"pyramid": 2}, {"threshold": 0.05}], ids=str)
def test_other_schedules(either, ids, rule):
    for chosen in sets_of(favourites(either, ids)):
        expected = published(either, ids[:1], **GEN, **rule, **chosen)
        schedule = Pyramid(2) if "pyramid" in rule else Threshold(0.05)
        with dllm_fast.patched(either):
            out = dllm_fast.generate(either, ids[:1], schedule=schedule, cache="none", **GEN, **chosen)
        assert torch.equal(out.sequences, expected)


@needs_triton
def test_triton_gives_the_published_tokens(ids):
    model = make_llada(n_layers=1)
    best = favourites(model, ids)
    options = {"gen_length": 4, "block_length": 4, **sets_of(best)[2]}
    expected = published(model, ids[:1, :6], steps=2, **options)
    with dllm_fast.patched(model, impl="triton"):
        out = dllm_fast.generate(model, ids[:1, :6], schedule=Uniform(2), cache="none", **options)
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("schedule", [Uniform(8), Threshold(0.05), Factor(1.0)], ids=lambda s: type(s).__name__)
def test_caches_temperature_and_many_prompts(either, ids, left, cache, schedule):
    chosen = sets_of(favourites(either, ids))[2]
    options = {**GEN, "schedule": schedule, "cache": cache, "temperature": 0.7, "seed": 3, **chosen}
    dllm_fast.patch(either)
    out = dllm_fast.generate(either, ids, left, **options)
    answer = out.sequences[:, 24:]
    assert not torch.isin(answer, torch.tensor([MASK, *chosen["suppress_tokens"]])).any()
    prompts = [row[keep.bool()] for row, keep in zip(ids, left)]
    for row, done in enumerate(dllm_fast.generate_many(either, prompts, batch_size=2, **options)):
        assert torch.equal(done.sequence[-32:], answer[row])


def test_a_position_that_is_held_back_is_filled_when_no_other_is_left(llada, ids):
    """With every id deferred, each step commits the first masked position, whatever the schedule."""
    dllm_fast.patch(llada)
    everything = [i for i in range(VOCAB) if i != MASK]
    for schedule in (Threshold(1e-6), Factor(100.0)):
        drafts = []
        streamer = Drafts(drafts)
        options = {"gen_length": 8, "block_length": 8, "schedule": schedule, "cache": "none", "streamer": streamer}
        out = dllm_fast.generate(llada, ids[:1], defer_tokens=everything, **options)
        assert out.nfe == 8 and [int((d == MASK).sum()) for d in drafts] == list(range(7, -1, -1))
        assert all((d[: i + 1] != MASK).all() for i, d in enumerate(drafts))


class Drafts:
    def __init__(self, drafts):
        self.drafts = drafts

    def put(self, ids):
        pass

    def put_draft(self, draft, sequence):
        self.drafts.append(draft[-8:].clone())

    def end(self):
        pass


def test_an_end_of_text_that_is_held_back_comes_last(llada, ids):
    """The options' purpose: a model that would end at once writes text first."""
    dllm_fast.patch(llada)
    early = 0
    for word, prompt in itertools.product(range(3, 13), ids.split(1)):
        with torch.no_grad():  # the end of text is likely wherever this word would have been
            llada.model.transformer.ff_out.weight[EOS] = 40 * llada.model.transformer.ff_out.weight[word]
        plain, held, without = (
            ends_that_came_early(llada, prompt, **more)
            for more in ({}, {"defer_tokens": [EOS]}, {"suppress_tokens": [EOS]})
        )
        early += plain[1]
        assert held[1] == 0 and without[0] == 0
        if early:
            break
    assert early > 0


@torch.no_grad()
def ends_that_came_early(model, prompt, **more) -> tuple[int, int]:
    """(ends of text committed, how many of them while another position had another token to commit)."""
    drafts = [torch.full((8,), MASK)]
    options = {"gen_length": 8, "block_length": 8, "schedule": Uniform(8), "cache": "none", "streamer": Drafts(drafts)}
    dllm_fast.generate(model, prompt, **options, **more)
    written = early = 0
    for before, after in itertools.pairwise(drafts):
        logits = model(torch.cat((prompt[0], before))[None]).logits[0, 24:]
        logits[:, MASK] = float("-inf")
        (place,) = (before != after).nonzero()[:, 0].tolist()
        others = logits.argmax(-1)[before == MASK] != EOS
        written += int(after[place] == EOS)
        early += int(after[place] == EOS and others.any())
    assert len(drafts) == 9
    return written, early


@pytest.mark.parametrize("remask", [ReMDM(1.0), Verify(0.5), P2(1.0)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("schedule", [Uniform(8), Threshold(0.05)], ids=lambda s: type(s).__name__)
def test_remasks_end(either, ids, remask, schedule):
    chosen = sets_of(favourites(either, ids))[2]
    dllm_fast.patch(either)
    for cfg_scale in (0.0, 1.0):
        out = dllm_fast.generate(either, ids, schedule=schedule, remask=remask, cfg_scale=cfg_scale, **GEN, **chosen)
        assert not torch.isin(out.sequences[:, 24:], torch.tensor([MASK, *chosen["suppress_tokens"]])).any()
        passes = 2 if cfg_scale else 1
        assert out.nfe == 8 * passes if isinstance(schedule, Uniform) else out.nfe <= 2 * 32 * passes


def test_a_kept_tokens_probability_counts_deferred_ids():
    """The probabilities that remasking reads: a softmax without suppressed ids, with deferred ones and guidance."""
    torch.manual_seed(0)
    hidden, uncond, weight, bias = torch.randn(9, 8), torch.randn(9, 8), torch.randn(40, 8), torch.randn(40)
    token = torch.tensor([5, 6, 7, 8, 9, 5, 6, 7, 8])
    for guided in ({}, {"uncond": uncond, "cfg_scale": 1.5}):
        lse = ops.predict(hidden, weight, bias, mask_id=0, banned=(3,), deferred=(5, 6), **guided)[2]
        got = ops.token_logprob(hidden, weight, bias, token=token, lse=lse, deferred=(5, 6), **guided)
        logits = hidden.double() @ weight.double().T
        if guided:
            base = uncond.double() @ weight.double().T
            logits = base + 2.5 * (logits - base)
        logits = logits + bias
        logits[:, 3] = -torch.inf
        expected = torch.softmax(logits, -1).gather(1, token[:, None])[:, 0]
        torch.testing.assert_close(got.exp().double(), expected, rtol=1e-4, atol=1e-7)


def test_bad_ids_are_named(llada, ids):
    dllm_fast.patch(llada)
    for name in ("suppress_tokens", "defer_tokens"):
        for value, message in (
            ([VOCAB], rf"{name}\[0\]=101 is not an id of the vocabulary of 101"),
            (-1, f"{name}=-1 is not"),
            ([3, -1], rf"{name}\[1\]=-1 is not"),
            ([True], rf"{name}\[0\]=True is not"),
            ([1.0], rf"{name}\[0\]=1.0 is not"),
            ("1", f"{name}='1' is not"),
        ):
            with pytest.raises(ValueError, match=message):
                dllm_fast.generate(llada, ids, **{name: value})
            with pytest.raises(ValueError, match=message):
                dllm_fast.generate_many(llada, [ids[0]], **{name: value})
    with pytest.raises(ValueError, match="suppress_tokens: leaves no token"):
        dllm_fast.generate(llada, ids, suppress_tokens=[i for i in range(VOCAB) if i != MASK])
    one, several = (dllm_fast.generate(llada, ids, defer_tokens=value, **GEN).sequences for value in (7, [7, 7]))
    assert torch.equal(one, several)
    one = [i for i in range(VOCAB) if i not in (7, MASK)]
    out = dllm_fast.generate(llada, ids, suppress_tokens=one, **GEN)
    assert (out.sequences[:, 24:] == 7).all()
