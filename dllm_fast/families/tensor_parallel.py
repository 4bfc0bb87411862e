"""Tensor parallelism (Megatron-LM, arXiv:1909.08053) of the native LLaDA: each process of a mesh has a share.

q, k, v, gate and up        rows of the weight: whole heads, and channels; nothing is sent
attention's output, down    columns of the weight: the products are added up, an all-reduce of [positions, d] each
embedding                   ids: another all-reduce of [positions, d]
LM head                     ids: seven numbers a predicted position are gathered, see `kernels/reference_shares.py`
norms                       whole

So heads are shared, and with them every cache of keys and values. What lies between the layers is the same everywhere.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from dllm_fast.families.bypass import class_name
from dllm_fast.families.forward import patch_of
from dllm_fast.families.linears import plain
from dllm_fast.families.native import LLaDAModelLM, kv_heads
from dllm_fast.families.ranks import Ranks, SharedEmbedding, SharedHead, SummedLinear, ranks_of
from dllm_fast.families.shards import PLACES, files_of

# A block's linears, in the words of transformers' ``tp_plan``.
PLAN = {
    "q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "ff_proj": "colwise", "up_proj": "colwise",
    "attn_out": "rowwise", "ff_out": "rowwise",
}  # fmt: skip
DIMENSIONS = {"colwise": 0, "rowwise": 1}  # of a weight [out, in]
EXACT = 1 << 24  # ids that a float32 holds


def parallelize(model: LLaDAModelLM, device_mesh: DeviceMesh) -> LLaDAModelLM:
    """Leave this process's share of a native LLaDA's weights in ``model``, in place; returns it, in eval mode.

    Every process of the mesh calls it, with the same weights, before `dllm_fast.patch`. From then on each call of the
    model and of `generate` is made by all of them, with the same arguments, and gives all of them the same result.
    `from_pretrained` with ``device_mesh`` reads no more than its share in the first place.

    The model cannot be made whole again, be saved or be trained; gradients raise a ValueError, as do adapters.

    Args:
        model: a `LLaDAModelLM` that is not patched, on a device of the mesh's type.
        device_mesh: one-dimensional, of processes that hold a device each:
            ``torch.distributed.device_mesh.init_device_mesh("cuda", (2,))``.

    Raises:
        ValueError: another model, or one that is patched, shared or adapted; another mesh; or heads, keys' and values'
            heads, channels or ids that the processes cannot share evenly. The model is then unchanged.
    """
    if type(model) is not LLaDAModelLM:
        raise ValueError(f"model: a {class_name(model)} cannot be shared by processes; a native LLaDAModelLM can")
    check_mesh(device_mesh, model.device)
    if patch_of(model) is not None:
        raise ValueError("model: it is patched; share it first, then patch it")
    if ranks_of(model) is not None:
        raise ValueError("model: processes share it already")
    for path, linear in _linears(model):
        if not plain(linear) or linear.bias is not None:
            raise ValueError(f"model: {path} is a {class_name(linear)}, not a plain linear; remove what is attached")
    check_sizes(model.config, device_mesh.size())
    return share(model, device_mesh)


def check_mesh(device_mesh: Any, device: torch.device) -> None:
    """Raise ValueError unless it is a one-dimensional mesh of devices like ``device``."""
    if not isinstance(device_mesh, DeviceMesh):
        raise ValueError(f"device_mesh: a {class_name(device_mesh)} is not a torch.distributed DeviceMesh")
    if device_mesh.ndim != 1:
        raise ValueError(f"device_mesh: it has {device_mesh.ndim} dimensions; take one of them, as in mesh['tp']")
    if device_mesh.device_type != device.type:
        raise ValueError(f"device_mesh: it is of {device_mesh.device_type!r}, and the model is on {device.type!r}")


def check_sizes(config: PretrainedConfig, processes: int) -> None:
    """Raise ValueError naming what cannot be shared evenly."""
    sizes = {
        "n_heads": config.n_heads,
        "n_kv_heads": kv_heads(config),
        "mlp_hidden_size": config.mlp_hidden_size,
        "embedding_size": config.embedding_size,
    }
    if uneven := [f"{name}={size}" for name, size in sizes.items() if size % processes]:
        raise ValueError(f"model.config: {processes} processes cannot share {', '.join(uneven)} evenly")
    if not 2 * processes <= config.embedding_size <= EXACT:
        raise ValueError(
            f"model.config: {processes} processes cannot share a vocabulary of embedding_size="
            f"{config.embedding_size}; it must have 2 ids for each, and at most 2^24"
        )


def share(model: Any, device_mesh: DeviceMesh) -> Any:
    """`parallelize`, checked. The weights may be on the meta device."""
    transformer = model.model.transformer
    ranks = Ranks(device_mesh, transformer.wte.weight.shape[0] // device_mesh.size())
    for block in transformer.blocks:
        for name, style in PLAN.items():
            linear = getattr(block, name)
            weight = _own(linear.weight, DIMENSIONS[style], ranks)
            if style == "rowwise":
                setattr(block, name, SummedLinear(weight, ranks))
            else:
                linear.weight, linear.out_features = nn.Parameter(weight, requires_grad=False), len(weight)
    embedding = SharedEmbedding(_own(transformer.wte.weight, 0, ranks), ranks)
    head: Any = embedding.weight
    if transformer.ff_out is not transformer.wte:
        head = nn.Parameter(_own(transformer.ff_out.weight, 0, ranks), requires_grad=False)
    transformer["wte"], transformer["ff_out"] = embedding, SharedHead(head, ranks)
    return model.requires_grad_(False).eval()


def _own(weight: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
    """A copy of the rank's share, so that the whole weight can be freed."""
    with torch.inference_mode(False), torch.no_grad():
        return weight.detach().chunk(ranks.size, dim)[ranks.rank].clone(memory_format=torch.contiguous_format)


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    """The linears that are shared, with their names: those of `PLAN` in each block."""
    for number, block in enumerate(model.model.transformer.blocks):
        yield from ((f"model.transformer.blocks.{number}.{name}", getattr(block, name)) for name in PLAN)


def load_shared(
    name: str, config: Any, dtype: torch.dtype | str, device: torch.device, mesh: DeviceMesh, **kwargs
) -> tuple[PreTrainedModel, dict]:
    """A native LLaDA of which this process has its share, in ``dtype`` on ``device``; and a report on the keys, as
    transformers'. Of each tensor in the safetensors files only that share is read.

    Raises:
        ValueError: there are no safetensors files; a weight in them has another shape than the config says; or the
            processes cannot share the model, see `parallelize`.
    """
    if unknown := sorted(set(kwargs) - set(PLACES)):
        raise ValueError(f"device_mesh: cannot be combined with {', '.join(unknown)}")
    check_sizes(config, mesh.size())
    files = files_of(name, "device_mesh", **kwargs)
    with torch.device("meta"):
        whole = LLaDAModelLM(config)
    model = share(whole, mesh)
    ranks: Any = ranks_of(model)
    # 1. Which modules have each parameter, a tied one two, and which dimension of it is shared.
    modules = dict(model.named_modules())
    holders = defaultdict(list)
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[parameter].append(module)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    # 2. Their shares, one tensor after the other.
    unexpected = []
    for file in files:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, it is not a dict
                if key not in wanted:
                    unexpected.append(key)
                    continue
                parameter = wanted[key]
                dim = _shared_dim(holders[parameter][0], key)
                tensor = _read(tensors.get_slice(key), f"{name}: {key}", parameter.shape, dim, ranks)
                dtype = _settled(dtype, config, tensor)
                loaded = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
                for module in holders[parameter]:
                    module.weight = loaded
    return model, {"missing_keys": [], "unexpected_keys": unexpected}


def _shared_dim(module: nn.Module, key: str) -> int | None:
    """Which dimension of a module's weight is shared; None: it is whole."""
    if isinstance(module, SharedEmbedding | SharedHead):
        return 0
    style = PLAN.get(key.split(".")[-2])
    return None if style is None else DIMENSIONS[style]


def _read(tensor: Any, name: str, shape: torch.Size, dim: int | None, ranks: Ranks) -> torch.Tensor:
    """The rank's share, of ``shape``, of a tensor in a file. Raises ValueError naming it if it has another size."""
    whole = [size * (ranks.size if n == dim else 1) for n, size in enumerate(shape)]
    if tensor.get_shape() != whole:
        raise ValueError(f"{name} is {tensor.get_shape()}, and config.json says {whole}")
    if dim is None:
        return tensor[:]
    own = slice(ranks.rank * shape[dim], (ranks.rank + 1) * shape[dim])
    return tensor[own] if dim == 0 else tensor[:, own].contiguous()


def _settled(dtype: torch.dtype | str, config: PretrainedConfig, tensor: torch.Tensor) -> torch.dtype:
    """The dtype of the weights, as transformers settles ``"auto"``: the config's, or that of the first tensor."""
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or tensor.dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
