"""The list of recipes, data sets, scenarios and components, with what each needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pgp import recipes
from pgp.backbones.base import Backbone
from pgp.baselines import BASELINES
from pgp.config import Config
from pgp.datasets.base import DatasetConfig
from pgp.datasets.download import there
from pgp.datasets.hugging_face import HuggingFace
from pgp.scenario import Setting
from pgp.system.escaping import printable

SCENARIOS: dict[Setting, str] = {
    "cil": "class-incremental: each task brings new classes; the task of a test image is not given",
    "til": "task-incremental: as cil, but the task of a test image is given",
    "oil": "online: as cil, but each image is seen once, and predicted before training on it",
    "dil": "domain-incremental: every task has all classes, in a new domain; needs data with domains",
}


assert set(SCENARIOS) == set(get_args(Setting))


def print_catalogue() -> RenderableType:
    """Return the whole list, ready to print."""
    return Group(*_sections())


def _sections() -> Iterator[RenderableType]:
    yield "recipes, for pgp train RECIPE"
    for name, recipe in recipes.RECIPES.items():
        config = recipe()
        yield _entry(name, recipe, f"needs {'; '.join(_needs(config))}")
    yield "\ndata sets, for --dataset NAME; download with pgp data get RECIPE, verify with pgp data check RECIPE"
    for name, dataset in recipes.DATASETS.items():
        yield _entry(name, type(dataset), _location(dataset))
    yield "\nscenarios of continual learning, for --setting NAME"
    yield _grid(SCENARIOS)
    yield "\ncomponents; each flag replaces that component of a recipe"
    names = {f"--{field}": ", ".join(choices) for field, choices in recipes.CHOICES.items() if field != "dataset"}
    yield _grid(names)
    yield "\nbaselines of a recipe: --method NAME trains one, --baselines all"
    yield _grid({name: _summary(baseline) for name, baseline in BASELINES.items()})


def _needs(config: Config) -> list[str]:
    return [f"data {config.dataset.tag}", f"encoder {_encoder(config.backbone)}", f"scenario {config.setting}"]


def _encoder(backbone: Backbone.Config) -> str:
    """Return the name of the encoder, and the source of its weights."""
    model, weights = (str(getattr(backbone, name, "")) for name in ("model", "weights"))
    if weights.startswith("package:"):
        return f"{weights.removeprefix('package:')}, which pgp ships"
    if weights == "hub":
        return f"{model}, from the Hugging Face hub or its cache (HF_HOME)"
    return f"{model} with weights {weights}, downloaded on first use or from its cache"


def _location(dataset: DatasetConfig) -> str:
    """Return where a data set is searched for, whether it was found, and what would be downloaded."""
    if isinstance(dataset, HuggingFace):
        return "on the hub, or at the path that --dataset.name gives"
    if not dataset.search_paths:
        return "needs no files"
    found = next((path for path in dataset.search_paths if there(path)), None)
    if found is not None and dataset.archives:
        return f"found at {found}"
    paths = ", ".join(map(str, dataset.search_paths))
    sizes = [f"{archive.size / 1e6:,.0f} MB" if archive.size else archive.name for archive in dataset.archives]
    download = f"; else downloaded: {', '.join(sizes)}" if sizes else ""
    return f"searched for at {paths}{download}"


def _entry(name: str, thing: object, note: str) -> RenderableType:
    text = Text.assemble(printable(_summary(thing)), "\n", (printable(note), "dim"))
    return _indented(Group(Text(name, "bold"), _indented(text)))


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, 2), expand=False)


def _summary(thing: object) -> str:
    """Return the first paragraph of a docstring on one line."""
    paragraph = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


def _grid(rows: Mapping[Any, str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(Text(name, "bold"), Text(printable(text)))
    return _indented(table)
