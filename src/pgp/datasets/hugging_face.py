"""Image data sets of the Hugging Face hub, or in its formats on disk; they need the optional dependency `hf`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from pgp.datasets.base import BadImageError, Dataset, DatasetConfig, Split
from pgp.datasets.files import read_image
from pgp.datasets.holdout import check_test_share, holdout_mask, natural_order
from pgp.datasets.text import normalized, repeated

_TESTS = ("test", "validation")
"""Names of splits of test images; the first is preferred."""
HUB = "hf:"
"""Prefix that marks the name of such a data set among paths of folders and tables."""


@dataclass(frozen=True)
class HuggingFace(DatasetConfig):
    """A data set of the hub, or a folder in a format of the library `datasets` (`save_to_disk`, parquet).

    Training images are those of the split `train`, or of the only split that is not called `test` or `validation`. Test
    images are those of `test`, else of `validation`; without both, some images of each class are held out. Code that
    comes with a data set is never run: the required version 4 of the library cannot.
    """

    tag = "hugging-face"

    name: str = ""
    """Name on the hub, such as `beans`, or a path."""
    subset: str | None = None
    """Name of the data set's configuration, if it has several."""
    image: str | None = None
    """Column of the images. If None, the only column with images."""
    label: str | None = None
    """Column of the classes. If None, the only column of type ClassLabel, else `label` or `labels`."""
    domain: str | None = None
    """Column of the domains, for --setting dil."""
    test_share: float = 0.2
    """Fraction of each class to hold out for testing if there is only one split: at least one image, or none with 0,
    which leaves accuracy unmeasured."""
    split_seed: int = 0
    """Seed that decides which images are held out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name", os.fspath(self.name))
        check_test_share(self.test_share)

    def fetch(self, progress: Progress | None = None) -> None:
        """See `DatasetConfig.fetch`; the library downloads into its own cache and shows its own bars."""
        _load(self.name, self.subset)

    def build(self) -> Dataset:
        """Return the images. Classes are in the order of ClassLabel, by number, or as they first appear."""
        return self._dataset(_load(self.name, self.subset))

    def read(self) -> Dataset:
        """See `DatasetConfig.read`; a data set of the hub is read from the library's cache, without asking the hub."""
        return self._dataset(_load(self.name, self.subset, offline=True))

    def _dataset(self, parts: dict[str, Any]) -> Dataset:
        train = _training_split(self.name, parts)
        columns = self._columns(parts[train].features)
        tests = [part for part in _TESTS if part in parts and part != train]
        labelled = {part: _labelled(parts[part], columns["label"]) for part in tests}
        complete_first = sorted(tests, key=lambda part: labelled[part] < 1)
        used = [train, *[part for part in complete_first if labelled[part]][:1]]
        both = [parts[part] for part in used]
        for part in both:
            if missing := [column for column in columns.values() if column not in part.features]:
                raise ValueError(f"expected column {missing[0]} in each split of {self.name}, got a split with only"
                                 f" {list(part.features)}")  # fmt: skip
        names, labels = _coded(both, columns["label"])
        domains, numbers = _coded(both, columns["domain"]) if self.domain else ((), [None] * len(both))
        splits = [HubSplit(self.name, *one) for one in zip(both, [columns["image"]] * 2, labels, numbers, strict=False)]
        if len(both) == 1:
            chosen = holdout_mask(splits[0], self.test_share, self.split_seed)
            splits = [splits[0].at(~chosen), splits[0].at(chosen)]
        path = Path(self.name).expanduser()
        folder, notes = path if path.is_dir() else None, _notes(parts, used, labelled)
        return Dataset(splits[0], splits[1], names, domains=domains, folder=folder, notes=notes)

    def with_absolute_paths(self) -> DatasetConfig:
        """See `DatasetConfig.with_absolute_paths`; a name on the hub does not change."""
        path = Path(self.name).expanduser()
        return replace(self, name=str(path.absolute())) if path.exists() else self

    def without_paths(self) -> DatasetConfig:
        """See `DatasetConfig.without_paths`; a name on the hub is no path."""
        on_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", self.name, re.ASCII)
        return self if on_hub else replace(self, name="")

    def relocated(self, path: str) -> DatasetConfig:
        """See `DatasetConfig.relocated`."""
        return replace(self, name=path.removeprefix(HUB))

    def _columns(self, features: Mapping[str, Any]) -> dict[str, str]:
        """Return the columns of images, labels and domains."""
        chosen = {"image": self.image, "label": self.label, "domain": self.domain}
        for role, column in chosen.items():
            if column is not None and column not in features:
                raise ValueError(f"expected a column of {self.name} as dataset.{role}, one of {list(features)}, got"
                                 f" {column!r}")  # fmt: skip
        kinds = {column: type(feature).__name__ for column, feature in features.items()}
        images = [column for column, kind in kinds.items() if kind == "Image"]
        labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
        labels = labels or [column for column in ("label", "labels") if column in kinds]
        for role, found in (("image", images), ("label", labels)):
            if chosen[role] is None and len(found) != 1:
                raise ValueError(f"expected one {role} column in {self.name}, got {found or 'none'} among {kinds}: name"
                                 f" it by --dataset.{role}")  # fmt: skip
            chosen[role] = chosen[role] or found[0]
        return {role: column for role, column in chosen.items() if column is not None}


class HubSplit(Split):
    """Rows of a part of a Hugging Face data set, decoded when asked for."""

    def __init__(self, name: str, rows: Any, column: str, labels: Tensor, domains: Tensor | None = None) -> None:
        from datasets import Image

        self.rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
        self.name, self.column, self.labels, self.domains = name, column, labels, domains

    def image(self, index: int) -> Tensor:
        """See `Split.image`."""
        cell = self.rows[index][self.column] or {}
        called = Path(f"{index} ({cell.get('path') or 'unnamed'}) of {self.name}")
        if cell.get("bytes") is None and not cell.get("path"):
            raise BadImageError(f"cannot read the image {called}: there is none in column {self.column}")
        return read_image(called, cell["bytes"]) if cell.get("bytes") is not None else read_image(Path(cell["path"]))

    def at(self, chosen: Tensor) -> HubSplit:
        """Return the rows that the mask `chosen`, bool `(n,)`, selects."""
        rows = self.rows.select(chosen.nonzero().flatten().tolist())
        domains = None if self.domains is None else self.domains[chosen]
        return HubSplit(self.name, rows, self.column, self.labels[chosen], domains)


def _load(name: str, subset: str | None, *, offline: bool = False) -> dict[str, Any]:
    """Return the splits of a data set by name; if `offline`, without the network, as with HF_HUB_OFFLINE=1."""
    if not name:
        raise ValueError(f"expected the name of a Hugging Face data set, got none: name it by --data {HUB}NAME, or by"
                         " --dataset.name")  # fmt: skip
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"Hugging Face data sets need the library datasets, which is not installed ({error}): pip"
                         " install 'prompt-gradient-projection[hf]'") from error  # fmt: skip
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise ValueError(f"expected the library datasets from version 4 on, which runs no code of the hub, got"
                         f" {datasets.__version__}: pip install 'prompt-gradient-projection[hf]'")  # fmt: skip
    path = Path(name).expanduser()
    if path.is_absolute() and not path.exists():
        raise ValueError(f"no data set at {path}: name another, by --data {HUB}PATH")
    was_offline = datasets.config.HF_HUB_OFFLINE
    saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if saved and subset is not None:
        raise ValueError(f"expected no dataset.subset for {path}, which save_to_disk left with a single one, got"
                         f" {subset!r}: leave it out")  # fmt: skip
    try:
        datasets.config.HF_HUB_OFFLINE = was_offline or offline
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path) if path.exists() else name, subset)
    except (
        *(OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError),
        *(LookupError, TypeError, AttributeError),  # of damaged files
    ) as error:
        advice = (
            "A file is damaged or missing, or a split has no rows: save it again, by save_to_disk"
            if saved
            else "Check its name and the network, or name a folder where save_to_disk left it"
        )
        raise ValueError(f"cannot load the Hugging Face data set {name!r}: {error}. {advice}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return dict(found) if isinstance(found, dict) else {"train": found}


def _training_split(name: str, parts: Mapping[str, Any]) -> str:
    """Return the name of the split of training images."""
    candidates = ["train"] if "train" in parts else [part for part in parts if part not in _TESTS] or list(parts)
    if len(candidates) != 1:
        raise ValueError(f"expected a split train in {name}, got splits {list(parts)}: save what you need as train and"
                         " test, by save_to_disk")  # fmt: skip
    return candidates[0]


def _notes(parts: Mapping[str, Any], used: list[str], labelled: Mapping[str, float]) -> tuple[str, ...]:
    """Return what a user may not expect of which splits are used: that of training, and perhaps that of the test."""
    notes = [] if used[0] == "train" else [f"the training images are those of split {used[0]}"]
    unused = [
        f"{part} ({len(rows):,} rows{' without labels' * (labelled.get(part) == 0)})"
        for part, rows in parts.items()
        if part not in used
    ]
    return (*notes, f"splits that are not used: {', '.join(unused)}") if unused else tuple(notes)


def _labelled(part: Any, column: str) -> float:
    """Return the fraction of rows that have a label: those of a test split may be kept secret, by -1 or no value."""
    if column not in part.features:
        return 0.0
    labels = part[column]
    return sum(label not in (None, -1) for label in labels) / max(1, len(labels))


def _coded(parts: list[Any], column: str) -> tuple[tuple[str, ...], list[Tensor]]:
    """Return the names of the values of a column, and the number of each row's name, for each split.

    Splits may number the same names differently.
    """
    if hasattr(parts[0].features[column], "names"):
        texts = [_named(part, column) for part in parts]
        names = tuple(dict.fromkeys(normalized(name) for part in parts for name in part.features[column].names))
    else:
        texts = [[_text(value, column, row) for row, value in enumerate(part[column])] for part in parts]
        names = natural_order(text for part in texts for text in part if text)
    numbers = {name: number for number, name in enumerate(names)}
    for part in texts:
        if "" in part:
            raise ValueError(f"expected a value of {column} in every row, got none in row {part.index('')}")
    return names, [torch.tensor([numbers[text] for text in part]) for part in texts]


def _text(value: Any, column: str, row: int) -> str:
    """Return a value of a column of classes or domains as a name; without a value, it is empty."""
    if not isinstance(value, str | int | None):
        raise ValueError(f"expected a text or a whole number as {column} in every row, got {value!r} in row {row}:"
                         " convert the column, or name another")  # fmt: skip
    return "" if value is None else normalized(str(value))


def _named(part: Any, column: str) -> list[str]:
    """Return the name of each row's value in a column of type ClassLabel; without a value, it is empty."""
    names = [normalized(name) for name in getattr(part.features[column], "names", ())]
    if not names:
        raise ValueError(f"expected names of the values of {column} in each split, got a split without")
    if twice := repeated(names):
        raise ValueError(f"expected a name of its own for each value of {column}, got {twice[:5]} more than once")
    numbers = [-1 if number is None else number for number in part[column]]
    for row, number in enumerate(numbers):
        if number >= len(names):
            raise ValueError(f"expected {column} below {len(names)}, the number of its names, got {number} in row"
                             f" {row}")  # fmt: skip
    return [names[number] if number >= 0 else "" for number in numbers]
