"""Training steps with this package's loss beside plain PyTorch and others: ``python -m bench.ops.training``

A small LLaDA with 126,464 tokens is trained for a few steps on random rows, each way in a process of its own, in
interleaved rounds:

- ours: `dllm_fast.train.head_loss`, at masked positions;
- masked rows: PyTorch's cross entropy of the logits at masked positions;
- all rows: the same from the logits of every position, as published training code has it;
- liger, cut-cross-entropy: their fused losses at masked positions, where they run.

Printed are seconds a step, the process's peak memory above that of the model and its optimiser, and the losses: all
ways see the same rows and noise, so their curves differ by rounding alone. Ends with one JSON line.
"""

import argparse
import datetime
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from bench import checkout
from bench.common import spread
from dllm_fast import LLaDAConfig, LLaDAModelLM
from dllm_fast.cli.view import print_table
from dllm_fast.train import losses
from dllm_fast.train.head_loss import head_nll

WAYS = ("ours", "masked rows", "all rows", "liger", "cut-cross-entropy")
MODULES = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
ROUNDS = 3


def obstacle(way: str, device: str) -> str | None:
    """Why this way cannot run here, or None."""
    module = MODULES.get(way)
    if module is None:
        return None
    if device == "cpu":
        return "its kernels need a GPU"
    return None if importlib.util.find_spec(module) else "not installed"


def row_losses(way: str, model, noisy: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each row's summed negative log-likelihood, [B]."""
    labelled = labels != losses.IGNORED
    target, head = labels[labelled], model.model.transformer.ff_out
    if way == "all rows":
        logits = model(noisy).logits
        nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100)
        return nll.view(labels.shape).sum(1)
    hidden = model.model(noisy, head=False)[labelled]
    if way == "ours":
        nll = head_nll(hidden, head, target)
    elif way == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        nll = liger_fused_linear_cross_entropy(hidden, head.weight, target, reduction="none")
    elif way == "cut-cross-entropy":
        from cut_cross_entropy import linear_cross_entropy

        nll = linear_cross_entropy(hidden, head.weight, target, reduction="none")
    else:
        nll = F.cross_entropy(head(hidden).float(), target, reduction="none")
    return nll.new_zeros(len(labels)).index_add(0, labelled.nonzero()[:, 0], nll)


def peak(device: str) -> float:
    """MiB: the process's most, or the GPU's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(way: str, options: argparse.Namespace) -> dict:
    """Train; seconds of each step but the first, the losses, and peak memory above the model's."""
    torch.manual_seed(0)
    sizes = {"d_model": options.width, "n_heads": options.width // 32, "n_layers": 2, "mlp_hidden_size": options.width}
    ids = {"vocab_size": options.vocabulary, "mask_token_id": options.vocabulary - 1}
    config = LLaDAConfig(**sizes, **ids, eos_token_id=0, pad_token_id=0, max_sequence_length=options.length)
    model = LLaDAModelLM(config).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # so that its state is there
    optimizer.zero_grad(set_to_none=False)
    before, curve, seconds = peak(options.device), [], []
    for step in range(options.steps):
        rows = torch.randint(0, 100, (options.batch, options.length), generator=torch.Generator().manual_seed(step))
        noisy, labels, weight = losses.corrupt(
            rows.to(options.device), None, config.mask_token_id, 0, step, range(options.batch), options.batch
        )
        began = time.perf_counter()
        loss = (row_losses(way, model, noisy, labels) * weight).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        curve.append(float(loss))
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "losses": curve, "peak_mib": peak(options.device) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary", type=int, default=126_464)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--way", choices=WAYS, help="run this one in this process, and print its JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run(options.way, options)))
        return
    found: dict[str, list[dict]] = {}
    for _ in range(options.rounds):
        for way in WAYS:
            if obstacle(way, options.device) is None:
                command = [sys.executable, "-m", "bench.ops.training", *sys.argv[1:], "--way", way]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.setdefault(way, []).append(json.loads(done.stdout.splitlines()[-1]))
    report(found, options)


def report(found: dict[str, list[dict]], options: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    head = f"{where}, {datetime.date.today()}, torch {torch.__version__}, commit {checkout.commit()}"
    print(head)
    print(f"{options.vocabulary:,} tokens, width {options.width}, {options.batch} x {options.length} positions, fp32")
    ours = found["ours"]
    rows = []
    for way, runs in found.items():
        seconds = [sorted(run["seconds"])[len(run["seconds"]) // 2] for run in runs]
        ratios = [s / sorted(o["seconds"])[len(o["seconds"]) // 2] for s, o in zip(seconds, ours)]
        away = max(abs(a / b - 1) for a, b in zip(runs[0]["losses"], ours[0]["losses"]))
        memory = [run["peak_mib"] for run in runs]
        rows.append([way, spread(seconds), spread(ratios), spread(memory, 0), f"{away:.1e}"])
    print_table(["loss", "seconds a step", "x ours", "peak MiB", "losses differ by"], rows, "training steps")
    skipped = {way: obstacle(way, options.device) for way in WAYS if way not in found}
    for way, why in skipped.items():
        print(f"not run: {way}: {why}")
    print(f"losses of ours: {' '.join(f'{loss:.4f}' for loss in ours[0]['losses'])}")
    print(json.dumps({"bench": "training", "machine": head, "ways": found, "not_run": skipped}))


if __name__ == "__main__":
    main()
