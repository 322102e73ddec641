"""A Triton backend that compiles nothing; kernels run in Triton's interpreter."""

NO_COMPILER = "this Triton backend runs kernels in the interpreter only; set TRITON_INTERPRET=1"
