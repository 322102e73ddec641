"""DLER's truncation in verl 0.9: the reward manager that the emitted settings name. Imported by verl alone."""

from __future__ import annotations

from typing import Any

from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager


class TruncationRewardManager(NaiveRewardManager):
    """verl's plain reward manager, but a response that was cut at the longest length earns nothing.

    ``reward.reward_kwargs.partial_credit`` is the share that it keeps in place of nothing.
    """

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The score of one response, truncation applied; ``acc`` stays what the judge said."""
        scored: dict[str, Any] = await super().run_single(data)
        item = data[-1:][0]
        responses = item.batch["responses"]
        length = int(item.batch["attention_mask"][-responses.shape[-1] :].sum())
        cut = length == responses.shape[-1] and int(responses[-1]) != self.tokenizer.eos_token_id
        if cut:
            scored["reward_score"] *= self.config.reward.get("reward_kwargs", {}).get("partial_credit", 0.0)
        scored["reward_extra_info"]["cut"] = float(cut)
        return scored
