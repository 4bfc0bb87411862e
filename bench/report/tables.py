"""What the kernel bench prints: a line for each implementation, a table of ours, one JSON line."""

import json
import math

from bench.floors import Floors, percentile
from bench.ops.timing import Result

SECONDS = ((1e-3, 1e3, "ms"), (0.0, 1e6, "us"))


def duration(seconds: float) -> str:
    scale, unit = next((scale, unit) for least, scale, unit in SECONDS if seconds >= least)
    return f"{seconds * scale:.3g} {unit}"


def percentiles(result: Result) -> str:
    return f"{duration(percentile(result.times, 0.1))} to {duration(percentile(result.times, 0.9))}"


def line(case, name: str, result: Result) -> str:
    """Print one implementation's result."""
    if result.error:
        return f"  {name:<18} {result.error}"
    error = "own noise" if math.isnan(result.relative) else f"error {result.relative:.1e}"
    note = "" if result.how == "graph" else f", {result.how}"
    times = f"  {name:<18} {duration(result.median):>9}  ({percentiles(result)}, {len(result.times)} rounds{note})"
    return f"{times} {error}"


def row(case, results: dict[str, Result], floors: Floors) -> dict:
    """A case's entry in the JSON line; ``aim`` is None if there is no aim."""
    ours = results["ours"].median
    limits = {"copy": case.bytes / floors.copy_bandwidth, "matrix": case.flops / floors.matrix_rate}
    bound = max(limits, key=limits.get)
    peers = {name: result for name, result in results.items() if name != "ours"}
    best = min(peers, key=lambda name: peers[name].median, default=None)
    ratio = peers[best].median / ours if best and math.isfinite(peers[best].median) else None
    share = limits[bound] / ours
    aims = [] if case.aim_ratio is None or ratio is None else [ratio >= case.aim_ratio]
    # Data in the cache can be read faster than memory, and a short kernel can be slower because of its launch.
    aims += [share >= case.aim_share] if case.aim_share and case.bytes > floors.cache_bytes else []
    return {
        "op": case.op, "case": case.name, "bytes": case.bytes, "flops": case.flops, "seconds": ours,
        "bound": bound, "share": share, "best_peer": best if ratio else None, "ratio": ratio,
        "aim_ratio": case.aim_ratio, "aim_share": case.aim_share, "met": all(aims) if aims else None,
        "implementations": {
            name: {"error": result.error} if result.error else {
                "seconds": result.median, "p10": percentile(result.times, 0.1), "p90": percentile(result.times, 0.9),
                "rounds": len(result.times), "how": result.how,
                "relative_error": None if math.isnan(result.relative) else result.relative,
            }
            for name, result in results.items()
        },
    }  # fmt: skip


def verdict(row: dict) -> str:
    """The row as text, printed at once in case the run is interrupted."""
    said = f"  {row['bytes']} bytes, {row['flops']} FLOPs: {row['share']:.0%} of the {row['bound']} floor"
    said += f"; {row['ratio']:.2f} of {row['best_peer']}'s speed" if row["best_peer"] else ""
    return said + {None: "", True: "; aim met", False: "; aim missed"}[row["met"]]


def table(rows: list[dict], results: dict[str, dict[str, Result]]) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Table(title="ours", title_justify="left")
    columns = ("case", "time", "10% to 90%", "MB", "GFLOP", "bound", "share", "best peer", "its time", "ratio", "aim")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i in (0, 7) else "right", no_wrap=True)
    for x in rows:
        timed = results[f"{x['op']}-{x['case']}"]
        peer = x["best_peer"]
        out.add_row(
            f"{x['op']} {x['case']}", duration(x["seconds"]), percentiles(timed["ours"]), f"{x['bytes'] / 1e6:.4g}",
            f"{x['flops'] / 1e9:.4g}", x["bound"], f"{x['share']:.0%}", peer or "none",
            duration(timed[peer].median) if peer else "", f"{x['ratio']:.2f}" if peer else "",
            {None: "", True: "met", False: "missed"}[x["met"]],
        )  # fmt: skip
    Console(width=200).print(out)


def summary(rows: list[dict], floors: Floors, head: str) -> str:
    return json.dumps({"head": head, "copy": floors.copy_bandwidth, "matrix": floors.matrix_rate, "rows": rows})
