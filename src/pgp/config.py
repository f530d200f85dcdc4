"""The whole configuration of a run, as one frozen tree that is checked when made and goes through JSON unchanged."""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import cattrs
import torch
import tyro
from cattrs.v import format_exception

from pgp.backbones.base import Backbone
from pgp.datasets.base import DatasetConfig
from pgp.datasets.transforms import Transforms
from pgp.methods.base import Method
from pgp.projections.base import Projection
from pgp.readouts.base import Readout
from pgp.scenario import Setting
from pgp.system.paths import as_path

COMPONENTS: tuple[type, ...] = (DatasetConfig, Backbone.Config, Method.Config, Projection.Config, Readout.Config)
"""Where things multiply: in JSON, a value of one of these types carries the tag of its class."""
VERSION = 2
"""Format of the JSON of a configuration; no other is read."""


@dataclass(frozen=True)
class Optimizer:
    """The optimizer of a task; each task starts a new one."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 0.03
    """Learning rate per 256 images: the effective rate is `lr * batch_size / 256`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """For adam and adamw."""
    momentum: float = 0.9
    """For sgd."""
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    """How the rate goes over the steps of a task."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0 clips nothing."""
    first_lr: float | None = None
    """Learning rate of the first task, where it differs."""
    first_weight_decay: float | None = None
    """Weight decay of the first task, where it differs."""
    prompt_lr_scale: float = 1.0
    """Learning rate of all but the head, as a share of `lr`: what suits a head may be far too fast for deep prompts."""
    later_prompt_lr_scale: float | None = None
    """From the second task on, multiply the learning rate of all but the head by this; 0 freezes the prompts. If None,
    as in the first task."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.prompt_lr_scale >= 0 and self.clip >= 0 and self.weight_decay >= 0):
            raise ValueError(
                f"expected optimizer.lr > 0, prompt_share >= 0, clip >= 0 and weight_decay >= 0, got {self}"
            )
        if self.later_prompt_lr_scale is not None and not self.later_prompt_lr_scale >= 0:
            raise ValueError(f"expected optimizer.later_prompt_lr_scale >= 0, got {self.later_prompt_lr_scale}")

    def for_task(self, index: int) -> Optimizer:
        """Return the settings for task number `index`, from 0."""
        lr = self.lr if index or self.first_lr is None else self.first_lr
        decay = self.weight_decay if index or self.first_weight_decay is None else self.first_weight_decay
        later = 1.0 if index == 0 or self.later_prompt_lr_scale is None else self.later_prompt_lr_scale
        return replace(self, lr=lr, weight_decay=decay, prompt_lr_scale=self.prompt_lr_scale * later)

    def build(self, method: Method, batch_size: int) -> torch.optim.Optimizer:
        """Return a new optimizer over what `method` learns; each of its groups has its `share` of the rate."""
        lr, learned = self.rate(0, 1, batch_size), [p for p in method.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": learned, "share": 1.0}]
        if self.prompt_lr_scale != 1:
            prompts = {id(parameter) for parameter in method.prompt_parameters()}
            head, rest = [p for p in learned if id(p) not in prompts], [p for p in learned if id(p) in prompts]
            groups = [{"params": head, "share": 1.0}, {"params": rest, "share": self.prompt_lr_scale}]
            groups = [group | {"lr": lr * group["share"]} for group in groups if group["params"]]
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(groups, lr, betas=self.betas, weight_decay=self.weight_decay)

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int, steps: int, batch_size: int) -> None:
        """Give each group of `optimizer` its rate at `step` of `steps`."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, steps, batch_size) * group["share"]

    def rate(self, step: int, steps: int, batch_size: int) -> float:
        """Return the learning rate at `step` of `steps`."""
        full = self.lr * batch_size / 256
        return full if self.schedule == "constant" else full * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class Hardware:
    """Where a run computes. It changes the speed and, beyond rounding, nothing else."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """auto takes a CUDA GPU if there is one, else the CPU. gpu is CUDA; mps is Apple's, which has no float64: what
    needs float64 is computed on the CPU."""
    devices: int = 1
    """Processes, one per device; a batch is shared among them."""
    workers: int = 0
    """Processes that load images, per device."""
    pin_memory: bool = True
    """Load images into page-locked memory where there is a GPU: faster to move, but held in RAM."""
    micro_batch_size: int | None = None
    """Images whose activations are in memory at once in training and at task boundaries; the gradient of a batch is
    the sum over its parts. 4 on a CPU, where smaller parts are no faster, and the whole batch on a GPU, where None."""

    def __post_init__(self) -> None:
        if self.devices < 1 or self.workers < 0 or (self.micro_batch_size is not None and self.micro_batch_size < 1):
            raise ValueError(f"expected devices >= 1, workers >= 0 and part >= 1, got {self}")


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run."""

    name: str
    """The recipe it began as."""
    dataset: DatasetConfig
    backbone: Backbone.Config
    method: Method.Config
    projection: Projection.Config
    readouts: tuple[Readout.Config, ...]
    """How features become logits at test; all are evaluated on the same run, the first is the headline."""
    transforms: Transforms = field(default_factory=Transforms)
    optimizer: Optimizer = field(default_factory=Optimizer)
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Number format of the forward and backward pass. It decides results, so it is fixed when a run begins."""
    tasks: int | None = 10
    """Tasks into which the classes are split; None: as many as the data name (domains, tasks), else 5."""
    setting: Setting = "cil"
    """cil: class-incremental. til: the task of a test image is known. dil: domain-incremental, each task brings all
    classes in a new domain. oil: online, each image is seen once, and predicted before it is learned."""
    seed: int = 42
    """Decides every random draw."""
    shuffle: bool = False
    """Order of the classes (dil: of the domains): natural, or shuffled by the seed."""
    class_order: Path | None = None
    """Text file with the classes in the order of learning, one a line; class_order.txt beside the data, where None and
    it is there."""
    task_file: Path | None = None
    """JSON file with the tasks in the order of learning, an object of their names with the list of classes (dil: of
    domains) of each; tasks.json beside the data, where None and it is there."""
    order: Literal["shuffled", "listed"] = "shuffled"
    """oil: whether the images of a task come in an order drawn from the seed, or as the data list them."""
    added: Annotated[tuple[DatasetConfig, ...], tyro.conf.Suppress] = ()
    """Data sets that joined a finished run, each as one more task; pgp train --resume RUN --add PLACE appends one."""
    joint: bool = False
    """Learn the images of all tasks at once, as a single task: no continual learning, but its upper bound."""
    epochs: int = 5
    """Passes over each task's images; oil makes one whatever this says."""
    batch_size: int = 16
    """Images per step, over all devices."""
    eval_batch_size: int = 32
    """Images at once where nothing learns; it changes no result."""
    drift_images: int = 16
    """Test images of each task on which drift is measured when the task is closed and after every later one; 0 measures
    nothing. See metrics.jsonl and pgp report."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What an unreadable image does."""
    legacy_eval: bool = False
    """Report the published protocol too, in columns named legacy: one majority vote for the prompts of a test batch of
    `eval_batch_size` images of one task, scored over all classes, seen or not; for CLIP, over the classes up to the
    batch's task. It leaks the task."""
    log_every_steps: int = 20
    """Steps between two looks at the loss, each of which waits for the device."""
    save_every_steps: int = 0
    """Steps between two checkpoints inside a task; 0 saves after each task only."""
    keep_checkpoints: str = "all"
    """Checkpoints of finished tasks that are kept: all, last, or how many of the newest. pgp eval --every-task looks at
    those that are there; it decides no result."""

    def __post_init__(self) -> None:
        positive = ("tasks", "epochs", "batch_size", "eval_batch_size", "log_every_steps")
        for name in positive:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        for name in ("save_every_steps", "drift_images"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"expected {name} of at least 0, got {value}")
        if self.order == "listed" and self.setting != "oil":
            raise ValueError(f"expected setting oil for order=listed, got {self.setting}: others shuffle each pass")
        if self.keep_checkpoints not in ("all", "last") and not re.fullmatch("[1-9][0-9]{0,8}", self.keep_checkpoints):
            raise ValueError(f"expected keep_checkpoints all, last or a number, got {self.keep_checkpoints}")
        for name in ("class_order", "task_file"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_path(value, name))
        self._check_order()
        if not self.readouts:
            raise ValueError("expected at least one readout, got none")
        if len({readout.name for readout in self.readouts}) < len(self.readouts):
            raise ValueError(f"expected readouts of different names, one column each, got {self.readouts}")
        if self.batch_size < self.hardware.devices:
            raise ValueError(f"expected batch_size of at least devices {self.hardware.devices}, got {self.batch_size}")
        if self.hardware.devices > 1 and (self.legacy_eval or self.on_bad_image == "skip"):
            raise ValueError("legacy_eval and on_bad_image=skip need devices 1: they depend on whole batches")

    def _check_order(self) -> None:
        """Raise if two settings decide the order of learning."""
        chosen = [name for name in ("class_order", "task_file", "shuffle") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"expected one of {' and '.join(chosen)}: each decides the order of learning")
        if self.class_order and self.setting == "dil":
            raise ValueError("expected task_file for the order of domains in setting dil, got class_order")

    @property
    def num_passes(self) -> int:
        """Passes over each task's images."""
        return 1 if self.setting == "oil" else self.epochs

    @property
    def kept_checkpoints(self) -> int | None:
        """How many of the newest checkpoints of finished tasks are kept; all, if None."""
        if self.keep_checkpoints == "all":
            return None
        return 1 if self.keep_checkpoints == "last" else int(self.keep_checkpoints)

    def to_json(self) -> dict[str, Any]:
        """Return the tree as JSON values.

        Raises:
            ValueError: If a component has no tag, or that of another.
        """
        return {"version": VERSION, **_converter().unstructure(self)}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Config:
        """Return the configuration that `to_json` described.

        Raises:
            ValueError: If the tree has another version, unknown, missing or ill-typed fields, or an unknown tag.
        """
        if not isinstance(tree, dict):
            raise ValueError(f"not a configuration: expected an object with its fields, got {tree!r:.80}")
        tree = dict(tree)
        version = tree.pop("version", None)
        if version != VERSION:
            raise ValueError(f"expected a configuration of version {VERSION}, got {version or 'none'}: only the version"
                             " of pgp that made it can use it; start a new run")  # fmt: skip
        try:
            return _converter().structure(tree, Config)
        except cattrs.BaseValidationError as error:
            reasons = cattrs.transform_error(error, format_exception=_reason)
            raise ValueError("not a configuration: " + "; ".join(reasons)) from error


@functools.cache  # a report opens many runs, and making one takes longer than all that it does
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_unstructure_hook(Path, str)
    converter.register_structure_hook(Path, lambda value, _: Path(value))

    def strict(value: Any, kind: type) -> Any:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise ValueError(f"expected a value of type {kind.__name__}, got {value!r}")

    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, strict)

    def named(value: Any) -> dict[str, Any]:
        return {"tag": _tag(type(value)), **converter.unstructure(value, unstructure_as=type(value))}

    def concrete(tree: dict[str, Any], shelf: type) -> Any:
        fields = dict(tree)
        return converter.structure(fields, _component(fields.pop("tag", ""), shelf))

    converter.register_unstructure_hook_func(lambda kind: kind in COMPONENTS, named)
    converter.register_structure_hook_func(lambda kind: kind in COMPONENTS, concrete)
    return converter


def _reason(error: BaseException, kind: type | None) -> str:
    known = isinstance(error, ValueError) and not isinstance(error, cattrs.BaseValidationError)
    return str(error) if known else format_exception(error, kind)


def components(shelf: type) -> dict[str, type]:
    """Return by tag the configurations that can stand on a shelf: pgp's own, and all others that were imported.

    Raises:
        ValueError: If two of them have one tag.
    """
    _import_own(shelf)
    found: dict[str, type] = {}
    for kind in _subclasses(shelf):
        tag = vars(kind).get("tag")
        if tag is None:
            continue  # a class in between
        other = found.get(tag, kind)
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"expected every {shelf.__qualname__} to have a tag of its own, got {tag!r} in"
                             f" {_title(other)} and {_title(kind)}: rename one")  # fmt: skip
        found[tag] = kind  # the newest, if a module was loaded again
    return found


@functools.cache
def _import_own(shelf: type) -> None:
    """Import all modules of the package that holds the contract of a shelf."""
    package = importlib.import_module(sys.modules[shelf.__module__].__package__ or "")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def _subclasses(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def _title(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _component(tag: str, shelf: type) -> type:
    """Return the class on `shelf` with this tag."""
    known = components(shelf)
    if tag not in known:
        raise ValueError(f"expected the tag of a {shelf.__qualname__}, one of {', '.join(sorted(known))}, got {tag!r}:"
                         " if it is your own, import its module first")  # fmt: skip
    return known[tag]


def _tag(kind: type) -> str:
    """Return the tag of a class on a shelf.

    Raises:
        ValueError: If it has none of its own, or shares it, so that it could not be found again.
    """
    tag = vars(kind).get("tag")
    if not isinstance(tag, str):
        raise ValueError(
            f'expected a tag in {_title(kind)}, such as `tag = "mine"`: config.json names a component by it'
        )
    for shelf in COMPONENTS:
        if issubclass(kind, shelf):
            components(shelf)
    return tag
