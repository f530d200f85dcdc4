"""The command line: parse, call one function, print."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pgp import (
    __version__,
    audit,
    catalogue,
    display,
    parsing,
    platforms,
    processes,
    published,
    sweep,
    train,
    workers,
)
from pgp.baselines import compared, sequential
from pgp.commands import (
    AuditCommand,
    EvalCommand,
    PredictCommand,
    ReportCommand,
    ResumeCommand,
    SweepCommand,
    TrainCommand,
)
from pgp.config import Config, Hardware
from pgp.curriculum import located, scenario_of
from pgp.datasets import BadImageError
from pgp.datasets.check import checked
from pgp.datasets.ignored import Ignored
from pgp.datasets.own import own_data
from pgp.evaluate import tracked
from pgp.guard import guarded
from pgp.interrupts import Interrupted, describe
from pgp.outputs import check_outside, make_output
from pgp.places import with_places
from pgp.predict import Predictor, images_in
from pgp.processes import rank
from pgp.run import Run, RunError, free_folder

USAGE = """\
usage: pgp COMMAND ...

  train RECIPE [overrides]   learn a stream of tasks; pgp train RECIPE --help lists every override
  train --resume RUN         go on with a run that stopped; --add FOLDER teaches it the classes of a folder
  eval RUN                   evaluate a run's latest checkpoint again
  audit RUN                  how much of its accuracy is real: the honest protocol beside those that leak the task
  predict RUN IMAGE ...      name what is on images or in folders of images
  report RUN ...             tables and figures over runs: mean and deviation over seeds
  sweep RECIPE --over ...    a grid of runs with its controls, in parallel, in one table; pgp sweep --help
  list                       recipes, data sets, settings, what each needs and where it is looked for
  data get RECIPE            download what a recipe learns from, and nothing else
  data check RECIPE          look at every file of it, before an hour is spent

Results go to standard output, bars and notes to standard error. The exit status is 0; 2 if something has to be put
right, which one line names; 70 for a fault of pgp itself; 128 and the signal's number after Ctrl-C, SIGTERM or SIGHUP,
such as 130; 141 if whatever reads the output went away. PGP_DEBUG=1 shows where in the code an error comes from."""
PUBLISHED_USAGE = """\
usage: python main.py RECIPE [--model NAME] [--output_dir DIR] [--data-path DIR] [--epochs N] [--seed N] [--no_pgp] ...
       python main.py RECIPE --eval

The published command line: the flags that its printed commands use, and all of pgp train. python main.py RECIPE --help
lists them."""
HELP = {"-h", "--help"}
PUBLISHED_OUTPUT = Path("output")
"""Where the published command line leaves its run."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; end the process with another status than 0 unless it is done, see `USAGE`."""
    words = list(sys.argv[1:] if argv is None else argv)
    bare = words[0] in ("list", "data") and len(words) < 4 if words else True  # without flags of their own
    if not words or words[0] in HELP or (bare and words[-1] in HELP):
        guarded(lambda: display.show_lines(*USAGE.splitlines()))
    elif words[0] == "--version":
        guarded(lambda: display.show_lines(f"pgp {__version__}"))
    else:
        guarded(lambda: parsing.named(COMMANDS, words[0], "command", "pgp --help")(words[1:]))


def published_main(argv: Sequence[str] | None = None) -> None:
    """`python main.py RECIPE …`: as `main`, with the words, the folder and the file names of the published code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in HELP:
        guarded(lambda: display.show_lines(*PUBLISHED_USAGE.splitlines()))
    elif any(word.partition("=")[0] == "--resume" for word in words):
        guarded(lambda: train_command(words))
    elif "--eval" in words:
        guarded(lambda: _published_eval([word for word in words if word != "--eval"]))
    else:
        guarded(lambda: _published_train(words))


def train_command(words: list[str]) -> None:
    """`pgp train …`."""
    if any(word == "--resume" or word.startswith("--resume=") for word in words):
        asked = not HELP.isdisjoint(words)
        parsing.check_resumable(words)
        default = ResumeCommand(Path("RUN"), hardware=Hardware()) if asked else parsing.resumed(words)
        chosen = parsing.parsed(ResumeCommand, ["--help"] if asked else words, "pgp train --resume", default=default)
        with display.progress() as bars:
            more = own_data(chosen.add) if chosen.add else None
            run = train.resume(
                chosen.resume, chosen.hardware, bars, more, chosen.on_bad_image, drop=chosen.drop, data=chosen.data
            )
        display.show([run])
    elif words and words[0] in HELP:
        display.show_lines(*USAGE.splitlines())
    else:
        command = _train_command(words, "pgp train")
        display.show(_trained(command), command.output)


def _train_command(words: list[str], program: str) -> TrainCommand:
    """As `parsing.train_command`, and says what a published flag means where it says less than it means."""
    command = parsing.train_command(words, program)
    if note := published.says(words[1:], command.config):
        display.note(note)
    return command


def _trained(command: TrainCommand) -> list[Run]:
    """The finished run, and its twin or baselines."""
    own = command.config if command.pgp else sequential(command.config)
    configs = {type(own.projection).__module__.rpartition(".")[2]: own}  # by the folder's name, if there are several
    if command.twin:
        configs["none"] = sequential(own)
    if command.baselines:
        configs |= compared(own)
    own.dataset.fetch()  # with bars of its own
    if command.output and len(configs) > 1:
        make_output(command.output)
    runs = []
    with display.progress() as bars:
        for name, config in configs.items():
            output = command.output / name if command.output and len(configs) > 1 else command.output
            runs.append(train.train(config, output, bars))
            if rank() == 0 and len(configs) > 1:  # a single run is drawn with its table
                display.draw([runs[-1]], runs[-1].folder)
    return runs


def _published_train(words: list[str]) -> None:
    """`python main.py RECIPE …`: trains into `--output_dir`, or into the next free folder beside it."""
    command = _train_command(words, "python main.py")
    folder = (command.output or PUBLISHED_OUTPUT).absolute()
    own = command.config if command.pgp else sequential(command.config)
    try:
        if not processes.started():
            Run.check_free(folder, located(own))
    except RunError:
        folder = free_folder(folder.parent, folder.name)
        display.note(f"the output folder is not empty: this run goes to {folder.name}")
    command = replace(command, output=folder)
    try:
        display.show(_trained(command), folder)
    finally:
        for path in (folder, *folder.glob("*/")):
            if rank() == 0 and (path / "config.json").is_file():
                published.leave_checkpoints(Run.open(path))


def _published_eval(words: list[str]) -> None:
    """`python main.py RECIPE --eval`: the newest run of the recipe in `--output_dir`, after each of its tasks."""
    command = _train_command(words, "python main.py")
    asked = command.config if command.pgp else sequential(command.config)
    run, config = published.newest(asked, words[1:], (command.output or PUBLISHED_OUTPUT).absolute())
    with display.progress() as bars:
        matrices = train.reevaluate(run, config, bars, every_task=True)
    display.show_evaluation(run, matrices)


def eval_command(words: list[str]) -> None:
    """`pgp eval RUN`."""
    command = parsing.parsed(EvalCommand, words, "pgp eval")
    run = Run.open(command.run)
    hardware = replace(run.config.hardware, accelerator="auto", devices=1)
    size = command.batch_size or run.config.eval_batch_size
    config = replace(
        with_places(run.config, command.data), hardware=hardware, legacy_eval=command.legacy_eval, eval_batch_size=size
    )
    with display.progress() as bars:
        matrices = train.reevaluate(run, config, bars, every_task=command.every_task)
    display.show_evaluation(run, matrices)


def audit_command(words: list[str]) -> None:
    """`pgp audit RUN`."""
    command = parsing.parsed(AuditCommand, words, "pgp audit")
    if not command.batch_sizes or min(command.batch_sizes) < 1:
        raise ValueError(f"expected --batch-sizes of at least 1, got {command.batch_sizes}")
    run = Run.open(command.run)
    config = with_places(run.config, command.data)
    with display.progress() as bars:
        findings, bounds = audit.audited(run, bars, command.batch_sizes, config), None
    display.show_audit(run, findings)
    if command.oracle:
        with display.progress() as bars:
            bounds = audit.oracle(run, bars, config)
        display.show_oracle(run, bounds)
    display.keep_audit(run, findings, bounds)


def predict_command(words: list[str]) -> None:
    """`pgp predict RUN image …`."""
    command = parsing.parsed(PredictCommand, words, "pgp predict")
    if not command.images:
        raise ValueError("expected image files or folders, got none: pgp predict RUN photo.jpg folder/")
    if command.top < 1 or command.batch_size < 1:
        raise ValueError(f"expected --top and --batch-size of at least 1, got {command.top} and {command.batch_size}")
    told: list[Ignored] = []
    paths, bad = images_in(command.images, told), 0
    for line in (line for ignored in told for line in ignored.lines()):
        display.note(line)
    predictor = Predictor(Run.open(command.run), command.readout)
    with display.progress(hidden=display.is_terminal(sys.stdout)) as bars:  # where answers appear, they are the bar
        for path, found in tracked(
            bars, predictor.stream(paths, command.top, command.batch_size), len(paths), "images"
        ):
            if isinstance(found, BadImageError):
                bad += 1
                display.note(f"skipped: {found}")
                continue
            scores = dict(zip(found.names, found.probabilities, strict=True))
            if command.json:
                display.show_json({"image": str(path), "classes": scores})
            else:
                display.show_fields(path, *(f"{name} {100 * score:.1f} %" for name, score in scores.items()))
    if bad == len(paths):
        why = f"none of {len(paths)} can be read" if paths else "there is none"
        raise ValueError(f"expected images in {', '.join(map(str, command.images))}, but {why}")


def report_command(words: list[str]) -> None:
    """`pgp report RUN …`."""
    command = parsing.parsed(ReportCommand, words, "pgp report")
    if not command.runs:
        raise ValueError("expected run folders, got none: pgp report RUN …")
    runs = [Run.open(folder) for folder in command.runs]
    output = command.output or (runs[0].folder if len(runs) == 1 else Path())
    check_outside(output, [place for run in runs for place in _places(run.config)])
    make_output(output)
    display.show(runs, output)


def _places(config: Config) -> list[Path]:
    """Where all data of a run lie."""
    return [place for data in (config.dataset, *config.added) for place in data.places]


def sweep_command(words: list[str]) -> None:
    """`pgp sweep RECIPE …`."""
    first = [] if not words or words[0].startswith("-") else [words[0]]
    command, others = parsing.parsed_in_part(SweepCommand, words[len(first) :], "pgp sweep RECIPE")
    base = parsing.point([*first, *others])
    choices = parsing.grid(command.over)
    configs = [parsing.point([*first, *others, *parsing.words_of(choice)]) for choice in choices]
    points, seeds = parsing.labelled(choices, configs, base.name), parsing.seeds_of(command.seeds)
    if command.workers is not None and command.workers < 1:
        raise ValueError(f"expected --workers of at least 1, got {command.workers}")
    for data in {repr(config.dataset): config.dataset for config in configs}.values():
        data.fetch()  # once, with bars of its own
    swept = sweep.Sweep(command.output or Path("sweeps") / first[0], base)
    jobs = swept.plan(points, seeds, controls=command.controls)
    failures = _swept(command, base, jobs)
    if members := swept.conclude():
        display.show_comparison(members, command.output or Path("sweeps") / first[0])
    if failures:
        display.note(f"{len(failures)} of {len(jobs)} runs failed; the same call tries them again:")
        for failure in failures:
            display.note(failure)
        sys.exit(2)


def _swept(command: SweepCommand, base: Config, jobs: list[sweep.Job]) -> list[str]:
    """What went wrong, a line for each run that failed; every other run is there when this returns."""
    left = [job for job in jobs if not sweep.finished(job)]
    if len(left) < len(jobs):
        display.note(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
    gpus = torch.cuda.device_count() if base.hardware.accelerator != "cpu" else 0
    if command.ray:
        spread = functools.partial(workers.on_ray, address=command.ray, gpu=base.hardware.accelerator != "cpu")
    else:
        count = min(command.workers or gpus or platforms.cores(), max(1, len(left)))
        spread = functools.partial(workers.at_once, workers=count, gpus=gpus)
    try:
        return display.follow(sweep.each(left, spread), len(left))
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(number, f"{describe(number)}; the same call goes on with the sweep") from None


def list_command(words: list[str]) -> None:
    """`pgp list`."""
    if words:
        raise ValueError(f"pgp list takes no arguments, got {' '.join(words)}")
    display.show_rich(catalogue.catalogue())


def data_command(words: list[str]) -> None:
    """`pgp data get RECIPE …` and `pgp data check RECIPE …`; data flags are those of pgp train."""
    actions: dict[str, Callable[[Config], None]] = {"get": _get, "check": _check}
    if not words or words[0].startswith("-"):
        raise ValueError("expected pgp data get RECIPE or pgp data check RECIPE")
    action = parsing.named(actions, words[0], "action", "pgp --help")
    action(_train_command(words[1:], f"pgp data {words[0]}").config)


def _get(config: Config) -> None:
    config.dataset.fetch()
    data = config.dataset.read()
    where = next((f", at {place}" for place in config.dataset.places if place.exists()), "")
    display.show_lines(
        f"there: {len(data.train):,} training and {len(data.test):,} test images of {data.classes:,} classes{where}"
    )


def _check(config: Config) -> None:
    """Raises unless the data are whole and make the tasks that the recipe wants."""
    config = located(config)
    data = config.dataset.read()
    with display.progress() as bars:
        census = checked(config.dataset, bars, data)
    display.show_lines(*census.lines())
    display.show_tasks(scenario_of(config, data))
    if not census.whole:
        raise ValueError("the data are not whole; see above")
    display.show_lines("whole: every image can be read")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train_command,
    "eval": eval_command,
    "audit": audit_command,
    "predict": predict_command,
    "report": report_command,
    "sweep": sweep_command,
    "list": list_command,
    "data": data_command,
}
