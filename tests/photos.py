"""Folders of small pictures."""

from __future__ import annotations

from PIL import Image

CLASSES = ("cat", "dog")


def fill(folder, count=3, name="{}.png"):
    """Some images right in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (4, 4), (40 * number, 10, 200)).save(folder / name.format(number))
    return folder


def tree(root, *parts, classes=CLASSES, count=3):
    """A folder with images in `<part>/<class>` for each of `parts`."""
    for part in parts:
        for name in classes:
            fill(root / part / name, count)
    return root
