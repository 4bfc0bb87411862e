"""The forward that `patch` puts on a model: over `ops` where it can, else the model's own."""

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from dllm_fast.families.rows import valid_spans

STATE = "_dllm_fast"  # the attribute of a patched model that holds its `patch._Patch`


def patch_of(model: nn.Module):
    """The `patch._Patch` of this model; None if it is not patched.

    A shallow copy of a patched model holds the `_Patch` of its original, which does not count.
    """
    state = model.__dict__.get(STATE) if isinstance(model, nn.Module) else None
    return state if state is not None and state.model is model else None


def span_of(attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """[start, end) of the ones of each row; None if a row has a hole or no ones."""
    start, end, length = valid_spans(attention_mask.bool())
    return (start, end) if bool(((end - start == length) & (length > 0)).all()) else None


def like(own: Callable) -> Callable:
    """`_fast` with the name, the docstring and the signature of the model's own bound ``forward``.

    Every patch gets its own function: attributes of `_fast` itself would keep a model alive.
    """

    names = [name for name in inspect.signature(own).parameters if name != "self"]

    @functools.wraps(getattr(own, "__func__", own))
    def forward(self, *args, **kwargs):
        state = patch_of(self)
        if state is None or state.bound.__func__ is not forward:  # unpatched, but a wrapper still holds this
            return own.__func__(self, *args, **kwargs) if inspect.ismethod(own) else own(*args, **kwargs)
        if args:  # in the order of the model's own forward: the published class has inputs_embeds before the mask
            repeated = [name for name in names[: len(args)] if name in kwargs]
            if repeated or len(args) > len(names):
                return state.forward(*args, **kwargs)  # raises Python's own TypeError
            kwargs.update(zip(names, args))
        return _fast(self, **kwargs)

    # transformers' Trainer inspects the bound method to see which columns of a data set the model takes. A wrapped
    # method shows its own signature; for any other callable the first parameter would be taken for the instance.
    if not inspect.ismethod(own):
        signature = inspect.signature(own)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = [first, *(signature.parameters[name] for name in names)]
        vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    return forward


def _config_wants_more(config, output: type[ModelOutput]) -> bool:
    """Whether the config asks for more than logits: hidden states, attentions, a tuple, a cache."""
    wanted = ["output_hidden_states", "output_attentions", "torchscript"]
    if hasattr(output, "past_key_values") or hasattr(output, "cache"):  # the published LLaDA's; newer versions' name
        wanted.append("use_cache")
    return not getattr(config, "return_dict", True) or any(getattr(config, name, False) for name in wanted)


def _fast(self, input_ids=None, attention_mask=None, **kwargs):
    state = self.__dict__[STATE]
    family = state.family
    plain = (
        not state.departed()
        and isinstance(input_ids, torch.Tensor)
        and not torch.is_autocast_enabled(input_ids.device.type)
        and input_ids.dim() == 2
        and 0 < input_ids.shape[1] <= family.positions
        and not self.training
        and not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()))
        and not _config_wants_more(self.config, family.output_type(self))
        and all(value is None or value is (name == "return_dict") for name, value in kwargs.items())
    )
    span: tuple[torch.Tensor | None, torch.Tensor | None] | None = (None, None)
    if plain and attention_mask is not None:
        fits = isinstance(attention_mask, torch.Tensor) and attention_mask.shape == input_ids.shape
        span = span_of(attention_mask) if fits else None
    if not plain or span is None:
        return state.forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    device = family.weight.device
    # Triton launches on the current GPU, not on the one that holds the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        origin = None
        if family.block is not None and not family.own_blocks:  # then the whole sequence is one
            origin = torch.full_like(input_ids[:, 0], input_ids.shape[1])
        hidden = family.hidden(input_ids, *span, padding_counts=True, origin=origin)
        return family.output_type(self)(logits=family.logits(hidden))
