"""From a chat request's media parts to checked items: fetched, decoded once, hashed, measured, rewritten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_suite.router.encode.config import Encode, Modality
from vllm_suite.router.encode.examine import Scope, examine, split_data_url, to_base64
from vllm_suite.router.encode.fetch import Fetcher
from vllm_suite.router.encode.parts import Item
from vllm_suite.router.encode.refusal import BadMedia, MediaRefused
from vllm_suite.router.metrics import RouterMetrics

# Below this many characters in all a thread costs more than it frees the event loop of: a third of a millisecond.
_INLINE = 128 * 1024
_THREADS = 2


class Admission:
    """Checks items; one per router. `close` ends it."""

    def __init__(self, settings: Encode, metrics: RouterMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._fetcher = Fetcher(settings.fetch, settings.item_bytes)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="media")

    async def close(self) -> None:
        """End downloads; a check that runs in a thread ends by itself."""
        await self._fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def admit(self, document: dict[str, Any], items: Sequence[Item], scope: Scope) -> None:
        """Fill in the items and rewrite their parts in the document. Raises `MediaRefused`."""
        texts = await self._texts(items)
        total = sum(len(text) for _, text in texts)
        if total * 3 // 4 > self._settings.request_bytes + 4 * len(items):
            raise self._too_much()
        if total <= _INLINE:
            self._examine(items, texts, scope)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, self._examine, items, texts, scope)
        for item in items:
            document["messages"][item.message]["content"][item.part] = item.raw

    async def _texts(self, items: Sequence[Item]) -> list[tuple[str, str]]:
        """Media type and base64 text of each item."""
        urls: dict[tuple[str, Modality], Item] = {}
        for item in items:
            if item.url[:5].lower() != "data:":
                urls.setdefault((item.url, item.modality), item)
        fetched = dict(zip(urls, await self._fetch_all(list(urls.values())), strict=True)) if urls else {}
        texts = []
        for item in items:
            try:
                found = fetched.get((item.url, item.modality))
                texts.append(found if found is not None else split_data_url(item.url))
            except BadMedia as bad:
                raise item.refused(bad) from bad
        return texts

    async def _fetch_all(self, items: Sequence[Item]) -> list[tuple[str, str]]:
        """Side by side; the first failure ends the others."""
        left = self._settings.request_bytes

        async def fetch(item: Item) -> tuple[str, str]:
            nonlocal left
            try:
                media_type, data = await self._fetcher.get(item.url, item.modality)
            except BadMedia as bad:
                raise item.refused(bad) from bad
            self._metrics.add(len(data), "encode_fetched_bytes", item.modality)
            left -= len(data)
            if left < 0:
                raise self._too_much()
            return media_type, to_base64(data)

        tasks = [asyncio.create_task(fetch(item)) for item in items]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _examine(self, items: Sequence[Item], texts: Sequence[tuple[str, str]], scope: Scope) -> None:
        total = 0
        for item, (media_type, text) in zip(items, texts, strict=True):
            try:
                examine(item, media_type, text, self._settings, scope)
            except BadMedia as bad:
                raise item.refused(bad) from bad
            total += item.size
            if total > self._settings.request_bytes:
                raise self._too_much()

    def _too_much(self) -> MediaRefused:
        return MediaRefused(413, "request_too_large", f"more than {self._settings.request_bytes} bytes of media")
