"""The Triton kernels that some code would launch, compiled side by side instead of one after the other."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from dllm_fast import launchers

THREADS = 16  # more than a step has kernels to compile at a time


def kernels() -> list:
    """Every function of `dllm_fast.kernels` that Triton compiles; none in its interpreter, which compiles nothing.

    Raises ImportError where Triton does not work."""
    from triton.runtime.jit import JITFunction

    launchers.triton()  # imports them
    modules = [module for name, module in sys.modules.items() if name.startswith("dllm_fast.kernels.")]
    found = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    return list(found.values())


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """Within it, this thread's launches of the package's kernels launch nothing: what they lack is compiled, in
    threads. At its end all of it is compiled; what could not be is compiled again, and raises, when it is launched.

    The tensors that they would have written hold arbitrary values. Other threads launch as usual. Where Triton has no
    `AsyncCompileMode`, one kernel is compiled after the other.
    """
    mine, wrapped = threading.get_ident(), []

    def compiles_only(run):
        def launch(*args, warmup, **options):
            return run(*args, warmup=warmup or threading.get_ident() == mine, **options)

        return launch

    try:
        with contextlib.ExitStack() as stack:
            try:
                from triton import AsyncCompileMode
            except ImportError:
                pass
            else:
                executor = stack.enter_context(ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)))
                stack.enter_context(AsyncCompileMode(executor, ignore_errors=True))
            for kernel in kernels():
                kernel.run = compiles_only(kernel.run)
                wrapped.append(kernel)
            yield
    finally:
        for kernel in wrapped:
            del kernel.run  # the class's serves again
