"""Files of prompts and of answers, Parquet or JSON lines, on any file system that pyarrow knows."""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_fast.decoding.values import require

SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one file."""

    number: int
    file: str
    row: int  # the first one in the file
    rows: int
    first: int  # its number among all prompts
    begin: int = 0  # of JSON lines, the bytes that they are
    end: int = 0


def place(path: str | Path) -> tuple[Any, str]:
    """A path or a URI, as a file system and a path in it."""
    from pyarrow import fs

    if "://" in str(path):
        return fs.FileSystem.from_uri(str(path))
    return fs.LocalFileSystem(), os.path.abspath(path)


def files_of(source: str | Path | list[str]) -> tuple[list[str], str, Any]:
    """The source's files, their format and their file system. Raises ValueError that names ``source``."""
    from pyarrow import fs

    files: list[str] = []
    systems = []
    for path in source if isinstance(source, list | tuple) else [source]:
        system, where = place(path)
        systems.append(system)
        info = system.get_file_info(where)
        require(info.type != fs.FileType.NotFound, f"source={str(path)!r}: there is no such file or folder")
        if info.is_file:
            files.append(where)
            continue
        inside = [one.path for one in system.get_file_info(fs.FileSelector(where)) if one.is_file]
        inside = sorted(one for one in inside if Path(one).suffix in SUFFIXES)
        require(bool(inside), f"source={str(path)!r}: the folder holds no {', '.join(SUFFIXES)} file")
        files += inside
    require(bool(files), "source=[]: there are no files")
    for file in files:
        require(Path(file).suffix in SUFFIXES, f"source={file!r}: is none of {', '.join(SUFFIXES)}")
    kinds = {SUFFIXES[Path(file).suffix] for file in files}
    require(len(kinds) == 1, f"source={source!r}: files of several formats; their rows do not fit together")
    require(all(system == systems[0] for system in systems), f"source={source!r}: files of several file systems")
    return files, kinds.pop(), systems[0]


def check_columns(fs, file: str, kind: str, column: str, added: list[str]) -> None:
    """Raise ValueError if a file lacks the ``column``, or has one of those to be ``added``."""
    if kind == "parquet":
        import pyarrow.parquet

        with fs.open_input_file(file) as stream:
            names = pyarrow.parquet.read_schema(stream).names
    else:
        with fs.open_input_stream(file) as stream:
            first = next(lines(stream), (0, 0, b"{}"))[2]
        names = list(as_object(first, file))
    require(column in names, f"column={column!r}: {file} has {', '.join(names) or 'no columns'}")
    for name in added:
        require(name not in names, f"answer={added[0]!r}: {file} has a column {name!r} already")


def parts_of(fs, files: list[str], kind: str, size: int) -> Iterator[Part]:
    """The files in parts of up to ``size`` rows."""
    number = first = 0
    for file in files:
        for row, rows, begin, end in _cuts(fs, file, kind, size):
            yield Part(number, file, row, rows, first, begin, end)
            number, first = number + 1, first + rows


def _cuts(fs, file: str, kind: str, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first byte, one past the last) of a file's parts. Of JSON lines it reads every byte."""
    if kind == "parquet":
        import pyarrow.parquet

        with fs.open_input_file(file) as stream:
            total = pyarrow.parquet.ParquetFile(stream).metadata.num_rows
        for row in range(0, total, size):
            yield row, min(size, total - row), 0, 0
        return
    with fs.open_input_stream(file) as stream:
        row = rows = first = last = 0
        for begin, end, _ in lines(stream):
            first = first if rows else begin
            rows, last = rows + 1, end
            if rows == size:
                yield row, rows, first, last
                row, rows = row + rows, 0
        if rows:
            yield row, rows, first, last


def lines(stream) -> Iterator[tuple[int, int, bytes]]:
    r"""(first byte, one past the last, bytes) of each line that is not blank. Only \n ends one."""
    at, rest = 0, b""
    while chunk := stream.read(1 << 20):
        *ended, rest = (rest + chunk).split(b"\n")
        for line in ended:
            if line.strip():
                yield at, at + len(line), line
            at += len(line) + 1
    if rest.strip():
        yield at, at + len(rest), rest


def as_object(line: bytes, where: str) -> dict:
    """A line of JSON. Raises ValueError that says where it is."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {line[:80]!r} is not a JSON object")
    return entry


def read(fs, part: Part, kind: str, column: str, kept: dict[tuple[str, int], Any]) -> tuple[Any, list]:
    """A part's rows, as a table or as dicts, and their prompts. Raises ValueError that names the row.

    ``kept``: row groups that the last call has left there; a large one has many parts.
    """
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        with fs.open_input_file(part.file) as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            groups: dict[tuple[str, int], Any] = {}
            before = skipped = 0
            for number in range(file.num_row_groups):
                after = before + file.metadata.row_group(number).num_rows
                if after > part.row and before < part.row + part.rows:
                    skipped = skipped if groups else part.row - before
                    key = part.file, number
                    groups[key] = kept[key] if key in kept else file.read_row_group(number)
                before = after
        kept.clear()
        kept.update(groups)
        table = pa.concat_tables(groups.values()).slice(skipped, part.rows)
        require(column in table.column_names, f"{part.file}: has no column {column!r}")
        return table, table[column].to_pylist()
    with fs.open_input_file(part.file) as stream:
        stream.seek(part.begin)
        own = stream.read(part.end - part.begin).split(b"\n")
    filled = [line for line in own if line.strip()]
    rows = [as_object(line, f"{part.file}, row {number}") for number, line in enumerate(filled, part.row)]
    for number, row in enumerate(rows, part.row):
        require(column in row, f"{part.file}, row {number}: has no {column!r}")
    return rows, [row[column] for row in rows]


def write(fs, file: str, kind: str, rows: Any, answers: list[dict]) -> None:
    """Write a part's rows with their answers."""

    def into(stream) -> None:
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet

            table = rows
            for name in answers[0]:
                table = table.append_column(name, pa.array([own[name] for own in answers]))
            pyarrow.parquet.write_table(table, stream)
            return
        for row, own in zip(rows, answers, strict=True):
            text = json.dumps({**row, **own}, ensure_ascii=False)
            stream.write(text.encode(errors="backslashreplace") + b"\n")  # a lone surrogate is escaped, as it came

    write_whole(fs, file, into)


def versions(fs, files: list[str]) -> dict[str, str]:
    """Of each file what tells it from an edited one: its size, and when it was written, if the file system says so."""
    infos = fs.get_file_info(files)
    return {info.path: f"{info.size} bytes of {info.mtime}" for info in infos}


def write_whole(fs, file: str, into: Callable[[Any], None]) -> None:
    """Write a file so that under its name there is all of it or nothing."""
    fresh = f"{os.path.dirname(file)}/_{uuid.uuid4().hex}.tmp"  # readers of a folder skip names that begin so
    with fs.open_output_stream(fresh) as stream:
        into(stream)
    fs.move(fresh, file)
