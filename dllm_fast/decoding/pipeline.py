"""How many blocks of an answer are decoded at once, and what each of them commits.

Blocks are *live* from the step at which they are added until they are filled. At first one is. Before each step the
next block of the answer is added if the last live one has enough of its tokens; so at most one a step. A step's
candidates are the masked positions of all live blocks, and every one whose confidence reaches the schedule's threshold
is committed. The two published rules differ in what is committed below the threshold, so that every answer ends.

dParallel (arXiv:2509.26488) decodes one block at a time, by the threshold on the entropy that `Threshold` has with
``confidence="entropy"``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from dllm_fast.decoding.values import Checked, checked, positive_or_none, real, whole_or_none


def _share(default: float) -> Any:
    return checked(real, "a number above 0 and up to 1", lambda number: 0 < number <= 1, default=default)


@dataclass(frozen=True)
class D2F(Checked):
    """Pipelined decoding of Discrete Diffusion Forcing (D2F, arXiv:2508.09192).

    A block is added when the last one has at least the share ``add`` of its tokens. The first live block, and each
    whose predecessor has at least the share ``activate``, commits its most confident position at a step at which none
    of its positions reaches the threshold. At most ``blocks`` are live at a time; None: as many as the rule adds, as
    published. The paper's tau_add, tau_act and tau_conf are ``add``, ``activate`` and the schedule's threshold.
    """

    add: float = _share(0.1)
    activate: float = _share(0.95)
    blocks: int | None = checked(positive_or_none, default=None)
    delay: ClassVar[None] = None
    refresh: ClassVar[None] = None


@dataclass(frozen=True)
class MultiBlock(Checked):
    """Multi-block decoding of d3LLM (arXiv:2601.07568).

    A block is added when the last one has at least the share ``add`` of its tokens. Each step commits the most
    confident position of all live blocks, and that of the first one if none of its own is committed. At most ``blocks``
    are live at a time; None: as many as the rule adds, as published. d3LLM's confidence is the entropy: its
    ``threshold=0.5`` is ``Threshold(-0.5)`` with ``confidence="entropy"``. Its ``decoded_token_threshold`` changes no
    token there, and is left out.

    With ``cache="prefix"`` blocks are cached late, one after the other, and a step evaluates everything behind the
    cache, live or not. A block that is filled waits for ``delay`` steps, from the one that caches the block before it
    on or from the first that finds it filled. They are full forwards, which bring the cache up to date too, except one
    that caches a block. The step after them evaluates it for the last time, and caches it. The prompt is cached by the
    ``delay``-th step of a row. None: 1; 0: the first step caches the prompt, and each step the blocks that it finds
    filled. Every ``refresh``-th step of a row is a full forward, unless it caches a block; None: none is. d3LLM's
    names: ``cache_delay_iter``, ``refresh_interval``.
    """

    add: float = _share(0.1)
    blocks: int | None = checked(positive_or_none, default=None)
    delay: int | None = checked(whole_or_none, default=None)
    refresh: int | None = checked(positive_or_none, default=None)
    activate: ClassVar[None] = None


Pipeline = D2F | MultiBlock
