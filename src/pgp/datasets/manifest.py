"""Your own images, listed in a table."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pgp.datasets.base import Dataset, DatasetConfig
from pgp.datasets.files import FileSplit
from pgp.datasets.holdout import check_test_share, natural_order
from pgp.datasets.text import lines_of, normalized, read_text

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})


@dataclass(frozen=True)
class Manifest(DatasetConfig):
    """Images listed in a CSV, TSV or JSONL file in UTF-8.

    The columns are `path`, relative to the folder of the file; `label`, the class; `split`, train or test (without this
    column, some images of each class are held out for testing); `task`, the name or number of the task that brings the
    class; and `domain`, for --setting dil (without it, `task` is used). Other columns are ignored.

    Classes, tasks and domains are in the order of first appearance, or sorted if all are whole numbers.
    """

    tag = "manifest"

    file: Path = Path("images.csv")
    """Path of the table."""
    test_share: float = 0.2
    """Fraction of each class to hold out for testing if the table has no column `split`: at least one image, or none
    with 0, which leaves accuracy unmeasured."""
    split_seed: int = 0
    """Seed that decides which images are held out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_test_share(self.test_share)

    @property
    def search_paths(self) -> tuple[Path, ...]:
        """See `DatasetConfig.search_paths`."""
        return (self.file,)

    def build(self) -> Dataset:
        """Return the images in the order of the table."""
        file = self.file.expanduser().absolute()
        if not os.path.lexists(file):
            raise ValueError(f"no table of images at {file}: name another, by --data")
        rows = list(_rows(file))
        paths = _existing(file, rows)
        names, labels = _numbered([row.label for row in rows])
        domains, numbers = _numbered([row.domain or row.task for row in rows])
        if "" in domains:
            domains = ()
        all_images = FileSplit(paths, labels, numbers if domains else None)
        if rows[0].split:
            train, test = (all_images.at(i for i, row in enumerate(rows) if row.split == part) for part in _PARTS)
            _check_parts(file, rows)
        else:
            train, test = all_images.parted(self.test_share, self.split_seed)
        classes_of: dict[str, set[str]] = {}
        for row in rows:
            if row.task:
                classes_of.setdefault(row.task, set()).add(row.label)
        tasks = tuple(
            (task, tuple(name for name in names if name in classes_of[task])) for task in natural_order(classes_of)
        )
        return Dataset(train, test, names, tasks, domains, file.parent)


class Row(NamedTuple):
    """A row of the table; empty cells are ""."""

    line: int
    path: str
    label: str
    split: str
    task: str
    domain: str


_REQUIRED, _OPTIONAL, _PARTS = ("path", "label"), ("split", "task", "domain"), ("train", "test")


def _numbered(words: list[str]) -> tuple[tuple[str, ...], list[int]]:
    """Return each word once, and the number of each word in that order."""
    once = natural_order(words)
    index_of = {word: number for number, word in enumerate(once)}
    return once, [index_of[word] for word in words]


def _rows(file: Path) -> Iterator[Row]:
    """Yield the rows of the table at `file`, after checking that they are complete."""
    text = read_text(file, "the table of images")
    count = 0
    full: tuple[str, ...] = ()  # of split and domain, what the first row fills
    for line, record in _from_json(file, text) if file.suffix.lower() == ".jsonl" else _from_table(file, text):
        row = Row(line, **{name: record.get(name, "").strip() for name in _REQUIRED + _OPTIONAL})
        label, task, domain = map(normalized, (row.label, row.task, row.domain))
        row = row._replace(label=label, split=row.split.lower(), task=task, domain=domain)
        if "\0" in "".join(row[1:]):
            raise ValueError(f"expected texts without the zero character in line {line} of {file}, got {record}")
        if not (row.path and row.label):
            raise ValueError(f"expected a path and a label in line {line} of {file}, got {record}")
        if row.split and row.split not in _PARTS:
            raise ValueError(f"expected split train or test in line {line} of {file}, got {record['split']!r}")
        filled = tuple(name for name in ("split", "domain") if getattr(row, name))
        if count and filled != full:
            raise ValueError(f"expected all rows of {file} to fill the same of split and domain, got {list(filled)} in"
                             f" line {line} and {list(full)} in the first row")  # fmt: skip
        count, full = count + 1, filled
        yield row
    if not count:
        raise ValueError(f"expected rows of images in {file}, got none")


def _from_table(file: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    line = 1  # where a row begins: a text in quotes may have several lines
    try:
        for fields in reader:
            if not header and fields:
                header = [word.strip().lower() for word in fields]
                _check_columns(file, line, header)
            elif fields:
                if len(fields) != len(header):
                    raise ValueError(f"expected {len(header)} fields in line {line} of {file}, got {len(fields)}:"
                                     f" {fields}")  # fmt: skip
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"cannot read line {line} of {file}: {error}; look whether its quotes are closed") from error


def _from_json(file: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for line, content in enumerate(lines_of(text), 1):
        if not content.strip():
            continue
        try:
            record: Any = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected a JSON object in line {line} of {file}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object in line {line} of {file}, got {content.strip():.80}")
        _check_columns(file, line, record)
        known = {name: record[name] for name in _REQUIRED + _OPTIONAL if record.get(name) is not None}
        for name, value in known.items():
            if not isinstance(value, (str, int)) or isinstance(value, bool):
                raise ValueError(f"expected a text or a whole number as {name} in line {line} of {file}, got {value!r}")
        yield line, {name: str(value) for name, value in known.items()}


def _check_columns(file: Path, line: int, columns: Iterable[str]) -> None:
    """Raise if a required column is missing, one is there twice, or the name of one looks mistyped."""
    columns = list(columns)
    known = [name for name in columns if name in _REQUIRED + _OPTIONAL]
    if not {*_REQUIRED} <= {*known}:
        raise ValueError(f"expected columns path and label (and perhaps split, task, domain) in line {line} of {file},"
                         f" got {columns}")  # fmt: skip
    if len(set(known)) < len(known):
        raise ValueError(f"expected each column once in line {line} of {file}, got {columns}")
    for name in columns:
        if name in known:
            continue
        if meant := [other for other in _OPTIONAL if other not in known and _looks_like(name, other)]:
            raise ValueError(f"unknown column {name!r} in line {line} of {file}: perhaps you meant {meant[0]!r}; if"
                             " not, name it otherwise")  # fmt: skip


def _looks_like(name: str, column: str) -> bool:
    """Return whether `name` may be `column` mistyped. Other words, such as mask for task, often begin differently."""
    if name[:1] != column[0]:
        return False
    return sorted(name) == sorted(column) or difflib.SequenceMatcher(None, name, column).ratio() >= 0.8


def _existing(file: Path, rows: list[Row]) -> list[Path]:
    """Return the absolute paths of all rows, and raise an error if an image is missing, no file, or listed twice.

    A file may have several paths, by a link or in another case. It must not be in both parts.
    """
    lines: dict[str, Row] = {}
    files: dict[tuple[int, int], Row] = {}
    missing: list[str] = []
    irregular: list[str] = []
    for row in rows:
        path = _found(file.parent, row.path)
        if (other := lines.setdefault(path, row)) is not row:
            leak = " and in both parts, so that a test image would be trained on" if other.split != row.split else ""
            raise ValueError(f"expected every image once in {file}, got {row.path!r} in lines {other.line} and"
                             f" {row.line}{leak}")  # fmt: skip
        try:
            status = os.stat(path)  # noqa: PTH116  (a Path per image of a long table takes seconds)
        except (OSError, ValueError):  # or a path that no file can have
            (irregular if os.path.lexists(path) else missing).append(row.path)
            continue
        if not stat.S_ISREG(status.st_mode):
            irregular.append(row.path)
        elif status.st_ino:  # some file systems have no numbers of files
            other = files.setdefault((status.st_dev, status.st_ino), row)
            if other.split != row.split:
                raise ValueError(f"expected every image once in {file}, got the same file as {other.path!r} in line"
                                 f" {other.line} and {row.path!r} in line {row.line}, in both parts, so that a test"
                                 " image would be trained on")  # fmt: skip
    for paths, what in ((missing, "do not exist"), (irregular, "are no files, but folders, pipes or broken links")):
        if paths:
            raise ValueError(f"{len(paths)} of the {len(rows)} images of {file} {what}, such as {paths[:5]}; paths are"
                             f" taken from {file.parent}")  # fmt: skip
    return [Path(path) for path in lines]


def _found(folder: Path, path: str) -> str:
    """Return the path below `folder` that matches `path`, in any Unicode form of its name."""
    found = os.path.normpath(folder / path)
    if path.isascii() or os.path.lexists(found):
        return found
    forms = (os.path.normpath(folder / unicodedata.normalize(form, path)) for form in ("NFC", "NFD"))
    return next((form for form in forms if os.path.lexists(form)), found)


def _check_parts(file: Path, rows: list[Row]) -> None:
    """Raise unless both parts have images, and training has those of every class."""
    labels = {part: {row.label for row in rows if row.split == part} for part in _PARTS}
    for part in _PARTS:
        if not labels[part]:
            raise ValueError(f"expected rows with split {part} in {file}, got none; without the column, a test part is"
                             " drawn")  # fmt: skip
    if unknown := sorted(labels["test"] - labels["train"]):
        raise ValueError(f"expected training images of every class in {file}, got {unknown[:5]} in test only")
