"""Pictures, sounds and films as `data:` URLs and as content parts of an OpenAI chat request."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from vllm_suite.fleet.pictures import ImageFormat, encode, film_bytes, frames, image_bytes
from vllm_suite.fleet.pictures_sound import sound_bytes

Part = dict[str, Any]


def data_url(media_type: str, data: bytes) -> str:
    """`data` as a `data:` URL; `media_type` like "image/png"."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def image_part(width: int, height: int, seed: int, form: ImageFormat = "png", uuid: str | None = None) -> Part:
    """An `image_url` part with a drawing; `uuid` is vLLM's extra field that names the item."""
    url = data_url(f"image/{form}", image_bytes(width, height, seed, form))
    return _named({"type": "image_url", "image_url": {"url": url}}, uuid)


def video_part(width: int, height: int, count: int, seed: int, fps: int = 4, uuid: str | None = None) -> Part:
    """A `video_url` part with an MP4 film of `count` frames."""
    url = data_url("video/mp4", film_bytes(width, height, count, seed, fps))
    return _named({"type": "video_url", "video_url": {"url": url}}, uuid)


def frames_part(width: int, height: int, count: int, seed: int, uuid: str | None = None) -> Part:
    """A `video_url` part with the frames as JPEG files, in the form that vLLM reads without a video decoder."""
    files = [encode(frame, "jpeg") for frame in frames(width, height, count, seed)]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(file).decode() for file in files)
    return _named({"type": "video_url", "video_url": {"url": url}}, uuid)


def audio_part(seconds: float, seed: int, uuid: str | None = None) -> Part:
    """An `input_audio` part with a WAV file."""
    data = base64.b64encode(sound_bytes(seconds, seed)).decode()
    return _named({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, uuid)


def user_message(parts: Sequence[Part]) -> list[Part]:
    """The messages of a request whose one message has `parts`."""
    return [{"role": "user", "content": list(parts)}]


def _named(part: Part, uuid: str | None) -> Part:
    return part if uuid is None else {**part, "uuid": uuid}
