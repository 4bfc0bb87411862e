"""The command line: ``dllm-fast generate``, ``calibrate``, ``serve``, ``demo``, ``config`` and ``verify``."""

import argparse
import functools
import os
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from dllm_fast.calibration import calibrate
from dllm_fast.cli.view import watching
from dllm_fast.config import show_config
from dllm_fast.decoding.drafts import FILE, folder_of, key_of, write
from dllm_fast.decoding.options import BLOCK, CACHE_DTYPES, CACHES, CONFIDENCES, OPTIONS, Options
from dllm_fast.decoding.request import before_end
from dllm_fast.decoding.spelling import SCHEDULES, pipeline_of, refresh_of, remask_of, schedule_of
from dllm_fast.decoding.text import encode as text_ids
from dllm_fast.decoding.text import token_ids
from dllm_fast.errors import exit_code, require_utf8
from dllm_fast.families.forward import patch_of
from dllm_fast.families.rounded import KINDS
from dllm_fast.generate import Output, generate
from dllm_fast.loading import end_of_text, from_pretrained, is_other, load_tokenizer, mask_of, model_path, shipped
from dllm_fast.patch import bound_family, patch
from dllm_fast.plain import generate_plain, load_plain

CACHED = (
    "cache", "refresh", "remask", "suffix_length", "suffix_sample", "skip_committed", "speculate", "cache_dtype",
    "pipeline", "logprobs",
)  # fmt: skip


def add_model_options(add) -> None:
    """The options of `load`, except ``--model``."""
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--impl", default="auto")
    add(
        "--weights",
        choices=tuple(KINDS),
        help="compute with rounded copies of the layers' weights; default: as they are",
    )
    add("--trust-remote-code", action="store_true")


def add_held_back(add) -> None:
    """The options that name tokens."""
    add("--suppress-tokens", metavar="IDS", help="tokens to never choose: ids or special tokens: '126081,<|eot_id|>'")
    add("--defer-tokens", metavar="IDS", help="tokens to choose last, when nothing else is left")


def add_decoding_options(add) -> None:
    """`generate`'s options, but those that speculation is about."""
    add("--gen-length", type=int, default=64, help="tokens to add after the prompt; 0 only fills its [MASK]s")
    add("--block-length", type=int)
    add("--schedule", type=schedule_of, help=f"{', '.join(SCHEDULES)}; for example uniform=32")
    add("--confidence", choices=CONFIDENCES)
    add("--temperature", type=float)
    add("--top-k", type=int, metavar="N", help="draw from the N most probable tokens; 0: all")
    add("--top-p", type=float, metavar="P", help="draw from the most probable tokens that reach P together; 1: all")
    add("--cfg-scale", type=float)
    add("--cache", choices=CACHES)
    add("--refresh", type=refresh_of, help="block, every=BLOCKS, window=BEFORE,AFTER or drift=TAU")
    add("--remask", type=remask_of, help="remdm=ETA, verify=THRESHOLD or p2=ETA")
    pipelines = "d2f=ADD,ACTIVATE,BLOCKS or multi-block=ADD,BLOCKS,DELAY,REFRESH"
    add("--pipeline", type=pipeline_of, help=f"several blocks at once: {pipelines}")
    add("--suffix-length", type=int, metavar="N", help="evaluate and see only N positions after the live block")
    add("--suffix-sample", type=int, default=0, metavar="N", help="and N positions further on, drawn from the seed")
    add("--cache-dtype", choices=CACHE_DTYPES[1:], help="keep keys and values in 8 bits; default: the model's dtype")
    add_held_back(add)
    add("--mask-id", type=int, help="default: the model's own")
    add("--seed", type=int)


def add_chat(add) -> None:
    add("--chat", action="store_true", help="put prompts through the tokenizer's chat template")


def dtype_of(args: argparse.Namespace) -> str:
    """A dtype's name, or "auto"."""
    if args.model in shipped() and args.dtype is None and args.device == "cpu":
        return "float32"  # the files are bf16, which most CPUs only emulate
    return args.dtype or "auto"


def load(args: argparse.Namespace):
    """The model of ``--model``, patched, and its tokenizer."""
    model = from_pretrained(args.model, _dtype(args), args.device, args.impl, args.trust_remote_code, args.weights)
    return model, load_tokenizer(args.model, args.trust_remote_code)


def load_or_plain(args: argparse.Namespace):
    """As `load`. Of a model of no family that `patch` does not take, standard error says why, and it is not patched."""
    try:
        return load(args)
    except ValueError as error:
        if not is_other(args.model):
            raise
        refused = error
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    try:
        model = load_plain(args.model, _dtype(args), args.device)
    except ValueError:
        raise refused from None
    try:
        return patch(model, args.impl, args.weights), tokenizer  # a GPT-2 whose causal mask has been taken off
    except ValueError as error:
        refused = error
    given = (
        args.weights, args.remask, args.impl != "auto", args.skip_committed, args.suffix_length is not None,
        args.suffix_sample, args.speculate is not None, args.cache_dtype, args.pipeline,
    )  # fmt: skip
    if any(given):  # the plain loop has no such option
        raise refused
    print(f"a plain loop samples it, each step a forward of the whole sequence: {refused}", file=sys.stderr)
    return model, tokenizer


def _dtype(args: argparse.Namespace) -> torch.dtype | str:
    dtype = dtype_of(args)
    return dtype if dtype == "auto" else getattr(torch, dtype)


def encode(tokenizer, text: str, mask_id: int, chat: bool, first: int | None = None) -> torch.Tensor:
    r"""Ids [1, P]. ``[MASK]`` becomes the mask id, whatever the tokenizer calls that token; ``\[MASK]`` stays text.
    The id ``first`` goes ahead of a prompt that is no chat."""
    if chat and not tokenizer.chat_template:
        raise ValueError("--chat: this model's tokenizer has no chat template")
    if chat:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    parts = [part.replace(r"\[MASK]", "[MASK]") for part in re.split(r"(?<!\\)\[MASK\]", text)]
    ids: list[int] = []
    for i, part in enumerate(text_ids(tokenizer, parts, mask_id)):
        ids += [mask_id, *part] if i else part
    if not ids:
        raise ValueError("--prompt: an empty prompt")
    if first is not None and not chat:
        ids = [first, *ids]
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def standard_input() -> str:
    """All of standard input, without trailing line breaks."""
    try:
        return require_utf8("standard input", sys.stdin.read()).rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not text: {error}") from None


def drafts_of(text: str) -> int | str:
    return text if text == "auto" or text.endswith(".json") else int(text)


def run_generate(args: argparse.Namespace) -> int:
    prompts = [require_utf8("--prompt", prompt) for prompt in args.prompt or ()] or [standard_input()]
    model, tokenizer = load_or_plain(args)
    plain = patch_of(model) is None
    mask_id = mask_of(args.mask_id, model, tokenizer)
    if plain:
        eos_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    else:
        eos_ids = end_of_text(model, tokenizer)
    options = options_of(args, tokenizer) | {"mask_id": mask_id, "eos_id": eos_ids}
    if plain:
        options = {name: value for name, value in options.items() if name not in CACHED}
    run = generate_plain if plain else generate
    first = tokenizer.cls_token_id if is_other(args.model) else None  # a BERT was trained on texts that begin with it
    for prompt in prompts:
        ids = encode(tokenizer, prompt, mask_id, args.chat, first).to(args.device)
        watch = nullcontext() if args.quiet else watching(tokenizer, mask_id, args.plain, eos_ids=eos_ids)
        began = time.perf_counter()
        with watch as streamer:
            out = run(model, ids, streamer=streamer, **options)
        seconds = time.perf_counter() - began
        print(tokenizer.decode(out.sequences[0], skip_special_tokens=True))
        print(report(out, generated(out.sequences[0], ids[0], mask_id, eos_ids), seconds), file=sys.stderr)
    return 0


def options_of(args: argparse.Namespace, tokenizer) -> dict:
    """`generate`'s options, as far as they were given."""
    options = {name: value for name, value in vars(args).items() if name in OPTIONS}
    for name in ("suppress_tokens", "defer_tokens"):
        options[name] = token_ids(f"--{name.replace('_', '-')}", getattr(args, name), tokenizer)
    return options


def run_calibrate(args: argparse.Namespace) -> int:
    folder = args.out or folder_of(model_path(args.model))
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"--out: {folder} is no folder to write {FILE} to; {args.model} is not on this machine yet")
    try:
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts: {error}") from None
    texts = [line.replace(r"\n", "\n") for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"--prompts: {args.prompts} has no line with a prompt")
    model, tokenizer = load(args)
    block_length = args.block_length or bound_family(model).block or BLOCK
    key = key_of(args.schedule, args.gen_length, block_length, args.confidence or "probability")
    if key is None:
        raise ValueError(f"--schedule: with gen_length={args.gen_length} {args.schedule} is not one to keep drafts for")
    mask_id = mask_of(args.mask_id, model, tokenizer)
    options = options_of(args, tokenizer) | {"mask_id": mask_id, "eos_id": end_of_text(model, tokenizer)}
    prompts = [encode(tokenizer, text, mask_id, args.chat)[0] for text in texts]
    graph = calibrate(model, prompts, args.drafts, args.batch_size, **options)
    print(f"{write(folder, key, graph)}: {key}: {len(graph.drafts)} drafts, up to {graph.depth} steps ahead")
    return 0


def generated(sequence: torch.Tensor, prompt: torch.Tensor, mask_id: int, eos_ids: list[int]) -> int:
    """How many tokens were generated: the prompt's [MASK]s, and the answer through its first end of text."""
    answer = sequence[len(prompt) :].tolist()
    text = len(before_end(answer, eos_ids))
    return int((prompt == mask_id).sum()) + min(text + 1, len(answer))


def report(out: Output, filled: int, seconds: float) -> str:
    return (
        f"[{filled} tokens, {out.nfe} NFE ({out.nfe_full} full, {out.nfe_block} block), "
        f"{filled / seconds:.1f} tokens/s, {filled / out.nfe:.2f} tokens/NFE]"
    )


def run_demo(args: argparse.Namespace) -> int:
    from dllm_fast.cli.demo import demo

    demo(args.plain)
    return 0


def run_serve(args: argparse.Namespace) -> int:
    try:
        from dllm_fast.serve.gate import Limits
        from dllm_fast.serve.http import Address, run
        from dllm_fast.serve.worker import Served
    except ImportError as error:
        raise ImportError(f"{error}: dllm-fast serve needs pip install 'dllm_fast[serve]'") from error
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    options = Options.of_call("dllm-fast serve", options_of(args, tokenizer))
    served = Served(
        args.model, dtype_of(args), args.device, args.impl, args.weights, args.trust_remote_code, args.seats,
        args.length, options,
    )  # fmt: skip
    keys = [*(args.api_key or ()), os.environ.get("DLLM_FAST_API_KEY", "")]
    limits = Limits(
        args.name or Path(args.model).name, tuple(key for key in keys if key), args.waiting, args.timeout, args.body,
        args.chat_template,
    )  # fmt: skip
    return run(served, limits, Address(args.host, args.port, args.drain))


def run_config(args: argparse.Namespace) -> int:
    show_config()
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from dllm_fast.evaluate.verify import verify

    model, tokenizer = load(args)
    mask_id = mask_of(args.mask_id, model, tokenizer)
    files = (args.gsm8k, args.gsm8k_examples)
    return int(verify(model, tokenizer, args.model, mask_id, args.impl, *files, args.batch_size))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dllm-fast", description="Masked-diffusion language models, fast.")
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("generate", help="continue or fill in text with any LLaDA or masked language model")
    p.set_defaults(run=run_generate, **{name: getattr(Options, name) for name in OPTIONS})
    add = p.add_argument
    add("--model", required=True, help=f"a folder, a hub name, or a shipped model: {', '.join(shipped())}")
    masks = r"each [MASK] in it is filled, \[MASK] is text"
    add("--prompt", action="append", help=f"may be repeated; {masks}; default: standard input")
    add_decoding_options(add)
    add("--skip-committed", action="store_true", help="evaluate a token once more when it is there, then no longer")
    drafts = "draft N states a forward, 'auto': as many as pay, or 7 of a file of calibrate's; the same tokens, sooner"
    add("--speculate", type=drafts_of, metavar="N", help=drafts)
    add_chat(add)
    add_model_options(add)
    add("--plain", action="store_true", help="no live view")
    add("--quiet", action="store_true", help="print nothing but the text")
    p = commands.add_parser("calibrate", help="find the drafts that --speculate takes for a model and a schedule")
    p.set_defaults(run=run_calibrate, **{name: getattr(Options, name) for name in OPTIONS})
    add = p.add_argument
    add("--model", required=True, help=f"a folder, a hub name, or a shipped model: {', '.join(shipped())}")
    add("--prompts", required=True, metavar="FILE", help=r"a prompt in each line, with \n for its line breaks")
    add("--drafts", type=int, default=7, help="how many at most")
    add("--batch-size", type=int, default=8, help="prompts answered together")
    add("--out", metavar="FOLDER", help=f"where to put {FILE}; default: the model's own")
    add_decoding_options(add)
    add_chat(add)
    add_model_options(add)
    p = commands.add_parser("serve", help="serve OpenAI's completions over HTTP, with a page to watch; docs/serving.md")
    p.set_defaults(run=run_serve, **{name: getattr(Options, name) for name in OPTIONS})
    add = p.add_argument
    add("--model", required=True, help=f"a folder, a hub name, or a shipped model: {', '.join(shipped())}")
    add("--name", help="what requests call the model; default: the last part of --model")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--api-key", action="append", metavar="KEY", help="may be repeated; or DLLM_FAST_API_KEY; default: none needed")
    add("--seats", type=int, default=16, help="rows that run at a time")
    add("--waiting", type=int, default=256, help="rows that may wait for a seat; more are answered 429")
    add("--length", type=int, help="positions of a prompt with its answer; default: the model's")
    add("--timeout", type=float, default=600.0, help="seconds that a request may take")
    add("--body", type=int, default=1 << 20, help="bytes that a request may have")
    add("--drain", type=float, default=60.0, help="seconds that running requests have after SIGTERM")
    add("--chat-template", metavar="FILE", help="a Jinja template; default: the tokenizer's own")
    add_decoding_options(add)
    add("--skip-committed", action="store_true", help="evaluate a token once more when it is there, then no longer")
    add("--speculate", type=drafts_of, metavar="N", help=drafts)
    add_model_options(add)
    p = commands.add_parser("demo", help="watch the shipped models generate, and see how patching changes their speed")
    p.set_defaults(run=run_demo)
    p.add_argument("--plain", action="store_true", help="no live view")
    p = commands.add_parser("verify", help="check that a patched model gives what the published code gives")
    p.set_defaults(run=run_verify)
    add = p.add_argument
    add("--model", required=True, help="a folder or a hub name, for example LLaDA-8B-Instruct")
    add(
        "--gsm8k",
        metavar="FILE",
        help="JSONL with question and answer; its first 100 are asked; default: GSM8K is left out",
    )
    add(
        "--gsm8k-examples",
        metavar="FILE",
        help="a file like it; its first four come before each question as worked examples",
    )
    add("--batch-size", type=int, default=8, help="problems answered together")
    add("--mask-id", type=int, help="default: the model's own")
    add_model_options(add)
    p = commands.add_parser("config", help="print versions, devices, and which code runs on them, for a bug report")
    p.set_defaults(run=run_config)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return exit_code(functools.partial(args.run, args))


if __name__ == "__main__":
    sys.exit(main())
