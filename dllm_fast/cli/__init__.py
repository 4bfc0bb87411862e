"""The command line, `dllm-fast`."""
