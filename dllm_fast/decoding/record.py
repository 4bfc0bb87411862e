"""What ``logprobs`` asks for: of each token its log-probability when it was committed, and which step committed it."""

import torch

from dllm_fast.decoding.device import download, upload

GIVEN = -1  # the step of a token that no step has committed


class Record:
    """Of ``rows`` sequences of up to ``slots`` positions, on the device. What is committed again is written again."""

    def __init__(self, rows: int, slots: int, device: torch.device):
        self.logprob = torch.zeros((rows, slots), dtype=torch.float32, device=device)
        self.step = torch.full(
            (rows, slots), GIVEN, dtype=torch.int64, device=device
        )  # number of the block << 32 | step

    def write(
        self,
        at: torch.Tensor,  # [B, T] int64: slots, of each row different ones
        chosen: torch.Tensor,  # [B, T] bool: which of them the step has committed
        logprob: torch.Tensor,  # [B, T] fp32
        number: torch.Tensor,  # [B] int64: of the block
        step: torch.Tensor,  # [B] int64: of the block's steps
    ) -> None:
        key = ((number << 32) + step)[:, None].expand_as(at)
        self.logprob.scatter_(1, at, torch.where(chosen, logprob, self.logprob.gather(1, at)))
        self.step.scatter_(1, at, torch.where(chosen, key, self.step.gather(1, at)))

    def load(self, rows: list) -> None:
        """Go on with what the ``rows`` (`request.Row`) hold."""
        logprob, step = torch.zeros_like(self.logprob, device="cpu"), torch.zeros_like(self.step, device="cpu")
        for b, row in enumerate(rows):
            if row.steps is not None:  # not an idle seat
                pad = row.pad(step.shape[1])
                logprob[b, pad:], step[b, pad:] = row.logprobs, row.steps
        self.logprob.copy_(upload(logprob, self.logprob.device))
        self.step.copy_(upload(step, self.step.device))

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both on the host, [B, S] each."""
        return download(self.logprob), download(self.step)


def order_of(steps: torch.Tensor) -> torch.Tensor:
    """Steps of a row's tokens [L] as `Record` numbers them, counted from 0 without gaps; of given tokens `GIVEN`."""
    numbers = steps[steps != GIVEN].unique()
    return torch.where(steps == GIVEN, GIVEN, torch.searchsorted(numbers, steps))
