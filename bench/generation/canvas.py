"""DiffusionGemma's denoising step, patched and unpatched: ``python -m bench.generation.canvas``

Random weights of the real architecture, two narrow layers, V = 262,144 and a canvas of 256, so that a step is nearly
all head: logits, sampling, entropies, soft embedding. Both loops denoise the same canvas in turns, with stopping
switched off; a step's time is the median of those between a canvas' first and last. Beside them the step's two matmuls
alone, [L, d] with [d, V] and [L, V] with [V, d], in the patched step's tiles. Peak memory is what a whole canvas takes
above what the process held before it. Both loops must have the same argmax canvas after a first step from the same
random canvas. Ends with one JSON line.
"""

import argparse
import ctypes
import functools
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import dllm_fast
from bench.common import interleave, machine, require_idle, spread
from dllm_fast.cli.view import print_table
from dllm_fast.families import canvas
from dllm_fast.families.diffusion_gemma import STEP

VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
}  # fmt: skip
PROMPT = 16


@dataclass
class Row:
    """seconds: of a step, by round. matmuls: its two matmuls alone. peak: bytes. times: how many times as fast."""

    hidden: int
    rows: int
    seconds: dict[str, list[float]]
    matmuls: list[float]
    peak: dict[str, int]
    times: list[float]


def build(hidden: int, vocabulary: int, length: int, dtype: torch.dtype, device: torch.device):
    """A DiffusionGemma of this width with two layers, made on the device."""
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=64, global_head_dim=64, num_experts=4, top_k_experts=2,
        moe_intermediate_size=64,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=transformers.Gemma4VisionConfig(**VISION), canvas_length=length
    )
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.DiffusionGemmaForBlockDiffusion(config).to(dtype).eval()


class Memory:
    """Bytes that the process, or the GPU, takes at most above what it holds now."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # or what runs before this one freed would be reused, and not counted
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark becomes what is held
            self.before = resident("VmRSS")

    def peak(self) -> int:
        cuda = self.device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self.device) if cuda else resident("VmHWM")) - self.before


def resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Drafts:
    """A streamer that keeps the argmax canvases and the times when they came."""

    def __init__(self, device: torch.device):
        self.device = device
        self.canvases: list[torch.Tensor] = []
        self.times: list[float] = []

    def put_draft(self, value: torch.Tensor) -> None:  # on the host already, so the step is over
        self.canvases.append(value)
        self.times.append(time.perf_counter())

    def put(self, value) -> None:
        pass

    def end(self) -> None:
        pass


def denoise(model, ids: torch.Tensor, steps: int, length: int) -> Drafts:
    torch.manual_seed(1)
    drafts = Drafts(ids.device)
    model.generate(
        ids, max_new_tokens=length, max_denoising_steps=steps, confidence_threshold=1e-9, streamer=drafts,
        disable_compile=True,
    )  # fmt: skip
    return drafts


@torch.no_grad()
def measure(hidden: int, batch: int, vocabulary: int, length: int, steps: int, rounds: int, dtype, device) -> Row:
    model = build(hidden, vocabulary, length, dtype, device)
    ids = torch.randint(3, vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[str, list[float]] = {"unpatched": [], "patched": []}
    peak, first = {}, {}

    def run(name: str) -> None:
        (dllm_fast.patch if name == "patched" else dllm_fast.unpatch)(model)
        assert (STEP in model.__dict__) == (name == "patched")
        memory = Memory(device)
        drafts = denoise(model, ids, steps, length)
        peak[name], first[name] = memory.peak(), drafts.canvases[0]
        gaps = [late - early for early, late in zip(drafts.times, drafts.times[1:])]
        seconds[name].append(statistics.median(gaps[:-1]))  # the patched last step has no soft embedding to make

    rows, weight = torch.randn(batch * length, hidden, device=device).to(dtype), model.lm_head.weight
    runs = {name: functools.partial(run, name) for name in seconds}
    runs["matmuls"] = functools.partial(matmuls, rows, weight)
    bare = interleave(runs, rounds, device)["matmuls"].seconds
    differ = int((first["unpatched"] != first["patched"]).sum())
    if differ > 0.01 * batch * length:  # matmuls of other shapes may round otherwise, and break a tie
        raise SystemExit(f"the argmax canvases differ at {differ} of {batch * length} positions")
    times = [slow / fast for slow, fast in zip(seconds["unpatched"], seconds["patched"])]
    return Row(hidden, batch * length, seconds, bare, peak, times)


def matmuls(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The two matmuls of a step, tile by tile."""
    out = torch.zeros_like(rows)
    for tile in weight.split(canvas.tile_width(len(rows), len(weight), rows.device)):
        out.addmm_(rows @ tile.T, tile)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--hidden", nargs="+", type=int, default=[256, 2304], help="2,304 is the config's default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--length", type=int, default=256, help="of the canvas")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--force", action="store_true", help="even on a busy machine")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    print(machine(device, dtype))
    require_idle(options.force)
    sizes = options.vocabulary, options.length, options.steps, options.rounds
    rows = [measure(hidden, options.batch, *sizes, dtype, device) for hidden in options.hidden]
    head = ["d", "own, s", "patched, s", "times as fast", "matmuls, s", "own, MB", "patched, MB"]
    cells = [
        [
            str(row.hidden), spread(row.seconds["unpatched"]), spread(row.seconds["patched"]),
            spread(row.times), spread(row.matmuls), f"{row.peak['unpatched'] / 1e6:.0f}",
            f"{row.peak['patched'] / 1e6:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    print_table(head, cells, f"a step of {rows[0].rows} positions, V = {options.vocabulary:,}")
    print(json.dumps({"bench": "canvas", "machine": machine(device, dtype), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
