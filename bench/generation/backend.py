"""Our attention in other transformers models: ``python -m bench.generation.backend``

Forwards of BERT, ModernBERT and EuroBERT with random weights, without gradients, with transformers' sdpa and with
``attn_implementation="dllm_fast"``, in interleaved rounds; ratios are taken round by round. Rows of a padded batch have
from half the length to all of it. Also the largest difference of a hidden state, relative to the largest one. Ends with
one JSON line.
"""

import argparse
import functools
import json
from dataclasses import asdict, dataclass

import torch
import transformers

from bench.common import interleave, machine, require_idle, spread
from dllm_fast.backend import NAME
from dllm_fast.cli.view import print_table

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {  # transformers 4 has no EuroBERT
    "bert": ("BertModel", "BertConfig", {"max_position_embeddings": 8192}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {"intermediate_size": 1152}),
    "eurobert": ("EuroBertModel", "EuroBertConfig", {"max_position_embeddings": 8192}),
}
ATTENTIONS = ("sdpa", NAME)


@dataclass
class Row:
    """times: how many times as fast as with sdpa, by round. seconds: of a forward with ours, by round."""

    model: str
    batch: int
    length: int
    padded: bool
    seconds: list[float]
    times: list[float]
    difference: float


def build(name: str, attention: str, shape: dict, dtype: torch.dtype, device: torch.device):
    *names, own = MODELS[name]
    cls, config = (getattr(transformers, one) for one in names)
    torch.manual_seed(0)
    model = cls(config(**{**shape, **own})).eval().to(device, dtype)
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def measure(name: str, shape: dict, sizes: list[tuple[int, int, bool]], rounds: int, dtype, device) -> list[Row]:
    models = {attention: build(name, attention, shape, dtype, device) for attention in ATTENTIONS}
    rows = []
    for batch, length, padded in sizes:
        ids = torch.randint(1, 1000, (batch, length), generator=torch.Generator().manual_seed(length))
        ends = torch.linspace(length // 2, length, batch).long() if padded else torch.tensor([length])
        mask = (torch.arange(length) < ends[:, None]).long()
        ids, mask = (ids * mask).to(device), mask.to(device)
        runs = {
            attention: functools.partial(model, input_ids=ids, attention_mask=mask)
            for attention, model in models.items()
        }
        sdpa, ours = (runs[attention]().last_hidden_state[mask.bool()].float() for attention in ATTENTIONS)
        times = interleave(runs, rounds, device)
        difference = float((ours - sdpa).abs().max() / sdpa.abs().max())
        rows.append(Row(name, batch, length, padded, times[NAME].seconds, times["sdpa"].over(times[NAME]), difference))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--batch", type=int, default=4, help="of the padded batches; without padding it is 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--tiny", action="store_true", help="small models, to try the bench")
    parser.add_argument("--force", action="store_true", help="even on a busy machine")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    print(machine(device, dtype))
    require_idle(options.force)
    sizes = [size for n in options.lengths for size in ((1, n, False), (options.batch, n, True))]
    rows = [
        row for name in options.models
        for row in measure(name, TINY if options.tiny else BASE, sizes, options.rounds, dtype, device)
    ]  # fmt: skip
    head = ["model", "batch", "length", "padded", "ms", "times as fast as sdpa", "difference"]
    cells = [
        [
            row.model, str(row.batch), str(row.length), "yes" if row.padded else "", spread(row.seconds, 1, 1e3),
            spread(row.times), f"{row.difference:.0e}",
        ]
        for row in rows
    ]  # fmt: skip
    print_table(head, cells, "forwards, and their times beside sdpa's")
    print(json.dumps({"bench": "backend", "machine": machine(device, dtype), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
