"""Models to train and their tokenizers: new ones, or pretrained ones made ready."""

import argparse
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dllm_fast.families import TRAINED, gpt
from dllm_fast.loading import from_pretrained, is_other, model_path
from dllm_fast.patch import unpatch
from dllm_fast.plain import load_plain
from dllm_fast.train.data import save_tokenizer, train_characters, train_tokenizer

NEW = (*TRAINED, "gpt")  # what `--family` may name


def build_model(args: argparse.Namespace, tokenizer) -> PreTrainedModel:
    """A newly initialised model with the family and sizes that the options give."""
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "mask_token_id")}
    ids["vocab_size"] = len(tokenizer)
    if args.family == "gpt":
        if args.kv_heads not in (None, args.heads):
            raise ValueError(f"--kv-heads: {args.kv_heads}: a GPT-2 has as many as --heads, {args.heads}")
        return gpt.new(args.width, args.heads, args.layers, args.ffn, args.positions, args.tie, **ids)
    return TRAINED[args.family].new(
        args.width, args.heads, args.kv_heads, args.layers, args.ffn, args.positions, args.tie, **ids
    )


def start(args: argparse.Namespace, texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer: ``--model``'s, or new ones, the tokenizer from ``texts``.

    The first process makes a new tokenizer, and all processes read it.
    """
    if args.model:
        return pretrained(args.model, args.shifted)
    if args.shifted:
        raise ValueError("--shifted: says how an autoregressive GPT-2, which --model names, is trained on")
    folder = args.out / "tokenizer"  # a resumed run needs the tokenizer that its checkpoints were trained with
    if not (args.resume and folder.is_dir()):
        with PartialState().main_process_first():
            if PartialState().is_main_process:
                if args.tokenizer == "char":
                    save_tokenizer(train_characters(texts, args.positions), folder)
                else:
                    save_tokenizer(train_tokenizer(texts, args.vocab_size, args.positions), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return build_model(args, tokenizer), tokenizer


def pretrained(name: str, shifted: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained model in fp32 and its tokenizer, both with a mask token and an end-of-text token.

    Raises ValueError for a model that cannot be loaded or trained so.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(name))
        if is_other(name):
            model = load_plain(name, torch.float32, shifted=shifted)
        else:
            model = unpatch(from_pretrained(name, torch.float32, impl="torch"))
    except (OSError, ValueError) as error:  # transformers' message has several lines
        raise ValueError(f"--model: {name}: {str(error).strip().splitlines()[0]}") from error
    if getattr(model.config, "block_causal", None) is not None:
        raise ValueError(f"--model: {name} is block-causal, and only bidirectional models are trained here")
    if shifted and not getattr(model.config, "shifted", False):
        raise ValueError(f"--shifted: {name} is no autoregressive GPT-2")
    if tokenizer.eos_token is None:
        if tokenizer.sep_token is None:
            raise ValueError(f"--model: the tokenizer of {name} names neither an end-of-text token nor a separator")
        tokenizer.eos_token = tokenizer.sep_token
    add_mask_token(model, tokenizer)
    return model, tokenizer


def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that ``model.config.mask_token_id`` is set: the config's own, the tokenizer's, or a new token's.

    A new token is ``[MASK]``. The embedding grows if it has no row for it.
    """
    mask_id = getattr(model.config, "mask_token_id", None)
    if mask_id is None:
        if tokenizer.mask_token_id is None:
            tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        mask_id = tokenizer.mask_token_id
        if mask_id >= len(cast(torch.Tensor, model.get_input_embeddings().weight)):
            model.resize_token_embeddings(mask_id + 1)
    model.config.mask_token_id = mask_id


def with_adapters(model: PreTrainedModel, rank: int) -> Any:
    """``model`` with LoRA adapters (arXiv:2106.09685) on its linears but the head, alpha twice the rank, for training.

    The row of [MASK] in the embedding is trained too, since it may be new. Raises ValueError without PEFT.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("--lora: needs PEFT: pip install 'dllm_fast[lora]'") from error
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear",
        trainable_token_indices={embedding: [model.config.mask_token_id]},
    )  # fmt: skip
    return peft.get_peft_model(model, config)
