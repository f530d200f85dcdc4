"""What each command of the command line takes: fields are flags, docstrings are their help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgp import recipes
from pgp.analysis.audit import BATCHES
from pgp.baselines import BASELINES
from pgp.config import Config, Hardware

Choice = tyro.conf.arg
"""Short for an argument whose name is not that of its field."""


@dataclass(frozen=True)
class TrainCommand:
    """Learn a stream of tasks, and leave everything in a run folder."""

    config: Annotated[Config, Choice(name="")]
    output: Path | None = None
    """Run folder, new or empty; a free one below runs/, where not given."""
    pgp: bool = True
    """Project; --no-pgp trains the base method."""
    data: str | None = None
    """Your own images: a folder, a table of them (CSV, TSV, JSONL), or hf: and the name or path of a Hugging Face data
    set. Their tasks are those that lie beside them, or --tasks, not the recipe's."""
    twin: bool = False
    """Train the unprojected twin too, all else the same, and report both."""
    baselines: bool = False
    """Train what the recipe is to be compared with, too, under the same budget, and report all: its prompts without
    projection, with a random one, slower, and frozen after the first task; a linear head and the nearest class mean on
    frozen features; and all tasks at once."""
    method_name: Annotated[
        Literal[tuple(recipes.METHODS | BASELINES)] | None,  # type: ignore[valid-type]
        Choice(name="method"),
    ] = None
    """Another method than the recipe's, from its defaults; or a baseline of the recipe's own."""
    projection_name: Annotated[Literal[tuple(recipes.PROJECTIONS)] | None, Choice(name="projection")] = None  # type: ignore[valid-type]
    """Another projection than the recipe's, from its defaults."""
    dataset_name: Annotated[Literal[tuple(recipes.DATASETS)] | None, Choice(name="dataset")] = None  # type: ignore[valid-type]
    """Another data set than the recipe's."""
    backbone_name: Annotated[Literal[tuple(recipes.BACKBONES)] | None, Choice(name="backbone")] = None  # type: ignore[valid-type]
    """Another encoder than the recipe's."""
    readout_names: Annotated[tuple[Literal[tuple(recipes.READOUTS)], ...] | None, Choice(name="readouts")] = None  # type: ignore[valid-type]
    """Other readouts than the recipe's; the first is the headline."""


@dataclass(frozen=True)
class ResumeCommand:
    """Go on with a run from its latest checkpoint. Only where it computes can change, and what a bad image means."""

    resume: Path
    """Run folder."""
    hardware: Annotated[Hardware, Choice(name="")]
    add: str | None = None
    """Data to learn as one more task of a finished run: a folder, a table or hf:NAME, as for --data. The run stays as
    it is until the task is finished."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where the data of the run lie now, if they have moved: they must be the same, and the run records the place. For
    a run that learned more by --add, give it once for each data set, in their order."""
    drop: bool = False
    """Drop the steps of an unfinished task, and go on from the latest finished one."""
    on_bad_image: Literal["error", "skip"] | None = None
    """Stop at an image that cannot be read, or go on without it; as the run began, where not given."""


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a run's latest checkpoint again, on all tasks it has learned."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    legacy_eval: bool = False
    """Show the published protocol too (see pgp train --help)."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where the data of the run lie now, if they have moved: they must be the same, and the run records the place. For
    a run that learned more by --add, give it once for each data set, in their order."""
    every_task: bool = False
    """Evaluate the checkpoint of each task, not of the latest only: the whole accuracy matrix."""
    batch_size: int | None = None
    """Test images at once, as in the run where not given; it changes nothing but the legacy columns."""


@dataclass(frozen=True)
class AuditCommand:
    """Measure a run's latest checkpoint by the honest protocol and by those that leak the task of a test image."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where the data of the run lie now, if they have moved: they must be the same, and the run records the place. For
    a run that learned more by --add, give it once for each data set, in their order."""
    batch_sizes: tuple[int, ...] = BATCHES
    """Test images at once that vote for their prompts."""
    oracle: bool = False
    """Also say what readouts from statistics would read if none were stale; this looks at all old training images."""


@dataclass(frozen=True)
class PredictCommand:
    """Name what is on images, by all that a run has learned so far."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, and folders of images at any depth."""
    top: int = 1
    """How many classes to name, the likeliest first."""
    json: bool = False
    """One JSON object a line instead of text."""
    readout: str | None = None
    """One of the run's readouts; its first, where not given."""
    batch_size: int = 32
    """Images at once; it changes no answer."""


@dataclass(frozen=True)
class ReportCommand:
    """Tables and figures over runs; runs that differ in their seed only are one line."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    output: Path | None = None
    """Folder for report.md, report.png and drift.png; the run's own where there is a single run, else the working
    folder."""


@dataclass(frozen=True)
class SweepCommand:
    """Run a recipe at every point of a grid and, under the same budget and seeds, its controls; ends in a table of
    paired differences, sweep.md, and a figure of accuracy against forgetting, sweep.png. The same call again goes on
    where the last one stopped; more seeds or values let the sweep grow. All settings of pgp train RECIPE can be given,
    too, for every run alike; there, --num-workers sets what loads images.
    """

    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH=VALUE,VALUE: a setting as pgp train RECIPE --help spells it, such as projection.energy=.9,.99 or
    projection=orthogonal,released. Given several times, every choice is run."""
    seeds: str = "5"
    """How many, from 0; or a list, such as 3,7,11."""
    output: Path | None = None
    """Folder of the sweep; sweeps/RECIPE where not given."""
    controls: bool = True
    """Run what each point is to be compared with, too: its prompts without projection, with a random one, slower, and
    frozen; linear and nearest class mean on frozen features; all tasks at once."""
    workers: int | None = None
    """Runs at once: processes that share the cores of this machine. One per GPU where there are any, else one per core,
    where not given."""
    ray: str | None = None
    """Address of a Ray cluster, to spread the runs over; auto finds a running one, local starts one here. Its machines
    need pgp, the data and --output at the same paths: a file system that they share, and that can lock files."""
