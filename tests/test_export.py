"""An exported run computes what `Predictor` does: for every method, and for every readout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import tiny
from pgp import export as exporting
from pgp import recipes, train
from pgp.cli import main
from pgp.datasets.folder import Folder
from pgp.datasets.synthetic import Synthetic
from pgp.datasets.transforms import BatchTestTransform, Transforms
from pgp.export import export
from pgp.methods.adapter import Adapter
from pgp.methods.clip_prompt import CLIPPrompt, ZeroShot
from pgp.methods.coda_prompt import CODAPrompt
from pgp.methods.lora import LoRA
from pgp.methods.vpt import VPT
from pgp.predict import Predictor
from pgp.projections.base import NoProjection
from pgp.readouts.experts import ExpertLDA
from pgp.readouts.lda import LDA
from pgp.readouts.ranpac import RanPAC
from pgp.system import platforms
from pgp.system.storage import RunError

DATA = Synthetic(noise=0.05).build().test
IMAGES = [DATA.image(i) for i in range(len(DATA))]
METHODS = {
    **recipes.METHODS,
    "dualprompt": tiny.DUALPROMPT,
    "coda": CODAPrompt.Config(pool_size=6, per_task=2, layers=(0, 1)),
    "vpt": VPT.Config(length=2),
    "lora": LoRA.Config(rank=2),
    "adapter": Adapter.Config(rank=4),
}


def trained(folder, **changes):
    torch.set_num_threads(1)
    if isinstance(changes.get("method"), CLIPPrompt.Config | ZeroShot.Config):
        changes["backbone"] = recipes.BACKBONES["demo-clip"]
        changes["projection"] = NoProjection.Config()
    return train.train(tiny.config(epochs=1, **changes), folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with two readouts, of which `lda` is the default."""
    return trained(tmp_path_factory.mktemp("export") / "run", readouts=(LDA.Config(), *tiny.config().readouts[:1]))


def test_an_export_among_images_is_no_class(run, tmp_path):
    for name in ("bee", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    export(run, tmp_path / "exported")
    assert Folder(tmp_path, test_share=0).build().class_names == ("bee", "cat")


def test_the_working_directory_cannot_be_replaced(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="got the working directory, which cannot be replaced: name one in it"):
        export(run, ".")


@pytest.mark.skipif(platforms.WINDOWS, reason="links take rights on Windows")
def test_a_link_to_an_empty_folder_cannot_be_replaced(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(RunError, match="which is a link or the root of a file system and cannot be replaced: name one"):
        export(run, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def answers(folder, images):
    """The probabilities of onnxruntime and of torch."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (found,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(found), torch.export.load(folder / "model.pt2").module()(images)


def check(run, folder, readout=None):
    """Every probability is the predictor's to 1e-4, and the most probable class of every image is the same."""
    exported = export(run, folder, readout)
    predictor = Predictor(run, readout)
    batch = torch.stack([run.config.transforms.test()(image) for image in IMAGES])
    expected = predictor.probabilities(IMAGES)
    assert exported.difference < 1e-4
    for count in (1, len(batch)):
        for found in answers(folder, batch[:count]):
            torch.testing.assert_close(found, expected[:count], atol=1e-4, rtol=0)
            assert found.argmax(1).tolist() == expected[:count].argmax(1).tolist()


def test_probabilities_are_those_of_the_predictor(run, tmp_path):
    check(run, tmp_path / "out")
    meta = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").get_modelmeta().custom_metadata_map
    about = json.loads((tmp_path / "out" / "preprocessing.json").read_text(encoding="utf-8"))
    assert json.loads(meta["classes"]) == about["classes"] == list(Predictor(run).classes)
    assert json.loads(meta["preprocessing"]) == about
    steps = [next(iter(step)) for step in about["steps_before_the_graph"]]
    assert steps == ["turn_upright", "convert", "resize", "center_crop", "rescale", "normalize"]
    assert about["steps_before_the_graph"][2]["resize"]["shorter_side"] == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_exported(name, tmp_path):
    readouts = (LDA.Config(),) if name in ("zero-shot", "head-only") else tiny.config().readouts
    run = trained(tmp_path / "run", method=METHODS[name], readouts=readouts)
    for readout in readouts:
        check(run, tmp_path / readout.name, readout.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dualprompt", "lora", "vpt"])
def test_experts_can_be_exported(name, tmp_path):
    readouts = (ExpertLDA.Config(), ExpertLDA.Config(query=True, patches=True, normalize=True))
    changes = {"experts": "task", "expert_candidates": 2, "projection": NoProjection.Config()}
    run = trained(tmp_path / "run", method=METHODS[name], readouts=readouts, **changes)
    for readout in readouts:
        check(run, tmp_path / readout.name, readout.name)


@pytest.mark.slow
def test_every_readout_can_be_exported(tmp_path):
    kinds = {}  # how old statistics follow drift does not show in a graph
    for one in recipes.READOUTS.values():
        if not one.uses_experts:
            kinds.setdefault((one.tag, one.uses_query, one.uses_patches), one)
    readouts = list(kinds.values())
    readouts = tuple(replace(one, dimensions=60 + i) if isinstance(one, RanPAC.Config) else one
                     for i, one in enumerate(readouts))  # fmt: skip
    run = trained(tmp_path / "run", readouts=readouts)
    for readout in readouts:
        check(run, tmp_path / readout.name, readout.name)


@pytest.mark.parametrize("size", [(32, 32), (50, 61), (100, 37), (20, 33), (31, 200)])
def test_preprocessing_in_the_graph_is_the_test_transform(size):
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("torchvision rounds after each direction of a resize on processors with AVX2 only")
    transforms = Transforms(size=32, resize=36, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = torch.randint(256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([transforms.test()(image) for image in images])
    difference = (BatchTestTransform(transforms)(images) - expected).abs() * torch.tensor(transforms.std)[:, None, None]
    assert float(difference.max()) < 1.001 / 255
    assert float((difference > 1e-6).float().mean()) < 0.02


def test_a_program_needs_only_onnxruntime(run, tmp_path, capsys):
    main.main(["export", str(run.folder), str(tmp_path / "out"), "--preprocess", "--readout", "lda"])
    assert "probabilities of onnxruntime and torch differ by at most" in capsys.readouterr().out
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        pixels = IMAGES[5 * i].permute(1, 2, 0).numpy()
        Image.fromarray(np.kron(pixels, np.ones((2, 3, 1), dtype=np.uint8))).save(path)  # (2H, 3W, 3)
    code = (
        "import json, sys\nimport numpy as np\nimport onnxruntime\nfrom PIL import Image\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "classes = json.loads(session.get_modelmeta().custom_metadata_map['classes'])\n"
        "images = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in sys.argv[2:]])\n"
        "(found,) = session.run(None, {'images': images})\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps([classes[i] for i in found.argmax(1)]))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out" / "model.onnx"), *map(str, paths)]
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert json.loads(printed) == [one.names[0] for one in Predictor(run, "lda").predict(paths)]


def test_bad_requests_say_what_to_do_and_write_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(RunError, match="expected a new or empty folder"):
        export(run, tmp_path / "full")
    with pytest.raises(ValueError, match="expected a readout of this run, one of lda, head, got 'ldb'"):
        export(run, tmp_path / "out", "ldb")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'prompt-gradient-projection\[export\]'"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_other_probabilities_and_a_full_disk_write_nothing(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "TOLERANCE", -1.0)
        with pytest.raises(ValueError, match="nothing was written"):
            export(run, tmp_path / "out")

    def full(*args):
        raise OSError(28, "No space left on device", os.fspath(tmp_path))

    monkeypatch.setattr(exporting.Path, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any((tmp_path / "out").iterdir())


def test_the_model_is_valid_onnx(run, tmp_path):
    export(run, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [each.name for each in model.graph.input] == ["images"]
    assert [each.name for each in model.graph.output] == ["probabilities"]
