"""The processes that share a model, "ranks", what they send each other, and modules that hold a share of a weight.

`tensor_parallel` puts these modules into a model. A rank's results are the others', bit for bit: what it adds up or
gathers comes from the same collective. So all take the same decisions, and none waits for a collective that another
rank does not call.
"""

import zlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dllm_fast import ops

# Newer PyTorch warns of the other name.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class Ranks:
    """This process among those of a one-dimensional ``mesh`` that share a model.

    ids: how many ids of the vocabulary each has; ``first`` is this one's first.
    """

    def __init__(self, mesh: DeviceMesh, ids: int):
        self.group = mesh.get_group()
        self.device_type = mesh.device_type
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.ids, self.first = ids, mesh.get_local_rank() * ids

    def __deepcopy__(self, memo: dict) -> "Ranks":
        """Copies of a model are shared by the same processes."""
        return self

    def __reduce__(self) -> Any:
        raise ValueError(f"model: it is shared by {self.size} processes and cannot be pickled")

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of x, which may be overwritten; one all-reduce."""
        x = x.contiguous()
        if x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, ...] of every rank, [ranks, n, ...]; one all-gather."""
        everyone = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        if x.numel():
            getattr(dist, GATHER)(everyone, x.contiguous(), group=self.group)
        return everyone.unflatten(0, (self.size, x.shape[0]))

    def exchange(self, part: torch.Tensor, best: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From a share [F, N, 1] of `reference_shares` and its ids [N, 1] to those of all ranks, [F, N, ranks] and
        [N, ranks], in one message of F + 1 numbers a row. Ids below 2^24 are exact in fp32."""
        everyone = self.gather(torch.cat((part, best[None].to(part.dtype)))[..., 0])  # [ranks, F + 1, N]
        everyone = everyone.permute(1, 2, 0)
        return everyone[:-1], everyone[-1].to(best.dtype)

    def joined(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] from those of each rank's own ids, [..., ids]."""
        return self.gather(logits[None])[:, 0].movedim(0, -2).flatten(-2)

    def located(self, ids):
        """Where ids, a number or a tensor, are among the rank's own, and whether they are; 0 for those that are not."""
        own = (ids >= self.first) & (ids < self.first + self.ids)
        return (ids - self.first) * own, own

    def least(self, number: int) -> int:
        """The least of the ranks' numbers, below 2^63."""
        found = torch.tensor([number], dtype=torch.int64, device=self.device_type)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def require_same(self, *values: object) -> None:
        """Raise ValueError, on every rank, unless all have called it with values of one ``repr``; of tensors, and of
        those in a list, with the same numbers. A call begins with it: a rank that raised before would leave the others
        waiting for it."""
        own = zlib.crc32(repr([self._told(value) for value in values]).encode())
        found = torch.tensor([own, -own], dtype=torch.int64, device=self.device_type)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        least, most = found.tolist()
        if least != -most:
            raise ValueError(
                f"model: it is shared by {self.size} processes, which were called with different prompts or options"
            )

    def _told(self, value: Any) -> Any:
        """What `require_same` compares of a value. A tensor's own repr leaves out most of a large one."""
        if isinstance(value, torch.Tensor):
            here = torch.empty(0, dtype=torch.int64, device=self.device_type).device  # each rank has another
            return value.device == here, value.dtype, value.tolist()
        if isinstance(value, list | tuple):
            return [(x.dtype, x.tolist()) if isinstance(x, torch.Tensor) else x for x in value]
        return value


class SummedLinear(nn.Linear):
    """A linear of whose inputs each rank has a share: x [..., in] to [..., out], added up over the ranks."""

    def __init__(self, weight: torch.Tensor, ranks: Ranks):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.ranks = ranks

    def forward(self, x: torch.Tensor, impl: str = "torch") -> torch.Tensor:
        require_no_gradient(self, x)
        return self.ranks.add_up(ops.linear(x, self.weight, impl=impl))

    def _save_to_state_dict(self, *args) -> None:
        refuse_to_save(self)


class SharedEmbedding(nn.Embedding):
    """An embedding of whose ids each rank has a share: ids [...] to [..., d], the same on each."""

    def __init__(self, weight: torch.Tensor, ranks: Ranks):
        super().__init__(weight.shape[0], weight.shape[1], device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.ranks = ranks

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        require_no_gradient(self, self.weight)
        at, own = self.ranks.located(ids)
        return self.ranks.add_up(F.embedding(at, self.weight).masked_fill(~own[..., None], 0.0))

    def _save_to_state_dict(self, *args) -> None:
        refuse_to_save(self)


class SharedHead(nn.Linear):
    """An LM head of whose ids each rank has a share: hidden states [..., d] to all logits [..., V] on each."""

    def __init__(self, weight: nn.Parameter, ranks: Ranks):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight  # of a tied model it is the embedding's
        self.ranks = ranks

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        require_no_gradient(self, hidden)
        return self.ranks.joined(F.linear(hidden, self.weight))

    def _save_to_state_dict(self, *args) -> None:
        refuse_to_save(self)


def require_no_gradient(module: Any, x: torch.Tensor) -> None:
    """Raise ValueError if a gradient is wanted: collectives here have none."""
    if torch.is_grad_enabled() and (x.requires_grad or module.weight.requires_grad):
        raise ValueError(f"model: it is shared by {module.ranks.size} processes, and then has no gradients")


def refuse_to_save(module: Any) -> None:
    ranks = module.ranks
    raise ValueError(
        f"model: this process has share {ranks.rank + 1} of {ranks.size} of its weights, which cannot be saved; copy "
        "the checkpoint that they are from"
    )


def ranks_of(model: Any) -> Ranks | None:
    """The processes that share a LLaDA; None: it is whole."""
    return getattr(model.model.transformer.ff_out, "ranks", None)
