"""Packages, and the optional compiled extension for CPUs, which is left out where it cannot be built.

``kernels/`` has no ``__init__.py`` and ships as ``dllm_fast.kernels``: a top-level package of that name would shadow
Hugging Face's, which transformers imports.
"""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOMS = ("cli", "cpu", "decoding", "evaluate", "families", "ray", "serve", "train")
DATA = ["py.typed", "serve/page.html", "train/fsdp2.yaml", "models/*/*", "hub/custom_generate/*"]
SOURCES = "csrc/cpu"
OPTIONS = ["-std=c++17", "-O3", "-g0", "-pthread", "-fvisibility=hidden", "-ffp-contract=fast"]
OPTIONS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own intrinsics
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# kernels.cpp is compiled once for each of these; which of them runs is decided where it runs, so that a wheel travels.
INSTRUCTION_SETS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}


class Build(build_ext):
    """One source, several times, each with the options and the name of an instruction set."""

    def build_extension(self, extension):
        def compile_(source, folder, options, macros=()):
            return self.compiler.compile(
                [f"{SOURCES}/{source}"],
                output_dir=f"{self.build_temp}/{folder}",
                extra_postargs=[*OPTIONS, *options],
                macros=list(macros),
                depends=extension.depends,
            )

        sources = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
        objects = compile_("library.cpp", "library", [], [("SOURCES", f'"{sources}"')])
        for name, options in INSTRUCTION_SETS.items():
            objects += compile_("kernels.cpp", name, options, [("TABLE", name)])
        target = self.get_ext_fullpath(extension.name)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")


files = sorted(map(str, Path(SOURCES).iterdir()))
setup(
    packages=["dllm_fast", *(f"dllm_fast.{room}" for room in ROOMS), "dllm_fast.kernels"],
    package_dir={"dllm_fast.kernels": "kernels"},
    include_package_data=False,  # or MANIFEST.in's files count as data, and a folder of them as a package left out
    package_data={"dllm_fast": DATA},
    ext_modules=[Extension("dllm_fast._cpu", [f for f in files if f.endswith(".cpp")], depends=files, optional=True)],
    cmdclass={"build_ext": Build},
)
