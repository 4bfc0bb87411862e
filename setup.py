"""Packages. ``kernels/`` has no ``__init__.py`` and ships as ``dllm_fast.kernels``: a top-level package of that name
would shadow Hugging Face's, which transformers imports."""

from setuptools import setup

setup(
    packages=["dllm_fast", "dllm_fast.families", "dllm_fast.kernels"],
    package_dir={"dllm_fast.kernels": "kernels"},
    package_data={"dllm_fast": ["py.typed", "models/*/*"]},
)
