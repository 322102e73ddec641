"""KV-cache hand-off between prefill and decode instances over NIXL, fenced."""
