"""The command line, as a user runs it."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import EOS, VOCAB

import dllm_fast
from dllm_fast.cli import demo, view
from dllm_fast.cli import main as cli
from dllm_fast.decoding.refresh import Drift, Every, Window
from dllm_fast.decoding.remask import P2, ReMDM
from dllm_fast.decoding.schedules import Ancestral, EntropyBound, Factor, FirstHitting, Pyramid, Threshold, Uniform
from dllm_fast.decoding.spelling import refresh_of, remask_of, schedule_of, spell
from dllm_fast.loading import end_of_text, mask_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def call(*arguments, **options):
    command = [sys.executable, "-m", "dllm_fast.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, **options)


def test_generate_reads_standard_input_and_continues_it():
    done = call("generate", "--model", "llada-gsm8k", "--gen-length", "32", "--plain", input="Tom has 3 apples.\n")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("masked | Tom has 3 apples." in line and view.HIDDEN in line for line in lines)
    assert "NFE (" in done.stderr and "tokens/s" in done.stderr
    assert lines[-1] and not lines[-1].endswith(view.HIDDEN)


def test_generate_fills_a_gap_and_is_quiet_when_asked(capsys):
    prompt = "And the LORD [MASK][MASK] unto Moses"
    arguments = ["generate", "--model", "modernbert-kjv", "--gen-length", "0", "--quiet", "--prompt", prompt]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out.strip()
    assert out.startswith("And the LORD") and out.endswith("unto Moses") and "[MASK]" not in out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--model", "no/such/folder/at/all"], "no/such/folder/at/all: no such folder"),
        (["--model", "llada-gsm8k", "--gen-length", "20"], "gen_length=20 is not a multiple of block_length=32"),
        (["--model", "llada-gsm8k", "--impl", "magic"], "impl='magic' is not one of"),
        (["--model", "llada-gsm8k", "--prompt", ""], "--prompt: an empty prompt"),
        (["--model", "llada-gsm8k", "--chat"], "no chat template"),
        (["--model", "llada-gsm8k", "--top-p", "0"], "top_p=0.0 is not a number above 0 and up to 1"),
    ],
    ids=["model", "gen-length", "impl", "prompt", "chat", "top-p"],
)
def test_errors_are_one_line_and_exit_2(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "--prompt" not in arguments:
        arguments = [*arguments, "--prompt", "Tom"]
    assert cli.main(["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_weights_are_those_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "from_pretrained", lambda *args: seen.append(args[-1]))
    for flag in ([], ["--weights", "fp8"], ["--weights", "int4"]):
        cli.load(cli.parser().parse_args(["generate", "--model", "llada-gsm8k", *flag]))
    assert seen == [None, "fp8", "int4"]


def test_options_of_the_cache_are_generates(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "generate", lambda model, ids, **options: asked.append(options) or sys.exit(0))
    arguments = ["generate", "--model", "llada-gsm8k", "--prompt", "Tom", "--quiet"]
    for flags in ([], ["--cache-dtype", "e4m3"], ["--top-k", "5", "--top-p", "0.9"]):
        with pytest.raises(SystemExit):
            cli.main([*arguments, *flags])
    assert [options["cache_dtype"] for options in asked] == [None, "e4m3", None]
    assert [(options["top_k"], options["top_p"]) for options in asked] == [(None, 1.0), (None, 1.0), (5, 0.9)]
    with pytest.raises(SystemExit):
        cli.parser().parse_args([*arguments, "--cache-dtype", "fp8"])
    assert "invalid choice: 'fp8'" in capsys.readouterr().err


def test_schedules_are_spelt_as_name_equals_number(capsys):
    expected = {
        "uniform=8": Uniform(8),
        "pyramid=2": Pyramid(2),
        "threshold=0.5": Threshold(0.5),
        "factor=1": Factor(1.0),
        "threshold": Threshold(),
        "entropy-bound=0.5": EntropyBound(0.5),
        "ancestral=64,cosine": Ancestral(64, "cosine"),
        "first-hitting": FirstHitting(),
    }
    for text, schedule in expected.items():
        assert schedule_of(text) == schedule == schedule_of(spell(schedule))
    assert refresh_of("block") == "block" and refresh_of("window=32,8") == Window(32, 8)
    assert refresh_of("every=4") == Every(4) and refresh_of("drift=0.3") == Drift(0.3)
    assert remask_of("remdm=0.2") == ReMDM(0.2) and remask_of("p2") == P2()
    assert spell(Window(32, 8)) == "window=32,8" and spell(Drift(0.3)) == "drift=0.3" and spell(P2()) == "p2=1.0"
    for flag, bad, message in (
        ("--schedule", "cosine=3", "'cosine=3' is none of uniform=N, pyramid=N"),
        ("--schedule", "uniform=x", "'uniform=x': 'x' is not a number"),
        ("--schedule", "uniform", "'uniform': uniform needs a value"),
        ("--schedule", "first-hitting=3", "'first-hitting=3': first-hitting takes no values"),
        ("--schedule", "uniform=0", "'uniform=0': Uniform: steps=0 is not a positive whole number"),
        ("--schedule", "threshold=nan", "'threshold=nan': Threshold: threshold=nan is not a number above 0"),
        ("--schedule", "ancestral=8,sine", "'ancestral=8,sine': Ancestral: noise='sine' is not one of"),
        ("--refresh", "window=8,-1", "'window=8,-1': Window: after=-1 is not a whole number from 0 up"),
        ("--remask", "verify=7", "'verify=7': Verify: threshold=7.0 is not a number from 0 to 1"),
        ("--refresh", "never", "'never' is none of every=N, window=N, drift=N"),
        ("--refresh", "every=1,2", "'every=1,2': every takes 1 value"),
        ("--remask", "wino=1", "'wino=1' is none of remdm=N, verify=N, p2=N"),
    ):
        with pytest.raises(SystemExit):
            cli.parser().parse_args(["generate", "--model", "m", flag, bad])
        *_, error = capsys.readouterr().err.splitlines()  # below argparse's usage
        assert message in error


def test_interrupt_exits_130(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", stop)
    assert cli.main(["demo"]) == 130


class Letters:
    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("eos_ids,shown", [([], "dbhb"), ([1], "d"), ([7, 1], "d"), ([7], "db"), ([6], "dbhb")])
def test_nothing_is_shown_after_the_end_of_text(eos_ids, shown, capsys):
    with view.watching(Letters(), 9, plain=True, eos_ids=eos_ids) as streamer:
        streamer.put_draft(None, torch.tensor([3, 1, 7, 1]))
    assert capsys.readouterr().out.endswith(f"| {shown}\n")


def test_the_end_of_text_is_the_tokenizers_and_the_generation_configs(llada):
    tokenizer = SimpleNamespace(eos_token_id=EOS)
    dllm_fast.patch(llada)
    assert end_of_text(llada, tokenizer) == [EOS]
    llada.generation_config.eos_token_id = [7, EOS, VOCAB]  # the last is none of the vocabulary's
    assert end_of_text(llada, tokenizer) == [EOS, 7]
    tokenizer.eos_token_id, llada.generation_config.eos_token_id = None, 8
    assert end_of_text(llada, tokenizer) == [8]
    llada.generation_config = None  # as ModernBERT's
    assert end_of_text(llada, tokenizer) == []


def test_the_mask_id_is_the_given_the_configs_or_the_tokenizers(llada):
    tokenizer = SimpleNamespace(mask_token_id=5)
    assert mask_of(3, llada, tokenizer) == 3
    assert mask_of(None, llada, tokenizer) == llada.config.mask_token_id != 5
    llada.config.mask_token_id = None
    assert mask_of(None, llada, tokenizer) == 5
    tokenizer.mask_token_id = None
    with pytest.raises(ValueError, match="mask_id: None given"):
        mask_of(None, llada, tokenizer)


def test_spans_group_masks_and_news():
    got = view.spans(Letters(), [0, 1, 9, 9, 2, 3, 4], 9, {5})
    assert got == [("ab", "text"), (view.HIDDEN * 2, "mask"), ("c", "text"), ("d", "new"), ("e", "text")]


def test_plain_prints_a_few_lines_and_the_end(capsys):
    plain = view.Plain(Letters(), 9)
    ids = [0] + [9] * 16
    for at in range(1, 17):
        ids[at] = 1
        plain.put_draft(None, torch.tensor(ids))
    lines = capsys.readouterr().out.splitlines()
    assert 4 <= len(lines) <= 6 and lines[-1].endswith("| a" + "b" * 16)


def test_the_live_view_draws_on_a_terminal():
    console = pytest.importorskip("rich.console").Console(
        force_terminal=True, width=80, record=True, file=io.StringIO()
    )
    live = view.Live(Letters(), 9, console, "title")
    live.put_draft(None, torch.tensor([0, 9, 9]))
    live.put_draft(None, torch.tensor([0, 1, 9]))
    live.end()
    assert "step 2, 1 masked" in console.export_text()


def test_made_counts_what_was_generated():
    sequence = torch.tensor([5, 6, 7, 8, 2, 2, 2])
    assert cli.generated(sequence, torch.tensor([5, 9, 7]), 9, [2]) == 3
    assert cli.generated(sequence, torch.tensor([5, 9, 7]), 9, [2, 8]) == 2
    assert cli.generated(sequence, torch.tensor([5, 6, 7]), 9, []) == 4


def test_the_demos_table_has_tokens_per_forward(llada, ids, monkeypatch):
    tables = []
    monkeypatch.setattr(demo, "print_table", lambda columns, rows, title: tables.append((columns, rows)))
    for name, value in {"LENGTH": 16, "BLOCK": 8, "REPEATS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    demo.compare(llada, ids[:1])
    ((columns, rows),) = tables
    for row in (dict(zip(columns, row, strict=True)) for row in rows):
        assert float(row["tok/NFE"]) == pytest.approx(16 / sum(map(int, row["NFE full+block"].split("+"))), abs=0.006)
    assert len(rows) == 8
