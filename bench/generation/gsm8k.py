"""All of GSM8K's 1,319 prompts through a model's shape: ``python -m bench.generation.gsm8k --batch 32``

Random weights and random ids, three tokens a step: the time is that of an evaluation, the answers mean nothing. Prompts
have the lengths of GSM8K's test questions in OLMo's tokenizer (50,280 entries; ``gsm8k_lengths.txt``), and ``--extra``
tokens more for a template or worked examples. Shows the time left as it runs. Ends with one JSON line.
"""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import dllm_fast
from bench.common import SHAPES, build_model, machine, plain_ids
from dllm_fast.decoding.engine import Engine
from dllm_fast.decoding.spelling import refresh_of
from dllm_fast.families.rounded import KINDS

LENGTHS = [int(n) for n in (Path(__file__).parent / "gsm8k_lengths.txt").read_text().split()]
TOKENS, BLOCK = 3, 32  # a step, a block


@dataclasses.dataclass
class Whole:
    """Positions in whole steps: those that rows would compute alone, and all with padding."""

    own: int = 0
    computed: int = 0

    @property
    def padding(self) -> float:
        return 1 - self.own / self.computed if self.computed else 0.0


@contextlib.contextmanager
def counting() -> Iterator[Whole]:
    found = Whole()

    @contextlib.contextmanager
    def watch(engine, step):
        yield
        if step is not None and step.whole:
            own = engine.alone["full"].where(~engine.idle, 0)
            found.own += int(own.sum())
            found.computed += engine.packed(step, own).packed or engine.rows * step.length

    with Engine.watched(watch):
        yield found


def prompts(config, extra: int, limit: int | None) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(*plain_ids(config), (n + extra,), generator=draw) for n in LENGTHS[:limit]]


def run(model, asked: list[torch.Tensor], batch: int, gen_length: int, progress: bool, **options) -> dict:
    steps = gen_length // BLOCK * -(-BLOCK // TOKENS)
    options |= {"gen_length": gen_length, "block_length": BLOCK, "schedule": dllm_fast.Uniform(steps), "seed": 0}
    begin = time.perf_counter()
    with counting() as whole:
        done = list(dllm_fast.generate_many(model, asked, batch_size=batch, progress=progress, **options))
    seconds = time.perf_counter() - begin
    tokens = gen_length * len(done)
    return {
        "prompts": len(done), "batch": batch, "gen_length": gen_length, "seconds": seconds, "tokens": tokens,
        "tokens_a_second": tokens / seconds, "nfe": sum(row.nfe for row in done) / len(done), "padding": whole.padding,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--model", choices=SHAPES, default="llada-8b")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--gen-length", type=int, default=256)
    parser.add_argument("--extra", type=int, default=0, help="tokens added to each prompt")
    parser.add_argument("--limit", type=int, help="only the first prompts")
    parser.add_argument("--refresh", type=refresh_of, default="block")
    parser.add_argument("--suffix-length", type=int)
    parser.add_argument("--skip-committed", action="store_true")
    parser.add_argument("--weights", choices=tuple(KINDS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, begin = SHAPES[options.model], time.perf_counter()
    longest = max(LENGTHS) + options.extra + options.gen_length
    room = {"max_sequence_length": max(longest, shape.config.get("max_sequence_length", 4096))}
    model = build_model(dataclasses.replace(shape, config=shape.config | room), dtype, device)
    dllm_fast.patch(model, weights=options.weights)
    print(f"{machine(device, dtype)}; {options.model} made in {time.perf_counter() - begin:.0f} s")
    chosen = {name: getattr(options, name) for name in ("refresh", "suffix_length", "skip_committed")}
    asked = prompts(model.config, options.extra, options.limit)
    found = run(model, asked, options.batch, options.gen_length, True, **chosen)
    text = (
        "{prompts} prompts, {gen_length} tokens each, batch {batch}: {seconds:.1f} s, {tokens_a_second:.0f} tokens/s, "
    )
    print((text + "{nfe:.0f} NFE; {padding:.1%} of the positions in whole steps are padding").format(**found))
    chosen["refresh"] = str(chosen["refresh"])
    print(json.dumps({"bench": "gsm8k", "model": options.model, "weights": options.weights, **chosen, **found}))


if __name__ == "__main__":
    main()
