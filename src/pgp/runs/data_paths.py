"""Paths of a run's data, and how to replace them if the data were moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from pgp.config import Config, Hardware, flatten
from pgp.datasets.base import DatasetConfig
from pgp.datasets.manifest import Manifest
from pgp.datasets.own import relocate
from pgp.runs.run import Run
from pgp.system.paths import StrPath


def resolve_paths(config: Config) -> Config:
    """Return `config` as a run records it: with absolute paths, and with domains if the setting needs them."""
    dataset = config.dataset.with_domains() if config.setting == "dil" else config.dataset
    files = {name: getattr(config, name) for name in FILES}
    if config.class_order_seed is not None:
        del files["class_order"]  # it is a name, not a path
    paths = {name: file.expanduser().absolute() for name, file in files.items() if file is not None}
    added = tuple(more.with_absolute_paths() for more in config.added)
    return replace(
        config,
        dataset=dataset.with_absolute_paths(),
        backbone=config.backbone.with_absolute_paths(),
        added=added,
        **paths,
    )


def portable(config: Config) -> Config:
    """Return `config` for other machines: without paths and data of this one, and with the default hardware.

    Drift is not measured any more, since its references are features of single images.

    Raises:
        ValueError: If the encoder, or a component that is not pgp's own, needs a file that only this machine has.
    """
    if files := config.backbone.local_files:
        raise ValueError(f"expected an encoder that others can load, got weights from the file {files[0]}: train with"
                         " published weights, which --backbone names")  # fmt: skip
    moved = replace(
        config,
        dataset=config.dataset.without_paths(),
        added=tuple(more.without_paths() for more in config.added),
        hardware=Hardware(),
        class_order=None if config.class_order_seed is None else config.class_order,
        task_file=None,
        drift_images=0,
    )
    texts = {name: value for name, value in flatten(moved.to_json()).items() if isinstance(value, str)}
    for name, value in texts.items():
        if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute():
            raise ValueError(f"expected settings without paths, got {value!r:.80} as {name}: others have no such file")
    return moved


FILES = ("class_order", "task_file")
"""Settings that are paths of files, which may be beside the data."""


def with_data_paths(config: Config, paths: Sequence[StrPath]) -> Config:
    """Return the configuration of a run with new paths for its data, and for the files beside them.

    Args:
        config: The configuration that the run records.
        paths: New paths of its data sets, in order: the first one, then each that was added. Data sets without a new
            path keep the old one.

    Raises:
        ValueError: If there are more paths than data sets.
    """
    datasets = (config.dataset, *config.added)
    if len(paths) > len(datasets):
        raise ValueError(f"expected at most {len(datasets)} paths with --data, one for each data set of the run in"
                         f" their order, got {len(paths)}")  # fmt: skip
    dataset, *added = (*map(relocate, datasets, paths), *datasets[len(paths) :])
    old, new = _data_folder(config.dataset), _data_folder(dataset)
    files = {name: file for name in FILES if (file := getattr(config, name))}
    moved = {name: new / file.relative_to(old) for name, file in files.items() if old and new and old in file.parents}
    return resolve_paths(replace(config, dataset=dataset, added=tuple(added), **moved))


def _data_folder(dataset: DatasetConfig) -> Path | None:
    """Return the folder that has the data, or the table of them; None for data that need no files."""
    path = next(iter(dataset.search_paths), None)
    return path.parent if path and isinstance(dataset, Manifest) else path


def record_data_paths(run: Run, config: Config) -> None:
    """Record the data paths of `config` if they have changed. The process must have locked `run` for writing."""

    def change(recorded: Config) -> Config:
        files = {name: getattr(config, name) for name in FILES}
        return replace(recorded, dataset=config.dataset, added=config.added[: len(recorded.added)], **files)

    recorded = [run.config_of(run.describe(name)) for name in (run.checkpoints.latest(), None)]
    if any(change(one) != one for one in recorded):
        run.change_config(change)
