"""What `nfe` runs: settings of `dllm_fast.generate`, spelled as ``dllm-fast generate`` spells them."""

import itertools
from dataclasses import asdict, dataclass

from dllm_fast.decoding.spelling import refresh_of, remask_of, schedule_of

SAMPLED = ("first-hitting", "ancestral")  # they sample the diffusion process itself, which needs temperature 1
ADAPTIVE = ("threshold", "factor", "entropy-bound")  # they depend on the model's confidence
BLOCK = 32  # the default, which names leave out
OWN_CONFIDENCE = ("first-hitting", "ancestral", "entropy-bound")


@dataclass(frozen=True)
class Setting:
    """One way to generate. Fields are text, ready for tables and files."""

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
        """Schedule, cache, and whatever is not at its default: ``uniform=32 dual every=2``."""
        parts = [self.schedule, self.cache]
        parts += [part for part, default in ((self.refresh, "block"), (self.remask, "none")) if part != default]
        parts += [self.confidence] if self.confidence != "probability" else []
        parts += [f"blocks={self.block_length}"] if self.block_length != BLOCK else []
        return " ".join(parts)

    def options(self) -> dict:
        """`dllm_fast.generate`'s arguments. Raises argparse.ArgumentTypeError for text that names no policy."""
        return {
            "schedule": schedule_of(self.schedule), "cache": self.cache, "refresh": refresh_of(self.refresh),
            "remask": None if self.remask == "none" else remask_of(self.remask), "confidence": self.confidence,
            "temperature": self.temperature, "block_length": self.block_length,
        }  # fmt: skip

    def facts(self) -> dict:
        return {"name": self.name, **asdict(self), "temperature": self.temperature}


def short_names(rows: list[dict]) -> list[str]:
    """Names of timed rows' settings, without a block length that all share and with batch sizes that differ."""
    lengths = {row["setting"]["block_length"] for row in rows}
    batches = {row["batch"] for row in rows}
    shared = f" blocks={min(lengths)}" if len(lengths) == 1 else ""
    found = [row["setting"]["name"].removesuffix(shared) for row in rows]
    return [name + f" batch={row['batch']}" * (len(batches) > 1) for name, row in zip(found, rows)]


def swept(schedules, caches, refreshes, remasks, confidences, block_lengths) -> list[Setting]:
    """Every combination, without duplicates: a refresh changes nothing without a cache."""
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
    """Settings for accuracy against NFE on a task of ``tokens`` new tokens; only a few of them unless ``full``.

    Every schedule runs from one token per step to many, without a cache, so that its accuracy is its own. Then two of
    these run with other confidences, self-correction, caches and refreshes.
    """
    one, some, sure = f"uniform={tokens}", f"uniform={tokens // 4}", "threshold=0.9"
    if not full:
        alone = [one, some, f"uniform={tokens // 8}", "threshold=0.7", sure, "factor=0.5", "factor=1"]
        found = [Setting(name, "none") for name in [*alone, "entropy-bound=0.1"]]
        found += [*_pyramids(tokens, (1,), BLOCK), Setting(one, "dual"), Setting(sure, "dual")]
        return list(dict.fromkeys(found))
    # Even numbers, because two blocks share the steps.
    alone = [f"uniform={max(2, tokens // share // 2 * 2)}" for share in (1, 2, 3, 4, 6, 8, 16)]
    alone += [f"threshold={t}" for t in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)]
    alone += [f"factor={f}" for f in (0.1, 0.25, 0.5, 1, 2, 4)]
    alone += [f"entropy-bound={g}" for g in (0.001, 0.01, 0.1, 0.5, 1)]
    alone += ["first-hitting", *(f"ancestral={tokens // share}" for share in (1, 2, 4))]
    found = [Setting(schedule, "none") for schedule in alone]
    found += _pyramids(tokens, (1, 2, 4), BLOCK) + _pyramids(tokens, (1, 2, 4), tokens)
    found += [Setting(one, "none", confidence="random"), Setting("threshold=0.5", "none", remask="verify=0.9")]
    found += [Setting(name, "dual") for name in (one, f"uniform={tokens // 8}", "threshold=0.7", "factor=1")]
    short = BLOCK // 2  # more blocks, or refreshes would not differ
    refreshes = ["block", "every=2", f"window={short},0", "drift=0.2"]
    for schedule in (some, sure):
        found += swept([schedule], ["none"], ["block"], ["none"], ["margin", "entropy", "random"], [BLOCK])
        found += swept([schedule], ["none"], ["block"], ["remdm=0.2", "verify=0.7", "p2=1"], ["probability"], [BLOCK])
        found += [Setting(schedule, "prefix"), Setting(schedule, "dual")]
        found += swept([schedule], ["none", "prefix", "dual"], refreshes, ["none"], ["probability"], [short])
    return list(dict.fromkeys(found))


def _pyramids(tokens: int, factors: tuple[int, ...], block: int) -> list[Setting]:
    """Pyramids, each with the Uniform of the same NFE to compare it with."""
    found = []
    for factor in factors:
        step = kept = 0
        while kept < block:
            kept += step // factor + 1
            step += 1
        steps = step * (tokens // block)
        found += [Setting(name, "none", block_length=block) for name in (f"pyramid={factor}", f"uniform={steps}")]
    return found
