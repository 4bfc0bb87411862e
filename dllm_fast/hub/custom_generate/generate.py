"""``model.generate(ids, custom_generate=FOLDER, trust_remote_code=True)`` for transformers.

FOLDER is the one that holds ``custom_generate/``; put beside a model's weights, it is the model's generate. It takes
what ``model.generate`` of a model that dllm_fast has patched takes, and `streamer` too, which transformers keeps from a
callable.
"""

from dllm_fast.hf import custom_generate


def generate(inputs=None, *, model, **kwargs):
    """Sequences [B, P + new], or a `dllm_fast.DiffusionOutput` with ``return_dict_in_generate=True``."""
    return custom_generate(model, inputs=inputs, **kwargs)
