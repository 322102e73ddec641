"""`python3 -m vllm_suite.fleet.pod`."""

import sys

from vllm_suite.fleet.pod.command import main

if __name__ == "__main__":
    sys.exit(main())
