"""Dashboards and alert rules over the series of `vllm_suite.metrics`, built here and shipped in the Helm chart."""
