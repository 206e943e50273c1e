"""moekit's model as lm-evaluation-harness calls one, registered there under ``NAME``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moekit import arguments
from moekit.api import SEED, Model, load
from moekit.arguments import Flag, Whole, check
from moekit.likelihood import Score, Text, score_texts

NAME = "moekit"
# The harness's own default of new tokens.
MAX_GEN_TOKS = 256
# What the harness's command line says where no device is named.
HARNESS_DEVICE = "cuda:0"
# Settings of a generation that mean the same in moekit; the harness's other ones are without effect.
SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")


class Scored(tuple):
    """The pair that the harness expects of ``loglikelihood``: the sum of the log-probabilities (nats), and whether each id is the
    most probable one.

    Attributes:
        ids: the scored ids.
        logprobs: [len(ids)] float32, natural log-probabilities.
    """

    ids: list[int]
    logprobs: np.ndarray

    @classmethod
    def of(cls, text: Text, score: Score) -> Scored:
        made = cls((float(score.logprobs.sum(dtype=np.float64)), bool(score.best.all())))
        made.ids, made.logprobs = list(text.ids[text.start :]), score.logprobs
        return made


@register_model(NAME)
class HarnessModel(LM):
    """A loaded model for the harness, or one that it loads itself.

        lm_eval.simple_evaluate(HarnessModel(model), tasks=["piqa"])
        python -m moekit.tasks --model moekit --model_args checkpoint=/data/en_moe_lm_15b,world_size=4 --tasks piqa

    A text begins with the model's first symbol, and a line end is ``</s>``. Changes of the routing that hold when the
    harness calls (:meth:`moekit.api.Model.route`) hold here. The number of a text that :class:`moekit.Force` names is its
    number among the different texts of a call.

    Args:
        model: a loaded model; None loads ``checkpoint``, which the harness's other models call ``pretrained``, with
            ``world_size``, ``device``, ``dtype``, ``bpe``, ``backend``, ``ranks``, ``experts``, ``resident`` and ``gpu_memory``,
            the arguments of :func:`moekit.load`.
        capacity_token_fraction, seed: as for :meth:`moekit.api.Model.score`, where each text is a routing group.
        mask, drop_second: a change of the routing for the whole run, as in :meth:`moekit.api.Model.route`.
        blank_lines: keep empty lines. They end a document, so by default several line ends count as one, as in FAIR's
            evaluation. ``loglikelihood_rolling`` always keeps them.
        max_gen_toks: new tokens of a generation where a task names no number.
        progress: show bars.
        batch_size, max_batch_size: without effect: texts of like lengths share a pass by themselves.

    Raises:
        ValueError: there is neither a model nor a checkpoint, an argument makes no sense, or no codec turns text into ids.
    """

    def __init__(
        self,
        model: Model | None = None,
        *,
        checkpoint: str | None = None,
        world_size: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        bpe: str | None = None,
        backend: str = "auto",
        ranks: str | None = None,
        experts: str | None = None,
        resident: int | None = None,
        gpu_memory: str | float | None = None,
        capacity_token_fraction: float | str | None = None,
        seed: int = 1,
        mask: Mapping[int, Sequence[int]] | Sequence[tuple[int, int]] = (),
        drop_second: bool = False,
        blank_lines: bool = False,
        max_gen_toks: int = MAX_GEN_TOKS,
        progress: bool = True,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: moekit's model has no such argument; expected those of moekit.tasks.HarnessModel, where "
                "checkpoint names what other models call pretrained"
            )
        if (model is None) == (checkpoint is None):
            found = "no model and no checkpoint" if model is None else "a model and a checkpoint, too"
            raise ValueError(
                f"{found}: expected a loaded model, or what to load, as in --model_args checkpoint=/data/en_moe_lm_15b "
                "(checkpoint=demo is moekit's demo)"
            )
        how = {
            "world_size": world_size,
            "device": "auto" if model is None and device == HARNESS_DEVICE else device,
            "dtype": dtype,
            "bpe": bpe,
            "backend": backend,
            "ranks": ranks,
            "experts": experts,
            "resident": resident,
            "gpu_memory": gpu_memory,
        }
        without_effect = [name for name, value in how.items() if value not in (None, "auto")]
        if model is not None and without_effect:
            raise ValueError(
                f"{', '.join(without_effect)}: a loaded model has its own; expected none of these beside a model, or a checkpoint "
                "in its place"
            )
        self.seed = check("seed", seed, SEED)
        self.blank_lines = check("blank_lines", blank_lines, Flag())
        self.max_gen_toks = check("max_gen_toks", max_gen_toks, Whole())
        self.progress = check("progress", progress, Flag())
        if model is None:
            model = load(checkpoint, progress=progress, **how)
        self.model = model
        self.capacity_token_fraction = capacity_token_fraction
        model.capacity(capacity_token_fraction)
        # Without a codec, this says why text cannot be read.
        model.codec.encode("")
        # It comes last, so that a failed check does not leave the routing changed.
        if mask or drop_second:
            self.changed = model.route(mask=_by_number(mask), drop_second=drop_second)
            self.changed.__enter__()
        # Tokens read so far, without what is shared or padded: for rates.
        self.tokens = 0

    @property
    def tokenizer_name(self) -> str:
        """The harness keeps prompts that it built by this name."""
        return f"moekit-{self.model.vocab}"

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """For each (context, continuation): the continuation's log-probability, as :class:`Scored`.

        A context that is too long loses its beginning.

        Raises:
            ValueError: a continuation is empty, or longer than the model has positions.
        """
        pairs = self._pairs([request.args for request in requests])
        texts = list(dict.fromkeys(pairs))
        scores = dict(zip(texts, self._score(texts, disable_tqdm), strict=True))
        found = [Scored.of(text, scores[text]) for text in pairs]
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, one)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in nats.

        A text that is too long is read in parts. Each part begins with the last token of the part before it; the last part
        begins with as much context as fits.
        """
        most, first = self.model.config.max_positions, self.model.first
        texts: list[Text] = []
        whose: list[int] = []
        for number, request in enumerate(requests):
            ids = self.model.codec.encode(request.args[0])
            windows = get_rolling_token_windows(ids, prefix_token=first, max_seq_len=most, context_len=1)
            for context, scored in map(make_disjoint_window, windows):
                texts.append(Text((*context, *scored), len(context)))
                whose.append(number)
        sums = [0.0] * len(requests)
        for number, score in zip(whose, self._score(texts, disable_tqdm), strict=True):
            sums[number] += float(score.logprobs.sum(dtype=np.float64))
        for request, one in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, one)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each (context, settings), up to a text of ``until``.

        The settings ``until``, ``max_gen_toks``, ``do_sample`` and those of :data:`SETTINGS` have an effect. A generation has
        at most half of the model's positions, and a context that is too long loses its beginning.
        """
        found: list[str | None] = [None] * len(requests)
        alike: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(self._settings(request.args[1]), []).append(number)
        for settings, numbers in alike.items():
            options = dict(settings)
            room = self.model.config.max_positions - options["max_new_tokens"]
            # Texts of like lengths are generated together.
            prompts = {n: self._encode(self._joined(requests[n].args[0]))[-room:] for n in numbers}
            numbers = sorted(numbers, key=lambda n: -len(prompts[n]))
            made = self.model.generate(
                [prompts[n] for n in numbers],
                **options,
                seed=self.seed,
                capacity_token_fraction=self.capacity_token_fraction,
                progress=self.progress and not disable_tqdm,
            )
            self.tokens += sum(len(prompts[n]) + len(one.ids) for n, one in zip(numbers, made, strict=True))
            for number, one in zip(numbers, made, strict=True):
                found[number] = one.text
                self.cache_hook.add_partial("generate_until", requests[number].args, one.text)
        return found

    def _settings(self, asked: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """The arguments of ``Model.generate`` that a request's settings mean; requests with equal ones are generated together."""
        until = asked.get("until") or []
        most = int(asked.get("max_gen_toks") or self.max_gen_toks)
        options = {
            "max_new_tokens": min(most, self.model.config.max_positions // 2),
            "stop": tuple([until] if isinstance(until, str) else until),
        }
        options |= {name: asked[name] for name in SETTINGS if asked.get(name) is not None}
        if not asked.get("do_sample", options.get("temperature", 0) > 0):
            options["temperature"] = 0.0
        elif "temperature" not in options:
            options["temperature"] = 1.0
        return tuple(options.items())

    def _score(self, texts: Sequence[Text], quiet: bool) -> list[Score]:
        self.tokens += sum(len(text.ids) for text in texts)
        fraction = self.model.capacity(self.capacity_token_fraction)
        show = self.progress and not quiet
        return score_texts(self.model, texts, fraction=fraction, seed=self.seed, progress=show)

    def _pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Text]:
        most, first = self.model.config.max_positions, self.model.first
        beginnings: dict[str, list[int]] = {}
        texts = []
        for context, continuation in pairs:
            context, continuation = self._joined(context), self._joined(continuation)
            if context.endswith("\n") and not self.blank_lines:
                continuation = continuation.removeprefix("\n")
            # A space belongs to the word after it.
            kept = context.rstrip(" ")
            if kept not in beginnings:
                beginnings[kept] = self._encode(kept)
            whole = self._encode(context + continuation)
            # The end of a context and the beginning of its continuation can be one token, which is scored.
            told = zip(beginnings[kept], whole, strict=False)
            scored = whole[sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], told)) :]
            if not 1 <= len(scored) < most:
                raise ValueError(
                    f"the continuation {arguments.shown(continuation)} has {len(scored)} tokens; expected 1 to {most - 1}"
                )
            read = whole[: len(whole) - len(scored)][-(most - len(scored)) :]
            texts.append(Text((first, *read, *scored), 1 + len(read)))
        return texts

    def _joined(self, text: str) -> str:
        """The text with one line end in place of several, unless blank lines are kept."""
        return text if self.blank_lines else re.sub("\n+", "\n", text)

    def _encode(self, text: str) -> list[int]:
        return self.model.codec.encode(text)


def _by_number(mask: Any) -> Any:
    """The mask with whole numbers for layers, which JSON spells as text."""
    if not isinstance(mask, Mapping):
        return mask
    return {int(layer) if str(layer).isdigit() else layer: experts for layer, experts in mask.items()}
