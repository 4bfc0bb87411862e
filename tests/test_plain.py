"""The plain loop over a model's own forward: the tokens of `generate(cache="none")`, and models that patch refuses."""

import pytest
import torch
from tiny import EOS, MASK, SEED, VOCAB
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import dllm_fast
from dllm_fast import Ancestral, EntropyBound, Factor, FirstHitting, Pyramid, Threshold, Uniform, backend
from dllm_fast.cli import main as cli
from dllm_fast.families import gpt

SCHEDULES = [Uniform(6), Pyramid(2), Threshold(0.05), Factor(1.5), EntropyBound(2.0), FirstHitting(), Ancestral(16)]
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48}


class Drafts:
    """A streamer that keeps every step's sequence."""

    def __init__(self):
        self.steps, self.put_ids = [], []

    def put(self, value):
        self.put_ids += value.tolist()

    def put_draft(self, value, sequence):
        self.steps.append(sequence.tolist())

    def end(self):
        pass


def make(kind: str):
    torch.manual_seed(SEED)
    ids = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": EOS, "eos_token_id": EOS}
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SIZES, **ids, initializer_range=0.2)).eval()
    if kind == "roberta":
        config = RobertaConfig(**SIZES, **ids, initializer_range=0.2, max_position_embeddings=66, type_vocab_size=1)
        return RobertaForMaskedLM(config).eval()
    return gpt.new(32, 2, 2, 48, 64, True, **ids, mask_token_id=MASK).eval()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_tokens_are_generates_step_by_step(either, ids, schedule):
    """In fp64, where no two confidences are within rounding of each other."""
    either, ids = either.double(), ids.clone()
    ids[:, 5:8] = MASK  # in the prompt too, before the answer's blocks
    plain = {"gen_length": 16, "block_length": 8, "schedule": schedule, "mask_id": MASK, "seed": 7}
    if isinstance(schedule, Uniform | Ancestral):
        plain["schedule"] = type(schedule)(9)  # 3 blocks: the prompt's own, and two
    for options in (plain, plain | {"temperature": 0.9, "cfg_scale": 0.7}):
        for row in (ids[:1], ids[1:2, :13]):
            ours, theirs = Drafts(), Drafts()
            got = dllm_fast.generate_plain(either, row, streamer=ours, **options)
            with dllm_fast.patched(either):
                expected = dllm_fast.generate(either, row, streamer=theirs, cache="none", **options)
            assert ours.steps == theirs.steps and ours.put_ids == theirs.put_ids
            assert torch.equal(got.sequences, expected.sequences)
            assert (got.nfe, got.positions, got.row_nfe) == (expected.nfe, expected.positions, expected.row_nfe)


@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy", "random"])
def test_padded_rows_that_end_and_tokens_that_are_held_back(either, ids, padded, confidence):
    first = dllm_fast.generate_plain(either, ids, padded, gen_length=16, block_length=8, mask_id=MASK)
    eos = first.sequences[:, 27].tolist()
    options = {
        "gen_length": 16, "block_length": 8, "confidence": confidence, "mask_id": MASK, "eos_id": eos, "seed": 3,
        "suppress_tokens": first.sequences[:, 25].tolist(), "defer_tokens": [eos[0]], "pad_id": 3,
    }  # fmt: skip
    got = dllm_fast.generate_plain(either, ids, padded, **options)
    expected = dllm_fast.generate(dllm_fast.patch(either), ids, padded, cache="none", **options)
    assert torch.equal(got.sequences, expected.sequences) and got.row_nfe == expected.row_nfe


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_other_models_are_sampled(kind, schedule):
    model = make(kind)
    ids = torch.arange(10, 22)[None]
    options = {"gen_length": 16, "block_length": 8, "mask_id": MASK, "seed": 1}
    out = dllm_fast.generate_plain(model, ids, schedule=schedule, **options)
    assert torch.equal(out.sequences[:, :12], ids) and not (out.sequences == MASK).any()
    again = dllm_fast.generate_plain(model, ids, schedule=schedule, **options)
    assert torch.equal(again.sequences, out.sequences)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt"])
def test_greedy_one_at_a_time_is_the_most_confident_first(kind):
    """Against the algorithm itself, spelled out on the model's own logits."""
    model = make(kind)
    row = torch.tensor([*range(10, 20), *[MASK] * 6])
    while (row == MASK).any():
        with torch.no_grad():
            probability = model(row[None]).logits[0].double().softmax(-1)
        probability[:, MASK] = 0
        best, token = probability.max(-1)
        at = int(best.masked_fill(row != MASK, -1).argmax())
        row[at] = token[at]
    ids = torch.arange(10, 20)[None]
    out = dllm_fast.generate_plain(model, ids, gen_length=6, block_length=6, schedule=Uniform(6), mask_id=MASK)
    assert out.sequences[0].tolist() == row.tolist() and out.nfe == 6


def test_roberta_has_the_positions_that_follow_its_padding():
    model = make("roberta")
    dllm_fast.generate_plain(model, torch.full((1, 56), 5), gen_length=8, block_length=8, mask_id=MASK)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        dllm_fast.generate_plain(model, torch.full((1, 57), 5), gen_length=8, block_length=8, mask_id=MASK)


def test_what_cannot_be_sampled_is_named():
    model, ids = make("bert"), torch.arange(4)[None]
    with pytest.raises(ValueError, match="mask_id: None given"):
        dllm_fast.generate_plain(model, ids)
    with pytest.raises(ValueError, match="gen_length=9 is not a multiple of block_length=8"):
        dllm_fast.generate_plain(model, ids, gen_length=9, block_length=8, mask_id=MASK)
    with torch.no_grad():
        model.cls.predictions.bias[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite at step 0 of block 0 of row 0"):
        dllm_fast.generate_plain(model, ids, gen_length=8, block_length=8, mask_id=MASK)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_its_causal_mask_a_gpt_sees_both_ways_after_a_reload_too(tmp_path, attention):
    model = make("gpt")
    model.save_pretrained(tmp_path)
    model = dllm_fast.load_plain(str(tmp_path))
    assert type(model) is gpt.BidirectionalGPT2LMHeadModel and model.config.mask_token_id == MASK
    model.set_attn_implementation(attention)
    row = torch.arange(20)[None]
    other = row.clone()
    other[0, -1] = 77
    mask = torch.ones_like(row)
    with torch.no_grad():
        assert not torch.allclose(model(row).logits[0, 0], model(other).logits[0, 0], atol=1e-5)
        mask[0, -1] = 0  # a padded position is not seen
        torch.testing.assert_close(model(row, mask).logits[0, :19], model(other, mask).logits[0, :19])


@pytest.mark.parametrize("shifted", [False, True])
def test_an_autoregressive_checkpoint_keeps_its_weights(tmp_path, shifted):
    """In one layer the last position sees the same with and without the causal mask, and has the same output."""
    torch.manual_seed(SEED)
    causal = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_head=2, n_layer=1, n_positions=64)).eval()
    causal.save_pretrained(tmp_path)
    model = dllm_fast.load_plain(str(tmp_path), shifted=shifted)
    model.save_pretrained(tmp_path / "again")
    model = dllm_fast.load_plain(str(tmp_path / "again"))
    row = torch.arange(20)[None]
    with torch.no_grad():
        logits, expected = model(row).logits, causal(row).logits[0, -1]
        if shifted:  # what the last output predicts is beyond the sequence
            model.config.shifted = False
            own = model(row).logits
            torch.testing.assert_close(logits[:, 1:], own[:, :-1])
            logits = own
    torch.testing.assert_close(logits[0, -1], expected)


def test_the_command_line_samples_a_bert(tmp_path, capsys):
    """One token at a time, the most confident first, shown as it fills; [CLS] goes ahead of the prompt."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(SEED)
    model = BertForMaskedLM(BertConfig(**SIZES, vocab_size=len(words), initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path)
    arguments = ["generate", "--model", str(tmp_path), "--prompt", "a [MASK] c", "--device", "cpu"]
    arguments += ["--gen-length", "4", "--block-length", "4", "--schedule", "pyramid=100", "--cache", "none"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    row = torch.tensor([[2, 5, 4, 7, 4, 4, 4, 4]])
    expected = dllm_fast.generate_plain(model, row, gen_length=0, block_length=4, schedule=Pyramid(100), mask_id=4)
    text = AutoTokenizer.from_pretrained(tmp_path).decode(expected.sequences[0], skip_special_tokens=True)
    assert printed.out.splitlines()[-1] == text and "5 NFE" in printed.err and "░" in printed.out
    patched = cli.main([*arguments, "--remask", "remdm=0.1"])
    assert patched == (0 if backend.is_available() else 2)
