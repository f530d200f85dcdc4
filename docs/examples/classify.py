"""Classify a photo with an exported model. It needs onnxruntime, NumPy and Pillow, but not pgp."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, photo = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
upright = ImageOps.exif_transpose(Image.open(photo)).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
pixels = np.asarray(image)  # (H, W, 3) uint8
images = pixels.transpose(2, 0, 1)[np.newaxis]  # (1, 3, H, W)
(probabilities,) = session.run(None, {"images": images})  # (1, classes)
best = probabilities[0].argmax()
print(f"{classes[best]}: {100 * probabilities[0, best]:.1f} %")
