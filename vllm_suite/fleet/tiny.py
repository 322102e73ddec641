"""A tiny Llama checkpoint and its tokenizer, written from a seed with no network.

The weights are drawn with a large standard deviation (0.25), which makes the model chaotic: changing one
token of a prompt changes its whole greedy continuation. A wrong KV block therefore shows up as wrong text,
which a trained model could hide. The text itself is noise.

numpy, safetensors and tokenizers are imported inside the functions; torch is not needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_suite.fleet.tiny_tokenizer import BOS_ID, EOS_ID, write_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DTYPES = ("float32", "bfloat16")
INITIALIZER_RANGE = 0.25
_STAMP = "tiny.json"
_FORMAT = 1


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the checkpoint. Equal values give equal files, byte for byte.

    `head_dim` must be one that vLLM's CPU attention knows (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512).
    """

    seed: int = 0
    layers: int = 4
    hidden_size: int = 256
    intermediate_size: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 512
    max_position: int = 8192
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.vocab_size < 512:
            raise ValueError(f"vocab_size must be at least 512 (the tokenizer's size), not {self.vocab_size}")

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)


def make_tiny_model(directory: Path, config: TinyConfig | None = None) -> Path:
    """Write the checkpoint into `directory` and return it; under 5 s, and at once where it is there already.

    A directory that holds a checkpoint of another configuration is rewritten. Raises OSError where the
    directory cannot be written, ImportError where numpy, safetensors or tokenizers is missing.
    """
    config = config or TinyConfig()
    stamp = directory / _STAMP
    want = json.dumps({"format": _FORMAT, **asdict(config)}, sort_keys=True)
    if stamp.is_file() and stamp.read_text() == want:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    _write_json(directory / "config.json", _hf_config(config))
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "_from_model_config": True},
    )
    write_tokenizer(directory, model_max_length=config.max_position)
    _write_weights(directory / "model.safetensors", config)
    # Last: an interrupted write leaves no stamp and is done again.
    stamp.write_text(want)
    return directory


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _hf_config(config: TinyConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": INITIALIZER_RANGE,
        "torch_dtype": config.dtype,
        "dtype": config.dtype,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "use_cache": True,
    }


def _shapes(config: TinyConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (q, hidden),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    import numpy as np

    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    # One stream per tensor, so that a tensor does not depend on the order in which the others are drawn.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    values: NDArray[np.float32] = generator.standard_normal(shape, dtype=np.float32)
    return values * np.float32(INITIALIZER_RANGE)


def _bfloat16_bytes(values: NDArray[np.float32]) -> bytes:
    """Round to nearest even; no NaN or infinity occurs among drawn weights."""
    import numpy as np

    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def _write_weights(path: Path, config: TinyConfig) -> None:
    """Write the safetensors format directly (8-byte length, JSON header, data): numpy has no bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, shape in _shapes(config).items():
        values = _tensor(name, shape, config.seed)
        if config.dtype == "bfloat16":
            code, blob = "BF16", _bfloat16_bytes(values)
        else:
            code, blob = "F32", values.astype("<f4").tobytes()
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)
    os.replace(partial, path)
