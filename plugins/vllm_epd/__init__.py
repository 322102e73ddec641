"""Encoder stage. Not landed yet: `vllm_suite.catalog` refuses to select it."""
