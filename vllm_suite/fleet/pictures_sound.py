"""Short sounds made from a seed: tones, chirps and clicks, as WAV files."""

from __future__ import annotations

import io
import random
import wave

SAMPLING_RATE = 16_000


def sound_bytes(seconds: float, seed: int, rate: int = SAMPLING_RATE) -> bytes:
    """A mono 16-bit WAV file of `seconds` at `rate` samples a second.

    The sound changes every quarter of a second, so that each part of it is unlike the others and unlike any part of
    another seed's. Raises ValueError where it has no sample.
    """
    import numpy as np

    count = round(seconds * rate)
    if count < 1:
        raise ValueError(f"a sound of {seconds} s at {rate} Hz has no sample")
    rng = random.Random(seed)
    time = np.arange(count) / rate
    samples = np.zeros(count)
    for begin in range(0, count, max(1, rate // 4)):
        part = slice(begin, min(count, begin + max(1, rate // 4)))
        local = time[part] - time[begin]
        low, bend = rng.uniform(120, 3000), rng.uniform(-4000, 4000)
        samples[part] += rng.uniform(0.2, 0.5) * np.sin(6.283185 * (low + bend * local / 2) * local)
        samples[part] += rng.uniform(0.05, 0.2) * np.sin(6.283185 * rng.uniform(200, 7000) * local)
        if rng.random() < 0.5:
            samples[begin : begin + rate // 200] += 0.3
    pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.tobytes())
    return buffer.getvalue()
