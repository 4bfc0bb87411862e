"""Each kernel against its peers: ``python -m pytest --import-mode=importlib bench/ops/kernels.py -k attention``.

A case is one op on one shape of LLaDA-8B or ModernBERT; a test is one implementation of it. The first test of a case
holds every implementation against fp64, then times all of them in turns (`bench.ops.timing`); each test then hands its
times to pytest-benchmark through a clock of our own, so that ``--benchmark-save`` and ``--benchmark-compare`` know
device times and not launches. A table and one JSON line end the run (`bench.report.tables`). Options: ``--device``,
``--quick`` (tiny shapes: a dry run, in Triton's interpreter without a GPU).

Nothing is imported here on purpose: with this folder on the path, transformers finds this file when it looks for
Hugging Face's package of the same name.
"""


class Clock:
    """What pytest-benchmark reads instead of the host's clock."""

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
