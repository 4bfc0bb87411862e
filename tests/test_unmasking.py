"""The animated picture of an answer as it un-masks."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import torch

sys.path.append(str(Path(__file__).parent.parent))
from bench.report import unmasking

SVG = "{http://www.w3.org/2000/svg}"


def test_a_positions_forward_is_the_first_without_its_mask():
    seen = unmasking.Committed(mask_id=9)
    for row in ([1, 9, 9], [1, 9, 2], [1, 9, 9], [1, 3, 2]):  # one is masked again, and keeps its first forward
        seen.put_draft(None, torch.tensor(row))
    assert seen.forward == {0: 1, 2: 2, 1: 4} and seen.forwards == 4


def test_every_word_has_a_place_of_its_own_and_appears_at_its_forward():
    tokens = [("The", 2), (" fox", 1), ("<", 2), ("\n", 1), ("Is", 3), (" it", 1), ("?", 3)]
    root = ElementTree.fromstring(unmasking.draw("Say & go:\n", tokens, 3, "5 tokens"))
    words = {group.find(f"{SVG}text").text: group for group in root.iter(f"{SVG}g")}
    assert {word: group.get("class") for word, group in words.items()} == {
        "The": "k2", "fox": "k1", "<": "k2", "Is": "k3", "it": "k1", "?": "k3",
    }  # fmt: skip
    boxes = [(float(b.get("x")), float(b.get("width")), int(b.get("y"))) for b in (g[0] for g in words.values())]
    for x, width, y in boxes:
        assert all(y != other or x + width <= at or at + its <= x for at, its, other in boxes if (at, other) != (x, y))
    assert [text.text for text in root.findall(f"{SVG}text")] == ["Say & go:", "5 tokens"]
    assert all(f"@keyframes k{n}{{" in root.find(f"{SVG}style").text for n in (1, 2, 3))
