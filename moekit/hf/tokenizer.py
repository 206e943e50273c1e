"""The tokenizer, whose line ends are text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from moekit.symbols import BOS, PAD, UNK


class FairseqMoeTokenizer(PreTrainedTokenizerFast):
    """The tokenizer that ``convert`` writes. ``</s>`` ends a line and is text, so ``skip_special_tokens`` does not skip it."""

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            ids = [number for number in ids if number not in (BOS, PAD, UNK)]
        return super()._decode(ids, skip_special_tokens=False, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing, as with :class:`FairseqMoeConfig`."""
