"""Arguments of each command: fields are flags, and their docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgp import recipes
from pgp.analysis.audit import BATCHES
from pgp.baselines import BASELINES
from pgp.config import Config, Hardware
from pgp.training.trackers import TrackerName

Choice = tyro.conf.arg
"""Annotation of an argument whose name differs from its field."""


@dataclass(frozen=True)
class TrainCommand:
    """Learn a sequence of tasks, and write all results to a run folder."""

    config: Annotated[Config, Choice(name="")]
    output: Path | None = None
    """Run folder, new or empty. If not given, a new folder below runs/."""
    pgp: bool = True
    """Train with the projection of the recipe. --no-pgp is short for --projection none."""
    data: str | None = None
    """Your own images: a folder, a table (CSV, TSV, JSONL), or hf:NAME for a Hugging Face data set (a name or path).
    The tasks are then those of the data (such as tasks.json next to them) or of --tasks, not those of the recipe."""
    twin: bool = False
    """Also train the same run without projection, and report both."""
    baselines: bool = False
    """Also train all baselines with the same budget, and report all: without projection; with a random projection; with
    a tenth of the prompt learning rate after the first task; with prompts frozen after the first task; a linear head
    and the nearest class mean on frozen features; joint training on all tasks."""
    tracker: tuple[TrackerName, ...] = ()
    """Experiment trackers to which the run is reported, too. Each must be installed. tensorboard writes event files
    into the run folder, wandb and mlflow report to where their environment variables say, trackio to its local
    database."""
    method_name: Annotated[
        Literal[tuple(recipes.METHODS | BASELINES)] | None,  # type: ignore[valid-type]
        Choice(name="method"),
    ] = None
    """Replace the method of the recipe, with default settings; or train one baseline of the recipe."""
    projection_name: Annotated[Literal[tuple(recipes.PROJECTIONS)] | None, Choice(name="projection")] = None  # type: ignore[valid-type]
    """Replace the projection of the recipe, with default settings."""
    dataset_name: Annotated[Literal[tuple(recipes.DATASETS)] | None, Choice(name="dataset")] = None  # type: ignore[valid-type]
    """Replace the data set of the recipe."""
    backbone_name: Annotated[Literal[tuple(recipes.BACKBONES)] | None, Choice(name="backbone")] = None  # type: ignore[valid-type]
    """Replace the encoder of the recipe."""
    readout_names: Annotated[tuple[Literal[tuple(recipes.READOUTS)], ...] | None, Choice(name="readouts")] = None  # type: ignore[valid-type]
    """Replace the readouts of the recipe: the classifiers of features. The first one is the default of pgp predict, and
    comes first in tables and figures."""


@dataclass(frozen=True, kw_only=True)
class MovedData:
    """The flag of each command that reads the data of a run."""

    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """New path of the run's data, if they were moved. They must be the same data; the run records the path. For a run
    with added data, repeat the flag: once for each data set, in the order in which they were learned."""


@dataclass(frozen=True)
class ResumeCommand(MovedData):
    """Resume a run from its latest checkpoint. Only hardware settings and the handling of bad images can change."""

    resume: Path
    """Run folder."""
    hardware: Annotated[Hardware, Choice(name="")]
    add: str | None = None
    """Images to learn as one more task of a finished run: a folder, a table or hf:NAME. The old images are not needed;
    accuracy on old test images that are missing is not measured. Until the task is finished, the run predicts as
    before. pgp add RUN DATA is short for pgp train --resume RUN --add DATA."""
    drop: bool = False
    """Discard an unfinished task, and resume from the latest finished one."""
    on_bad_image: Literal["error", "skip"] | None = None
    """How to handle an unreadable image: stop with an error, or skip it. If not given, as in the run."""
    tracker: tuple[TrackerName, ...] = ()
    """Experiment trackers to which the run is reported, too: tensorboard, wandb, mlflow or trackio."""


@dataclass(frozen=True)
class EvalCommand(MovedData):
    """Evaluate a run's latest checkpoint again, on all tasks it has learned."""

    run: tyro.conf.Positional[Annotated[Path, Choice(metavar="RUN")]]
    """Run folder."""
    legacy_eval: bool = False
    """Also report the published protocol (see pgp train RECIPE --help)."""
    every_task: bool = False
    """Evaluate the checkpoints of all tasks, not only the latest, for the full accuracy matrix."""
    batch_size: int | None = None
    """Images per batch. If not given, as in the run. It changes only the legacy columns."""


@dataclass(frozen=True)
class AuditCommand(MovedData):
    """Compare the accuracy of a run's latest checkpoint with and without task information at test."""

    run: tyro.conf.Positional[Annotated[Path, Choice(metavar="RUN")]]
    """Run folder."""
    batch_sizes: tuple[int, ...] = BATCHES
    """Numbers of images that select prompts by a common vote, for methods that select prompts."""
    oracle: bool = False
    """Also report the accuracy of readouts that are fitted again to fresh class statistics, which have no drift. This
    needs all old training images."""


UNKNOWN_REJECTS = 0.05
"""Fraction of images of learned classes that `pgp predict --unknown` may call unknown."""


@dataclass(frozen=True)
class PredictCommand:
    """Classify images among all classes that a run has learned so far."""

    run: tyro.conf.Positional[Annotated[Path, Choice(metavar="RUN")]]
    """Run folder."""
    images: tyro.conf.Positional[Annotated[tuple[Path, ...], Choice(metavar="IMAGE ...")]]
    """Image files, and folders that are searched for images at any depth."""
    top: int = 1
    """Number of classes to print, the most probable first."""
    unknown: bool = False
    """Print `unknown` before the classes of an image that is unlike every learned class. The threshold is set on
    held-out training images, such that 5 % of the images of learned classes are called unknown, too."""
    json: bool = False
    """Print one JSON object per line instead of text."""
    readout: str | None = None
    """Name of one of the run's readouts. If not given, the first."""
    batch_size: int = 32
    """Images per batch. It changes no prediction."""


@dataclass(frozen=True)
class ExportCommand:
    """Write the latest finished task of a run as an ONNX model, and as a program of torch.export.

    OUT gets model.onnx, model.pt2 and preprocessing.json. Both models turn images into probabilities of the classes
    learned so far. It needs pip install 'prompt-gradient-projection[export]'.
    """

    run: tyro.conf.Positional[Annotated[Path, Choice(metavar="RUN")]]
    """Run folder."""
    output: tyro.conf.Positional[Annotated[Path, Choice(metavar="OUT")]]
    """Folder to write, new or empty."""
    readout: str | None = None
    """Name of one of the run's readouts. If not given, the first."""
    preprocess: bool = False
    """Include resize, crop and normalisation in the models, whose input is then uint8 images of any size. If not, the
    program that uses a model must preprocess images as preprocessing.json says."""


@dataclass(frozen=True)
class UndoCommand:
    """Forget the classes that were added to a run last. The run is again as it was before; its log keeps both."""

    run: tyro.conf.Positional[Annotated[Path, Choice(metavar="RUN")]]
    """Run folder."""


@dataclass(frozen=True)
class ServeCommand:
    """Serve a finished run to browsers and programs: a page, and POST /predict, /teach and /undo.

    A new checkpoint of the run is used as soon as it is written. Classes are taught from uploaded photos, which are
    kept in the folder `taught` of the run. It needs pip install 'prompt-gradient-projection[serve]'.
    """

    run: tyro.conf.Positional[Annotated[Path, Choice(metavar="RUN")]]
    """Run folder."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen at. Other machines reach 0.0.0.0, for example; then the environment variable PGP_TOKEN must
    hold a token, which requests carry as Authorization: Bearer TOKEN."""
    readout: str | None = None
    """Name of one of the run's readouts. If not given, the first."""
    device: str | None = None
    """Device such as cpu or cuda:1. If not given, a GPU if there is one, else the CPU."""
    batch_size: int = 32
    """Number of images that the encoder takes at a time, if so many wait."""
    max_files: int = 64
    """Number of images of a request to /predict."""
    max_megabytes: float = 256
    """Size of a request."""
    max_megapixels: float = 50
    """Size of an image."""
    timeout: float = 60
    """Seconds for a request to arrive, and for its images to be classified."""


@dataclass(frozen=True)
class PushCommand:
    """Publish a finished run on the Hugging Face hub: what predicts and learns on, and a model card.

    Names of classes and tasks, numbers of images and statistics of classes are published; images and paths never are.
    A repository that does not exist is created, private unless --public is given.
    """

    run: tyro.conf.Positional[Annotated[Path, Choice(metavar="RUN")]]
    """Run folder."""
    repository: tyro.conf.Positional[Annotated[str, Choice(metavar="OWNER/NAME")]]
    """Repository of models on the hub."""
    public: bool = False
    """Let everybody see the repository. If not given, only its owner may."""
    license: str | None = None
    """Licence of the model for its card, as the hub spells it, such as apache-2.0 or cc-by-4.0."""
    replace: bool = False
    """Push although the repository holds other files than those of this run. Its history keeps them."""


@dataclass(frozen=True)
class PullCommand:
    """Download a run that pgp push published, to a run folder for pgp predict, pgp export and pgp add."""

    repository: tyro.conf.Positional[Annotated[str, Choice(metavar="OWNER/NAME")]]
    """Repository of models on the hub."""
    output: Path | None = None
    """Run folder, new or empty. If not given, runs/NAME."""
    revision: str | None = None
    """Hash of a commit, branch or tag of the repository. If not given, the newest commit of the main branch."""


@dataclass(frozen=True)
class ReportCommand:
    """Write tables and figures for runs. Runs that differ only in their seed share one row."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], Choice(metavar="RUN ...")]]
    """Run folders."""
    output: Path | None = None
    """Folder for report.md, report.png, calibration.png and drift.png. If not given, the folder of a single run, else
    a new folder in runs/."""
    html: bool = False
    """Also write report.html, one file with everything: accuracy, forgetting, confusion between tasks and classes with
    pictures, calibration, drift, prompts, cost and settings. It loads nothing from elsewhere."""


@dataclass(frozen=True)
class SweepCommand:
    """Run every combination of values, and the baselines of each with the same budget and seeds.

    The sweep writes a table of paired differences, sweep.md, and a figure of accuracy against forgetting, sweep.png.
    Repeat the same call to resume a sweep; add seeds or values to extend it. All flags of pgp train RECIPE can be
    given, and hold for every run. Only --workers has another meaning here: --num-workers is for processes that load
    images.
    """

    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH=VALUE,VALUE: a flag of pgp train RECIPE without its dashes, and its values, such as
    projection.energy=.9,.99 or projection=orthogonal,released. If given several times, every combination is run."""
    seeds: str = "5"
    """Number of seeds, counted from 0; or a list, such as 3,7,11."""
    output: Path | None = None
    """Folder of the sweep. If not given, sweeps/RECIPE."""
    baselines: bool = True
    """Also run all baselines of each combination: without projection; with a random projection; with a tenth of the
    prompt learning rate after the first task; with prompts frozen after the first task; a linear head and the nearest
    class mean on frozen features; joint training on all tasks."""
    workers: int | None = None
    """Number of runs at a time on this machine. If not given, one per GPU, or one per core if there is no GPU."""
    ray: str | None = None
    """Address of a Ray cluster to run on: auto finds a running cluster, local starts one on this machine. Its machines
    need pgp, the data and --output at the same paths, on a shared file system with file locks."""
