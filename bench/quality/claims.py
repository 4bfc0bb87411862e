"""Tests other people's claims about schedules against the scores. Each claim gets its figures and a verdict.

All settings answer the same problems, so they are compared problem by problem. A verdict is decided by 95 % intervals:
"holds", "fails", or "undecided" if there are too few problems to tell.
"""

import math
from dataclasses import asdict, dataclass, field
from statistics import NormalDist

import torch

from bench.quality.accuracy import Z

MARGIN = 0.01  # "costs no accuracy" means a cost of less than one point
RESAMPLES = 2000


@dataclass
class Claim:
    said: str
    by: str
    verdict: str
    because: str  # the figure that decided the verdict
    figures: list[str] = field(default_factory=list)


class Scores:
    """The rows of `bench.quality.accuracy.score` by setting, with each problem's outcome."""

    def __init__(self, rows: list[dict]):
        self.rows = {row["setting"]["name"]: row for row in rows}
        self.right = {
            name: torch.tensor([bit == "1" for one in row["seeds"] for bit in one["right"]], dtype=torch.float64)
            for name, row in self.rows.items()
        }  # [N] each
        self.nfe = {
            name: torch.tensor([n for one in row["seeds"] for n in one["nfe"]], dtype=torch.float64)
            for name, row in self.rows.items()
        }

    def plain(self, kind: str, cache: str = "none") -> list[str]:
        """Names of a schedule's settings with defaults for everything else, in order of NFE."""
        usual = {"cache": cache, "refresh": "block", "remask": "none", "confidence": "probability", "block_length": 32}
        found = [
            name for name, row in self.rows.items()
            if row["setting"]["schedule"].partition("=")[0] == kind
            and all(row["setting"][key] == value for key, value in usual.items())
        ]  # fmt: skip
        return sorted(found, key=lambda name: self.rows[name]["nfe"])

    def share(self, name: str) -> str:
        row = self.rows[name]
        low, high = row["interval"]
        return f"{name}: {row['exact']:.1%} right ({low:.1%} to {high:.1%}) at NFE {row['nfe']:.1f}"

    def less(self, a: str, b: str, tests: int = 1) -> tuple[float, float, float]:
        """a's share minus b's, with an interval that holds for ``tests`` comparisons at once (Bonferroni)."""
        return paired(self.right[a], self.right[b], NormalDist().inv_cdf(1 - 0.025 / tests))

    def curve(self, names: list[str], at: torch.Tensor, pick: torch.Tensor | None = None) -> torch.Tensor:
        """A schedule's accuracy at NFE ``at`` [K], interpolated linearly, over the problems ``pick`` [R, N]."""
        pick = torch.arange(len(self.right[names[0]]))[None] if pick is None else pick
        x, order = torch.stack([self.nfe[name][pick].mean(1) for name in names], 1).sort(1)  # [R, S]
        y = torch.stack([self.right[name][pick].mean(1) for name in names], 1).gather(1, order)
        at = at.expand(len(pick), -1) if at.dim() < 2 else at
        upper = torch.searchsorted(x, at.contiguous()).clamp(1, len(names) - 1)
        x0, x1, y0, y1 = (v.gather(1, i) for v, i in ((x, upper - 1), (x, upper), (y, upper - 1), (y, upper)))
        share = ((at - x0) / (x1 - x0).clamp(min=1e-9)).clamp(0, 1)
        return y0 + share * (y1 - y0)  # [R, K]


def paired(a: torch.Tensor, b: torch.Tensor, z: float = Z) -> tuple[float, float, float]:
    """The difference of two shares of right answers to the same problems [N], with ``z`` standard errors either way.

    Half a problem is added to each of the four outcomes (Agresti and Min 2005), so that the interval is never empty.
    """
    gained, lost, count = int((a > b).sum()), int((b > a).sum()), len(a)
    middle = (gained - lost) / (count + 2)
    spread = math.sqrt((gained + lost + 1) - (gained - lost) ** 2 / (count + 2)) / (count + 2)
    return (gained - lost) / count, middle - z * spread, middle + z * spread


def points(difference: tuple[float, float, float]) -> str:
    return "{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * x for x in difference))


def better(difference: tuple[float, float, float]) -> str:
    _, low, high = difference
    return "holds" if low > 0 else "fails" if high < 0 else "undecided"


def harmless(difference: tuple[float, float, float]) -> str:
    _, low, high = difference
    return "holds" if low > -MARGIN else "fails" if high < 0 else "undecided"


# The claims


def pyramid(scores: Scores) -> Claim | None:
    """Compare each Pyramid with the Uniform of the same NFE. The lowest NFE decides."""
    pairs = []
    for name, row in scores.rows.items():
        if row["setting"]["schedule"].startswith("pyramid") and row["setting"]["cache"] == "none":
            other = name.replace(row["setting"]["schedule"], f"uniform={round(row['nfe'])}")
            if other in scores.rows:
                pairs.append((row["nfe"], name, other))
    if not pairs:
        return None
    pairs.sort()
    figures = [f"NFE {nfe:g}: {a} minus {b}: {points(scores.less(a, b))}" for nfe, a, b in pairs]
    verdict = better(scores.less(*pairs[0][1:]))
    return Claim("pyramid beats uniform at low NFE", "the re-masking post", verdict, figures[0], figures)


def token_by_token(scores: Scores, tokens: int) -> Claim | None:
    """Compare one token per step with everything else: exact means that nothing is better, in any order."""
    one = f"uniform={tokens} none"
    others = [name for name in scores.rows if name != one]
    if one not in scores.rows or not others:
        return None
    found = {name: scores.less(name, one, len(others)) for name in others}
    best = max(others, key=lambda name: found[name][1])
    figures = [scores.share(one), f"the best of {len(others)} others, {best}: {points(found[best])}, for all at once"]
    verdict, ordered = "fails" if found[best][1] > 0 else "holds", f"{one} random"
    if ordered in scores.rows:
        difference = scores.less(ordered, one)
        figures.append(f"in random order, {ordered}: {points(difference)}")
        verdict = harmless(difference) if verdict == "holds" else verdict
    because = figures[1 if found[best][1] > 0 else -1]
    return Claim("token by token is exact", "the LLaDA issue", verdict, because, figures)


def threshold(scores: Scores, tokens: int) -> Claim | None:
    one, fast = f"uniform={tokens} none", "threshold=0.9 none"
    if not {one, fast} <= scores.rows.keys():
        return None
    difference = scores.less(fast, one)
    figures = [scores.share(fast), scores.share(one), f"difference: {points(difference)}"]
    return Claim("threshold 0.9 costs no accuracy", "Fast-dLLM", harmless(difference), figures[-1], figures)


def factor(scores: Scores) -> Claim | None:
    """Compare Factor's settings with Threshold's curve at the same NFE, averaged over the NFE that the curve covers."""
    mine, its = scores.plain("factor"), scores.plain("threshold")
    if not mine or len(its) < 2:
        return None
    low, high = scores.rows[its[0]]["nfe"], scores.rows[its[-1]]["nfe"]
    inside = [name for name in mine if low <= scores.rows[name]["nfe"] <= high]
    if not inside:
        return None
    generator, count = torch.Generator().manual_seed(0), len(scores.right[mine[0]])
    picks = [None, torch.randint(count, (RESAMPLES, count), generator=generator)]
    gains = []
    for pick in picks:
        drawn = torch.arange(count)[None] if pick is None else pick
        at = torch.stack([scores.nfe[name][drawn].mean(1) for name in inside], 1)  # [R, K]
        right = torch.stack([scores.right[name][drawn].mean(1) for name in inside], 1)
        gains.append(right - scores.curve(its, at, drawn))
    middle, drawn = gains[0].mean(), gains[1].mean(1)
    difference = (float(middle), float(drawn.quantile(0.025)), float(drawn.quantile(0.975)))
    figures = [
        f"{name} at NFE {scores.rows[name]['nfe']:.1f}: {100 * float(gain):+.1f} points above threshold's curve"
        for name, gain in zip(inside, gains[0][0])
    ]
    figures.append(f"on average {points(difference)}, by the bootstrap")
    return Claim("factor is better than threshold", "Fast-dLLM", better(difference), figures[-1], figures)


def dual(scores: Scores) -> Claim | None:
    """Compare every plain setting with the dual cache to the same one without a cache."""
    pairs = [(name, name.replace(" dual", " none")) for kind in ("uniform", "threshold", "factor", "pyramid")
             for name in scores.plain(kind, "dual")]  # fmt: skip
    pairs = [pair for pair in pairs if pair[1] in scores.rows]
    if not pairs:
        return None
    found = [(scores.less(a, b), a, b) for a, b in pairs]
    verdicts = [harmless(difference) for difference, _, _ in found]
    verdict = next((v for v in ("fails", "undecided") if v in verdicts), "holds")
    figures = [f"{a} minus {b}: {points(difference)}" for difference, a, b in found]
    worst = min(range(len(found)), key=lambda n: found[n][0][1])
    return Claim("the dual cache costs no accuracy", "Fast-dLLM", verdict, figures[worst], figures)


def claims(rows: list[dict], tokens: int) -> list[dict]:
    """The claims that the settings allow to be tested."""
    scores = Scores(rows)
    found = [pyramid(scores), token_by_token(scores, tokens), threshold(scores, tokens), factor(scores), dual(scores)]
    return [asdict(claim) for claim in found if claim is not None]
