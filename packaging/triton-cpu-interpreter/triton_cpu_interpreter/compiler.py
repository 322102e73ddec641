"""What Triton asks of a backend's compiler. Nothing gets as far as compiling."""

from triton.backends.compiler import BaseBackend

from triton_cpu_interpreter import NO_COMPILER


class InterpreterBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "cpu-interpreter"

    def parse_options(self, options):
        return dict(options)

    def add_stages(self, stages, options, language):
        raise RuntimeError(NO_COMPILER)

    def load_dialects(self, context):
        raise RuntimeError(NO_COMPILER)

    def get_module_map(self):
        return {}
