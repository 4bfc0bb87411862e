"""Training: `python -m dllm_fast.train`."""
