"""The model families: where the weights are, and one forward each over `dllm_fast.ops`."""

from dllm_fast.families.llada import LLaDA
from dllm_fast.families.modernbert import ModernBert

FAMILIES = {"llada": LLaDA, "modernbert": ModernBert}
