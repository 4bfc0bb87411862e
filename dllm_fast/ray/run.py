"""`generate`: prompts in files, answered by a model an actor on a Ray cluster, written beside them.

The prompts are numbered in the order of the files, and cut into parts of consecutive ones. An actor reads a part, runs
`generate_many` over it, and writes a file with its answers. The file gets its name when it is complete. So what a
killed run has finished is there, and the next one does the rest. The noise of a prompt is a function of its number, and
a part is a batch of its own, whoever does it: the tokens depend neither on how many actors there are nor on which of
them die.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_fast.decoding.options import Options
from dllm_fast.decoding.text import answer_text, encode
from dllm_fast.decoding.values import finite, is_whole, one_of, require, whole
from dllm_fast.errors import one_line, require_utf8
from dllm_fast.generate import Completion, generate_many
from dllm_fast.loading import end_of_text, from_pretrained, load_tokenizer, mask_of, model_path, require_model
from dllm_fast.ops import IMPLS
from dllm_fast.patch import bound_family, require_known
from dllm_fast.ray.files import Part, check_columns, files_of, parts_of, place, read, versions, write, write_whole

MANIFEST = "_run.json"  # in the folder of answers: what they are made of
TRIES = 5  # actors that may die over one part
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What every actor is told."""

    source: Any  # a `pyarrow.fs.FileSystem`, as is ``target``
    target: Any
    folder: str
    kind: str  # "parquet" or "jsonl"
    column: str
    answer: str
    chat: bool
    model: str
    load: dict[str, str | None]  # for `from_pretrained`; the dtype by name
    batch_size: int | str
    options: dict[str, Any]  # for `generate_many`

    def file(self, part: Part) -> str:
        """Where a part's answers are."""
        return f"{self.folder}/part-{part.number:06}.{self.kind}"

    @property
    def columns(self) -> list[str]:
        """Those that are added."""
        more = ("_logprobs", "_order") if self.options.get("logprobs") else ()
        return [self.answer + suffix for suffix in ("", "_ids", "_nfe", *more)]


@dataclass(frozen=True)
class Report:
    """What `generate` returns.

    rows: the prompts, all of which have an answer now.
    resumed: those that had one before this run.
    files: the files with the answers, in the order of the prompts.
    """

    rows: int
    resumed: int
    files: list[str]


def generate(
    model: str,
    source: str | Path | list[str],
    target: str | Path,
    column: str = "prompt",
    answer: str = "answer",
    workers: int = 1,
    batch_size: int | str = 8,
    part_size: int = 256,
    chat: bool = False,
    gpus: float | None = None,
    cpus: float = 1.0,
    dtype: str = "auto",
    impl: str = "auto",
    weights: str | None = None,
    head: str | None = None,
    progress: bool | Tell = True,
    **options,
) -> Report:
    """Answer the prompts in files, on ``workers`` copies of a model.

    Args:
        model: a folder that every machine can read, a hub name, or one of `shipped`.
        source: a ``.parquet`` or ``.jsonl`` file, several of one kind, or a folder of them. Paths, or URIs of what
            pyarrow knows: ``s3://``, ``gs://``, ``hdfs://``.
        target: a folder for the answers, ``part-000000.parquet`` and so on, in the order and the format of the source.
            If a run with the same arguments and files was stopped there, this one does what it has left.
        column: the prompts' column: texts; lists of ids; or chats, lists of ``{"role": ..., "content": ...}``, which go
            through the tokenizer's chat template. A text that spells [MASK] is text; ids may hold the mask id.
        answer: the new column, with the text up to its end. ``<answer>_ids`` has all generated ids, ``<answer>_nfe``
            the forwards. With ``logprobs=True`` there are ``<answer>_logprobs`` and ``<answer>_order``, see `Output`.
        workers: actors, each with the whole model.
        batch_size: rows that an actor evaluates together, as `generate_many`'s.
        part_size: prompts of a part, and so of an output file. A run that is killed loses the parts that were begun.
        chat: put texts through the chat template, as a user's one turn.
        gpus: of an actor; a share lets several use one. None: 1 if the cluster has GPUs now, else 0. A model is on one.
        cpus: cores of an actor, and so the threads of its PyTorch.
        dtype: of the weights, by name; ``"auto"``: the checkpoint's.
        impl, weights, head: as `from_pretrained`.
        progress: True shows a bar (tqdm); a callable is given (rows done, rows in all).
        options: `generate`'s, as of `generate_many`. ``eos_id`` is the tokenizer's end of text if it is not given, and
            ``seed`` is drawn once for a folder of answers.

    An actor that dies is replaced, and its part done again; a part over which `TRIES` actors died is an error.
    ``ray.init()`` is called if it was not: with ``RAY_ADDRESS`` in the environment it joins that cluster.

    Returns:
        `Report`.

    Raises:
        ImportError: there is no Ray; it names the extra.
        ValueError: an argument that does not fit, by name, or ``target`` holds answers that were made with others;
            nothing has run. Or a prompt does not fit the model, when its part is reached.
    """
    # 1. The arguments.
    _require_ray()
    require(isinstance(model, str), f"model: a {type(model).__name__} is not a name; each actor loads its own")
    require_model(model)
    one_of("impl", impl, IMPLS)
    require_known(weights=weights, head=head)
    good = dtype == "auto" or isinstance(getattr(torch, str(dtype), None), torch.dtype)
    require(good, f"dtype={dtype!r} is neither 'auto' nor the name of a dtype")
    workers, part_size = whole("workers", workers), whole("part_size", part_size)
    batch_size = batch_size if batch_size == "auto" else whole("batch_size", batch_size)
    cpus, gpus = finite("cpus", cpus), None if gpus is None else finite("gpus", gpus)
    Options.of_call("dllm_fast.ray.generate", options)
    # 2. The files, and what is left of them to do.
    files, kind, fs = files_of(source)
    load = {"dtype": dtype, "impl": impl, "weights": weights, "head": head}
    plan = Plan(fs, *place(target), kind, column, answer, chat, model, load, batch_size, options)
    check_columns(fs, files[0], kind, column, plan.columns)
    parts = list(parts_of(fs, files, kind, part_size))
    plan = begun(plan, parts, part_size)
    there = {info.path for info in plan.target.get_file_info([plan.file(part) for part in parts]) if info.is_file}
    left = [part for part in parts if plan.file(part) not in there]
    total = sum(part.rows for part in parts)
    done = resumed = total - sum(part.rows for part in left)
    # 3. The work.
    with _telling(progress) as tell:
        tell(done, total)
        for rows in _run(plan, left, workers, gpus, cpus) if left else ():
            done += rows
            tell(done, total)
    return Report(total, resumed, [plan.file(part) for part in parts])


def _require_ray() -> None:
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: dllm_fast.ray needs pip install 'dllm_fast[ray]'") from error


@contextlib.contextmanager
def _telling(progress: bool | Tell) -> Iterator[Tell]:
    if progress is not True:
        yield progress or (lambda done, total: None)
        return
    from tqdm.auto import tqdm

    with tqdm(unit="prompt") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _run(plan: Plan, parts: list[Part], workers: int, gpus: float | None, cpus: float) -> Iterator[int]:
    """The rows of each part, when it is done."""
    import ray.data

    if not ray.is_initialized():
        ray.init()
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    items = ray.data.from_items(
        [{"part": json.dumps(dataclasses.asdict(part))} for part in parts], override_num_blocks=len(parts)
    )
    done = items.map_batches(
        Worker,
        batch_size=1,
        fn_constructor_args=(plan, "cuda" if gpus else "cpu"),
        # One at a time: a part that waits for a busy actor could be another's.
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(parts)), max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=TRIES - 1,
    )
    for row in done.iter_rows():
        require(not row["error"], row["error"])
        yield int(row["rows"])


class Worker:
    """An actor: a model, and the parts that it is given."""

    def __init__(self, plan: Plan, device: str):
        self.plan = plan
        self.row_groups: dict[tuple[str, int], Any] = {}
        self.error = ""
        try:
            self._load(device)
        except (OSError, ValueError) as error:  # raised here, Ray would hide it behind a dead actor
            self.error = one_line(error)

    def _load(self, device: str) -> None:
        plan = self.plan
        load: dict[str, Any] = {**plan.load, "device": device}
        if load["dtype"] != "auto":
            load["dtype"] = getattr(torch, load["dtype"])
        self.model: Any = from_pretrained(plan.model, **load)
        self.vocabulary = bound_family(self.model).vocab_size
        self.tokenizer: Any = load_tokenizer(plan.model)
        self.mask_id = mask_of(plan.options.get("mask_id"), self.model, self.tokenizer)
        eos_ids = plan.options.get("eos_id")
        eos_ids = end_of_text(self.model, self.tokenizer) if eos_ids is None else eos_ids
        self.eos_ids: Any = [eos_ids] if is_whole(eos_ids) else eos_ids
        self.options = {**plan.options, "mask_id": self.mask_id, "eos_id": self.eos_ids}

    def __call__(self, batch: dict) -> dict[str, list]:
        """Do the part that is the batch, unless it is done: a file may outlive the news of it. A ValueError is handed
        back as text, because Ray raises another in its place; so is what kept the model from loading."""
        if self.error:
            return {"rows": [0], "error": [self.error]}
        part = Part(**json.loads(batch["part"][0]))
        try:
            if not self.plan.target.get_file_info(self.plan.file(part)).is_file:
                rows, prompts = read(self.plan.source, part, self.plan.kind, self.plan.column, self.row_groups)
                write(self.plan.target, self.plan.file(part), self.plan.kind, rows, self.answers(part, prompts))
        except ValueError as error:
            return {"rows": [0], "error": [str(error)]}
        return {"rows": [part.rows], "error": [""]}

    def answers(self, part: Part, prompts: list) -> list[dict[str, Any]]:
        """The new columns of a part's rows."""
        where = [f"{part.file}, row {part.row + n}: {self.plan.column}" for n in range(len(prompts))]
        ids = [self.encode(*each) for each in zip(where, prompts, strict=True)]
        numbers = range(part.first, part.first + part.rows)
        try:
            done = list(generate_many(self.model, ids, self.plan.batch_size, noise_rows=numbers, **self.options))
        except ValueError as error:
            raise ValueError(f"{part.file}, prompts from row {part.row} on: {error}") from None
        return [self.columns(completion, len(own)) for completion, own in zip(done, ids, strict=True)]

    def encode(self, where: str, prompt: Any) -> list[int]:
        """Ids of a prompt. Raises ValueError that says where it is."""
        if isinstance(prompt, str) and self.plan.chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list) and any(isinstance(turn, dict) for turn in prompt):
            require(bool(self.tokenizer.chat_template), f"{where}: this model's tokenizer has no chat template")
            try:
                prompt = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template says in this way that it takes no such roles, for instance
                raise ValueError(f"{where}: the chat template refuses it: {error}") from None
        if isinstance(prompt, str):
            require_utf8(where, prompt)
            try:
                prompt = encode(self.tokenizer, [prompt], self.mask_id)[0]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        good = isinstance(prompt, list) and all(map(is_whole, prompt))
        require(good, f"{where} is neither a text, nor a chat, nor a list of ids")
        require(bool(prompt), f"{where} is empty")
        wrong = next((i for i in prompt if not 0 <= i < self.vocabulary), None)
        require(wrong is None, f"{where}: id {wrong} is outside the vocabulary of {self.vocabulary}")
        return prompt

    def columns(self, completion: Completion, prompt: int) -> dict[str, Any]:
        ids = completion.sequence[prompt:].tolist()
        values = [answer_text(self.tokenizer, ids, self.eos_ids), ids, completion.nfe]
        for x in (completion.logprobs, completion.order):
            if x is not None:
                values.append(x[prompt:].tolist())
        return dict(zip(self.plan.columns, values, strict=True))


def model_files(name: str) -> dict[str, str]:
    """`versions` of the files in a model's folder, by their names there; of a hub name none."""
    folder = Path(model_path(name))
    inside = [str(file) for file in sorted(folder.iterdir()) if file.is_file()] if folder.is_dir() else []
    system, _ = place(folder)
    return {Path(file).name: own for file, own in versions(system, inside).items()}


def begun(plan: Plan, parts: list[Part], part_size: int) -> Plan:
    """The plan with the seed of the run whose answers are in its folder; of a new run where there is none.

    Raises ValueError that names ``target`` if that one was told something else.
    """
    from pyarrow import fs

    firsts = {part.file: part.first for part in reversed(parts)}  # so that their order matters
    source = {file: f"from prompt {firsts[file]} on, {own}" for file, own in versions(plan.source, [*firsts]).items()}
    told: dict[str, Any] = {
        "model": plan.model, "model_files": model_files(plan.model), **plan.load, "source": source,
        "column": plan.column, "answer": plan.answer, "chat": plan.chat, "part_size": part_size,
        "seed": plan.options.get("seed"),
        "options": {name: repr(value) for name, value in sorted(plan.options.items()) if name != "seed"},
    }  # fmt: skip
    path = f"{plan.folder}/{MANIFEST}"
    there = plan.target.get_file_info(fs.FileSelector(plan.folder, allow_not_found=True))
    half_written = [info.path for info in there if Path(info.path).match("_*.tmp")]  # of a run that was killed
    if any(info.path == path for info in there):
        with plan.target.open_input_stream(path) as stream:
            before = json.loads(stream.read())
        told["seed"] = before["seed"] if told["seed"] is None else told["seed"]
        for name, value in told.items():
            was = before.get(name)
            if isinstance(was, dict) and isinstance(value, dict):  # of many files, those that differ
                pairs = (was, value), (value, was)
                was, value = (dict(sorted(own.items() - other.items())) for own, other in pairs)
            require(was == value, f"target={plan.folder!r}: its answers were made with {name}={was!r}, not {value!r}")
    else:
        require(len(there) == len(half_written), f"target={plan.folder!r}: the folder holds other files")
        if told["seed"] is None:
            told["seed"] = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        plan.target.create_dir(plan.folder)
        write_whole(plan.target, path, lambda stream: stream.write(json.dumps(told, indent=1).encode()))
    for file in half_written:
        plan.target.delete_file(file)
    return dataclasses.replace(plan, options={**plan.options, "seed": told["seed"]})
