"""`patch`, `unpatch`, `patched`: replace a model's forward on one instance, and restore it exactly."""

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import nn
from transformers import GenerationConfig

from dllm_fast import ops
from dllm_fast.decoding.pool import Pool
from dllm_fast.families import family_of
from dllm_fast.families.bypass import require_no_learned_prompt, require_one_device, unwrapped
from dllm_fast.families.family import Family
from dllm_fast.families.forward import STATE, like, patch_of
from dllm_fast.families.linears import Fused, fuse, matmuls
from dllm_fast.families.mixin import generation_config_of, lend_generate, take_back, would_replace
from dllm_fast.families.rounded import KINDS, Copies, RoundedHead, loaded_kind, require_kind
from dllm_fast.families.rounded import check as check_rounded

M = TypeVar("M", bound=nn.Module)
CHOICES = {"weights": (None, *KINDS), "head": (None, "fp8")}


@dataclass
class _Patch:
    impl: str  # as given to `patch`
    weights: str | None
    head: str | None
    family: Family
    forward: Callable  # the model's own
    own_forward: object | None  # what the instance's __dict__ held under "forward", e.g. an Accelerate hook
    model: nn.Module
    bound: types.MethodType | None = None  # the forward in the model's __dict__, if it gets one
    adopted: list = field(default_factory=list)  # what the family changed in the model, see `Family.adopt`
    buffers: list[tuple[nn.Module, str, torch.Tensor | None]] = field(default_factory=list)
    fused: dict[int, Fused] = field(default_factory=dict)  # by the number of the group, to be separated again
    pool: Pool = field(default_factory=Pool)
    replaced: dict[str, object] | None = None  # by `lend_generate`; None if it was not called

    @torch.compiler.assume_constant_result
    def departed(self) -> bool:
        """Whether the model's own forward must run. Compiled code does not notice what is attached later.

        It has no arguments, because PyTorch 2.11 takes no module in a call whose result is constant. It also looks at
        ``__func__``, which PyTorch 2.11 cannot trace.
        """
        of_the_class = getattr(self.forward, "__func__", None) is type(self.model).forward
        return not of_the_class or self.family.departure() is not None

    def __deepcopy__(self, memo: dict) -> "_Patch":
        """Patch a deep copy of a patched model, which is made from `_plain_attributes` and lacks the forward."""
        twin = memo.get(id(self.model))
        if twin is None:  # a shallow copy is being copied, and this is not its own
            return self
        state = _Patch(**{x.name: copy.deepcopy(getattr(self, x.name), memo) for x in fields(self)})
        _install(twin, state, copy.deepcopy(getattr(self.model, "generation_config", None), memo))
        return state

    def __reduce__(self) -> tuple:
        """A pickled model is not patched."""
        return type(None), ()


def patch(model: M, impl: str = "auto", weights: str | None = None, head: str | None = None) -> M:
    """Make ``model`` fast, in place, this instance alone; returns it.

    Args:
        model: a LLaDA (native or remote code), a native SDAR, LLaDA-MoE or LLaDA2, or a
            ``transformers.ModernBertForMaskedLM``, on a real device; or one inside PEFT, torch.compile or a
            data-parallel wrapper, which is then patched. Or any other model of transformers 5 that takes attention
            backends and attends in both directions, see `families.generic`: its own forward stays, and calls this
            package's attention. Or a DiffusionGemma of transformers, which keeps its own ``generate`` and gets another
            denoising step (`families.diffusion_gemma`).
        impl: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"torch"``, see `ops.resolve`. One that is not available raises.
        weights: None for the model's own. ``"fp8"`` and ``"int4"`` use rounded copies of the layers' linear weights: in
            e4m3 with a scale for each output channel (`families.fp8`), or in four bits with a scale and a zero point
            for each group of 128 inputs (`families.int4`). The parameters stay, so this takes a half or a quarter of
            bf16's bytes in addition. Norms, embeddings and the LM head are not rounded. The model may have any dtype;
            there are GPU kernels for bf16 and fp16 (e4m3 on Hopper), anything else is right but slow.
            ``bench.quality.rounded`` measures the loss of accuracy.
        head: None, or ``"fp8"`` to compute logits from a copy of the LM head's weight that is rounded to e4m3, with a
            scale for each vocabulary entry; its input is not rounded. The parameter stays, and a tied embedding is not
            changed. There is a GPU kernel for a block's bf16 rows; otherwise the copy is widened at each call.

    ``model(input_ids, attention_mask=...)`` then runs `dllm_fast.ops` if no gradient is wanted. Any other call (labels,
    ``position_ids``, a mask with holes, training) runs the model's own forward. So does every call while a hook, an
    adapter or another module is attached where the patched forward would bypass it (`bypass`); `generate` raises a
    ValueError that names the module.
    ``model.generate(...)`` is `DiffusionGenerationMixin.generate`, whatever the model's class.
    Weights are not changed. Linears that share an input are moved into one buffer, a group at a time, and run as one
    matmul (`families.linears`); the Parameter objects and their values stay. A second call with the same arguments only
    rounds weights again, and fuses again what ``.to()`` and its like have separated, as `dllm_fast.generate` does too.

    ``copy.deepcopy`` of a patched model is patched. ``copy.copy``, which shares its modules, has the model's own
    forward; the first `generate` with it patches it. An unpickled model is not patched.

    Raises:
        ValueError: the model has an unknown type or architecture, is on the meta device or has NaN or infinite weights;
            an adapter replaces its head or a norm; or ``impl``, ``weights`` or ``head`` is not available. The model is
            then unchanged, as after any other error (no memory for a group of weights, for instance).
    """
    _patch_model(unwrapped(model), impl, weights, head)
    return model


def _patch_model(model: nn.Module, impl: str, weights: str | None, head: str | None) -> None:
    require_one_device(model)
    family_class = family_of(model)
    parameter = _first_parameter(model)
    resolved = ops.resolve(impl, parameter.device, parameter.dtype)
    require_known(weights=weights, head=head)
    require_rounds(family_class, weights)
    if (kind := loaded_kind(model)) not in (None, weights):
        raise ValueError(f"weights={weights!r}: this model was loaded with weights={kind!r} and has no others")
    state = patch_of(model)
    if state is not None and (state.family.impl, state.weights, state.head) == (resolved, weights, head):
        with state.pool.lock:
            _prepare(state)
        return
    _check_weights(model)
    with state.pool.lock if state is not None else nullcontext():
        copies = matmuls if weights is None else Copies(weights)
        family = family_class(model, impl, copies, None if head is None else RoundedHead())
        if family.ranks is not None and (weights is not None or head is not None):
            raise ValueError(f"weights={weights!r}, head={head!r}: {family.ranks.size} processes share the model's own")
        if weights is not None:
            check_rounded(weights, model, family.groups(), parameter.device)
        if head is not None:
            require_kind(head, parameter.device, "head")
        own = model.forward if state is None else state.forward
        own_forward = model.__dict__.get("forward") if state is None else state.own_forward
        fresh = _Patch(impl, weights, head, family, own, own_forward, model)
        if state is not None:
            fresh.fused, fresh.pool.lock = state.fused, state.pool.lock
            fresh.bound, fresh.replaced, fresh.adopted = state.bound, state.replaced, state.adopted
        _prepare(fresh)
        # Everything that can fail is done; from here on the model's own attributes change.
        if state is not None:
            _put_back_buffers(state)
        for module, name, table in family.repaired_buffers(model):
            fresh.buffers.append((module, name, module._buffers[name]))
            module._buffers[name] = table
        model.__dict__[STATE] = fresh
        if state is None:
            if not family.runs_own:
                fresh.bound = types.MethodType(like(own), model)
            if family.generates:
                fresh.replaced = would_replace(model)
            fresh.adopted = family.adopt()
            _install(model, fresh, generation_config_of(model))


def _install(model: nn.Module, state: _Patch, generation_config: GenerationConfig | None) -> None:
    if state.bound is not None:
        model.__dict__["forward"] = state.bound
    for name, function in state.family.methods().items():
        model.__dict__[name] = types.MethodType(function, model)
    model.__dict__["__getstate__"] = types.MethodType(_plain_attributes, model)
    if state.replaced is not None:
        lend_generate(model, generation_config)


def _plain_attributes(model: nn.Module) -> dict:
    """The attributes of a patched model without those of the patch, from which copies and pickles are made.

    A copy of the bound forward would still run the model that it is bound to.
    """
    attributes = dict(model.__dict__)
    state = patch_of(model)
    config = attributes.get("generation_config")
    _take_out(attributes, state)
    if "generation_config" in attributes:  # with its changes, whatever its class
        attributes["generation_config"] = config
    return {**attributes, STATE: state}


def require_known(**options: str | None) -> None:
    """Raise ValueError if ``weights`` or ``head`` is not one that `patch` takes."""
    for name, value in options.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, CHOICES[name]))}")


def require_rounds(family: type[Family], weights: str | None) -> None:
    """Raise ValueError if models of a family do not take rounded ``weights``."""
    if weights is not None and (reason := family.keeps_weights):
        raise ValueError(f"weights={weights!r}: {reason}")


def unpatch(model: M) -> M:
    """Restore exactly what `patch` replaced; returns the model. Does nothing to a model that is not patched.

    Weights get their own storages again, with their current values: training in between is kept. Waits for a
    `dllm_fast.generate` in another thread. Raises ValueError for a model that was loaded with rounded weights.
    """
    _unpatch_model(unwrapped(model))
    return model


def _unpatch_model(model: nn.Module) -> None:
    state: _Patch | None = patch_of(model)
    if state is None:
        if isinstance(model, nn.Module):
            model.__dict__.pop(STATE, None)  # a shallow copy has its original's
        return
    if (kind := loaded_kind(model)) is not None:
        raise ValueError(f"model: it was loaded with weights={kind!r} and has no other weights to restore")
    with state.pool.lock:
        if patch_of(model) is state:
            _take_out(model.__dict__, state)
            state.family.release(state.adopted)
            _put_back_buffers(state)
            for group in state.fused.values():
                group.separate()


def _take_out(attributes: dict, state: _Patch) -> None:
    """Remove what `patch` put among a model's attributes. A forward that was wrapped around it since then stays."""
    del attributes[STATE], attributes["__getstate__"]
    for name in state.family.methods():
        attributes.pop(name, None)
    if state.bound is not None and attributes.get("forward") is state.bound:
        del attributes["forward"]
        if state.own_forward is not None:
            attributes["forward"] = state.own_forward
    if state.replaced is not None:
        take_back(attributes, state.replaced)


def _put_back_buffers(state: _Patch) -> None:
    for module, name, old in state.buffers:
        current = module._buffers[name]
        module._buffers[name] = old if old is None or current is None else old.to(current.device)


def _prepare(state: _Patch) -> None:
    """Bring fused and rounded weights up to date with the model's parameters."""
    if isinstance(state.family.matmuls, Copies):
        state.family.matmuls.refresh(state.family.groups())
    else:
        _fuse(state)
    if state.family.rounded_head is not None:
        state.family.rounded_head.refresh(state.family.head()[0])


def _fuse(state: _Patch) -> None:
    """Fuse every group of the family's weights that is not fused yet; none of them if one fails."""
    moved = {}
    try:
        for number, group in enumerate(state.family.groups()):
            if (fused := fuse(group)) is not None:
                moved[number] = fused
    except BaseException:
        for fused in moved.values():
            with suppress(RuntimeError):  # no memory to separate it either; its values are right as it is
                fused.separate()
        raise
    for number, fused in moved.items():
        if number in state.fused:
            state.fused[number].unhook()
        state.fused[number] = fused
    if any(fused.weights[0].is_cuda for fused in moved.values()):
        torch.cuda.empty_cache()  # the freed storages are too small for the next group, and would stay cached


@contextmanager
def patched(model: M, impl: str = "auto", weights: str | None = None, head: str | None = None) -> Iterator[M]:
    """`patch` for a ``with`` block. A model that was patched before is patched as before after it."""
    before = patch_of(unwrapped(model))
    try:
        yield patch(model, impl, weights, head)
    finally:
        if before is None:
            unpatch(model)
        elif patch_of(unwrapped(model)) is not before:
            patch(model, before.impl, before.weights, before.head)


def bound_family(model: nn.Module) -> Family:
    """The family object of a patched model, its weights fused and rounded copies those of its weights as they are now.

    Raises ValueError for a model that is not patched, or with something attached that would be bypassed (`bypass`).
    """
    require_no_learned_prompt(model)
    model = unwrapped(model)
    state = _state(model)
    family = state.family
    with state.pool.lock:  # while another thread generates, a hook of `Generic` is on the head
        family.require_whole()
        if isinstance(family.matmuls, Copies):
            family.matmuls.update(family.groups())
        else:
            _fuse(state)
        if family.rounded_head is not None:
            family.rounded_head.update(family.head()[0])
    return family


def bound_pool(model: nn.Module) -> Pool:
    """What a patched model keeps between calls. Hold its lock while relying on the model's state: `unpatch` and `patch`
    wait for it. Raises ValueError for a model that is not patched."""
    return _state(unwrapped(model)).pool


def family_and_pool(model: nn.Module) -> tuple[Family, Pool]:
    """`bound_family` and `bound_pool` of a patched model. For a model that is not patched, a family for one call: no
    weight is moved, and every linear is its own matmul. Raises ValueError as they do, or as `patch` does."""
    require_no_learned_prompt(model)
    model = unwrapped(model)
    if patch_of(model) is not None:
        return bound_family(model), bound_pool(model)
    family_class = family_of(model)
    if family_class.runs_own:
        _state(model)
    _first_parameter(model)
    family = family_class(model, "auto")
    family.require_whole()
    return family, Pool()


def _state(model: nn.Module) -> _Patch:
    state = patch_of(model)
    if state is None and isinstance(model, nn.Module) and model.__dict__.get(STATE) is not None:
        original = model.__dict__[STATE]
        state = patch_of(patch(model, original.impl, original.weights, original.head))
    if state is None:
        raise ValueError(f"model: this {type(model).__name__} is not patched; call dllm_fast.patch(model) first")
    return state


def _first_parameter(model: nn.Module) -> nn.Parameter:
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model: its weights are on the meta device; load them first")
    plain = next((p for p in model.parameters() if _is_plain(p)), None)
    if plain is None:
        raise ValueError(f"model: this {type(model).__name__} has no floating-point weight that is not quantised")
    return plain


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether it is an ordinary floating-point parameter, not a quantised tensor."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point()


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not _is_plain(parameter):
            continue
        # A sum is NaN or infinite if any term is; it reads the weight once, without a mask as large as the weight.
        suspect = not torch.isfinite(parameter.detach().sum(dtype=torch.float32))
        if suspect and not torch.isfinite(parameter.detach()).all():
            raise ValueError(f"model: {name} holds NaN or infinite values")
