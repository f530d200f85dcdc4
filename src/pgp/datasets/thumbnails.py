"""Small pictures of images, for pages."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor


def thumbnail(image: Tensor, size: int) -> str:
    """Return an image `(3, H, W)`, uint8, as a JPEG in a data URI. Its longer side has `size` pixels.

    Pixels of an image that is smaller are repeated, so that they stay visible.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    content = io.BytesIO()
    picture.resize((width, height), resample).save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
