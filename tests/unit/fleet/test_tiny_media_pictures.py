"""Drawings, films and sounds: real files, the same for the same seed, unlike for another."""

from __future__ import annotations

import base64
import io
import itertools
import wave

import pytest

from vllm_suite.fleet.pictures import SIZES, encode, film_bytes, frames, image_bytes, picture
from vllm_suite.fleet.pictures_parts import (
    audio_part,
    data_url,
    frames_part,
    image_part,
    text_part,
    user_message,
    video_part,
)
from vllm_suite.fleet.pictures_sound import sound_bytes

np = pytest.importorskip("numpy")
images = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (3, 200)])
@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_a_drawing_is_a_file_of_its_size(size: tuple[int, int], form: str) -> None:
    data = image_bytes(*size, 1, form)  # type: ignore[arg-type]
    opened = images.open(io.BytesIO(data))
    assert (opened.format, opened.size, opened.mode) == (form.upper(), size, "RGB")
    assert data == image_bytes(*size, 1, form)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_a_drawing_has_structure_and_another_seed_gives_another(size: tuple[int, int]) -> None:
    one, other = (np.asarray(picture(*size, seed), dtype=float) for seed in (1, 2))
    assert (abs(one - other).max(axis=-1) > 8).mean() > 0.8
    for drawn in (one, other):
        assert drawn.std() > 8
        # Noise would change by about its own spread from pixel to pixel; a drawing does so at edges only.
        steps = abs(np.diff(drawn, axis=1)).max(axis=-1)
        assert (steps < 8).mean() > 0.5
        assert (steps > 16).sum() > 0


def test_jpeg_quality_changes_the_size_of_the_file() -> None:
    image = picture(224, 224, 3)
    assert len(encode(image, "jpeg", quality=30)) < len(encode(image, "jpeg", quality=95))


def test_no_pixel_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        picture(0, 10, 1)


def test_frames_move_a_little_and_a_film_holds_them() -> None:
    cv2 = pytest.importorskip("cv2")
    scene = [np.asarray(frame, dtype=float) for frame in frames(96, 64, 5, 4)]
    for before, after in itertools.pairwise(scene):
        assert 0 < abs(after - before).mean() < 60
    data = film_bytes(96, 64, 5, 4)
    assert data[4:8] == b"ftyp"
    assert data == film_bytes(96, 64, 5, 4)
    capture = cv2.VideoCapture(io.BytesIO(data), cv2.CAP_FFMPEG, [])
    read = []
    while (answer := capture.read())[0]:
        read.append(answer[1][:, :, ::-1].astype(float))
    assert len(read) == 5
    assert all(abs(got - want).mean() < 20 for got, want in zip(read, scene, strict=True))


def test_a_sound_is_a_wav_file_of_its_length() -> None:
    data = sound_bytes(1.3, 1)
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16_000, 1, 20_800)
        one = np.frombuffer(file.readframes(20_800), dtype="<i2").astype(float)
    assert data == sound_bytes(1.3, 1)
    with wave.open(io.BytesIO(sound_bytes(1.3, 2))) as file:
        other = np.frombuffer(file.readframes(20_800), dtype="<i2").astype(float)
    assert one.std() > 1000
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.3
    with pytest.raises(ValueError, match="no sample"):
        sound_bytes(0, 1)


def test_parts_are_what_an_openai_client_sends() -> None:
    kind, _, data = image_part(64, 48, 1, "jpeg")["image_url"]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert images.open(io.BytesIO(base64.b64decode(data))).size == (64, 48)
    assert image_part(8, 8, 1, uuid="a")["uuid"] == "a"
    assert "uuid" not in image_part(8, 8, 1)
    sound = audio_part(0.1, 1)["input_audio"]
    assert (sound["format"], base64.b64decode(sound["data"])[:4]) == ("wav", b"RIFF")
    sequence = frames_part(16, 16, 3, 1)["video_url"]["url"].split(",")
    assert (sequence[0], len(sequence)) == ("data:video/jpeg;base64", 4)
    assert user_message([text_part("a")]) == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert data_url("text/plain", b"hi") == "data:text/plain;base64,aGk="


def test_a_video_part_holds_a_film() -> None:
    pytest.importorskip("cv2")
    url = video_part(32, 32, 2, 1)["video_url"]["url"]
    assert url.startswith("data:video/mp4;base64,")
