"""Runs that torchrun starts for test_train_processes.py; they save each rank's parameters.

First `dllm_fast.train`, as ``OUT JSON`` says: a folder, and {name: (arguments of training.main, step to stop after or
None)}. Then three steps of a loop without Trainer, with `DiffusionLoss` under data parallelism and sharded."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import EOS, make_llada
from torch import nn

from dllm_fast.train import training
from dllm_fast.train.losses import DiffusionLoss

RANK = os.environ.get("RANK", "0")


def run(out: Path, arguments: list[str], stop: int | None) -> int:
    class Kept(training.LossRecord):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop:
                raise KeyboardInterrupt

        def on_train_end(self, args, state, control, model=None, **kwargs):
            torch.save(model.state_dict(), out / f"rank{RANK}.pt")
            (out / f"log{RANK}.json").write_text(json.dumps(state.log_history))

    record, training.LossRecord = training.LossRecord, Kept
    try:
        return training.main([*arguments, "--out", str(out)])
    finally:
        training.LossRecord = record


def loop(loss: nn.Module, rank: int = 0, processes: int = 1) -> dict[str, torch.Tensor]:
    """The parameters after three steps of eight rows, split over the processes."""
    ids = torch.randint(0, EOS, (8, 24), generator=torch.Generator().manual_seed(4))
    optimizer, rows = torch.optim.SGD(loss.parameters(), 0.1), 8 // processes
    for step in range(3):
        optimizer.zero_grad()
        own = ids[rank * rows : (rank + 1) * rows]
        loss(own, seed=1, step=step, first_row=rank * rows, batch=8).backward()
        optimizer.step()
    whole = ((name, getattr(p, "full_tensor", lambda p=p: p)()) for name, p in loss.named_parameters())
    return {name.removeprefix("module."): p.detach().clone() for name, p in whole}


def sharded(loss: DiffusionLoss) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in loss.model.model.transformer.blocks:
        fully_shard(block)
    return fully_shard(loss)


def wrapped(out: Path) -> None:
    for name, wrap in (("ddp", nn.parallel.DistributedDataParallel), ("fsdp", sharded)):
        torch.save(loop(wrap(DiffusionLoss(make_llada())), int(RANK), 2), out / f"{name}{RANK}.pt")


if __name__ == "__main__":
    for name, (arguments, stop) in json.loads(sys.argv[2]).items():
        # A repeated name resumes its run: whatever follows the dot only makes it distinct.
        code = run(Path(sys.argv[1]) / name.split(".")[0], arguments, stop)
        if code != (0 if stop is None else 130):
            sys.exit(f"{name}: exit code {code}")
    wrapped(Path(sys.argv[1]))
    # Threads of a process group that is still alive at Python's exit sometimes abort the process.
    torch.distributed.destroy_process_group()
