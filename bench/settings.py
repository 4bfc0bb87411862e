"""What bench/nfe.py runs: settings of `dllm_fast.generate`, spelled as ``dllm-fast generate`` spells them."""

import itertools
from dataclasses import asdict, dataclass

from dllm_fast.cli import refresh_of, remask_of, schedule_of

SAMPLED = ("first-hitting", "ancestral")  # samplers of the process itself, which are defined at temperature 1
ADAPTIVE = ("threshold", "factor", "entropy-bound")  # they look at the model's confidence
BLOCK = 32  # a block length that goes without saying
OWN_CONFIDENCE = ("first-hitting", "ancestral", "entropy-bound")


@dataclass(frozen=True)
class Setting:
    """One way to generate. Fields are text, so that they go into tables and files as they are."""

    schedule: str
    cache: str = "dual"
    refresh: str = "block"
    remask: str = "none"
    confidence: str = "probability"
    block_length: int = BLOCK

    @property
    def kind(self) -> str:
        """The schedule without its number: ``uniform``."""
        return self.schedule.partition("=")[0]

    @property
    def value(self) -> float | None:
        """The schedule's number, if it has one."""
        text = self.schedule.partition("=")[2].partition(",")[0]
        return float(text) if text else None

    @property
    def temperature(self) -> float:
        return 1.0 if self.kind in SAMPLED else 0.0

    @property
    def name(self) -> str:
        """Schedule, cache and what is not as usual: ``uniform=32 dual every=2``."""
        parts = [self.schedule, self.cache]
        parts += [part for part, usual in ((self.refresh, "block"), (self.remask, "none")) if part != usual]
        parts += [self.confidence] if self.confidence != "probability" else []
        parts += [f"blocks={self.block_length}"] if self.block_length != BLOCK else []
        return " ".join(parts)

    def options(self) -> dict:
        """`dllm_fast.generate`'s arguments. Raises argparse.ArgumentTypeError for text that spells nothing."""
        return {
            "schedule": schedule_of(self.schedule), "cache": self.cache, "refresh": refresh_of(self.refresh),
            "remask": None if self.remask == "none" else remask_of(self.remask), "confidence": self.confidence,
            "temperature": self.temperature, "block_length": self.block_length,
        }  # fmt: skip

    def facts(self) -> dict:
        return {"name": self.name, **asdict(self), "temperature": self.temperature}


def short_names(rows: list[dict]) -> list[str]:
    """Names of timed rows' settings: without a block length that all have, with a batch size that not all have."""
    lengths, batches = {row["setting"]["block_length"] for row in rows}, {row["batch"] for row in rows}
    shared = f" blocks={min(lengths)}" if len(lengths) == 1 else ""
    found = [row["setting"]["name"].removesuffix(shared) for row in rows]
    return [name + f" batch={row['batch']}" * (len(batches) > 1) for name, row in zip(found, rows)]


def swept(schedules, caches, refreshes, remasks, confidences, block_lengths) -> list[Setting]:
    """Every combination, without those that differ in nothing: no cache has nothing to refresh."""
    found = {}
    for choice in itertools.product(schedules, caches, refreshes, remasks, confidences, block_lengths):
        setting = Setting(*choice)
        if setting.cache == "none" and setting.refresh != "block":
            continue
        if setting.kind in OWN_CONFIDENCE and setting.confidence != confidences[0]:
            continue
        found[setting] = None
    return list(found)


def study(tokens: int, full: bool) -> list[Setting]:
    """Settings that draw accuracy against NFE on a task of ``tokens`` new tokens; ``full`` False: a few of them.

    Every family of schedules from one token a step to many, without a cache, so that a schedule's accuracy is its
    own; then, at one schedule, confidences, self-correction, caches and refreshes.
    """
    shares = (1, 2, 3, 4, 6, 8, 16) if full else (1, 4, 8)
    steps = sorted({max(2, tokens // share // 2 * 2) for share in shares}, reverse=True)  # two blocks share them
    some = Setting(f"uniform={tokens // 4}", "none")
    alone = [f"uniform={n}" for n in steps] + [f"pyramid={n}" for n in ((1, 2, 4) if full else (1,))]
    alone += [f"threshold={t}" for t in ((0.5, 0.7, 0.9, 0.95, 0.99) if full else (0.7, 0.9))]
    alone += [f"factor={f}" for f in ((0.25, 0.5, 1, 2) if full else (0.5, 1))]
    alone += [f"entropy-bound={g}" for g in ((0.01, 0.1, 0.5, 1) if full else (0.1,))]
    found = [Setting(schedule, "none") for schedule in alone]
    # Each pyramid has a uniform of just its NFE beside it: they are compared at equal NFE.
    found += [Setting(f"uniform={nfe}", "none") for nfe in pyramid_steps(tokens, (1, 2, 4) if full else (1,))]
    found += [Setting("first-hitting", "none")]
    found += [Setting(f"ancestral={n}", "none") for n in (steps[:4] if full else ())]
    chosen = ("uniform", "threshold=0.9") if full else ()
    for schedule in chosen:
        schedules = [some.schedule] if schedule == "uniform" else [schedule]
        found += swept(schedules, ["none"], ["block"], ["none"], ["margin", "entropy", "random"], [BLOCK])
        found += swept(schedules, ["none"], ["block"], ["remdm=0.2", "verify=0.7", "p2=1"], ["probability"], [BLOCK])
        refreshes = ["block", "every=2", "window=32,0", "drift=0.2"]
        found += swept(schedules, ["prefix", "dual"], refreshes, ["none"], ["probability"], [BLOCK])
    found += [Setting("threshold=0.5", "none", remask="verify=0.9")] if full else []
    found += [Setting(f"uniform={tokens}", "dual"), Setting("threshold=0.9", "dual")]
    return list(dict.fromkeys(found))


def pyramid_steps(tokens: int, factors: tuple[int, ...], block: int = BLOCK) -> list[int]:
    """Steps that each pyramid takes for ``tokens`` in blocks."""
    found = []
    for factor in factors:
        step = kept = 0
        while kept < block:
            kept, step = kept + step // factor + 1, step + 1
        found.append(step * (tokens // block))
    return found
