"""The models that `nfe` measures: trained ones by name or folder, published shapes with random weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM

import dllm_fast
from bench.common import SHAPES, Shape, build_model, plain_ids
from bench.quality.patched import PROMPTS

# ModernBERT's published sizes (arXiv:2412.13663); transformers' defaults are base.
MODERNBERT = {
    "modernbert-base": Shape({}, prompt=384, gen_length=128, block_length=32, schedule="uniform=32"),
    "modernbert-large": Shape(
        {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 2624},
        prompt=384, gen_length=128, block_length=32, schedule="uniform=32",
    ),
}  # fmt: skip
BERT_MASK = 50284  # the published tokenizer's [MASK]
TRAINED = Shape({}, prompt=64, gen_length=64, block_length=32, schedule="uniform=16")


@dataclass
class Subject:
    """A patched model and its default job. ``tokenizer`` None: random weights, random prompts."""

    name: str
    model: torch.nn.Module
    shape: Shape
    tokenizer: object | None

    @property
    def trained(self) -> bool:
        return self.tokenizer is not None

    @property
    def slots(self) -> int:
        return self.shape.prompt + self.shape.gen_length

    def prompts(self, batch: int, texts: list[str]) -> torch.Tensor:
        """Prompts [batch, prompt] int64, all of one length for generators that cannot take padding.

        ``texts`` of that length become a row each; other texts are joined and cut to it. A model with random weights
        gets random ids.
        """
        size = (batch, self.shape.prompt)
        if not self.trained:
            generator = torch.Generator().manual_seed(0)
            return torch.randint(*plain_ids(self.model.config), size, generator=generator).to(self.model.device)
        rows = self.tokenizer(texts)["input_ids"][:batch]
        if any(len(row) != size[1] for row in rows) or len(rows) < batch:
            ids = [i for text in texts for i in self.tokenizer(text + "\n", add_special_tokens=False)["input_ids"]]
            rows = (ids * (1 + batch * size[1] // len(ids)))[: batch * size[1]]
        return torch.tensor(rows).view(size).to(self.model.device)


def names() -> str:
    return ", ".join([*dllm_fast.shipped(), *SHAPES, *MODERNBERT])


def open_subject(name: str, dtype: torch.dtype, device: torch.device) -> Subject:
    """The subject of that name. Raises ValueError unless it is a shipped model, a shape or a folder."""
    if name in SHAPES:
        return Subject(name, dllm_fast.patch(build_model(SHAPES[name], dtype, device)), SHAPES[name], None)
    if name in MODERNBERT:
        return Subject(name, dllm_fast.patch(build_modernbert(MODERNBERT[name], dtype, device)), MODERNBERT[name], None)
    if name not in dllm_fast.shipped() and not Path(name).is_dir():
        raise ValueError(f"--model: {name!r} is neither a folder nor one of {names()}")
    model = dllm_fast.from_pretrained(name, dtype=dtype, device=device)
    return Subject(Path(name).name, model, TRAINED, AutoTokenizer.from_pretrained(dllm_fast.model_path(name)))


def build_modernbert(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> ModernBertForMaskedLM:
    """Random weights by transformers' initialisation: its confidences are low, so use it for times, not for tokens."""
    config = ModernBertConfig(**shape.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ModernBertForMaskedLM(config).eval()
    model.config.mask_token_id = BERT_MASK
    return model.to(device=device, dtype=dtype)


def usual_texts(name: str) -> list[str]:
    """Prompts for a shipped model that has no task."""
    return list(PROMPTS.get(name, ()))
