"""vLLM's encoder-cache manager, with the connector's word on what can be had in a step."""

from __future__ import annotations

from typing import Any

from vllm_epd.config import ConfigError
from vllm_epd.scheduler import SuiteECScheduler, half_of
from vllm_suite.compat.ec import EncoderCacheManager


class SuiteEncoderCacheManager(EncoderCacheManager):
    """Name it in ``--ec-manager-config``, or let ``--plugins epd`` do so.

    An item that is still under way, or that nobody can provide, is not allocated: vLLM then computes the tokens
    before it and no more, which is how encoding and chunked prefill overlap.
    """

    @classmethod
    def create_manager(cls, *, cache_size: int, vllm_config: Any) -> SuiteEncoderCacheManager:
        """Called by vLLM's scheduler after it has made the connector.

        Raises:
            ConfigError: the engine has no ``SuiteECConnector``.
        """
        half = half_of(vllm_config)
        if half is None:
            raise ConfigError(
                "SuiteEncoderCacheManager works with SuiteECConnector only: name it in --ec-transfer-config, or leave "
                "--ec-manager-config out"
            )
        return cls(cache_size, half)

    def __init__(self, cache_size: int, half: SuiteECScheduler) -> None:
        super().__init__(cache_size)
        self._half = half
        half.use_manager(self)

    def holds(self, identifier: str) -> bool:
        """Whether the runner's encoder cache has the item, or will have it in this step."""
        return identifier in self.cached and self._half.keeps(identifier)

    def check_and_update_cache(self, request: Any, input_id: int) -> bool:
        identifier = request.mm_features[input_id].identifier
        if identifier in self.freeable and not self._half.keeps(identifier):
            self._forget(identifier)
        return super().check_and_update_cache(request, input_id)

    def can_allocate(
        self, request: Any, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        if not self._half.may_allocate(request, input_id):
            return False
        return super().can_allocate(request, input_id, encoder_compute_budget, num_embeds_to_schedule)

    def reset(self) -> None:
        """vLLM calls this when weights have changed: nothing that was encoded before may be used."""
        super().reset()
        self._half.forget_all()

    def _forget(self, identifier: str) -> None:
        """An entry that stood for an item that a producer's pool has evicted, or that was lost."""
        rows = self.freeable.pop(identifier)
        del self.cached[identifier], self.num_embeds_by_hash[identifier]
        self.num_free_slots += rows
        self.freed.append(identifier)
        self._half.forgotten(identifier)
