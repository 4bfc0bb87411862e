"""The task `sentences`: an English sentence is rewritten four times, each time with one change.

    prompt  The tall nurse sees two old kings. past, passive, negative, question:
    answer  The tall nurse saw two old kings.
            Two old kings were seen by the tall nurse.
            Two old kings were not seen by the tall nurse.
            Were two old kings not seen by the tall nurse?

A change sets the tense, the voice, the polarity or the mood, or lets subject and object swap places. Each line changes
the line before it, so to write a line before those above it is to make several changes at once. Lines have five to
thirteen words, so the model must also know where each begins.
"""

import random
from dataclasses import dataclass, replace

LINES = 4
TOKENS = 52  # in an answer: one a word, and end-of-text; at most 51, in fact
NOUNS = {
    **{noun: f"{noun}s" for noun in ("nurse", "king", "queen", "farmer", "baker", "doctor", "artist", "uncle")},
    **{noun: f"{noun}s" for noun in ("dog", "cat", "bear", "owl", "eagle", "horse", "monkey", "elephant")},
    **{"fox": "foxes", "witch": "witches", "baby": "babies", "pony": "ponies", "thief": "thieves", "wolf": "wolves"},
    **{"child": "children", "man": "men", "woman": "women", "mouse": "mice", "goose": "geese", "hero": "heroes"},
}
ADJECTIVES = (
    *("tall", "small", "young", "old", "angry", "happy", "brave", "clever", "quiet", "hungry"),
    *("tired", "proud", "kind", "honest", "lazy", "strange", "gentle", "ugly", "rich", "wise"),
)
# present with he and with they, past, participle
VERBS = (
    *(("sees", "see", "saw", "seen"), ("knows", "know", "knew", "known"), ("draws", "draw", "drew", "drawn")),
    *(("finds", "find", "found", "found"), ("feeds", "feed", "fed", "fed"), ("leads", "lead", "led", "led")),
    *(("hears", "hear", "heard", "heard"), ("hides", "hide", "hid", "hidden"), ("bites", "bite", "bit", "bitten")),
    *(("greets", "greet", "greeted", "greeted"), ("chooses", "choose", "chose", "chosen")),
    *(("forgets", "forget", "forgot", "forgotten"), ("catches", "catch", "caught", "caught")),
    *(("teaches", "teach", "taught", "taught"), ("fights", "fight", "fought", "fought")),
    *(("chases", "chase", "chased", "chased"), ("follows", "follow", "followed", "followed")),
    *(("helps", "help", "helped", "helped"), ("watches", "watch", "watched", "watched")),
    *(("carries", "carry", "carried", "carried"), ("pushes", "push", "pushed", "pushed")),
    *(("calls", "call", "called", "called"), ("likes", "like", "liked", "liked")),
    *(("visits", "visit", "visited", "visited"),),
)  # fmt: skip
VOWELS = "aeiou"
MANY = ("two", "three", "four", "some", "many", "the")
BE = {"present": ("is", "are"), "past": ("was", "were")}
DO = {"present": ("does", "do"), "past": ("did", "did")}
CHANGES = {
    "tense": ("present", "past", "future"),
    "voice": ("active", "passive"),
    "polarity": ("positive", "negative"),
    "mood": ("statement", "question"),
}


@dataclass(frozen=True)
class Sentence:
    """Who (words, whether they are many) does what to whom, and how it is said."""

    subject: tuple[str, bool]
    verb: tuple[str, str, str, str]
    object: tuple[str, bool]
    tense: str
    voice: str = "active"
    polarity: str = "positive"
    mood: str = "statement"

    def __str__(self):
        singular, plural, past, participle = self.verb
        (first, many), last = (self.subject, self.object[0])
        if self.voice == "passive":
            (first, many), last = self.object, f"by {self.subject[0]}"
        plain = self.polarity == "positive" and self.mood == "statement"
        if self.tense == "future":
            helper, rest = "will", f"be {participle}" if self.voice == "passive" else plural
        elif self.voice == "passive":
            helper, rest = BE[self.tense][many], participle
        elif plain:
            helper, rest = "", past if self.tense == "past" else (singular, plural)[many]
        else:
            helper, rest = DO[self.tense][many], plural
        order = [helper, first] if self.mood == "question" else [first, helper]
        words = " ".join(filter(None, [*order, "not" * (self.polarity == "negative"), rest, last]))
        return words[0].upper() + words[1:] + (".", "?")[self.mood == "question"]


def noun_phrase(draw: random.Random) -> tuple[str, bool]:
    """An article or a number, an adjective or none, a noun; and whether they are many."""
    many = draw.random() < 0.5
    noun = draw.choice(tuple(NOUNS))
    words = [*draw.sample(ADJECTIVES, draw.random() < 0.7), NOUNS[noun] if many else noun]
    one = "an" if words[0][0] in VOWELS or words[0] == "honest" else "a"
    article = draw.choice(MANY) if many else draw.choice(("the", one))
    return " ".join([article, *words]), many


def a_change(sentence: Sentence, draw: random.Random) -> str:
    """The name of a random change that the sentence does not have yet."""
    kind = draw.choice((*CHANGES, "swap"))
    values = [value for value in CHANGES.get(kind, ()) if value != getattr(sentence, kind)]
    return draw.choice(values) if values else "swap"


def changed(sentence: Sentence, name: str) -> Sentence:
    """The sentence after a change."""
    if name == "swap":
        return replace(sentence, subject=sentence.object, object=sentence.subject)
    kind = next(kind for kind, values in CHANGES.items() if name in values)
    return replace(sentence, **{kind: name})


def problem(draw: random.Random) -> tuple[str, str]:
    """Prompt and answer."""
    subject, verb, whom = noun_phrase(draw), draw.choice(VERBS), noun_phrase(draw)
    sentence = Sentence(subject, verb, whom, draw.choice(CHANGES["tense"]))
    names, lines, first = [], [], str(sentence)
    for _ in range(LINES):
        names.append(a_change(sentence, draw))
        sentence = changed(sentence, names[-1])
        lines.append(str(sentence))
    return f"{first} {', '.join(names)}:\n", "\n".join(lines)
