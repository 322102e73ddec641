"""The tiny tokenizer with the media tokens of all families, and a chat template that writes them.

The first ids are those of the text checkpoint's tokenizer, so that plain text has the same tokens in both.
"""

from __future__ import annotations

import json
from pathlib import Path

from vllm_suite.fleet.tiny_tokenizer import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    PAD,
    RESERVED,
    SPECIAL,
    SYSTEM,
    UNKNOWN,
    USER,
    VOCAB_SIZE,
    merges,
)

IMAGE, VIDEO, AUDIO = "<|image_pad|>", "<|video_pad|>", "<|AUDIO|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
AUDIO_START, AUDIO_END = "<|audio_bos|>", "<|audio_eos|>"
TILES, TILES_START, TILES_END = "<IMG_CONTEXT>", "<img>", "</img>"
LLAVA_IMAGE, LLAVA_VIDEO = "<image>", "<video>"
MEDIA_TOKENS = (
    IMAGE,
    VIDEO,
    VISION_START,
    VISION_END,
    AUDIO,
    AUDIO_START,
    AUDIO_END,
    TILES,
    TILES_START,
    TILES_END,
    LLAVA_IMAGE,
    LLAVA_VIDEO,
)


def token_id(token: str) -> int:
    """The id of a media token."""
    return VOCAB_SIZE + MEDIA_TOKENS.index(token)


def special_ids() -> list[int]:
    """Ids that stand for no text: the checkpoint never prefers them, so that answers do not end or break early."""
    return [*range(len(SPECIAL)), *range(VOCAB_SIZE, VOCAB_SIZE + 2 * len(MEDIA_TOKENS))]


def chat_template(placeholders: dict[str, str], numbered: bool = False) -> str:
    """A template over content parts; `placeholders` has the text of a part by its kind, `numbered` counts them."""
    part = "{% if part['type'] == 'text' %}{{ part['text'] }}"
    for kind, text in placeholders.items():
        part += "{% elif part['type'] == '" + kind + "' or '" + kind + "_url' in part %}"
        if numbered:
            part += "{% set count.value = count.value + 1 %}{{ 'Audio ' ~ count.value ~ ': ' }}"
        part += "{{ '" + text + "' }}"
    part += "{% endif %}"
    return (
        "{% set count = namespace(value=0) %}{{ bos_token }}"
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}" + part + "{% endfor %}{% endif %}"
        "{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


def write_tokenizer(
    directory: Path, vocab_size: int, model_max_length: int, template: str, extra: dict[str, str]
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

    `extra` has the tokens that a processor asks the tokenizer for by attribute. Raises ValueError where the
    vocabulary is too small for the media tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    spare = vocab_size - VOCAB_SIZE - len(MEDIA_TOKENS)
    if spare < 0:
        raise ValueError(f"vocab_size must be at least {VOCAB_SIZE + len(MEDIA_TOKENS)}, not {vocab_size}")
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges())]
    reserved = [f"<|reserved_{i}|>" for i in range(RESERVED)]
    padding = [f"<|reserved_{RESERVED + i}|>" for i in range(spare)]
    names += [*reserved, *MEDIA_TOKENS, *padding]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (*SPECIAL, *MEDIA_TOKENS)])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in (*reserved, *padding)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END, *MEDIA_TOKENS],
        "clean_up_tokenization_spaces": False,
        **({"extra_special_tokens": extra} if extra else {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "chat_template.jinja").write_text(template)
