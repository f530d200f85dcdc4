"""The command line: parse, call one function, print."""

from __future__ import annotations

import functools
import importlib
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pgp import __version__, distributed, hub, recipes, train
from pgp.analysis import audit, checkpoints
from pgp.baselines import matching_baselines, unprojected
from pgp.cli import catalogue, parse, published, show
from pgp.cli.commands import (
    UNKNOWN_REJECTS,
    AuditCommand,
    EvalCommand,
    ExportCommand,
    PredictCommand,
    PullCommand,
    PushCommand,
    ReportCommand,
    ResumeCommand,
    ServeCommand,
    SweepCommand,
    TrainCommand,
    UndoCommand,
)
from pgp.cli.exits import exit_status
from pgp.config import Config, Hardware
from pgp.datasets.base import BadImageError
from pgp.datasets.check import check_images
from pgp.datasets.ignored import Ignored
from pgp.datasets.own import dataset_from_path
from pgp.distributed import rank
from pgp.export import export
from pgp.predict import Predictor, images_in
from pgp.progress import track
from pgp.reports import html as page
from pgp.runs.data_paths import resolve_paths, with_data_paths
from pgp.runs.run import CONFIG, Run
from pgp.sweeps import pool, sweep
from pgp.system import platforms, storage
from pgp.system.outputs import check_outside, is_empty, make_output, make_unique_folder, require_own
from pgp.system.signals import Interrupted, describe
from pgp.system.storage import RunError
from pgp.training.tasks import build_scenario

USAGE = """\
usage: pgp COMMAND ...

  train RECIPE [flags]    learn a sequence of tasks; --help lists all flags
  train --resume RUN      resume a run that stopped
  add RUN DATA            train a finished run on new classes, without the old
                          images
  undo RUN                forget the classes that were added last
  eval RUN                evaluate a run's latest checkpoint again
  audit RUN               compare accuracy with and without the task of the
                          test images
  predict RUN IMAGE ...   classify images, and all images in folders
  export RUN OUT          write an ONNX model
  serve RUN               serve a web page and an HTTP interface
  push RUN OWNER/NAME     publish a finished run on the Hugging Face hub
  pull OWNER/NAME         download a published run to a run folder
  report RUN ...          write tables and figures over runs and seeds
  sweep RECIPE --over ... run a grid of configurations and their baselines
  list                    list recipes, data sets, scenarios and components
  data get RECIPE         download the data of a recipe
  data check RECIPE       verify every image before training

Results go to standard output; progress and notes go to standard error.
Exit status: 0 success; 2 an error that you can fix; 70 a bug in pgp;
130 Ctrl-C; 143 SIGTERM; 129 SIGHUP; 141 the output pipe was closed.
PGP_DEBUG=1 shows the traceback of an error. PGP_IMPORT=MODULE,... imports
modules of your own, with methods, data sets and recipes."""


PUBLISHED_USAGE = """\
usage: python main.py RECIPE [--model NAME] [--output_dir DIR] [--data-path DIR] [--epochs N] [--seed N] [--no_pgp] ...
       python main.py RECIPE --eval

This is the command line of the published code. It accepts the flags of the published commands, and all flags of pgp
train. python main.py RECIPE --help lists them."""


HELP = {"-h", "--help"}
PUBLISHED_OUTPUT = Path("output")
"""Default output folder of the published command line."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. If it fails, end the process with the exit status that `USAGE` states."""
    exit_status(functools.partial(_run, list(sys.argv[1:] if argv is None else argv)))


def published_main(argv: Sequence[str] | None = None) -> None:
    """Run `python main.py RECIPE ...`, with the flags, the folder and the file names of the published code."""
    exit_status(functools.partial(_run_published, list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> None:
    parse.refuse_empty(words)
    import_own_modules(os.environ.get("PGP_IMPORT", ""))
    bare = words[0] in ("list", "data") and len(words) < 4 if words else True  # these commands have no flags
    if not words or words[0] in HELP or (bare and words[-1] in HELP):
        show.show_lines(*USAGE.splitlines())
    elif words[0] == "--version":
        show.show_lines(f"pgp {__version__}")
    else:
        recipes.lookup(COMMANDS, words[0], "command", "pgp --help")(words[1:])


def _run_published(words: list[str]) -> None:
    parse.refuse_empty(words)
    import_own_modules(os.environ.get("PGP_IMPORT", ""))
    if not words or words[0] in HELP:
        show.show_lines(*PUBLISHED_USAGE.splitlines())
    elif any(word.partition("=")[0] == "--resume" for word in words):
        train_command(words)
    elif "--eval" in words:
        _published_eval([word for word in words if word != "--eval"])
    else:
        _published_train(words)


def import_own_modules(names: str) -> None:
    """Import the user's modules, which define components and recipes, from the module path or the current folder.

    Args:
        names: Names of the modules, with commas between them.

    Raises:
        ValueError: If one of them cannot be imported.
    """
    for name in filter(None, map(str.strip, names.split(","))):
        folder = str(Path.cwd())
        if folder not in sys.path:
            sys.path.append(folder)  # last, so that no file in it hides a module of Python
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(f"expected in PGP_IMPORT the names of modules, such as my_methods for ./my_methods.py, got"
                             f" {name}: {type(error).__name__}: {error}") from error  # fmt: skip


def train_command(words: list[str]) -> None:
    """Run `pgp train`."""
    if any(word == "--resume" or word.startswith("--resume=") for word in words):
        asked = not HELP.isdisjoint(words)
        parse.check_resumable(words)
        default = ResumeCommand(Path("RUN"), hardware=Hardware()) if asked else parse.resume_defaults(words)
        chosen = parse.parse(ResumeCommand, ["--help"] if asked else words, "pgp train --resume", default=default)
        with show.progress() as bars:
            more = dataset_from_path(chosen.add) if chosen.add else None
            run = train.resume(
                chosen.resume,
                chosen.hardware,
                bars,
                more,
                chosen.on_bad_image,
                drop=chosen.drop,
                data=chosen.data,
                trackers=chosen.tracker,
            )
        show.show_report([run])
    elif words and words[0] in HELP:
        show.show_lines(*USAGE.splitlines())
    else:
        command = _train_command(words, "pgp train")
        show.show_report(_trained(command), command.output)


def add_command(words: list[str]) -> None:
    """Run `pgp add RUN DATA`."""
    if not HELP.isdisjoint(words):
        about = (
            "Train a finished run on new classes, as one more task, without the old images. RUN is the run folder, and"
            " DATA a folder of images, a table or hf:NAME. Short for pgp train --resume RUN --add DATA, with its flags:"
        )
        default = ResumeCommand(Path("RUN"), hardware=Hardware())
        parse.parse(ResumeCommand, ["--help"], "pgp add RUN DATA", default=default, description=about)
    if len(words) < 2 or any(word.startswith("-") for word in words[:2]):
        raise ValueError("expected a run folder and new images, as in pgp add runs/quick-seed42 new-photos, got"
                         f" {' '.join(words) or 'neither'}")  # fmt: skip
    train_command(["--resume", words[0], "--add", words[1], *words[2:]])


def _train_command(words: list[str], program: str) -> TrainCommand:
    """Parse as `parse.train_command`, and print a note if a published flag is ambiguous."""
    command = parse.train_command(words, program)
    if note := published.explain_model_flag(words[1:], command.config):
        show.print_note(note)
    return command


def _trained(command: TrainCommand) -> list[Run]:
    """Train the run of a command, and the same run without projection or its baselines; return all runs."""
    own = command.config if command.pgp else unprojected(command.config)
    configs = {own.projection.tag: own}  # by the folder's name, if there are several
    if command.twin:
        configs["none"] = unprojected(own)
    if command.baselines:
        configs |= matching_baselines(own)
    own.dataset.fetch()  # fetch() draws its own progress bars
    if command.output and len(configs) > 1:
        if storage.exists(command.output / CONFIG):
            raise RunError(f"expected a folder for several runs, got the run {command.output}: name another --output")
        if storage.exists(command.output) and not (command.output.is_dir() and is_empty(command.output)):
            raise RunError(f"expected a new or empty folder for several runs, got {command.output}: name another"
                           " --output")  # fmt: skip
        make_output(command.output)
    runs = []
    with show.progress() as bars:
        for name, config in configs.items():
            output = command.output / name if command.output and len(configs) > 1 else command.output
            runs.append(train.train(config, output, bars, command.tracker))
            if rank() == 0 and len(configs) > 1:  # a single run is drawn with its table
                show.draw([runs[-1]], runs[-1].folder)
    return runs


def _published_train(words: list[str]) -> None:
    """Train as `python main.py RECIPE ...` in `--output_dir`, or in the next free folder beside it."""
    command = _train_command(words, "python main.py")
    folder = (command.output or PUBLISHED_OUTPUT).absolute()
    own = command.config if command.pgp else unprojected(command.config)
    try:
        if not distributed.is_child_process(own.hardware.devices):
            Run.require_empty(folder, resolve_paths(own))
    except RunError:
        folder = make_unique_folder(folder.parent, folder.name)
        show.print_note(f"the output folder is not empty: this run goes to {folder.name}")
    command = replace(command, output=folder)
    try:
        show.show_report(_trained(command), folder)
    except BaseException:
        try:
            _export_checkpoints(folder)
        except RunError as error:  # the first error tells more
            show.print_note(str(error))
        raise
    _export_checkpoints(folder)


def _export_checkpoints(folder: Path) -> None:
    """Write the published checkpoints of the runs in `folder`."""
    for path in (folder, *folder.glob("*/")):
        if rank() == 0 and (path / "config.json").is_file():
            published.export_checkpoints(Run.open(path))


def _published_eval(words: list[str]) -> None:
    """Evaluate the newest run of the recipe in `--output_dir` after each of its tasks."""
    command = _train_command(words, "python main.py")
    asked = command.config if command.pgp else unprojected(command.config)
    run, config = published.find_latest_run(asked, words[1:], (command.output or PUBLISHED_OUTPUT).absolute())
    with show.progress() as bars:
        matrices = checkpoints.evaluate_checkpoints(run, config, bars, every_task=True)
    show.show_evaluation(run, matrices)


def eval_command(words: list[str]) -> None:
    """Run `pgp eval RUN`."""
    command = parse.parse(EvalCommand, words, "pgp eval")
    run = Run.open(command.run)
    hardware = replace(run.config.hardware, accelerator="auto", devices=1)
    size = run.config.eval_batch_size if command.batch_size is None else command.batch_size
    config = replace(
        with_data_paths(run.config, command.data),
        hardware=hardware,
        legacy_eval=command.legacy_eval,
        eval_batch_size=size,
    )
    with show.progress() as bars:
        matrices = checkpoints.evaluate_checkpoints(run, config, bars, every_task=command.every_task)
    show.show_evaluation(run, matrices)


def audit_command(words: list[str]) -> None:
    """Run `pgp audit RUN`."""
    command = parse.parse(AuditCommand, words, "pgp audit")
    if not command.batch_sizes or min(command.batch_sizes) < 1:
        raise ValueError(f"expected --batch-sizes of at least 1, got {command.batch_sizes}")
    run = Run.open(command.run)
    config = with_data_paths(run.config, command.data)
    with show.progress() as bars:
        findings, bounds = audit.audit_run(run, bars, command.batch_sizes, config), None
    show.show_audit(run, findings)
    if command.oracle:
        with show.progress() as bars:
            bounds = audit.oracle(run, bars, config)
        show.show_oracle(run, bounds)
    show.write_audit(run, findings, bounds)


def predict_command(words: list[str]) -> None:
    """Run `pgp predict RUN IMAGE ...`."""
    command = parse.parse(PredictCommand, words, "pgp predict")
    if not command.images:
        raise ValueError("expected image files or folders, got none: pgp predict RUN photo.jpg folder/")
    if command.top < 1 or command.batch_size < 1:
        raise ValueError(f"expected --top and --batch-size of at least 1, got {command.top} and {command.batch_size}")
    ignored_files: list[Ignored] = []
    paths, bad = images_in(command.images, ignored_files), 0
    for ignored in ignored_files:
        for line in ignored.lines():
            show.print_note(line)
    predictor = Predictor(Run.open(command.run), command.readout)
    reject = UNKNOWN_REJECTS if command.unknown else None
    if reject is not None:
        predictor.unknown_threshold(reject)  # an error that concerns the run comes before the first image
    with show.progress(hidden=show.is_terminal(sys.stdout)) as bars:  # on a terminal, the results show the progress
        predictions = predictor.predict_paths(paths, command.top, command.batch_size, reject)
        for path, prediction in track(bars, predictions, len(paths), "images"):
            if isinstance(prediction, BadImageError):
                bad += 1
                show.print_note(f"skipped: {prediction}")
                continue
            scores = dict(zip(prediction.names, prediction.probabilities, strict=True))
            if command.json:
                unknown = {"unknown": prediction.unknown} if command.unknown else {}
                show.show_json({"image": str(path), **unknown, "classes": scores})
            else:
                fields = [f"{name} {100 * score:.1f} %" for name, score in scores.items()]
                show.show_fields(path, *(["unknown"] if prediction.unknown else []), *fields)
    if bad == len(paths):
        reason = f"none of {len(paths)} can be read" if paths else "there is none"
        raise ValueError(f"expected images in {', '.join(map(str, command.images))}, but {reason}")


def export_command(words: list[str]) -> None:
    """Run `pgp export RUN OUT`."""
    command = parse.parse(ExportCommand, words, "pgp export")
    run = Run.open(command.run)
    check_outside(command.output, _data_paths(run.config))
    exported = export(run, command.output, command.readout, preprocess=command.preprocess)
    sizes = [f"{path.name} ({path.stat().st_size / 1e6:.3g} MB)" for path in exported.files]
    show.show_lines(f"wrote {', '.join(sizes)} to {exported.folder}")
    show.show_lines(f"compared: probabilities of onnxruntime and torch differ by at most {exported.difference:.0e}")


def undo_command(words: list[str]) -> None:
    """Run `pgp undo RUN`."""
    command = parse.parse(UndoCommand, words, "pgp undo")
    run = Run.open(command.run)
    with run.writing():
        name = run.undo_add()
    reports = [file for file in show.REPORT_FILES if storage.exists(run.folder / file)]
    if reports:  # they show the task that is forgotten
        show.show_report([run], run.folder, html=page.FILE in reports)
    show.show_lines(f"forgot task {name}: {run.folder} is as it was before")


def serve_command(words: list[str]) -> None:
    """Run `pgp serve RUN`."""
    command = parse.parse(ServeCommand, words, "pgp serve")
    try:
        from pgp.serve import Limits, serve
    except ImportError as error:
        raise ValueError("pgp serve needs fastapi, uvicorn, python-multipart and prometheus-client: pip install"
                         f" 'prompt-gradient-projection[serve]' ({error})") from error  # fmt: skip
    for name in ("max_megabytes", "max_megapixels", "max_files", "timeout", "batch_size"):
        if (value := getattr(command, name)) <= 0:
            raise ValueError(f"expected --{name.replace('_', '-')} above 0, got {value:g}")
    limits = Limits(
        request_bytes=_whole("--max-megabytes", command.max_megabytes, 2**20),
        files=command.max_files,
        pixels=_whole("--max-megapixels", command.max_megapixels, 1e6),
        seconds=command.timeout,
        batch_size=command.batch_size,
    )

    def announce(address: str) -> None:
        show.show_lines(f"serving {command.run} at {address} until Ctrl-C")

    serve(
        command.run,
        command.host,
        command.port,
        command.readout,
        command.device,
        limits=limits,
        token=os.environ.get("PGP_TOKEN") or None,
        announce=announce,
    )


def _whole(flag: str, size: float, unit: float) -> int:
    """Return a size that a flag gives in larger units, rounded down."""
    if not math.isfinite(size * unit):
        raise ValueError(f"expected a finite size with {flag}, got {size:g}: name a number, such as 1e6")
    return int(size * unit)


def push_command(words: list[str]) -> None:
    """Run `pgp push RUN OWNER/NAME`."""
    command = parse.parse(PushCommand, words, "pgp push")
    pushed = hub.push(
        command.run, command.repository, public=command.public, license=command.license, replace=command.replace
    )
    kind = "private" if pushed.is_private else "public"
    show.show_lines(
        f"pushed:   {len(pushed.files)} files, {pushed.size / 1e6:.3g} MB, to a {kind} repository",
        f"page:     {pushed.url}",
        f"revision: {pushed.revision}",
        f"use it:   pgp pull {command.repository}, or Predictor.from_pretrained",
    )


def pull_command(words: list[str]) -> None:
    """Run `pgp pull OWNER/NAME`."""
    command = parse.parse(PullCommand, words, "pgp pull")
    hub.check_repository(command.repository)
    output = command.output or Path("runs") / platforms.safe_name(command.repository.partition("/")[2])
    with show.progress() as bars:
        pulled = hub.pull(command.repository, output, revision=command.revision, progress=bars)
    show.show_lines(
        f"pulled:   {command.repository}",
        f"revision: {pulled.revision}",
        f"run:      {pulled.run.folder}",
        f"use it:   pgp predict {platforms.quoted(pulled.run.folder)} IMAGE ...",
    )


def report_command(words: list[str]) -> None:
    """Run `pgp report RUN ...`."""
    command = parse.parse(ReportCommand, words, "pgp report")
    if not command.runs:
        raise ValueError("expected run folders, got none: pgp report RUN …")
    runs = [Run.open(folder) for folder in command.runs]
    output = command.output or (runs[0].folder if len(runs) == 1 else None)
    if output:
        check_outside(output, [path for run in runs for path in _data_paths(run.config)])
        if output.resolve() not in [run.folder.resolve() for run in runs]:
            require_own(output, show.REPORT_FILES)
        make_output(output)
    show.show_report(runs, output, html=command.html)


def _data_paths(config: Config) -> list[Path]:
    """Return the paths of all data of a run."""
    return [path for data in (config.dataset, *config.added) for path in data.search_paths]


def sweep_command(words: list[str]) -> None:
    """Run `pgp sweep RECIPE ...`."""
    if not HELP.isdisjoint(words):
        parse.parse(SweepCommand, ["--help"], "pgp sweep RECIPE")
    recipe = parse.recipe_name(words, "pgp sweep")
    command, others = parse.parse_known(SweepCommand, words[1:], f"pgp sweep {recipe}")
    parse.check_over(words, command.over)
    base = parse.parse_point([recipe, *others])
    choices = parse.parse_grid(command.over)
    configs = [parse.parse_point([recipe, *others, *parse.to_flags(choice)]) for choice in choices]
    points, seeds = parse.label_choices(choices, configs, base.name), parse.parse_seeds(command.seeds)
    if command.workers is not None and command.workers < 1:
        raise ValueError(f"expected --workers of at least 1, got {command.workers}")
    for data in {repr(config.dataset): config.dataset for config in configs}.values():
        data.fetch()  # once; fetch() draws its own progress bars
    folder = command.output or Path("sweeps") / recipe
    swept = sweep.Sweep(folder, base)
    jobs = swept.plan(points, seeds, baselines=command.baselines)
    failures = _swept(command, base, jobs)
    if members := swept.write_report():
        show.show_comparison(members, folder)
    if failures:
        show.print_note(f"{len(failures)} of {len(jobs)} runs failed; repeat the same call to try them again:")
        for failure in failures:
            show.print_note(failure)
        sys.exit(2)


def _swept(command: SweepCommand, base: Config, jobs: list[sweep.Job]) -> list[str]:
    """Run all jobs of a sweep, and return one line for each run that failed."""
    left = [job for job in jobs if not sweep.finished_result(job)]
    if len(left) < len(jobs):
        show.print_note(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished already")
    gpus = torch.cuda.device_count() if base.hardware.accelerator != "cpu" else 0
    if command.ray:
        spread = functools.partial(pool.run_on_ray, address=command.ray, gpu=base.hardware.accelerator != "cpu")
    else:
        count = min(command.workers or gpus or platforms.cores(), max(1, len(left)))
        spread = functools.partial(pool.run_local, workers=count, gpus=gpus)
    try:
        return show.follow_results(sweep.run_all(left, spread), len(left))
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(number, f"{describe(number)}; repeat the same call to resume the sweep") from None


def list_command(words: list[str]) -> None:
    """Run `pgp list`."""
    if words:
        raise ValueError(f"pgp list takes no arguments, got {' '.join(words)}")
    show.show_rich(catalogue.print_catalogue())


def data_command(words: list[str]) -> None:
    """Run `pgp data get RECIPE` or `pgp data check RECIPE`, with the data flags of `pgp train`."""
    actions: dict[str, Callable[[Config], None]] = {"get": _get, "check": _check}
    if not words or words[0].startswith("-"):
        raise ValueError("expected pgp data get RECIPE or pgp data check RECIPE")
    action = recipes.lookup(actions, words[0], "action", "pgp --help")
    action(_train_command(words[1:], f"pgp data {words[0]}").config)


def _get(config: Config) -> None:
    config.dataset.fetch()
    data = config.dataset.read()
    where = next((f", at {path}" for path in config.dataset.search_paths if path.exists()), "")
    show.show_lines(
        f"found {len(data.train):,} training and {len(data.test):,} test images of {data.classes:,} classes{where}"
    )


def _check(config: Config) -> None:
    """Raise unless the data are complete and give the tasks of the recipe."""
    config = resolve_paths(config)
    data = config.dataset.read()
    with show.progress() as bars:
        report = check_images(config.dataset, bars, data)
    show.show_lines(*report.lines())
    show.show_tasks(config, build_scenario(config, data))
    if not report.is_complete:
        raise ValueError("the data are not complete; see above")
    show.show_lines("complete: every image can be read")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train_command,
    "add": add_command,
    "eval": eval_command,
    "audit": audit_command,
    "predict": predict_command,
    "export": export_command,
    "push": push_command,
    "pull": pull_command,
    "serve": serve_command,
    "undo": undo_command,
    "report": report_command,
    "sweep": sweep_command,
    "list": list_command,
    "data": data_command,
}
