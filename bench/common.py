"""What the engine's benches share: models with random weights, an idle machine, interleaved rounds, spreads."""

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers

import dllm_fast
from dllm_fast import LLaDAConfig, LLaDAModelLM
from dllm_fast.decoding import schedules
from dllm_fast.decoding.graphs import Graphs

# Times the standard deviation 1 / sqrt(fan in) of a weight.
GAINS = {"attn_out": 2.0, "model.transformer.ff_out.weight": 6.0}
IDLE_LOAD = 0.25  # of the cores: what a machine at rest may show as its load average


@dataclass(frozen=True)
class Shape:
    """A model's sizes and the usual job on it."""

    config: dict
    prompt: int
    gen_length: int
    block_length: int
    schedule: str


SHAPES = {
    "cpu-768": Shape(
        {"d_model": 768, "n_heads": 12, "n_layers": 12, "mlp_hidden_size": 2048, "max_sequence_length": 1024},
        prompt=768, gen_length=128, block_length=32, schedule="uniform:32",
    ),
    "llada-300m": Shape(
        {"d_model": 1024, "n_heads": 16, "n_layers": 14, "mlp_hidden_size": 2816, "weight_tying": True},
        prompt=768, gen_length=128, block_length=32, schedule="uniform:32",
    ),
    "llada-8b": Shape({}, prompt=768, gen_length=256, block_length=32, schedule="uniform:88"),
    # For dtypes and generators that would take minutes over the usual job.
    "llada-8b-short": Shape({}, prompt=64, gen_length=64, block_length=32, schedule="uniform:16"),
    "illada-8b": Shape(
        {
            "n_kv_heads": 8, "mlp_hidden_size": 14336, "vocab_size": 155136, "embedding_size": 155136,
            "max_sequence_length": 8192, "mask_token_id": 5, "weight_tying": True,
        },
        prompt=768, gen_length=256, block_length=32, schedule="uniform:88",
    ),
    "quick": Shape(
        {
            "d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 96, "max_sequence_length": 128,
            "vocab_size": 1000, "mask_token_id": 999, "eos_token_id": 998, "pad_token_id": 998,
        },
        prompt=24, gen_length=32, block_length=16, schedule="uniform:16",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What every generator of a bench is asked for."""

    ids: torch.Tensor  # [B, P] int64
    gen_length: int
    block_length: int
    schedule: schedules.Schedule
    mask_id: int


@torch.no_grad()
def build_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> LLaDAModelLM:
    """A native LLaDA of the shape with random weights, made on the device; not patched.

    As a LLaDA is initialised, all [MASK]s see nearly the same average, predict one token and are sure of nothing, so
    that equal tokens would say little. The gains make a position look at a few others, heed what it sees there, and be
    sure of its token to a degree that fills (0, 1). The head's row of [MASK] is zero, so that it is never predicted:
    not every generator excludes it. Where the head is tied that row stays, as it is what a [MASK] looks like.
    """
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(**shape.config)).to(dtype).eval()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    # Of queries and keys. Larger, and roundings would grow from layer to layer: by 10^4 in twelve layers at 2.5.
    sharp = 1.65 + 1.7 / model.config.n_layers
    gains = {**GAINS, "q_proj": sharp, "k_proj": sharp}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif name == "model.transformer.wte.weight" and not shape.config.get("weight_tying"):
            parameter.normal_(generator=generator)
        else:
            name = name.replace("transformer.wte", "transformer.ff_out")  # tied: it is the head that has to be sure
            gain = gains.get(name, gains.get(name.split(".")[-2], 1.0))
            parameter.normal_(0.0, gain * parameter.shape[1] ** -0.5, generator=generator)
    if not model.config.weight_tying:
        model.get_output_embeddings().weight[model.config.mask_token_id] = 0.0
    return model


def make_job(shape: Shape, model: LLaDAModelLM, schedule: str, batch: int, seed: int = 0) -> Job:
    """Random prompts of the shape's length, none of them special ids."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*plain_ids(config), (batch, shape.prompt), generator=generator).to(model.device)
    return Job(ids, shape.gen_length, shape.block_length, parse_schedule(schedule), config.mask_token_id)


def plain_ids(config) -> tuple[int, int]:
    """First and one past the last of a vocabulary's ids between its special ones, which come first or last."""
    special = [i for i in (config.mask_token_id, config.eos_token_id) if i is not None]
    low = [i + 1 for i in special if i < config.vocab_size // 2]
    return max(low, default=0), min((i for i in special if i >= config.vocab_size // 2), default=config.vocab_size)


def parse_schedule(text: str) -> schedules.Schedule:
    """``uniform:32``, ``threshold:0.9``, ``factor:1``, ``pyramid:2``. Raises ValueError for anything else."""
    kind, _, value = text.partition(":")
    kinds = {"uniform": (dllm_fast.Uniform, int), "pyramid": (dllm_fast.Pyramid, int)}
    kinds |= {"threshold": (dllm_fast.Threshold, float), "factor": (dllm_fast.Factor, float)}
    try:
        schedule, number = kinds[kind]
        value = number(value)
    except (KeyError, ValueError):
        raise ValueError(f"--schedule: {text!r} is not one of {', '.join(kinds)} with a number, uniform:32") from None
    return schedule(value)


def parse_refresh(text: str):
    """``block``, ``every:2``, ``window:32,32``, ``drift:0.2``. Raises ValueError for anything else."""
    kind, _, values = text.partition(":")
    kinds = {"every": (dllm_fast.Every, int), "window": (dllm_fast.Window, int), "drift": (dllm_fast.Drift, float)}
    if text == "block":
        return text
    spelling = f"--refresh: {text!r} is not block, every:2, window:32,32 or drift:0.2"
    try:
        policy, number = kinds[kind]
        values = [number(value) for value in values.split(",")]
    except (KeyError, ValueError):
        raise ValueError(spelling) from None
    try:
        return policy(*values)
    except TypeError:
        raise ValueError(spelling) from None


def require_idle(force: bool) -> float:
    """The load average of the last minute. Exits where it says that others are at work, unless ``force``."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"load average {load:.2f} on {cores} cores")
    if load > IDLE_LOAD * cores and not force:
        raise SystemExit(
            f"this machine is busy: a load average of {load:.2f} where {IDLE_LOAD * cores:.2f} would do on {cores} "
            "cores. Ratios of a busy machine are not worth printing; wait, or pass --force"
        )
    return load


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """One line: where and on what versions a bench ran."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return (
        f"{name}, {str(dtype).removeprefix('torch.')}, {datetime.date.today()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, commit {commit or 'unknown'}"
    )


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``run`` takes, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


@dataclass
class Timed:
    """Seconds of each round, of the same number of rounds for all that are compared."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: "Timed") -> list[float]:
        """How many times as long as the other, round by round."""
        return [mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)]


def interleave(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, Timed]:
    """Each of ``runs`` once a round, beginning with another one in each, so that none is always first.

    ``before`` is called with a run's name, untimed, before each of its runs.
    A run that recorded a CUDA graph is timed again: none of the times holds a recording.
    """
    times = {name: Timed() for name in runs}
    names = list(runs)
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            before(name)
            times[name].seconds.append(_steady(runs[name], device))
    return times


def _steady(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run that records nothing. Raises RuntimeError where every one of five does."""
    for _ in range(5):
        recordings = Graphs.recordings
        seconds = clock(run, device)
        if Graphs.recordings == recordings:
            return seconds
    raise RuntimeError("each of five runs recorded a CUDA graph anew: its engine is not kept")


def spread(values: list[float], digits: int = 2, scale: float = 1.0) -> str:
    """Median, and least to most: ``1.23 (1.20-1.31)``."""
    low, middle, high = (scale * x for x in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
