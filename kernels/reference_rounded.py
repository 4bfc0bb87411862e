"""Keys, values and rows in e4m3, weights in four bits, in plain PyTorch: the definitions that the kernels are tested
against."""

import torch

E4M3 = torch.float8_e4m3fn


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in ``dtype``, to the nearest number, ties to even. In e4m3 it is saturated at +-448, and NaN stays NaN."""
    return (x.clamp(-448, 448) if dtype == E4M3 else x).to(dtype)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of an e4m3 tensor, to be indexed: PyTorch 2.8 has no index of e4m3 on a CPU. Any other x is itself."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] rounded to e4m3, and the scale of each row [M, 1] fp32: ``max |x| / 448`` (arXiv:2209.05433)."""
    largest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True).float()
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def round_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [N, K] in groups of 128 inputs, ``w ~ scale (q - zero)``, q and zero integers from 0 to 15.

    Returns q, two to a byte, [N, 64 G] uint8; scale [G, N] bf16 and zero [G, N] uint8 of the G groups. The last group
    may be short. ``scale = (max(w, 0) - min(w, 0)) / 15`` rounded to bf16; q and zero are rounded to the nearest
    integer (arXiv:1712.05877). A word holds 8 q, from its lowest bits up: inputs i, i + 16, ... i + 112 of a group, one
    of each slice of 16 inputs.
    """
    wide = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % 128)).unflatten(1, (-1, 128))
    low = wide.amin(-1).clamp(max=0)  # [N, G]
    high = wide.amax(-1).clamp(min=0)  # [N, G]
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    zero = (-low / scale.float()).round().clamp(0, 15)
    q = ((wide / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15).to(torch.uint8)
    pairs = q.unflatten(-1, (4, 2, 16)).movedim(-1, 2)  # [N, G, word, byte, 2]
    packed = (pairs[..., 0] | pairs[..., 1] << 4).flatten(1)
    return packed, scale.t().contiguous(), zero.t().to(torch.uint8).contiguous()


def widen_int4(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, width: int) -> torch.Tensor:
    """The weight [N, width] that `round_int4` rounded to: ``scale (q - zero)``, exact in fp32."""
    pairs = packed.unflatten(1, (-1, 16, 4))
    q = torch.stack((pairs & 15, pairs >> 4), -1).movedim(2, -1).flatten(2)  # [N, G, 128]
    return (scale.t().float()[..., None] * (q.float() - zero.t().float()[..., None])).flatten(1)[:, :width]
