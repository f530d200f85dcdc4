"""The model card of a run: what the model does, how well, how it was made, and what nobody should expect of it.

All of it comes from the run folder. Names from data are escaped, so none of them can be markup.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

from pgp.analysis.audit import SCOPES, Finding
from pgp.backbones.weights import EncoderSource
from pgp.config import Config
from pgp.evaluation.accuracy import LEGACY
from pgp.methods.head_only import HeadOnly
from pgp.reports.tables import CALIBRATION, NOT_MEASURED, ONLINE, SAMPLING, SOMETIMES, ResultRow, result_rows
from pgp.runs.checkpoint import reading
from pgp.runs.run import ENVIRONMENT, Run
from pgp.system import storage
from pgp.system.escaping import markdown_text

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
PLACEHOLDER = "OWNER/NAME"
"""Stands for the name of the repository in a card that is not pushed yet."""
_SCENARIOS = {
    "cil": ("class-incremental-learning", "each task brings new classes, and the task of a test image is not given"),
    "til": ("task-incremental-learning", "each task brings new classes, and the task of a test image is given"),
    "dil": ("domain-incremental-learning", "every task has all classes, in a new domain"),
    "oil": ("online-continual-learning", "each task brings new classes, and each image is seen once"),
}
_DATA = {
    "folder": "images of the author, in a folder for each class",
    "manifest": "images of the author, in a table",
}
"""Data sets whose tag says nothing to a reader."""
_UNKNOWN = "unknown: ask the source"
_LIMITS = """\
- It answers with one of its classes, whatever an image shows. With the readouts lda, ncm and logistic,
  `predict(images, reject=0.05)` marks images that are unlike all of them.
- {accuracy}
- It stores no images. It does store what was learned from them, such as statistics of each class, which for a class of
  very few images say much about each of them.
- It was not examined for bias, nor for use where mistakes harm people."""
_TESTED = """\
Its accuracy was measured on test images from the same source as the training images. On other images it may be lower,
  and probabilities may be too confident."""


def model_card(
    run: Run, repository: str | None = None, *, license: str | None = None, findings: Sequence[Finding] = ()
) -> str:
    """Return the model card of the latest finished task of `run`: Markdown, after YAML for the hub.

    Args:
        run: A run with at least one finished task.
        repository: Name of the repository, OWNER/NAME. If None, a placeholder.
        license: Licence of the model, as the hub spells it, such as apache-2.0. If None, none is stated.
        findings: What `pgp audit` found of this task.

    Raises:
        RunError: If no task is finished.
        ValueError: If the licence has a wrong form.
    """
    check_license(license)
    config, source, name = run.config, run.config.backbone.source(), repository or PLACEHOLDER
    sections = [
        _metadata(config, source, license),
        f"# {markdown_text(name.partition('/')[2] if repository else config.name)}",
        _summary(run),
        "## How do I use it?",
        _usage(name),
        "## Which classes does it know?",
        _classes(run),
        "## How well does it do?",
        _results(run, findings),
        "## How was it made?",
        _making(run),
        "## Which licences hold?",
        _licences(config, source, license),
        "## What can it not do?",
        _LIMITS.format(accuracy=_TESTED if _is_tested(run) else "Its accuracy was not measured."),
    ]
    return "\n\n".join(sections) + "\n"


def check_license(license: str | None) -> None:
    """Raise a ValueError unless `license` is None or may be an identifier of a licence."""
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError("expected a licence as the hub spells it, such as apache-2.0 or cc-by-4.0, got"
                         f" {license!r:.60}")  # fmt: skip


def _metadata(config: Config, source: EncoderSource, license: str | None) -> str:
    tags = ["continual-learning", _SCENARIOS[config.setting][0], config.to_json()["method"]["tag"]]
    fields: dict[str, Any] = {
        "library_name": "prompt-gradient-projection",
        "pipeline_tag": "image-classification",
        "license": license,
        "base_model": source.repository,
        "tags": tags,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _summary(run: Run) -> str:
    config, tasks = run.config, _learned(run)
    classes = {label for labels in tasks for label in labels}
    how = "in one task"
    if len(tasks) > 1:
        how = f"in {len(tasks)} tasks one after the other, without the images of earlier tasks"
    return (
        f"An image classifier of {_count(len(classes), 'class', 'classes')}, learned {how}, by"
        " prompt-gradient-projection (`pgp`), a library for continual learning on frozen encoders. The scenario is"
        f" {_SCENARIOS[config.setting][0].replace('-', ' ')}: {_SCENARIOS[config.setting][1]}."
    )


def _usage(repository: str) -> str:
    return f"""\
```python
from pgp import Predictor  # pip install prompt-gradient-projection

predictor = Predictor.from_pretrained("{repository}")
for prediction in predictor.predict(["photo.jpg"], top=3):
    print(prediction.names, prediction.probabilities)
```

To get exactly these files every time, pin the revision: `from_pretrained("{repository}", revision="HASH")`
with the hash of a commit from the history of this repository. On the command line, `pgp pull {repository}`
makes a run folder, which `pgp predict` and `pgp export` use, and which `pgp add` teaches new classes."""


def _learned(run: Run) -> tuple[tuple[int, ...], ...]:
    """Return the labels of the classes of each task that is finished."""
    return run.data.tasks[: run.latest_finished().task]


def _is_tested(run: Run) -> bool:
    """Return whether learned tasks have test images."""
    return any(run.data.test_images[: run.latest_finished().task])


def _classes(run: Run) -> str:
    data = run.data
    rows = []
    for index, labels in enumerate(_learned(run)):
        name = f" ({data.task_names[index]})" if data.task_names[index] else ""
        names = ", ".join(markdown_text(data.class_names[label]) for label in labels)
        images = (f"{count:,}" for count in (data.train_images[index], data.test_images[index]))
        rows.append([f"{index + 1}{markdown_text(name)}", names, *images])
    return _table(["task", "classes", "training images", "test images"], rows)


def _results(run: Run, findings: Sequence[Finding]) -> str:
    if not _is_tested(run):
        return "This run has no test images, so its accuracy was not measured."
    config, rows = run.config, result_rows([run])
    legacy = [row for row in rows if row.column.endswith(LEGACY)]
    tasks = run.latest_finished().task
    parts = [
        f"In %, on test images that were not trained on, after task {tasks} of {len(run.data.tasks)}. Accuracies are"
        f" means over tasks. This is one run, with seed {config.seed}: other seeds give other numbers, so differences"
        " of a point or two to another model mean nothing.",
        _result_table(run, [row for row in rows if row not in legacy]),
        "\n".join(_explained(run, rows)),
    ]
    leaking = [[row.column.removesuffix(LEGACY), "--legacy-eval, the published code", _percent(row)] for row in legacy]
    if config.setting != "til":
        leaking += [[one.column, _protocol(one), _number(one.accuracy)] for one in findings if one.uses_task]
    if leaking:
        parts += [
            "The following accuracies **use the task of the test images**, which nobody knows of a new image. Compare"
            " them only with numbers of the same protocol.",
            _table(["readout", "protocol", "accuracy"], [[*map(markdown_text, row[:2]), row[2]] for row in leaking]),
        ]
    return "\n\n".join(parts)


def _protocol(finding: Finding) -> str:
    """Describe a protocol of `pgp audit`."""
    votes = "" if finding.batch is None else f"prompts by vote of {finding.batch}, "
    return f"{votes}classes {SCOPES[finding.scope]}"


def _result_table(run: Run, rows: Sequence[ResultRow]) -> str:
    """Return the table of honest accuracies, next to those with the task given."""
    setting = run.config.setting
    head = ["readout", "accuracy, task given" if setting == "til" else "accuracy", "forgetting"]
    head += ["accuracy, task given"] if setting in _MASKED else []
    sometimes = {key: text for key, text in SOMETIMES.items() if any(row.has(key) for row in rows)}
    given, cells = _accuracy_with_task(run), []
    for row in rows:
        own = [markdown_text(row.column), _percent(row), _percent(row, "forgetting")]
        own += [_number(given.get(row.column))] if setting in _MASKED else []
        cells.append([*own, *(_percent(row, key) if row.has(key) else "" for key in sometimes)])
    return _table([*head, *sometimes.values()], cells)


_MASKED = ("cil", "oil")
"""Scenarios in which accuracy with the task given is another number than accuracy."""


def _explained(run: Run, rows: Sequence[ResultRow]) -> list[str]:
    """Return a line for each column of the table of results."""
    setting, readouts = run.config.setting, [row.column for row in rows]
    what = {
        "til": "among the classes of the image's own task, which is given",
        "dil": "among all classes; the domain of an image is not given",
    }.get(setting, "among all classes learned so far; nothing tells the task of an image")
    lines = [
        f"- readout: a classifier on the same features. `Predictor` uses {markdown_text(readouts[0])} unless another is"
        " named.",
        f"- accuracy: {what}.",
        "- forgetting: how far the accuracy of a task fell from its best, mean over all tasks but the last.",
    ]
    if setting in _MASKED:
        lines.append("- accuracy, task given: among the classes of the image's own task only. That is an easier"
                     " question, which leaks the task: do not compare it with the first column.")  # fmt: skip
    if any(row.has(CALIBRATION) for row in rows):
        lines.append("- calibration error: the expected calibration error, the mean difference between confidence and"
                     " accuracy over 15 bins. By chance, it is not 0 even if every probability is right, because a bin"
                     " has few images.")  # fmt: skip
    if any(row.has(SAMPLING) for row in rows):
        lines.append("- standard error from the sample of test images: only a random sample of the test images of each"
                     " task was evaluated; this is how far the accuracy may be off for that reason.")  # fmt: skip
    if any(row.has(ONLINE) for row in rows):
        lines.append("- stream accuracy: images that were predicted correctly before they were learned.")
    return lines


def _accuracy_with_task(run: Run) -> dict[str, float]:
    """Return the mean accuracy over tasks with the task given, by column, as far as it was logged and measured."""
    with reading(run.log_file.path):
        events = run.events("task")
        within = events[-1].get("within", {}) if events else {}
        return {column: mean(values) for column, values in within.items() if values and None not in values}


def _making(run: Run) -> str:
    config, tree = run.config, run.config.to_json()
    training = {
        "epochs per task, batch size": f"{config.num_passes}, {config.batch_size}",
        "optimizer, learning rate": f"{config.optimizer.name}, {config.optimizer.lr:g} per 256 images",
    }
    learns = not (isinstance(config.method, HeadOnly.Config) and not config.method.learns)
    added = f", and {_count(len(config.added), 'data set', 'data sets')} added later" if config.added else ""
    tag, name = tree["dataset"]["tag"], tree["dataset"].get("name")
    rows = {
        "recipe": config.name,
        "data": (_DATA.get(tag) or f"{tag} {name or ''}".strip()) + added,
        "scenario": tree["setting"],
        "encoder, frozen": f"{tree['backbone'].get('model', tree['backbone']['tag'])}, weights"
        f" {tree['backbone'].get('weights', 'unknown')}",
        "image size": f"{config.transforms.size} pixels",
        "method": tree["method"]["tag"],
        "projection": tree["projection"]["tag"],
        "readouts": ", ".join(readout.name for readout in config.readouts),
        **(training if learns else {}),
        "precision": config.precision,
        "seed": str(config.seed),
        "versions": _versions(run),
    }
    table = _table(["setting", "value"], [[name, markdown_text(value)] for name, value in rows.items() if value])
    files = (
        "All settings are in `config.json`. Class names and tasks are in `classes.json`, the accuracy of each task"
        " after each task in `accuracy.csv`, and what was learned in `checkpoints/`."
    )
    return f"{table}\n\n{files}"


def _versions(run: Run) -> str:
    path = run.folder / ENVIRONMENT
    if not storage.exists(path):
        return ""
    with reading(path):
        versions = storage.read_json(path)["versions"]
        return ", ".join(f"{name} {versions[name]}" for name in ("prompt-gradient-projection", "torch", "timm"))


def _licences(config: Config, source: EncoderSource, license: str | None) -> str:
    encoder = _UNKNOWN
    if source.license:
        stated = "as pgp ships it" if source.repository is None else f"as timm states it for {source.repository}"
        encoder = f"{source.license}, {stated}"
    elif source.repository:
        encoder = f"unknown: see {source.repository}"
    rows = [
        ["this model", f"{license}, as its author states" if license else "not stated by its author: ask before use"],
        ["encoder", encoder],
        ["data", _UNKNOWN],
    ]
    table = _table(["of what", "licence"], [[what, markdown_text(text)] for what, text in rows])
    return f"{table}\n\nThe encoder is not in this repository. It is loaded from its own source, under its own licence."


def _percent(row: ResultRow, figure: str = "average_accuracy") -> str:
    return _number(row.spread(figure)[0])


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None or math.isnan(value) else f"{100 * value:.2f}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are escaped already."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
