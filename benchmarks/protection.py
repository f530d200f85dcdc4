"""What protects: deep prompts under every projection and every control, read by every readout, on two sets of pictures.

    python benchmarks/protection.py tune --data emoji                # learning rates, on pictures kept for tuning alone
    python benchmarks/protection.py run --data emoji --part 1/2 &    # rows and seeds that are not in the results yet
    python benchmarks/protection.py run --data emoji --part 2/2
    python benchmarks/protection.py table                            # docs/results/protection.md from protection.jsonl

`--data emoji`: 200 emoji, needs ../shared/data/emoji_renditions_200.npz beside the checkout. `--data kanji`: 200
characters, made by benchmarks/kanji_data.py. Both need ../shared/backbones/vit_small_patch14_imgfocus.safetensors.

Each finished run is one line of docs/results/protection.jsonl (of protection_tuning.jsonl for tune), and is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import emoji
import kanji_data
import torch

from pgp import metrics
from pgp.config import Config, Hardware, Optimizer
from pgp.environment import environment
from pgp.methods.vpt import VPT
from pgp.readouts.lda import LDA
from pgp.readouts.sequential import Sequential
from pgp.train import train

RESULTS = emoji.ROOT / "docs" / "results" / "protection.jsonl"
TUNING = emoji.ROOT / "docs" / "results" / "protection_tuning.jsonl"
RATES = (0.03, 0.1, 0.3, 1.0)


def folder(data: str, *, tuning: bool) -> Path:
    """The pictures as an image folder; those for tuning hold none of the test pictures."""
    if data == "kanji":
        return kanji_data.folder("validation") if tuning else kanji_data.folder()
    return emoji.folder(emoji.VALIDATION, left_out=emoji.TEST) if tuning else emoji.folder(emoji.TEST)


def base(data: str, seed: int, *, tuning: bool = False) -> Config:
    """What all rows share: 10 tasks of 20 classes at 84 px, 5 epochs of deep prompts."""
    config = emoji.base(folder(data, tuning=tuning), seed)
    return replace(
        config,
        name=data,
        views=replace(config.views, size=84, resize=84),
        method=VPT.Config(length=8),
        optimizer=Optimizer(lr=0.1),
        hardware=Hardware(precision="bf16-mixed"),
        epochs=5,
    )


def measure(config: Config) -> dict[str, Any]:
    """One run, in a folder that is thrown away: final figures by readout, in [0, 1]."""
    scratch = Path(tempfile.mkdtemp())
    started = time.perf_counter()
    try:
        run = train(config, scratch / "run")
        figures = {
            column: {
                figure: getattr(metrics, figure)(matrix)
                for figure in ("average_accuracy", "forgetting", "average_incremental_accuracy")
            }
            for column, matrix in run.matrices().items()
        }
    finally:
        shutil.rmtree(scratch)
    about = environment()
    kept = {key: about[key] for key in ("commit", "processor", "threads")}
    return {"seconds": round(time.perf_counter() - started, 1), "figures": figures, **kept}


def tune(data: str, part: int, parts: int) -> None:
    """Figures per learning rate of unprojected prompts; the test pictures are not looked at."""
    for lr in RATES[part - 1 :: parts]:
        if (data, lr) not in {(line["data"], line["lr"]) for line in emoji._lines(TUNING)}:
            config = replace(base(data, 100, tuning=True), optimizer=Optimizer(lr=lr))
            config = replace(config, readouts=(Sequential.Config(), LDA.Config()))
            emoji._append(TUNING, {"data": data, "lr": lr, "seed": 100, **measure(config)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune",))
    parser.add_argument("--data", choices=("emoji", "kanji"), default="emoji")
    parser.add_argument("--part", default="1/1", help="which share of the runs, such as 1/2")
    options = parser.parse_args()
    if missing := [str(path) for path in (emoji.IMAGES, emoji.WEIGHTS) if not path.is_file()]:
        sys.exit(f"skipped: this benchmark needs {', '.join(missing)}, which are not part of the project")
    torch.set_num_threads(1)
    part, parts = map(int, options.part.split("/"))
    tune(options.data, part, parts)


if __name__ == "__main__":
    main()
