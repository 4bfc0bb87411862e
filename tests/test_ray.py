"""`dllm_fast.ray.generate`: the same answers from any number of actors, killed or not, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dllm_fast
import dllm_fast.ray
from dllm_fast.decoding.values import require
from dllm_fast.loading import end_of_text, load_tokenizer
from dllm_fast.ray import run as module
from dllm_fast.ray.files import Part, parts_of, place, read, write

ROOT = Path(__file__).parent.parent
MODEL = "llada-sentences"
WORDS = ("An honest queen", "A bird", "Two wolves sleep", "The king", "No child sings", "Three lazy wolves", "Birds")
OPTIONS = {"gen_length": 16, "block_length": 8, "schedule": dllm_fast.Uniform(8), "temperature": 1.0, "seed": 3}
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None,
    reason="there is no Ray with its data here: pip install 'dllm_fast[ray]'",
)
HOW = {"dtype": "float32", "batch_size": 2, "part_size": 3, "progress": False, **OPTIONS}


@pytest.fixture
def source(tmp_path):
    """11 prompts in two files of JSON lines, the first with a blank line and without a last line break."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    rows = [{"prompt": WORDS[n % len(WORDS)], "id": n, "more": {"é": [n]}} for n in range(11)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "a.jsonl").write_text("\n".join([*lines[:4], "", *lines[4:7]]), encoding="utf-8")
    (folder / "b.jsonl").write_text("\n".join(lines[7:]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    # Ray's workers give way to all other processes, on a busy machine for minutes.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield ray
    ray.shutdown()


def rows_of(report):
    """The rows of a report's files, in order."""
    if report.files[0].endswith(".jsonl"):
        return [json.loads(line) for file in report.files for line in Path(file).read_text("utf-8").splitlines()]
    parquet = pytest.importorskip("pyarrow.parquet")
    return [row for file in report.files for row in parquet.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def expected():
    """Of each prompt, the ids that `generate_many` gives it as the row of its number."""
    model, tokenizer = dllm_fast.from_pretrained(MODEL, torch.float32), load_tokenizer(MODEL)
    prompts = [tokenizer(WORDS[n % len(WORDS)], add_special_tokens=False)["input_ids"] for n in range(11)]
    done = dllm_fast.generate_many(model, prompts, 1, eos_id=end_of_text(model, tokenizer), **OPTIONS)
    return [one.sequence[len(prompt) :].tolist() for one, prompt in zip(done, prompts, strict=True)]


@needs_ray
def test_answers_are_those_of_each_prompts_number(cluster, source, tmp_path, expected):
    told = []
    report = dllm_fast.ray.generate(
        MODEL, source, tmp_path / "out", workers=2, logprobs=True, **HOW | {"progress": lambda *done: told.append(done)}
    )
    rows = rows_of(report)
    assert (report.rows, report.resumed) == (11, 0) and len(report.files) == 3 + 2
    assert [row["id"] for row in rows] == list(range(11)) and rows[5]["more"] == {"é": [5]}
    assert [row["answer_ids"] for row in rows] == expected
    assert all(isinstance(row["answer"], str) and row["answer_nfe"] > 0 for row in rows)
    assert all(len(row["answer_logprobs"]) == len(row["answer_order"]) == 16 for row in rows)
    assert told[0] == (0, 11) and told[-1] == (11, 11)
    again = dllm_fast.ray.generate(MODEL, source, tmp_path / "out", workers=1, logprobs=True, **HOW)
    assert again.resumed == 11 and rows_of(again) == rows


@needs_ray
@pytest.mark.long
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_two_or_four_actors(cluster, source, tmp_path, expected, kind):
    if kind == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [
            json.loads(line)
            for file in sorted(source.iterdir())
            for line in file.read_text("utf-8").split("\n")
            if line
        ]
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
        source = tmp_path / "a.parquet"
    found = []
    for workers in (1, 2, 4):
        report = dllm_fast.ray.generate(MODEL, source, tmp_path / f"out-{workers}", workers=workers, **HOW)
        found.append(rows_of(report))
    assert found[0] == found[1] == found[2]
    assert [row["answer_ids"] for row in found[0]] == expected and [row["id"] for row in found[0]] == list(range(11))


def descendants() -> dict[int, bytes]:
    """The processes that this one has started, and theirs: their command lines."""
    parent, command = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command[int(folder.name)] = (folder / "cmdline").read_bytes()
            except (OSError, ValueError):  # it has ended
                continue
    found: dict[int, bytes] = {}
    for process in parent:
        above = process
        while above in parent and above != os.getpid():
            above = parent[above]
        if above == os.getpid() and process != above:
            found[process] = command.get(process, b"")
    return found


def actors() -> list[int]:
    return [process for process, command in descendants().items() if command.startswith(b"ray::") and b"Map" in command]


@needs_ray
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the actors' processes")
def test_an_actor_that_is_killed_is_replaced(cluster, source, tmp_path, expected):
    killed = []

    def kill(done, total):
        if done and not killed:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    how = HOW | {"part_size": 1, "progress": kill}
    report = dllm_fast.ray.generate(MODEL, source, tmp_path / "out", workers=2, **how)
    assert killed and report.rows == 11
    assert [row["answer_ids"] for row in rows_of(report)] == expected


@needs_ray
@pytest.mark.long
def test_a_part_over_which_five_actors_die_raises(cluster, source, tmp_path, monkeypatch):
    died = tmp_path / "died"
    died.mkdir()

    class Dying:  # a `Worker` without a model, which would take each of five actors a while to load
        def __init__(self, plan, device):
            pass

        def __call__(self, batch):
            (died / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(module, "Worker", Dying)
    with pytest.raises(cluster.exceptions.RayError):
        dllm_fast.ray.generate(MODEL, source, tmp_path / "out", **HOW | {"part_size": 11})
    assert len(list(died.iterdir())) == module.TRIES


DRIVER = """
import sys
import ray
import dllm_fast, dllm_fast.ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
dllm_fast.ray.generate(
    "llada-sentences", sys.argv[1], sys.argv[2], workers=2, dtype="float32", batch_size=2, part_size=1, gen_length=16,
    block_length=8, schedule=dllm_fast.Uniform(8), temperature=1.0, seed=3,
)
"""


@needs_ray
@pytest.mark.long
def test_a_killed_run_goes_on_where_it_was(cluster, source, tmp_path, expected):
    target = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, source, target], env=environment, start_new_session=True)
    began = time.monotonic()
    while len(list(target.glob("part-*"))) < 3:
        assert driver.poll() is None and time.monotonic() - began < 300
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    time.sleep(5)  # its actors end with it
    before = {file.name: file.stat().st_mtime_ns for file in target.glob("part-*")}
    assert 3 <= len(before) < 11, "it was killed half-way"
    (target / "_0123.tmp").write_text("what an actor had begun")
    report = dllm_fast.ray.generate(MODEL, source, target, workers=2, **HOW | {"part_size": 1})
    assert report.resumed == len(before) and not list(target.glob("*.tmp"))
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before, "nothing was done twice"
    assert [row["answer_ids"] for row in rows_of(report)] == expected


@needs_ray
@pytest.mark.long
def test_a_prompt_that_does_not_fit_is_named(cluster, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "A bird"}\n{"prompt": 7}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: prompt is neither a text, nor a chat, nor a list of ids"):
        dllm_fast.ray.generate(MODEL, file, tmp_path / "out", **HOW)
    file.write_text(json.dumps({"prompt": [3] * 5000}))
    with pytest.raises(ValueError, match=r"a\.jsonl, prompts from row 0 on: prompts\[0\]: .* exceed the model's"):
        dllm_fast.ray.generate(MODEL, file, tmp_path / "out-2", **HOW)


def worker(model: str, **changes) -> module.Worker:
    """An actor's object in this process; it has no files."""
    load = {"dtype": "float32", "impl": "auto", "weights": None, "head": None}
    plan = module.Plan(None, None, "out", "jsonl", "prompt", "answer", False, model, load, 2, {})
    return module.Worker(dataclasses.replace(plan, **changes), "cpu")


def without_mask(folder: Path, tokenizer: bool = False) -> str:
    """A model whose config does not name the mask id, nor with ``tokenizer`` does its tokenizer."""
    shutil.copytree(dllm_fast.loading.MODELS / "modernbert-kjv", folder)
    for file in ("config.json", "tokenizer_config.json")[: 1 + tokenizer]:
        fields = json.loads((folder / file).read_text("utf-8"))
        kept = {name: value for name, value in fields.items() if name not in ("mask_token_id", "mask_token")}
        (folder / file).write_text(json.dumps(kept), "utf-8")
    return str(folder)


def test_the_mask_id_may_be_the_tokenizers(tmp_path):
    assert worker(without_mask(tmp_path / "model")).mask_id == 2047


NO_MASK = "mask_id: None given, and neither the model's config nor its tokenizer names one"


def test_why_a_model_does_not_load_is_handed_back(tmp_path):
    own = worker(without_mask(tmp_path / "model", tokenizer=True))
    assert own({"part": ["{}"]}) == {"rows": [0], "error": [NO_MASK]}


@needs_ray
@pytest.mark.long
def test_why_a_model_does_not_load_reaches_the_caller(cluster, source, tmp_path):
    model = without_mask(tmp_path / "model", tokenizer=True)
    with pytest.raises(ValueError, match=NO_MASK):
        dllm_fast.ray.generate(model, source, tmp_path / "out", workers=2, **HOW)


UNFIT = {
    "surrogate": ("\ud800", "there is not valid UTF-8"),
    "chat": ([{"role": "robot", "content": "A bird"}], "there: the chat template refuses it: no robots"),
    "chat-surrogate": ([{"role": "user", "content": "\ud800"}], "there is not valid UTF-8"),
    "half-a-chat": ([{"role": "user", "content": "A bird"}, "and"], "there: the chat template refuses it: "),
    "id": ([3, 672], "there: id 672 is outside the vocabulary of 672"),
    "large": ([2**70], f"there: id {2**70} is outside the vocabulary of 672"),
    "negative": ([-1], "there: id -1 is outside the vocabulary of 672"),
    "empty": ("", "there is empty"),
}
TEMPLATE = """{% for turn in messages %}{% if turn['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}
{{ turn['content'] + '.' }}{% endfor %}"""


@pytest.fixture(scope="module")
def chatting():
    own = worker(MODEL)
    own.tokenizer.chat_template = TEMPLATE
    return own


@pytest.mark.parametrize("case", UNFIT)
def test_an_unfit_prompt_is_named(chatting, case):
    prompt, message = UNFIT[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        chatting.encode("there", prompt)


def test_a_text_that_cannot_be_spelled_without_the_mask_is_named(chatting, monkeypatch):
    monkeypatch.setattr(module, "encode", lambda *_: require(False, "this tokenizer cannot write '[MASK]'"))
    with pytest.raises(ValueError, match=r"there: this tokenizer cannot write '\[MASK\]'"):
        chatting.encode("there", "[MASK]")


@needs_ray
def test_json_lines_come_back_as_they_were(tmp_path):
    file, out = tmp_path / "a.jsonl", str(tmp_path / "out.jsonl")
    file.write_text('{"prompt": "A bird", "more": "\\ud800é"}\n{"prompt": "Two wolves"}\n"A king"\n', "utf-8")
    fs, where = place(file)
    rows, prompts = read(fs, Part(0, where, 0, 2, 0, 0, file.read_bytes().index(b'"A king"')), "jsonl", "prompt", {})
    assert prompts == ["A bird", "Two wolves"]
    write(fs, out, "jsonl", rows, [{"answer": "sings"}, {"answer": "é"}])
    assert Path(out).read_text("utf-8").splitlines()[0] == '{"prompt": "A bird", "more": "\\ud800é", "answer": "sings"}'
    with pytest.raises(ValueError, match=r"""a\.jsonl, row 2: b'"A king"' is not a JSON object"""):
        read(fs, Part(0, where, 0, 3, 0, 0, file.stat().st_size), "jsonl", "prompt", {})


@needs_ray
def test_a_row_group_is_read_once_for_its_parts(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"prompt": [*map(str, range(11))]}), tmp_path / "a.parquet", row_group_size=8)
    groups, own = [], parquet.ParquetFile.read_row_group
    counted = lambda file, number: (groups.append(number), own(file, number))[1]  # noqa: E731
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    fs, where = place(tmp_path / "a.parquet")
    kept, found = {}, []
    for part in parts_of(fs, [where], "parquet", 3):
        found += read(fs, part, "parquet", "prompt", kept)[1]
    assert found == [*map(str, range(11))] and groups == [0, 1]


BAD = {
    "workers": ({"workers": 0}, "workers=0 is not a positive whole number"),
    "part_size": ({"part_size": 0}, "part_size=0 is not a positive whole number"),
    "batch_size": ({"batch_size": "many"}, "batch_size='many' is not a positive whole number"),
    "gpus": ({"gpus": -1}, "gpus=-1 is not a finite number from 0 up"),
    "dtype": ({"dtype": "fp7"}, "dtype='fp7' is neither 'auto' nor the name of a dtype"),
    "impl": ({"impl": "fast"}, "impl='fast' is not one of"),
    "weights": ({"weights": "int3"}, "weights='int3' is not one of"),
    "model": ({"model": "./nowhere"}, r"\./nowhere: no such folder"),
    "module": ({"model": 3}, "model: a int is not a name; each actor loads its own"),
    "option": ({"gen_len": 8}, "gen_len: not an option of dllm_fast.ray.generate"),
    "value": ({"gen_length": 9}, "gen_length=9 is not a multiple of block_length=8"),
    "column": ({"column": "text"}, r"column='text': .*a\.jsonl has prompt, id, more"),
    "answer": ({"answer": "id"}, r"answer='id': .*a\.jsonl has a column 'id' already"),
    "nothing": ({"source": "nowhere.jsonl"}, "source='nowhere.jsonl': there is no such file or folder"),
    "format": ({"source": __file__}, r"source='.*test_ray\.py': is none of \.parquet, \.jsonl"),
    "none": ({"source": []}, r"source=\[\]: there are no files"),
    "others": ({"target": str(ROOT / "docs")}, "target='.*docs': the folder holds other files"),
}


@needs_ray
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_before_any_work(source, tmp_path, monkeypatch, case):
    changes, message = BAD[case]
    monkeypatch.setattr(module, "_run", lambda *_: pytest.fail("it ran"))
    given = {"model": MODEL, "source": str(source), "target": tmp_path / "out", **HOW, **changes}
    with pytest.raises(ValueError, match=message):
        dllm_fast.ray.generate(**given)
    assert not (tmp_path / "out").exists()


@needs_ray
def test_answers_made_with_other_arguments_are_left_alone(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_: iter(()))
    drawn = {name: value for name, value in HOW.items() if name != "seed"}
    dllm_fast.ray.generate(MODEL, source, tmp_path / "out", **drawn)
    dllm_fast.ray.generate(MODEL, source, tmp_path / "out", workers=4, **drawn | {"batch_size": 5})
    seed = json.loads((tmp_path / "out" / module.MANIFEST).read_text())["seed"]
    dllm_fast.ray.generate(MODEL, source, tmp_path / "out", **drawn, seed=seed)
    for changes in ({"seed": seed + 1}, {"part_size": 4}, {"gen_length": 24}, {"dtype": "bfloat16"}, {"chat": True}):
        with pytest.raises(
            ValueError, match=f"target='.*out': its answers were made with {next(iter(changes))}|options="
        ):
            dllm_fast.ray.generate(MODEL, source, tmp_path / "out", **{**drawn, **changes})
    files = [str(source / name) for name in ("b.jsonl", "a.jsonl")]
    with pytest.raises(ValueError, match=r"its answers were made with source=.*a\.jsonl.*b\.jsonl"):
        dllm_fast.ray.generate(MODEL, files, tmp_path / "out", **drawn)
    edited = source / "b.jsonl"
    edited.write_text(edited.read_text("utf-8").replace("bird", "wolf"), "utf-8")  # as many bytes
    with pytest.raises(ValueError, match=r"its answers were made with source=\{'[^']*b.jsonl': '[^']*'\}, not"):
        dllm_fast.ray.generate(MODEL, source, tmp_path / "out", **drawn)


@needs_ray
def test_answers_of_other_weights_are_left_alone(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_: iter(()))
    model = Path(shutil.copytree(dllm_fast.loading.MODELS / MODEL, tmp_path / "model"))
    for _ in range(2):
        dllm_fast.ray.generate(str(model), source, tmp_path / "out", **HOW)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match=r"its answers were made with model_files=\{'[^']*model.safetensors': "):
        dllm_fast.ray.generate(str(model), source, tmp_path / "out", **HOW)


@needs_ray
def test_a_run_that_was_killed_before_its_manifest_was_there_begins_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_: iter(()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_0123.tmp").write_text("half of it")
    dllm_fast.ray.generate(MODEL, source, tmp_path / "out", **HOW)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [module.MANIFEST]


def test_without_ray_the_error_names_the_extra(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"dllm_fast\.ray needs pip install 'dllm_fast\[ray\]'"):
        dllm_fast.ray.generate(MODEL, source, tmp_path / "out")
