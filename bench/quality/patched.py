"""Shows that patching changes nothing but rounding. ``python -m bench.quality.patched``

For both shipped models, in fp32 and bf16: the largest difference between a logit of the model's own forward and of the
patched one, relative to the largest logit; the own forward's error against fp64, for comparison; and how many greedy
tokens the patched model has in common with LLaDA's published sampler. Then samples at NFE = tokens and a quarter of it.
Ends with one JSON line.
"""

import datetime
import json
import os
import platform

import torch
import transformers
from transformers import AutoTokenizer

import dllm_fast
from bench import checkout
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.published import published_generate
from dllm_fast.kernels.checks import dtype_name

LENGTH, BLOCK = 64, 32
PROMPTS = {
    "llada-gsm8k": (
        "Maria has 12 apples. She buys 3 bags with",
        "A shop sells pens for $2 each and notebooks for $5 each.",
        "Every day James runs 3 miles before",
    ),
    "modernbert-kjv": (
        "And Moses spake unto the children of Israel, saying,",
        "In the beginning",
        "Now it came to pass in those days, that there went a man of the house of",
    ),
}


@torch.no_grad()
def compare(name: str, dtype: torch.dtype, tokenizer) -> dict:
    """Errors of both forwards on padded batches, and the number of equal tokens of both samplers."""
    model = dllm_fast.unpatch(dllm_fast.from_pretrained(name, dtype=dtype))
    batch = tokenizer(list(PROMPTS[name]), return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mask_id = model.config.mask_token_id
    noisy = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, mask_id, ids)
    own = model(noisy, attention_mask=mask).logits.double()
    with dllm_fast.patched(model):
        ours = model(noisy, attention_mask=mask).logits.double()
    wide = dllm_fast.unpatch(dllm_fast.from_pretrained(name, dtype=dtype).double())
    truth = wide(noisy, attention_mask=mask).logits
    valid = mask.bool()
    scale = truth[valid].abs().max()
    same = total = 0
    for row in range(len(ids)):
        prompt = ids[row][valid[row]][None]
        options = {"gen_length": LENGTH, "block_length": BLOCK}
        expected, _ = published_generate(
            lambda x, m: model(x, attention_mask=m).logits, prompt, steps=LENGTH, mask_id=mask_id, **options
        )
        with dllm_fast.patched(model):
            out = dllm_fast.generate(model, prompt, schedule=dllm_fast.Uniform(LENGTH), cache="none", **options)
        same += int((out.sequences == expected)[:, prompt.shape[1] :].sum())
        total += LENGTH
    return {
        "model": name,
        "dtype": dtype_name(dtype),
        "patched_minus_own": float((ours - own)[valid].abs().max() / scale),
        "own_minus_fp64": float((own - truth)[valid].abs().max() / scale),
        "patched_minus_fp64": float((ours - truth)[valid].abs().max() / scale),
        "same_tokens": same,
        "tokens": total,
    }


def samples(name: str, tokenizer) -> list[dict]:
    """Greedy and sampled continuations at NFE = tokens and a quarter of it."""
    model = dllm_fast.from_pretrained(name, dtype=torch.float32)
    found = []
    for steps in (LENGTH, LENGTH // 4):
        for prompt in PROMPTS[name]:
            for temperature in (0.0, 0.7):
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
                out = dllm_fast.generate(
                    model, ids, gen_length=LENGTH, block_length=BLOCK, schedule=dllm_fast.Uniform(steps),
                    cache="none", temperature=temperature, seed=0, eos_id=tokenizer.eos_token_id,
                )  # fmt: skip
                text = tokenizer.decode(out.sequences[0], skip_special_tokens=True)
                found.append({"model": name, "nfe": out.nfe, "temperature": temperature, "text": text})
    return found


def main() -> None:
    commit = checkout.commit()
    device = f"{platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, commit {commit}")
    rows, texts = [], []
    for name in PROMPTS:
        tokenizer = AutoTokenizer.from_pretrained(dllm_fast.model_path(name))
        rows += [compare(name, dtype, tokenizer) for dtype in (torch.float32, torch.bfloat16)]
        texts += samples(name, tokenizer)
    columns = ["model", "dtype", "patched - own", "own - fp64", "patched - fp64", "same tokens"]
    errors = ("patched_minus_own", "own_minus_fp64", "patched_minus_fp64")
    cells = [
        [r["model"], r["dtype"], *(f"{r[key]:.1e}" for key in errors), f"{r['same_tokens']} of {r['tokens']}"]
        for r in rows
    ]
    print_table(columns, cells, "largest logit difference / largest logit; greedy tokens the published sampler has too")
    for sample in texts:
        print(f"\n{sample['model']}, NFE {sample['nfe']}, temperature {sample['temperature']}\n{sample['text']}")
    print(json.dumps({"bench": "patched", "commit": commit, "rows": rows, "samples": texts}))


if __name__ == "__main__":
    main()
