"""The model families: where the weights are, and a forward over `dllm_fast.ops`. All else asks this table for them."""

from torch import nn

from dllm_fast.families.diffusion_gemma import DiffusionGemma
from dllm_fast.families.family import Family
from dllm_fast.families.generic import Generic, why_not
from dllm_fast.families.layered import Layered
from dllm_fast.families.llada import LLaDA
from dllm_fast.families.modernbert import ModernBert

# Those whose forward is written here, by a config's model_type.
FAMILIES: dict[str, type[Layered]] = {"llada": LLaDA, "modernbert": ModernBert}


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
        f"({', '.join(family.model_class.__name__ for family in FAMILIES.values())}), and models of transformers 5 "
        "that take attention backends and attend in both directions"
    )
