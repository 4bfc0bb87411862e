"""From the hidden states of a step to tokens: predict, commit, mask again."""

import functools

import torch

from dllm_fast import ops
from dllm_fast.decoding.live import Live
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.record import Record
from dllm_fast.decoding.remask import STAYS, Committed, ranks

GOOD = 1 << 62  # in `Decider.bad`: no step of any block


class Decider:
    """The canvas of ``rows`` sequences of up to ``slots`` positions, the state of their live blocks, and decisions."""

    def __init__(self, family, options: Options, rows: int, slots: int):
        self.family, self.options, self.rows, self.slots = family, options, rows, slots
        self.weight = family.head()[0]
        device = self.device = self.weight.device
        self.block_size = options.live_positions(slots)
        self.passes = options.passes
        self.is_planned = not options.schedule.rule  # the schedule says beforehand how many a step commits
        self.drafting = options.drafts > 0  # in the live block
        long = functools.partial(torch.zeros, dtype=torch.int64, device=device)
        self.canvas = long((rows, slots))
        self.open = torch.zeros((rows, slots), dtype=torch.bool, device=device)  # to be filled, or filled by us
        self.pad, self.seed, self.row, self.slot, self.quota = (long(rows) for _ in range(5))
        self.number = long(rows)  # of each row's live block, among its blocks
        # Positions of this block that may still be masked again; with `Edit` steps that it may still take without any.
        self.budget = long(rows)
        self.step = long(rows)
        self.live = long(rows)  # positions of the row's block that can still change; 0 once it holds no [MASK]
        self.bad = long(rows)  # number << 32 | step at which a candidate's logits first were NaN or infinite, or GOOD
        self.fresh = torch.zeros((rows, self.block_size), dtype=torch.bool, device=device)  # committed by the last step
        # Of each of the block's tokens, when it was committed, and when it was last evaluated.
        self.committed_probability = torch.zeros((rows, self.block_size), dtype=torch.float32, device=device)
        self.probability = torch.zeros_like(self.committed_probability)
        self.offsets = torch.arange(self.block_size, device=device)
        self.record = Record(rows, slots, device) if options.logprobs else None

    def _going(self) -> torch.Tensor | None:
        """The rows that take part in the step, [B] bool; None: there is one row, which takes part in every step. With
        drafts a step may be taken for its time alone, in which no row takes part."""
        if self.rows == 1 and not self.drafting:
            return None
        return self.quota > 0 if self.is_planned and not self.drafting else self.live > 0

    def _decide(self, hidden: torch.Tensor, live: Live | None = None, evaluated: torch.Tensor | None = None) -> None:
        """From hidden states to tokens: predict, commit, remask.

        They are [B * passes, T, d], of which the ``evaluated`` [B, T] bool count (None: all); or those of the
        positions ``live``, [N, d].
        """
        mask_id, remask = self.options.mask_id, self.options.remask
        live, heads = self._heads(hidden, live)
        at = self.slot[:, None] + self.offsets  # [B, T]
        block, ours = self.canvas.gather(1, at), self.open.gather(1, at)
        candidate = (block == mask_id) & ours
        # 1. Predict the candidates; a remask asks for the committed positions too.
        step = self.step[:, None].expand_as(at)
        token, score, lse = self._predict(heads, candidate if remask is None else ours, self._keys(at, step), live)
        probability = None
        if remask is not None and not self.options.edits:
            current = torch.where(candidate, token, block)
            probability = self._evaluated_probability(heads, current, lse, live, evaluated)
        logprob = None if self.record is None else self._logprobs(heads, token, lse, live)
        # 2. Commit, and mask again.
        chosen = self._advance(token, score, probability, candidate, self.quota, self._going())
        self._note(chosen, logprob, self.step)
        # 3. What the next step has to evaluate: what is masked, and what this step committed. The host reads how much.
        masked = (self.canvas.gather(1, at) == mask_id) & ours
        live_count = masked.sum(1)
        if self.options.edits:
            edited = self._edit(token, score, block, ours & ~candidate)
            self._note(edited, logprob, self.step)
            live_count = self._goes_on(live_count, candidate, edited)
        if self.options.skip_committed:
            if (going := self._going()) is not None:
                chosen = torch.where(going[:, None], chosen, self.fresh)
            self.fresh.copy_(chosen)
            live_count = (masked | chosen).sum(1) * masked.any(1)
        self.live.copy_(live_count)

    def _heads(
        self, hidden: torch.Tensor, live: Live | None
    ) -> tuple[Live | None, tuple[torch.Tensor, torch.Tensor | None]]:
        """``live`` without guidance's rows, and of ``hidden``, as in `_decide`, what the LM head multiplies: the rows'
        own, and guidance's or None, [N, d] each."""
        if live is None:
            first, *second = (half.flatten(0, 1) for half in hidden.chunk(self.passes))
        elif self.passes == 2:
            live, first, *second = live.halves(hidden)
        else:
            first, second = hidden, []
        return live, (first, second[0] if second else None)

    def _edit(self, token, score, block: torch.Tensor, committed: torch.Tensor) -> torch.Tensor:
        """Replace tokens of the ``block`` [B, T] that are ``committed`` [B, T] where the step is sure of another one.
        Returns which, [B, T] bool."""
        edited = committed & (score >= self.options.remask.threshold) & (token != block)
        if (going := self._going()) is not None:
            edited = edited & going[:, None]
        at = self.slot[:, None] + self.offsets
        self.canvas.scatter_(1, at, torch.where(edited, token, self.canvas.gather(1, at)))
        return edited

    def _goes_on(self, masked: torch.Tensor, candidate: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
        """What can still change, [B], after a step that left ``masked`` [B]: where nothing is masked, one more step for
        a row that had candidates or was ``edited`` [B, T], as long as its budget lasts."""
        again = (candidate | edited).any(1) & (masked == 0) & (self.budget > 0)
        if (going := self._going()) is not None:
            again = again & going
        self.budget.sub_(again.long())
        return masked + again

    def _advance(
        self,
        token: torch.Tensor,  # [B, T]
        score: torch.Tensor,  # [B, T]
        probability: torch.Tensor | None,  # [B, T]: of the current tokens, with a remask
        candidate: torch.Tensor,  # [B, T] bool
        quota: torch.Tensor | None,  # [B]: what a planned step commits
        going: torch.Tensor | None,  # [B] bool: rows that take the step; None: all
    ) -> torch.Tensor:
        """Take a step of the schedule on what was predicted. Returns what it commits, [B, T] bool."""
        at = self.slot[:, None] + self.offsets
        # 1. Commit the schedule's choice of the candidates.
        chosen = self._commit(token, score, candidate, quota)
        if probability is None:
            return chosen
        # 2. Mask committed ones again. A planned step commits as many others in their place.
        if self.options.defer_tokens:  # a prediction that is held back takes no committed token's place
            probability = probability.masked_fill(candidate & (score == float("-inf")), 0.0)
        committed = self.open.gather(1, at) & ~candidate
        seen = Committed(committed, probability, self.committed_probability, candidate, chosen.sum(1))
        masked_again = self._remask(seen, at, going)
        if self.is_planned:
            chosen = chosen | self._commit(token, score, candidate & ~chosen, masked_again)
        self.committed_probability.copy_(torch.where(chosen, probability, self.committed_probability))
        return chosen

    def _note(self, chosen: torch.Tensor, logprob: torch.Tensor | None, step: torch.Tensor) -> None:
        """Keep what is asked for of the positions ``chosen`` [B, T] bool, committed by each row's ``step`` [B]."""
        if self.record is not None:
            self.record.write(self.slot[:, None] + self.offsets, chosen, logprob, self.number, step)

    def _logprobs(self, heads: tuple, token: torch.Tensor, lse: torch.Tensor, live: Live | None) -> torch.Tensor:
        """The log-probabilities [B, T] of ``token`` [B, T]; of a position that is not evaluated, any number."""
        if live is not None:
            token, lse = live.gather(token, 0), live.gather(lse, 0.0)
        found = self._logprob(heads, token.flatten(), lse.flatten())
        return found.view(self.fresh.shape) if live is None else live.spread(found, torch.zeros_like(self.probability))

    def _keys(self, at: torch.Tensor, step: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the noise of each position is a function of, [B, ..., T] each; of slots ``at`` and steps ``step`` of
        that shape. Nothing where none is drawn."""
        if not self.options.draws:
            return {}
        seed, row, pad = (x.view(-1, *[1] * (at.dim() - 1)) for x in (self.seed, self.row, self.pad))
        return {"seed": seed.expand_as(at), "step": step, "row": row.expand_as(at), "position": at - pad}

    def _predict(
        self,
        heads: tuple[torch.Tensor, torch.Tensor | None],
        wanted: torch.Tensor,
        keys: dict[str, torch.Tensor],
        live: Live | None = None,
        checked: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token and confidence [B, T] and log-sum-exp [B*T] of the positions ``wanted`` [B, T], with the noise of
        their ``keys``; `_check` of the latter, if it is to be ``checked``."""
        o, (hidden, uncond), shape = self.options, heads, wanted.shape
        if live is not None:
            wanted = live.gather(wanted, False)
            keys = {name: live.gather(key, 0) for name, key in keys.items()}
        # What is expanded along one row is flattened to a view without strides.
        keys = {name: key.flatten().contiguous() for name, key in keys.items()}
        token, score, lse = ops.predict(
            hidden,
            *self.family.head_operands(),
            candidate=wanted.flatten(),
            mask_id=o.mask_id,
            confidence=o.schedule.confidence or o.confidence,
            temperature=o.temperature,
            top_k=o.top_k or 0,
            top_p=o.top_p,
            **keys,
            uncond=uncond,
            cfg_scale=o.cfg_scale,
            banned=o.suppress_tokens,
            deferred=o.defer_tokens,
            softcap=self.family.softcap,
            ranks=self.family.ranks,
            impl=self.family.impl,
        )
        if live is not None:
            token = live.spread(token, token.new_full(shape, o.mask_id))
            score = live.spread(score, score.new_full(shape, float("-inf")))
            lse = live.spread(lse, lse.new_zeros(shape)).flatten()
        if checked:
            self._check(lse, self.step)
        return token.view(shape), o.schedule.ranked_by(score.view(shape), self.offsets), lse

    def _check(self, lse: torch.Tensor, step: torch.Tensor) -> None:
        """Keep the step [B] at which a row's logits were NaN or infinite first."""
        # lse - lse is 0, or NaN where lse is NaN or infinite; a position that is no candidate has lse 0.
        fine = (lse - lse == 0).view(self.rows, -1).all(1)
        self.bad.copy_(torch.minimum(self.bad, torch.where(fine, GOOD, (self.number << 32) + step)))

    def _commit(self, token, score, candidate: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """Write the candidates [B, T] that the schedule chooses, ``quota`` [B] of them if planned. Returns which."""
        rule = {"count": quota} if self.is_planned else self.options.schedule.rule
        return ops.commit(self.canvas, token, score, candidate, self.slot, **rule, impl=self.family.impl)

    def _logprob(self, heads: tuple, token: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """The log-probabilities [N] fp32 that the model gives to ``token`` [N]."""
        o, (hidden, uncond) = self.options, heads
        impl = "torch" if o.filters else self.family.impl  # as in `ops.predict`, which the log-sum-exp is from
        return ops.token_logprob(
            hidden, *self.family.head_operands(), token=token, lse=lse, uncond=uncond, cfg_scale=o.cfg_scale,
            deferred=[i for i in o.defer_tokens if i not in o.suppress_tokens], softcap=self.family.softcap,
            ranks=self.family.ranks, impl=impl,
        ).float()  # fmt: skip

    def _evaluated_probability(
        self, heads: tuple, token: torch.Tensor, lse: torch.Tensor, live: Live | None, evaluated: torch.Tensor | None
    ) -> torch.Tensor:
        """The probabilities that the model gave to ``token`` [B, T] when they were last evaluated."""
        if live is not None:
            token, lse = live.gather(token, 0), live.gather(lse, 0.0)
        now = self._logprob(heads, token.flatten(), lse.flatten()).exp()
        if live is not None:
            now = live.spread(now, self.probability)
        now = now.view_as(self.probability)
        if not self.options.skip_committed:  # all were evaluated now
            return now
        if evaluated is not None:
            now = now.where(evaluated, self.probability)
        if (going := self._going()) is not None:
            now = now.where(going[:, None], self.probability)
        self.probability.copy_(now)
        return now

    def _remask(self, seen: Committed, at: torch.Tensor, going: torch.Tensor | None) -> torch.Tensor:
        """Mask the most urgent of the committed positions, within the bound that ends the block; how many, [B]."""
        urgency = self.options.remask.urgency(seen)  # [B, T]
        bound = seen.masked.sum(1) - seen.kept if self.is_planned else self.budget
        if going is not None:
            bound = bound * going
        again = (urgency > STAYS) & (ranks(urgency) < bound[:, None])
        self.canvas.scatter_(1, at, self.canvas.gather(1, at).masked_fill(again, self.options.mask_id))
        masked_again = again.sum(1)
        if not self.is_planned:
            self.budget.sub_(masked_again)
        return masked_again
