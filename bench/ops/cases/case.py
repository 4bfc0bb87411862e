"""A case: one op on one shape, with its implementations, its truth, and its least bytes and FLOPs."""

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch

WRONG = 3e-2  # a peer with a larger relative error computes something else; bf16 has 1e-3 to 1e-2


@dataclasses.dataclass(frozen=True)
class Model:
    name: str
    width: int
    layers: int
    heads: int  # equally many for keys and values
    head_dim: int
    ffn: int
    vocabulary: int
    window: int | None
    gate: str
    norm: str
    bias: bool  # of the LM head
    mask_id: int


LLADA = Model("llada-8b", 4096, 32, 32, 128, 12288, 126464, None, "swiglu", "rms_norm", False, 126336)
BASE = Model("modernbert-base", 768, 22, 12, 64, 1152, 50368, 64, "geglu", "layer_norm", True, 50284)
LARGE = Model("modernbert-large", 1024, 28, 16, 64, 2624, 50368, 64, "geglu", "layer_norm", True, 50284)
MODELS = (LLADA, BASE, LARGE)
TINY = (
    Model("tiny-llada", 64, 2, 2, 32, 96, 300, None, "swiglu", "rms_norm", False, 299),
    Model("tiny-modernbert", 48, 2, 3, 16, 40, 257, 8, "geglu", "layer_norm", True, 7),
)

LENGTHS, BLOCK, KEYS, BATCHES = (512, 1024, 4096), 32, (512, 1024, 4096, 16384), (1, 8, 64)

Run = Callable[..., object]
Check = Callable[[object], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    name: str
    inputs: Callable[[torch.Generator], tuple]  # makes one set of arguments on the generator's device
    run: dict[str, Run]  # "ours" first
    # From arguments, a function from an output to (its largest error / the allowed one, its relative error).
    check: Callable[[tuple], Check]
    bytes: int  # that must be read or written
    flops: int
    aim_ratio: float | None = None  # aim for the best peer's time / ours
    aim_share: float | None = None  # aim for the floor / our time
    strict: tuple[str, ...] = ("ours",)  # held to the tests' tolerance; the others only need to compute the same
    unchecked: tuple[str, ...] = ()  # peers that draw their own noise

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def complaint(self, name: str, excess: float, relative: float) -> str:
        """What is wrong with the result of ``name``; empty if nothing is."""
        if name in self.strict and not excess <= 1:
            return f"error {excess:.3g} times the allowed one, relative error {relative:.3g}"
        return "" if relative <= WRONG else f"another result: relative error {relative:.3g}"


def compare(
    out: list[torch.Tensor], eager: list[torch.Tensor], truth: list[torch.Tensor], ulps: float = 2
) -> tuple[float, float]:
    """(the largest error / the allowed one, the largest ``|out - truth| / |truth|`` of the tensors).

    Twice PyTorch's error in the same dtype is allowed, or ``ulps`` units in the last place of the largest truth.
    """
    excess = relative = 0.0
    for x, rough, exact in zip(out, eager, truth, strict=True):
        if not bool(x.isfinite().all()):
            return float("inf"), float("inf")
        difference = (x.double() - exact).abs()
        ulp = torch.finfo(rough.dtype).eps * exact.abs().max()
        allowed = torch.maximum(2 * (rough.double() - exact).abs().max(), ulps * ulp)
        excess = max(excess, float(difference.max() / allowed))
        relative = max(relative, float(difference.norm() / exact.norm()))
    return excess, relative


def dtype_of(device: str) -> torch.dtype:
    """bf16 on a GPU; fp32 in Triton's interpreter, which lacks bf16 arithmetic."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def compiled(function: Run, device: str, **options) -> Run:
    """Compile the whole function or fail: beyond its recompilation limit, torch.compile would silently run eagerly."""
    torch._dynamo.config.recompile_limit = 256
    backend = "inductor" if torch.device(device).type == "cuda" else "aot_eager"
    return torch.compile(function, fullgraph=True, backend=backend, **options)


PEERS = {  # import name -> distribution name
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "flash_attn.cute": "flash-attn-4",
    "flashinfer": "flashinfer-python",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the parent package is installed but does not load
        return False


def peers_here() -> str:
    """One line on which peers are installed, with versions, and which are absent."""
    here, absent = [], []
    for module, package in PEERS.items():
        if not installed(module):
            absent.append(package)
            continue
        try:
            here.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            here.append(package)
    return f"peers installed: {', '.join(here) or 'none'}; absent: {', '.join(absent) or 'none'}"
