"""How rounded weights change accuracy. ``python -m bench.quality.rounded``

Two shipped models and a random LLaDA in bf16 run as they are and with ``weights="fp8"`` and ``"int4"``. Either only
weights are rounded, or e4m3 weights are multiplied by e4m3 rows, as whole forwards do on Hopper (in PyTorch's
row-scaled matmul). The LM head's weight is rounded too, or alone (``head="fp8"``). Printed are:

- logit errors against fp64: the largest relative to the largest logit, the root mean square relative to the logits'
own;
- at how many positions the most probable token changes, and how many tokens of a greedy generate;
- the share of chains of sums (the task `steps`) that ``llada-steps`` gets right, and how many tokens are unchanged.

Ends with one JSON line.
"""

import datetime
import json
import os
import platform
from unittest.mock import patch as replaced

import torch
import transformers
from transformers import AutoTokenizer

import dllm_fast
from bench import checkout, task
from bench.quality.patched import BLOCK, LENGTH, PROMPTS
from dllm_fast.cli.view import print_table
from dllm_fast.families import fp8

# What is rounded: `patch`'s weights and head, and whether the rows that e4m3 weights multiply are too.
WAYS = {
    "nothing (bf16)": (None, None, False),
    "e4m3: head": (None, "fp8", False),
    "4 bits: weights": ("int4", None, False),
    "4 bits: weights; e4m3: head": ("int4", "fp8", False),
    "e4m3: weights": ("fp8", None, False),
    "e4m3: weights, head": ("fp8", "fp8", False),
    "e4m3: weights, rows": ("fp8", None, True),
    "e4m3: weights, rows, head": ("fp8", "fp8", True),
}
# For the task: the model's dtype, `patch`'s weights and head.
SCORED = {
    "float32": (torch.float32, None, None),
    "bfloat16": (torch.bfloat16, None, None),
    "head in fp8": (torch.float32, None, "fp8"),
    "fp8": (torch.float32, "fp8", None),
    "fp8, head too": (torch.float32, "fp8", "fp8"),
    "int4": (torch.float32, "int4", None),
    "int4, head in fp8": (torch.float32, "int4", "fp8"),
}
TASK = "llada-steps"
PROBLEMS, BATCH = 300, 100
SCHEDULES = {"uniform=16": dllm_fast.Uniform(16), "threshold=0.9": dllm_fast.Threshold(0.9)}
RANDOM = {"d_model": 512, "n_heads": 8, "n_layers": 8, "mlp_hidden_size": 1536, "vocab_size": 4096}


def cases() -> dict:
    """(model, padded prompts [B, P], mask [B, P]) by name."""
    found = {}
    for name, prompts in PROMPTS.items():
        batch = AutoTokenizer.from_pretrained(dllm_fast.model_path(name))(
            list(prompts), return_tensors="pt", padding=True
        )
        found[name] = dllm_fast.from_pretrained(name, dtype=torch.bfloat16), batch["input_ids"], batch["attention_mask"]
    torch.manual_seed(0)
    config = dllm_fast.LLaDAConfig(**RANDOM, mask_token_id=4095, eos_token_id=4094, pad_token_id=4094)
    ids = torch.randint(0, 4094, (3, 32))
    model = dllm_fast.LLaDAModelLM(config).eval().bfloat16()
    found[f"random, {RANDOM['n_layers']} x {RANDOM['d_model']}"] = model, ids, torch.ones_like(ids)
    return found


@torch.no_grad()
def measured(name: str, model, prompts, mask) -> list[dict]:
    mask_id, valid = model.config.mask_token_id, mask.bool()
    noise = torch.rand(prompts.shape, generator=torch.Generator().manual_seed(0))
    ids = torch.where(noise < 0.3, mask_id, prompts)
    wide = dllm_fast.unpatch(model).double()
    truth = wide(ids, attention_mask=mask).logits
    model = wide.bfloat16()  # exact, because the weights were bf16
    rows = []
    for way, (weights, head, by_rows) in WAYS.items():
        with replaced.object(fp8, "native", lambda device, by_rows=by_rows: by_rows):
            dllm_fast.unpatch(model)
            dllm_fast.patch(model, weights=weights, head=head)
            logits = model(ids, attention_mask=mask).logits.double()
            tokens = dllm_fast.generate(
                model, prompts, mask, gen_length=LENGTH, block_length=BLOCK,
                schedule=dllm_fast.Uniform(LENGTH), cache="none",
            ).sequences[:, prompts.shape[1] :]  # fmt: skip
        if way == next(iter(WAYS)):
            own, own_tokens = logits, tokens
        row = {"model": name, "way": way, "positions": int(valid.sum()), "tokens": own_tokens.numel()}
        row["largest"] = float((logits - truth)[valid].abs().max() / truth[valid].abs().max())
        row["rms"] = float((logits - truth)[valid].norm() / truth[valid].norm())
        row["argmax_changed"] = int((logits.argmax(-1) != own.argmax(-1))[valid].sum())
        row["tokens_changed"] = int((tokens != own_tokens).sum())
        rows.append(row)
    return rows


def task_scores() -> list[dict]:
    """For each kind of weights, how many answers to `TASK` are right, and how many tokens equal the fp32 model's."""
    model, tokenizer = task.load(TASK)
    problems, length, rows = task.STEPS.problems(PROBLEMS, 2, held_out=True), task.STEPS.tokens, []
    for schedule, value in SCHEDULES.items():
        own = None
        for name, (dtype, weights, head) in SCORED.items():
            dllm_fast.patch(model.to(dtype), weights=weights, head=head)
            options = {"gen_length": length, "block_length": length, "schedule": value, "cache": "none"}
            got = task.score(model, tokenizer, problems, BATCH, **options)
            own = got.tokens if own is None else own
            row = {"schedule": schedule, "weights": name, "right": sum(got.right), "problems": PROBLEMS}
            rows.append(row | {"same": int((got.tokens == own).sum()), "tokens": own.numel()})
        model.float()
    return rows


def main() -> None:
    commit = checkout.commit()
    device = f"{platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, commit {commit}")
    rows = [row for name, case in cases().items() for row in measured(name, *case)]
    columns = ["model", "rounded", "largest error", "rms error", "argmax changed", "greedy tokens changed"]
    cells = [
        [
            r["model"],
            r["way"],
            f"{r['largest']:.1e}",
            f"{r['rms']:.1e}",
            f"{r['argmax_changed']} of {r['positions']}",
            f"{r['tokens_changed']} of {r['tokens']}",
        ]
        for r in rows
    ]
    print_table(columns, cells, "errors of the logits against fp64; changes against bf16")
    scores = task_scores()
    cells = [
        [r["schedule"], r["weights"], f"{r['right'] / r['problems']:.1%}", f"{r['same']} of {r['tokens']}"]
        for r in scores
    ]
    title = f"{TASK}: {PROBLEMS} problems, in fp32 unless bfloat16 is named"
    print_table(["schedule", "weights", "right", "tokens of the fp32 model"], cells, title)
    print(json.dumps({"bench": "rounded", "commit": commit, "rows": rows, "task": scores}))


if __name__ == "__main__":
    main()
