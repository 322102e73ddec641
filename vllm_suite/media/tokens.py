"""Tokens, tiles and patches of one item, by the rules of each family's image or sound processor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageCost:
    """What one item is to the encoder and to the language model.

    Attributes:
        tiles: pieces that are encoded independently of each other.
        patches: patches of each piece, which attend to each other.
        tokens: rows of the encoder's output.
        extra: tokens around them in the prompt.
    """

    tiles: int
    patches: int
    tokens: int
    extra: int

    @property
    def prompt_tokens(self) -> int:
        """What the image takes of the window."""
        return self.tokens + self.extra


Rule = Callable[[int, int], ImageCost]
"""Width and height in pixels to the cost."""

SoundRule = Callable[[float], ImageCost]
"""Seconds of sound to the cost; its patches are positions of the encoder."""


def qwen(patch: int, merge: int, least: int, most: int) -> Rule:
    """Any size in multiples of a merged patch, between `least` and `most` pixels; the image is one piece."""

    def rule(width: int, height: int) -> ImageCost:
        unit = patch * merge
        w, h = (round(length / unit) * unit for length in (width, height))
        if w * h > most:
            scale = math.sqrt(width * height / most)
            w, h = (max(unit, math.floor(length / scale / unit) * unit) for length in (width, height))
        elif w * h < least:
            scale = math.sqrt(least / (width * height))
            w, h = (math.ceil(length * scale / unit) * unit for length in (width, height))
        tokens = w * h // unit**2
        return ImageCost(tiles=1, patches=tokens * merge**2, tokens=tokens, extra=2)

    return rule


def intern(size: int, patches: int, tokens: int, most: int, least: int = 1) -> Rule:
    """The grid of up to `most` squares whose shape is nearest, and a thumbnail where there are several."""
    grids = sorted(
        {(c, r) for n in range(least, most + 1) for c in range(1, n + 1) for r in range(1, n + 1)
         if least <= c * r <= most},
        key=lambda grid: grid[0] * grid[1],
    )  # fmt: skip

    def rule(width: int, height: int) -> ImageCost:
        best, nearest = (1, 1), math.inf
        for columns, rows in grids:
            distance = abs(width / height - columns / rows)
            # Of two grids of one shape the larger is taken where the image fills more than half of it.
            larger = width * height > 0.5 * size**2 * columns * rows
            if distance < nearest or (distance == nearest and larger):
                best, nearest = (columns, rows), distance
        tiles = best[0] * best[1]
        tiles += tiles > 1
        return ImageCost(tiles=tiles, patches=patches, tokens=tiles * tokens, extra=2)

    return rule


def minicpm(size: int, patch: int, tokens: int, most: int) -> Rule:
    """The whole image, and where it is larger than one slice a grid of up to `most` slices."""

    def rule(width: int, height: int) -> ImageCost:
        wanted = min(math.ceil(width * height / size**2), most)
        tiles, rows = 1, 0
        if wanted > 1:
            counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= most]
            grids = [(n // r, r) for n in counts for r in range(1, n + 1) if n % r == 0]
            shape = math.log(width / height)
            columns, rows = min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))
            tiles += columns * rows
        # Each slice stands between two marks; rows of slices are separated by a line end.
        extra = 2 * tiles + max(0, rows - 1)
        return ImageCost(tiles=tiles, patches=(size // patch) ** 2, tokens=tiles * tokens, extra=extra)

    return rule


def fixed(patches: int, tokens: int, extra: int = 0) -> Rule:
    """One square, whatever the image."""

    def rule(width: int, height: int) -> ImageCost:
        return ImageCost(tiles=1, patches=patches, tokens=tokens, extra=extra)

    return rule


def anyres(grids: Sequence[Sequence[int]], size: int, patch: int, most: int) -> Rule:
    """LLaVA-OneVision: the best of the given resolutions (height, width), padding cut away, and the whole image."""
    width_in_patches = size // patch

    def rule(width: int, height: int) -> ImageCost:
        best, used, wasted = (size, size), -1, 0
        for h, w in grids:
            scale = min(w / width, h / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            waste = h * w - effective
            if effective > used or (effective == used and waste < wasted):
                best, used, wasted = (h, w), effective, waste
        down, across = best[0] // size, best[1] // size
        h, w = width_in_patches * down, width_in_patches * across
        if width / height > w / h:
            h -= 2 * ((h - int(round(height * (w / width), 7))) // 2)
        else:
            w -= 2 * ((w - int(round(width * (h / height), 7))) // 2)
        ratio = math.sqrt(h * w / (most * width_in_patches**2))
        if ratio > 1.1:
            h, w = int(h // ratio), int(w // ratio)
        # Each row ends with a token of its own.
        tokens = h * w + h + width_in_patches**2
        return ImageCost(tiles=1 + down * across, patches=width_in_patches**2, tokens=tokens, extra=0)

    return rule


def whisper(positions: int, pool: int, piece: float = 30.0) -> SoundRule:
    """Sound in pieces of 30 s, each padded to its end for the encoder; padding gives no tokens. `pool` joins rows."""

    def rule(seconds: float) -> ImageCost:
        pieces = max(1, math.ceil(seconds / piece))
        # A position is two mel frames of 10 ms.
        used = min(pieces * positions, math.ceil(seconds * positions / piece))
        return ImageCost(tiles=pieces, patches=positions, tokens=max(1, used // pool), extra=2)

    return rule
