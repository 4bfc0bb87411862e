"""Accuracy under parallelism, by hand, and its bench on a handful of problems."""

import math

import pytest

from bench.quality import parallel


def test_area_by_hand():
    # One point: tokens a forward times accuracy.
    assert parallel.aup([(1.0, 74.0)], 75.0) == 74.0
    # The best accuracy has weight 1: 1 * 80, then a rectangle of 2 * 80.
    assert parallel.aup([(3.0, 80.0), (1.0, 80.0)], 80.0) == pytest.approx(240.0)
    # A weight of exp(-3 (1 - 76/80)) at the end, and that of the best at the beginning.
    end = 76 * math.exp(-0.15)
    assert parallel.aup([(1.0, 80.0), (2.0, 76.0)], 80.0) == pytest.approx(80 + (80 + end) / 2)
    # No bonus above the best.
    assert parallel.aup([(1.0, 80.0), (2.0, 84.0)], 80.0) == pytest.approx(80 + (80 + 84) / 2)
    # A point more than 5 below the first is left out, in the middle too.
    points = [(1.0, 80.0), (2.0, 70.0), (3.0, 76.0), (9.0, 74.9)]
    assert parallel.aup(points, 80.0) == pytest.approx(80 + 2 * (80 + end) / 2)
    # d3LLM's own figures for its LLaDA on GSM8K: 1 token at 74.02, 9.11 at 73.09, of 74.98 at best.
    first, last = (y * math.exp(-3 * (1 - y / 74.98)) for y in (74.02, 73.09))
    expected = 74.02 + 8.11 * (first + last) / 2
    assert parallel.aup([(1.0, 74.02), (9.11, 73.09)], 74.98) == pytest.approx(expected)


WAYS = ("one block", "d2f=0.1,0.95", "multi-block=0.1")


def test_the_bench_on_a_few_problems():
    """Every way is asked, and each gives more tokens a forward with a lower threshold."""
    thresholds = {"probability": (0.5, 0.99)}
    rows = parallel.run("llada-steps", 4, 4, ("dual", "prefix"), WAYS, thresholds)
    assert len(rows) == 15
    for start in range(0, 15, 3):
        one, low, high = rows[start : start + 3]
        assert one.threshold is None and one.parallelism <= 1.0 and one.accuracy == 100.0
        assert low.parallelism > high.parallelism > 1.0
    areas = parallel.areas(rows, 100.0)
    assert len(areas) == 5 and all(area >= 100.0 for area in areas.values())
    assert [len(line) for line in parallel.table(rows)] == [7] * 15
    assert [line[:3] for line in parallel.summary(rows, 100.0)] == [list(curve) for curve in areas]
