"""Build the wheel, unpack it as an installer does, and import its modules without the source tree and its extras.

python scripts/check_wheel.py           # needs the packages build and setuptools
python scripts/check_wheel.py --tiny    # prove the check itself on a wheel of one module, without building
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("open_clip", "datasets", "ray")


def build(folder: Path) -> Path:
    """Build the wheel in `folder` from a copy of the sources, without files of earlier builds, and return its path."""
    copy = folder / "sources"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: Path, package: Path) -> int:
    """Import every module from `wheel`, which has to hold all files of `package`; return how many modules there are.

    Raises:
        SystemExit: If a file is missing or a module cannot be imported.
    """
    unpacked = wheel.parent / "unpacked"  # as pip leaves it: what reads a file beside its module finds none in a zip
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(unpacked)
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted = {path.relative_to(package.parent).as_posix() for path in files}
    if missing := sorted(wanted - set(names)):
        sys.exit(f"expected every file of {package.name} in {wheel.name}, which lacks {', '.join(missing)}")
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in names if name.endswith(".py")]
    modules = [module for module in modules if not module.endswith("__main__")]
    lines = [
        "import sys",
        *(f"sys.modules[{extra!r}] = None" for extra in EXTRAS),
        f"sys.path.insert(0, {str(unpacked)!r})",
        *(f"import {module}" for module in modules),
        f"assert sys.modules[{package.name!r}].__file__.startswith({str(unpacked)!r})",
    ]
    if subprocess.run([sys.executable, "-c", "\n".join(lines)], check=False, cwd=wheel.parent).returncode:
        sys.exit(f"expected every module of {wheel.name} to import without {', '.join(EXTRAS)}; see above")
    return len(modules)


def main(argv: Sequence[str] | None = None) -> None:
    """Build the wheel and check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="check a wheel of one module instead")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        if options.tiny:
            package, wheel = Path(scratch) / "small", Path(scratch) / "small-1-py3-none-any.whl"
            package.mkdir()
            (package / "__init__.py").touch()
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.write(package / "__init__.py", "small/__init__.py")
        else:
            package, wheel = ROOT / "src" / "pgp", build(Path(scratch))
        print(f"{wheel.name}: {check(wheel, package)} modules import")


if __name__ == "__main__":
    main()
