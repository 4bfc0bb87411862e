"""An animated picture of an answer as it un-masks: ``python -m bench.report.unmasking --out unmasking.svg``

Every token has its place from the start. It is a grey box until the forward that commits it.
"""

import argparse
from html import escape
from pathlib import Path

import dllm_fast
from bench.task import load
from dllm_fast.cli.demo import ANSWER, SENTENCE
from dllm_fast.decoding.spelling import schedule_of

SIZE, WIDTH, LINE, MARGIN = 16, 9.6, 26, 16  # font size, a character's width, a line's height, pixels
SECONDS, REST = 0.6, 4.0  # of a forward, and of the finished text
STYLE = f"text{{font:{SIZE}px ui-monospace,Menlo,Consolas,monospace;white-space:pre}}"


class Committed:
    """A `generate` streamer that keeps the number of the forward that committed each position."""

    def __init__(self, mask_id: int):
        self.mask_id = mask_id
        self.forward: dict[int, int] = {}
        self.forwards = 0

    def put(self, value) -> None:
        pass

    def put_draft(self, value, sequence) -> None:
        self.forwards += 1
        for position, token in enumerate(sequence.tolist()):
            if token != self.mask_id:
                self.forward.setdefault(position, self.forwards)

    def end(self) -> None:
        pass


def draw(prompt: str, tokens: list[tuple[str, int]], forwards: int, title: str) -> str:
    """The SVG of a prompt and of an answer's tokens, each with the number of its forward, from 1."""
    total = forwards * SECONDS + REST
    rules, shapes, x, y = [STYLE], [], MARGIN, MARGIN + SIZE
    for number in range(1, forwards + 1):
        at = 100 * number * SECONDS / total
        rules.append(f"@keyframes k{number}{{0%,{at:.2f}%{{opacity:0}}{at + 0.01:.2f}%,100%{{opacity:1}}}}")
        rules.append(f".k{number}{{animation:k{number} {total:g}s infinite}}")
    shapes.append(f'<text x="{x}" y="{y}" fill="#777">{escape(prompt.strip())}</text>')
    right, y = x + len(prompt) * WIDTH, y + LINE
    for text, number in tokens:
        if text == "\n":
            x, y = MARGIN, y + LINE
            continue
        word, begin = text.lstrip(" "), x + (len(text) - len(text.lstrip(" "))) * WIDTH
        x += len(text) * WIDTH
        right = max(right, x)
        box = f'x="{begin:.1f}" y="{y - SIZE + 1}" width="{len(word) * WIDTH:.1f}" height="{SIZE + 4}"'
        shapes.append(f'<rect {box} rx="3" fill="#ddd"/><g class="k{number}"><rect {box} fill="#fff"/>')
        shapes.append(f'<text x="{begin:.1f}" y="{y}" textLength="{len(word) * WIDTH:.1f}">{escape(word)}</text></g>')
    y += LINE + 6
    shapes.append(f'<text x="{MARGIN}" y="{y}" fill="#777">{escape(title)}</text>')
    size = f'width="{right + MARGIN:.0f}" height="{y + MARGIN}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{"".join(rules)}</style>'
    return "\n".join([head, f'<rect {size} rx="8" fill="#fff"/>', *shapes, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("--model", default="llada-sentences")
    parser.add_argument("--prompt", default=SENTENCE)
    parser.add_argument("--schedule", default="uniform=13")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    ids = tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    seen = Committed(model.config.mask_token_id)
    schedule, end = schedule_of(options.schedule), tokenizer.eos_token_id
    length = {"gen_length": ANSWER, "block_length": ANSWER}
    out = dllm_fast.generate(model, ids, **length, schedule=schedule, cache="none", streamer=seen)
    answer = out.sequences[0, ids.shape[1] :].tolist()
    answer = answer[: answer.index(end)] if end in answer else answer
    tokens = [(tokenizer.decode([i]), seen.forward[ids.shape[1] + n]) for n, i in enumerate(answer)]
    title = f"{len(answer)} tokens in {out.nfe} forwards"
    options.out.write_text(draw(options.prompt, tokens, out.nfe, title))
    print(f"{options.out}: {title}")


if __name__ == "__main__":
    main()
