"""One self-contained HTML page of a run of `nfe`, readable on a phone and on a projector.

python -m bench.report.page bench/results/cpu-2-cores/nfe-llada-steps.json  # from a stored run
"""

import base64
import statistics
import sys
from html import escape
from pathlib import Path

from bench.common import spread
from bench.generation.settings import short_names
from bench.report import plots
from bench.report.store import read, save

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --soft: #5c5c5c; --line: #d9d9d9; --card: #f4f5f7;
  --holds: #006b4f; --fails: #b23a00; --undecided: #6b5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181d; --soft: #a9adb5; --line: #3c4048;
  --card: #20232a; --holds: #4fd1a5; --fails: #ff9a66; --undecided: #e6cf5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem clamp(0.8rem, 3vw, 3rem) 3rem; background: var(--paper);
  color: var(--ink); font: clamp(1rem, 0.9rem + 0.35vw, 1.3rem)/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6em; line-height: 1.2; margin: 0.6em 0 0.2em; }
h2 { font-size: 1.25em; margin: 1.6em 0 0.4em; }
p, li, figcaption { max-width: 60em; }
.soft, figcaption { color: var(--soft); font-size: 0.9em; overflow-wrap: anywhere; }
.cards, .pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 36rem), 1fr)); }
.pictures { align-items: start; }
.card { background: var(--card); border-radius: 0.5rem; padding: 0.8rem 1rem; }
.card h3 { margin: 0; font-size: 1.05em; }
.card ul { margin: 0.5em 0 0; padding-left: 1.1em; font-size: 0.9em; overflow-wrap: anywhere; }
.verdict { font-weight: 700; }
.holds { color: var(--holds); } .fails { color: var(--fails); } .undecided { color: var(--undecided); }
figure { margin: 0; } img { display: block; width: 100%; height: auto; border-radius: 0.3rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85em; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25em 0.7em; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; }
"""

CAPTIONS = {
    "accuracy": "Accuracy against NFE. A problem's NFE is its own row's; schedules that use the confidence take "
    "more forwards for problems that need them.",
    "variants": "The same schedule with other confidences, with self-correction, with caches and refreshes.",
    "speed": "New tokens per second against NFE: medians of interleaved rounds, bars from the slowest to the fastest. "
    "Hollow: schedules other than uniform, and settings that are not at their defaults.",
    "parts": "Milliseconds per forward. matmul: the layers' matmuls; predict: LM head and selection; host: time "
    "outside of all operations.",
}


def page(result: dict) -> str:
    """The page, whole."""
    head = f"{result['model']}: speed and accuracy against NFE"
    parts = [f"<h1>{escape(head)}</h1>", *_facts(result), *_claims(result), *_pictures(result)]
    parts += _speed(result) + _accuracy(result) + _not_run(result)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(head)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([*parts, "</body>", "</html>", ""])
    )  # fmt: skip


def _facts(result: dict) -> list[str]:
    rates = result["rates"]
    lines = [
        "NFE is the number of forwards that an answer takes. Speeds count new tokens only, never the prompt.",
        f"{result['machine']}; load average {result['load']:.2f} when it began; copies "
        f"{rates['copy'] / 1e9:.1f} GB/s and does matmuls at {rates['matrix'] / 1e12:.3f} TFLOP/s; a step's "
        "floor is the longer of its bytes and its FLOPs at these rates.",
    ]
    if result.get("quick"):
        lines.append("A dry run: one round, with rates that mean nothing.")
    if not result["trained"]:
        lines.append("Random weights: a fixed schedule, not the model, sets the tokens per step; no answer is right.")
    return [f'<p class="soft">{escape(line)}</p>' for line in lines]


def _claims(result: dict) -> list[str]:
    claims = result.get("accuracy", {}).get("claims", [])
    cards = []
    for claim in claims:
        figures = "".join(f"<li>{escape(figure)}</li>" for figure in claim["figures"])
        verdict = f'<span class="verdict {claim["verdict"]}">{claim["verdict"]}</span>'
        said = f"“{escape(claim['said'])}”"
        cards.append(
            f'<div class="card"><h3>{said}: {verdict}</h3><div class="soft">{escape(claim["by"])}</div>'
            f"<ul>{figures}</ul></div>"
        )
    if not cards:
        return []
    intro = "Differences on the same problems, in percentage points, with 95 % intervals. No cost: less than one point."
    title = "<h2>Other people's claims, tested</h2>"
    return [title, f'<p class="soft">{intro}</p>', '<div class="cards">', *cards, "</div>"]


def _pictures(result: dict) -> list[str]:
    drawn = {theme: {name: plots.svg(f) for name, f in plots.draw(result, theme).items()} for theme in plots.THEMES}
    found = ["<h2>Pictures</h2>", '<div class="pictures">']
    for name in drawn["light"]:
        light, dark = (_inline(drawn[theme][name]) for theme in ("light", "dark"))
        found.append(
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f'<img src="{light}" alt="{escape(CAPTIONS[name])}"></picture><figcaption>{escape(CAPTIONS[name])}'
            "</figcaption></figure>"
        )
    return [*found, "</div>"]


def _inline(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _table(title: str, note: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    def cells(tag: str, row: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    table = f'<div class="table"><table><thead>{cells("th", columns)}</thead>\n<tbody>{body}</tbody></table></div>'
    return [f"<h2>{escape(title)}</h2>", f'<p class="soft">{escape(note)}</p>', table]


def _speed(result: dict) -> list[str]:
    rows, found = result["speed"]["rows"], []
    for batch in sorted({row["batch"] for row in rows}):
        here = [row for row in rows if row["batch"] == batch]
        cells = []
        for name, row in zip(short_names(here), here):
            speeds = [row["new_tokens"] / seconds for seconds in row["seconds"]]
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
            cells.append([
                name, f"{row['nfe']}", f"{row['nfe_full']} + {row['nfe_block']}", f"{row['tokens_per_nfe']:.2f}",
                _ms(row, "full"), _ms(row, "block"), spread(speeds, 0 if min(speeds) >= 100 else 1),
                f"{row['over_floor']:.2f}", peak,
            ])  # fmt: skip
        columns = ["setting", "NFE", "full + block", "tokens/NFE", "ms full (floors)", "ms block (floors)",
                   "new tokens/s", "run / floor", "peak MiB"]  # fmt: skip
        note = "Medians and ranges. In brackets: a step's time / its floor."
        found += _table(f"Speed, batch {batch}", note, columns, cells)
    peers = result["speed"]["peers"]
    if peers:
        cells = [
            [row["peer"], row["schedule"], str(row["batch"]), f"{row['tokens_per_s']:.1f}", row["ours"],
             spread(row["times_ours"]), f"{row['same_tokens']} of {row['new_tokens']}"]
            for row in peers
        ]  # fmt: skip
        columns = ["who", "schedule", "batch", "new tokens/s", "against ours", "times as long", "same tokens"]
        note = "The same weights, prompts, schedule and number of tokens, in the same interleaved rounds."
        found += _table("Other generators on the same weights", note, columns, cells)
    return found


def _ms(row: dict, kind: str) -> str:
    if kind not in row["kinds"]:
        return ""
    ms = statistics.median(row["kinds"][kind]["ms"])
    return f"{ms:.2f} ({ms / row['kinds'][kind]['floor_ms']:.1f})"


def _accuracy(result: dict) -> list[str]:
    if "accuracy" not in result:
        return []
    found, cells = result["accuracy"], []
    for row in sorted(found["rows"], key=lambda row: -row["nfe"]):
        seeds = " ".join(f"{one['right'].count('1') / len(one['right']):.1%}" for one in row["seeds"])
        share = "{:.1%} ({:.1%} to {:.1%})".format(row["exact"], *row["interval"])
        cells.append([row["setting"]["name"], f"{row['nfe']:.2f}", share, seeds, f"{row['token']:.2%}"])
    note = f"{found['problems']} problems for each of {len(found['seeds'])} seeds; 95 % intervals over all of them."
    columns = ["setting", "NFE", "right", "each seed", "characters right"]
    return _table(f"Accuracy: {found['task']}", note, columns, cells)


def _not_run(result: dict) -> list[str]:
    lines = "".join(f"<li>{escape(line)}</li>" for line in result["speed"]["not_run"])
    return [f'<h2>Not run</h2>\n<ul class="soft">{lines}</ul>'] if lines else []


def write(result: dict, stem: Path) -> None:
    """Write ``stem``.json, .csv, .html and the pictures."""
    save(result, stem)
    plots.save(result, stem)
    stem.with_suffix(".html").write_text(page(result))


def main() -> None:
    for name in sys.argv[1:]:
        result = read(Path(name))
        stem = Path(name).with_name(f"nfe-{result['model']}")
        write(result, stem)
        print(stem.with_suffix(".html"))


if __name__ == "__main__":
    main()
