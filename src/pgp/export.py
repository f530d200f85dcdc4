"""Export what a run has learned as one graph, from images to probabilities, for onnxruntime and for torch.export."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pgp.datasets.transforms import BatchTestTransform
from pgp.predict import Classifier, Predictor
from pgp.runs.run import Run
from pgp.system import platforms, storage
from pgp.system.outputs import make_output, require_replaceable
from pgp.system.paths import StrPath, as_path

INPUT, OUTPUT = "images", "probabilities"
"""Names of the graph's input and output."""
ONNX, TORCH, PREPROCESSING = "model.onnx", "model.pt2", "preprocessing.json"
"""Names of the exported files."""
TOLERANCE = 1e-3
"""Largest difference between a probability of onnxruntime and one of torch that is accepted."""
NUM_CHECKED = 4
"""Number of images on which the graph is compared with torch."""


class Exported(NamedTuple):
    """What `export` wrote."""

    folder: Path
    files: tuple[Path, ...]
    difference: float
    """Largest difference between a probability of onnxruntime and one of torch on images of noise."""


class _Graph(nn.Module):
    """A classifier, behind the test transform if `transform` is not None."""

    def __init__(self, classifier: Classifier, transform: BatchTestTransform | None) -> None:
        super().__init__()
        self.classifier, self.transform = classifier, transform

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.classifier(images if self.transform is None else self.transform(images))
        return probabilities


def export(run: Run | StrPath, output: StrPath, readout: str | None = None, *, preprocess: bool = False) -> Exported:
    """Write the latest finished task of a run as an ONNX model and as a program of `torch.export`.

    Both compute in float32 and take any number of images. Names of classes and preprocessing are in the metadata of
    both files, and in preprocessing.json. The folder is written only if onnxruntime computes what torch does.

    Args:
        run: A run, or the path of its folder.
        output: Folder to write, new or empty.
        readout: Name of one of the run's readouts. If None, the first.
        preprocess: Include resize, crop and normalisation in the graph. Its input is then `(B, 3, H, W)` uint8 of any
            height and width, else `(B, 3, S, S)` float32, preprocessed as preprocessing.json says.

    Raises:
        RunError: If no task of the run is finished, or `output` is not empty.
        ValueError: If the run has no such readout, the extra `export` is not installed, or onnxruntime computes other
            probabilities than torch.
    """
    folder = as_path(output, "a folder for the exported files")
    require_replaceable(folder, "the exported files")
    runtime = _onnxruntime()
    predictor = Predictor(run, readout, device="cpu", precision="32-true")
    classifier, transforms = predictor.classifier, predictor.transforms
    classifier.method = classifier.method.for_export()
    graph = _Graph(classifier, BatchTestTransform(transforms) if preprocess else None).eval()
    about = _description(predictor, preprocess=preprocess)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pgp-export-", dir=folder.parent) as scratch:
            partial = Path(scratch) / "export"
            make_output(partial)
            difference = _write(graph, transforms.size, about, partial, runtime, any_size=preprocess)
            platforms.move_folder(partial, folder)
    except OSError as error:
        raise storage.write_error("write", folder, error) from error
    return Exported(folder, tuple(folder / name for name in (ONNX, TORCH, PREPROCESSING)), difference)


def _onnxruntime() -> Any:
    """Return the module onnxruntime, after a check that all modules of the extra `export` are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("export needs onnx, onnxscript and onnxruntime: pip install"
                         " 'prompt-gradient-projection[export]'") from error  # fmt: skip
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _description(predictor: Predictor, *, preprocess: bool) -> dict[str, Any]:
    """Return what a program needs to know to use the graph, as JSON values."""
    transforms, size = predictor.transforms, predictor.transforms.size
    steps = [
        {"resize": {"shorter_side": transforms.resized, "interpolation": "bicubic", "antialias": True}},
        {"center_crop": {"height": size, "width": size}},
        {"rescale": {"factor": 1 / 255}},
        {"normalize": {"mean": list(transforms.mean), "std": list(transforms.std)}},
    ]
    raw = {"name": INPUT, "shape": ["batch", 3, "height", "width"], "dtype": "uint8", "colours": "RGB"}
    ready = {"name": INPUT, "shape": ["batch", 3, size, size], "dtype": "float32", "colours": "RGB"}
    reading = [
        {"turn_upright": {"by": "EXIF orientation"}},
        {"convert": {"colours": "RGB", "transparency_on": "white"}},
    ]
    return {
        "input": raw if preprocess else ready,
        "steps_before_the_graph": reading if preprocess else [*reading, *steps],
        "steps_in_the_graph": steps if preprocess else [],
        "output": {"name": OUTPUT, "shape": ["batch", len(predictor.classes)], "dtype": "float32"},
        "classes": list(predictor.classes),
        "readout": predictor.readout,
    }


def _write(graph: nn.Module, size: int, about: dict[str, Any], folder: Path, runtime: Any, *, any_size: bool) -> float:
    """Write all files into `folder`, and return the largest difference of a probability; see `_compare`."""
    text = json.dumps(about, ensure_ascii=False, indent=2)
    example, shape = torch.zeros(2, 3, size, size), {0: torch.export.Dim("batch")}
    if any_size:
        example = torch.zeros(2, 3, size + 9, size + 20, dtype=torch.uint8)
        shape |= {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    with torch.no_grad(), _quiet():
        program = torch.export.export(graph, (example,), dynamic_shapes={"images": shape}, strict=False)
        exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT])
        torch.export.save(program, folder / TORCH, extra_files={PREPROCESSING: text})
    assert exported is not None, "torch.onnx.export returns a program, since it was given no file"
    exported.model.metadata_props.update({"classes": json.dumps(about["classes"]), "preprocessing": text})
    exported.model.graph.name = "pgp"
    exported.save(folder / ONNX)
    storage.write(folder / PREPROCESSING, text + "\n")
    return _compare(graph, size, folder / ONNX, runtime, any_size=any_size)


def _compare(graph: nn.Module, size: int, path: Path, runtime: Any, *, any_size: bool) -> float:
    """Return the largest difference of a probability on images of noise, and raise if it is above `TOLERANCE`."""
    height, width = (size + 31, size + 6) if any_size else (size, size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (NUM_CHECKED, 3, height, width), dtype=torch.uint8, generator=generator)
    images = images if any_size else images.float() / 255
    with torch.no_grad():
        expected = graph(images)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"expected onnxruntime to compute the probabilities of torch, but one differs by"
                         f" {difference:.2g}: nothing was written")  # fmt: skip
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings and log messages of the exporters, which concern their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
