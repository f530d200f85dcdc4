"""Build the wheel, and import every module of it from the wheel itself, without the source tree or its extras."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", scratch, str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(scratch).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in names if name.endswith(".py")]
        modules = [module for module in modules if not module.endswith("__main__")]
        for needed in (
            "pgp/py.typed",
            "pgp/weights/demo_vit.safetensors",
            "pgp/datasets/lists/imagenet_r_test.txt.gz",
            "pgp/datasets/lists/imagenet_r_classnames.txt",
        ):
            if needed not in names:
                sys.exit(f"{needed} is missing from {wheel.name}")
        lines = [f"import sys; sys.path.insert(0, {str(wheel)!r})", *(f"import {module}" for module in modules)]
        lines.append(f"assert sys.modules['pgp'].__file__.startswith({str(wheel)!r})")
        subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=scratch)
        print(f"{wheel.name}: {len(modules)} modules import")


if __name__ == "__main__":
    main()
