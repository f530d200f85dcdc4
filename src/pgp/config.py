"""The configuration of a run: a tree of frozen dataclasses that are checked when created and can be saved as JSON."""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import cattrs
import torch
import tyro
from cattrs.v import format_exception

from pgp.backbones.base import Backbone
from pgp.datasets.base import DatasetConfig
from pgp.datasets.transforms import Transforms
from pgp.methods.base import Method
from pgp.methods.experts import Experts
from pgp.precision import Precision
from pgp.projections.base import Projection
from pgp.readouts.base import Readout
from pgp.rng import make_generator
from pgp.scenario import Setting
from pgp.system.paths import as_path

COMPONENTS: tuple[type, ...] = (DatasetConfig, Backbone.Config, Method.Config, Projection.Config, Readout.Config)
"""Kinds of components. In JSON, a component carries the tag of its class."""
VERSION = 2
"""Version of the JSON format of a configuration; other versions are refused."""


@dataclass(frozen=True)
class Optimizer:
    """Settings of the optimizer; each task uses a new one."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimizer, as torch implements it."""
    lr: float = 0.03
    """Learning rate per 256 images: the effective rate is `lr * batch_size / 256`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Coefficients of the running averages of adam and adamw (beta1, beta2)."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 0.0
    """Weight decay, as torch's optimizer applies it."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule over the steps of a task."""
    clip: float = 1.0
    """Maximum norm of the gradient over all parameters; 0 turns clipping off."""
    first_lr: float | None = None
    """Learning rate of the first task. If None, `lr`."""
    first_weight_decay: float | None = None
    """Weight decay of the first task. If None, `weight_decay`."""
    prompt_lr_scale: float = 1.0
    """Factor on the learning rate of all parameters outside the head. Deep prompts may need a far smaller rate than the
    head."""
    later_prompt_lr_scale: float | None = None
    """Additional factor on the learning rate of all parameters outside the head, from the second task on; 0 freezes
    them. If None, 1."""

    def __post_init__(self) -> None:
        for name in ("lr", "first_lr"):
            if (rate := getattr(self, name)) is not None and not rate > 0:
                raise ValueError(f"expected optimizer.{name} > 0, got {rate}")
        for name in ("weight_decay", "first_weight_decay", "prompt_lr_scale", "later_prompt_lr_scale", "clip"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"expected optimizer.{name} >= 0, got {value}")
        for name, factor in (("momentum", self.momentum), *(("betas", beta) for beta in self.betas)):
            if not 0 <= factor < 1:
                raise ValueError(f"expected optimizer.{name} in [0, 1), got {getattr(self, name)}")

    def for_task(self, index: int) -> Optimizer:
        """Return the settings for the task with this index, from 0."""
        lr = self.lr if index or self.first_lr is None else self.first_lr
        decay = self.weight_decay if index or self.first_weight_decay is None else self.first_weight_decay
        later = 1.0 if index == 0 or self.later_prompt_lr_scale is None else self.later_prompt_lr_scale
        return replace(self, lr=lr, weight_decay=decay, prompt_lr_scale=self.prompt_lr_scale * later)

    def build(self, method: Method, batch_size: int, *, fused: bool = False) -> torch.optim.Optimizer:
        """Return a new optimizer for all trainable parameters of `method`.

        The factor on the learning rate of each parameter group is stored in the group as `lr_scale`. With `fused`, the
        optimizer itself leaves out steps of gradients that are not finite, so that the CPU needs not wait for them.
        """
        lr, trainable = self.rate(0, 1, batch_size), [p for p in method.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": trainable, "lr_scale": 1.0}]
        if self.prompt_lr_scale != 1:
            prompt_ids = {id(parameter) for parameter in method.prompt_parameters()}
            head = [p for p in trainable if id(p) not in prompt_ids]
            prompts = [p for p in trainable if id(p) in prompt_ids]
            groups = [{"params": head, "lr_scale": 1.0}, {"params": prompts, "lr_scale": self.prompt_lr_scale}]
            groups = [group | {"lr": lr * group["lr_scale"]} for group in groups if group["params"]]
        if self.name == "sgd":
            sgd = torch.optim.SGD(
                groups, lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=fused or None
            )
            if fused and self.momentum:  # torch would not fill the buffers if it left out the first step
                for parameter in trainable:
                    sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(groups, lr, betas=self.betas, weight_decay=self.weight_decay, fused=fused or None)

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int, steps: int, batch_size: int) -> None:
        """Set the learning rate of each parameter group of `optimizer` for `step` of `steps`."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, steps, batch_size) * group["lr_scale"]

    def rate(self, step: int, steps: int, batch_size: int) -> float:
        """Return the learning rate at `step` of `steps`."""
        full = self.lr * batch_size / 256
        return full if self.schedule == "constant" else full * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class Hardware:
    """Devices and processes of a run.

    They affect speed, and results only by rounding, unless the last batch of an epoch has fewer images than there are
    devices: some images then count more than once in it.
    """

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Device type. auto: a CUDA GPU if there is one, else the CPU. gpu: CUDA. mps: Apple's GPU, which has no float64,
    so float64 computations run on the CPU."""
    devices: int = 1
    """Number of devices. There is one process for each, and each batch is divided among them."""
    workers: int = 0
    """Number of processes that load images, per device."""
    pin_memory: bool = True
    """Use pinned (page-locked) memory for batches if there is a GPU. Copies are faster, but use more RAM."""
    micro_batch_size: int | None = None
    """Images per forward and backward pass; gradients are accumulated over the batch. If None, 4 on a CPU, and the
    whole batch on a GPU. Passes over a task's images before or after its training have the same limit."""
    compile: bool = False
    """Compile the encoder's blocks with torch.compile before the first task. If that fails, they run uncompiled."""

    def __post_init__(self) -> None:
        if self.devices < 1 or self.workers < 0 or (self.micro_batch_size is not None and self.micro_batch_size < 1):
            raise ValueError(f"expected devices >= 1, workers >= 0 and micro_batch_size >= 1, got {self}")


@dataclass(frozen=True)
class Config:
    """Settings that determine the result of a run, and its hardware."""

    name: str
    """Name of the recipe. It also names the default run folder, runs/NAME-seedSEED."""
    dataset: DatasetConfig
    backbone: Backbone.Config
    method: Method.Config
    projection: Projection.Config
    readouts: tuple[Readout.Config, ...]
    """Classifiers on the features. All are evaluated; the first one is the default of pgp predict, and comes first in
    tables and figures."""
    transforms: Transforms = field(default_factory=Transforms)
    optimizer: Optimizer = field(default_factory=Optimizer)
    hardware: Annotated[Hardware, tyro.conf.arg(name="")] = field(default_factory=Hardware)
    precision: Precision = "32-true"
    """Precision of the forward and backward pass. 32-true: float32. tf32: float32, with factors of matrix products
    rounded to TF32 on GPUs that have it. bf16-mixed: matrix products in bfloat16. 16-mixed: matrix products in float16,
    with a scaled loss, for GPUs without bfloat16. It affects results, so it cannot change when a run is resumed."""
    tasks: int | None = 10
    """Number of tasks into which the classes are split. If None, as many as the data define (domains, tasks), else 5,
    or fewer for fewer than 10 classes."""
    increment: int | None = None
    """Classes per task, from the second task on. It decides the number of tasks, instead of `tasks`."""
    first_task: int | None = None
    """Classes of the first task, with `increment`, such as half of all. If None, `increment`."""
    adapt: Literal["every-task", "first-task"] = "every-task"
    """Tasks in which everything outside the head is trained: every one, or only the first, as RanPAC does
    (first-session adaptation). With first-task, later tasks train only the head, or nothing if no readout uses it."""
    setting: Setting = "cil"
    """Scenario of continual learning. cil (class-incremental): each task brings new classes. til (task-incremental): as
    cil, but the task of a test image is given. dil (domain-incremental): every task has all classes, in a new domain.
    oil (online): as cil, but each image is seen once, and predicted before training on it."""
    seed: int = 42
    """Seed of every random draw."""
    shuffle: bool = False
    """Shuffle the classes (dil: the domains) with the seed. If not, they stay in the order of the data set."""
    class_order: Path | None = None
    """Text file with one class per line, in the order of learning; or seed-N, for the order that
    `numpy.random.RandomState(N).permutation` draws (seed-1993 in PyCIL, RanPAC, InfLoRA and others). If None,
    class_order.txt in the data folder, or next to the table of images, if it exists."""
    task_file: Path | None = None
    """JSON file with the tasks in the order of learning: an object of task names, each with its list of classes (dil:
    of domains). If None, tasks.json in the data folder, or next to the table of images, if it exists."""
    order: Literal["shuffled", "listed"] = "shuffled"
    """Order of the images within a task, for --setting oil: shuffled with the seed, or as listed in the data."""
    added: Annotated[tuple[DatasetConfig, ...], tyro.conf.Suppress] = ()
    """Data sets added to a finished run, each as one more task; pgp train --resume RUN --add DATA appends one."""
    joint: bool = False
    """Train on all tasks at once, as a single task: joint training, an upper bound for continual learning."""
    epochs: int = 5
    """Epochs per task. With --setting oil, always one."""
    batch_size: int = 16
    """Images per step, over all devices."""
    query: Literal["augmented", "clean"] = "augmented"
    """Which view of a training image its query is computed of, for methods that use queries. augmented: the view that
    is learned, at each step (as published). clean: the image without augmentation, as at test; it is computed once for
    each image, so a step has one forward pass instead of two. The queries of a task are kept in memory while it is
    learned. The method head-only, whose features are the queries, then learns from images without augmentation."""
    eval_batch_size: int = 32
    """Images per batch in evaluation. It changes only the results of --legacy-eval."""
    views: int = 0
    """Number of augmented views of each training image. After a task, readouts are fitted to them and to the image as
    it is. Each view costs one forward pass per image."""
    experts: str = "none"
    """Which tasks have an expert. none: no task. task: every task. A number: that many tasks, from the first. An expert
    is what the method has trained in a task, frozen when the task ends. At test, an LDA classifier of features without
    prompts tells the task of an image."""
    expert_candidates: int = 1
    """Number of experts that an image passes through at test: those of its most probable tasks. Each costs one forward
    pass."""
    drift_images: int = 16
    """Number of test images of each task on which drift is measured, after the task and after every later one; 0 turns
    it off. The results are in metrics.jsonl and pgp report."""
    on_bad_image: Literal["error", "skip"] = "error"
    """How to handle an unreadable image: stop with an error, or skip it."""
    evaluate: str = "every"
    """After which tasks all tasks so far are evaluated. every: after each one, so the number of evaluated images grows
    with the square of the number of tasks. A number N: after every N-th task and the last one; after the others, only
    the new task is evaluated, so that forgetting can be measured. last: after the last task only; forgetting and drift
    are then not measured. It changes nothing that is learned."""
    test_images: int | None = None
    """Number of test images of each task that are evaluated, drawn with the seed and as evenly over the classes as
    possible. If None, all. With fewer, tables have the standard error of the average accuracy."""
    legacy_eval: bool = False
    """Also report accuracy as the published code computes it, in columns named legacy. A test batch holds images of one
    task, and selects prompts by majority vote. Logits cover all classes, seen or not (CLIP: up to the task of the
    batch). This accuracy uses the task of the test images."""
    log_every_steps: int = 20
    """Steps between two log entries of the loss. Each entry synchronises with the GPU."""
    save_every_steps: int = 0
    """Steps between two checkpoints inside a task; 0 saves only after each task."""
    keep_checkpoints: str = "all"
    """Which checkpoints of finished tasks to keep: all, last, or the number of the newest ones. It changes no result;
    pgp eval --every-task evaluates those that are kept."""

    def __post_init__(self) -> None:
        _require_finite(self, "")
        positive = ("tasks", "increment", "first_task", "epochs", "batch_size", "eval_batch_size", "log_every_steps")
        for name in (*positive, "expert_candidates", "test_images"):
            _require_at_least(1, name, getattr(self, name))
        for name in ("save_every_steps", "drift_images", "views"):
            _require_at_least(0, name, getattr(self, name))
        if self.order == "listed" and self.setting != "oil":
            raise ValueError(f"expected setting=oil for order=listed, got {self.setting}: others shuffle each epoch")
        if self.joint and self.setting == "til":
            raise ValueError("expected setting cil with joint, got til: joint training has a single task, so its number"
                             " tells nothing, and the result is no upper bound")  # fmt: skip
        if self.keep_checkpoints not in ("all", "last") and not re.fullmatch("[1-9][0-9]{0,8}", self.keep_checkpoints):
            raise ValueError(f"expected keep_checkpoints all, last or a number, got {self.keep_checkpoints}")
        if self.evaluate not in ("every", "last") and not re.fullmatch("[1-9][0-9]{0,8}", self.evaluate):
            raise ValueError(f"expected evaluate every, last or a number of tasks, got {self.evaluate}")
        for name in ("class_order", "task_file"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_path(value, name))
        self._check_order()
        self._check_experts()
        decay = self.optimizer.weight_decay or self.optimizer.first_weight_decay
        if decay and not self.method.allows_weight_decay:
            raise ValueError(f"expected no weight decay with the method {self.method.tag}, got {decay}: it would change"
                             " what earlier tasks have learned")  # fmt: skip
        if not self.readouts:
            raise ValueError("expected at least one readout, got none")
        if len({readout.name for readout in self.readouts}) < len(self.readouts):
            raise ValueError(f"expected readouts with different names, got {self.readouts}: choose each one once")
        if self.batch_size < self.hardware.devices:
            raise ValueError(f"expected batch_size of at least devices {self.hardware.devices}, got {self.batch_size}")
        if self.hardware.devices > 1 and (self.legacy_eval or self.on_bad_image == "skip"):
            raise ValueError(
                f"expected devices 1 with legacy_eval or on_bad_image=skip, got {self.hardware.devices}: both depend on"
                " whole batches"
            )

    def _check_experts(self) -> None:
        """Raise if experts do not fit the method or the scenario."""
        if self.experts not in ("none", "task") and not re.fullmatch("[1-9][0-9]{0,8}", self.experts):
            raise ValueError(f"expected experts none, task or a number, got {self.experts}")
        if self.experts == "none":
            return
        self.method.as_expert()
        if self.setting in ("oil", "dil"):
            raise ValueError(f"expected setting cil or til with experts, got {self.setting}: an expert is found by its"
                             " classes, once its task has ended")  # fmt: skip
        if self.legacy_eval:
            raise ValueError("expected legacy_eval=False with experts, got True: they were never published")

    def _check_order(self) -> None:
        """Raise if two settings decide the order of learning."""
        chosen = [name for name in ("class_order", "task_file", "shuffle") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"expected one of {' and '.join(chosen)}, got both: each decides the order of learning")
        if self.first_task and not self.increment:
            raise ValueError(f"expected increment with first_task {self.first_task}, got none")
        if self.increment and (self.task_file or self.setting == "dil"):
            raise ValueError("expected no increment with task_file or setting=dil, which say what the tasks are, got"
                             f" {self.increment}")  # fmt: skip
        if self.class_order and self.setting == "dil":
            raise ValueError("expected task_file for the order of domains with setting=dil, got class_order")

    def build_method(self, backbone: Backbone, class_names: Sequence[str]) -> Method:
        """Return the untrained method, with experts if there are any.

        Raises:
            ValueError: If the settings do not fit the encoder, or a readout needs experts and there are none.
        """
        generator = make_generator(self.seed, "init")
        if self.experts == "none":
            if wrong := [readout.name for readout in self.readouts if readout.uses_experts]:
                raise ValueError(f"expected --experts task for the readout {wrong[0]}, got none")
            return self.method.build(backbone, class_names, generator)
        limit = None if self.experts == "task" else int(self.experts)
        method = self.method.as_expert().build(backbone, class_names, generator)
        return Experts(method, len(class_names), limit, self.expert_candidates)

    @property
    def class_order_seed(self) -> int | None:
        """The N of `class_order` seed-N; None if it is no such name."""
        named = re.fullmatch("seed-([0-9]{1,9})", str(self.class_order))
        return int(named[1]) if named else None

    def optimizer_of(self, index: int) -> Optimizer:
        """Return the settings of the optimizer for the task with this index, from 0."""
        settings = self.optimizer.for_task(index)
        return replace(settings, prompt_lr_scale=0.0) if index and self.adapt == "first-task" else settings

    def evaluated_tasks(self, index: int, tasks: int) -> range:
        """Return the indices of the tasks that are evaluated after the task with this index, of `tasks` in all."""
        interval = {"every": 1, "last": tasks}.get(self.evaluate) or int(self.evaluate)
        if index + 1 == tasks or (index + 1) % interval == 0:
            return range(index + 1)
        return range(0) if self.evaluate == "last" else range(index, index + 1)

    @property
    def num_passes(self) -> int:
        """Number of epochs per task, which is 1 with setting=oil."""
        return 1 if self.setting == "oil" else self.epochs

    @property
    def kept_checkpoints(self) -> int | None:
        """Number of the newest checkpoints of finished tasks to keep. If None, all."""
        if self.keep_checkpoints == "all":
            return None
        return 1 if self.keep_checkpoints == "last" else int(self.keep_checkpoints)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values.

        Raises:
            ValueError: If a component has no tag, or the tag of another component.
        """
        return {"version": VERSION, **_converter().unstructure(self)}

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Config:
        """Return the configuration from the JSON values of `to_json`.

        Raises:
            ValueError: If the version or a tag is unknown, or a field is unknown, missing or of the wrong type.
        """
        if not isinstance(tree, dict):
            raise ValueError(f"not a configuration: expected an object with its fields, got {tree!r:.80}")
        tree = dict(tree)
        version = tree.pop("version", None)
        if version != VERSION:
            raise ValueError(f"expected a configuration of version {VERSION}, got {version or 'none'}: only the version"
                             " of pgp that wrote it can read it; start a new run")  # fmt: skip
        try:
            return _converter().structure(tree, Config)
        except cattrs.BaseValidationError as error:
            reasons = cattrs.transform_error(error, format_exception=_reason)
            raise ValueError("not a configuration: " + "; ".join(reasons)) from error


def flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of a JSON tree by dotted name; items of lists are named by their position.

    >>> flatten({"a": {"b": 1}, "c": [2, {"d": 3}], "e": []})
    {'a.b': 1, 'c.0': 2, 'c.1.d': 3}
    """
    if isinstance(tree, list | tuple):
        tree = {str(i): item for i, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {name: tree}
    items = ((f"{name}.{key}" if name else key, item) for key, item in tree.items())
    return {path: leaf for own, item in items for path, leaf in flatten(item, own).items()}


def experiment_settings(config: Config) -> dict[str, Any]:
    """Return the settings by dotted name, without those that do not distinguish experiments."""
    return {
        name: value
        for name, value in flatten(config.to_json()).items()
        if name not in ("seed", "keep_checkpoints") and not name.startswith("hardware.")
    }


def _require_at_least(least: int, name: str, value: int | None) -> None:
    """Raise unless the setting `name` is None, or an integer of at least `least`."""
    if value is not None and type(value) is not int:
        raise TypeError(f"expected {name} as an integer, got {value!r}")
    if value is not None and value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value}")


def _require_finite(value: Any, name: str) -> None:
    """Raise a ValueError if a number in a setting, or in a component's settings, is infinite or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite {name}, got {value}")
    if is_dataclass(value):
        for one in fields(value):
            _require_finite(getattr(value, one.name), f"{name}.{one.name}".lstrip("."))
    elif isinstance(value, tuple):
        for index, one in enumerate(value):
            _require_finite(one, f"{name}.{index}")


@functools.cache  # a report opens many runs, and creating a converter is slow
def _converter() -> cattrs.Converter:
    """Return a converter that is strict about types and writes components with their tags."""
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

    def to_tagged(value: Any) -> dict[str, Any]:
        return {"tag": _tag(type(value)), **converter.unstructure(value, unstructure_as=type(value))}

    def from_tagged(tree: dict[str, Any], base: type) -> Any:
        fields = dict(tree)
        return converter.structure(fields, _component(fields.pop("tag", ""), base))

    converter.register_unstructure_hook_func(lambda kind: kind in COMPONENTS, to_tagged)
    converter.register_structure_hook_func(lambda kind: kind in COMPONENTS, from_tagged)
    return converter


def _reason(error: BaseException, kind: type | None) -> str:
    """Return the message of an error of the converter."""
    if get_origin(kind) is Literal and "not in literal" in str(error):
        value, choices = str(error).partition(" not in literal")[0], ", ".join(map(str, get_args(kind)))
        return f"expected one of {choices}, got {value}"
    own_message = isinstance(error, ValueError) and not isinstance(error, cattrs.BaseValidationError)
    return str(error) if own_message else format_exception(error, kind)


def components(base: type) -> dict[str, type]:
    """Return the configuration classes derived from `base`, by tag: pgp's own, and all others that were imported.

    Raises:
        ValueError: If two classes have the same tag.
    """
    _import_own(base)
    by_tag: dict[str, type] = {}
    for kind in _subclasses(base):
        tag = vars(kind).get("tag")
        if tag is None:
            continue  # an intermediate class
        other = by_tag.get(tag, kind)
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"expected every {base.__qualname__} to have its own tag, got {tag!r} in"
                             f" {_title(other)} and {_title(kind)}: rename one")  # fmt: skip
        by_tag[tag] = kind  # the newest, if a module was loaded again
    return by_tag


@functools.cache
def _import_own(base: type) -> None:
    """Import all modules of the package that defines `base`."""
    package = importlib.import_module(sys.modules[base.__module__].__package__ or "")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def _subclasses(kind: type) -> Iterator[type]:
    """Yield all direct and indirect subclasses."""
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _subclasses(child)


def _title(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _component(tag: str, base: type) -> type:
    """Return the class derived from `base` with this tag."""
    by_tag = components(base)
    if tag not in by_tag:
        raise ValueError(f"expected the tag of a {base.__qualname__}, one of {', '.join(sorted(by_tag))}, got {tag!r}:"
                         " if it is your own, import its module first, in a shell by PGP_IMPORT=MODULE")  # fmt: skip
    return by_tag[tag]


def _tag(kind: type) -> str:
    """Return the tag of a component's class.

    Raises:
        ValueError: If the class has no tag of its own, or shares it with another class.
    """
    tag = vars(kind).get("tag")
    if not isinstance(tag, str):
        raise ValueError(
            f'expected a tag in {_title(kind)}, such as `tag = "mine"`: config.json names a component by it'
        )
    for base in COMPONENTS:
        if issubclass(kind, base):
            components(base)  # raises if the tag is not unique
    return tag
