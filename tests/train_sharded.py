"""`python -m dllm_fast.train` under FSDP2 on processes without a GPU, for test_train_processes.py.

Accelerate shards only on accelerators, and would run DistributedDataParallel here. FSDP2 itself works on CPUs, so this
tells Accelerate that its processes have GPUs. Prints how many parameters were sharded."""

import sys

import accelerate.state
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from dllm_fast.train import training

INIT = accelerate.state.PartialState.__init__


def init(self, *args, **kwargs):
    INIT(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
        self.device = torch.device("cpu")


class Counted(training.LossRecord):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        parameters = list(model.parameters())
        if state.is_world_process_zero:
            print(f"sharded {sum(isinstance(p, DTensor) for p in parameters)} of {len(parameters)}", flush=True)


if __name__ == "__main__":
    accelerate.state.PartialState.__init__ = init
    training.LossRecord = Counted
    code = training.main(sys.argv[1:])
    torch.distributed.destroy_process_group()
    sys.exit(code)
