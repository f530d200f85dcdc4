"""Divide data into tasks, from the settings of a run and from files beside the data."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pgp.config import Config
from pgp.datasets.base import ArraySplit, BadImageError, ConcatSplit, Dataset, DatasetConfig, Split, with_advice
from pgp.datasets.loader import SampleKey, sequential_batches
from pgp.datasets.text import lines_of, normalized, read_text
from pgp.methods.clip_prompt import ZeroShot
from pgp.methods.head_only import HeadOnly
from pgp.rng import make_generator
from pgp.runs.identity import DataDescription
from pgp.scenario import (
    Groups,
    Scenario,
    Task,
    class_order,
    sample_in_proportion,
    split_by_class,
    split_by_domain,
    split_by_group,
    split_by_increment,
)

T = TypeVar("T")
CLASS_ORDER_FILE, TASKS_FILE = "class_order.txt", "tasks.json"
"""Files beside the data that decide the tasks, if they exist: class names in the order of learning, one a line; and a
JSON object of task names, in the order of learning, each with a list of its class names (under dil, of its domains)."""
DEFAULT_TASKS = 5
"""Largest number of tasks, if neither the settings nor the data say how many; each task has at least two classes."""


def build_tasks(
    config: Config, learned: DataDescription | None = None, *, downloads: bool = True
) -> tuple[Dataset, Scenario]:
    """Return all data of a run and their tasks: those of its data set, and one more for each data set that was added.

    Args:
        config: Configuration of the run.
        downloads: Whether a data set that is missing is downloaded, if it can be.
        learned: Description of the data that are learned already. Their images are needed for evaluation only. A data
            set of these that cannot be read or has changed has no images, and its tasks are missing; it is a warning.

    Raises:
        ValueError: If the data do not fit the settings.
    """
    known = [learned.source(number) for number in range(len(learned.fingerprints))] if learned else []
    data = _build(config.dataset, known[0] if known else None, downloads=downloads)
    if len(data.train):
        scenario = build_scenario(config, data)
    else:
        scenario = _learned_tasks(known[0], data.test)
    _sample_test_images(scenario.tasks, data, config)
    scenario = scenario.joint() if config.joint else scenario
    for number, more in enumerate(config.added, start=1):
        recorded = known[number] if number < len(known) else None
        data, scenario = _append_dataset(data, scenario, more, recorded, config, downloads=downloads)
        _sample_test_images(scenario.tasks[-1:], data, config)
    return data, scenario


def _sample_test_images(tasks: Sequence[Task], data: Dataset, config: Config) -> None:
    """Reduce the test images of tasks to a sample of each, if `config` asks for it."""
    if config.test_images is not None:
        for task in tasks:
            task.test = sample_in_proportion(task.test, data.test.labels, config.test_images, config.seed)


def _build(dataset: DatasetConfig, recorded: DataDescription | None, *, downloads: bool) -> Dataset:
    """Return a data set. If it is `recorded` and cannot be read or has changed, return what is left of it, and warn.

    Test images are left if they are those that were recorded. Training images are no longer needed, so a recorded data
    set without test images is not read.
    """
    if recorded is None:
        return dataset.build() if downloads else dataset.read()
    empty = ArraySplit(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.long))
    if not any(recorded.test_images):
        return Dataset(empty, empty, recorded.class_names)
    where = dataset.place
    try:
        data = dataset.read()
        if fingerprint(data.train, data.test) == recorded.fingerprints[0]:
            return data
        reason = "they are other images than those that were learned"
    except (OSError, ValueError) as error:
        reason = str(error)
    try:
        test = dataset.read_test(recorded.class_names)
    except (OSError, ValueError):
        test = None
    if test is not None and recorded.fingerprints[0].endswith(fingerprint(test)):
        return Dataset(empty, test, recorded.class_names)
    warnings.warn(f"the old images in {where} are not evaluated: {reason}", stacklevel=2)
    return Dataset(empty, empty, recorded.class_names)


def _learned_tasks(recorded: DataDescription, test: Split) -> Scenario:
    """Return tasks that are learned already, without training images."""
    none, tasks = torch.zeros(0, dtype=torch.long), []
    for index, (classes, name) in enumerate(zip(recorded.tasks, recorded.task_names, strict=True)):
        of_task = torch.isin(test.labels, torch.tensor(classes)).nonzero().flatten()
        tasks.append(Task(index, classes, none, of_task, name))
    return Scenario(tuple(tasks))


def _append_dataset(
    data: Dataset,
    scenario: Scenario,
    more: DatasetConfig,
    recorded: DataDescription | None,
    config: Config,
    *,
    downloads: bool,
) -> tuple[Dataset, Scenario]:
    """Return the data with those of `more` joined, and the scenario with a task for them.

    Raises:
        ValueError: If its classes are known already, or under dil if one of them is not.
    """
    new, where = _build(more, recorded, downloads=downloads), more.place
    known = [name for name in new.class_names if name in data.class_names]
    if known and config.setting != "dil":
        raise ValueError(f"expected new classes in {where}, got {known[:5]}, which this run has learned already: give"
                         " them other names, or leave them out")  # fmt: skip
    if config.setting == "dil":
        for name in new.class_names:
            _class_index(name, data.class_names, where, "class")
    names = (*data.class_names, *(name for name in new.class_names if name not in known))
    labels = torch.tensor([names.index(name) for name in new.class_names])
    train, test = (labels[split.labels] for split in (new.train, new.test))
    if recorded is None:
        _check_classes(new)
    task = Task(
        len(scenario),
        tuple(train.unique().tolist()) or tuple(labels.tolist()),
        torch.arange(len(train)) + len(data.train),
        torch.arange(len(test)) + len(data.test),
        normalized(more.search_paths[0].stem) if more.search_paths else "",
    )
    both = ConcatSplit(data.train, new.train, train), ConcatSplit(data.test, new.test, test)
    notes, ignored = (*data.notes, *new.notes), (*data.ignored, *new.ignored)
    data = data._replace(train=both[0], test=both[1], class_names=names, notes=notes, ignored=ignored)
    return data, Scenario((*scenario.tasks, task))


def build_scenario(config: Config, data: Dataset) -> Scenario:
    """Return the tasks that `config` makes of `data`.

    A file that the settings name has priority over files beside the data.

    Raises:
        ValueError: If two sources of equal priority decide the order, if their number of tasks is not that of the
            settings, if a file does not name every class once, if a task has no training images, or if only some tasks
            have test images.
    """
    scenario = _by_domain(config, data) if config.setting == "dil" else _by_class(config, data)
    for task in scenario.tasks:
        if not len(task.train) or (len(data.test) and not task.is_tested):
            raise ValueError(f"expected training and test images in every task, got {len(task.train)} and"
                             f" {len(task.test)} in {scenario.describe(task)} with classes {task.classes}")  # fmt: skip
    _check_classes(data)
    return scenario


def check_readable(data: Dataset, scenario: Scenario, *, skip_bad: bool, learned: int = 0) -> None:
    """Raise unless each class to be learned has a training image that can be read, and each tested task a test image.

    It opens images of a class, and test images of a task, until one can be read, so it costs little.

    Args:
        data: All data of the run.
        scenario: Its tasks.
        skip_bad: Whether training skips images that cannot be read. If False, the first one is an error.
        learned: Number of tasks that are learned already.

    Raises:
        BadImageError: Naming the first image that cannot be read, unless `skip_bad`.
        ValueError: Naming the classes or the task without any image that can be read.
    """
    if learned == len(scenario):
        return
    for task in scenario.tasks[learned:]:
        labels = data.train.labels[task.train]
        if bad := [
            label for label in task.classes if not _any_readable(data.train, task.train[labels == label], skip_bad)
        ]:
            names = [data.class_names[label] for label in bad]
            raise ValueError(
                f"expected training images of every class that can be read, got none of {names[:5]}, {len(names)} in"
                f" all, in {scenario.describe(task)}: pgp data check lists them"
            )
    for task in scenario.tasks:
        if task.is_tested and not _any_readable(data.test, task.test, skip_bad):
            raise ValueError(f"expected test images in every task that can be read, got none of {len(task.test)} in"
                             f" {scenario.describe(task)}: pgp data check lists them")  # fmt: skip


def _any_readable(split: Split, indices: Tensor, skip_bad: bool) -> bool:
    return any(_is_readable(split, index, skip_bad) for index in indices.tolist())


def _is_readable(split: Split, index: int, skip_bad: bool) -> bool:
    try:
        split.image(index)
    except BadImageError as error:
        if not skip_bad:
            raise with_advice(error) from error
        return False
    return True


def single_class_warning(config: Config, scenario: Scenario) -> str | None:
    """Return a sentence that names the tasks with a single class, or None if there are none or nothing is trained.

    The loss compares the classes of one task, so it is 0 there.
    """
    trains_nothing = isinstance(config.method, HeadOnly.Config) and not config.method.learns
    if trains_nothing or isinstance(config.method, ZeroShot.Config):
        return None
    alone = [scenario.describe(task) for task in scenario.tasks if len(task.classes) == 1]
    if not alone:
        return None
    more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
    return (
        f"a single class in {', '.join(alone[:3])}{more}: prompts and head learn nothing there, only readouts from"
        " statistics (lda, logistic, ncm) do; give each task two classes at least"
    )


def weight_decay_warning(config: Config, scenario: Scenario) -> str | None:
    """Return a sentence if weight decay destroys what earlier tasks have learned, or None.

    The only gradient of the head's rows of old classes is that of the decay, and Adam scales it to a full step.
    """
    later = config.optimizer_of(1)
    if later.name != "adam" or not later.weight_decay or len(scenario) < 2:
        return None
    return (
        f"weight decay {later.weight_decay:g} with adam shrinks the head's weights of old classes by the learning rate"
        " in each step: choose --optimizer.name adamw, which decays them slowly, or no weight decay"
    )


def unused_setting_warning(config: Config) -> str | None:
    """Return a sentence that names settings which nothing uses, or None if there are none."""
    unused = []
    if config.views and config.experts == "none" and all(readout.uses_head for readout in config.readouts):
        unused.append(f"views {config.views}, because no readout is fitted to features")
    if config.expert_candidates > 1 and config.experts == "none":
        unused.append(f"expert_candidates {config.expert_candidates}, because there are no experts")
    return f"unused settings: {'; '.join(unused)}" if unused else None


def _check_classes(data: Dataset) -> None:
    """Raise if a class has nothing to learn from; warn if it cannot be tested."""
    counts = [torch.bincount(split.labels, minlength=data.classes) for split in (data.train, data.test)]
    missing = [[name for name, count in zip(data.class_names, each, strict=True) if not count] for each in counts]
    if missing[0]:
        raise ValueError(f"expected training images of every class, got none of {missing[0][:5]}, {len(missing[0])} in"
                         " all: add some, or take the class out")  # fmt: skip
    if missing[1]:
        warnings.warn(
            f"no test images of {missing[1][:5]} ({len(missing[1])} in all), so their accuracy is not measured",
            stacklevel=2,
        )


def describe_data(data: Dataset, scenario: Scenario, learned: DataDescription | None = None) -> DataDescription:
    """Return the description of the data that a run records.

    If `learned` describes the first tasks, data without images keep their description.
    """
    sources = list(zip(data.train.sources(), data.test.sources(), strict=True))
    description = DataDescription(
        data.class_names,
        tuple(task.classes for task in scenario.tasks),
        tuple(task.name for task in scenario.tasks),
        tuple(len(task.train) for task in scenario.tasks),
        tuple(len(task.test) for task in scenario.tasks),
        tuple(fingerprint(*both) for both in sources),
    )
    if learned is None:
        return description
    gone = [not len(task.train) for task in scenario.tasks]
    return replace(
        description,
        train_images=_keep(description.train_images, learned.train_images, gone),
        test_images=_keep(description.test_images, learned.test_images, [task.is_missing for task in scenario.tasks]),
        fingerprints=_keep(description.fingerprints, learned.fingerprints, [not len(train) for train, _ in sources]),
    )


def _keep(current: tuple[T, ...], learned: tuple[T, ...], missing: Sequence[bool]) -> tuple[T, ...]:
    """Return `current` with the values of `learned` where they are missing."""
    return tuple(learned[i] if lost else value for i, (value, lost) in enumerate(zip(current, missing, strict=True)))


def training_batches(config: Config, task: Task, world_size: int) -> list[list[SampleKey]]:
    """Return the batches of all epochs of a task.

    Each epoch has a new order, drawn from the seed, the task and the epoch; or the order in which the data list the
    images. If the last batch of an epoch has fewer images than there are processes, it is filled up with the first
    images, again and again.
    """
    plan = []
    for epoch in range(config.num_passes):
        order = task.train
        if config.order == "shuffled":
            generator = make_generator(config.seed, "order", task.index, epoch)
            order = order[torch.randperm(len(order), generator=generator)]
        keys = sequential_batches(order, config.batch_size, epoch)
        missing = max(0, world_size - len(keys[-1]))
        keys[-1] += [SampleKey(image, epoch) for image in itertools.islice(itertools.cycle(order.tolist()), missing)]
        plan += keys
    return plan


def fingerprint(*splits: Split) -> str:
    """Return the digests of labels, domains and file names of each split, one after the other."""
    digests = []
    for split in splits:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(split.labels.numpy().tobytes())
        if split.domains is not None:
            digest.update(split.domains.numpy().tobytes())
        for name in split.names():
            digest.update(normalized(name).encode() + b"\0")
        digests.append(digest.hexdigest())
    return "".join(digests)


def _by_class(config: Config, data: Dataset) -> Scenario:
    labels, names = (data.train.labels, data.test.labels), data.class_names
    groups, source = _named_tasks(config, data, names)
    order = config.class_order or (None if config.task_file else _file_beside(data, CLASS_ORDER_FILE))
    if groups and order:
        raise ValueError(f"{source} and {order} both decide the order of classes: leave one")
    if (decider := source if groups else order) and config.shuffle:
        raise ValueError(f"{decider} decides the order of classes, and so does shuffle: leave one")
    if groups and config.increment:
        raise ValueError(f"{source} says what the tasks are, and so does increment {config.increment}: leave one")
    if groups:
        _check_count(config, len(groups), source)
        return split_by_group(*labels, groups)
    if config.class_order_seed is not None:
        wanted = published_class_order(len(names), config.class_order_seed)
    elif order:
        wanted = _read_order(order, names)
    else:
        wanted = class_order(len(names), config.seed if config.shuffle else None)
    if config.increment:
        return split_by_increment(*labels, config.first_task or config.increment, config.increment, wanted)
    return split_by_class(*labels, config.tasks or max(1, min(DEFAULT_TASKS, len(names) // 2)), wanted)


def published_class_order(classes: int, seed: int) -> list[int]:
    """Return the labels 0 to classes - 1 in the order of PyCIL and many papers, for a seed such as 1993.

    >>> published_class_order(100, 1993)[:8]
    [68, 56, 78, 8, 23, 84, 90, 65]
    """
    order: list[int] = np.random.RandomState(seed).permutation(classes).tolist()
    return order


def _by_domain(config: Config, data: Dataset) -> Scenario:
    train, test, domains = data.train.domains, data.test.domains, data.domains
    if train is None or test is None:
        raise ValueError("expected data with domains for --setting dil: folders DOMAIN/CLASS, a table with a column"
                         " domain or task in every row, or a Hugging Face data set with --dataset.domain")  # fmt: skip
    groups: Groups
    if file := config.task_file or _file_beside(data, TASKS_FILE):
        groups = _group_by_task(_read_tasks(file), domains, f"{file}", "domain")
        if config.shuffle:
            raise ValueError(f"{file} decides the order of domains, and so does shuffle: leave one")
    else:
        order = class_order(len(domains), config.seed if config.shuffle else None)
        groups = [(domains[number], [number]) for number in order]
    _check_count(config, len(groups), str(file or "dil with its domains"))
    return split_by_domain(data.train.labels, train, test, groups)


def _named_tasks(config: Config, data: Dataset, names: Sequence[str]) -> tuple[Groups, str]:
    """Return the tasks that a file or the data name, and which of them does; no tasks if neither does."""
    if config.class_order:
        return [], ""
    file = config.task_file or _file_beside(data, TASKS_FILE)
    if file and data.tasks and not config.task_file:
        raise ValueError(f"{file} and the data's own column of tasks both make tasks: leave one")
    if file:
        return _group_by_task(_read_tasks(file), names, str(file), "class"), str(file)
    source = "the data's column of tasks"
    return _group_by_task(data.tasks, names, source, "class") if data.tasks else [], source


def _file_beside(data: Dataset, name: str) -> Path | None:
    file = data.folder / name if data.folder else None
    return file if file and os.path.lexists(file) else None


def _check_count(config: Config, count: int, source: str) -> None:
    if config.tasks not in (None, count):
        raise ValueError(f"expected {count} tasks, as {source} has it, got tasks {config.tasks}: leave --tasks out, or"
                         " use --tasks None; a run that is resumed needs the file with which it began")  # fmt: skip


def _read_order(file: Path, names: Sequence[str]) -> list[int]:
    """Return the labels in the order in which the lines of `file` name their classes."""
    lines = [normalized(line) for line in lines_of(read_text(file)) if line.strip()]
    words = [line if line in names else line.strip() for line in lines]
    return _require_each_once(words, names, str(file), "class")


def _read_tasks(file: Path) -> list[tuple[str, list[str]]]:
    """Return the name and the members of each task in `file`."""
    try:
        pairs = json.loads(read_text(file), object_pairs_hook=list)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected JSON in {file}: {error}") from error
    form = 'an object of task names with a list of names each, such as {"birds": ["crow", "owl"], "fish": ["eel"]}'
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError(f"expected {form}, got another value in {file}")
    for name, members in pairs:
        if not (isinstance(members, list) and members and all(isinstance(member, str) for member in members)):
            raise ValueError(f"expected {form}, got {name!r} with {members!r:.80} in {file}")
    pairs = [(normalized(name), [normalized(member) for member in members]) for name, members in pairs]
    tasks = [name for name, _ in pairs]
    if twice := sorted({name for name in tasks if tasks.count(name) > 1}):
        raise ValueError(f"expected every task once in {file}, got {twice} again")
    return pairs


def _group_by_task(tasks: Sequence[tuple[str, Sequence[str]]], names: Sequence[str], source: str, kind: str) -> Groups:
    """Return the tasks with the numbers of their members. Each member has to belong to one task."""
    numbers = iter(_require_each_once([member for _, members in tasks for member in members], names, source, kind))
    return [(name, [next(numbers) for _ in members]) for name, members in tasks]


def _require_each_once(words: Sequence[str], names: Sequence[str], source: str, kind: str) -> list[int]:
    """Return the index in `names` of each word.

    Raises:
        ValueError: Unless the words are the names, each once.
    """
    indices = [_class_index(word, names, source, kind) for word in words]
    if twice := [name for name in names if words.count(name) > 1]:
        more = "; where tasks share their classes, use --setting dil" if kind == "class" else ""
        raise ValueError(f"expected every {kind} once in {source}, got {twice[:5]} again{more}")
    if missing := [name for name in names if name not in words]:
        raise ValueError(f"expected every {kind} in {source}, got none of {missing[:5]}, {len(missing)} in all")
    return indices


def _class_index(word: str, names: Sequence[str], source: str, kind: str) -> int:
    """Return the index of `word` in `names`.

    Raises:
        ValueError: If it is not among them.
    """
    if word not in names:
        near = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
        hint = f"perhaps you meant {near[0]!r}" if near else f"there are {list(names[:5])}"
        raise ValueError(f"unknown {kind} {word!r} in {source}: {hint}")
    return names.index(word)
