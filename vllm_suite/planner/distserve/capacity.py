"""Tokens of KV cache of OPT on A100-80GB, which DistServe's simulator looks up for every placement."""

from __future__ import annotations

# Tokens by tensor- and pipeline-parallel size, measured: max_num_tokens.csv of simdistserve in LLMServe/DistServe at
# commit 82831f1 (Apache-2.0), without the tensor-parallel sizes that there are no coefficients for.
_TOKENS = {
    "facebook/opt-13b": {
        1: {1: 66_144, 2: 163_008, 4: 356_752, 5: 453_616, 8: 744_224},
        2: {1: 163_008, 2: 356_752, 4: 744_224, 5: 937_968, 8: 1_519_184},
        4: {1: 356_736, 2: 744_224, 4: 1_519_168, 5: 1_906_656, 8: 3_069_088},
    },
    "facebook/opt-66b": {
        2: {1: 11_600, 2: 78_512, 4: 212_320, 8: 479_952},
        3: {1: 45_056, 2: 145_408, 4: 346_128, 8: 747_568},
        4: {1: 78_496, 2: 212_320, 4: 479_936, 8: 1_015_200},
        8: {1: 212_304, 2: 479_936, 4: 1_015_184, 8: 2_085_696},
    },
}
LAYERS_AND_HEADS = {"facebook/opt-13b": (40, 40), "facebook/opt-66b": (64, 72)}


def kv_tokens(model: str, tp: int, pp: int) -> int:
    """Tokens that an instance's cache holds. Raises ValueError where it was not measured: it does not fit, or odd."""
    found = _TOKENS.get(model, {}).get(tp, {}).get(pp)
    if found is None:
        raise ValueError(f"DistServe has no KV capacity for {model} with tp {tp}, pp {pp}: it does not fit, or is odd")
    return found
