"""Requirements that a machine may lack: marks that skip a test and print why, or None if nothing is missing."""

import pytest
import torch
import transformers

from dllm_fast import backend, ops


def missing(impl: str) -> str | None:
    """Why these tests' models cannot be patched with ``impl``; the compiled extension needs them on the CPU."""
    try:
        device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
        ops.resolve(impl, torch.device(device), torch.float32)
    except ValueError as error:
        return str(error)
    return None


def unwatched() -> bool:
    """Whether this Triton, such as 3.4, lacks the methods through which tests see launches and compilations."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return False
    return not (hasattr(JITFunction, "_do_compile") and hasattr(InterpretedFunction, "run"))


NO_BACKEND = f"transformers {transformers.__version__} asks attention backends for masks in another way, or not at all"
needs_backend = pytest.mark.skipif(not backend.is_available(), reason=NO_BACKEND)
needs_cpp = pytest.mark.skipif(missing("cpp") is not None, reason=str(missing("cpp")))
needs_triton = pytest.mark.skipif(missing("triton") is not None, reason=str(missing("triton")))
needs_watched = pytest.mark.skipif(
    unwatched(), reason="this Triton has no methods that show what it launches and compiles"
)
