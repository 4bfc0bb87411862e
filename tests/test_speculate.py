"""``speculate``: the same tokens in fewer forwards."""

import random
import re

import others
import pytest
import torch
from needs import needs_cpp, needs_triton
from rows import Request, batched, draw_request, is_level
from tiny import EOS, MAKERS, MASK

import dllm_fast
from dllm_fast import DraftGraph, Drift, Every, Threshold, Uniform, ops
from dllm_fast.decoding.speculation import Speculation


def pruned(rng: random.Random, drafts: int) -> DraftGraph:
    """A graph of which each step takes ``drafts``, whatever its weights say."""
    held = (*DraftGraph.chain(6).drafts, (1, (1,)), (1, (0, 2)), (2, (0, 1, 3)), (2, (1, 2)), (3, (0, 1, 2, 4)))
    weights = tuple((rng.uniform(-3, 1), rng.uniform(-1, 2), rng.uniform(-2, 1)) for _ in held)
    return DraftGraph(held, drafts, weights)


def drawn(name: str, seed: int, **limits) -> tuple[Request, int | DraftGraph]:
    """A request without drafts, and drafts for it."""
    rng = random.Random(seed)
    request = draw_request(
        rng, **{"rows": (1, 3), "most_blocks": 2, "longest": 12, **limits}, windows=name == "modernbert"
    )
    request.options |= {"skip_committed": False, "speculate": None}
    if name in others.SHIFTED and isinstance(request.options.get("refresh"), Drift):
        request.options["refresh"] = Every(2)
    drafts = rng.choice([1, 2, 3, 7])
    return request, pruned(rng, drafts) if rng.random() < 0.5 else drafts


def same_tokens(name: str, seed: int) -> None:
    """In fp64, where more rows in a matmul make no candidates change places."""
    model = dllm_fast.patch(others.made(name).double(), impl="torch")
    request, drafts = drawn(name, seed)
    without, _ = batched(model, request)
    request.options["speculate"] = drafts
    with_drafts, _ = batched(model, request)
    assert [ids for ids, _ in with_drafts] == [ids for ids, _ in without], str(request)
    assert all(mine <= its for (_, mine), (_, its) in zip(with_drafts, without, strict=True))


@pytest.mark.parametrize("name", ["llada-gqa", "modernbert", "qwen2-shifted"])
@pytest.mark.parametrize("seed", range(9))
def test_the_same_tokens_as_without(name, seed):
    same_tokens(name, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 300))
def test_the_same_tokens_of_a_shifted_model(seed):
    same_tokens(sorted(others.SHIFTED)[seed % 2], seed)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("hundred", range(10))
def test_the_same_tokens_in_2000_runs(name, hundred):
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        same_tokens(name, 1000 + seed)


def same_tokens_on_kernels(impl: str, name: str, seed: int, **limits) -> None:
    """In fp32. If a row differs, rounding decided between two candidates: on PyTorch, weights changed by a rounding
    error must give it the same tokens."""
    device = "cuda" if torch.cuda.is_available() and impl == "triton" else "cpu"
    request, drafts = drawn(name, seed, **limits)
    if impl == "triton" and device == "cpu":  # the interpreter has no e4m3
        request.options.pop("cache_dtype", None)
    model = dllm_fast.patch(MAKERS[name]().to(device), impl=impl)
    without, _ = batched(model, request)
    request.options["speculate"] = drafts
    with_drafts, _ = batched(model, request)
    plain = dllm_fast.patch(MAKERS[name]().to(device), impl="torch")
    for row, ((ids, nfe), (expected, _)) in enumerate(zip(with_drafts, without, strict=True)):
        level = ids == expected or is_level(plain, request, row, (ids, nfe))
        assert level, f"row {row}: {ids}, not {expected}: {request}"


@needs_cpp
@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("seed", range(5))
def test_the_same_tokens_in_the_compiled_kernels(name, seed):
    same_tokens_on_kernels("cpp", name, seed)


@needs_cpp
@pytest.mark.long
@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
@pytest.mark.parametrize("hundred", range(2))
def test_the_same_tokens_in_400_runs_of_the_compiled_kernels(name, hundred):
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        same_tokens_on_kernels("cpp", name, 1000 + seed)


SHORT = {"rows": (2,), "blocks": (4,), "most_blocks": 1, "longest": 4}


@needs_triton
@pytest.mark.usefixtures("strict_interpreter")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_the_same_tokens_in_tritons_kernels(seed):
    same_tokens_on_kernels("triton", ["llada-gqa", "modernbert"][seed % 2], seed, **SHORT)


@needs_triton
@pytest.mark.long
@pytest.mark.usefixtures("strict_interpreter")
@pytest.mark.parametrize("seed", range(100, 130))
def test_the_same_tokens_in_30_runs_of_tritons_kernels(seed):
    same_tokens_on_kernels("triton", ["llada-gqa", "modernbert"][seed % 2], seed, **SHORT)


def plain_chain(model, ids, tokens: int, steps: int, drafts: int):
    """One block after ``ids`` [P], greedy and without a cache, with a chain of drafts: its tokens, forwards and steps,
    by a plain loop over the model's own forward."""
    ids = torch.cat((ids, torch.full((tokens,), MASK)))
    plan = [tokens // steps + (step < tokens % steps) for step in range(steps)]

    def predicted(state):
        logits = model(state[None]).logits[0].double()
        token = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).argmax(-1)
        return token, logits.softmax(-1).gather(1, token[:, None])[:, 0]

    def committed(state, token, score, count):
        masked = (state == MASK).nonzero()[:, 0]
        chosen = masked[score[masked].argsort(descending=True, stable=True)[:count]]
        return state.index_copy(0, chosen, token[chosen])

    forwards = step = 0
    guesses = [ids]
    while (ids == MASK).any():
        known = [(state, *predicted(state)) for state in guesses]
        forwards += 1
        for state, token, score in known:
            if not torch.equal(state, ids):
                break
            last, ids, step = (token, score), committed(ids, token, score, plan[step]), step + 1
            if not (ids == MASK).any():
                break
        guesses = [ids]
        for count in plan[step : step + drafts]:
            guesses.append(committed(guesses[-1], *last, count))
    return ids, forwards, step


@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("steps", [24, 12, 7])
def test_the_forwards_of_a_plain_chain(steps, drafts):
    model = MAKERS["llada"]().double()
    ids = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(steps))
    expected = [plain_chain(model, row, 24, steps, drafts) for row in ids]
    options = {"gen_length": 24, "block_length": 24, "schedule": Uniform(steps), "cache": "none", "speculate": drafts}
    with dllm_fast.patched(model, impl="torch"):
        out = dllm_fast.generate(model, ids, **options)
    assert torch.equal(out.sequences, torch.stack([found for found, _, _ in expected]))
    assert out.row_nfe == [forwards for _, forwards, _ in expected]
    assert out.steps == steps and out.states == (out.nfe - 1) * (drafts + 1) + 1


@pytest.mark.parametrize("schedule", [Uniform(24), Uniform(7), Threshold(0.5)])
def test_the_host_reads_no_more_often_than_a_block_could_be_done(schedule, monkeypatch):
    """A block's first forward takes a step, and others at most one and one for each draft."""
    reads: list[tuple[int, list[int]]] = []

    def watched(engine, going, read=Speculation.read_steps):
        forwards = len(engine.unread)
        live, steps = read(engine, going)
        reads.append((forwards, steps.tolist()))
        return live, steps

    monkeypatch.setattr(Speculation, "read_steps", watched)
    model = dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(0))
    out = dllm_fast.generate(model, ids, gen_length=24, block_length=24, schedule=schedule, speculate=3)
    assert sum(forwards for forwards, _ in reads) == out.nfe
    if schedule.rule:  # how many steps there will be is not known
        assert [forwards for forwards, _ in reads] == [1] * out.nfe
        return
    before = None
    for forwards, steps in reads:
        left = [schedule.steps - (1 if before is None else taken) for taken in before or [1, 1]]
        soonest = min(-(-n // 4) for n in left if n)
        assert forwards == soonest + (before is None)
        before = steps
    assert before == [schedule.steps] * 2 and len(reads) < out.nfe


def test_the_shipped_model_takes_fewer_forwards_to_the_same_answers():
    from bench import task

    model, tokenizer = task.load("llada-steps")
    prompts = [prompt for prompt, _ in task.STEPS.problems(8, 3, held_out=True)]
    rows = tokenizer(prompts, return_tensors="pt", padding=True)
    given = {"gen_length": 64, "block_length": 32, "schedule": Uniform(32)}
    run = [
        dllm_fast.generate(model, rows["input_ids"], rows["attention_mask"], **given, speculate=n) for n in (None, 3)
    ]
    assert torch.equal(run[0].sequences, run[1].sequences)
    assert run[1].nfe < 0.7 * run[0].nfe and run[1].steps == run[0].steps == 32


@pytest.mark.parametrize("schedule", [Threshold(0.1), dllm_fast.Factor(0.6), dllm_fast.EntropyBound(2.0)])
def test_what_goes_by_confidences_drafts_sets_of_the_most_confident(schedule):
    model = dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (2, 9), generator=torch.Generator().manual_seed(0))
    given = {"gen_length": 16, "block_length": 16, "schedule": schedule}
    sets = DraftGraph(((1, (0,)), (1, (0, 1)), (1, (0, 1, 2))))
    expected, found, explicit = (dllm_fast.generate(model, ids, **given, speculate=how) for how in (None, 3, sets))
    assert torch.equal(found.sequences, expected.sequences) and found.steps == expected.nfe
    assert found.row_nfe == explicit.row_nfe and found.nfe < expected.nfe


def test_deferred_tokens_are_drafted():
    """A model that predicts the same at every step, only what is deferred, behind what is filled."""
    model = MAKERS["llada"]().double()
    for name, weight in model.named_parameters():
        if "attn_out" in name or ("ff_out.weight" in name and "blocks" in name):
            weight.data.zero_()
    model = dllm_fast.patch(model, impl="torch")
    ids = torch.cat((torch.arange(10), torch.full((22,), MASK)))[None]
    given = {"gen_length": 0, "block_length": 32, "schedule": Uniform(22), "cache": "none"}
    given["defer_tokens"] = list(range(EOS + 1))
    expected, found = (dllm_fast.generate(model, ids, **given, speculate=n) for n in (None, 7))
    assert torch.equal(found.sequences, expected.sequences) and not (found.sequences == MASK).any()
    assert expected.nfe == 22 and found.nfe == 1 + -(-21 // 8)


def test_a_graph_of_other_sets_gives_the_same_tokens_and_a_chain_is_one():
    model = dllm_fast.patch(MAKERS["llada"]().double(), impl="torch")
    ids = torch.randint(0, EOS, (3, 9), generator=torch.Generator().manual_seed(0))
    given = {"gen_length": 16, "block_length": 16, "schedule": Uniform(8)}
    expected = dllm_fast.generate(model, ids, **given)
    graph = DraftGraph(((1, (0, 1)), (2, (0, 1, 2, 3)), (1, (0, 2)), (2, (0, 1, 2, 5)), (3, None)))
    for speculate in (graph, DraftGraph.chain(3), 3):
        out = dllm_fast.generate(model, ids, **given, speculate=speculate)
        assert torch.equal(out.sequences, expected.sequences) and out.nfe <= expected.nfe == out.steps
    explicit = DraftGraph(tuple((n, tuple(range(2 * n))) for n in (1, 2, 3)))
    assert dllm_fast.generate(model, ids, **given, speculate=explicit).row_nfe == out.row_nfe


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "speculate=-1 is not a number of drafts from 0 to 63, 'auto', a .json file or a DraftGraph"),
        (64, "speculate=64 is not a number of drafts"),
        (1.5, "speculate=1.5 is not a number of drafts"),
        ("many", "speculate='many' is not a number of drafts"),
        ("none.json", "speculate='none.json': there is no such file"),
        (True, "speculate=True is not a number of drafts"),
    ],
)
def test_a_bad_value(value, message):
    model = dllm_fast.patch(MAKERS["llada"]())
    with pytest.raises(ValueError, match=re.escape(message)):
        dllm_fast.generate(model, torch.zeros(1, 5, dtype=torch.int64), gen_length=8, block_length=8, speculate=value)


ONE = ((1, None),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((((2, None),),), "speculate: draft 0, (2, None): no draft is 1 steps ahead"),
        ((((0, None),),), "speculate: draft 0, (0, None), is not (steps ahead, ascending ranks)"),
        ((((1, (1, 0)),),), "speculate: draft 0, (1, (1, 0)), is not (steps ahead, ascending ranks)"),
        ((((1, ()),),), "speculate: draft 0, (1, ()), is not (steps ahead, ascending ranks)"),
        ((ONE * 64,), "speculate: 64 drafts are more than 63"),
        ((ONE, 2), "speculate: evaluated=2 is not a number from 0 to 1 or None"),
        ((ONE, None, ()), "speculate: weights=() are not three finite numbers for each of 1 drafts"),
        ((ONE, None, ((0.5, 1.0),)), "speculate: weights=((0.5, 1.0),) are not three finite numbers for each of 1"),
        ((ONE, None, ((float("nan"), 0.0, 0.0),)), "speculate: weights=((nan, 0.0, 0.0),) are not three finite"),
    ],
)
def test_a_bad_graph(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DraftGraph(*fields)


def test_not_with_skip_committed():
    model = dllm_fast.patch(MAKERS["llada"]())
    given = {"gen_length": 8, "block_length": 8, "skip_committed": True, "speculate": 2, "schedule": Threshold(0.5)}
    with pytest.raises(ValueError, match=r"skip_committed=True: .* which speculate would skip"):
        dllm_fast.generate(model, torch.zeros(1, 5, dtype=torch.int64), **given)


@pytest.mark.parametrize("impl", ["torch", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_and_a_seed_for_each_row(temperature, impl):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=draw), torch.randn(40, 8, generator=draw)
    keys = {"row": torch.arange(6) % 2, "position": torch.arange(6)}
    options = {"mask_id": 3, "confidence": "random", "temperature": temperature, "candidate": keys["position"] != 2}
    steps = torch.tensor([3, 0, 9, 1 << 31, 3, 7])
    seeds = torch.tensor([5, 5, 6, 5 << 40, 0, 6])
    found = ops.predict(hidden, weight, step=steps, seed=seeds, **keys, **options, impl=impl)
    for n, (step, seed) in enumerate(zip(steps.tolist(), seeds.tolist(), strict=True)):
        alone = ops.predict(hidden, weight, step=step, seed=seed, **keys, **options, impl=impl)
        assert all(mine[n] == own[n] for mine, own in zip(found, alone, strict=True))
