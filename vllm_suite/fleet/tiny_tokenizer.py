"""The byte-level tokenizer of the tiny checkpoint: every byte string has an encoding, nothing is downloaded.

512 tokens: 8 special ones, the 256 bytes, one token for each pair of a space and a small letter and of a
consonant and a vowel (so that text is merged as a real tokenizer merges it), the rest reserved.
"""

from __future__ import annotations

import json
from pathlib import Path

VOCAB_SIZE = 512
BOS, EOS, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (BOS, EOS, PAD, UNKNOWN, SYSTEM, USER, ASSISTANT, END)
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
FIRST_TEXT_ID = len(SPECIAL)
RESERVED = VOCAB_SIZE - len(SPECIAL) - 256 - 26 - 2 * 5 * 21  # tokens at the end that no text has
_SPACE = "Ġ"  # how the byte-level alphabet writes a space
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] or '') + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def merges() -> list[tuple[str, str]]:
    """The byte pairs that have a token of their own, in order of priority."""
    pairs = [(_SPACE, letter) for letter in sorted(_VOWELS + _CONSONANTS)]
    pairs += [(consonant, vowel) for consonant in _CONSONANTS for vowel in _VOWELS]
    pairs += [(vowel, consonant) for vowel in _VOWELS for consonant in _CONSONANTS]
    return pairs


def write_tokenizer(directory: Path, model_max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (with a chat template) into `directory`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges())]
    names += [f"<|reserved_{i}|>" for i in range(RESERVED)]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [name for name in names if name.startswith("<|reserved_")]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in reserved])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
