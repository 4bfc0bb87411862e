"""Shared by the benches: models with random weights, a check for an idle machine, interleaved rounds, spreads."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers

from bench import checkout
from dllm_fast import LLaDAConfig, LLaDAModelLM
from dllm_fast.decoding import schedules
from dllm_fast.decoding.graphs import Graphs
from dllm_fast.decoding.spelling import schedule_of

# Factors on a weight's standard deviation of 1 / sqrt(fan in).
GAINS = {"attn_out": 2.0, "model.transformer.ff_out.weight": 6.0}
IDLE_LOAD = 0.25  # load average per core up to which a machine counts as idle


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the default job for it."""

    config: dict
    prompt: int
    gen_length: int
    block_length: int
    schedule: str


SHAPES = {
    "cpu-768": Shape(
        {"d_model": 768, "n_heads": 12, "n_layers": 12, "mlp_hidden_size": 2048, "max_sequence_length": 1024},
        prompt=768, gen_length=128, block_length=32, schedule="uniform=32",
    ),
    "llada-300m": Shape(
        {"d_model": 1024, "n_heads": 16, "n_layers": 14, "mlp_hidden_size": 2816, "weight_tying": True},
        prompt=768, gen_length=128, block_length=32, schedule="uniform=32",
    ),
    "llada-8b": Shape({}, prompt=768, gen_length=256, block_length=32, schedule="uniform=88"),
    # For dtypes and generators that need minutes for the default job.
    "llada-8b-short": Shape({}, prompt=64, gen_length=64, block_length=32, schedule="uniform=16"),
    "illada-8b": Shape(
        {
            "n_kv_heads": 8, "mlp_hidden_size": 14336, "vocab_size": 155136, "embedding_size": 155136,
            "max_sequence_length": 8192, "mask_token_id": 5, "weight_tying": True,
        },
        prompt=768, gen_length=256, block_length=32, schedule="uniform=88",
    ),
    "quick": Shape(
        {
            "d_model": 64, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 96, "max_sequence_length": 128,
            "vocab_size": 1000, "mask_token_id": 999, "eos_token_id": 998, "pad_token_id": 998,
        },
        prompt=24, gen_length=32, block_length=16, schedule="uniform=16",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a bench asks of every generator."""

    ids: torch.Tensor  # [B, P] int64
    gen_length: int
    block_length: int
    schedule: schedules.Schedule
    mask_id: int


@torch.no_grad()
def build_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> LLaDAModelLM:
    """An unpatched native LLaDA of this shape with random weights, made on the device.

    With LLaDA's own initialisation, every [MASK] attends to nearly the same average and predicts the same token with
    little confidence. Comparing such tokens would show little. These gains make each position attend to a few others
    and be influenced by them, and spread the confidences over (0, 1). The head's row for [MASK] is zero so that no
    generator predicts it: not all of them exclude it. A tied head keeps that row, because it is also [MASK]'s
    embedding.
    """
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(**shape.config)).to(dtype).eval()
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    # For queries and keys. With larger gains rounding errors grow by layer: at 2.5, by 10^4 in twelve layers.
    sharp = 1.65 + 1.7 / model.config.n_layers
    gains = {**GAINS, "q_proj": sharp, "k_proj": sharp}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif name == "model.transformer.wte.weight" and not shape.config.get("weight_tying"):
            parameter.normal_(generator=generator)
        else:
            name = name.replace("transformer.wte", "transformer.ff_out")  # if tied, the head's gain applies
            gain = gains.get(name, gains.get(name.split(".")[-2], 1.0))
            parameter.normal_(0.0, gain * parameter.shape[1] ** -0.5, generator=generator)
    if not model.config.weight_tying:
        model.get_output_embeddings().weight[model.config.mask_token_id] = 0.0
    return model


def make_job(shape: Shape, model: LLaDAModelLM, schedule: str, batch: int, seed: int = 0) -> Job:
    """Random prompts of the shape's length, without special ids."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*plain_ids(config), (batch, shape.prompt), generator=generator).to(model.device)
    return Job(ids, shape.gen_length, shape.block_length, schedule_of(schedule), config.mask_token_id)


def plain_ids(config) -> tuple[int, int]:
    """(first, last + 1) of the ids that are not special. Special ids are at either end of the vocabulary."""
    special = [i for i in (config.mask_token_id, config.eos_token_id) if i is not None]
    low = [i + 1 for i in special if i < config.vocab_size // 2]
    return max(low, default=0), min((i for i in special if i >= config.vocab_size // 2), default=config.vocab_size)


def require_idle(force: bool) -> float:
    """The load average of the last minute. Exits if it shows that the machine is busy, unless ``force``."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"load average {load:.2f} on {cores} cores")
    if load > IDLE_LOAD * cores and not force:
        raise SystemExit(
            f"this machine is busy: its load average of {load:.2f} is above {IDLE_LOAD * cores:.2f}. "
            "Ratios from a busy machine mean nothing; wait, or pass --force"
        )
    return load


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """One line that says where, and with which versions, a bench ran."""
    name = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return (
        f"{name}, {str(dtype).removeprefix('torch.')}, {datetime.date.today()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, commit {checkout.commit()}"
    )


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``run`` takes, including the device's work."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


@dataclass
class Timed:
    """Seconds of each round; everything that is compared has the same number of rounds."""

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
    """Time each of ``runs`` once per round. Every round starts with another one, so that none is always first.

    ``before`` is called with a run's name, untimed, before each of its runs. A run that recorded a CUDA graph is timed
    again, so that no time includes a recording.
    """
    times = {name: Timed() for name in runs}
    names = list(runs)
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            before(name)
            times[name].seconds.append(_steady(runs[name], device))
    return times


def _steady(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run that records no CUDA graph. Raises RuntimeError if each of five runs records one."""
    for _ in range(5):
        recordings = Graphs.recordings
        seconds = clock(run, device)
        if Graphs.recordings == recordings:
            return seconds
    raise RuntimeError("each of five runs recorded a CUDA graph: its engine is not kept")


def spread(values: list[float], digits: int = 2, scale: float = 1.0) -> str:
    """Median and range: ``1.23 (1.20-1.31)``."""
    low, middle, high = (scale * x for x in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
