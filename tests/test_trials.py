"""Kills, full disks and damaged files, as outsiders tried them: see `trials.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("trials.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and for faults LD_PRELOAD")
@pytest.mark.parametrize("words", [["kills", "50"], ["faults"], ["damages", "100"]])
def test_nothing_is_lost_and_nothing_is_wrong_in_silence(words):
    if words == ["faults"] and shutil.which("cc") is None:
        pytest.skip("no C compiler to build faults.c")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
