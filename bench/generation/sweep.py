"""Times settings of `generate`, and other people's generators, in interleaved rounds on one model."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import dllm_fast
from bench.common import Job, Timed, interleave
from bench.floors import Floors
from bench.generation.cost import Cost
from bench.generation.settings import Setting
from bench.generation.stack import stacked
from bench.generation.subjects import Subject
from bench.generation.watch import Step, watching
from bench.peers import Peer, find_peers, twin

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Trial:
    """A setting at a batch size: its first run's results, and its timed runs' seconds."""

    setting: Setting
    run: Callable[[], dllm_fast.Output]
    output: dllm_fast.Output
    trace: list[Step]  # of the first run, with counts of masked positions
    peak: int | None  # peak bytes: of the device's allocator, on a CPU of the process
    rounds: list[list[Step]] = field(default_factory=list)

    def watched(self) -> None:
        with watching() as steps:
            self.run()
        self.rounds.append(steps)


@dataclass(frozen=True)
class Rates:
    """The machine's measured peak rates: bytes per second, and FLOPs per second in the model's dtype."""

    copy: float
    matrix: float

    @classmethod
    def of(cls, floors: Floors, dtype: torch.dtype) -> "Rates":
        return cls(floors.copy_bandwidth, (floors.fp32 if dtype == torch.float32 else floors.bf16).median)


def time_settings(
    subject: Subject, settings: list[Setting], ids: torch.Tensor, rates: Rates, rounds: int, specs: list[str] | None
) -> dict:
    """(rows of ``settings`` on the prompts ``ids`` [B, P], rows of the peers ``specs``, why others did not run).

    ``specs`` None: no peers. Everything runs once, untimed, for its tokens, steps and memory.
    """
    device, trials, lines = subject.model.device, {}, []
    for setting in settings:
        try:
            trials[setting.name] = _first(subject, setting, ids)
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            lines.append(f"{setting.name}: not run: {str(error)[:150]}")
    peers, failed = _first_peers(subject, trials, ids, specs)
    runs = {name: trial.watched for name, trial in trials.items()} | {name: peer.run for name, peer in peers.items()}
    # A setting's runs follow each other, because the engine keeps recorded graphs of the last few settings only.
    again = {name: trial.run for name, trial in trials.items()} if device.type == "cuda" else {}
    times = interleave(runs, rounds, device, before=lambda name: again[name]() if name in again else None)
    rows = [_row(subject, trial, times[name], ids, rates) for name, trial in trials.items()]
    return {"rows": rows, "peers": [peer.row(times, ids) for peer in peers.values()], "not_run": lines + failed}


def _first(subject: Subject, setting: Setting, ids: torch.Tensor) -> Trial:
    shape, device = subject.shape, subject.model.device
    run = functools.partial(
        dllm_fast.generate, subject.model, ids, gen_length=shape.gen_length, seed=0, **setting.options()
    )
    if device.type == "cuda":
        dllm_fast.patch(dllm_fast.unpatch(subject.model))  # frees what other settings' engines hold
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets the kernel's peak
    with watching(look=True) as trace:
        output = run()
    return Trial(setting, run, output, trace, _peak(device))


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = STATUS.read_text().splitlines() if CLEAR.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def _row(subject: Subject, trial: Trial, times: Timed, ids: torch.Tensor, rates: Rates) -> dict:
    batch, gen, output = ids.shape[0], subject.shape.gen_length, trial.output
    floors = _floors(subject, trial, batch, ids.shape[1] + gen, rates)
    kinds = {}
    for kind in dict.fromkeys(step.kind for step in trial.trace):
        here = [n for n, step in enumerate(trial.trace) if step.kind == kind]
        ms = [1e3 * statistics.mean(steps[n].seconds for n in here) for steps in trial.rounds]
        floor = 1e3 * statistics.mean(floors[n] for n in here)
        kinds[kind] = {"steps": len(here), "ms": ms, "floor_ms": floor}
    parts = stacked(trial.run, subject.model.device, times.median)
    return {
        "setting": trial.setting.facts(), "batch": batch, "prompt": ids.shape[1], "new_tokens": batch * gen,
        "nfe": output.nfe, "nfe_full": output.nfe_full, "nfe_block": output.nfe_block, "positions": output.positions,
        "tokens_per_nfe": gen / output.nfe, "seconds": times.seconds, "tokens_per_s": batch * gen / times.median,
        "kinds": kinds, "floor_seconds": sum(floors), "over_floor": times.median / sum(floors),
        "ms_per_nfe": {part: ms / output.nfe for part, ms in parts.items()}, "peak_bytes": trial.peak,
    }  # fmt: skip


def _floors(subject: Subject, trial: Trial, batch: int, slots: int, rates: Rates) -> list[float]:
    """A lower bound of each step's seconds: its bytes at the copy rate or its FLOPs at the matmul rate."""
    cost, cached = Cost.of(subject.model), trial.setting.cache != "none"
    live = batch * trial.setting.block_length
    reading = cost.bytes(batch, slots, cached) / rates.copy
    return [max(reading, cost.flops(step.positions, live, step.masked, slots) / rates.matrix) for step in trial.trace]


# Peers


@dataclass
class _Timed:
    """A peer, and the setting of ours that it is compared with."""

    peer: Peer
    ours: Trial
    tokens: torch.Tensor  # [B, gen_length]
    nfe: int | None

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.ours.setting.schedule} blocks={self.ours.setting.block_length}"

    def run(self) -> None:
        self.peer.run()

    def row(self, times: dict[str, Timed], ids: torch.Tensor) -> dict:
        mine, its = times[self.ours.setting.name], times[self.name]
        same = self.ours.output.sequences[:, ids.shape[1] :] == self.tokens
        return {
            "peer": self.peer.name, "schedule": self.ours.setting.schedule, "ours": self.ours.setting.name,
            "batch": ids.shape[0], "same_algorithm": self.peer.cache == self.ours.setting.cache, "nfe": self.nfe,
            "same_tokens": int(same.sum()), "new_tokens": same.numel(), "seconds": its.seconds,
            "tokens_per_s": same.numel() / its.median, "times_ours": its.over(mine),
        }  # fmt: skip


def _first_peers(subject, trials: dict[str, Trial], ids, specs) -> tuple[dict[str, _Timed], list[str]]:
    """Run every peer once on every schedule of our plain greedy settings that ran."""
    found, lines = {}, []
    if specs is None:
        return found, lines
    plain = {}
    for trial in trials.values():
        s = trial.setting
        if (s.refresh, s.remask, s.confidence, s.temperature) == ("block", "none", "probability", 0.0):
            plain.setdefault((s.schedule, s.block_length), {})[s.cache] = trial
    model = twin(subject.model)
    for (schedule, block_length), ours in plain.items():
        rule = next(iter(ours.values())).setting.options()["schedule"]
        job = Job(ids, subject.shape.gen_length, block_length, rule, model.config.mask_token_id)
        peers, failed = find_peers(specs, model, job)
        lines += [f"{schedule}: {line}" for line in failed]
        for peer in peers:
            # A peer with a cache unlike ours is compared with the dual cache.
            trial = ours.get(peer.cache or "dual")
            if trial is None:
                lines.append(f"{schedule}: {peer.name}: not run: no setting with cache {peer.cache or 'dual'}")
                continue
            try:
                timed = _Timed(peer, trial, *peer.run())
                found[timed.name] = timed
            except Exception as error:  # anything, since the code is not ours
                lines.append(f"{schedule}: {peer.name}: not run: {type(error).__name__}: {str(error)[:150]}")
    return found, lines
