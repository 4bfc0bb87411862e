"""What a machine may lack: marks that skip a test and print why, or None where nothing is in the way."""

import pytest
import torch

from dllm_fast import ops


def missing(impl: str) -> str | None:
    """Why the models of these tests cannot be patched with ``impl``."""
    try:
        ops.resolve(impl, torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)
    except ValueError as error:
        return str(error)
    return None


needs_triton = pytest.mark.skipif(missing("triton") is not None, reason=str(missing("triton")))
