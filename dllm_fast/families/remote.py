"""LLaDA's published remote code, made to load under transformers 5."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from dllm_fast.families.native import TRANSFORMERS_5, register


def published_classes(auto_map: dict, name: str, **kwargs) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """LLaDA's published config and class, made to load under transformers 5.

    The code reads ``config.use_cache``, which configs no longer have. It never calls ``post_init``, which sets
    attributes that ``from_pretrained`` now needs. Its ``tie_weights`` takes no arguments, but now gets some.
    """
    config_class: Any = get_class_from_dynamic_module(auto_map["AutoConfig"], name, **kwargs)
    config = config_class.from_pretrained(name, **kwargs)
    cls: Any = get_class_from_dynamic_module(auto_map["AutoModel"], name, **kwargs)
    register()
    if not hasattr(config, "use_cache"):
        config.use_cache = False
    if not TRANSFORMERS_5 or "_dllm_fast_mended" in cls.__dict__:
        return config, cls
    published_init = cls.__init__
    published_tie = cls.tie_weights
    head = "model.transformer.ff_out.weight"
    embedding = "model.transformer.wte.weight"

    def __init__(self, *args, **kwargs):
        published_init(self, *args, **kwargs)
        if not hasattr(self, "all_tied_weights_keys"):
            tied = getattr(self.config, "weight_tying", False)
            self.all_tied_weights_keys = {head: embedding} if tied else {}
            published_tie(self)  # makes the head that the entry above names

    def tie_weights(self, missing_keys: set[str] | None = None, **kwargs):
        published_tie(self)
        if missing_keys and self.all_tied_weights_keys and not {head, embedding} <= missing_keys:
            missing_keys -= {head, embedding}

    cls.__init__ = __init__
    cls.tie_weights = tie_weights
    cls._dllm_fast_mended = True
    return config, cls
