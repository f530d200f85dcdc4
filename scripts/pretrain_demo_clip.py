"""Pre-train the small CLIP that pgp ships for its demo, on captioned garments and letters, and measure it on digits.

    python scripts/pretrain_demo_clip.py --steps 4000 --output src/pgp/weights
    python scripts/pretrain_demo_clip.py --tiny --output SCRATCH    # test on noise, in seconds

Pictures: Fashion-MNIST, turned by a multiple of 90 degrees ("a coat turned left"), and letters in matplotlib's fonts
("the bold capital letter k"), both jittered. No digit is seen and no digit's name is read. Loss: each picture against
all captions of its batch. Writes demo_clip.safetensors (float16; of the token embedding only the rows that captions and
digits' names use), demo_clip_model.json (the architecture, for open_clip) and demo_clip.json (how it was made).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file

from pgp.backbones.clip import CLIP
from pgp.datasets.base import ArraySplit
from pgp.datasets.digits import Digits
from pgp.datasets.transforms import Transforms
from pretrain_demo_vit import OUTPUT, SIZE, augmented, digits_accuracy, garments

ARCHITECTURE = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 128, "layers": 5, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3},
}
GARMENTS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TURNS = ("upright", "turned left", "upside down", "turned right")
FONTS = {
    "sans": ("DejaVuSans.ttf", "DejaVuSans-Oblique.ttf"),
    "bold": ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf"),
    "serif": ("DejaVuSerif.ttf", "DejaVuSerif-Italic.ttf"),
    "typewriter": ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
}
LETTERS = "abcdefghijklmnpqrstuvwxyz" + "ABCDEFGHJKLMNPQRTUVWXYZ"
"""Without o, O, I and S, which look like digits."""


def letters() -> tuple[torch.Tensor, list[str]]:
    """Return letters `(n, 1, 28, 28)` in [0, 1], white on black, and a caption each."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pictures, captions = [], []
    for style, files in FONTS.items():
        for file in files:
            font = ImageFont.truetype(str(folder / file), 24)
            for letter in LETTERS:
                canvas = Image.new("L", (28, 28))
                ImageDraw.Draw(canvas).text((14, 14), letter, fill=255, font=font, anchor="mm")
                pictures.append(torch.from_numpy(np.asarray(canvas).copy()))
                case = "capital" if letter.isupper() else "small"
                captions.append(f"the {style} {case} letter {letter.lower()}.")
    return torch.stack(pictures).unsqueeze(1).float() / 255, captions


def batch_of(
    data: ArraySplit, glyphs: torch.Tensor, captions: list[str], size: int, draw: torch.Generator
) -> tuple[torch.Tensor, list[str]]:
    """Return half garments, half letters, `(size, 3, 32, 32)`, and their captions."""
    half = size // 2
    chosen = torch.randint(len(data), (half,), generator=draw)
    turns = torch.randint(4, (half,), generator=draw)
    clothes = augmented(data.images[chosen].unsqueeze(1).float() / 255, turns.float(), draw)
    texts = [f"a {GARMENTS[label]} {TURNS[turn]}." for label, turn in zip(data.labels[chosen], turns, strict=True)]
    chosen = torch.randint(len(glyphs), (size - half,), generator=draw)
    marks = augmented(glyphs[chosen], torch.zeros(size - half), draw)
    return torch.cat([clothes, marks]), texts + [captions[i] for i in chosen]


def train(data: ArraySplit, steps: int, batch: int, lr: float, seed: int) -> tuple[open_clip.CLIP, dict[str, float]]:
    """Return the trained model, and the training time in seconds."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    glyphs, captions = letters()
    model = open_clip.CLIP(**ARCHITECTURE).train()
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    decay = [p for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name]
    free = [p for name, p in model.named_parameters() if p.dim() <= 1 or "embedding" in name]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        images, texts = batch_of(data, glyphs, captions, batch, draw)
        unique = sorted(set(texts))
        places = {text: place for place, text in enumerate(unique)}
        image = F.normalize(model.encode_image(images), dim=-1)
        text = F.normalize(model.encode_text(tokenizer(unique)), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        loss = F.cross_entropy(logits, torch.tensor([places[text] for text in texts]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        if step % 100 == 0:
            right = float((logits.argmax(1) == torch.tensor([places[text] for text in texts])).float().mean())
            print(f"step {step}/{steps} loss {float(loss.detach()):.3f} right {right:.2f}"
                  f" {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    return model.eval(), {"seconds": round(time.perf_counter() - started)}


@torch.no_grad()
def zero_shot(clip: CLIP, *, tiny: bool = False) -> float:
    """Return the zero-shot test accuracy on digits; chance is 0.1."""
    data, view = Digits().build(), Transforms(size=SIZE, resize=SIZE).test()
    count = 50 if tiny else len(data.test)
    images = torch.stack([view(data.test.image(i)) for i in range(count)])
    tokens = clip.tokenize([f"the digit {name}." for name in data.class_names])
    text = F.normalize(clip.encode_text(clip.embed_text(tokens), tokens), dim=-1)
    guessed = (F.normalize(clip.project(clip.encode(images)), dim=-1) @ text.T).argmax(1)
    return round(float((guessed == data.test.labels[:count]).float().mean()), 4)


def saved(model: open_clip.CLIP, folder: Path) -> int:
    """Write weights and architecture; return the number of parameters in the file."""
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    clothes = [f"a {garment} {turn}." for garment in GARMENTS for turn in TURNS]
    names = [f"the digit {number}. x a photo of" for number in "0123456789"]
    words = "zero one two three four five six seven eight nine"
    ids = tokenizer([*clothes, *letters()[1], *names, words]).unique()
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "attn_mask"}
    rows = state.pop("token_embedding.weight")[ids]
    state |= {"token_embedding.ids": ids.int(), "token_embedding.rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "demo_clip.safetensors")
    description = json.dumps(ARCHITECTURE, indent=2) + "\n"
    (folder / "demo_clip_model.json").write_text(description, encoding="utf-8", newline="\n")
    return sum(tensor.numel() for tensor in state.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
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
        options.steps, options.batch = 2, 8
    torch.set_num_threads(options.threads)
    model, measured = train(garments(tiny=options.tiny)[0], options.steps, options.batch, options.lr, options.seed)
    shipped = saved(model, options.output)
    folder = options.output
    config = CLIP.Config(str(folder / "demo_clip_model.json"), str(folder / "demo_clip.safetensors"))
    clip = config.build(SIZE)
    record = {
        "data": "Fashion-MNIST's 60,000 training images in 4 turns, and 48 letters in 8 fonts of matplotlib",
        "command": "python scripts/pretrain_demo_clip.py"
        f" --steps {options.steps} --batch {options.batch} --lr {options.lr} --seed {options.seed}",
        "threads": options.threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_shipped": shipped,
        "torch": torch.__version__,
        **measured,
        **digits_accuracy(lambda images: clip.project(clip.encode(images)), tiny=options.tiny),
        "digits_zero_shot": zero_shot(clip, tiny=options.tiny),
    }
    (folder / "demo_clip.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
