"""The model families: where the weights are, and a forward over `dllm_fast.ops`. All else asks this table for them."""

from typing import Any

from torch import nn

from dllm_fast.families.decoders import SDAR, LLaDA2Moe, LLaDAMoE
from dllm_fast.families.diffusion_gemma import CLASS, DiffusionGemma
from dllm_fast.families.family import Family
from dllm_fast.families.generic import TAKEN, Generic, why_not
from dllm_fast.families.layered import Layered, Trained
from dllm_fast.families.llada import LLaDA
from dllm_fast.families.modernbert import ModernBert

# Those whose forward is written here, by a config's model_type.
FAMILIES: dict[str, type[Layered]] = {
    "llada": LLaDA, "modernbert": ModernBert, "sdar": SDAR, "lladamoe": LLaDAMoE, "llada2_moe": LLaDA2Moe,
}  # fmt: skip
TRAINED: dict[str, type[Trained]] = {name: cls for name, cls in FAMILIES.items() if issubclass(cls, Trained)}


def kind_of(fields: dict[str, Any]) -> str | None:
    """The model_type of a config's ``fields``. LLaDA-MoE's published ones say llada, as the dense model's do."""
    kind = fields.get("model_type")
    return "lladamoe" if kind == "llada" and "num_experts" in fields else kind


def family_of(model: nn.Module) -> type[Family]:
    """The family of a model. Raises ValueError for a model of none."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(kind or "")
    if family is not None and family.matches(model):
        return family
    if DiffusionGemma.matches(model):
        return DiffusionGemma
    obstacle = why_not(model)
    if obstacle is None:
        return Generic
    raise ValueError(
        f"model: a {type(model).__name__} of model_type {kind!r} is not supported: {obstacle}. Supported are "
        f"{', '.join(FAMILIES)} with their language-model heads "
        f"({', '.join(family.model_class.__name__ for family in FAMILIES.values())}), a {CLASS}, a Dream that "
        f"from_pretrained loads as a Qwen2ForCausalLM, and {TAKEN}"
    )
