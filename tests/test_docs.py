"""This package accepts the commands in docs/, links are not dead, and README's quickstart runs."""

import inspect
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from dllm_fast.cli import main as cli
from dllm_fast.evaluate.answers import spelled_options

PAGE = Path(__file__).parents[1] / "docs" / "evaluations.md"
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
]


def test_there_are_commands_of_both_kinds():
    assert sum("dllm_fast.evaluate" in command for command in COMMANDS) >= 20
    assert sum(command.startswith("dllm-fast verify") for command in COMMANDS) >= 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dllm-fast")], ids=str)
def test_our_command_line_takes_it(command):
    assert cli.parser().parse_args(shlex.split(command)[1:]).command == "verify"


def test_our_lm_eval_model_takes_their_arguments():
    MaskedDiffusionLM = pytest.importorskip("dllm_fast.evaluate.harness", exc_type=ImportError).MaskedDiffusionLM
    known = inspect.signature(MaskedDiffusionLM.__init__).parameters
    harness = [shlex.split(c) for c in COMMANDS if "dllm_fast.evaluate" in c]
    for words in harness:
        given = dict(pairwise(words))
        options = dict(item.split("=", 1) for item in given["--model_args"].split(","))
        assert given["--model"] == "dllm_fast" and set(options) <= set(known)
        if "schedule" in options:
            schedule = spelled_options(schedule=options["schedule"])["schedule"]
            length, block = int(options["gen_length"]), int(options["block_length"])
            assert schedule.steps == length and length % block == 0
            assert given["--gen_kwargs"] == f"max_gen_toks={length}"


def test_lm_evals_command_line_takes_them(monkeypatch):
    lm_eval_cli = pytest.importorskip("lm_eval._cli", exc_type=ImportError)
    for words in (shlex.split(c) for c in COMMANDS if "dllm_fast.evaluate" in c):
        monkeypatch.setattr("sys.argv", words[2:])  # what follows `python -m`
        args = lm_eval_cli.HarnessCLI().parse_args()
        assert args.model == "dllm_fast" and args.tasks


ROOT = PAGE.parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("dllm_fast/models/*.md")]
)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if not path.startswith(("http://", "https://")):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readmes_quickstart_runs_offline(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[0]
    exec(compile(code, "README.md", "exec"), {})
    assert "Were three lazy wolves not taught by an honest queen?" in capsys.readouterr().out
