"""From the tokens of an answer to what its reader is sent."""

import bisect
from collections.abc import Sequence

from dllm_fast.decoding.request import before_end
from dllm_fast.decoding.text import answer_text
from dllm_fast.serve.messages import Block, Draft

UNFINISHED = "\ufffd"  # what a character is decoded to as long as some of its bytes are missing


def held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of ``text`` cannot be sent yet: an unfinished one, a stop string's beginning."""
    count = len(text) - len(text.rstrip(UNFINISHED))
    rest = text[: len(text) - count]
    begins = (n for stop in stops for n in range(min(len(stop) - 1, len(rest)), 0, -1) if rest.endswith(stop[:n]))
    return count + max(begins, default=0)


class Answer:
    """One choice of a request: the tokens that are final, and how much of their text was sent.

    length: at most so many tokens are shown, of those that whole blocks have.
    """

    def __init__(self, tokenizer, mask_id: int, eos_ids: Sequence[int], stops: Sequence[str], length: int):
        self.tokenizer, self.mask_id = tokenizer, mask_id
        self.eos_ids, self.stops, self.length = tuple(eos_ids), tuple(stops), length
        self.ids: list[int] = []
        self.text = ""
        self.sent = 0  # characters of it
        self.tokens = self.nfe = 0
        self.finish: str | None = None  # "stop" or "length", once it is

    def take(self, block: Block) -> None:
        """Take in a block. One that was told before, by a worker that died, changes nothing."""
        self.ids[block.begin : block.begin + len(block.ids)] = block.ids
        self.nfe = max(self.nfe, block.nfe)
        shown = before_end(self.ids[: self.length], self.eos_ids)
        self.text = answer_text(self.tokenizer, shown, (), self.stops)
        self.tokens = len(shown)
        if self._stopped(shown):
            self.finish = "stop"
            # Up to the one that completes the stop string.
            self.tokens = bisect.bisect_left(range(len(shown)), True, key=lambda n: self._stopped(shown[:n]))
        elif len(shown) < min(len(self.ids), self.length):
            self.finish = "stop"
        elif block.done or len(self.ids) >= self.length:
            self.finish = "length"

    def news(self) -> str:
        """The text that can be sent now and was not."""
        end = len(self.text) if self.finish else len(self.text) - held(self.text, self.stops)
        begin, self.sent = self.sent, max(self.sent, end)
        return self.text[begin : self.sent]

    def draft(self, draft: Draft) -> list[str | None]:
        """The live block after a step: each token's text, None where it is masked."""
        ids = before_end(draft.ids[: self.length - draft.begin], self.eos_ids)
        return [None if i == self.mask_id else answer_text(self.tokenizer, [i], ()) for i in ids]

    def _stopped(self, ids: list[int]) -> bool:
        if not self.stops:
            return False
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.stops)
