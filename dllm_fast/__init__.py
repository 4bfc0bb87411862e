"""Masked-diffusion language models, fast: `patch` a LLaDA or a ModernBERT in place, `generate` from it."""

from dllm_fast.generate import Output, generate
from dllm_fast.llada import LLaDAConfig, LLaDAModelLM
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
    "generate",
    "patch",
    "patched",
    "unpatch",
]
