"""Speculation: the states that a block's next steps may reach are guessed, and evaluated together in one forward.

A state is one setting of a block's tokens. A forward evaluates the state that the schedule has reached, and drafts of
those that follow. Then the schedule takes its step on what was predicted from the first. If the state that it reaches
is the draft that was made for it, its predictions are there too, and the schedule takes the next step at once; and so
on. What a step gives is a function of its state, so the tokens are the schedule's own, in fewer forwards (FreeDave,
arXiv:2510.00294; Spiffy, arXiv:2509.18085).

`drafts` says which states are drafted.

A block ends with the tokens that were predicted for what was masked last, mostly. So where each block begins with a
window, a forward that may be a block's last evaluates that window too, the block before it filled with these tokens.
If the block ends so, the next one's first step has been evaluated, and its keys and values are kept.
"""

import torch

from dllm_fast import ops
from dllm_fast.decoding.device import download, upload
from dllm_fast.decoding.drafts import AutoGraph, features, log_odds
from dllm_fast.decoding.forwards import Forwards
from dllm_fast.decoding.pace import Pace
from dllm_fast.decoding.remask import ranks
from dllm_fast.decoding.steps import Step, Steps
from dllm_fast.families.cache import BlockCache
from dllm_fast.families.rows import Packed, States


def _of_state(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """x [B, states, T] of each row's ``state`` [B]: [B, T]."""
    return x.gather(1, state[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


class Speculation(Forwards):
    """Drafts, their forward, and how far the schedule gets with what they predict."""

    def __init__(self, family, options, rows: int, slots: int, spare: int, padded: bool):
        super().__init__(family, options, rows, slots, spare, padded)
        self.pace = Pace(options.drafts + 1) if isinstance(options.speculate, AutoGraph) else None
        self.window = Steps.of(options, slots, 0, 0, shifted=family.shifted).window
        # Of a batch only some rows' blocks end as was guessed, and what a row is evaluated for is its own.
        alone = family.block is None and rows == 1
        # Of a shifted model a block's last forward also changes the position before it, so the window has to hold that.
        self.looks_ahead = options.looks_ahead and alone and self.window.before >= self.block_size + family.shifted
        self.then: torch.Tensor | None = None  # on the host: `next_slot`, if the next block is looked at
        self.prepared: torch.Tensor | None = None  # on the host: of each row, the slot of its block that is prepared
        if not options.drafts:
            return
        graph = options.speculate
        real = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        # The drafts of the next forward: their tokens, and how many steps ahead each of a row's states is.
        self.drafts = torch.zeros((rows, graph.number, self.block_size), dtype=torch.int64, device=self.device)
        self.depth = torch.zeros((rows, graph.number + 1), dtype=torch.int64, device=self.device)
        # What they go by: the confidences of what is masked, from 0 to 1, and their ranks.
        self.by_entropy = (options.schedule.confidence or options.confidence) == "entropy"
        self.score = torch.zeros((rows, self.block_size), dtype=real, device=self.device)
        self.rank = torch.zeros((rows, self.block_size), dtype=torch.int64, device=self.device)
        # The graph: how many steps ahead its drafts are, which ranks are in each, or whether the schedule's counts say
        # that, and how likely each is.
        self.depths = torch.tensor([depth for depth, _ in graph.drafts], dtype=torch.int64, device=self.device)
        member = torch.zeros((len(graph.drafts), self.block_size), dtype=torch.bool, device="cpu")
        for n, (_, own) in enumerate(graph.drafts):
            member[n, [rank for rank in own or () if rank < self.block_size]] = True
        self.member = member.to(self.device)
        self.counted = torch.tensor([[own is None] for _, own in graph.drafts], dtype=torch.bool, device=self.device)
        given = graph.weights
        self.graph_weights = None if given is None else torch.tensor(given, dtype=real, device=self.device)
        # The states of forwards since the host last read; of each row, its steps by then, and all that are planned.
        self.unread: list[int] = []
        self.steps_read = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self.steps_planned: torch.Tensor | None = None
        # Of each row's steps in this block: how many it has taken, and of each the number and what it commits.
        self.taken = torch.zeros_like(self.slot)
        self.plan = torch.zeros((2, rows, self.block_size + 1), dtype=torch.int64, device=self.device)
        self.own = None
        if self.cache is not None:  # the keys and values of states; those of a row follow one another
            length = slots if options.runs_suffix else self.block_size + family.shifted
            width = self.weight.shape[1] if options.refresh.layerwise else 0
            kept = (options.drafts + 1) * length + self.window.length * self.looks_ahead
            shape = (family.layers, rows * self.passes, kept, family.kv_heads, family.head_dim)
            self.own = BlockCache(*shape, self.weight.dtype, self.device, width, options.cache_dtype is not None)

        if self.looks_ahead:
            # The next block, what this one may end as, and what the next one's first step then gives: whether that is
            # known, and its predictions.
            self.next_slot, self.guess = torch.zeros_like(self.slot), torch.zeros_like(self.rank)
            self.next_ready = torch.zeros(rows, dtype=torch.bool, device=self.device)
            self.next_token = torch.zeros_like(self.rank)
            self.next_score, self.next_lse = torch.zeros((2, rows, self.block_size), dtype=real, device=self.device)

    def plan_steps(self, planned: list[tuple[int, torch.Tensor]] | None, then: torch.Tensor | None = None) -> None:
        """Begin a block, whose steps are `Schedule.counts` of it. A row's steps are those that commit any. The block
        after it is at ``then`` [B], if it may be looked at."""
        self.then = then
        if then is not None:
            self.next_slot.copy_(upload(then, self.device))
            self.next_ready.zero_()
        self.taken.zero_()
        self.unread.clear()
        self.steps_read, self.steps_planned = torch.zeros(self.rows, dtype=torch.int64, device="cpu"), None
        if planned is None:
            return
        number = torch.tensor([step for step, _ in planned], dtype=torch.int64, device="cpu")
        count = torch.stack([count for _, count in planned], 1)  # [B, steps]
        self.steps_planned = (count > 0).sum(1)
        order = (count == 0).sort(stable=True).indices[:, : self.block_size]  # those that commit any come first
        plan = torch.zeros(self.plan.shape, dtype=torch.int64, device="cpu")
        plan[0, :, : order.shape[1]], plan[1, :, : order.shape[1]] = number[order], count.gather(1, order)
        self.plan.copy_(upload(plan, self.device))

    def least_forwards(self, going: torch.Tensor) -> int:
        """How many forwards with drafts are left to each of the rows ``going`` [B], if all drafts are right; 0 if the
        schedule does not know, or none is left. A block's first forward, which has no drafts, is not among them."""
        if self.steps_planned is None or not bool(going.any()):
            return 0
        left = (self.steps_planned - self.steps_read.clamp(min=1))[going]
        return int((left + self.options.speculate.depth).min()) // (self.options.speculate.depth + 1)

    def read_steps(self, going: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the device: what can still change of each row's block, and the steps that it has taken, [B] each. All of
        the rows ``going`` [B] took part in each forward since the last time."""
        found = [self.live, self.taken] if self.then is None else [self.live, self.taken, self.next_ready.long()]
        live, steps, *ready = download(torch.stack(found))
        if self.then is not None:
            self.prepared = torch.where(ready[0] > 0, self.then, -1)
        drafted = [states for states in self.unread if states > 1]
        if self.pace is not None and drafted:
            gained = float((steps - self.steps_read)[going].double().mean()) - self.unread.count(1)
            for states in drafted:
                self.pace.took(states, gained / len(drafted))
        self.unread.clear()
        self.steps_read = steps
        return live, steps

    def take_states(self, step: Step) -> None:
        """A forward of the state that each row has reached, and of its drafts; then the schedule's steps."""
        hidden, ahead = self._states_hidden(step)
        guess = self.guess.clone() if step.ahead else None
        last, went = self.decide_states(hidden)
        if self.cache is not None:
            self._keep(step, last, went)
        if step.ahead:
            self._prepare(step, ahead, guess, went)

    def resumes(self, slot, planned, going, full_rows) -> bool:
        """Whether the first step of the blocks at ``slot`` [B], ``planned`` or not, has been evaluated for all the rows
        ``going`` [B], none of which is among ``full_rows`` [B]; all on the host. Asked once a block."""
        prepared, self.prepared = self.prepared, None
        if prepared is None or not bool(((prepared == slot) & ~full_rows)[going].all()):
            return False
        if planned is None:
            return True
        counts = torch.stack([count for _, count in planned]) > 0  # [steps, B]
        return planned[0][0] == 0 and bool((counts[0] & (counts.sum(0) > 1))[going].all())

    def resume(self) -> None:
        """Take a block's first step, which has been evaluated."""
        self._check(self.next_lse, torch.zeros_like(self.step))
        at = self.slot[:, None] + self.offsets
        blocks = self.canvas.gather(1, at)[:, None]
        candidate = (blocks == self.options.mask_id) & self.open.gather(1, at)[:, None]
        self._take_steps(blocks, candidate, self.next_token[:, None], self.next_score[:, None], None)

    def decide_states(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the schedule's steps, one after the other for as long as the state reached is one that was evaluated:
        hidden [B*passes, states, T, d] is of the row's state, then of its drafts. Returns which was the last that the
        schedule took a step from, [B], and whether it took any, [B] bool."""
        o, states = self.options, hidden.shape[1]
        at = self.slot[:, None] + self.offsets  # [B, T]
        ours = self.open.gather(1, at)[:, None]  # [B, 1, T]
        block = self.canvas.gather(1, at)
        blocks = torch.cat((block[:, None], self.drafts[:, : states - 1]), 1)  # [B, states, T]
        candidate = (blocks == o.mask_id) & ours
        # Predict all states' candidates, each with the noise of its step.
        step = self.taken[:, None] + self.depth[:, :states]
        if self.is_planned:
            step = self._planned(0, step)
        self.step.copy_(step[:, 0])
        keys = self._keys(at[:, None].expand_as(blocks), step[..., None].expand_as(blocks))
        _, heads = self._heads(hidden.flatten(1, 2), None)
        token, score, lse = self._predict(heads, candidate if o.remask is None else ours.expand_as(blocks), keys)
        probability = None
        if o.remask is not None:
            current = torch.where(candidate, token, blocks)
            probability = self._logprob(heads, current.flatten(), lse).exp().view_as(blocks)
        asked = None
        if self.record is not None:
            asked = self._logprob(heads, token.flatten(), lse).view_as(blocks), step
        return self._take_steps(blocks, candidate, token, score, probability, asked)

    def _take_steps(
        self,
        blocks: torch.Tensor,  # [B, states, T]: the row's state, then its drafts
        candidate: torch.Tensor,  # [B, states, T] bool: of these, what is masked
        token: torch.Tensor,  # [B, states, T]
        score: torch.Tensor,  # [B, states, T]
        probability: torch.Tensor | None,  # [B, states, T]: of the current tokens, with a remask
        asked: tuple[torch.Tensor, torch.Tensor]
        | None = None,  # the tokens' log-probabilities [B, states, T] and steps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `decide_states` does with what was predicted."""
        states = blocks.shape[1]
        at = self.slot[:, None] + self.offsets
        ours, block, masked = self.open.gather(1, at), blocks[:, 0], candidate[:, 0]
        # 1. Step by step, each from the state that the one before has reached.
        going = alive = self.live > 0
        count, state = torch.zeros_like(self.slot), torch.zeros_like(self.slot)
        for ahead in range(min(self.options.speculate.depth, states - 1) + 1):
            if ahead:
                same = (block[:, None] == blocks).all(2) & (self.depth[:, :states] == ahead)
                alive = alive & same.any(1) & masked.any(1)
                state = torch.where(alive, same.int().argmax(1), state)
            quota = self._planned(1, self.taken[:, None])[:, 0] * alive if self.is_planned else None
            own = None if probability is None else _of_state(probability, state)
            masked = _of_state(candidate, state) & alive[:, None]
            chosen = self._advance(_of_state(token, state), _of_state(score, state), own, masked, quota, alive)
            if asked is not None:
                self._note(chosen, _of_state(asked[0], state), asked[1].gather(1, state[:, None])[:, 0])
            count = torch.where(alive, chosen.sum(1), count)
            self.taken += alive
            block = self.canvas.gather(1, at)
            masked = (block == self.options.mask_id) & ours
        self.live.copy_(masked.sum(1) * going)
        # 2. The drafts that follow from the last predictions.
        self._draft(block, masked, _of_state(token, state), _of_state(score, state), count)
        return state, going

    def _draft(self, block, masked, token, score, count) -> None:
        """States that may follow ``block`` [B, T], of which ``masked`` is, by what the step predicted that led to it
        and committed ``count`` [B] positions."""
        self.score.copy_(score.exp() if self.by_entropy else score)
        # A deferred token's confidence is -inf, but it comes before what is not masked.
        score = score.clamp(min=torch.finfo(score.dtype).min)
        rank = ranks(score.masked_fill(~masked, float("-inf")))  # [B, T]
        self.rank.copy_(rank)
        graph = self.options.speculate
        steps = torch.arange(max(depth for depth, _ in graph.drafts), device=self.device)
        counts = count[:, None].expand(-1, len(steps))
        if self.is_planned:
            counts = self._planned(1, self.taken[:, None] + steps)
        first = counts.cumsum(1)[:, self.depths - 1]  # [B, drafts of the graph]
        chosen = torch.where(self.counted, rank[:, None] < first[..., None], self.member[:, rank].transpose(0, 1))
        if self.graph_weights is None:
            pick = torch.arange(graph.number, device=self.device).expand(len(rank), -1)
        else:
            likely = log_odds(features(self.score, masked, chosen), self.graph_weights)
            pick = likely.sort(dim=1, descending=True, stable=True).indices[:, : graph.number]
        chosen = chosen.gather(1, pick[..., None].expand(-1, -1, self.block_size))
        self.depth[:, 1:] = self.depths[pick]
        self.drafts.copy_(torch.where(chosen & masked[:, None], token[:, None], block[:, None]))
        if self.looks_ahead:
            self.guess.copy_(torch.where(masked, token, block))

    def _planned(self, which: int, index: torch.Tensor) -> torch.Tensor:
        """Of the steps ``index`` [B, n] that the schedule has planned for a row's block, the numbers (0) or counts (1),
        [B, n]."""
        return self.plan[which].gather(1, index.clamp(max=self.plan.shape[2] - 1))

    def _states_hidden(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """What the LM head multiplies for the states, [B*passes, states, T, d], and the next block, [B*passes, T, d],
        or nothing."""
        states, length, rows = step.states, step.length, self.rows * self.passes
        at = self.slot[:, None] + self.offsets
        blocks = torch.cat((self.canvas.gather(1, at)[:, None], self.drafts[:, : states - 1]), 1)
        if self.cache is None:
            ids = self.canvas[:, None, :length].expand(-1, states, -1)
            ids = ids.scatter(2, at[:, None].expand_as(blocks), blocks)
            opened = self.open[:, None, :length]
            block = at
        else:
            begin, own = self.slot - step.before, slice(step.before, step.before + self.block_size)
            at = begin[:, None] + torch.arange(length, device=self.device)
            source = at.clamp(max=self.slots - 1)
            if self.place is not None:
                source = self.place.gather(1, source)
            ids = self.canvas.gather(1, source)[:, None].expand(-1, states, -1)
            ids = torch.cat((ids[..., : own.start], blocks, ids[..., own.stop :]), 2)
            opened = self.open.gather(1, source)[:, None]
        if self.passes == 2:
            ids = torch.cat((ids, ids.masked_fill(~opened, self.options.mask_id)))
        start, end = (None if x is None else x.repeat(self.passes) for x in (self.start, self.end))
        with ops.counting(self.arrivals):
            if self.cache is None:
                start, end, block = (
                    None if x is None else x.repeat_interleave(states, 0)
                    for x in (start, end, block.repeat(self.passes, 1))
                )
                hidden = self.family.hidden(ids.flatten(0, 1), start, end, rows=block)
                return hidden.unflatten(0, (rows, states)), hidden[:0]
            each = torch.arange(rows * states * length, device=self.device)
            inside = each % (states * length)
            position = (source - self.pad[:, None])[:, None].expand(-1, states, -1).repeat(self.passes, 1, 1)
            first = states * length * torch.arange(rows + 1, device=self.device)
            packed = Packed(
                each // (states * length), first, states * length, position.flatten(),
                States(begin.repeat(self.passes), length, states),
            )  # fmt: skip
            ids, block = ids.flatten(), None
            if step.ahead or length > self.block_size:
                block = each.view(-1, length)[:, own].flatten()
            if step.ahead:
                ids, inside, packed, block = self._beside(step, ids, inside, packed, block)
            hidden = self.family.hidden(
                ids[:, None], start, end, self.cache, inside, block, packed=packed, own=self._own(step)
            )[:, 0]
        hidden, ahead = hidden.split([n := rows * states * self.block_size, len(hidden) - n])
        return hidden.unflatten(0, (rows, states, -1)), ahead.unflatten(0, (-1, self.block_size))

    def _next_window(self) -> torch.Tensor:
        """The slots that a window step evaluates for the next block, [B, W]."""
        begin = self.begin(self.window, self.next_slot)
        return begin[:, None] + torch.arange(self.window.length, device=self.device)

    def _beside(self, step: Step, ids: torch.Tensor, inside: torch.Tensor, packed: Packed, own: torch.Tensor) -> tuple:
        """The ids [N] of states, of which ``own`` are the block's, with the next block's window behind them: ids, where
        their keys and values go, the positions, and which of all the LM head multiplies."""
        at, rows, length = self._next_window(), self.rows * self.passes, step.ahead
        offset = at - self.slot[:, None]  # in the block
        filled = self.guess.gather(1, offset.clamp(0, self.block_size - 1))
        more = torch.where((offset >= 0) & (offset < self.block_size), filled, self.canvas.gather(1, at))
        if self.passes == 2:
            more = torch.cat((more, more.masked_fill(~self.open.gather(1, at), self.options.mask_id)))
        each = torch.arange(rows * length, device=self.device)
        position = (at - self.pad[:, None]).repeat(self.passes, 1).flatten()
        block = (self.next_slot - at[:, 0]).repeat(self.passes)[:, None] + self.offsets
        block = len(ids) + (block + length * torch.arange(rows, device=self.device)[:, None]).flatten()
        packed = packed._replace(
            row=torch.cat((packed.row, each // length)), position=torch.cat((packed.position, position)),
            also=States(at[:, 0].repeat(self.passes), length, 1),
        )  # fmt: skip
        return (
            torch.cat((ids, more.flatten())), torch.cat((inside, step.states * step.length + each % length)), packed,
            torch.cat((own, block)),
        )  # fmt: skip

    def _prepare(self, step: Step, hidden: torch.Tensor, guess: torch.Tensor, went: torch.Tensor) -> None:
        """Keep what a forward gave for the next block, hidden [B*passes, T, d], of the rows that ``went`` on [B] and
        whose block has now ended as the ``guess`` [B, T] was."""
        at, mask_id = self.slot[:, None] + self.offsets, self.options.mask_id
        block, ours = self.canvas.gather(1, at), self.open.gather(1, at)
        right = went & (block == guess).all(1) & ~((block == mask_id) & ours).any(1)
        at = self.next_slot[:, None] + self.offsets
        candidate = (self.canvas.gather(1, at) == mask_id) & self.open.gather(1, at)
        _, heads = self._heads(hidden, None)
        keys = self._keys(at, torch.zeros_like(at))
        token, score, lse = self._predict(heads, candidate, keys, checked=False)
        kept = (self.next_token, token), (self.next_score, score), (self.next_lse, lse.view_as(score))
        for mine, its in kept:
            mine.copy_(torch.where(right[:, None], its, mine))
        self.next_ready.logical_or_(right)
        source = step.states * step.length + torch.arange(step.ahead, device=self.device)
        to = self._next_window().repeat(self.passes, 1)
        self.cache.take_slots(to, self._own(step), source.expand_as(to), right.repeat(self.passes))

    def _own(self, step: Step) -> BlockCache:
        """The part of the states' buffers that ``step`` uses."""
        return self.own.first(step.states * step.length + step.ahead)

    def _keep(self, step: Step, last: torch.Tensor, went: torch.Tensor) -> None:
        """Write to the cache the keys and values of the ``last`` state [B] that a step was taken from, of rows that
        ``went`` on [B]."""
        offset = torch.arange(step.length, device=self.device)
        to = ((self.slot - step.before)[:, None] + offset).repeat(self.passes, 1)
        source = (last[:, None] * step.length + offset).repeat(self.passes, 1)
        self.cache.take_slots(to, self._own(step), source, went.repeat(self.passes))
