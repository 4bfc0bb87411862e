"""Each kernel against its peers: ``python -m pytest --import-mode=importlib bench/ops/kernels.py -k attention``.

A case is one op on one shape of LLaDA-8B or ModernBERT; a test is one implementation of it. A case's first test
compares every implementation with fp64, then times all of them in turns (`bench.ops.timing`). Each test passes its
times to pytest-benchmark through our own clock, so that ``--benchmark-save`` and ``--benchmark-compare`` get device
times, not launch times. A table and one JSON line end the run (`bench.report.tables`). Options: ``--device``,
``--quick`` (tiny shapes for a dry run, in Triton's interpreter without a GPU).

This file deliberately imports nothing of its own: with this folder on the path, transformers takes it for Hugging
Face's package of the same name.
"""


class Clock:
    """A clock that pytest-benchmark reads instead of the host's."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def test_kernel(case, implementation, measured, benchmark):
    import pytest

    result = measured(case)[implementation]
    if result.error:
        pytest.skip(f"{implementation}: {result.error}")
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, how=result.how, relative_error=result.relative)
    times = iter(result.times)
    benchmark.pedantic(lambda: CLOCK.advance(next(times)), rounds=len(result.times))
