"""ModernBERT compared with transformers: forwards at many lengths, padded or not, and generation.

    python -m bench.generation.modernbert [--size base] [--lengths 512 2048 8192] [--batches 1 8 32] [--rounds 5]

Random weights. A forward computes logits at every position. transformers runs with SDPA and, if it is installed, with
flash-attention 2, which skips padding. The shortest of padded rows has half the length. Generation compares the
published sampler's plain loop on the unpatched model with `dllm_fast.generate` and each cache, at the same number of
steps. Times are medians of interleaved rounds; ratios are taken round by round.
"""

import argparse
import dataclasses
import functools
import importlib.util
import sys

import torch
from transformers import ModernBertForMaskedLM

import dllm_fast
from bench.common import Shape, clock, interleave, machine, plain_ids, spread
from bench.generation.subjects import BERT_MASK, MODERNBERT, build_modernbert
from dllm_fast.decoding.published import published_generate
from dllm_fast.decoding.spelling import schedule_of

TINY = Shape(
    {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96,
        "local_attention": 16,
    },
    prompt=24, gen_length=32, block_length=16, schedule="uniform=32",
)  # fmt: skip
SHAPES = {"base": MODERNBERT["modernbert-base"], "large": MODERNBERT["modernbert-large"], "tiny": TINY}


def build(shape: Shape, dtype: torch.dtype, device: torch.device, attention: str) -> ModernBertForMaskedLM:
    """The same weights with each ``attention`` of transformers."""
    config = {**shape.config, "attn_implementation": attention}
    return build_modernbert(dataclasses.replace(shape, config=config), dtype, device)


def batch_of(length: int, batch: int, padded: bool, config, device: torch.device):
    """ids and mask [B, L]: all rows of length L, or if padded, of lengths from L / 2 to L, padded on the right."""
    generator = torch.Generator().manual_seed(length + batch)
    ids = torch.randint(*plain_ids(config), (batch, length), generator=generator)
    ends = torch.linspace(length // 2, length, batch).long() if padded else torch.full((batch,), length)
    mask = (torch.arange(length) < ends[:, None]).long()
    return (ids * mask).to(device), mask.to(device)


def obstacle(device: torch.device, run) -> str | None:
    """Run once, untimed. Returns why it cannot be timed, or None."""
    try:
        run()
        return None
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"


@torch.inference_mode()
def forwards(models: dict, lengths: list[int], batches: list[int], rounds: int, device: torch.device) -> None:
    print(
        f"{'tokens':>6} {'rows':>4} {'padded':>6}  " + "".join(f"{name + ', ms':26}" for name in models) + "times ours"
    )
    for length in lengths:
        for batch in batches:
            for padded in (False, True)[: 1 if batch == 1 else 2]:
                ids, mask = batch_of(length, batch, padded, models["ours"].config, device)
                inputs = {"input_ids": ids, "attention_mask": mask if padded else None}
                runs = {name: functools.partial(model, **inputs) for name, model in models.items()}
                failed = {name: obstacle(device, run) for name, run in runs.items()}
                runs = {name: run for name, run in runs.items() if failed[name] is None}
                times = interleave(runs, rounds, device)
                columns = [f"{failed[name] or spread(times[name].seconds, 3, 1e3):26}" for name in models]
                others = [name for name in runs if name != "ours"] if "ours" in runs else []
                ratios = [f"{name} {spread(times[name].over(times['ours']))}" for name in others]
                print(f"{length:6} {batch:4} {'yes' if padded else 'no':>6}  {''.join(columns)}{'; '.join(ratios)}")


def generation(models: dict, shape: Shape, rounds: int, device: torch.device) -> None:
    ours = models["ours"]
    schedule = schedule_of(shape.schedule)
    ids, _ = batch_of(shape.prompt, 1, False, ours.config, device)
    options = {"gen_length": shape.gen_length, "block_length": shape.block_length, "mask_id": BERT_MASK}
    plain = {
        f"plain loop, {name}": lambda model=model: published_generate(
            lambda x, mask: model(x, attention_mask=mask).logits, ids, steps=schedule.steps, **options
        )
        for name, model in models.items()
        if name != "ours"
    }
    fast = {
        f"ours, {cache}": lambda cache=cache: dllm_fast.generate(ours, ids, schedule=schedule, cache=cache, **options)
        for cache in ("none", "prefix", "dual")
    }
    runs = plain | fast
    for run in [*runs.values()] * 2:  # the second call records graphs
        clock(run, device)
    times, first = interleave(runs, rounds, device), next(iter(plain))
    print(f"\n{shape.prompt} + {shape.gen_length} tokens, blocks of {shape.block_length}, {schedule.steps} steps")
    for name in runs:
        print(
            f"{name:20} {spread(times[name].seconds, 3)} s, {shape.gen_length / times[name].median:7.0f} tokens/s, "
            f"{spread(times[first].over(times[name]))} times as fast as the {first}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="base")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(machine(device, dtype))
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    kinds = {"sdpa": "sdpa"} | ({"flash": "flash_attention_2"} if flash else {})
    print(f"ModernBERT {options.size}; flash-attention 2 " + ("runs too" if flash else "is not here"))
    shape = SHAPES[options.size]
    models = {name: build(shape, dtype, device, kind) for name, kind in kinds.items()}
    models["ours"] = dllm_fast.patch(build(shape, dtype, device, "sdpa"))
    forwards(models, options.lengths, options.batches, options.rounds, device)
    generation(models, shape, options.rounds, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
