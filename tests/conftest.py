from __future__ import annotations

import copy
import functools
import re
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from pgp import recipes, train
from pgp.backbones.clip import CLIP
from pgp.backbones.vit import ViT
from pgp.reports import style

CIFAR_NAMES = re.findall(
    r"\w+",
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle"
    " caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur",
)
"""The first classes of CIFAR-100, which the CLIP goldens know."""
GOLDENS = Path(__file__).parent / "goldens"
# forward values and gradients; after Adam steps, which divide by tiny sqrt(v)
TOLERANCE = {torch.float64: (1e-10, 1e-6), torch.float32: (1e-5, 5e-4)}


def pytest_collection_modifyitems(items):
    """Skip tests that need a GPU where there is none, and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quick_figures(request, monkeypatch):
    """Save figures coarse and without their layout, which takes longer than learning, where nobody looks at them."""
    if request.node.get_closest_marker("looks_at_figures"):
        return
    whole = FigureCanvasAgg.print_png

    def quick(canvas, *arguments, **options):
        canvas.figure.set_layout_engine("none")
        canvas.figure.set_dpi(20)
        whole(canvas, *arguments, **options)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", quick)
    monkeypatch.setattr(style, "arrange", lambda figure: None)


def golden(name: str) -> dict[str, torch.Tensor]:
    """Arrays of the published code, in float64; see ../shared/goldens."""
    return {key: array.clone() for key, array in _golden_arrays(name).items()}


@functools.cache
def _golden_arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDENS / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind != "U"}


def tiny_timm(**arguments):
    """The architecture of the goldens: 32 px, patch 8, width 48, depth 6, 4 heads."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 4, "num_classes": 0, **arguments},
    )


def golden_vit(dtype: torch.dtype = torch.float64) -> ViT:
    weights = {k: v for k, v in golden("tiny_vit_weights.npz").items() if not k.startswith("head.")}
    model = tiny_timm().to(torch.float64)
    model.load_state_dict(weights)
    return ViT(model).to(dtype)


def close(ours, theirs, tolerance):
    theirs = theirs.to(ours.dtype)
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance * max(1, float(theirs.abs().max()))
    )


def columns(projector):
    """Orthonormal columns that span the range of a projector."""
    values, vectors = torch.linalg.eigh(projector)
    return vectors[:, values > 0.5]


def golden_clip(dtype: torch.dtype = torch.float64) -> CLIP:
    """The tiny CLIP of the goldens: 32 px, patch 8, 3 layers of width 64 in both towers."""
    return CLIP(copy.deepcopy(_golden_clip_model())).to(dtype)


@functools.cache
def _golden_clip_model() -> open_clip.CLIP:
    weights = golden("tiny_clip_weights.npz")
    ids, rows = weights.pop("token_embedding.used_ids").long(), weights.pop("token_embedding.used_rows")
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
    model = open_clip.CLIP(32, vision, text, quick_gelu=True).double()
    others = torch.randn(49408, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights["token_embedding.weight"] = others.index_copy(0, ids, rows)
    model.load_state_dict(weights)
    return model


def one_colour(folder, colour, count=5):
    """Images of one colour in slightly different shades."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (40, 36), tuple(value - 3 * number for value in colour)).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def finished_quick(tmp_path_factory):
    """A finished run of the recipe `demo-quick`; do not change it."""
    return train.train(recipes.RECIPES["demo-quick"](), tmp_path_factory.mktemp("serve") / "run").folder


@pytest.fixture
def quick_run(finished_quick, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished_quick, tmp_path / "run")


@pytest.fixture
def red(tmp_path):
    return one_colour(tmp_path / "photos" / "one" / "red", (200, 30, 30))


@pytest.fixture
def green(tmp_path):
    return one_colour(tmp_path / "photos" / "two" / "green", (30, 200, 30))
