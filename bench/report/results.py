"""Generates the tables of speeds and the pictures in docs/results.md from `nfe`'s results under bench/results/.

python -m bench.report.results            # writes them
python -m bench.report.results --check    # exits with 1 if the page is outdated
"""

import json
import sys
from pathlib import Path

from bench.common import spread

ROOT, PAGE = Path(__file__).parents[2], Path("docs", "results.md")
BEGIN, END = "<!-- speed: written by python -m bench.report.results -->\n", "<!-- end of speed -->\n"
SHOWN, CACHES = ("pyramid=1", "threshold=0.9", "factor=1"), ("none", "dual")  # schedules besides Uniform; caches


def section(root: Path) -> str:
    """The text between the two marks, from every results/MACHINE/nfe-MODEL.json."""
    parts = []
    for path in sorted((root / "bench" / "results").glob("*/nfe-*.json")):
        parts += _result(json.loads(path.read_text()), Path("..") / path.relative_to(root))
    return "\n".join(parts) if parts else "Nothing has been measured yet.\n"


def _result(result: dict, path: Path) -> list[str]:
    rows = shown(result["speed"]["rows"])
    parts = []
    if rows:
        parts += [_told(result, path), *_table(result, rows)]
    if "accuracy" in result:
        parts += [_accuracy(result, path)]
    name = "accuracy" if "accuracy" in result else "speed"
    picture = path.with_name(f"{path.stem}-{name}.svg")
    return [*parts, f"![{result['model']}: {name} against NFE]({picture})\n"]


def _told(result: dict, path: Path) -> str:
    """Where and how it was measured, and whether the machine was busy."""
    busy = f", on a **busy** machine (load average {result['load']:.1f}): not to be held against figures from elsewhere"
    weights = "" if result["trained"] else ", random weights"
    note = "; a **dry run**, whose figures mean nothing" if result["quick"] else busy if result["busy"] else ""
    return (
        f"`{result['model']}`{weights}, {result['prompt']} + {result['gen_length']} tokens: {result['machine']}{note} "
        f"([all settings]({path.with_suffix('.csv')}), [page]({path.with_suffix('.html')})):\n"
    )


def shown(rows: list[dict]) -> list[dict]:
    """Selected rows at the smallest batch size and the most common block length, without a cache and with the dual one:
    Uniform at the most and the fewest steps, and `SHOWN`."""
    batch, pairs = min((row["batch"] for row in rows), default=0), {}
    lengths = [row["setting"]["block_length"] for row in rows]
    usual = ("block", "none", "probability", max(lengths, key=lengths.count, default=0))
    for row in rows:
        setting = row["setting"]
        rest = tuple(setting[name] for name in ("refresh", "remask", "confidence", "block_length"))
        if (row["batch"], rest) == (batch, usual) and setting["cache"] in CACHES:
            pairs.setdefault(setting["schedule"], {})[setting["cache"]] = row
    pairs = {key: pair for key, pair in pairs.items() if len(pair) == len(CACHES)}
    uniform = sorted((key for key in pairs if key.startswith("uniform")), key=lambda key: pairs[key]["none"]["nfe"])
    kept = {*uniform[:1], *uniform[-1:], *(key for key in pairs if key in SHOWN)}
    order = sorted(kept, key=lambda key: (-pairs[key]["none"]["nfe"], key))
    return [pairs[key][cache] for key in order for cache in CACHES]


def _table(result: dict, rows: list[dict]) -> list[str]:
    """A table of speeds, with ratios to the published sampler (our transcription or LLaDA's code) and to Fast-dLLM with
    the same cache."""
    scores = {row["setting"]["name"]: row for row in result.get("accuracy", {}).get("rows", [])}
    columns = ["schedule", "cache", "NFE, full + block", "new tokens/s", "× published", "× Fast-dLLM", "right"]
    cells = []
    for row in rows:
        setting, score = row["setting"], scores.get(row["setting"]["name"])
        speeds = [row["new_tokens"] / seconds for seconds in row["seconds"]]
        cells.append([
            setting["schedule"], setting["cache"], f"{row['nfe_full']} + {row['nfe_block']}",
            spread(speeds, 0 if min(speeds) >= 100 else 1),
            _times(result, row, "published") or _times(result, row, "llada"),
            _times(result, row, f"fast-dllm {setting['cache']}"), f"{score['exact']:.1%}" if score else "",
        ])  # fmt: skip
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    lines = [[columns[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in cells)]
    return ["\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"]


def _times(result: dict, row: dict, name: str) -> str:
    """The ratio to the peer's speed at the same schedule and batch size, round by round."""
    for peer in result["speed"]["peers"]:
        if (peer["peer"], peer["schedule"], peer["batch"]) == (name, row["setting"]["schedule"], row["batch"]):
            return spread([its / ours for its, ours in zip(peer["seconds"], row["seconds"], strict=True)])
    return ""


def _accuracy(result: dict, path: Path) -> str:
    found = result["accuracy"]
    claims = [f"- “{c['said']}” ({c['by']}) **{c['verdict']}**: {c['because']}." for c in found["claims"]]
    problems = found["problems"] * len(found["seeds"])
    return (
        f"Accuracy of `{result['model']}` on the task `{found['task']}`, {problems} problems, "
        f"{len(found['rows'])} settings ([page]({path.with_suffix('.html')}), with all figures). Other people's "
        "claims about schedules, on this task:\n\n" + "\n".join(claims) + "\n"
    )  # fmt: skip


def written(root: Path) -> str:
    """The page with its section up to date. Raises ValueError if it has no marks for the section."""
    text = (root / PAGE).read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: no lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{section(root)}\n{END}{after}"


def main(arguments: list[str], root: Path = ROOT) -> int:
    new = written(root)
    if "--check" not in arguments:
        (root / PAGE).write_text(new)
    elif new != (root / PAGE).read_text():
        print(f"the speeds in {PAGE} are outdated: run python -m bench.report.results", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
