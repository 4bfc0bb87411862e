"""``dllm-fast demo``: the shipped models at work, and the same schedules before and after the patch."""

import statistics
import time
from typing import Any

import torch
from transformers import AutoTokenizer

from dllm_fast.cli.view import print_table, watching
from dllm_fast.decoding.published import published_generate
from dllm_fast.decoding.schedules import Pyramid, Schedule, Threshold, Uniform
from dllm_fast.generate import generate
from dllm_fast.loading import end_of_text, from_pretrained, model_path
from dllm_fast.patch import patched, unpatch

SENTENCE = "An honest queen teaches three lazy wolves. past, passive, negative, question:\n"
PROMPT = "Maria has 12 apples. She buys 3 bags with"
GAP = ("And Moses spake unto the children of Israel, saying,", 12, " and all the people answered and said, All that the"
       " LORD hath spoken we will do.")  # fmt: skip
ANSWER = 52  # tokens of a rewritten sentence
LENGTH, BLOCK, REPEATS = 64, 32, 3
PAUSE = 0.04  # seconds between steps, for the eye


def demo(plain: bool = False) -> None:
    """Rewrite a sentence, fill a gap, and print a table of speeds."""
    torch.manual_seed(0)
    model, tokenizer = _load("llada-sentences")
    mask_id, eos_ids = model.config.mask_token_id, end_of_text(model, tokenizer)
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    print(f"A LLaDA of {round(model.num_parameters() / 1e6, 1)} million parameters rewrites a sentence by four rules,")
    print("one token at a time, the most confident first:")
    options: dict[str, Any] = {"gen_length": ANSWER, "block_length": ANSWER, "cache": "none", "eos_id": eos_ids}
    with watching(tokenizer, mask_id, plain, "llada-sentences", eos_ids, PAUSE) as streamer:
        generate(model, ids, schedule=Uniform(ANSWER), streamer=streamer, **options)
    print("\nand all tokens that are more than 90 % sure at once:")
    with watching(tokenizer, mask_id, plain, "llada-sentences", eos_ids, PAUSE) as streamer:
        generate(model, ids, schedule=Threshold(0.9), streamer=streamer, **options)
    print()

    filler, words = _load("modernbert-kjv")
    print("A small ModernBERT, trained on the King James Bible, fills a gap:")
    before, gap, after = GAP
    mask_id = filler.config.mask_token_id
    text = torch.tensor(
        [words(before)["input_ids"] + [mask_id] * gap + words(after)["input_ids"]], dtype=torch.int64, device="cpu"
    )
    with watching(words, mask_id, plain, "modernbert-kjv", pause=PAUSE) as streamer:
        generate(filler, text, gen_length=0, block_length=gap, schedule=Uniform(gap), streamer=streamer)
    print()
    model, tokenizer = _load("llada-gsm8k")
    compare(model, tokenizer(PROMPT, return_tensors="pt")["input_ids"])


def compare(model, ids: torch.Tensor) -> None:
    """Time each schedule with LLaDA's published sampler on the unpatched model and on the patched one, interleaved."""
    mask_id = model.config.mask_token_id
    options: dict[str, Any] = {"gen_length": LENGTH, "block_length": BLOCK}
    cases: list[tuple[str, Schedule, dict[str, Any]]] = [
        (f"uniform, {LENGTH} steps", Uniform(LENGTH), {"steps": LENGTH}),
        (f"uniform, {LENGTH // 4} steps", Uniform(LENGTH // 4), {"steps": LENGTH // 4}),
        ("pyramid, factor 1", Pyramid(1), {"pyramid": 1}),
        ("threshold 0.9", Threshold(0.9), {"threshold": 0.9}),
    ]
    rows = []
    unpatch(model)
    for name, schedule, published in cases:
        times: dict[str, list[float]] = {"before": [], "none": [], "dual": []}
        results = {}
        for _ in range(REPEATS):
            with _timed(times["before"]):
                expected, _ = published_generate(
                    lambda x, mask: model(x, attention_mask=mask).logits, ids, mask_id=mask_id, **options, **published
                )
            with patched(model):
                for cache in ("none", "dual"):
                    with _timed(times[cache]):
                        results[cache] = generate(model, ids, schedule=schedule, cache=cache, **options)
        speed = {key: LENGTH / statistics.median(seconds) for key, seconds in times.items()}
        for cache, out in results.items():
            same = int((out.sequences == expected)[:, ids.shape[1] :].sum())
            counts = f"{out.nfe_full}+{out.nfe_block}"
            ratio = f"{speed[cache] / speed['before']:.2f}x"
            tokens = "same" if same == LENGTH else f"{same} of {LENGTH} same"
            before = f"{speed['before']:.0f}" if cache == "none" else ""
            each = f"{out.tokens_per_forward:.2f}"
            rows.append([name, cache, counts, each, before, f"{speed[cache]:.0f}", ratio, tokens])
    columns = ["schedule", "cache", "NFE full+block", "tok/NFE", "tok/s before", "tok/s after", "ratio", "tokens"]
    title = f"llada-gsm8k, {ids.shape[1]} + {LENGTH} tokens, blocks of {BLOCK}, median of {REPEATS} interleaved runs"
    print_table(columns, rows, title)
    print("before: LLaDA's published sampler on the unpatched model. A block cache is approximate: tokens may differ.")


class _timed:
    def __init__(self, into: list[float]):
        self.into = into

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *exc):
        self.into.append(time.perf_counter() - self.began)


def _load(name: str):
    return from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(model_path(name))
