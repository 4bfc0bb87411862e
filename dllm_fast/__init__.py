"""Masked-diffusion language models, fast: `patch` a LLaDA or a ModernBERT in place, `generate` from it."""

from dllm_fast.generate import Output, generate
from dllm_fast.hf import custom_generate
from dllm_fast.llada import LLaDAConfig, LLaDAModelLM
from dllm_fast.loading import from_pretrained, model_path, shipped
from dllm_fast.patch import patch, patched, unpatch
from dllm_fast.schedules import Factor, Pyramid, Threshold, Uniform

__all__ = [
    "Factor",
    "LLaDAConfig",
    "LLaDAModelLM",
    "Output",
    "Pyramid",
    "Threshold",
    "Uniform",
    "custom_generate",
    "from_pretrained",
    "generate",
    "model_path",
    "patch",
    "patched",
    "shipped",
    "unpatch",
]
