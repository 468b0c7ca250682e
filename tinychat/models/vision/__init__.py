"""Vision towers: from the pixels of an image and an mmproj file to what a text model sees.

`VisionEncoder` opens a file and encodes images; `projector_of` and `KNOWN` tell beforehand whether
it can, `read_tower` which programs it will run.
"""
from tinychat.models.vision.config import projector_of
from tinychat.models.vision.encoder import KNOWN, EncodedImage, VisionEncoder, read_tower
from tinychat.models.vision.tower import ImageBlock

__all__ = ["KNOWN", "EncodedImage", "ImageBlock", "VisionEncoder", "projector_of", "read_tower"]
