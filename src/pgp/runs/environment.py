"""Description of the environment of a run: versions, commit and hardware."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pgp.system import platforms


def describe_environment() -> dict[str, Any]:
    """Return versions, commit and hardware."""
    packages = ("prompt-gradient-projection", "torch", "torchvision", "timm", "lightning-fabric", "numpy")
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
        "commit": _commit(),
        "versions": versions,
    }


BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""CPU flags for matrix products in bfloat16. Results of a seed differ between CPUs with other flags."""


def _processor() -> dict[str, Any]:
    """Return the name of the CPU, and the properties that decide how products are rounded.

    The name alone is not enough, because clouds offer several processors under one name.
    """
    facts = platforms.cpu_facts()
    flags = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    return {
        "processor": facts.get("model name") or platform.processor(),
        "processor_model": " ".join(facts[key] for key in ("cpu family", "model", "stepping") if key in facts),
        "vectors": " ".join([torch.backends.cpu.get_cpu_capability(), *(name for name in BF16 if name in flags)]),
    }


def _commit() -> str | None:
    """Return the commit of pgp; None if this is no clone, such as an installation in a repository of the user."""
    here = Path(__file__)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        _git(here.parent, "ls-files", "--error-unmatch", here.name)  # fails unless the repository has this file
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12")
    return None


def _git(folder: Path, *words: str) -> str:
    """Return what a git command prints in `folder`."""
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, encoding="utf-8", check=True, timeout=10
    ).stdout.strip()
