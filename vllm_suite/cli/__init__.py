"""The `vllm-suite` command: argument parsing only, one file a verb."""
