"""Compile the late-KV kernel for GPUs that need not be present, and print what the machine code holds as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from suite_kernels.late_kv import launch_shape  # noqa: E402
from suite_kernels.late_kv_triton import late_kv_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHAPES: dict[str, dict[str, Any]] = {
    "8B bf16": {},
    "8B bf16 sm_80": {"capability": 80},
    "8B bf16 sm_100": {"capability": 100},
    "8B fp8": {"cache": "fp8e4nv"},
    "8B fp8 norm": {"cache": "fp8e4nv", "norm": True},
    "8B fp16 GPT-J": {"dtype": "fp16", "cache": "fp16", "neox": False},
    "70B TP8 bf16": {"leaders": 40, "heads": 1},
    "70B TP8 fp8": {"leaders": 40, "heads": 1, "cache": "fp8e4nv"},
    "head 80": {"dim": 80},
    "head 96 half rotary": {"dim": 96, "rotary": 48},
    "unaligned": {"alignment": 2},
}


def build(
    capability: int = 90,
    dtype: str = "bf16",
    cache: str = "bf16",
    leaders: int = 16,
    heads: int = 8,
    dim: int = 128,
    rotary: int = 0,
    neox: bool = True,
    norm: bool = False,
    alignment: int = 16,
) -> Any:
    rotary = rotary or dim
    constants: dict[str, Any] = {
        "LEADERS": leaders,
        "HEADS": heads,
        "DIM": dim,
        "ROTARY": rotary,
        "BLOCK_SIZE": 16,
        "NEOX": neox,
        "ALIGNMENT": alignment,
        "SOFT": False,
        **launch_shape(dim, rotary),
    }
    if not norm:
        constants["norm_weight"] = None
    if cache != "fp8e4nv":
        constants["inverse_scales"] = None
    types = dict.fromkeys(("positions", "slots", "pointers"), "*i64")
    types |= dict.fromkeys(("late_kv", "cos_sin", "norm_weight"), f"*{dtype}")
    types |= {"like": f"*{cache}", "inverse_scales": "*fp32", "eps": "fp32"}
    names = late_kv_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = [n for n in names if signature[n].startswith("*") or n.endswith("stride")]
    source = ASTSource(
        fn=late_kv_kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def facts(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    counts: dict[str, int] = {}
    for operation in re.findall(r"^\s*(?:@%p\d+ )?((?:ld|st|cvt|fma)\.\S+)", ptx, re.MULTILINE):
        counts[operation] = counts.get(operation, 0) + 1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    return {
        "operations": counts,
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "instructions": sum(name != "NOP" for name in instructions),
    }


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


if __name__ == "__main__":
    json.dump({name: facts(build(**shape)) for name, shape in SHAPES.items()}, sys.stdout)
