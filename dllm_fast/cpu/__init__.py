"""The compiled extension for CPUs: loading it, its ops, and which matmul serves."""
