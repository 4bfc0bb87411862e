"""How likely a model finds an answer: Monte Carlo bounds of ``ln p(answer | prompt)``, and the greedy check.

A masked-diffusion model has no cheap exact likelihood, but LLaDA's bound for an answer x of L ids (arXiv:2502.09992,
eq. 6):

    ln p(x | prompt) >= E_l E_S [ (L / l) * sum over i in S of ln p(x_i | prompt, x without S) ],

l uniform over 1 to L, S a uniform set of l positions. A sample is one S, and costs a model evaluation (guidance: two).
Hidden states and logits are computed at masked positions alone, `ops.CHUNK` rows of logits at a time.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from dllm_fast import ops
from dllm_fast.decoding.device import as_written
from dllm_fast.decoding.request import require
from dllm_fast.families.bypass import unwrapped
from dllm_fast.patch import bound_family, bound_pool

Ids = torch.Tensor | list[int]


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

    The masks are those of `draw_masks`: far less noisy than independent ones. A mask that was drawn twice is evaluated
    once, so an answer of one id costs one evaluation, whatever ``samples``, and is exact. Neighbours share batches:
    pairs sorted by length waste less on padding.

    Args:
        model: a patched LLaDA or ModernBERT.
        pairs: (prompt [P], answer [L]) ids, int64 tensors or lists; the prompt may be empty.
        samples: masks a pair. LLaDA takes 128, and 1 where answers are single tokens.
        seed: a pair's masks are a function of seed, prompt and L alone, whatever its neighbours; answers of one length
            to one prompt, whose likelihoods will be compared, get the same. None draws one from torch's global
            generator.
        batch_size: masked sequences evaluated together.
        cfg_scale: guidance, as in `dllm_fast.generate`.

    Raises:
        ValueError: an argument that does not fit; it names the argument and the value, and nothing has run. Or logits
            are NaN or infinite, while it runs; it names the pair.
    """
    require(_whole(samples) and samples >= 1, f"samples={samples!r} is not a positive whole number")
    require(seed is None or _whole(seed), f"seed={seed!r} is not a whole number")
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")) if seed is None else seed
    return _Scorer(model, pairs, batch_size, cfg_scale).bounds(samples, seed)


def are_greedy(
    model: torch.nn.Module, pairs: Iterable[tuple[Ids, Ids]], batch_size: int = 32, cfg_scale: float = 0.0
) -> Iterator[bool]:
    """Whether each answer is what greedy decoding makes of its prompt: an iterator of bools, in order.

    Greedy decoding is that of LLaDA's evaluation code: all L positions open, at each step the most probable token of
    the most confident position is kept. So the answer is that of `dllm_fast.generate` with ``gen_length=L,
    block_length=L, schedule=Uniform(L), cache="none"``. A pair stops at the first token that is not the answer's.

    Arguments and errors are those of `log_likelihoods`.
    """
    return _Scorer(model, pairs, batch_size, cfg_scale).greedy()


def draw_masks(length: int, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Sets of positions, [samples, length] bool: their mean is an unbiased estimate of `E_l E_S`, whatever is averaged.

    Counts come in antithetic pairs l and ``length + 1 - l``, from a grid of one random shift (arXiv:2107.00630,
    appendix I, for the grid). The sets of these counts are dealt, the smallest first, from a deck of the positions that
    is shuffled when it cannot serve the next: sets of like counts then cover the answer evenly, where independent ones
    would leave to chance which tokens are asked for when few are masked, most of the variance.
    """
    half = samples // 2
    shift = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
    low = 1 + ((torch.arange(half, device="cpu") + shift) / max(half, 1) * length).long().clamp(max=length - 1)
    odd = torch.randint(1, length + 1, (samples % 2,), generator=generator, device="cpu")
    counts = torch.cat((low, length + 1 - low, odd)).sort().values
    masks, dealt, deck = torch.zeros(samples, length, dtype=torch.bool, device="cpu"), length, None
    for mask, count in zip(masks, counts.tolist()):
        if dealt + count > length:
            deck, dealt = torch.randperm(length, generator=generator, device="cpu"), 0
        mask[deck[dealt : dealt + count]] = True
        dealt += count
    return masks


@dataclass(frozen=True)
class _Pair:
    ids: torch.Tensor  # [P + L] int64, on the host
    prompt: int  # P

    @property
    def length(self) -> int:
        return len(self.ids) - self.prompt

    def weighted_masks(self, samples: int, seed: int) -> Iterator[tuple[torch.Tensor, float]]:
        """Each distinct mask [L] of the pair's, and what the sum of its log-probabilities counts for."""
        key = f"{seed} {self.ids[: self.prompt].tolist()}".encode()
        digest = hashlib.blake2b(key, digest_size=7).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big"))
        masks, times = torch.unique(draw_masks(self.length, samples, generator), dim=0, return_counts=True)
        weights = times.double() / samples * self.length / masks.sum(1)
        yield from zip(masks, weights.tolist())


class _Scorer:
    """Evaluates masked copies of pairs, a batch at a time."""

    def __init__(self, model, pairs: Iterable[tuple[Ids, Ids]], batch_size: int, cfg_scale: float):
        self.family, self.lock = bound_family(model), bound_pool(model).lock
        self.mask_id = unwrapped(model).config.mask_token_id
        self.device = self.family.head()[0].device
        require(self.mask_id is not None, "model.config has no mask_token_id")
        require(_whole(batch_size) and batch_size >= 1, f"batch_size={batch_size!r} is not a positive whole number")
        good = isinstance(cfg_scale, int | float) and 0 <= cfg_scale < float("inf")
        require(good, f"cfg_scale={cfg_scale!r} is not a finite number from 0 up")
        self.batch_size, self.cfg_scale = batch_size, cfg_scale
        self.pairs = [self._pair(f"pairs[{i}]", *pair) for i, pair in enumerate(pairs)]

    def _pair(self, name: str, prompt: Ids, answer: Ids) -> _Pair:
        prompt, answer = (torch.as_tensor(ids, device="cpu") for ids in (prompt, answer))
        for ids in (prompt, answer):
            require(ids.dim() == 1, f"{name}: ids of shape {tuple(ids.shape)} are not a row")
            require(len(ids) == 0 or ids.dtype == torch.int64, f"{name}: dtype {ids.dtype} is not torch.int64")
        require(len(answer) > 0, f"{name}: an empty answer")
        ids = torch.cat((prompt.long(), answer))
        family, low, high = self.family, int(ids.min()), int(ids.max())
        good, bad = low >= 0 and high < family.vocab_size, low if low < 0 else high
        require(good, f"{name}: id {bad} is outside the vocabulary of {family.vocab_size}")
        require(len(ids) <= family.positions, f"{name}: {len(ids)} ids exceed the model's {family.positions} positions")
        return _Pair(ids, len(prompt))

    def bounds(self, samples: int, seed: int) -> Iterator[float]:
        rows = (
            (index, mask, weight)
            for index, pair in enumerate(self.pairs)
            for mask, weight in pair.weighted_masks(samples, seed)
        )
        total, done = [0.0] * len(self.pairs), 0
        for batch in _batches(rows, self.batch_size):
            indices, masks, weights = zip(*batch)
            sums = self._log_probability([self.pairs[i] for i in indices], masks)
            for index, weight, value in zip(indices, weights, sums):
                require(value == value, f"model: logits are NaN or infinite for pairs[{index}]")
                total[index] += weight * value
            yield from total[done : indices[-1]]  # the last pair's masks may go on in the next batch
            done = indices[-1]
        yield from total[done:]

    def greedy(self) -> Iterator[bool]:
        for batch in _batches(enumerate(self.pairs), self.batch_size):
            indices, pairs = zip(*batch)
            masks = [torch.ones(pair.length, dtype=torch.bool, device="cpu") for pair in pairs]
            live, wrong = list(range(len(pairs))), set()
            while live:
                best = self._most_confident([pairs[i] for i in live], [masks[i] for i in live])
                for i, (position, token) in zip(live, best):
                    require(position >= 0, f"model: logits are NaN or infinite for pairs[{indices[i]}]")
                    masks[i][position - pairs[i].prompt] = False
                    if token != int(pairs[i].ids[position]):
                        wrong.add(i)
                live = [i for i in live if i not in wrong and bool(masks[i].any())]
            yield from (i not in wrong for i in range(len(pairs)))

    def _log_probability(self, pairs, masks) -> list[float]:
        """Of each pair, the sum of ln p at its masked positions."""
        with torch.no_grad(), as_written(self.device), self.lock:
            ids, open_, hidden, uncond = self._hidden(pairs, masks)
            target, row = ids[open_], open_.nonzero()[:, 0]
            sums = torch.zeros(len(pairs), dtype=torch.float64, device=self.device)
            for i in range(0, len(target), ops.CHUNK):
                part = slice(i, i + ops.CHUNK)
                logits = self._logits(hidden[part])  # [CHUNK, V]
                if uncond is not None:
                    base = self._logits(uncond[part])
                    logits = base + (self.cfg_scale + 1) * (logits - base)
                lse = logits.logsumexp(1)
                # What is left is NaN where the logits are, or infinite; a token of probability 0 has -inf.
                found = logits.gather(1, target[part, None])[:, 0] - lse.where(lse.isfinite(), float("nan"))
                sums.index_add_(0, row[part], found.double())
            return sums.tolist()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = ops.logits(hidden, *self.family.head_operands(), impl=self.family.impl)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _most_confident(self, pairs, masks) -> list[tuple[int, int]]:
        """Of each pair, the masked position that the model is surest of, and its token; -1 where logits are NaN."""
        with torch.no_grad(), as_written(self.device), self.lock:
            _, open_, hidden, uncond = self._hidden(pairs, masks)
            options = {"mask_id": self.mask_id, "uncond": uncond, "cfg_scale": self.cfg_scale}
            token, confidence, lse = ops.predict(hidden, *self.family.head_operands(), **options, impl=self.family.impl)
            grid = torch.full(open_.shape, float("-inf"), dtype=confidence.dtype, device=self.device)
            grid[open_] = confidence
            tokens = torch.zeros(open_.shape, dtype=torch.int64, device=self.device)
            tokens[open_] = token
            position = grid.argmax(1, keepdim=True)
            token = tokens.gather(1, position)
            lost = torch.zeros_like(open_)
            lost[open_] = ~lse.isfinite()
            return torch.cat((position.masked_fill(lost.any(1, keepdim=True), -1), token), 1).tolist()

    def _hidden(self, pairs: list[_Pair], masks: list[torch.Tensor]) -> tuple:
        """Clean ids [B, T], masked positions [B, T] bool, and what the LM head multiplies at these, [N, d]: with the
        prompt, and without it where there is guidance. Rows begin at slot 0 and are padded behind."""
        lengths = [len(pair.ids) for pair in pairs]
        ids = torch.zeros(len(pairs), max(lengths), dtype=torch.int64, device="cpu")
        open_, given = (torch.zeros(ids.shape, dtype=torch.bool, device="cpu") for _ in range(2))
        for row, (pair, mask) in enumerate(zip(pairs, masks)):
            ids[row, : len(pair.ids)] = pair.ids
            given[row, : pair.prompt] = True
            open_[row, pair.prompt : len(pair.ids)] = mask
        ids, open_, given = (x.to(self.device) for x in (ids, open_, given))
        start = end = None
        if min(lengths) < max(lengths):
            end = torch.tensor(lengths, dtype=torch.int64, device=self.device)
            start = torch.zeros_like(end)
        noisy, uncond = ids.masked_fill(open_, self.mask_id), None
        hidden = self.family.hidden(noisy, start, end, rows=open_)
        if self.cfg_scale > 0:
            uncond = self.family.hidden(noisy.masked_fill(given, self.mask_id), start, end, rows=open_)
        return ids, open_, hidden, uncond


def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
