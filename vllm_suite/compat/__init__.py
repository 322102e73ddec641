"""The only place of the suite that imports private vLLM names."""
