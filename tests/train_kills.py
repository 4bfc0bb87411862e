"""Training runs that are killed while they save, for test_train_saving.py: ``SEED KILLS ARGUMENT...``.

Each run is a fork of this process, so that imports are paid for once. The first run is left alone; its longest save
says how long a save takes. Then runs are resumed, and each is killed at a random moment of its first save. A last
run finishes. Prints a line of JSON: for each kill, the checkpoints and the files being written that it left."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from dllm_fast.train import trainer, training

SAVE = trainer.DiffusionTrainer._save_checkpoint


def forked(arguments: list[str], kill_after: float | None) -> tuple[int, list[float]]:
    """The exit status of ``training.main(arguments)``, and each save's seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)

        def save(self, *args):
            began = time.monotonic()
            os.write(writer, b"saving\n")
            SAVE(self, *args)
            os.write(writer, f"{time.monotonic() - began}\n".encode())

        trainer.DiffusionTrainer._save_checkpoint = save
        os._exit(training.main(arguments))
    os.close(writer)
    seconds = []
    with os.fdopen(reader) as lines:
        for line in lines:
            if line != "saving\n":
                seconds.append(float(line))
            elif kill_after is not None:
                time.sleep(kill_after)
                os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], seconds


def left(out: Path) -> dict[str, list[str]]:
    stage = out / "unfinished"
    writing = sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file())
    return {"whole": sorted(path.name for path in out.glob("checkpoint-*")), "writing": writing}


def main(seed: int, kills: int, arguments: list[str]) -> None:
    folder = Path(arguments[arguments.index("--out") + 1])
    status, seconds = forked([*arguments, "--out", str(folder / "whole")], None)
    assert status == 0, status
    source, found = random.Random(seed), []
    run = [*arguments, "--out", str(folder / "killed"), "--resume"]
    for _ in range(kills):
        status, _ = forked(run, source.uniform(0, max(seconds)))
        assert status == signal.SIGKILL, status
        found.append(left(folder / "killed"))
    assert forked(run, None)[0] == 0
    print(json.dumps({"seconds": max(seconds), "kills": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
