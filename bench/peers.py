"""Other people's generators on our weights, loaded from a user's clones of their repositories.

    --peer published          this package's plain transcription of LLaDA's sampler; needs no clone
    --peer fast-dllm=PATH     NVlabs/Fast-dLLM: its generate, prefix cache and dual cache
    --peer llada=PATH         ML-GSAI/LLaDA: generate.py
    --peer dllm-cache=PATH    maomaocun/dLLM-cache: feature caches with partial updates
    --peer dinfer=PATH        inclusionAI/dInfer: its block-wise engine with the dual cache; needs vLLM

Each runs its repository's unchanged code, on a model of its own class whose parameters share our storage, without a
second copy. The user installs what a repository needs (einops, for example). A peer that cannot run prints a line that
says why.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from bench.common import Job
from dllm_fast import Factor, LLaDAModelLM, Pyramid, Threshold, Uniform
from dllm_fast.decoding.published import published_generate

Answer = tuple[torch.Tensor, int | None]  # (new tokens [B, gen_length], NFE if the peer reports it)


class Unavailable(Exception):
    """Why a peer cannot run this job."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A generator. ``cache``: our cache with the same algorithm and so the same tokens, if there is one."""

    name: str
    cache: str | None
    run: Callable[[], Answer]


def find_peers(specs: list[str], model: LLaDAModelLM, job: Job) -> tuple[list[Peer], list[str]]:
    """The peers in ``specs``, each ``NAME=PATH`` or ``published``, and a line for each that cannot run.

    ``model`` is unpatched and stays so. Raises ValueError for a name or a path that does not exist.
    """
    found, lines = [], []
    for name, path in [read_spec(spec) for spec in specs]:
        try:
            found += LOADERS[name](path, model, job)
        except (Unavailable, ImportError) as error:
            lines.append(f"{name}: not run: {error}")
    return found, lines


def read_spec(spec: str) -> tuple[str, Path | None]:
    """Name and folder of ``NAME=PATH``, or of ``published``, which has none. Raises ValueError if either does not
    exist."""
    name, _, path = spec.partition("=")
    if spec == "published":
        return spec, None
    if name not in LOADERS:
        raise ValueError(f"--peer: {name!r} is not one of {', '.join(LOADERS)}")
    if not Path(path).is_dir():
        raise ValueError(f"--peer {name}: {path!r} is not a folder")
    return name, Path(path).resolve()


def twin(model: LLaDAModelLM) -> LLaDAModelLM:
    """A second model of the same class that shares the storage, so that only one of the two is patched."""
    with torch.device("meta"):
        other = type(model)(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def _new(sequences: torch.Tensor, job: Job) -> torch.Tensor:
    return sequences[:, -job.gen_length :]


# Arguments for their generate functions


def _published(path: None, model: LLaDAModelLM, job: Job) -> list[Peer]:
    """This package's plain transcription of LLaDA's sampler, on the model's own forward."""
    names = {Uniform: ("steps", "steps"), Pyramid: ("pyramid", "factor"), Threshold: ("threshold", "threshold")}
    if type(job.schedule) not in names:
        raise Unavailable(f"it has no {job.schedule}")
    argument, attribute = names[type(job.schedule)]
    rule = {argument: getattr(job.schedule, attribute)}

    def run() -> Answer:
        sequences, nfe = published_generate(
            lambda x, mask: model(x, attention_mask=mask).logits, job.ids,
            gen_length=job.gen_length, block_length=job.block_length, mask_id=job.mask_id, **rule,
        )  # fmt: skip
        return _new(sequences, job), nfe

    return [Peer("published", "none", run)]


def _options(generate: Callable, job: Job) -> dict:
    """Keyword arguments of the job for LLaDA's generate and for functions modelled on it."""
    options = {"gen_length": job.gen_length, "block_length": job.block_length, "mask_id": job.mask_id}
    if isinstance(job.schedule, Uniform):
        options["steps"] = job.schedule.steps
    elif isinstance(job.schedule, Threshold):
        # They divide the steps among the blocks even if a threshold is given.
        options |= {"steps": job.gen_length, "threshold": job.schedule.threshold}
    elif isinstance(job.schedule, Factor):
        options |= {"steps": job.gen_length, "factor": job.schedule.factor}
    else:
        raise Unavailable(f"it has no {job.schedule}")
    if missing := options.keys() - inspect.signature(generate).parameters.keys():
        raise Unavailable(f"this revision's {generate.__name__} takes no {', '.join(sorted(missing))}")
    return options


def _one_row(job: Job) -> None:
    if job.ids.shape[0] > 1:
        raise Unavailable("it takes one row at a time")


def _llada(path: Path, model: LLaDAModelLM, job: Job) -> list[Peer]:
    with _importing(path, "generate"):
        generate = importlib.import_module("generate").generate
    options = _options(generate, job)
    return [Peer("llada", "none", lambda: (_new(generate(model, job.ids, **options), job), None))]


def _fast_dllm(path: Path, model: LLaDAModelLM, job: Job) -> list[Peer]:
    with _importing(path / "llada", "generate", "model"):
        theirs = importlib.import_module("generate")
        shared = _share(
            model, *(importlib.import_module(f"model.{kind}_llada") for kind in ("configuration", "modeling"))
        )
    _one_row(job)
    generators = {"none": theirs.generate}
    generators |= {"prefix": theirs.generate_with_prefix_cache, "dual": theirs.generate_with_dual_cache}

    def peer(cache: str, generate: Callable) -> Peer:
        options = _options(generate, job)

        def run() -> Answer:
            sequences, nfe = generate(shared, job.ids, **options)
            return _new(sequences, job), nfe

        return Peer(f"fast-dllm {cache}", cache, run)

    return [peer(cache, generate) for cache, generate in generators.items()]


def _dllm_cache(path: Path, model: LLaDAModelLM, job: Job) -> list[Peer]:
    """With the intervals of its demo_LLaDA.py. It hooks the LLaDA class that it ships for MMaDA."""
    with _importing(path, "dllm_cache", "utils", "mmada_models"):
        cache = importlib.import_module("dllm_cache")
        parts = importlib.import_module("dllm_cache.cache")
        generate = importlib.import_module("utils.generate_function").generate
        # Its package imports image libraries; the language model's two modules do not need them.
        package = types.ModuleType("mmada_models")
        package.__path__ = [str(path / "mmada_models")]
        sys.modules["mmada_models"] = package
        modules = (importlib.import_module(f"mmada_models.{kind}_llada") for kind in ("configuration", "modeling"))
        shared = _share(model, *modules)
    options = _options(generate, job)
    parts.dLLMCache.new_instance(prompt_interval_steps=100, gen_interval_steps=7, transfer_ratio=0.25)
    cache.register_cache_LLaDA(shared, "model.transformer.blocks")
    for block in shared.model.transformer.blocks:
        # The hook takes LLaDA's arguments; MMaDA's model passes one more to its blocks, always None here.
        block.forward = functools.partial(_without_block_mask, block.forward)
    return [Peer("dllm-cache", None, lambda: (generate(job.ids, None, shared, **options), None))]


def _without_block_mask(forward: Callable, x: torch.Tensor, block_mask: None = None, **kwargs):
    return forward(x, **kwargs)


def _dinfer(path: Path, model: LLaDAModelLM, job: Job) -> list[Peer]:
    if not isinstance(job.schedule, Threshold):
        raise Unavailable(f"it has no {job.schedule}")
    with _importing(path / "python", "dinfer"):
        dinfer = importlib.import_module("dinfer")
        modules = (importlib.import_module(f"dinfer.model.{kind}_llada") for kind in ("configuration", "modeling"))
        shared = _share(model, *modules)
    # No end of text, at which it would stop and drop the rest of its tokens.
    decoder = dinfer.ThresholdParallelDecoder(
        temperature=0, threshold=job.schedule.threshold, mask_id=job.mask_id, eos_id=-1
    )
    engine = dinfer.BlockWiseDiffusionLLM(
        shared, decoder, dinfer.BlockIteratorFactory(), early_stop=False, cache_factory=dinfer.KVCacheFactory("dual")
    )

    def run() -> Answer:
        before = engine.num_forwards
        sequences = engine.generate(job.ids, gen_length=job.gen_length, block_length=job.block_length)
        return _new(sequences, job), engine.num_forwards - before

    return [Peer("dinfer dual", "dual", run)]


LOADERS = {
    "fast-dllm": _fast_dllm, "llada": _llada, "dllm-cache": _dllm_cache, "dinfer": _dinfer, "published": _published,
}  # fmt: skip


# Their modules and their models


@contextlib.contextmanager
def _importing(folder: Path, *names: str) -> Iterator[None]:
    """Import the packages ``names`` from a clone, even if other packages have these names.

    They stay in sys.modules if nothing else has the name, because torch.compile looks up there what it traces. Each
    registers its config as transformers' "llada" on import, which must not replace this package's.
    """

    def taken() -> dict[str, types.ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in names}

    before = taken()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        with mock.patch.object(AutoConfig, "register"), mock.patch.object(AutoModel, "register"):
            yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.update(before)


def _share(model: LLaDAModelLM, configuration: types.ModuleType, modeling: types.ModuleType) -> nn.Module:
    """Their LLaDAModelLM with our parameters: made on the meta device, then given our tensors."""
    ours = model.config.to_dict()
    names = {field.name for field in dataclasses.fields(configuration.ModelConfig)}
    values = {name: ours[name] for name in names & ours.keys()}
    values |= {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}
    config = configuration.LLaDAConfig(**values)
    config.use_cache = False  # their forward reads it, and transformers 5 drops it from a config's arguments
    sizes = modeling.create_model_config_from_pretrained_config(config)
    sizes.init_device = "meta"
    theirs = modeling.LLaDAModelLM(config, model=modeling.LLaDAModel(sizes, init_params=False)).eval()
    state = model.state_dict()
    if model.config.weight_tying:
        del state["model.transformer.ff_out.weight"]  # their head is the embedding
    theirs.load_state_dict(state, assign=True)
    return theirs
