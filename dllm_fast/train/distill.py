"""Few-step distillation: a model learns to give in a few forwards the answers that it gives in many.

At few steps it is mostly the order that goes wrong: the model commits what was certain from the start, and the
positions that others depend on come too late. So each answer is written several times by the fast schedule, in
different orders of its certain positions, and the run with the most right tokens shows the order to learn. Each step of
this run is an example, with the right tokens in place. Its loss is the mean over masked positions of

    -ln p(x)                                             at those that the step commits: be certain of them
    -(1 - hold) ln p(x) - hold / V sum_v ln p(v)         at the others: be right, but no more certain than 1 - hold

x being the right token. The first is certainty-forcing (dParallel, arXiv:2509.26488); the second leaves the model an
order to be certain in.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from dllm_fast import ops
from dllm_fast.decoding.schedules import Schedule
from dllm_fast.families import TRAINED
from dllm_fast.families.linears import plain
from dllm_fast.kernels import reference
from dllm_fast.train import losses
from dllm_fast.train.data import Corruption
from dllm_fast.train.head_loss import head_nll
from dllm_fast.train.trainer import DiffusionTrainer

CERTAIN = 3.0  # log-odds above which positions are equally certain, 95 %
SPREAD = 1.5  # of the noise on log-odds that varies the order


def quotas(schedule: Schedule, answer: torch.Tensor) -> list[torch.Tensor]:
    """Positions that each step commits, [B] each, of rows with ``answer`` [B] masked positions in one block.

    Raises ValueError if the schedule has no such numbers, or they depend on a draw.
    """
    schedule.check(1, int(answer.max()))
    counts = None if schedule.confidence else schedule.counts(answer, torch.ones_like(answer), _no_draw)
    if counts is None:
        raise ValueError(f"schedule: {schedule} does not say how many positions each step commits")
    return [count for _, count in counts]


def _no_draw() -> torch.Tensor:
    raise AssertionError("a schedule with a confidence of its own was refused before")


def _head_inputs(model: nn.Module, ids: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, Any]:
    found = losses.head_inputs(model, ids, rows)
    assert found is not None  # `DistillTrainer` refuses other models
    return found


@torch.no_grad()
def best_run(
    model: nn.Module,
    input_ids: torch.Tensor,  # [B, L] int64: prompts and right answers
    answer: torch.Tensor,  # [B, L] bool
    counts: list[torch.Tensor],  # [B] int64 of each step
    noise: torch.Tensor,  # [B, runs, steps, L] fp32, standard normal
    mask_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row's runs, the one with the most right tokens: (states, committed, right).

    States [steps, B, L] int64 are what each step saw, with right tokens for those that were committed before; committed
    [steps, B, L] bool is what it committed; right [B, runs] int64 are the numbers of right tokens.
    """
    batch, runs, _, length = noise.shape
    clean, masked = input_ids.repeat_interleave(runs, 0), answer.repeat_interleave(runs, 0)
    sequence = clean.masked_fill(masked, mask_id)
    slot = torch.zeros(batch * runs, dtype=torch.int64, device=clean.device)
    before, committed = [], []
    for step, count in enumerate(counts):
        hidden, head = _head_inputs(model, sequence, masked)
        found, confidence, _ = ops.predict(hidden, head.weight, getattr(head, "bias", None), mask_id=mask_id)
        token = sequence.masked_scatter(masked, found)
        odds = torch.logit(confidence.double(), eps=1e-12).clamp(max=CERTAIN)
        score = torch.full(masked.shape, float("-inf"), dtype=torch.float64, device=clean.device)
        score = score.masked_scatter(masked, odds) + SPREAD * noise[:, :, step].flatten(0, 1)
        before.append(masked)
        chosen = reference.commit(sequence, token, score, masked, slot, count=count.repeat_interleave(runs, 0))
        committed.append(chosen)
        masked = masked & ~chosen
    right = (sequence == clean).view(batch, runs, length).sum(2) - (~answer).sum(1, keepdim=True)
    best = right.argmax(1) + runs * torch.arange(batch, device=clean.device)
    states = [input_ids.masked_fill(masked[best], mask_id) for masked in before]
    return torch.stack(states), torch.stack([chosen[best] for chosen in committed]), right


def distill_loss(
    model: nn.Module,
    states: torch.Tensor,  # [N, L] int64
    input_ids: torch.Tensor,  # [N, L] int64: right answers
    committed: torch.Tensor,  # [N, L] bool
    hold: float,
    mask_id: int,
) -> torch.Tensor:
    """Each state's loss, [N] fp32: a mean over its masked positions; 0 where there are none."""
    masked = states == mask_id
    hidden, head = _head_inputs(model, states, masked)
    target, later = input_ids[masked], ~committed[masked]
    bias = getattr(head, "bias", None)
    loss = head_nll(hidden, head, target)
    # (1 - hold) (lse - z[x]) + hold (lse - mean z) = (lse - z[x]) + hold (z[x] - mean z): no other [N, V] is needed.
    weight = head.weight.float()
    above = (hidden.float() * (weight[target] - weight.mean(0))).sum(1)
    if bias is not None:
        above = above + bias.float()[target] - bias.float().mean()
    loss = loss + hold * later * above
    row = masked.nonzero()[:, 0]
    total = loss.new_zeros(len(states)).index_add(0, row, loss)
    return total / masked.sum(1).clamp(min=1)


@dataclass
class OrderNoise(Corruption):
    """Batches for `DistillTrainer`: clean ids, prompt lengths, and the noise that varies the order."""

    runs: int
    schedule: Schedule

    def corrupt(self, ids, prompt, step, rows, batch):
        if prompt is None:
            raise ValueError("train_dataset: distillation needs rows with a prompt_length")
        steps = len(quotas(self.schedule, ids.shape[1] - prompt))
        noise = [
            torch.randn(
                (self.runs, steps, ids.shape[1]), generator=losses.generator(self.seed, step, row, "order"),
                dtype=torch.float32, device="cpu",
            )
            for row in rows
        ]  # fmt: skip
        return {"input_ids": ids, "prompt_length": prompt, "order_noise": torch.stack(noise)}


class DistillTrainer(DiffusionTrainer):
    """`DiffusionTrainer` with this module's loss. Takes a LLaDA or a ModernBERT, and rows with a ``prompt_length``.

    Args:
        schedule: what the model shall answer by, with all of the answer in one block. One with fixed numbers of
            positions: `Uniform` or `Pyramid`.
        runs: orders that are tried for each answer.
        hold: how much certainty is kept from what a step does not commit, in (0, 1).
    """

    def __init__(self, *args, schedule: Schedule, runs: int = 4, hold: float = 0.1, **kwargs):
        if runs < 1:
            raise ValueError(f"runs: {runs} is not a positive whole number")
        if not 0 < hold < 1:
            raise ValueError(f"hold: {hold} is not between 0 and 1")
        quotas(schedule, torch.tensor([2**20], dtype=torch.int64, device="cpu"))
        self.schedule = schedule
        self.runs = runs
        self.hold = hold
        super().__init__(*args, **kwargs)

    def bind_loss(self, model) -> None:
        """Make ``model(input_ids=…, prompt_length=…, order_noise=…)`` return each row's loss [B]."""
        base: Any = losses.base_model(model)
        head = base.get_output_embeddings()
        if base.config.model_type not in TRAINED or not (isinstance(head, nn.Embedding) or plain(head)):
            raise ValueError(f"model: a {type(base).__name__} is no LLaDA or ModernBERT with a head of its own")

        def loss(base, input_ids, prompt_length, order_noise):
            ids, mask_id = input_ids, base.config.mask_token_id
            answer = torch.arange(ids.shape[1], device=ids.device) >= prompt_length[:, None]
            counts = [count.to(ids.device) for count in quotas(self.schedule, answer.sum(1).cpu())]
            states, committed, _ = best_run(base, ids, answer, counts, order_noise, mask_id)
            clean = ids.expand(len(counts), -1, -1).flatten(0, 1)
            row_loss = distill_loss(base, states.flatten(0, 1), clean, committed.flatten(0, 1), self.hold, mask_id)
            return row_loss.view(len(counts), len(ids)).mean(0)

        losses.bind(model, "order_noise", loss)

    def corruption(self, collate, args: TrainingArguments) -> OrderNoise:
        return OrderNoise(collate, self.mask_id, args.seed, self.runs, self.schedule)

    def _row_loss(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs)
