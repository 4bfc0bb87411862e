"""The options of `generate`: one class, from the caller to the engine."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch

from dllm_fast.decoding.drafts import AUTO, AutoGraph, DraftGraph, as_drafts, graph_for, key_of, pays
from dllm_fast.decoding.pipeline import MultiBlock, Pipeline
from dllm_fast.decoding.refresh import Every, Exact, Refresh
from dllm_fast.decoding.remask import Edit, Remask
from dllm_fast.decoding.schedules import Schedule, Threshold
from dllm_fast.decoding.values import (
    Checked,
    above_zero,
    checked,
    finite,
    is_whole,
    one_kind,
    one_of,
    positive_or_none,
    require,
    whole,
    whole_or_none,
)
from dllm_fast.families.cache import no_e4m3
from dllm_fast.kernels.checks import CONFIDENCES
from dllm_fast.kernels.reference_nucleus import filters

CACHES = ("none", "prefix", "dual")
CACHE_DTYPES = (None, "e4m3")
BLOCK = 32  # the length of blocks where neither the caller nor the model says
Ids = Any  # an id, a list or a tuple of ids, or None; a tuple once resolved


@dataclass(frozen=True)
class Options(Checked):
    """What `generate` explains under the same names. Checked when made, and for a model by `resolved`.

    An engine serves all options that are equal: the fields that no step depends on are not compared.
    """

    named: ClassVar[bool] = False
    gen_length: int = checked(whole, 0, default=128, compare=False)
    block_length: Any = checked(positive_or_none, default=None)  # an int once resolved
    schedule: Schedule = checked(one_kind, Schedule, "a schedule of dllm_fast", default=Threshold(0.9))
    confidence: str = checked(one_of, CONFIDENCES, default="probability")
    temperature: float = checked(finite, default=0.0)
    cfg_scale: float = checked(finite, default=0.0)
    cache: str = checked(one_of, CACHES, default="dual")
    refresh: Refresh = checked(one_kind, Refresh, "one of 'block', Every, Window, Drift", default=Every(1))
    remask: Remask | None = checked(one_kind, Remask | None, "one of ReMDM, Verify, P2, Edit", default=None)
    suffix_length: int | None = checked(whole_or_none, default=None)
    suffix_sample: int = checked(whole, 0, default=0)
    skip_committed: bool = checked(one_kind, bool, "True or False", default=False)
    speculate: int | str | DraftGraph | None = checked(as_drafts, default=None)
    cache_dtype: str | None = checked(one_of, CACHE_DTYPES, default=None)
    pipeline: Pipeline | None = checked(one_kind, Pipeline | None, "one of D2F, MultiBlock", default=None)
    logprobs: bool = checked(one_kind, bool, "True or False", default=False)
    top_k: int | None = checked(whole_or_none, default=None)  # None for 0
    top_p: float = checked(above_zero, default=1.0)
    mask_id: int | None = None
    eos_id: Ids = field(default=None, compare=False)
    seed: int | None = field(default=None, compare=False)
    pad_id: int | None = field(default=None, compare=False)
    suppress_tokens: Ids = None
    defer_tokens: Ids = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the option and the value. ``"block"`` becomes ``Every(1)``."""
        if self.refresh == "block":
            object.__setattr__(self, "refresh", Every(1))
        super().__post_init__()
        if self.top_k == 0:
            object.__setattr__(self, "top_k", None)
        if self.seed is not None:
            object.__setattr__(self, "seed", whole("seed", self.seed, 0, 63))
        self.schedule.check_confidence(self.confidence)
        useless = f"refresh={self.refresh!r}: there is nothing to refresh with cache='none'"
        require(self.has_cache or self.refresh == Every(1), useless)
        useless = f"suffix_sample={self.suffix_sample}: without suffix_length every position is seen"
        require(self.suffix_length is not None or not self.suffix_sample, useless)
        useless = f"suffix_sample={self.suffix_sample}: needs a cache, and cache='none'"
        require(self.has_cache or not self.suffix_sample, useless)
        unfit = f"suffix_sample={self.suffix_sample}: {self.refresh!r} begins at layers that saw another sample"
        require(not (self.suffix_sample and self.refresh.layerwise), unfit)
        useless = "skip_committed=True: with cache='none' nothing is kept of a position that is not evaluated"
        require(self.has_cache or not self.skip_committed, useless)
        unfit = "skip_committed=True: what a step gives then depends on the steps before, which speculate would skip"
        require(not (self.skip_committed and self.drafts), unfit)
        if self.edits:
            unfit = f"remask={self.remask}: how many steps a block then has is not known beforehand, as for"
            require(bool(self.schedule.rule), f"{unfit} schedule={self.schedule}")
            require(not self.drafts, f"{unfit} speculate={self.speculate}")
            unfit = f"remask={self.remask}: a committed token is evaluated again, which skip_committed=True leaves out"
            require(not self.skip_committed, unfit)
        useless = f"cache_dtype={self.cache_dtype!r}: with cache='none' there are no keys and values to keep"
        require(self.has_cache or self.cache_dtype is None, useless)
        if self.pipeline is not None:
            self._check_pipeline()

    def _check_pipeline(self) -> None:
        """Raise ValueError for what has no meaning yet where several blocks are live."""
        unfit = f"pipeline={self.pipeline}: is not to be had with"
        require(type(self.schedule) is Threshold, f"{unfit} schedule={self.schedule}, which is no Threshold")
        delayed = self.cache == "prefix"  # d3LLM's cache
        require(not delayed or isinstance(self.pipeline, MultiBlock), f"{unfit} cache='prefix'")
        for name in ("delay", "refresh"):
            useless = f"pipeline={self.pipeline}: {name} is an option of cache='prefix', not of cache={self.cache!r}"
            require(delayed or getattr(self.pipeline, name) is None, useless)
        require(self.refresh in (Every(1), Exact()), f"{unfit} refresh={self.refresh}")
        require(self.remask is None, f"{unfit} remask={self.remask}")
        require(not self.drafts, f"{unfit} speculate={self.speculate}")
        require(not self.skip_committed, f"{unfit} skip_committed=True")
        bounded = self.suffix_length is not None and self.refresh != Exact()
        require(not bounded, f"{unfit} suffix_length={self.suffix_length}")

    @classmethod
    def of_call(cls, function: str, given: dict, own_block: int | None = None) -> "Options":
        """Those ``given`` to ``function`` by name, with blocks of one length. Raises ValueError.

        ``own_block``: the length of a block-causal model's blocks, the last of which may be cut.
        """
        unknown = sorted(set(given) - set(OPTIONS))
        require(not unknown, f"{', '.join(unknown)}: not an option of {function}")
        options = cls(**given)
        gen, block = options.gen_length, options.block_length or BLOCK
        whole_blocks = own_block is not None or gen % block == 0
        require(whole_blocks, f"gen_length={gen} is not a multiple of block_length={block}")
        return options

    def resolved(self, model: torch.nn.Module, family) -> "Options":
        """These for a model: its mask id, the length of its blocks, every id one of its vocabulary, a seed. Raises
        ValueError, also for a ``cache_dtype`` that its device lacks, and for what a block-causal model has no use for.

        ``eos_id`` is a tuple then; ``suppress_tokens`` and ``defer_tokens`` are sorted ones; ``speculate`` is a graph
        or None, which ``"auto"`` becomes on a device where drafts cannot pay.
        """
        if family.block is not None and self.refresh != Exact():
            return self._in_blocks(family.block).resolved(model, family)
        if self.block_length is None:
            return replace(self, block_length=BLOCK).resolved(model, family)
        if self.cache_dtype is not None:
            obstacle = no_e4m3(family.impl, family.head()[0].device)
            require(obstacle is None, f"cache_dtype={self.cache_dtype!r}: {obstacle}")
        vocabulary = family.vocab_size
        mask_id = getattr(model.config, "mask_token_id", None) if self.mask_id is None else self.mask_id
        require(mask_id is not None, "mask_id: None given, and model.config has no mask_token_id")
        mask_id = as_id("mask_id", mask_id, vocabulary)
        own = f"refresh={self.refresh!r}: is only a block-causal model's"
        require(family.block is not None or self.refresh != Exact(), own)
        unfit = f"suffix_sample={self.suffix_sample}: some layers of the model see a window alone"
        require(not self.suffix_sample or not any(family.windows), unfit)
        unfit = f"refresh={self.refresh}: the model runs its own forward, which begins at its first layer"
        require(family.layerwise or not self.refresh.layerwise, unfit)
        if family.shifted:  # a position is predicted by its left neighbour, which is evaluated beside it
            unfit = "skip_committed=True: the model predicts a token from the position before it, which is committed"
            require(not self.skip_committed, unfit)
            # The left neighbour does not see the block, whose states would have it see what they do.
            unfit = f"speculate={self.speculate}: the model is block-causal, and its head predicts the next position"
            require(not self.drafts or family.block is None, unfit)
        if family.ranks is not None:
            shared = f"{family.ranks.size} processes share the model"
            unfit = f"refresh={self.refresh}: {shared}, and none has the values of all heads"
            require(not self.refresh.layerwise, unfit)
            require(self.speculate != "auto", f"speculate='auto': {shared}, which may measure different times")
            unfit = f"top_k={self.top_k}, top_p={self.top_p}: {shared}, and none has the logits of all ids"
            require(not self.filters, unfit)
        eos_ids = as_ids("eos_id", self.eos_id, vocabulary)
        require(mask_id not in eos_ids, f"eos_id={self.eos_id}: the mask id, {mask_id}, ends no text")
        pad_id = None if self.pad_id is None else as_id("pad_id", self.pad_id, vocabulary)
        require(pad_id != mask_id, f"pad_id={pad_id} is the mask id")
        suppressed = tuple(sorted(set(as_ids("suppress_tokens", self.suppress_tokens, vocabulary))))
        deferred = tuple(sorted(set(as_ids("defer_tokens", self.defer_tokens, vocabulary))))
        left = vocabulary - len({mask_id, *suppressed})
        require(left > 0, f"suppress_tokens: leaves no token of the vocabulary of {vocabulary} to choose")
        seed = self.seed
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
            seed = seed if family.ranks is None else family.ranks.least(seed)
        speculate = self.speculate
        if speculate == "auto" and not pays(family.head()[0].device, family.impl):
            speculate = None
        if isinstance(speculate, int | str):
            key = key_of(self.schedule, self.gen_length, self.block_length, self.confidence)
            speculate = graph_for(model, speculate, key, planned=not self.schedule.rule)
        return replace(
            self, mask_id=mask_id, eos_id=eos_ids, pad_id=pad_id, seed=seed, suppress_tokens=suppressed,
            defer_tokens=deferred, speculate=speculate,
        )  # fmt: skip

    def _in_blocks(self, block: int) -> "Options":
        """These for a model that is block-causal in blocks of that length. Raises ValueError."""
        other = f"block_length={self.block_length}: the model is block-causal, in blocks of {block}"
        require(self.block_length in (None, block), other)
        exact = "a block-causal model has an exact cache, and no use for another"
        require(self.cache == "dual", f"cache={self.cache!r}: {exact}; leave it at 'dual'")
        require(self.refresh == Every(1), f"refresh={self.refresh!r}: {exact}; leave it at 'block'")
        require(not self.skip_committed, f"skip_committed=True: {exact}")
        unseen = "a block-causal model sees nothing behind a block"
        require(not self.suffix_length, f"suffix_length={self.suffix_length}: {unseen}")
        require(not self.suffix_sample, f"suffix_sample={self.suffix_sample}: {unseen}")
        return replace(self, block_length=block, refresh=Exact(), suffix_length=0)

    def live_positions(self, slots: int) -> int:
        """How many positions, next to each other, may be decoded at once, in a sequence of up to ``slots``."""
        if self.pipeline is None:
            return min(self.block_length, slots)
        blocks = slots // self.block_length
        return self.block_length * min(blocks, self.pipeline.blocks or blocks)

    @property
    def has_cache(self) -> bool:
        return self.cache != "none"

    @property
    def runs_suffix(self) -> bool:
        """Whether a step against the cache goes on to the end of the sequence."""
        return self.cache == "prefix"

    @property
    def drafts(self) -> int:
        """States that a forward evaluates beside the one that the schedule has reached."""
        if isinstance(self.speculate, DraftGraph):
            return self.speculate.number
        return AUTO if isinstance(self.speculate, str) else self.speculate or 0

    @property
    def looks_ahead(self) -> bool:
        """Whether a forward with drafts may evaluate the next block's first step too, see `speculation`. That step is
        one with a window, as cheap as another, which reaches back over the whole block before."""
        window = self.cache == "dual" and not self.refresh.full(1) and not self.refresh.layerwise
        simple = self.remask is None and self.suffix_length is None and not self.logprobs
        reaches = window and self.refresh.span(self.block_length)[0] >= self.block_length
        return bool(self.drafts) and not isinstance(self.speculate, AutoGraph) and simple and reaches

    @property
    def draws(self) -> bool:
        """Whether steps draw noise, for tokens or confidences."""
        return self.temperature > 0 or (self.schedule.confidence or self.confidence) == "random"

    @property
    def filters(self) -> bool:
        """Whether only some of the tokens may be drawn."""
        return filters(self.temperature, self.top_k or 0, self.top_p)

    @property
    def edits(self) -> bool:
        """Whether committed tokens are replaced, also by steps after the last commit."""
        return isinstance(self.remask, Edit)

    @property
    def more_steps(self) -> int:
        """How many steps beside one for each of its positions a block may take."""
        if isinstance(self.remask, Edit):
            return self.remask.rounds
        return self.block_length if self.remask else 0

    @property
    def passes(self) -> int:
        """Forwards of a step: guidance takes a second one."""
        return 2 if self.cfg_scale > 0 else 1


OPTIONS = tuple(option.name for option in fields(Options))


def as_id(name: str, value: Any, vocabulary: int) -> int:
    """Raises ValueError unless ``value`` is an id."""
    known = is_whole(value) and 0 <= value < vocabulary
    require(known, f"{name}={value!r} is not an id of the vocabulary of {vocabulary}")
    return int(value)


def as_ids(name: str, value: Ids, vocabulary: int) -> tuple[int, ...]:
    """An id, several or None as a tuple of ids. Raises ValueError that names ``name`` and the value."""
    if isinstance(value, list | tuple):
        return tuple(as_id(f"{name}[{number}]", item, vocabulary) for number, item in enumerate(value))
    return () if value is None else (as_id(name, value, vocabulary),)
