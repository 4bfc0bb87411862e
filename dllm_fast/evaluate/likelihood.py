"""How likely an answer is: Monte Carlo bounds of ``ln p(answer | prompt)``, and a check for greedy answers.

A masked-diffusion model has no cheap exact likelihood. For an answer x of L ids, LLaDA estimates this bound
(arXiv:2502.09992, eq. 6):

    ln p(x | prompt) >= E_l E_S [ (L / l) * sum over i in S of ln p(x_i | prompt, x without S) ],

with l uniform over 1 to L, and S a uniformly drawn set of l positions. The same bound over time (MDLM, arXiv:
2406.07524) masks each position by itself with probability t and weighs the sum with 1 / t, t uniform over 0 to 1; it
varies more. A sample is one S and costs one forward (two with guidance). The last hidden states and logits are computed
at masked positions only, `ops.CHUNK` rows of logits at a time.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import mean, stdev

import torch

from dllm_fast import ops
from dllm_fast.decoding.device import as_written
from dllm_fast.decoding.request import as_prompt, check_vocabulary
from dllm_fast.decoding.values import finite, is_whole, one_of, require, whole
from dllm_fast.kernels import reference
from dllm_fast.patch import bound_family, bound_pool

Ids = torch.Tensor | list[int]
ESTIMATORS = ("count", "time")


@dataclass(frozen=True)
class Bound:
    """An estimate of the bound of ``ln p(answer | prompt)``, in nats.

    value: the estimate; standard_error: its own, from independent replicates, NaN if the model gives a token
    probability 0. perplexity: ``exp(-value / tokens)``, an upper bound of the answer's; its standard error is
    ``perplexity * standard_error / tokens``.
    """

    value: float
    standard_error: float
    tokens: int

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(-self.value / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def perplexity_error(self) -> float:
        return self.perplexity * self.standard_error / self.tokens


def log_likelihood(
    model: torch.nn.Module,
    prompt_ids: Ids,  # [P] int64, P >= 0
    answer_ids: Ids,  # [L] int64
    samples: int = 128,
    seed: int | None = None,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
) -> float:
    """`log_likelihoods` of one pair: an unbiased estimate of the bound of ``ln p(answer | prompt)``, in nats."""
    (value,) = log_likelihoods(model, [(prompt_ids, answer_ids)], samples, seed, batch_size, cfg_scale)
    return value


def log_likelihoods(
    model: torch.nn.Module,
    pairs: Iterable[tuple[Ids, Ids]],
    samples: int = 128,
    seed: int | None = None,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
) -> Iterator[float]:
    """Unbiased estimates of the bound of ``ln p(answer | prompt)``, in nats: an iterator of floats, in order.

    The masks come from `draw_masks`, and give far less noise than independent masks. A mask that is drawn twice is run
    once, so an answer of one id costs one forward, whatever ``samples``, and is exact. Neighbouring pairs share
    batches: pairs sorted by length waste less on padding.

    Args:
        model: a patched model that generates.
        pairs: (prompt [P], answer [L]) ids, int64 tensors or lists; the prompt may be empty.
        samples: masks per pair. LLaDA uses 128, or 1 for answers of a single token.
        seed: a pair's masks depend on seed, prompt and L alone. So two answers of the same length to the same prompt,
            whose likelihoods will be compared, get the same masks. None draws a seed from torch's global generator.
        batch_size: masked sequences per forward.
        cfg_scale: guidance, as in `dllm_fast.generate`.

    Raises:
        ValueError: an argument is wrong: the message names it and its value, and nothing has run. Or, while iterating,
            logits are NaN or infinite: the message names the pair.
    """
    samples = whole("samples", samples)
    scorer = _Scorer(model, pairs, batch_size, cfg_scale)
    return (value for (value,) in scorer.bounds([_Design(samples, _seed(seed))]))


def likelihood_bounds(
    model: torch.nn.Module,
    pairs: Iterable[tuple[Ids, Ids]],
    samples: int = 128,
    seed: int | None = None,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
    estimator: str = "count",
    replicates: int = 8,
) -> Iterator[Bound]:
    """The bound of each pair with its standard error: an iterator of `Bound`, in order.

    The masks of one estimate depend on each other, which lowers its variance, so they do not tell its error. The
    samples are therefore divided among ``replicates`` independent estimates: the bound is their mean, and its error
    comes from how they differ.

    Args:
        samples: masks per pair in all, a multiple of ``replicates``.
        estimator: "count" for a uniform number of masks, "time" for masks of probability t.
        replicates: at least 2. Fewer vary less, and tell their error less precisely.
        Others: see `log_likelihoods`, whose errors this raises.
    """
    samples, replicates = whole("samples", samples), whole("replicates", replicates)
    one_of("estimator", estimator, ESTIMATORS)
    require(replicates >= 2, f"replicates={replicates} tells no error; at least 2")
    require(samples % replicates == 0, f"samples={samples} is not a multiple of replicates={replicates}")
    seed = _seed(seed)
    designs = [_Design(samples // replicates, seed, estimator, number) for number in range(replicates)]
    scorer = _Scorer(model, pairs, batch_size, cfg_scale)
    return (_bound(values, pair.length) for pair, values in zip(scorer.pairs, scorer.bounds(designs)))


def _bound(values: list[float], tokens: int) -> Bound:
    if not all(map(math.isfinite, values)):  # `stdev` takes no infinities
        return Bound(sum(values), math.nan, tokens)
    return Bound(mean(values), stdev(values) / math.sqrt(len(values)), tokens)


def _seed(seed: int | None) -> int:
    require(seed is None or is_whole(seed), f"seed={seed!r} is not a whole number")
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")) if seed is None else int(seed)


def are_greedy(
    model: torch.nn.Module, pairs: Iterable[tuple[Ids, Ids]], batch_size: int = 32, cfg_scale: float = 0.0
) -> Iterator[bool]:
    """Whether each answer is the one that greedy decoding gives for its prompt: an iterator of bools, in order.

    Greedy decoding is that of LLaDA's evaluation code: all L positions start masked, and each step commits the most
    probable token of the most confident position. `dllm_fast.generate` gives the same answer with ``gen_length=L,
    block_length=L, schedule=Uniform(L), cache="none"``. Checking a pair stops at the first token that differs.

    Takes the arguments of `log_likelihoods` and raises its errors.
    """
    return _Scorer(model, pairs, batch_size, cfg_scale).greedy()


def draw_masks(length: int, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Sets of positions, [samples, length] bool. Averaging any function over them estimates ``E_l E_S`` without bias.

    Two things reduce the variance. The set sizes l are antithetic pairs (l, ``length + 1 - l``) on an evenly spaced
    grid with one random shift (arXiv:2107.00630, appendix I, for the grid). And the sets are dealt, the smallest first,
    from a shuffled deck of the positions, which is shuffled again when too few are left for the next set. So sets of
    similar size cover the answer evenly. With independent sets, chance would decide which tokens are masked in the
    small ones, and this is most of the variance.
    """
    half = samples // 2
    shift = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
    low = 1 + ((torch.arange(half, device="cpu") + shift) / max(half, 1) * length).long().clamp(max=length - 1)
    odd = torch.randint(1, length + 1, (samples % 2,), generator=generator, device="cpu")
    counts = torch.cat((low, length + 1 - low, odd)).sort().values
    masks = torch.zeros(samples, length, dtype=torch.bool, device="cpu")
    deck = torch.empty(0, dtype=torch.int64, device="cpu")  # the positions that are left of it
    for mask, count in zip(masks, counts.tolist()):
        if count > len(deck):
            deck = torch.randperm(length, generator=generator, device="cpu")
        mask[deck[:count]] = True
        deck = deck[count:]
    return masks


def draw_times(length: int, samples: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Times t [samples] fp64, and sets of positions [samples, length] bool, each position masked with probability t.

    The times are evenly spaced with one random shift, as in `draw_masks`.
    """
    shift = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
    t = (torch.arange(samples, device="cpu") + shift) / samples
    draw = torch.rand(samples, length, generator=generator, dtype=torch.float64, device="cpu")
    return t, draw < t[:, None]


@dataclass(frozen=True)
class _Design:
    """The masks of one estimate."""

    samples: int
    seed: int
    estimator: str = "count"
    replicate: int = 0


@dataclass(frozen=True)
class _Pair:
    ids: torch.Tensor  # [P + L] int64, on the host
    prompt: int  # P

    @property
    def length(self) -> int:
        return len(self.ids) - self.prompt

    def weighted_masks(self, design: _Design) -> Iterator[tuple[torch.Tensor, float]]:
        """Each distinct mask [L] of the pair, and the weight of its summed log-probabilities in the estimate.

        Masks of nothing are left out: their sum is 0.
        """
        key = f"{design.seed} {self.ids[: self.prompt].tolist()}"
        if design.replicate or design.estimator != "count":
            key += f" {design.estimator} {design.replicate}"
        digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big"))
        if design.estimator == "time":
            t, masks = draw_times(self.length, design.samples, generator)
            yield from ((mask, float(1 / t_ / design.samples)) for t_, mask in zip(t, masks) if mask.any())
            return
        masks, times = torch.unique(draw_masks(self.length, design.samples, generator), dim=0, return_counts=True)
        weights = times.double() / design.samples * self.length / masks.sum(1)
        yield from zip(masks, weights.tolist())


class _Scorer:
    """Runs masked copies of pairs through the model, a batch at a time."""

    def __init__(self, model, pairs: Iterable[tuple[Ids, Ids]], batch_size: int, cfg_scale: float):
        self.family = bound_family(model)
        require(
            self.family.block is None, "model: it is block-causal, and likelihoods are those of bidirectional models"
        )
        require(self.family.ranks is None, "model: processes share it, and likelihoods are those of a whole one")
        self.lock = bound_pool(model).lock
        mask_id = getattr(self.family.model.config, "mask_token_id", None)
        if mask_id is None:
            raise ValueError("model.config has no mask_token_id")
        self.mask_id: int = mask_id
        self.device = self.family.head()[0].device
        self.batch_size = whole("batch_size", batch_size)
        self.cfg_scale = finite("cfg_scale", cfg_scale)
        self.pairs = [self._pair(f"pairs[{i}]", *pair) for i, pair in enumerate(pairs)]

    def _pair(self, name: str, prompt: Ids, answer: Ids) -> _Pair:
        prompt, answer = as_prompt(name, prompt), as_prompt(name, answer)
        require(len(answer) > 0, f"{name}: an empty answer")
        ids = torch.cat((prompt, answer))
        check_vocabulary(name, ids, self.family)
        limit = self.family.positions
        require(len(ids) <= limit, f"{name}: {len(ids)} ids exceed the model's {limit} positions")
        return _Pair(ids, len(prompt))

    def bounds(self, designs: list[_Design]) -> Iterator[list[float]]:
        """Each pair's estimate by every design."""
        rows = (
            (index, number, mask, weight)
            for index, pair in enumerate(self.pairs)
            for number, design in enumerate(designs)
            for mask, weight in pair.weighted_masks(design)
        )
        total = [[0.0] * len(designs) for _ in self.pairs]
        done = 0
        for batch in _batches(rows, self.batch_size):
            indices, numbers, masks, weights = zip(*batch)
            sums = self._log_probability([self.pairs[i] for i in indices], masks)
            for index, number, weight, value in zip(indices, numbers, weights, sums):
                require(value == value, f"model: logits are NaN or infinite for pairs[{index}]")
                total[index][number] += weight * value
            yield from total[done : indices[-1]]  # the last pair's masks may go on in the next batch
            done = indices[-1]
        yield from total[done:]

    def greedy(self) -> Iterator[bool]:
        for batch in _batches(enumerate(self.pairs), self.batch_size):
            indices, pairs = zip(*batch)
            masks = [torch.ones(pair.length, dtype=torch.bool, device="cpu") for pair in pairs]
            remaining = list(range(len(pairs)))
            wrong: set[int] = set()
            while remaining:
                best = self._most_confident([pairs[i] for i in remaining], [masks[i] for i in remaining])
                for i, (position, token) in zip(remaining, best):
                    require(position >= 0, f"model: logits are NaN or infinite for pairs[{indices[i]}]")
                    masks[i][position - pairs[i].prompt] = False
                    if token != int(pairs[i].ids[position]):
                        wrong.add(i)
                remaining = [i for i in remaining if i not in wrong and bool(masks[i].any())]
            yield from (i not in wrong for i in range(len(pairs)))

    def _log_probability(self, pairs, masks) -> list[float]:
        """Each pair's sum of ln p over its masked positions."""
        with torch.no_grad(), as_written(self.device), self.lock:
            ids, masked, hidden, uncond = self._hidden(pairs, masks)
            target = ids[masked]  # [N]
            row = masked.nonzero()[:, 0]
            sums = torch.zeros(len(pairs), dtype=torch.float64, device=self.device)
            for i in range(0, len(target), ops.CHUNK):
                part = slice(i, i + ops.CHUNK)
                logits = self._logits(hidden[part])  # [CHUNK, V]
                if uncond is not None:
                    base = self._logits(uncond[part])
                    logits = reference.guided(logits, base, self.cfg_scale)
                lse = logits.logsumexp(1)
                # NaN if a row's logits are NaN or infinite, so that `bounds` sees it; -inf for probability 0.
                logp = logits.gather(1, target[part, None])[:, 0] - lse.where(lse.isfinite(), float("nan"))
                sums.index_add_(0, row[part], logp.double())
            return sums.tolist()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = ops.logits(hidden, *self.family.head_operands(), impl=self.family.impl)
        return reference.capped(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.family.softcap)

    def _most_confident(self, pairs, masks) -> list[tuple[int, int]]:
        """Each pair's most confident masked position and its token; position -1 if a logit is NaN or infinite."""
        with torch.no_grad(), as_written(self.device), self.lock:
            _, masked, hidden, uncond = self._hidden(pairs, masks)
            token, confidence, lse = ops.predict(
                hidden, *self.family.head_operands(), mask_id=self.mask_id, uncond=uncond, cfg_scale=self.cfg_scale,
                softcap=self.family.softcap, impl=self.family.impl,
            )  # fmt: skip
            confidences = torch.full(masked.shape, float("-inf"), dtype=confidence.dtype, device=self.device)
            confidences[masked] = confidence
            tokens = torch.zeros(masked.shape, dtype=torch.int64, device=self.device)
            tokens[masked] = token
            invalid = torch.zeros_like(masked)
            invalid[masked] = ~lse.isfinite()
            position = confidences.argmax(1, keepdim=True)
            token = tokens.gather(1, position)
            return torch.cat((position.masked_fill(invalid.any(1, keepdim=True), -1), token), 1).tolist()

    def _hidden(self, pairs: list[_Pair], masks: list[torch.Tensor]) -> tuple:
        """(ids [B, T], masked [B, T] bool, hidden [N, d], uncond [N, d]) of clean rows, padded at their ends.

        ``hidden`` are the last hidden states at the masked positions, the LM head's input; ``uncond`` are those of a
        forward whose prompts are masked too, or None without guidance.
        """
        lengths = [len(pair.ids) for pair in pairs]
        ids = torch.zeros(len(pairs), max(lengths), dtype=torch.int64, device="cpu")
        masked = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
        in_prompt = torch.zeros(ids.shape, dtype=torch.bool, device="cpu")
        for row, (pair, mask) in enumerate(zip(pairs, masks)):
            ids[row, : len(pair.ids)] = pair.ids
            in_prompt[row, : pair.prompt] = True
            masked[row, pair.prompt : len(pair.ids)] = mask
        ids, masked, in_prompt = ids.to(self.device), masked.to(self.device), in_prompt.to(self.device)
        start = end = None
        if min(lengths) < max(lengths):
            end = torch.tensor(lengths, dtype=torch.int64, device=self.device)
            start = torch.zeros_like(end)
        noisy = ids.masked_fill(masked, self.mask_id)
        hidden = self.family.hidden(noisy, start, end, rows=masked)
        uncond = None
        if self.cfg_scale > 0:
            uncond = self.family.hidden(noisy.masked_fill(in_prompt, self.mask_id), start, end, rows=masked)
        return ids, masked, hidden, uncond


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
