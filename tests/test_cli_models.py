"""The command line on models of transformers that are of no family: patched where `patch` takes them."""

import pytest
import torch
from needs import needs_backend
from test_sft import WORDS, folder_of
from tiny import SEED
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, GPT2Config, GPT2LMHeadModel

from dllm_fast import backend
from dllm_fast.cli import main as cli

OPTIONS = ["--gen-length", "8", "--block-length", "4", "--schedule", "uniform=4", "--quiet", "--prompt", "a b c"]
PLAIN = "a plain loop samples it"


def folder(kind: str, path):
    """A folder with a small random model and a word tokenizer."""
    folder_of("bert", path)
    torch.manual_seed(SEED)
    sizes = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "deberta":
        config = DebertaV2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **sizes
        )  # fmt: skip
        DebertaV2ForMaskedLM(config).save_pretrained(path)
    elif kind == "gpt2":
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **sizes)).save_pretrained(path)
    return path


@needs_backend
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_patch_takes_is_patched(kind, tmp_path, capsys):
    """A step that begins a block is a full forward, and the next one is not."""
    name = str(folder(kind, tmp_path / kind))
    assert cli.main(["generate", "--model", name, "--weights", "fp8", *OPTIONS]) == 2
    assert "weights='fp8': the model runs its own forward" in capsys.readouterr().err
    assert cli.main(["generate", "--model", name, *OPTIONS]) == 0
    error = capsys.readouterr().err
    assert "4 NFE (2 full, 2 block)" in error and PLAIN not in error


def test_what_patch_does_not_take_is_sampled_by_a_plain_loop_and_says_so(tmp_path, capsys):
    name = str(folder("deberta", tmp_path / "deberta"))
    assert cli.main(["generate", "--model", name, *OPTIONS]) == 0
    error = capsys.readouterr().err
    assert "4 NFE (4 full, 0 block)" in error
    assert f"{PLAIN}, each step a forward of the whole sequence: model: a DebertaV2ForMaskedLM" in error
    for option in (["--cache-dtype", "e4m3"], ["--skip-committed"], ["--impl", "torch"]):
        assert cli.main(["generate", "--model", name, *OPTIONS, *option]) == 2
        assert "a DebertaV2ForMaskedLM of model_type 'deberta-v2' is not supported" in capsys.readouterr().err


def test_what_neither_takes_is_refused(tmp_path, capsys):
    from others import make

    path = folder_of("bert", tmp_path / "llama")
    make("llama", bidirectional=False).save_pretrained(path)
    assert cli.main(["generate", "--model", str(path), *OPTIONS]) == 2
    reason = "it attends causally" if backend.is_available() else "has no attention backends with masks"
    assert reason in capsys.readouterr().err
