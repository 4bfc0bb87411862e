"""``dllm-fast serve`` ends when it is told to, or cannot start: its worker process does not keep it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dllm_fast
from dllm_fast.errors import exit_code
from dllm_fast.serve import worker

http = pytest.importorskip("dllm_fast.serve.http", reason="the extra serve is not installed", exc_type=ImportError)

Gate, Limits, NAME = http.Gate, http.Limits, "llada-sentences"


def heeds_ctrl_c():
    """What a shell runs in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def loads_forever(connection, served):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("loading", flush=True)
    time.sleep(600)


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_while_the_model_is_loaded_ends_it(sent, code):
    root = Path(dllm_fast.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, __file__]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=heeds_ctrl_c)
    try:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(sent)
        assert process.wait(30) == code
    finally:
        process.kill()
        process.wait()


def test_a_template_that_is_not_there_is_told_before_the_model_is_loaded(tmp_path):
    gate = Gate(worker.Served(NAME), Limits(NAME, chat_template=str(tmp_path / "typo.jinja")))
    with pytest.raises(FileNotFoundError, match=r"typo\.jinja"):
        asyncio.run(gate.__aenter__())
    assert gate.worker.process is None


if __name__ == "__main__":
    worker.work = loads_forever
    sys.exit(exit_code(lambda: http.run(worker.Served(NAME), Limits(NAME), http.Address(port=0))))
