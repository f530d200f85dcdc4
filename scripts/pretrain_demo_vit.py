"""Pre-train the small vision transformer that pgp ships for its demo, on Fashion-MNIST, and measure it on digits.

    python scripts/pretrain_demo_vit.py --epochs 10 --output src/pgp/weights
    python scripts/pretrain_demo_vit.py --tiny --output SCRATCH    # test on noise, in seconds

Task: which of ten garments, turned by which multiple of 90 degrees (40 classes; turning makes it look at shapes), under
random scale, shift, slant and contrast. It never sees a digit. Writes demo_vit.safetensors (float16) and demo_vit.json,
which says how it was made: data, time, threads, accuracy, and a logistic regression on its features of scikit-learn's
digits against one on raw pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pgp.backbones.vit import ViT
from pgp.datasets.base import ArraySplit
from pgp.datasets.digits import Digits
from pgp.datasets.fashion_mnist import FashionMNIST
from pgp.datasets.transforms import Transforms
from pgp.recipes import BACKBONES

SIZE = 32
GARMENTS, TURNS = 10, 4
OUTPUT = Path(__file__).resolve().parent.parent / "src" / "pgp" / "weights"


def garments(*, tiny: bool) -> tuple[ArraySplit, ArraySplit]:
    """Return the training and test images of Fashion-MNIST, or noise for `--tiny`."""
    if tiny:
        noise = torch.randint(256, (24, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return ArraySplit(noise[:16], torch.arange(16) % GARMENTS), ArraySplit(noise[16:], torch.arange(8))
    data = FashionMNIST().build()
    assert isinstance(data.train, ArraySplit)
    assert isinstance(data.test, ArraySplit)
    return data.train, data.test


def augmented(images: torch.Tensor, turns: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Turn and jitter images (B, 1, 28, 28) in [0, 1]; return them as (B, 3, 32, 32)."""
    B = len(images)
    angle = turns * (math.pi / 2) + (torch.rand(B, generator=draw) - 0.5) * 0.5
    zoom = 0.8 + 0.5 * torch.rand(B, generator=draw)
    slant = (torch.rand(B, generator=draw) - 0.5) * 0.4
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    shift = (torch.rand(B, 2, generator=draw) - 0.5) * 0.25
    rows = torch.stack([cos, -sin + slant, shift[:, 0], sin, cos, shift[:, 1]], 1).view(B, 2, 3)
    grid = F.affine_grid(rows, [B, 1, SIZE, SIZE], align_corners=False)
    warped = F.grid_sample(images, grid, align_corners=False)
    contrast = 0.5 + 0.5 * torch.rand(B, 1, 1, 1, generator=draw)
    noise = 0.1 * torch.rand(B, 1, 1, 1, generator=draw) * torch.randn(warped.shape, generator=draw)
    return (warped * contrast + noise).clamp(0, 1).expand(-1, 3, -1, -1)


def train(
    data: ArraySplit, test: ArraySplit, epochs: int, batch: int, lr: float, seed: int
) -> tuple[Any, dict[str, float]]:
    """Return the trained model, the training time in seconds, and the accuracy on upright test images."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    config = BACKBONES["demo-vit"]
    assert isinstance(config, ViT.Config)
    model = timm.create_model(config.model, img_size=SIZE, num_classes=GARMENTS * TURNS, **config.arguments)
    decay = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    steps = epochs * (len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    started, step = time.perf_counter(), 0
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=draw)
        total = 0.0
        for chosen in order.split(batch):
            if len(chosen) < batch:
                continue
            images = data.images[chosen].unsqueeze(1).float() / 255
            turns = torch.randint(TURNS, (batch,), generator=draw)
            logits = model(augmented(images, turns.float(), draw))
            loss = F.cross_entropy(logits, data.labels[chosen] * TURNS + turns, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
            step += 1
            if step % 50 == 0:
                print(f"epoch {epoch + 1} step {step}/{steps} loss {float(loss.detach()):.3f}", flush=True)
        print(f"epoch {epoch + 1}: loss {total / (len(data) // batch):.3f},"
              f" {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    seconds = time.perf_counter() - started
    return model, {"seconds": round(seconds), "fashion_mnist_test_accuracy": upright_accuracy(model, test)}


@torch.no_grad()
def upright_accuracy(model: torch.nn.Module, split: ArraySplit) -> float:
    """Return the accuracy on images that are not turned."""
    model.eval()
    hits = 0
    for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True):
        padded = F.interpolate(images.unsqueeze(1).float() / 255, SIZE, mode="bilinear").expand(-1, 3, -1, -1)
        hits += int((model(padded)[:, ::TURNS].argmax(1) == labels).sum())
    return hits / len(split)


@torch.no_grad()
def digits_accuracy(encode: Callable[[torch.Tensor], torch.Tensor], *, tiny: bool = False) -> dict[str, float]:
    """Return the accuracy of a logistic regression on `encode(images)` of digits, and of one on their raw pixels."""
    data, view = Digits().build(), Transforms(size=SIZE, resize=SIZE).test()
    features, pixels, labels = [], [], []
    for split in (data.train, data.test):
        assert isinstance(split, ArraySplit)
        count = min(len(split), 50) if tiny else len(split)
        images = torch.stack([view(split.image(i)) for i in range(count)])
        features.append(encode(images).numpy())
        pixels.append(split.images[:count].flatten(1).numpy() / 255)
        labels.append(split.labels[:count].numpy())
    scores = {}
    for name, (train_rows, test_rows) in {"features": features, "raw_pixels": pixels}.items():
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)).fit(train_rows, labels[0])
        scores[f"digits_linear_probe_{name}"] = round(float(probe.score(test_rows, labels[1])), 4)
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--tiny", action="store_true", help="rehearse on noise; needs an --output of its own")
    options = parser.parse_args(argv)
    if options.tiny and options.output == OUTPUT:
        parser.error("--tiny needs --output, for the weights that are shipped lie where it writes otherwise")
    if options.tiny:
        options.epochs, options.batch = 1, 8
    torch.set_num_threads(options.threads)
    data = garments(tiny=options.tiny)
    model, measured = train(*data, options.epochs, options.batch, options.lr, options.seed)
    measured |= digits_accuracy(lambda images: model.eval().forward_features(images)[:, 0], tiny=options.tiny)
    options.output.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    save_file(weights, options.output / "demo_vit.safetensors")
    record = {
        "data": "Fashion-MNIST, 60,000 training images, 40 classes (garment x turn)",
        "command": "python scripts/pretrain_demo_vit.py"
        f" --epochs {options.epochs} --batch {options.batch} --lr {options.lr} --seed {options.seed}",
        "threads": options.threads,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "torch": torch.__version__,
        **measured,
    }
    (options.output / "demo_vit.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
