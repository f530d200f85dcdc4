"""Imports go down only, and each outside library has one home."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pgp

SOURCE = Path(__file__).parent.parent / "src" / "pgp"
MODULES = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
LEVELS = [
    {"system", "distributed", "rng", "precision", "progress", "scenario", "subspace"},
    {"backbones", "projections", "readouts", "datasets"},
    {"methods"},
    {"config"},
    {"recipes", "baselines", "runs", "evaluation"},
    {"training", "analysis"},
    {"train"},
    {"predict", "estimator", "export", "hub", "model_card", "reports", "serve", "sweeps"},
    {"cli", "__main__"},
]
"""From the ground up: a module imports from its own level and below; `SEPARATE` folders do not import each other."""
SEPARATE = {"backbones", "projections", "readouts", "datasets", "reports"}
HOMES = {
    "timm": {"backbones"},
    "open_clip": {"backbones"},
    "torchvision": {"datasets"},
    "PIL": {"datasets"},
    "sklearn": {"datasets", "evaluation", "estimator"},
    "requests": {"datasets"},
    "urllib3": {"datasets"},
    "pooch": {"datasets"},
    "filelock": {"system", "datasets", "sweeps", "runs"},
    "datasets": {"datasets"},
    "lightning_fabric": {"evaluation", "training"},
    "matplotlib": {"reports"},
    "jinja2": {"reports"},
    "markupsafe": {"reports"},
    "tyro": {"config", "cli"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "prometheus_client": {"serve"},
    "huggingface_hub": {"hub"},
    "wandb": {"training"},
    "mlflow": {"training"},
    "trackio": {"training"},
    "ray": {"sweeps"},
    "lazy_loader": {"__init__"},
}


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def level(name):
    return next(i for i, names in enumerate(LEVELS) if name in names)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down_only():
    wrong = []
    for path, tree in MODULES.items():
        own = room(path)
        for name in imports(tree):
            parts = name.split(".")
            if parts[0] in HOMES and own not in HOMES[parts[0]]:
                wrong.append(f"{own} imports {name}")
            if parts[0] == "pgp" and len(parts) > 1 and own != "__init__":
                other = parts[1]
                known = any(other in names for names in LEVELS)
                if known and (level(other) > level(own) or (other in SEPARATE and own in SEPARATE and other != own)):
                    wrong.append(f"{own} imports {name}")
                if own == "methods" and other in {"projections", "datasets"}:
                    wrong.append(f"{own} imports {name}")
    assert not wrong


def test_level_0_needs_torch_and_nothing_else():
    for path, tree in MODULES.items():
        if room(path) in LEVELS[0]:
            roots = {name.split(".")[0] for name in imports(tree)}
            others = {"progress": {"rich"}, "system": {"filelock"}}.get(room(path), set())  # torch needs filelock, too
            assert roots <= {"pgp", "torch", *sys.stdlib_module_names, *others}, path


def test_folders_only_re_export():
    """A base class is in `base.py` of its folder, never in `__init__.py`."""
    for path, tree in MODULES.items():
        if path.name == "__init__.py" and path.parent != SOURCE:
            assert all(isinstance(node, ast.Expr | ast.ImportFrom) for node in tree.body), path


def test_one_module_prints_and_makes_all_text_safe():
    for path, tree in MODULES.items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        assert path == SOURCE / "cli" / "show.py" or not calls, path


def test_what_needs_every_process_says_so():
    """A function that calls a collective tells it in its docstring; so does one that passes the duty on."""
    wrong = []
    for path, tree in MODULES.items():
        known = {"all_reduce_sum_", "all_gather_rows", "all_gather_object"} & {
            name.rpartition(".")[2] for name in imports(tree) if "distributed" in name
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
                names = {call.id for call in calls if isinstance(call, ast.Name)} & known
                names |= {call.attr for call in calls if isinstance(call, ast.Attribute)} & {"all_reduce", "has_enough"}
                if names and "ollective" not in (ast.get_docstring(node) or ""):
                    wrong.append(f"{path}:{node.lineno} {node.name} calls {names}")
    assert not wrong


def test_float64_on_a_device_is_asked_for_in_one_place():
    """Apple's MPS has no float64: `to_float64` takes to the CPU what needs it."""
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "double":
                raise AssertionError(f"{path}:{node.lineno}: use pgp.subspace.to_float64")
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "to" and room(path) != "subspace":
                assert "torch.float64" not in ast.unparse(node), f"{path}:{node.lineno}: use pgp.subspace.to_float64"


@pytest.mark.parametrize("heavy", ["torch", "timm", "matplotlib"])
def test_importing_pgp_is_light(heavy):
    code = f"import pgp, sys; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_those_of_the_stub():
    stub = ast.parse(Path(pgp.__file__).with_suffix(".pyi").read_text())
    homes = {node.names[0].name: node.module for node in stub.body if isinstance(node, ast.ImportFrom)}
    assert sorted(homes) == pgp.__all__ == dir(pgp)
    for name, home in homes.items():
        assert getattr(pgp, name) is getattr(importlib.import_module(f"pgp.{home}"), name)
    with pytest.raises(AttributeError, match=r"No pgp attribute Orthogona$"):
        _ = pgp.Orthogona


@pytest.mark.slow
def test_optional_libraries_are_optional():
    code = "import sys; sys.modules['open_clip'] = None; import pgp.cli.main; pgp.cli.main.main(['list'])"
    assert "clip" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_text_files_are_opened_with_their_encoding():
    """Else it is that of the system: another one on Windows, or ASCII."""
    for path, tree in MODULES.items():
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            named = any(keyword.arg == "encoding" for keyword in call.keywords)
            of = getattr(call.func.value, "id", "")
            if call.func.attr in {"read_text", "write_text"} and of != "platforms":
                assert named, f"{path}:{call.lineno}"
            modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
            if call.func.attr == "open" and (not call.args or set("".join(map(str, modes))) & set("rwa")):
                binary = any("b" in str(mode) for mode in modes) or of in {"member", "Image", "Run", "os"}
                assert named or binary, f"{path}:{call.lineno}"


def test_only_training_assigns_to_session_and_state():
    wrong = []
    for path, tree in MODULES.items():
        if room(path) == "training" or not any("pgp.training." in name for name in imports(tree)):
            continue
        for node in ast.walk(tree):
            stores = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stores and ast.unparse(node.value) in ("session", "state"):
                wrong.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert not wrong


def test_what_a_checkpoint_holds_is_the_training_state():
    """The names of a checkpoint are made in one place, and parsed there."""
    for path, tree in MODULES.items():
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str]
        inside = path == SOURCE / "runs" / "checkpoint.py"
        assert inside or not [text for text in strings if text == "task-" or text.startswith("task-0")], path


def test_test_images_are_transformed_in_one_place():
    places = [path for path in MODULES if '("test",)' in path.read_text()]
    assert places == [SOURCE / "evaluation" / "accuracy.py"]
