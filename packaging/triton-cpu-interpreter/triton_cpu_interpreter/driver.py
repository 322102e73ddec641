"""What Triton and vLLM ask of a backend's driver before a kernel runs."""

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from triton_cpu_interpreter import NO_COMPILER


class InterpreterDriver(DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise RuntimeError(NO_COMPILER)

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_benchmarker(self):
        raise RuntimeError(NO_COMPILER)
