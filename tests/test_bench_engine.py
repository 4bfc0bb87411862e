"""The engine's bench: its tokens, its bare operations, how it loads a clone, when it refuses to measure."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dllm_fast
from dllm_fast.cpu import compiled

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `bench` is a folder of the checkout, not a package that is installed

from bench import common, peers
from bench.generation import bare, breakdown, engine

CPU = torch.device("cpu")
# PyTorch's counter knows only the flash attention of GPUs.
FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, **_: sdpa_flop_count(q, k, v),
}
QUICK = common.SHAPES["quick"]


@pytest.fixture
def model():
    return common.build_model(QUICK, torch.float32, CPU)


@pytest.fixture
def job(model):
    return common.make_job(QUICK, model, QUICK.schedule, 1)


def test_quick_run_ends_with_a_json_line():
    """The whole bench on a tiny shape: in fp32 it exits with 1 unless our uncached tokens equal the published ones."""
    command = [sys.executable, "-m", "bench.generation.engine", "--quick", "--refresh", "window=8,0"]
    command += ["--weights", "fp8", "int4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["results"][0]
    assert result["found"]["published"] == {"nfe": 16, "same_tokens": 32, "of": 32}
    assert result["found"]["ours dual"] == {"nfe": 16, "nfe_full": 2, "nfe_block": 14}
    window = "ours dual, window=8,0"
    for name, kind in itertools.product((window, "ours dual"), ("fp8", "int4")):
        own, rounded = result["found"][name], result["found"][f"{name}, {kind}"]
        assert rounded == own | {"unrounded_tokens": rounded["unrounded_tokens"], "of": 32}
        assert 0 < rounded["unrounded_tokens"] < 32
    assert {"ours none", "ours prefix", "ours, whole steps only", "bare, fastest forms"} < result["seconds"].keys()
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result["seconds"].values())
    head = {"LM head", "selection"} if compiled.missing() else {"LM head, selection"}
    assert result["shares_ms"].keys() >= {"matmuls", "attention", "commit", "norm, rope, gate"} | head


def test_other_dual_caches_are_held_against_each_of_ours(capsys):
    seconds = {"ours none": 9.0, "ours dual": 4.0, "ours dual, window=8,0, fp8": 1.0, "a dual": 8.0, "another": 2.0}
    engine.print_duals({name: common.Timed([s, 2 * s]) for name, s in seconds.items()}, ["a dual", "one that failed"])
    assert capsys.readouterr().out.splitlines() == [
        "a dual takes 2.00 (2.00-2.00) times ours dual",
        "a dual takes 8.00 (8.00-8.00) times ours dual, window=8,0, fp8",
    ]


def test_tokens_are_worth_comparing(model, job):
    """The bench's weights give many different tokens, never [MASK], and other tokens with each cache."""
    dllm_fast.patch(model)
    found = [
        dllm_fast.generate(
            model, job.ids, gen_length=32, block_length=16, schedule=job.schedule, cache=cache
        ).sequences[0, -32:]
        for cache in ("none", "prefix", "dual")
    ]
    assert all(len(tokens.unique()) >= 12 for tokens in found)
    assert all((found[a] != found[b]).sum() >= 10 for a, b in ((0, 1), (0, 2), (1, 2)))
    logits = dllm_fast.unpatch(model)(job.ids).logits
    assert (logits.argmax(-1) != job.mask_id).all() and (logits[..., job.mask_id] == 0).all()


@pytest.mark.parametrize("steps, masked", [(8, [16, 12, 8, 4]), (10, [16, 12, 9, 6, 3]), (2, [16]), (32, None)])
def test_bare_operations_are_those_of_the_run(model, job, steps, masked):
    """FLOPs counted while the bare operations run, and those of the run, which may do a little more than needed."""
    operations = bare.Bare(model, job, steps, fastest=False)
    assert operations.masked == (masked or list(range(16, 0, -1)))
    products = [torch.ops.aten.mm, torch.ops.aten.addmm]
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        operations.run()
    counted = counter.get_flop_counts()["Global"]
    attention = sum(flops for op, flops in counted.items() if op not in products)
    needed = sum(operations.flops(queries, rows) for queries, rows in operations.plan)
    assert sum(counted.values()) == needed
    dllm_fast.patch(model, impl="torch")  # so that the counter knows its matmuls
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        dllm_fast.generate(model, job.ids, gen_length=32, block_length=16, schedule=dllm_fast.Uniform(steps))
    made = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in products)
    assert needed - attention <= made <= 1.1 * (needed - attention)


def test_fastest_forms_are_the_same_products(model, job):
    """Every form gives the result of F.linear or SDPA."""
    operations = bare.Bare(model, job, 8, fastest=True)
    weight = model.model.transformer.blocks[0].ff_proj.weight.detach()
    x, out = operations.x[56, 64], torch.empty(56, 96)
    for form in (bare._into, bare._weight_left, bare._onednn):
        made = form(x, weight, out)
        torch.testing.assert_close(made.T if form is bare._weight_left else made, bare._linear(x, weight, out))
    q, (keys, values), score = operations.q[16], operations.kv[0], operations.score[16]
    three = bare._three(q * 16**-0.5, keys, values, score)
    torch.testing.assert_close(three, bare._sdpa(q, keys, values, score))
    operations.run()
    assert set(operations.forms.values()) <= {
        bare._linear, bare._into, bare._weight_left, bare._onednn, bare._sdpa, bare._three
    }  # fmt: skip


@pytest.mark.parametrize(
    "impl, head",
    [
        ("torch", {"LM head", "selection"}),
        pytest.param(
            *("cpp", {"LM head, selection", "selection"}),  # the latter: the call
            marks=pytest.mark.skipif(bool(compiled.missing()), reason=str(compiled.missing())),
        ),
    ],
)
def test_breakdown_names_what_was_run(impl, head, model, job):
    """The head's matmul and the selection are separate unless one kernel does both."""
    dllm_fast.patch(model, impl=impl)
    options = {"gen_length": 32, "block_length": 16, "schedule": job.schedule}
    shares = breakdown.break_down(lambda: dllm_fast.generate(model, job.ids, **options), CPU, 1.0)
    assert all(ms > 0 for ms in shares.values())
    rest = {"matmuls", "attention", "commit", "norm, rope, gate", "other", "host"}
    assert shares.keys() == head | rest
    assert not hasattr(dllm_fast.ops.predict, "__wrapped__")


# Peers

GENERATE = '''
import torch
import helper

def generate(model, prompt, steps=128, gen_length=128, block_length=128, mask_id=0):
    """Every new token is the most probable one at the prompt's end."""
    token = model(prompt).logits[:, -1:].argmax(-1)
    return torch.cat((prompt, token.expand(-1, helper.length(gen_length))), 1)
'''


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "generate.py").write_text(GENERATE)
    (tmp_path / "helper.py").write_text("def length(n):\n    return n\n")
    return tmp_path


def test_a_clone_is_loaded_by_path_and_leaves_nothing_behind(model, job, clone, monkeypatch):
    mine = type(sys)("generate")
    monkeypatch.setitem(sys.modules, "generate", mine)
    path = list(sys.path)
    found, lines = peers.find_peers(["published", f"llada={clone}"], model, job)
    assert [peer.name for peer in found] == ["published", "llada"] and lines == []
    tokens, nfe = found[1].run()
    assert nfe is None and torch.equal(tokens, model(job.ids).logits[:, -1:].argmax(-1).expand(-1, 32))
    assert sys.path == path and sys.modules["generate"] is mine


def test_a_peer_that_cannot_run_says_why(model, clone):
    job = common.make_job(QUICK, model, "threshold=0.9", 1)
    found, lines = peers.find_peers(["published", f"llada={clone}", f"dinfer={clone}"], model, job)
    assert [peer.name for peer in found] == ["published"]
    assert lines[0] == "llada: not run: this revision's generate takes no threshold"
    assert lines[1] == "dinfer: not run: No module named 'dinfer'"
    with pytest.raises(ValueError, match="--peer: 'vllm' is not one of fast-dllm, llada, dllm-cache, dinfer"):
        peers.find_peers(["vllm=/tmp"], model, job)
    with pytest.raises(ValueError, match="--peer llada: '/nowhere' is not a folder"):
        peers.find_peers(["llada=/nowhere"], model, job)


def test_a_twin_has_the_same_storage(model, job):
    """A twin shares storage with a patched model too, whose weights `patch` has moved, and is itself unpatched."""
    dllm_fast.patch(model)
    other = peers.twin(model)
    expected = other(job.ids).logits
    dllm_fast.generate(model, job.ids, gen_length=16, block_length=16)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.data_ptr() == its.data_ptr()
    assert "forward" in model.__dict__ and "forward" not in other.__dict__
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert expected.abs().max() > 1 and (other(job.ids).logits == 0).all()


# The harness


def test_a_busy_machine_is_not_measured(monkeypatch, capsys):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (2.5, 0.0, 0.0))
    with pytest.raises(SystemExit, match=r"busy: its load average of 2\.50 is above 2\.00"):
        common.require_idle(force=False)
    assert common.require_idle(force=True) == 2.5
    monkeypatch.setattr("os.getloadavg", lambda: (1.5, 9.0, 9.0))
    assert common.require_idle(force=False) == 1.5
    assert "load average 1.50 on 8 cores" in capsys.readouterr().out


def test_rounds_begin_with_another_run_each():
    order = []
    times = common.interleave({name: lambda name=name: order.append(name) for name in "abc"}, 4, CPU)
    assert "".join(order) == "abcbcacababc" and all(len(timed.seconds) == 4 for timed in times.values())
    fast, slow = common.Timed([1.0, 2.0, 4.0]), common.Timed([2.0, 3.0, 16.0])
    assert slow.over(fast) == [2.0, 1.5, 4.0] and slow.median == 3.0
    assert common.spread(slow.over(fast)) == "2.00 (1.50-4.00)"


def test_options_of_the_command_line_name_what_is_wrong(capsys):
    for option, text in (("schedule", "best=1"), ("schedule", "uniform"), ("refresh", "every=x"), ("refresh", "never")):
        with pytest.raises(SystemExit):
            engine.parse([f"--{option}", text])
        assert f"{option}: '{text}'" in capsys.readouterr().err
