"""Forwards written here beside the models' own: ``python -m bench.generation.own``

What the families LLaDA and ModernBERT gain over `Generic`, which runs a model's own forward on our attention. The same
weights, random ones, patched both ways: ModernBERT's as it is; LLaDA's natively, and as the Llama without a causal mask
that it is. Each fills the same prompt with each of ``--caches``, in interleaved rounds; ratios are taken round by
round. ``same`` is the share of tokens on which both agree, in any dtype but fp64 up to near ties. Ends with one JSON
line.
"""

import argparse
import contextlib
import functools
import json
from dataclasses import asdict, dataclass
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import dllm_fast
from bench.common import SHAPES, Shape, build_model, clock, interleave, machine, plain_ids, require_idle, spread
from bench.generation.modernbert import TINY
from bench.generation.subjects import MODERNBERT, build_modernbert
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.options import CACHES
from dllm_fast.decoding.spelling import schedule_of
from dllm_fast.families import FAMILIES

NAMES = {  # LLaDA's parameters by Llama's names
    "model.transformer.wte.": "model.embed_tokens.", "model.transformer.blocks.": "model.layers.",
    "model.transformer.ln_f.": "model.norm.", "model.transformer.ff_out.": "lm_head.",
    ".q_proj.": ".self_attn.q_proj.", ".k_proj.": ".self_attn.k_proj.", ".v_proj.": ".self_attn.v_proj.",
    ".attn_out.": ".self_attn.o_proj.", ".attn_norm.": ".input_layernorm.",
    ".ff_norm.": ".post_attention_layernorm.", ".ff_proj.": ".mlp.gate_proj.", ".up_proj.": ".mlp.up_proj.",
    ".ff_out.": ".mlp.down_proj.",
}  # fmt: skip
QUICK = {"llada": SHAPES["quick"], "modernbert": TINY}
USUAL = {"llada": SHAPES["cpu-768"], "modernbert": MODERNBERT["modernbert-base"]}
LARGE = {"llada": SHAPES["llada-8b"], "modernbert": MODERNBERT["modernbert-large"]}


@dataclass
class Row:
    """seconds: of a whole run with the family's forward, by round. times: as long with the model's own, by round."""

    model: str
    cache: str
    nfe: int
    seconds: list[float]
    times: list[float]
    same: float


def as_llama(model: PreTrainedModel) -> LlamaForCausalLM:
    """A native LLaDA as transformers' Llama, with its weights, not copied, and without a causal mask."""
    ours = model.config
    config = LlamaConfig(
        hidden_size=ours.d_model, intermediate_size=ours.mlp_hidden_size, num_hidden_layers=ours.n_layers,
        num_attention_heads=ours.n_heads, num_key_value_heads=ours.n_kv_heads, vocab_size=ours.embedding_size,
        max_position_embeddings=ours.max_sequence_length, rms_norm_eps=ours.rms_norm_eps, rope_theta=ours.rope_theta,
        pad_token_id=None, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False, is_causal=False,
        mask_token_id=ours.mask_token_id,
    )  # fmt: skip
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    weights = {}
    for name, weight in model.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights[name] = weight
    llama.load_state_dict(weights, assign=True)
    with torch.device(model.device):
        llama.model.rotary_emb = type(llama.model.rotary_emb)(config)  # its table is in no checkpoint
    return llama.to(model.dtype).eval()


@contextlib.contextmanager
def without(kind: str):
    """Within it, `patch` knows no family of this ``model_type``."""
    with mock.patch.dict(FAMILIES):
        del FAMILIES[kind]
        yield


def both(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model under its family's forward, and with the same weights under its own."""
    if kind == "llada":
        ours = build_model(shape, dtype, device)
        own = as_llama(build_model(shape, dtype, device))
        return dllm_fast.patch(ours), dllm_fast.patch(own)
    ours, own = (build_modernbert(shape, dtype, device) for _ in range(2))
    with without(kind):
        dllm_fast.patch(own)
    return dllm_fast.patch(ours), own


def measure(
    kind: str, shape: Shape, caches: list[str], rounds: int, dtype: torch.dtype, device: torch.device
) -> list[Row]:
    ours, own = both(kind, shape, dtype, device)
    ids = torch.randint(
        *plain_ids(ours.config), (1, shape.prompt), generator=torch.Generator().manual_seed(0)
    ).to(device)  # fmt: skip
    given = {"gen_length": shape.gen_length, "block_length": shape.block_length, "mask_id": own.config.mask_token_id}
    given["schedule"] = schedule_of(shape.schedule)
    rows = []
    for cache in caches:
        runs = {
            name: functools.partial(dllm_fast.generate, model, ids, cache=cache, **given)
            for name, model in (("ours", ours), ("own", own))
        }
        first, second = (run() for run in runs.values())
        for run in runs.values():  # the second call records graphs
            clock(run, device)
        times = interleave(runs, rounds, device)
        same = (first.sequences == second.sequences)[:, shape.prompt :].double().mean()
        rows.append(
            Row(kind, cache, first.nfe, times["ours"].seconds, times["own"].over(times["ours"]), float(same))
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--models", nargs="+", choices=USUAL, default=list(USUAL))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--size", choices=("quick", "usual", "large"), default="usual")
    parser.add_argument("--force", action="store_true", help="even on a busy machine")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    print(machine(device, dtype))
    require_idle(options.force)
    shapes = {"quick": QUICK, "usual": USUAL, "large": LARGE}[options.size]
    rows = [
        row
        for kind in options.models
        for row in measure(kind, shapes[kind], options.caches, options.rounds, dtype, device)
    ]
    head = ["model", "cache", "NFE", "s", "the model's own forward takes", "same tokens"]
    cells = [
        [row.model, row.cache, str(row.nfe), spread(row.seconds), f"{spread(row.times)} times", f"{row.same:.1%}"]
        for row in rows
    ]
    print_table(head, cells, "runs with the forwards written here, and with the models' own")
    result = {"bench": "own", "machine": machine(device, dtype), "rows": [asdict(row) for row in rows]}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
