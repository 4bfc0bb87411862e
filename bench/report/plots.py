"""The pictures of a run of bench/generation/nfe.py, drawn from its result, in a light and a dark version."""

import io
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.generation.settings import BLOCK, short_names
from bench.generation.stack import PARTS

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A90C",
)  # fmt: skip
CACHES = {"none": (ORANGE, "o"), "prefix": (GREEN, "^"), "dual": (BLUE, "s")}
SCHEDULES = {
    "uniform": (BLUE, "o", "-"), "pyramid": (RED, "^", "--"), "threshold": (GREEN, "s", "-"),
    "factor": (ORANGE, "D", "--"), "entropy-bound": (PINK, "v", "-."), "ancestral": (SKY, "P", ":"),
    "first-hitting": (YELLOW, "X", ":"),
}  # fmt: skip
COLOURS = dict(zip(PARTS, (PINK, BLUE, ORANGE, RED, GREEN, "#888888")))
THEMES = {"light": ("#1b1b1b", "#ffffff", "#d9d9d9"), "dark": ("#e8e8e8", "#16181d", "#3c4048")}
SIZE = (6.0, 4.2)  # inches; readable on a phone with letters of 11 points
BARS = 14


def style(theme: str = "light") -> dict:
    """Matplotlib's settings."""
    ink, paper, grid = THEMES[theme]
    return {
        "font.size": 11, "axes.titlesize": 12, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink,
        "xtick.color": ink, "ytick.color": ink, "figure.facecolor": paper, "axes.facecolor": paper,
        "grid.color": grid, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "dllm_fast", "figure.figsize": SIZE, "figure.constrained_layout.use": True,
    }  # fmt: skip


def draw(result: dict, theme: str = "light") -> dict[str, Figure]:
    """The pictures that the result has data for, by name."""
    pictures: dict[str, Callable[[dict], Figure | None]] = {
        "accuracy": accuracy, "variants": variants, "speed": speed, "parts": parts,
    }  # fmt: skip
    with plt.rc_context(style(theme)):
        drawn = {name: picture(result) for name, picture in pictures.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save(result: dict, stem: Path) -> list[Path]:
    """Write each picture as ``stem``-NAME.svg and .png."""
    paths = []
    for name, figure in draw(result).items():
        for kind in ("svg", "png"):
            paths.append(stem.with_name(f"{stem.name}-{name}.{kind}"))
            figure.savefig(paths[-1], dpi=160, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)
    return paths


def svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def title(result: dict) -> str:
    weights = "" if result["trained"] else ", random weights"
    return f"{result['model']}{weights}, {result['prompt']} + {result['gen_length']} tokens"


def _nfe_axis(axes, values: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(values) / 1.3, max(values) * 1.2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)


def speed(result: dict) -> Figure | None:
    """Tokens per second against NFE, with a panel for each batch size and a line for each cache's Uniform settings."""
    rows = result["speed"]["rows"]
    if not rows:
        return None
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["peer"] for row in result["speed"]["peers"]))
    size = (SIZE[0], 1.6 + 2.9 * len(batches))
    figure, panels = plt.subplots(len(batches), 1, figsize=size, sharex=True, squeeze=False)
    for axes, batch in zip(panels[:, 0], batches):
        here = [row for row in rows if row["batch"] == batch]
        for cache, (colour, marker) in CACHES.items():
            _speeds(axes, [row for row in here if row["setting"]["cache"] == cache], cache, colour, marker)
        # A peer that does not report its NFE ran a schedule that fixes it: its NFE is ours.
        ours = {row["setting"]["name"]: row["nfe"] for row in here}
        peers = [row for row in result["speed"]["peers"] if row["batch"] == batch]
        _peers(axes, [row | {"nfe": row["nfe"] or ours[row["ours"]]} for row in peers], names)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _nfe_axis(axes, [row["nfe"] for row in rows])
        axes.set_ylabel("new tokens per second")
        axes.set_title(f"batch {batch}", loc="left", fontsize=11)
    panels[-1, 0].set_xlabel("NFE (forwards per answer)")
    _heading(figure, title(result))
    handles = {label: handle for axes in panels[:, 0] for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _heading(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=12)


def _usual(setting: dict) -> bool:
    return (setting["refresh"], setting["remask"], setting["confidence"]) == ("block", "none", "probability")


def _speeds(axes, rows: list[dict], cache: str, colour: str, marker: str) -> None:
    """Medians with bars from the slowest to the fastest round; hollow unless Uniform."""
    uniform = [row for row in rows if _usual(row["setting"]) and row["setting"]["schedule"].startswith("uniform")]
    rest = [row for row in rows if row not in uniform]
    for here, line, fill, label in ((uniform, "-", "full", "uniform"), (rest, "", "none", "others")):
        here = sorted(here, key=lambda row: row["nfe"])
        speeds = [[row["new_tokens"] / seconds for seconds in row["seconds"]] for row in here]
        middle = [statistics.median(s) for s in speeds]
        spread = [[m - min(s) for m, s in zip(middle, speeds)], [max(s) - m for m, s in zip(middle, speeds)]]
        if here:
            axes.errorbar(
                [row["nfe"] for row in here], middle, spread, color=colour, marker=marker, linestyle=line,
                fillstyle=fill, markersize=6, linewidth=1.5, capsize=3, label=f"cache {cache}, {label}",
            )  # fmt: skip


def _peers(axes, rows: list[dict], names: list[str]) -> None:
    """A marker for each of ``names``, in the colour of the cache that it names, if any."""
    for name, marker in zip(names, "x+1234xx"):
        here = sorted((row for row in rows if row["peer"] == name), key=lambda row: row["nfe"])
        x, y = [row["nfe"] for row in here], [row["tokens_per_s"] for row in here]
        colour = CACHES.get(name.split()[-1], (plt.rcParams["text.color"],))[0]
        axes.plot(x, y, marker, color=colour, markersize=9, markeredgewidth=1.8, label=name)


def accuracy(result: dict) -> Figure | None:
    """Share of right answers against NFE, with a line for each schedule and a dot for each seed."""
    rows = [row for row in result.get("accuracy", {}).get("rows", []) if row["setting"]["cache"] == "none"]
    rows = [row for row in rows if _usual(row["setting"]) and row["setting"]["block_length"] == BLOCK]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(SIZE[0], 4.8))
    for kind, (colour, marker, line) in SCHEDULES.items():
        here = [row for row in rows if row["setting"]["schedule"].partition("=")[0] == kind]
        here.sort(key=lambda row: row["nfe"])
        if not here:
            continue
        x, y = [row["nfe"] for row in here], [100 * row["exact"] for row in here]
        spread = [[v - 100 * row["interval"][0] for v, row in zip(y, here)],
                  [100 * row["interval"][1] - v for v, row in zip(y, here)]]  # fmt: skip
        axes.errorbar(x, y, spread, color=colour, marker=marker, linestyle=line, markersize=6, capsize=3, label=kind)
        for row in here:
            seeds = [100 * one["right"].count("1") / len(one["right"]) for one in row["seeds"]]
            axes.plot([row["nfe"]] * len(seeds), seeds, ".", color=colour, markersize=3, alpha=0.7)
    _nfe_axis(axes, [row["nfe"] for row in rows])
    axes.set_ylim(-3, 103)
    axes.set_ylabel("right answers, %")
    axes.set_xlabel("NFE (forwards per answer)")
    axes.set_title("bars: 95 % interval over all problems; dots: each seed", loc="left", fontsize=10)
    _heading(figure, f"{title(result)}, no cache")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def variants(result: dict) -> Figure | None:
    """Confidences, self-correction, caches and refreshes for one schedule each, as a list of intervals."""
    rows = result.get("accuracy", {}).get("rows", [])
    groups = {}
    for row in rows:
        groups.setdefault(row["setting"]["schedule"], []).append(row)
    groups = {name: group for name, group in groups.items() if len(group) > 3}
    if not groups:
        return None
    lines = sum(map(len, groups.values()))
    figure, panels = plt.subplots(
        len(groups), 1, figsize=(SIZE[0], 1.3 + 0.24 * lines), sharex=True, squeeze=False,
        height_ratios=[len(group) for group in groups.values()],
    )  # fmt: skip
    for axes, (schedule, group) in zip(panels[:, 0], groups.items()):
        group = group[::-1]
        for at, row in enumerate(group):
            colour, marker = CACHES[row["setting"]["cache"]]
            value, (low, high) = 100 * row["exact"], row["interval"]
            spread = [[value - 100 * low], [100 * high - value]]
            axes.errorbar(value, at, xerr=spread, color=colour, marker=marker, markersize=5, capsize=2)
        labels = [f"{row['setting']['name'].removeprefix(schedule).strip()}  {row['nfe']:.1f}" for row in group]
        axes.set_yticks(range(len(group)), labels, fontsize=9)
        axes.set_ylim(-0.7, len(group) - 0.3)
        axes.set_title(f"{schedule} (setting, then NFE)", loc="left", fontsize=11)
        axes.grid(True, axis="x", linewidth=0.6)
    panels[-1, 0].set_xlabel("right answers, %, with 95 % interval")
    _heading(figure, title(result))
    return figure


def parts(result: dict) -> Figure | None:
    """Milliseconds per forward, stacked by part."""
    rows = _telling(result["speed"]["rows"])
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.9 + 0.32 * len(rows)))
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row["ms_per_nfe"][part] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=COLOURS[part], label=part, height=0.7)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_yticks(range(len(rows)), short_names(rows), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per forward")
    _heading(figure, title(result))
    axes.grid(True, axis="x", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _telling(rows: list[dict]) -> list[dict]:
    """For each cache and batch size, the settings with the most and the fewest forwards, whose mixes of full and block
    forwards differ most; and one setting for each other refresh."""
    found, groups = [], {}
    for row in rows:
        if row["setting"]["remask"] == "none" and row["setting"]["confidence"] == "probability":
            key = (
                row["setting"]["refresh"] != "block",
                row["batch"],
                row["setting"]["cache"],
                row["setting"]["refresh"],
            )
            groups.setdefault(key, []).append(row)
    for (other, *_), group in sorted(groups.items()):
        ends = [max(group, key=lambda row: row["nfe"])] + ([] if other else [min(group, key=lambda row: row["nfe"])])
        found += [row for n, row in enumerate(ends) if row not in ends[:n]]
    return found[:BARS]
