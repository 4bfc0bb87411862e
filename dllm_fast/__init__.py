"""Masked-diffusion language models, fast: `patch` a LLaDA, a ModernBERT or another in place, `generate`."""

import os

if os.path.isfile(os.path.join(os.path.dirname(__file__), "kernels")):
    raise ImportError(
        "dllm_fast/kernels is a text file where a symbolic link to kernels/ should be, as git leaves it on Windows: "
        "git config core.symlinks true && git checkout -- dllm_fast/kernels; or install the package: pip install ."
    )

from dllm_fast import backend
from dllm_fast.calibration import calibrate
from dllm_fast.config import show_config
from dllm_fast.decoding.drafts import DraftGraph
from dllm_fast.decoding.pipeline import D2F, MultiBlock
from dllm_fast.decoding.refresh import Drift, Every, Window
from dllm_fast.decoding.remask import P2, Edit, ReMDM, Verify
from dllm_fast.decoding.schedules import (
    Ancestral,
    Dynamic,
    EntropyBound,
    Factor,
    FirstHitting,
    Pyramid,
    Sequential,
    Static,
    Threshold,
    Uniform,
)
from dllm_fast.families.native import LLaDAConfig, LLaDAModelLM
from dllm_fast.families.native_decoders import (
    LLaDA2MoeConfig,
    LLaDA2MoeModelLM,
    LLaDAMoEConfig,
    LLaDAMoEModelLM,
    SDARConfig,
    SDARForCausalLM,
)
from dllm_fast.families.tensor_parallel import parallelize
from dllm_fast.flow import generate_flow
from dllm_fast.generate import Completion, Output, generate, generate_many
from dllm_fast.generation_config import DiffusionGenerationConfig
from dllm_fast.hf import DiffusionOutput, custom_generate
from dllm_fast.loading import from_pretrained, model_path, shipped
from dllm_fast.patch import patch, patched, unpatch
from dllm_fast.plain import generate_plain, load_plain
from dllm_fast.warmup import warmup

backend.register()

__version__ = "0.1.0"

__all__ = [
    "D2F",
    "P2",
    "Ancestral",
    "Completion",
    "DiffusionGenerationConfig",
    "DiffusionOutput",
    "DraftGraph",
    "Drift",
    "Dynamic",
    "Edit",
    "EntropyBound",
    "Every",
    "Factor",
    "FirstHitting",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
    "MultiBlock",
    "Output",
    "Pyramid",
    "ReMDM",
    "SDARConfig",
    "SDARForCausalLM",
    "Sequential",
    "Static",
    "Threshold",
    "Uniform",
    "Verify",
    "Window",
    "calibrate",
    "custom_generate",
    "from_pretrained",
    "generate",
    "generate_flow",
    "generate_many",
    "generate_plain",
    "load_plain",
    "model_path",
    "parallelize",
    "patch",
    "patched",
    "shipped",
    "show_config",
    "unpatch",
    "warmup",
]
