"""Drawings and films made from a seed, in any size, with no network and no file of anybody else's.

A drawing has what photographs have and noise has not: a smooth background, large shapes, thin strokes and rows of
marks like lines of text. Two seeds give pictures that differ everywhere.

numpy and Pillow (and OpenCV for films) come with vLLM and are imported inside the functions.
"""

from __future__ import annotations

import io
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIZES = ((64, 64), (112, 112), (224, 224), (160, 320), (336, 336), (448, 256), (640, 480), (1024, 96))
ImageFormat = Literal["png", "jpeg"]


def picture(width: int, height: int, seed: int) -> Image:
    """An RGB drawing of `width` by `height` pixels. Raises ValueError where one of them is below 1."""
    return _draw(width, height, seed, shift=0.0)


def encode(image: Image, form: ImageFormat = "png", quality: int = 90) -> bytes:
    """The bytes of a PNG or a JPEG file; `quality` is JPEG's."""
    buffer = io.BytesIO()
    if form == "jpeg":
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def image_bytes(width: int, height: int, seed: int, form: ImageFormat = "png") -> bytes:
    """A drawing as a file's bytes."""
    return encode(picture(width, height, seed), form)


def frames(width: int, height: int, count: int, seed: int) -> list[Image]:
    """`count` pictures of one scene in which everything moves a little from each to the next."""
    return [_draw(width, height, seed, shift=i / max(count, 1)) for i in range(count)]


def film_bytes(width: int, height: int, count: int, seed: int, fps: int = 4) -> bytes:
    """An MP4 file (MPEG-4 part 2) of `count` frames. Raises RuntimeError where OpenCV cannot write one.

    The encoder is deterministic on one machine; the bytes may differ between OpenCV versions.
    """
    import cv2
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), float(fps), (width, height))
        if not writer.isOpened():
            raise RuntimeError("OpenCV cannot write MP4 files here")
        for frame in frames(width, height, count, seed):
            writer.write(np.asarray(frame)[:, :, ::-1])
        writer.release()
        return path.read_bytes()


def _draw(width: int, height: int, seed: int, shift: float) -> Image:
    from PIL import ImageDraw as drawing

    if width < 1 or height < 1:
        raise ValueError(f"a picture has at least one pixel each way, not {width} by {height}")
    rng = random.Random(seed)
    image = _background(width, height, rng, shift)
    draw = drawing.Draw(image)
    for _ in range(rng.randrange(4, 8)):
        _shape(draw, width, height, rng, shift)
    for _ in range(rng.randrange(2, 4)):
        _lines_of_text(draw, width, height, rng, shift)
    return image


def _background(width: int, height: int, rng: random.Random, shift: float) -> Image:
    """Slow waves in each colour, of other directions and lengths for each seed."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u, v = x / max(width - 1, 1), y / max(height - 1, 1)
    channels = []
    for _ in range(3):
        a, b, phase = rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(0, 6.28)
        low, high = sorted((rng.uniform(0, 255), rng.uniform(0, 255)))
        wave = 0.5 + 0.5 * np.sin(a * u + b * v + phase + 2 * shift)
        channels.append(low + (high - low) * wave)
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8), "RGB")


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _shape(draw: ImageDraw, width: int, height: int, rng: random.Random, shift: float) -> None:
    kind = rng.choice(("ellipse", "rectangle", "polygon", "line"))
    colour = _colour(rng)
    speed_x, speed_y = rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5)
    centre_x, centre_y = rng.random() + speed_x * shift, rng.random() + speed_y * shift
    size = rng.uniform(0.1, 0.4)
    left, right = (centre_x - size) * width, (centre_x + size) * width
    top, bottom = (centre_y - size) * height, (centre_y + size) * height
    if kind == "ellipse":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif kind == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif kind == "polygon":
        points = [(rng.uniform(left, right), rng.uniform(top, bottom)) for _ in range(5)]
        draw.polygon(points, fill=colour)
    else:
        thick = max(1, round(size * min(width, height) / 6))
        draw.line((left, bottom, right, top), fill=colour, width=thick)


def _lines_of_text(draw: ImageDraw, width: int, height: int, rng: random.Random, shift: float) -> None:
    """A few rows of short strokes on a plate, as small print looks from afar."""
    ink, paper = _colour(rng), _colour(rng)
    step = max(2, min(width, height) // rng.randrange(10, 24))
    left, top = round(rng.random() * 0.7 * width), round((rng.random() * 0.7 + 0.2 * shift) * height)
    rows, columns = rng.randrange(2, 5), rng.randrange(4, 14)
    plate = (left - step, top - step, left + columns * step, top + 2 * rows * step)
    draw.rectangle(plate, fill=paper)
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.25:  # the space between words
                continue
            x, y = left + column * step, top + 2 * row * step
            lean, fall = rng.randrange(-step // 2, step // 2 + 1), rng.randrange(1, step + 1)
            draw.line((x, y, x + lean, y + fall), fill=ink, width=max(1, step // 5))
