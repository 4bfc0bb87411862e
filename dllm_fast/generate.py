"""`generate` and `generate_many`: check the arguments, make rows of the prompts, run them in a `Server`."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from dllm_fast.decoding.drafts import DraftGraph
from dllm_fast.decoding.options import OPTIONS, Options
from dllm_fast.decoding.pipeline import Pipeline
from dllm_fast.decoding.record import GIVEN
from dllm_fast.decoding.refresh import Refresh
from dllm_fast.decoding.remask import Remask
from dllm_fast.decoding.request import check_batch, check_suffix, check_token_types, plan_row
from dllm_fast.decoding.schedules import Schedule, Threshold
from dllm_fast.decoding.server import Server
from dllm_fast.decoding.values import require, whole
from dllm_fast.families.bypass import unwrapped
from dllm_fast.patch import bound_family, bound_pool


@dataclass
class Output:
    """What `generate` returns.

    sequences: [B, P + gen_length] int64, the prompts as they were given, then the answers.
    nfe: forwards of the row that takes most; guidance takes two a step.
    nfe_full, nfe_block: that row's over the whole sequence, and over a part of it against a cache.
    positions: token positions that the forwards went over, guidance's second pass included: what a refresh policy
        saves. A row counts as if it were alone: no padding, and nothing while it waits for its neighbours.
    row_nfe: the forwards of each row, [B]: those that it takes alone.
    steps: the schedule's steps of the row that takes most forwards.
    states: settings of a block's tokens that these forwards evaluated: one a step, and more with ``speculate``.
    row_tokens: the tokens that each row was given, [B]: up to the end of its text, and that included.
    logprobs: with ``logprobs=True``, of each token of ``sequences`` its log-probability at the step that committed it,
        [B, P + gen_length] fp32; 0 where a token was given, or stands after the end of the text.
    order: with ``logprobs=True``, which step that was, [B, P + gen_length] int64: steps of a row whose tokens are in
        ``sequences`` are counted from 0, block after block; -1 where ``logprobs`` is 0 for want of a step.
    """

    sequences: torch.Tensor
    nfe: int
    nfe_full: int
    nfe_block: int
    positions: int
    row_nfe: list[int]
    steps: int
    states: int
    row_tokens: list[int]
    logprobs: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def tokens_per_forward(self) -> float:
        """The tokens that all rows were given over the forwards that they take, each row's as if it were alone: the
        sum of ``row_tokens`` over that of ``row_nfe``."""
        return sum(self.row_tokens) / max(1, sum(self.row_nfe))


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, P] int64
    attention_mask: torch.Tensor | None = None,  # [B, P], 0 = padding, on either side
    gen_length: int = 128,
    block_length: int | None = None,
    schedule: Schedule = Threshold(0.9),
    confidence: str = "probability",
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    cache: str = "dual",
    refresh: str | Refresh = "block",
    remask: Remask | None = None,
    suffix_length: int | None = None,
    suffix_sample: int = 0,
    skip_committed: bool = False,
    speculate: int | str | DraftGraph | None = None,
    cache_dtype: str | None = None,
    pipeline: Pipeline | None = None,
    logprobs: bool = False,
    top_k: int | None = None,
    top_p: float = 1.0,
    mask_id: int | None = None,
    eos_id: int | list[int] | tuple[int, ...] | None = None,
    seed: int | None = None,
    streamer=None,
    pad_id: int | None = None,
    suppress_tokens: int | list[int] | tuple[int, ...] | None = None,
    defer_tokens: int | list[int] | tuple[int, ...] | None = None,
    token_type_ids: torch.Tensor | None = None,
) -> Output:
    """Fill ``gen_length`` [MASK]s after each prompt, and any [MASK] inside the prompts, block by block.

    Args:
        model: a patched model with an LM head. Training mode plays no part where the forward is this package's, which
            has no dropout; a model that runs its own (`families.generic`) must be in eval mode.
        input_ids: prompts; with ``gen_length=0`` only their own [MASK]s are filled.
        attention_mask: 0 on padding; each row's ones are contiguous.
        block_length: positions that are filled together; divides ``gen_length``. None: 32, or a block-causal model's
            own, beside which it may have no other. There any ``gen_length`` will do: the last block is filled up.
        schedule: how many candidates a step commits: `Uniform`, `Pyramid`, `Static`, `Sequential`, `Threshold`,
            `Dynamic`, `Factor`, `EntropyBound`, `FirstHitting`, `Ancestral`.
        confidence: which are committed first: ``"probability"``, ``"margin"``, ``"entropy"`` (negative), ``"random"``.
            The last three schedules have one of their own, and `Sequential` none.
        temperature: tokens are ``argmax(logits + temperature * Gumbel)``; 0 is greedy.
        cfg_scale: ``logits = uncond + (cfg_scale + 1) * (cond - uncond)``, uncond with its prompt masked.
        cache: ``"none"``: every step is a forward of the whole sequence. ``"dual"``: a block's first step is, and
            stores all keys and values; the others run the block against them. ``"prefix"``: the others run the block
            and all that follows it. A block-causal model has a cache that is exact, under the name of ``"dual"``.
        refresh: when stale keys and values are computed again: ``"block"``, at each block's first step; or `Every`,
            `Window`, `Drift`.
        remask: which committed tokens of the current block are masked again: `ReMDM`, `Verify`, `P2`; or replaced,
            `Edit`; None: none.
        suffix_length: evaluate and see only so many positions after the live block (DPad, arXiv:2508.14148); None: all.
            Text that is given further on is not seen either.
        suffix_sample: besides, so many of the positions further on, drawn for each block from the seed: one twice as
            far away half as likely. Needs a cache, and a model all of whose layers see all slots.
        skip_committed: evaluate a position of the block once more when it has its token, and then no longer: its keys
            and values stay in the cache until the next refresh (dKV-Cache, arXiv:2505.15781). A ``remask`` sees its
            probability as it was then. Needs a cache.
        speculate: how many states to draft beside the one that the schedule has reached, or a `DraftGraph` of them. All
            are evaluated in one forward, and the schedule takes as many steps as they foresee. The tokens are the same;
            a forward that is bound by reading weights takes little longer. A number takes as many drafts, at each step
            the likeliest of the graph that `calibrate` has left in the model's folder for this schedule, else a chain,
            or under thresholds and the like sets by falling confidence.
            ``"auto"``: of up to 7 as many as pay, by the time that forwards take on this device and by how far they
            get; on a CPU none. A ``.json`` file that ``dllm-fast calibrate`` wrote elsewhere: 7 of its graph for this
            schedule. None: no drafts. Not with ``skip_committed``.
        cache_dtype: what the cache keeps keys and values in. None: the model's dtype. ``"e4m3"``: 8 bits, rounded to
            nearest, without a scale, saturated at +-448; every forward attends to the rounded ones. A cache then has
            half the bytes of bf16's. Triton's kernels need a GPU of compute capability 8.9.
        pipeline: decode several blocks of the answer at once, the next ones while the first ends: `D2F`, `MultiBlock`;
            None: one after the other. Needs `Threshold` and prompts without [MASK]s. With the cache ``"dual"`` a row's
            step is a forward of its whole sequence after it has filled its first live block; ``"prefix"`` is only for
            `MultiBlock`. Not with ``refresh``, ``remask``, ``suffix_length``, ``skip_committed`` and ``speculate``, nor
            for a model whose head predicts the next position.
        logprobs: also return each token's log-probability when it was committed, and the order in which tokens were; of
            one that was masked again, when it was committed last. It is that of the softmax that the confidence comes
            from: of the logits without noise, so at temperature 1 whatever the ``temperature``; with guidance; over all
            tokens, [MASK] included, but ``suppress_tokens``. ``defer_tokens`` count.
        top_k: draw a token from so many of the most probable ones (arXiv:1805.04833). None or 0: from all. It has no
            effect at temperature 0, and none on confidences. Not for a model that several processes share.
        top_p: draw it from the fewest of the most probable ones, or of those of ``top_k``, whose probabilities at the
            temperature reach ``top_p`` (arXiv:1904.09751): above 0, and up to 1, which is all. Otherwise as ``top_k``.
        mask_id: default ``model.config.mask_token_id``.
        eos_id: an id, or several: when a finished block holds one of them, the row is done, and every position
            to be filled after the first becomes ``pad_id``. None: every position is generated, as LLaDA's
            published sampler does.
        seed: of the noise, a pure function of (seed, step of the block, row, position, token id). None draws one from
            torch's global generator.
        streamer: a transformers ``TextStreamer`` (or anything with ``put`` and ``end``), batch 1: whole blocks, in
            order. If it has ``put_draft``, it also gets the current block after each step.
        pad_id: what stands after the end of the text; None: the id of ``eos_id`` that ended it, again.
        suppress_tokens: an id, or several, whose logits are -inf: never chosen, and no part of the softmax. LLaDA's
            ``logits_eos_inf`` is ``[126081]``.
        defer_tokens: an id, or several, that are held back. They are chosen as ever; then their logits are -inf in the
            softmax that the confidence comes from, and a position that one was chosen for has confidence -inf: it is
            kept when no other is left. LLaDA's ``confidence_eos_eot_inf`` is ``[126081, 126348]``. To a ``remask``
            they are tokens like others once they are kept.
        token_type_ids: [B, P], all 0, as some tokenizers return beside the ids. No family here has token types.

    Returns:
        `Output`.

    Raises:
        ValueError: an argument that does not fit; it names the argument and the value, and nothing has run. Or logits
            are NaN or infinite, while it runs; it names the step.
        MemoryError: the batch does not fit what memory the device has left; nothing has run.
    """
    given = {name: value for name, value in locals().items() if name in OPTIONS}  # each under its own name
    family, model = bound_family(model), unwrapped(model)
    if family.ranks is not None:
        family.ranks.require_same(given, input_ids, attention_mask, token_type_ids)
    check_token_types(token_type_ids)
    options = Options.of_call("generate", given, family.block).resolved(model, family)
    return fill(model, family, bound_pool(model), input_ids, attention_mask, options, streamer)


def fill(model, family, pool, input_ids, attention_mask, options: Options, streamer=None) -> Output:
    """`generate`, its ``options`` resolved."""
    start, end = check_batch(input_ids, attention_mask, family.head()[0].device)
    batch, prompt = input_ids.shape
    require(streamer is None or batch == 1, f"streamer: takes one row, and input_ids has {batch}")
    host = input_ids.cpu()
    rows = [plan_row(options, family, b, host[b, start[b] : end[b]]) for b in range(batch)]
    if family.block is None:
        check_suffix(options, rows)
    require(any(row.blocks for row in rows), "gen_length=0 and no [MASK] in input_ids: there is nothing to fill")
    sequences = torch.cat((host, host.new_zeros(batch, options.gen_length)), 1)
    results = [sequences]
    if options.logprobs:
        results += [torch.zeros_like(sequences, dtype=torch.float32), torch.full_like(sequences, GIVEN)]
    for row in Server(model, family, pool, options, rows, batch, streamer).serve():
        length = end[row.index] - start[row.index]
        for result, own in zip(results, row.results(), strict=True):
            result[row.index, start[row.index] : end[row.index]] = own[:length]
            result[row.index, prompt:] = own[length : row.length]
    longest = max((row.counts for row in rows), key=lambda counts: counts.nfe)
    positions = round(sum(row.counts.positions for row in rows))
    sequences, *more = (result.to(input_ids.device) for result in results)
    return Output(
        sequences, longest.nfe, longest.full, longest.block, positions, [row.counts.nfe for row in rows],
        longest.steps, longest.states, [row.tokens for row in rows], *more,
    )  # fmt: skip


@dataclass
class Completion:
    """One prompt of `generate_many`.

    index: its number among the prompts, in the order they were handed in.
    sequence: prompt and answer, [L] int64 on the host.
    nfe, steps, states: those that `generate` takes for it alone, see `Output`.
    tokens: that it was given, up to the end of its text and that included.
    logprobs, order: with ``logprobs=True``, of ``sequence``, as `Output`'s are: [L] fp32 and [L] int64 on the host.
    """

    index: int
    sequence: torch.Tensor
    nfe: int
    steps: int
    states: int
    tokens: int
    logprobs: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def tokens_per_forward(self) -> float:
        """``tokens`` over ``nfe``; 0 where there was nothing to fill."""
        return self.tokens / max(1, self.nfe)


def generate_many(
    model: torch.nn.Module,
    prompts: Iterable[torch.Tensor | list[int]],
    batch_size: int | str = 8,
    ordered: bool = True,
    progress: bool | Callable[[int, int], None] = False,
    noise_rows: Iterable[int] | None = None,
    **options,
) -> Iterator[Completion]:
    """`generate` for any number of prompts of any lengths, ``batch_size`` at a time; an iterator of `Completion`.

    Rows finish on their own: one that is done leaves the batch at the end of its block, and a waiting prompt, longest
    first, takes its seat. A prompt's tokens are those that `generate` gives it as the row of a batch with the number of
    its noise row.

    Args:
        model: as `generate`.
        prompts: ids [P] each, int64 tensors or lists.
        batch_size: rows evaluated together. ``"auto"``: as many as fit into nine tenths of the free memory, up to 256.
            If that turns out to be too many, half of them go on, with a warning and the same tokens.
        ordered: yield in the prompts' order; else as they are completed.
        progress: True shows a bar (tqdm); a callable is given (done, total).
        noise_rows: a number from 0 to 2^32 - 1 for each prompt: the row that its noise is a function of, beside the
            seed, the step and the position. None: its number among the prompts. Where anything is drawn, fixed ones
            keep a prompt's tokens whatever prompts are handed in with it, and two alike draw alike.
        options: `generate`'s, but for ``attention_mask``, ``token_type_ids`` and ``streamer``.

    Raises:
        ValueError, MemoryError: as `generate`, when called, before the first prompt runs; for NaN logits, as it runs.
    """
    family, model = bound_family(model), unwrapped(model)
    prompts = list(prompts)
    noise_rows = range(len(prompts)) if noise_rows is None else list(noise_rows)
    if family.ranks is not None:
        family.ranks.require_same(options, batch_size, prompts, noise_rows)
    asked = Options.of_call("generate_many", options, family.block).resolved(model, family)
    seats = None if batch_size == "auto" else whole("batch_size", batch_size)
    require(len(noise_rows) == len(prompts), f"noise_rows: {len(noise_rows)} for {len(prompts)} prompts")
    noise_rows = [whole(f"noise_rows[{index}]", row, 0, 32) for index, row in enumerate(noise_rows)]
    numbered = enumerate(zip(prompts, noise_rows, strict=True))
    rows = [plan_row(asked, family, n, prompt, f"prompts[{n}]", noise) for n, (prompt, noise) in numbered]
    if family.block is None:
        check_suffix(asked, rows)
    server = Server(model, family, bound_pool(model), asked, rows, seats)
    return _completions(server, len(rows), ordered, progress)


def _completions(server, total: int, ordered: bool, progress) -> Iterator[Completion]:
    with contextlib.ExitStack() as stack:
        if progress is True:
            from tqdm.auto import tqdm

            bar = stack.enter_context(tqdm(total=total, unit="prompt"))
            progress = lambda done, total: bar.update(1)  # noqa: E731
        kept, expected = {}, 0
        for done, row in enumerate(server.serve(), 1):
            if progress:
                progress(done, total)
            ids, *more = (own[: row.length] for own in row.results())
            counts = row.counts
            kept[row.index] = Completion(row.index, ids, counts.nfe, counts.steps, counts.states, row.tokens, *more)
            while ordered and expected in kept:
                yield kept.pop(expected)
                expected += 1
            if not ordered:
                yield kept.pop(row.index)
