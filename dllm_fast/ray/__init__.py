"""Batch inference on a Ray cluster: `dllm_fast.ray.generate` (extra ``ray``)."""

from dllm_fast.ray.run import Report, generate

__all__ = ["Report", "generate"]
