"""Components and recipes by name. A recipe is a function that returns a complete configuration."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pgp.backbones.base import Backbone
from pgp.backbones.clip import CLIP
from pgp.backbones.vit import ViT
from pgp.config import Config, Optimizer
from pgp.datasets.base import DatasetConfig
from pgp.datasets.cifar100 import CIFAR100
from pgp.datasets.cub200 import CUB200
from pgp.datasets.digits import Digits
from pgp.datasets.fashion_mnist import FashionMNIST
from pgp.datasets.folder import Folder
from pgp.datasets.hugging_face import HuggingFace
from pgp.datasets.imagenet_r import ImageNetR
from pgp.datasets.manifest import Manifest
from pgp.datasets.synthetic import Synthetic
from pgp.datasets.tiny_imagenet import TinyImageNet
from pgp.datasets.transforms import Transforms
from pgp.methods.adapter import Adapter
from pgp.methods.base import Method
from pgp.methods.clip_prompt import CLIPPrompt, ZeroShot
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.dualprompt import DualPrompt
from pgp.methods.head_only import HeadOnly
from pgp.methods.l2p import L2P
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.projections.base import NoProjection, Projection
from pgp.projections.orthogonal import Orthogonal
from pgp.projections.random import RandomBasis
from pgp.projections.released import ReleasedBasis
from pgp.projections.soft import Soft
from pgp.readouts.base import Readout
from pgp.readouts.experts import ExpertLDA
from pgp.readouts.head import MethodHead
from pgp.readouts.lda import LDA, NCM
from pgp.readouts.logistic import Logistic
from pgp.readouts.ranpac import RanPAC

T = TypeVar("T")
METHODS: dict[str, Method.Config] = {
    one.tag: one
    for one in (
        L2P.Config(),
        DualPrompt.Config(),
        CODAPrompt.Config(),
        VPT.Config(),
        LoRA.Config(),
        Adapter.Config(),
        CLIPPrompt.Config(),
        ZeroShot.Config(),
        HeadOnly.Config(),
    )
}
PROJECTIONS: dict[str, Projection.Config] = {
    one.tag: one
    for one in (Orthogonal.Config(), Soft.Config(), ReleasedBasis.Config(), NoProjection.Config(), RandomBasis.Config())
}
READOUTS: dict[str, Readout.Config] = {
    one.name: one
    for one in (
        MethodHead.Config(),
        *(kind.Config(compensate=how) for kind in (LDA, Logistic) for how in ("none", "shift", "linear")),
        *(
            kind.Config(query=True, compensate=how, shrinkage=0.2)  # features are about twice as wide
            for kind in (LDA, Logistic)
            for how in ("none", "shift", "linear")
        ),
        LDA.Config(patches=True, normalize=True),
        LDA.Config(patches=True, normalize=True, shrinkage=None),
        LDA.Config(query=True, patches=True, normalize=True),
        LDA.Config(query=True, patches=True, normalize=True, compensate="nearby"),
        ExpertLDA.Config(),
        ExpertLDA.Config(query=True, patches=True, normalize=True),
        RanPAC.Config(),
        RanPAC.Config(dimensions=2000),
        RanPAC.Config(dimensions=2000, patches=True, normalize=True),
        NCM.Config(),
    )
}
DATASETS: dict[str, DatasetConfig] = {
    one.tag: one
    for one in (
        Digits(),
        FashionMNIST(),
        CIFAR100(),
        ImageNetR(),
        TinyImageNet(),
        CUB200(),
        Folder(),
        Manifest(),
        HuggingFace(),
        Synthetic(),
    )
}
BACKBONES: dict[str, Backbone.Config] = {
    "vit": ViT.Config(),
    "in21k": ViT.Config("vit_base_patch16_224.orig_in21k"),
    "augreg-in21k": ViT.Config("vit_base_patch16_224.augreg_in21k"),
    "augreg-in21k-ft-in1k": ViT.Config("vit_base_patch16_224.augreg_in21k_ft_in1k"),
    "clip": CLIP.Config(),
    "demo-clip": CLIP.Config("package:demo_clip_model.json", "package:demo_clip.safetensors"),
    "demo-vit": ViT.Config(
        "vit_tiny_patch16_224",
        weights="package:demo_vit.safetensors",
        arguments={"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
}
CHOICES: dict[str, dict[str, Any]] = {
    "method": METHODS,
    "projection": PROJECTIONS,
    "readouts": READOUTS,
    "dataset": DATASETS,
    "backbone": BACKBONES,
}
"""Named choices for each component field of `Config`."""


def projected_updates(energy: float) -> dict[str, Any]:
    """Return projection and rates of our own recipes, as docs/results.md chose them."""
    projection = Orthogonal.Config("input", energy=energy, apply_to="update")
    return {"projection": projection, "optimizer": Optimizer(lr=0.3, prompt_lr_scale=0.1)}


def published_basis(method: Method.Config) -> ReleasedBasis.Config:
    """Return the published code's basis with its constants for `method`."""
    if isinstance(method, DualPrompt.Config):
        return ReleasedBasis.Config(components=50, when="after")
    if isinstance(method, CLIPPrompt.Config):
        return ReleasedBasis.Config(energy=0.9, components=5, when="after")
    return ReleasedBasis.Config()


def demo() -> Config:
    """Train L2P-PGP on digits in 5 tasks of 2 classes, with a small encoder that pgp ships. Minutes, offline."""
    return Config(
        name="demo",
        dataset=Digits(),
        transforms=Transforms(size=32, resize=32, scale=(0.6, 1.0), flip=0.0),
        backbone=BACKBONES["demo-vit"],
        method=L2P.Config(top_k=2),
        projection=Orthogonal.Config(),
        readouts=(MethodHead.Config(), READOUTS["lda+query+linear"]),
        tasks=5,
    )


def cifar100_10_l2p_pgp() -> Config:
    """Train L2P-PGP on CIFAR-100 (10 tasks of 10 classes, ViT-B/16) as published except for the basis."""
    return Config(
        name="10cifar100_l2p_pgp",
        dataset=CIFAR100(),
        backbone=ViT.Config(),
        method=L2P.Config(selection="batch"),
        projection=Orthogonal.Config(),
        readouts=(MethodHead.Config(),),
        tasks=10,
        seed=42,
    )


def cifar100_20_l2p_pgp() -> Config:
    """Train L2P-PGP on CIFAR-100 (20 tasks of 5 classes, ViT-B/16) as published except for the basis."""
    return replace(cifar100_10_l2p_pgp(), name="20cifar100_l2p_pgp", tasks=20, seed=53)


def imr_l2p_pgp() -> Config:
    """Train L2P-PGP on ImageNet-R (10 tasks of 20 classes, ViT-B/16). No settings for it were published."""
    return replace(cifar100_10_l2p_pgp(), name="imr_l2p_pgp", dataset=ImageNetR())


def tinyimagenet_l2p_pgp() -> Config:
    """Train L2P-PGP on TinyImageNet (10 tasks of 20 classes, ViT-B/16) as published except for the basis."""
    return replace(cifar100_10_l2p_pgp(), name="tinyimagenet_l2p_pgp", dataset=TinyImageNet(), seed=52)


def cub200_l2p_pgp() -> Config:
    """Train L2P-PGP on CUB-200 (5 tasks of 40 classes, ViT-B/16) as published except for the basis."""
    return replace(
        cifar100_10_l2p_pgp(),
        name="cub200_l2p_pgp",
        dataset=CUB200(),
        method=L2P.Config(head_type="token", selection="batch"),
        tasks=5,
    )


def demo_dualprompt() -> Config:
    """Train DualPrompt-PGP on digits in 5 tasks of 2 classes, with a small encoder that pgp ships. Minutes, offline."""
    return replace(demo(), name="demo-dualprompt", method=DualPrompt.Config())


def cifar100_10_dualprompt_pgp() -> Config:
    """Train DualPrompt-PGP on CIFAR-100 (10 tasks of 10 classes, ViT-B/16) as published except basis and reshape."""
    return replace(
        cifar100_10_l2p_pgp(),
        name="10cifar100_dualprompt_pgp",
        method=DualPrompt.Config(selection="batch"),
        epochs=20,
        batch_size=24,
        seed=59,
    )


def cifar100_20_dualprompt_pgp() -> Config:
    """Train DualPrompt-PGP on CIFAR-100 (20 tasks of 5 classes, ViT-B/16) as published except basis and reshape."""
    return replace(cifar100_10_dualprompt_pgp(), name="20cifar100_dualprompt_pgp", tasks=20, seed=42)


def imr_dualprompt_pgp() -> Config:
    """Train DualPrompt-PGP on ImageNet-R (10 tasks of 20 classes, ViT-B/16) as published except basis and reshape."""
    return replace(
        cifar100_10_dualprompt_pgp(),
        name="imr_dualprompt_pgp",
        dataset=ImageNetR(),
        method=DualPrompt.Config(expert_length=20),
        optimizer=Optimizer(lr=0.005),
        epochs=50,
        seed=43,
    )


def tinyimagenet_dualprompt_pgp() -> Config:
    """Train DualPrompt-PGP on TinyImageNet (10 tasks of 20 classes, ViT-B/16) as published except basis and reshape."""
    return replace(
        cifar100_10_dualprompt_pgp(), name="tinyimagenet_dualprompt_pgp", dataset=TinyImageNet(), epochs=5, seed=52
    )


def cub200_dualprompt_pgp() -> Config:
    """Train DualPrompt-PGP on CUB-200 (5 tasks of 40 classes, ViT-B/16) as published except basis and reshape."""
    return replace(
        cifar100_10_dualprompt_pgp(), name="cub200_dualprompt_pgp", dataset=CUB200(), tasks=5, epochs=10, seed=51
    )


def with_deep_prompts(recipe: Config) -> Config:
    """Return `recipe` with VPT, projected updates and drift-compensated LDA: the best prompts of docs/results.md."""
    return replace(
        recipe,
        method=VPT.Config(),
        **projected_updates(energy=0.99),
        readouts=(READOUTS["lda+query+linear"], MethodHead.Config()),
    )


def demo_vpt() -> Config:
    """Train VPT with projection on digits in 5 tasks of 2 classes, with a small encoder that pgp ships. Offline."""
    return replace(with_deep_prompts(demo()), name="demo-vpt")


def cifar100_10_vpt_pgp() -> Config:
    """Train VPT with projection on CIFAR-100 (10 tasks of 10 classes, ViT-B/16) with our own settings."""
    return replace(with_deep_prompts(cifar100_10_l2p_pgp()), name="10cifar100_vpt_pgp")


def demo_clip() -> Config:
    """Train CLIP-PGP on digits in 5 tasks of 2 classes, with a small CLIP that pgp ships. Minutes, offline."""
    return replace(
        demo(),
        name="demo-clip",
        backbone=BACKBONES["demo-clip"],
        method=CLIPPrompt.Config(),
        projection=Orthogonal.Config(energy=0.9),
        optimizer=Optimizer("sgd", lr=1.0, schedule="cosine"),
    )


def cifar100_10_clip_pgp() -> Config:
    """Train CLIP-PGP on CIFAR-100 (10 tasks of 10 classes, OpenAI ViT-B/16) as published except for the basis."""
    return replace(
        cifar100_10_l2p_pgp(),
        name="10cifar100_clip_pgp",
        backbone=CLIP.Config(),
        method=CLIPPrompt.Config(),
        projection=Orthogonal.Config(energy=0.9),
        transforms=Transforms(mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276)),
        optimizer=Optimizer(
            "sgd", lr=0.08, weight_decay=2e-4, schedule="cosine", first_lr=0.008, first_weight_decay=5e-4
        ),  # 0.01 and 0.001 per step, because lr is per 256 images
        batch_size=32,
        seed=1997,
    )


def with_lora(recipe: Config) -> Config:
    """Return `recipe` with the best method of docs/results.md: LoRA whose updates keep old outputs, and LDA."""
    return replace(
        recipe,
        method=LoRA.Config(),
        **projected_updates(energy=0.97),
        readouts=(READOUTS["lda+query+patches+normalize"], MethodHead.Config()),
        views=2,
    )


def own() -> Config:
    """Train LoRA with projection on your own images, with ViT-B/16: pgp train own --data ./photos --tasks 5."""
    return with_lora(
        replace(
            cifar100_10_l2p_pgp(), name="own", dataset=Folder(), transforms=Transforms(scale=(0.4, 1.0)), tasks=None
        )
    )


def without_training(config: Config) -> Config:
    """Return `config` with LDA on frozen features, fitted in three passes over the images, two of them augmented.

    Nothing is trained by gradients, and the result does not depend on the order of the tasks.
    """
    return replace(
        config,
        method=HeadOnly.Config(learns=False),
        projection=NoProjection.Config(),
        readouts=(READOUTS["lda+patches+normalize"],),
        views=2,
        drift_images=0,
    )


def quick() -> Config:
    """Fit LDA to frozen features of your own images, in three passes (two of them augmented), without gradients.

    Run it as pgp train quick --data ./photos.
    """
    return replace(without_training(own()), name="quick")


def demo_quick() -> Config:
    """Fit LDA to frozen features of digits, in three passes (two of them augmented), without gradients. Offline."""
    return replace(without_training(demo()), name="demo-quick")


def demo_lora() -> Config:
    """Train LoRA with projection on digits in 5 tasks of 2 classes, with a small encoder that pgp ships. Offline."""
    return replace(with_lora(demo()), name="demo-lora", epochs=2)


def with_experts(recipe: Config) -> Config:
    """Return `recipe` with a LoRA expert for each task, as docs/results.md measured it: no expert changes later."""
    return replace(
        recipe,
        method=LoRA.Config(),
        experts="task",
        expert_candidates=2,
        projection=NoProjection.Config(),
        optimizer=Optimizer(lr=0.1, prompt_lr_scale=0.1),
        readouts=(READOUTS["experts+query+patches+normalize"], MethodHead.Config()),
        views=2,
        drift_images=0,
    )


def own_experts() -> Config:
    """Train a LoRA expert for each task of your own images: pgp train own-experts --data ./photos --tasks 5."""
    return replace(with_experts(own()), name="own-experts")


def demo_experts() -> Config:
    """Train a LoRA expert for each of 5 tasks of 2 digits, with a small encoder that pgp ships. Offline."""
    return replace(with_experts(demo()), name="demo-experts", epochs=2)


def demo_coda() -> Config:
    """Train CODA-Prompt with projection on digits in 5 tasks of 2 classes, with a small encoder. Offline."""
    return replace(demo(), name="demo-coda", method=CODAPrompt.Config(pool_size=50), epochs=2)


def _as_peers(recipe: Config, *, epochs: int, lr: float) -> Config:
    """Return `recipe` with the weights and the class order of most papers on LoRA and CODA-Prompt, and batches of 128.

    `lr` is the learning rate of a step; `Optimizer.lr` is per 256 images.
    """
    return replace(
        recipe,
        backbone=BACKBONES["augreg-in21k-ft-in1k"],
        class_order=Path("seed-1993"),
        batch_size=128,
        epochs=epochs,
        optimizer=Optimizer(lr=2 * lr, schedule="cosine"),
    )


def _coda(recipe: Config) -> Config:
    """Train CODA-Prompt on {data} with projected keys; --no-pgp is the published method."""
    epochs = 50 if isinstance(recipe.dataset, ImageNetR) else 20
    method = CODAPrompt.Config(per_task=100 // (recipe.tasks or 10))
    return replace(_as_peers(recipe, epochs=epochs, lr=0.001), method=method)


def _lora(recipe: Config) -> Config:
    """Train LoRA on {data} with projected updates, as InfLoRA does, but with an input side that learns, too."""
    epochs = 50 if isinstance(recipe.dataset, ImageNetR) else 20
    config = with_lora(_as_peers(recipe, epochs=epochs, lr=0.0005))
    return replace(config, optimizer=Optimizer(lr=0.001, schedule="cosine"), readouts=tuple(reversed(config.readouts)))


def _adapter(recipe: Config) -> Config:
    """Train bottleneck adapters on {data} with projected updates, with our own settings."""
    return replace(_lora(recipe), method=Adapter.Config())


def _experts(recipe: Config) -> Config:
    """Train one LoRA expert per task on {data}, found by class statistics at test, with our own settings."""
    readouts = (READOUTS["experts+query+patches+normalize"], READOUTS["experts"])
    return replace(_lora(recipe), projection=NoProjection.Config(), experts="task", readouts=readouts)


def _nsp2(recipe: Config) -> Config:
    """Train VPT on {data} with the conditions of NSP2 (affinity, aggregation, norm penalty), at a fixed energy."""
    return replace(
        recipe,
        method=VPT.Config(length=4, protect="affinity+aggregation", norm_penalty=0.02),
        **projected_updates(energy=0.99),
        epochs=20 if isinstance(recipe.dataset, ImageNetR) else 10,
    )


def _ranpac(recipe: Config) -> Config:
    """Fit RanPAC to {data}: adapters trained on the first task only, then ridge regression on random features."""
    config = replace(_as_peers(recipe, epochs=20, lr=0.01), adapt="first-task", projection=NoProjection.Config())
    return replace(config, method=Adapter.Config(), readouts=(RanPAC.Config(),), drift_images=0)


DATA: dict[str, tuple[Callable[[], Config], str]] = {
    "10cifar100": (cifar100_10_l2p_pgp, "CIFAR-100 (10 tasks of 10 classes, ViT-B/16)"),
    "20cifar100": (cifar100_20_l2p_pgp, "CIFAR-100 (20 tasks of 5 classes, ViT-B/16)"),
    "imr": (imr_l2p_pgp, "ImageNet-R (10 tasks of 20 classes, ViT-B/16)"),
    "tinyimagenet": (tinyimagenet_l2p_pgp, "TinyImageNet (10 tasks of 20 classes, ViT-B/16)"),
    "cub200": (cub200_l2p_pgp, "CUB-200 (5 tasks of 40 classes, ViT-B/16)"),
    "domains": (own, "your own images of several domains (folders DOMAIN/CLASS, ViT-B/16)"),
}
"""By the first part of a recipe's name, a recipe with the same data, and a description of the data."""
CHANGES: dict[str, Callable[[Config], Config]] = {
    "coda_pgp": _coda,
    "vpt_nsp2": _nsp2,
    "lora_pgp": _lora,
    "adapter_pgp": _adapter,
    "lora_experts": _experts,
    "ranpac": _ranpac,
}
"""By the last part of a recipe's name, what makes it of a recipe with the same data."""


def _recipe(data: str, method: str) -> Callable[[], Config]:
    """Return the recipe of a method on some data."""
    base, words = DATA[data]
    change = CHANGES[method]

    def recipe() -> Config:
        config = replace(change(base()), name=f"{data}_{method}")
        return replace(config, setting="dil", class_order=None) if data == "domains" else config

    recipe.__doc__ = (change.__doc__ or "").format(data=words)
    return recipe


RECIPES: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "own": own,
    "own-experts": own_experts,
    "quick": quick,
    "demo-quick": demo_quick,
    "10cifar100_l2p_pgp": cifar100_10_l2p_pgp,
    "20cifar100_l2p_pgp": cifar100_20_l2p_pgp,
    "imr_l2p_pgp": imr_l2p_pgp,
    "tinyimagenet_l2p_pgp": tinyimagenet_l2p_pgp,
    "cub200_l2p_pgp": cub200_l2p_pgp,
    "demo-dualprompt": demo_dualprompt,
    "10cifar100_dualprompt_pgp": cifar100_10_dualprompt_pgp,
    "20cifar100_dualprompt_pgp": cifar100_20_dualprompt_pgp,
    "imr_dualprompt_pgp": imr_dualprompt_pgp,
    "tinyimagenet_dualprompt_pgp": tinyimagenet_dualprompt_pgp,
    "cub200_dualprompt_pgp": cub200_dualprompt_pgp,
    "demo-vpt": demo_vpt,
    "10cifar100_vpt_pgp": cifar100_10_vpt_pgp,
    "demo-clip": demo_clip,
    "10cifar100_clip_pgp": cifar100_10_clip_pgp,
    "demo-coda": demo_coda,
    "demo-lora": demo_lora,
    "demo-experts": demo_experts,
    **{
        f"{data}_{method}": _recipe(data, method)
        for data in DATA
        for method in CHANGES
        if (data, method) != ("domains", "lora_experts")  # tasks need different classes
    },
}


def lookup(table: Mapping[str, T], name: str, what: str, where: str) -> T:
    """Return the entry `name` of `table`, and raise an error that suggests the nearest name if there is none."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f"perhaps you meant {near[0]!r}; " if near else ""
        raise ValueError(f"unknown {what} {name!r}: {hint}see {where}")
    return table[name]


def with_components(config: Config, names: Mapping[str, Sequence[str]]) -> Config:
    """Return `config` with other components, named as in `CHOICES`. Of several names of a field, the last one counts.

    All names of readouts count. The published basis has the constants of the method.
    """
    for field, choices in CHOICES.items():
        chosen = [choices[name] for name in names.get(field, ())]
        if chosen:
            value: Any = tuple(chosen) if field == "readouts" else chosen[-1]
            config = replace(config, **{field: value})
    named = names.get("projection") or names.get("method")
    if named and isinstance(config.projection, ReleasedBasis.Config):
        config = replace(config, projection=published_basis(config.method))
    return config


def configure(recipe: str | Config, settings: Mapping[str, Any]) -> Config:
    """Return a recipe with other settings, named as the flags of pgp train.

    Args:
        recipe: Name of a recipe, or a complete configuration.
        settings: Value of each setting, such as `{"optimizer.lr": 0.1}`. A component is given by its name, and readouts
            by a list of names.

    Raises:
        ValueError: If a name is unknown, or a value is of the wrong type or out of range.

    >>> config = configure("own", {"backbone": "demo-vit", "optimizer.lr": 0.1, "workers": 2})
    >>> config.backbone.weights, config.optimizer.lr, config.hardware.workers
    ('package:demo_vit.safetensors', 0.1, 2)
    """
    config = recipe if isinstance(recipe, Config) else lookup(RECIPES, recipe, "recipe", "pgp list")()
    values = {name.replace("-", "_"): value for name, value in settings.items()}
    components = {field: values.pop(field) for field in CHOICES if field in values}
    names = {field: [given] if isinstance(given, str) else given for field, given in components.items()}
    for field, given in names.items():
        if not isinstance(given, (list, tuple)) or not given or not all(isinstance(name, str) for name in given):
            what = "names of readouts" if field == "readouts" else f"the name of a {field}"
            raise ValueError(f"expected {what}, got {given!r:.80}")
        for name in given:
            lookup(CHOICES[field], name, field, "pgp list")
    tree = with_components(config, names).to_json()
    for path, value in values.items():
        _set(tree, path, value.item() if isinstance(value, np.generic) else value)
    return Config.from_json(tree)


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    """Replace the value at a dotted path of a configuration as JSON. Settings of the hardware need no prefix."""
    *above, last = path.split(".")
    node: Any = tree["hardware"] if path in tree["hardware"] else tree
    for part in above:
        if isinstance(node, list):  # such as of readouts
            node = node[int(part)] if part.isdecimal() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
    known = [name for name in node if name not in ("tag", "version")] if isinstance(node, dict) else []
    if last not in known:
        near = difflib.get_close_matches(last, known, n=1)
        hint = f"perhaps you meant {'.'.join([*above, near[0]])!r}; " if near else ""
        raise ValueError(f"unknown setting {path!r}: {hint}see pgp train RECIPE --help")
    if isinstance(node[last], dict):
        first = next((name for name in node[last] if name not in ("tag", "version")), None)
        inner = f"such as {path}.{first}" if first else f"as {path} has none"
        raise ValueError(f"expected single settings, {inner}, got {value!r:.80} for {path}")
    node[last] = value
