"""Speed and accuracy against NFE, the number of forwards, for schedules, caches, refreshes, batch sizes and peers.

    python -m bench.generation.nfe --model llada-steps --task steps  # accuracy of every schedule, and claims about them
    python -m bench.generation.nfe --model cpu-768 --peer published --peer fast-dllm=PATH
    python -m bench.generation.nfe --model llada-8b --device cuda --schedule uniform=88 uniform=32 --batch 1 8

A model is a shipped one, a folder, or a published shape with random weights. Confidences from random weights mean
nothing, so these refuse schedules that use them: only a fixed schedule sets the tokens per step. Everything runs once,
untimed, and then in interleaved rounds on an idle machine. Speeds count generated tokens only. Writes nfe-MODEL.json,
.csv, plots and one self-contained page into --out; ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from bench import floors
from bench.common import IDLE_LOAD, machine, require_idle, spread
from bench.generation.settings import ADAPTIVE, Setting, short_names, study, swept
from bench.generation.subjects import Subject, names, open_subject, usual_texts
from bench.generation.sweep import Rates, time_settings
from bench.peers import read_spec
from bench.quality.accuracy import on_task, score
from bench.quality.claims import claims
from bench.report.store import read, save
from bench.task import TASKS
from dllm_fast import shipped
from dllm_fast.cli.view import print_table
from dllm_fast.decoding.options import CACHES, CONFIDENCES
from dllm_fast.decoding.spelling import refresh_of, remask_of, schedule_of


def usual_settings(subject: Subject) -> list[Setting]:
    """Uniform with the shape's steps, half and twice as many, and Pyramid; each without a cache and with a dual one."""
    shape = subject.shape
    blocks, steps = shape.gen_length // shape.block_length, int(shape.schedule.partition("=")[2])
    counts = [n for n in (2 * steps, steps, steps // 2) if n % blocks == 0 and n <= shape.gen_length]
    schedules = [f"uniform={n}" for n in counts] + ["pyramid=1"]
    return swept(schedules, ["none", "dual"], ["block"], ["none"], ["probability"], [shape.block_length])


def asked_settings(options, subject: Subject) -> list[Setting]:
    """The settings that the command line asks for, or default ones. Raises ValueError if they need a trained model."""
    if options.schedule is None and options.task:
        settings = study(subject.shape.gen_length, not options.few)
    elif options.schedule is None:
        settings = usual_settings(subject)
    else:
        blocks = options.block_length or [subject.shape.block_length]
        settings = swept(options.schedule, options.cache, options.refresh, options.remask, options.confidence, blocks)
    unsure = sorted({setting.schedule for setting in settings if setting.kind in ADAPTIVE})
    if unsure and not subject.trained:
        raise ValueError(
            f"--schedule {' '.join(unsure)}: {subject.name} has random weights, whose confidences mean "
            "nothing, and with them these schedules' tokens per step; take uniform=N or pyramid=N"
        )
    return settings


def print_rows(rows: list[dict], batch: int) -> None:
    def kind(row: dict, name: str) -> str:
        return f"{statistics.median(row['kinds'][name]['ms']):.2f}" if name in row["kinds"] else ""

    cells = []
    for name, row in zip(short_names(rows), rows):
        least, middle, most = (f(row["seconds"]) for f in (min, statistics.median, max))
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        cells.append([
            name, f"{row['nfe_full']}+{row['nfe_block']}", f"{row['tokens_per_nfe']:.2f}", kind(row, "full"),
            kind(row, "block"), f"{row['tokens_per_s']:.4g}", f"{(most - least) / middle:.0%}",
            f"{row['over_floor']:.1f}", peak,
        ])  # fmt: skip
    columns = ["setting", "NFE", "tok/NFE", "full", "block", "tok/s", "range", "floors", "MiB"]
    title = f"batch {batch}: forwards (full+block), ms of each kind, new tokens per second, time / floor, memory"
    print_table(columns, cells, title)


def print_peers(rows: list[dict]) -> None:
    cells = [
        [f"{row['peer']}, {row['schedule']}", f"{row['tokens_per_s']:.1f}", spread(row["times_ours"]),
         f"{row['same_tokens']} of {row['new_tokens']}" + ("" if row["same_algorithm"] else " *")]
        for row in rows
    ]  # fmt: skip
    if cells:
        title = "others on the same weights and prompts (* another algorithm: its tokens may differ from ours)"
        print_table(["peer", "tokens/s", "times as long as ours", "tokens as ours"], cells, title)


def print_scores(found: dict) -> None:
    cells = []
    for row in sorted(found["rows"], key=lambda row: -row["nfe"]):
        low, high = row["interval"]
        seeds = " ".join(f"{one['right'].count('1') / len(one['right']):.1%}" for one in row["seeds"])
        share = f"{row['exact']:.1%} ({low:.1%}-{high:.1%})"
        cells.append([row["setting"]["name"], f"{row['nfe']:.1f}", share, seeds, f"{row['token']:.2%}"])
    columns = ["setting", "NFE", "right (95 % interval)", "of each seed", "characters"]
    print_table(columns, cells, f"{found['task']}: {found['problems']} problems of each of {len(found['seeds'])} seeds")
    for claim in found["claims"]:
        print(f'\n"{claim["said"]}" ({claim["by"]}): {claim["verdict"]}')
        for figure in claim["figures"]:
            print(f"  {figure}")


def stored_scores(path: Path, subject: Subject) -> dict:
    """A stored run's scores, with its claims checked again. Raises ValueError if they are another model's."""
    result = read(path)
    if result["model"] != subject.name or "accuracy" not in result:
        raise ValueError(f"--scores {path}: no scores of {subject.name}")
    found = result["accuracy"]
    return {**found, "claims": claims(found["rows"], subject.shape.gen_length)}


def scores(options, subject: Subject, settings: list[Setting]) -> dict:
    """Every setting's score. Scoring takes long, so each score is appended to a file beside the results, from which an
    interrupted run continues."""
    seeds, rows = list(range(options.seeds)), []
    job = {"model": subject.name, "task": options.task, "seeds": seeds, "problems": options.problems}
    kept = options.out / f"nfe-{subject.name}.unfinished.jsonl"
    known = {row["setting"]["name"]: row for row in unfinished(kept, job)}
    options.out.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(json.dumps({"job": job, "row": row}) + "\n" for row in known.values()))
    for n, setting in enumerate(settings, 1):
        begin, row = time.perf_counter(), known.get(setting.name)
        if row is None:
            row = score(subject, setting, TASKS[options.task], seeds, options.problems, options.task_batch)
            with kept.open("a") as file:
                file.write(json.dumps({"job": job, "row": row}) + "\n")
        rows.append(row)
        line = f"{n} of {len(settings)}: {setting.name}: {row['exact']:.1%} at NFE {row['nfe']:.1f}"
        print(f"{line}, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    kept.unlink(missing_ok=True)
    found = {"task": options.task, "seeds": seeds, "problems": options.problems, "rows": rows}
    return found | {"claims": claims(rows, subject.shape.gen_length)}


def unfinished(path: Path, job: dict) -> list[dict]:
    """The scores from an interrupted run of the same ``job``. The file may end in half a line."""
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line["row"] for line in map(json.loads, whole) if line["job"] == job]


def speeds(options, subject: Subject, settings: list[Setting], texts: list[str], rates: Rates) -> dict:
    found = {"rows": [], "peers": [], "not_run": []}
    for batch in options.batch if options.rounds else ():
        ids = subject.prompts(batch, texts)
        one = time_settings(subject, settings, ids, rates, options.rounds, options.peer)
        print()
        for line in one["not_run"]:
            print(line)
        print_rows(one["rows"], batch)
        print_peers(one["peers"])
        for name in found:
            found[name] += one[name]
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llada-steps", help=f"a folder, or one of {names()}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = "default: float32 for a shipped model on a CPU, else bfloat16"
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help=dtypes)
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    sweep = parser.add_argument_group(
        "settings: all combinations; without --schedule, a few defaults or the task's study"
    )
    sweep.add_argument("--schedule", nargs="+", metavar="S", help="uniform=32, pyramid=1, threshold=0.9, factor=1, "
                       "entropy-bound=0.1, first-hitting, ancestral=32")  # fmt: skip
    sweep.add_argument("--cache", nargs="+", choices=CACHES, default=["none", "dual"])
    sweep.add_argument("--refresh", nargs="+", metavar="R", default=["block"], help="block, every=2, window=32,0, ...")
    sweep.add_argument("--remask", nargs="+", metavar="R", default=["none"], help="none, remdm=0.1, verify=0.7, p2=1")
    sweep.add_argument("--confidence", nargs="+", choices=CONFIDENCES, default=["probability"])
    sweep.add_argument("--block-length", nargs="+", type=int, metavar="N")
    sweep.add_argument("--batch", nargs="+", type=int, metavar="B", default=[1])
    task = parser.add_argument_group("accuracy")
    task.add_argument("--task", choices=list(TASKS), help="a task that the model was trained for")
    task.add_argument("--few", action="store_true", help="a few settings instead of the whole study")
    task.add_argument("--seeds", type=int, default=3, help="sets of problems, each with its own noise")
    task.add_argument("--problems", type=int, default=200, help="of each seed")
    task.add_argument("--scores", type=Path, metavar="JSON", help="use a stored run's scores, and measure times only")
    task.add_argument("--task-batch", type=int, default=50, help="problems evaluated together")
    parser.add_argument("--prompts", type=Path, help="a text file with a prompt for a trained model on each line")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each setting; 0: only accuracy")
    parser.add_argument("--peer", action="append", metavar="NAME=PATH", help="see bench/peers.py")
    parser.add_argument("--quick", action="store_true", help="one round, floors not measured, even on a busy machine")
    parser.add_argument("--force", action="store_true", help="measure even on a busy machine")
    parser.add_argument("--out", type=Path, default=Path("runs/nfe"), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.force = 1, True
    try:
        for texts, read in ((options.schedule or [], schedule_of), (options.refresh, refresh_of)):
            for text in texts:
                read(text)
        for text in options.remask:
            text == "none" or remask_of(text)
        for spec in options.peer or ():
            read_spec(spec)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    return options


def prepare(options, dtype: torch.dtype, device: torch.device):
    """(subject, settings, prompts, stored scores or None). Raises ValueError if options do not go together."""
    subject = open_subject(options.model, dtype, device)
    texts = options.prompts.read_text().splitlines() if options.prompts else usual_texts(subject.name)
    if options.task:
        subject, texts = on_task(subject, TASKS[options.task], max(options.batch))
    if subject.trained and not texts:
        raise ValueError(f"--model {options.model}: a trained model needs --task or --prompts FILE")
    stored = stored_scores(options.scores, subject) if options.scores else None
    return subject, asked_settings(options, subject), texts, stored


def leave(result: dict, stem: Path) -> None:
    """Write ``stem``.json and .csv, and the pictures and page if matplotlib is installed."""
    try:
        from bench.report.page import write
    except ImportError as error:
        save(result, stem)
        print(f"\n{stem}.json, .csv; {error}: make its pages elsewhere with python -m bench.report.page")
    else:
        write(result, stem)
        print(f"\n{stem}.json, .csv, .html")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    usual = "float32" if options.model in shipped() and device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, options.dtype or usual)
    load = require_idle(options.force)
    where = machine(device, dtype)
    print(where)
    try:
        subject, settings, texts, stored = prepare(options, dtype, device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not subject.trained:
        print(f"{subject.name}: random weights; a fixed schedule, not the model, sets the tokens per step")
    rates = Rates.of(floors.measure(device.type, quick=options.quick), dtype)
    told = "a dry run: figures mean nothing" if options.quick else "measured"
    print(f"copies {rates.copy / 1e9:.1f} GB/s, matmuls {rates.matrix / 1e12:.3f} TFLOP/s, {told}")
    result = {
        "bench": "nfe", "model": subject.name, "trained": subject.trained, "quick": options.quick, "machine": where,
        "load": load, "busy": load > IDLE_LOAD * os.cpu_count(), "rates": asdict(rates),
        "prompt": subject.shape.prompt, "gen_length": subject.shape.gen_length,
    }  # fmt: skip
    result["speed"] = speeds(options, subject, settings, texts, rates)
    if options.task:
        result["accuracy"] = stored or scores(options, subject, settings)
        print()
        print_scores(result["accuracy"])
    leave(result, options.out / f"nfe-{subject.name}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
