"""One of the processes that share a model, for test_tensor_parallel.py: ``OUT RANK RANKS SET``.

It runs the cases of a set on a whole and on a shared model, and saves what it found as OUT/SET-RANK.pt."""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from needs import missing
from tiny import EOS, make_llada
from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationConfig

import dllm_fast
from dllm_fast import (
    D2F,
    P2,
    Ancestral,
    Drift,
    Dynamic,
    Edit,
    EntropyBound,
    Every,
    Factor,
    FirstHitting,
    MultiBlock,
    Pyramid,
    ReMDM,
    Sequential,
    Static,
    Threshold,
    Uniform,
    Verify,
    Window,
)
from dllm_fast.evaluate.likelihood import log_likelihoods
from dllm_fast.families.ranks import GATHER

VOCAB = 104  # 101 ids cannot be shared
LENGTHS = {"gen_length": 16, "block_length": 8, "seed": 5}
MODELS = {"plain": {}, "grouped": {"n_kv_heads": 2}, "tied": {"weight_tying": True, "n_kv_heads": 2}}
QUICK = {
    "none": ("plain", "auto", {"schedule": Uniform(6), "cache": "none", "confidence": "entropy"}),
    "prefix": ("plain", "auto", {"schedule": Threshold(0.05), "cache": "prefix", "temperature": 0.7}),
    "dual": ("plain", "torch", {"schedule": Threshold(0.03), "confidence": "margin", "temperature": 0.4}),
    "guided": ("plain", "auto", {"schedule": Pyramid(2), "cfg_scale": 0.5, "defer_tokens": [3, 60]}),
    "window": ("plain", "auto", {"schedule": Factor(1.0), "refresh": Window(4, 4), "suppress_tokens": [2, 70]}),
    "remask": ("plain", "auto", {"schedule": Uniform(6), "remask": P2(0.7), "defer_tokens": [5, 80]}),
    "drafts": ("plain", "auto", {"schedule": Uniform(8), "speculate": 2, "confidence": "random"}),
    "random": ("grouped", "auto", {"schedule": Ancestral(8, "cosine"), "temperature": 1.0}),
    "committed": ("tied", "auto", {"schedule": EntropyBound(3.0), "skip_committed": True}),
    "logprobs": ("plain", "auto", {"schedule": Threshold(0.05), "logprobs": True, "temperature": 0.6}),
    "pipeline": ("plain", "auto", {"schedule": Threshold(0.05), "pipeline": D2F()}),
}
SCHEDULES = {
    "uniform": {"schedule": Uniform(6)}, "first-hitting": {"schedule": FirstHitting(), "temperature": 1.0},
    "factor": {"schedule": Factor(1.0), "temperature": 0.6}, "threshold": {"schedule": Threshold(0.05)},
    "entropy-bound": {"schedule": EntropyBound(3.0), "temperature": 0.5},
    "static": {"schedule": Static(3)}, "sequential": {"schedule": Sequential(2), "temperature": 0.6},
    "dynamic": {"schedule": Dynamic(0.05, tokens=2)}, "pyramid": {"schedule": Pyramid(2)},
    "ancestral": {"schedule": Ancestral(8, "cosine"), "temperature": 1.0},
}  # fmt: skip
EXTRAS = {
    "guided": {"cfg_scale": 1.0}, "every": {"refresh": Every(2)}, "e4m3": {"cache_dtype": "e4m3"},
    "suffix": {"suffix_length": 4, "suffix_sample": 3}, "remdm": {"remask": ReMDM(0.5)},
    "verify": {"remask": Verify(0.1)}, "edit": {"remask": Edit(0.03)}, "drafts": {"speculate": 3},
    "logprobs": {"logprobs": True, "cfg_scale": 0.5}, "d2f": {"pipeline": D2F(0.3, 0.6)},
    "d2f-none": {"pipeline": D2F(), "cache": "none"}, "multi-block": {"pipeline": MultiBlock()},
    "multi-block-prefix": {"pipeline": MultiBlock(delay=1), "cache": "prefix"},
}  # fmt: skip
LONG = {
    f"{model}-{cache}-{name}-{confidence}": (model, impl, {"cache": cache, **options, "confidence": confidence})
    for model, impl in (("plain", "torch"), ("grouped", "auto"), ("tied", "auto"))
    for cache in ("none", "prefix", "dual")
    for name, options in SCHEDULES.items()
    for confidence in ("probability", "margin", "entropy", "random")
    if confidence == "probability" or options["schedule"].confidence is None
}
LONG |= {
    f"{model}-{name}": (model, "auto", {"schedule": Threshold(0.05), **extra})
    for model in MODELS
    for name, extra in EXTRAS.items()
}
SETS = {"quick": QUICK, "long": LONG}


def make(name: str):
    return make_llada(vocab_size=VOCAB, **MODELS[name])


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, EOS, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def run(model, options: dict) -> tuple:
    """Tokens, counts, and where they are asked for the tokens' order and log-probabilities."""
    out = dllm_fast.generate(model, *prompts(), **LENGTHS, **options)
    more = (out.order.tolist(), out.logprobs) if options.get("logprobs") else ()
    return out.sequences, out.row_nfe, out.steps, *more


@torch.no_grad()
def forwards(model, patched) -> list[torch.Tensor]:
    """Logits of the model's own forward, then of the patched one."""
    ids, mask = prompts()
    own = model(ids, attention_mask=mask).logits
    return [own, patched(model)(ids, attention_mask=mask).logits]


class Sent:
    """Counts the bytes that this process hands to collectives in floating point."""

    def __init__(self):
        self.calls, self.bytes = {}, {}
        self.originals = dist.all_reduce, getattr(dist, GATHER)

    def __enter__(self):
        reduce, gather = self.originals
        dist.all_reduce = lambda x, *args, **options: (self.add("reduce", x), reduce(x, *args, **options))[1]
        setattr(dist, GATHER, lambda y, x, **options: (self.add("gather", x), gather(y, x, **options))[1])
        return self

    def add(self, kind: str, x: torch.Tensor) -> None:
        if x.is_floating_point():
            self.calls[kind] = self.calls.get(kind, 0) + 1
            self.bytes[kind] = self.bytes.get(kind, 0) + x.nbytes

    def __exit__(self, *error):
        dist.all_reduce = self.originals[0]
        setattr(dist, GATHER, self.originals[1])


def count_bytes(mesh) -> dict:
    """What a block of 8 in four steps sends, of one row."""
    model = dllm_fast.patch(dllm_fast.parallelize(make("plain"), mesh))
    with Sent() as sent:
        out = dllm_fast.generate(model, prompts()[0][:1], gen_length=8, block_length=8, schedule=Uniform(4))
    return {"calls": sent.calls, "bytes": sent.bytes, "positions": out.positions, "nfe": out.nfe}


def refusals(mesh, rank: int) -> dict[str, str]:
    """What is refused, and how."""
    shared = dllm_fast.parallelize(make("plain"), mesh)
    patched = dllm_fast.patch(copy.deepcopy(shared))
    adapted = copy.deepcopy(patched)
    block = adapted.model.transformer.blocks[1]
    block.q_proj = torch.nn.Sequential(block.q_proj)
    ids = prompts()[0]
    calls = {
        "sizes": lambda: dllm_fast.parallelize(make_llada(n_heads=1, mlp_hidden_size=97), mesh),
        "class": lambda: dllm_fast.parallelize(torch.nn.Linear(2, 2), mesh),
        "mesh": lambda: dllm_fast.parallelize(make("plain"), "cpu"),
        "again": lambda: dllm_fast.parallelize(shared, mesh),
        "patched": lambda: dllm_fast.parallelize(dllm_fast.patch(make("plain")), mesh),
        "weights": lambda: dllm_fast.patch(copy.deepcopy(shared), weights="fp8"),
        "head": lambda: dllm_fast.patch(copy.deepcopy(shared), head="fp8"),
        "load": lambda: dllm_fast.from_pretrained("llada-steps", device_mesh=mesh, weights="int4"),
        "save": lambda: shared.state_dict(),
        "gradient": lambda: copy.deepcopy(shared).requires_grad_(True)(ids),
        "adapter": lambda: dllm_fast.generate(adapted, ids),
        "drift": lambda: dllm_fast.generate(patched, ids, refresh=Drift(0.1)),
        "top_p": lambda: dllm_fast.generate(patched, ids, top_p=0.9, temperature=0.5),
        "speculate": lambda: dllm_fast.generate(patched, ids, speculate="auto"),
        "batch_size": lambda: list(dllm_fast.generate_many(patched, [[1, 2]], batch_size="auto")),
        "likelihood": lambda: list(log_likelihoods(patched, [([1], [2])])),
        "flow": lambda: dllm_fast.generate_flow(patched, ids),
        "prompts": lambda: dllm_fast.generate(patched, ids + rank),
        "later": lambda: dllm_fast.generate(patched, (torch.arange(1500) == 700 + rank).long()[None], gen_length=32),
        "vocabulary": lambda: dllm_fast.generate(patched, ids + rank * VOCAB),
        "dtype": lambda: dllm_fast.generate(patched, ids.int() if rank else ids),
        "seed": lambda: dllm_fast.generate(patched, ids, seed=None if rank else 3),
        "gen_length": lambda: dllm_fast.generate(patched, ids, gen_length=32 + rank),
        "option": lambda: dllm_fast.generate_many(patched, [[1, 2]], **({"size": 3} if rank else {})),
        "many": lambda: dllm_fast.generate_many(patched, [[1, 2], torch.tensor([rank * VOCAB])]),
        "warmup": lambda: dllm_fast.warmup(patched, [4], gen_length=32 + rank, progress=False),
        "method": lambda: patched.generate(ids, max_new_tokens=32, top_p=2.0 if rank else 1.0),
        "config": lambda: patched.generate(ids, GenerationConfig(max_new_tokens=32, num_beams=1 + rank)),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing was raised"
        except ValueError as error:
            found[name] = str(error)
    return found


def loaded(mesh, folder: Path, rank: int) -> dict[str, bool]:
    """Whether a shared model that was loaded has the parameters and gives the tokens of one that was shared later."""
    found = {}
    for name in MODELS:
        model = make(name)
        if rank == 0:
            model.save_pretrained(folder / name, max_shard_size="60KB")
        dist.barrier()
        read = dllm_fast.from_pretrained(folder / name, device_mesh=mesh)
        later = dllm_fast.patch(dllm_fast.parallelize(model, mesh))
        mine, its = dict(read.named_parameters()), dict(later.named_parameters())
        found[f"{name} parameters"] = mine.keys() == its.keys() and all(torch.equal(mine[x], its[x]) for x in mine)
        options = {"schedule": Uniform(4), "temperature": 0.5}
        found[f"{name} tokens"] = torch.equal(run(read, options)[0], run(later, options)[0])
    half = dllm_fast.from_pretrained(folder / "plain", device_mesh=mesh, dtype=torch.bfloat16)
    found["dtype"] = half.dtype == torch.bfloat16
    return found


def in_triton(mesh) -> list[torch.Tensor]:
    """Tokens of a whole and of a shared model in Triton, the latter's predictions in `predict_share`."""
    sizes = {"vocab_size": 128, "n_layers": 1}
    options = {"gen_length": 4, "block_length": 4, "schedule": Uniform(2), "temperature": 0.5, "seed": 5}
    models = make_llada(**sizes), dllm_fast.parallelize(make_llada(**sizes), mesh)
    ids = prompts()[0][:, :3]
    return [dllm_fast.generate(dllm_fast.patch(model, "triton"), ids, **options).sequences for model in models]


def main(out: Path, rank: int, ranks: int, name: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{out / name}-store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (ranks,))
    found = {"whole": {}, "shared": {}, "forwards": {}}
    for model_name in MODELS:
        whole, shared = make(model_name), dllm_fast.parallelize(make(model_name), mesh)
        found["forwards"][model_name] = [forwards(model, dllm_fast.patch) for model in (whole, shared)]
        for number, (case, (own, impl, options)) in enumerate(SETS[name].items()):
            if own == model_name:
                if number % ranks == rank:  # the whole model's runs are divided among the processes
                    found["whole"][case] = run(dllm_fast.patch(whole, impl), options)
                found["shared"][case] = run(dllm_fast.patch(shared, impl), options)
    if name == "quick":
        found["sent"] = count_bytes(mesh)
        found["refusals"] = refusals(mesh, rank)
        found["loaded"] = loaded(mesh, out, rank)
        half = dllm_fast.patch(dllm_fast.parallelize(make("grouped").bfloat16(), mesh))
        found["half"] = run(half, {"schedule": Threshold(0.05), "temperature": 0.5})
        found["copied"] = run(copy.deepcopy(half), {"schedule": Threshold(0.05), "temperature": 0.5})
        # Each draws another seed, and all take the least.
        torch.manual_seed(rank)
        drawn = dllm_fast.generate(half, prompts()[0], gen_length=8, block_length=8, temperature=1.0)
        found["drawn"] = drawn.sequences
        many = dllm_fast.generate_many(half, [[1, 2, 3], [4], [5, 6]], batch_size=2, **LENGTHS)
        found["many"] = [completion.sequence for completion in many]
    elif missing("triton") is None:
        found["triton"] = in_triton(mesh)
    torch.save(found, out / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
