"""The files of a run of bench/generation/nfe.py: everything as JSON, and the rows as CSV."""

import csv
import json
import statistics
from pathlib import Path

COLUMNS = (
    "model", "setting", "schedule", "cache", "refresh", "remask", "confidence", "temperature", "block_length", "batch",
    "prompt", "new_tokens", "nfe", "nfe_full", "nfe_block", "tokens_per_nfe", "tokens_per_s", "tokens_per_s_least",
    "tokens_per_s_most", "full_ms", "block_ms", "window_ms", "mixed_ms", "full_floor_ms", "block_floor_ms",
    "over_floor", "peak_mib", "exact", "exact_low", "exact_high", "token", "task_nfe", "problems",
)  # fmt: skip


def save(result: dict, stem: Path) -> None:
    """``stem``.json and ``stem``.csv."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(_lines(result) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat(result))


def _lines(value, depth: int = 0) -> str:
    """JSON with a line for each entry of the outer dicts and lists, so that diff shows how two runs differ."""
    indent = "\n" + " " * (depth + 1)
    if depth < 2 and isinstance(value, dict) and value:
        inner = ("," + indent).join(f"{json.dumps(key)}: {_lines(item, depth + 1)}" for key, item in value.items())
        return "{" + indent + inner + "\n" + " " * depth + "}"
    if depth and isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + indent + ("," + indent).join(map(json.dumps, value)) + "\n" + " " * depth + "]"
    return json.dumps(value)


def read(path: Path) -> dict:
    """A stored result, from a .json file or a run's output with its JSON line. Raises ValueError if there is none."""
    text = path.read_text()
    if path.suffix == ".json":
        return json.loads(text)
    for line in reversed(text.splitlines()):
        if line.startswith('{"bench": "nfe"'):
            return json.loads(line)
    raise ValueError(f"{path}: holds no JSON line of bench/generation/nfe.py")


def flat(result: dict) -> list[dict]:
    """The CSV's rows: a setting at a batch size, with its accuracy. Settings scored but not timed come last."""
    scores = {score["setting"]["name"]: score for score in result.get("accuracy", {}).get("rows", [])}
    rows = []
    for row in result["speed"]["rows"]:
        name = row["setting"]["name"]
        rows.append(_facts(result, row["setting"]) | _speed(row) | _score(scores.get(name)))
    timed = {row["setting"] for row in rows}
    rows += [_facts(result, s["setting"]) | _score(s) for name, s in scores.items() if name not in timed]
    return rows


def _facts(result: dict, setting: dict) -> dict:
    rest = {name: value for name, value in setting.items() if name != "name"}
    return {"model": result["model"], "setting": setting["name"], **rest}


def _speed(row: dict) -> dict:
    speeds = [row["new_tokens"] / seconds for seconds in row["seconds"]]
    same = ("batch", "prompt", "new_tokens", "nfe", "nfe_full", "nfe_block", "tokens_per_nfe", "over_floor")
    found = {name: row[name] for name in same} | {"tokens_per_s": statistics.median(speeds)}
    found |= {"tokens_per_s_least": min(speeds), "tokens_per_s_most": max(speeds)}
    for kind, facts in row["kinds"].items():
        found[f"{kind}_ms"] = statistics.median(facts["ms"])
        if kind in ("full", "block"):
            found[f"{kind}_floor_ms"] = facts["floor_ms"]
    return found | {"peak_mib": row["peak_bytes"] and row["peak_bytes"] / 2**20}


def _score(score: dict | None) -> dict:
    if score is None:
        return {}
    low, high = score["interval"]
    return {
        "exact": score["exact"], "exact_low": low, "exact_high": high, "token": score["token"],
        "task_nfe": score["nfe"], "problems": score["problems"],
    }  # fmt: skip
