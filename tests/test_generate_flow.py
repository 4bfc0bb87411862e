"""`generate_flow`: against a plain loop, with padding, in any batch, and its errors."""

import pytest
import torch
from needs import needs_triton
from tiny import MAKERS, MASK, VOCAB, make_llada

import dllm_fast
from dllm_fast.decoding.flips import flipped
from dllm_fast.kernels import reference

PADS = torch.tensor([0, 7, 3])
START = torch.randint(0, VOCAB, (3, 10), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def padded():
    return (torch.arange(24) >= PADS[:, None]).long()


def plain(model, prompt, row, steps, temperature, start, noise, seed=9):
    """One row without padding, [10]: predict all, flip again with less noise."""
    position, row = torch.arange(len(prompt), len(prompt) + 10), torch.full((10,), row)
    state = start
    if state is None:
        state = flipped(torch.zeros(10, dtype=torch.int64), torch.ones(10), VOCAB, seed, steps, row, position)
    for step in range(steps):
        logits = model(torch.cat((prompt, state))[None]).logits[0, len(prompt) :].double()
        logits[:, MASK] = -torch.inf
        if temperature:
            logits = logits + temperature * reference.gumbel(seed, step, row, position, torch.arange(VOCAB))
        state = logits.argmax(1)
        weight = noise * (steps - step - 1) / steps
        state = flipped(state, torch.full((10,), weight), VOCAB, seed, step, row, position) if weight else state
    return state


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("start, noise", [(None, 1.0), (START, 0.4), (START, 0.0)], ids=["random", "given", "no noise"])
@pytest.mark.parametrize("impl", ["eager", "auto", "torch"])
@pytest.mark.parametrize("name", ["llada", "modernbert"])
def test_rows_are_those_of_a_plain_loop_alone(name, impl, start, noise, temperature, ids, padded):
    """Patched and not; padded rows too. Nothing of a row depends on the others."""
    model = MAKERS[name]()
    options = {"gen_length": 10, "steps": 5, "temperature": temperature, "noise": noise, "start_ids": start, "seed": 9}
    starts = [None] * 3 if start is None else start
    with torch.no_grad():
        expected = [
            plain(model, ids[b, PADS[b] :], b, 5, temperature, starts[b], noise) for b in range(3)
        ]  # fmt: skip
    if impl != "eager":
        dllm_fast.patch(model, impl)
    out = dllm_fast.generate_flow(model, ids, padded, **options)
    assert torch.equal(out.sequences[:, :24], ids)
    assert torch.equal(out.sequences[:, 24:], torch.stack(expected))
    assert (out.nfe, out.row_nfe, out.positions) == (5, [5, 5, 5], 5 * (3 * 34 - int(PADS.sum())))
    if padded is not None and start is None and not temperature:
        alone = dllm_fast.generate_flow(model, ids[:1], **options)
        assert torch.equal(alone.sequences, out.sequences[:1])


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize("name", ["llada", "modernbert"])
def test_tritons_kernels_give_the_models_own_tokens(name, ids, padded):
    model, options = MAKERS[name](), {"gen_length": 6, "steps": 3, "temperature": 0.5, "seed": 4}
    expected = dllm_fast.generate_flow(model, ids, padded, **options).sequences
    found = dllm_fast.generate_flow(dllm_fast.patch(model, "triton"), ids, padded, **options).sequences
    assert torch.equal(found, expected)


def test_the_first_tokens_are_uniform_and_the_last_ones_the_models(llada, ids):
    """What the model is given at the first step, and that no step after the last flips anything."""
    given, predicted = [], []
    hook = llada.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"][:, 24:]), with_kwargs=True
    )
    for seed in range(40):
        out = dllm_fast.generate_flow(llada, ids, gen_length=100, steps=2, seed=seed, watch=predicted.append)
        assert torch.equal(predicted[-1], out.sequences[:, 24:]) and not (predicted[-1] == MASK).any()
    hook.remove()
    counts = torch.bincount(torch.cat(given[::2]).flatten(), minlength=VOCAB).double()
    mean = counts.mean()
    assert float(((counts - mean) ** 2 / mean).sum()) < 100 + 4.3 * 200**0.5
    flips = float(torch.stack([a != b for a, b in zip(given[1::2], predicted[::2], strict=True)]).double().mean())
    row = torch.arange(12_000)
    expected = flipped(torch.zeros_like(row), torch.full((12_000,), 0.5), VOCAB, 77, 0, row, row).bool()
    assert abs(flips - float(expected.double().mean())) < 0.02


def test_without_a_seed_it_is_drawn_from_torchs_generator(llada, ids):
    torch.manual_seed(3)
    a, b = (dllm_fast.generate_flow(llada, ids, gen_length=8, steps=2).sequences for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(dllm_fast.generate_flow(llada, ids, gen_length=8, steps=2).sequences, a)
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps=0 is not a positive whole number"),
        ({"gen_length": 0}, "gen_length=0 is not a positive whole number"),
        ({"noise": 1.5}, "noise=1.5 is not a number from 0 to 1"),
        ({"temperature": -1.0}, "temperature=-1.0 is not a finite number from 0 up"),
        ({"mask_id": VOCAB}, f"mask_id={VOCAB} is not an id"),
        ({"gen_length": 500}, "input_ids: a prompt of 24 and gen_length=500 exceed the model's 512 positions"),
        ({"start_ids": START[:, :4]}, r"start_ids: shape \(3, 4\) is not \(3, 10\)"),
        ({"start_ids": START + VOCAB}, "start_ids: id .* is outside the vocabulary"),
        ({"start_ids": START.float()}, "start_ids: is not an int64 tensor"),
        ({"attention_mask": (torch.arange(24) < 20).long().expand(3, -1)}, "attention_mask: row 0 is padded on the ri"),
    ],
)
@pytest.mark.parametrize("patched", [False, True], ids=["eager", "patched"])
def test_bad_arguments_are_named(llada, ids, options, message, patched):
    if patched:
        dllm_fast.patch(llada)
    with pytest.raises(ValueError, match=message):
        dllm_fast.generate_flow(llada, ids, **{"gen_length": 10, **options})


@pytest.mark.parametrize("patched", [False, True], ids=["eager", "patched"])
def test_logits_that_are_nan_are_an_error(ids, patched):
    model = make_llada()
    if patched:
        dllm_fast.patch(model)
    with torch.no_grad():
        model.model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits at step 0 are NaN or infinite"):
        dllm_fast.generate_flow(model, ids, gen_length=4, steps=3)
