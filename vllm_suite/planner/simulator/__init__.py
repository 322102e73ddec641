"""A simulator of vLLM engines on a virtual clock: event by event, deterministic, with vLLM V1's scheduling rules."""
