"""``moekit.load`` and the model that it returns, ready for any number of calls."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit import checkpoint as ckpt
from moekit import ranks
from moekit.arguments import check_fraction, check_positive
from moekit.batches import text_batches, up_to
from moekit.fairseq_data import is_data
from moekit.generation.run import generate, stream
from moekit.handle import Handle, describe_run, dictionary_size, pieces, weights_dtype
from moekit.nn.config import changed
from moekit.nn.operations import choose_backend
from moekit.nn.record import Options
from moekit.progress import bar as progress_bar
from moekit.routing import trace as tracing
from moekit.scoring import Evaluation, score_batches, summarize, warm_up
from moekit.worker import loading

if TYPE_CHECKING:
    import pandas as pd


class Model(Handle):
    """A model and its verbs. A context manager: leaving it stops the ranks."""

    generate = generate

    stream = stream

    def evaluate(
        self,
        data: str | Path,
        subset: str = "valid",
        tokens_per_sample: int | None = None,
        batch_size: int = 1,
        capacity_token_fraction: float | None = None,
        sample_break_mode: str = "none",
        context_window: int = 0,
        max_batches: int | None = None,
        seed: int = 1,
        progress: bool = True,
        trace: bool | Options = False,
    ) -> Evaluation:
        """Score binarised data as ``fairseq_cli.eval_lm --is-moe`` does; the result does not depend on the world size.

        Args:
            data: folder with ``dict.txt`` and ``{subset}.bin/.idx``, or "demo".
            tokens_per_sample: tokens of a block, context included; None: as many as the model has positions.
            batch_size: samples that are routed together. With a capacity this changes the result, as in fairseq.
            capacity_token_fraction: None drops nothing. F > 0 gives each expert ``ceil(F * tokens)`` places a batch,
                any other number the training's rule (:func:`moekit.nn.gate.capacity`).
            sample_break_mode: "none", "complete", "complete_doc" or "eos", as in fairseq.
            context_window: tokens of context that are not scored again.
            max_batches: stop after so many batches.
            seed: of gates that sample their second expert.
            progress: show a bar.
            trace: also record the routing; :class:`moekit.nn.record.Options` say what of it.

        Raises:
            ValueError: an argument makes no sense, or a file is missing.
            moekit.ranks.RankError: a rank failed.
        """
        if max_batches is not None:
            check_positive("max_batches", max_batches)
        if not isinstance(context_window, int) or context_window < 0:
            raise ValueError(f"context_window={context_window!r}: expected a whole number of at least 0")
        fraction = check_fraction(capacity_token_fraction)
        batches = self.open_data(
            data, subset, self.block(tokens_per_sample), batch_size, sample_break_mode, context_window
        )
        total = len(batches) if max_batches is None else min(len(batches), max_batches)
        chosen = list(itertools.islice(batches, total))
        collector = None
        if trace:
            options = Options() if trace is True else trace
            collector = tracing.Collector(options.of(self.config))
        vocab = len(batches.dictionary)
        warm_up(self, chosen, fraction, vocab, progress)
        start = time.perf_counter()
        scores = score_batches(
            self,
            chosen,
            fraction=fraction,
            vocab=vocab,
            seed=seed,
            progress=progress,
            trace=collector,
        )
        seconds = time.perf_counter() - start
        found = summarize(chosen, scores, seconds, skip_first=self.config.add_bos)
        if collector is None:
            return found
        meta = describe_run(self, chosen, fraction, seed) | batches.asked
        return replace(found, trace=collector.trace(self.config.experts, meta))

    def score(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        batch_size: int = 1,
        capacity_token_fraction: float | None = None,
        seed: int = 1,
    ) -> pd.DataFrame:
        """Log-probabilities of texts or of their ids, each begun with ``</s>`` as fairseq's blocks are.

        Returns:
            A row a token: ``text`` (its number), ``position``, ``token`` (dictionary id), ``piece`` (for the eye) and
            ``logprob`` (natural log, float32). The other arguments are those of :meth:`evaluate`.
        """
        check_positive("batch_size", batch_size)
        fraction = check_fraction(capacity_token_fraction)
        ids, vocab = self.ids([texts] if isinstance(texts, str) else texts)
        batches = text_batches(ids, batch_size, self.config.max_positions)
        scores = score_batches(self, batches, fraction=fraction, vocab=vocab, seed=seed, progress=False)
        table = summarize(batches, scores, math.nan, skip_first=False).tokens
        table.insert(3, "piece", pieces(self.codec if self.reads_text else None, table["token"]))
        return table.rename(columns={"sample_id": "text"})

    def trace(
        self,
        data_or_texts: str | Path | Sequence[str] | Sequence[Sequence[int]],
        subset: str = "valid",
        tokens_per_sample: int | None = None,
        batch_size: int = 1,
        capacity_token_fraction: float | None = None,
        *,
        layers: Sequence[int] | None = None,
        full: Sequence[int] = (),
        predicted: bool = False,
        max_tokens: int | None = None,
        sample_break_mode: str = "none",
        context_window: int = 0,
        seed: int = 1,
        progress: bool = True,
    ) -> tracing.Trace:
        """Record where the router sends every token; the result does not depend on the world size.

        Args:
            data_or_texts: a folder of binarised data or "demo", which take the path of :meth:`evaluate`; or a text, or
                texts, or their ids: a sample each, routed ``batch_size`` at a time (:func:`moekit.batches.text_batches`).
            layers, full, predicted: what to record (:class:`moekit.nn.record.Options`).
            max_tokens: stop before the batch that would make the trace longer, but not before the first.

        The other arguments are those of :meth:`evaluate`.

        Raises:
            ValueError: an argument makes no sense, or a file is missing.
            moekit.ranks.RankError: a rank failed.
        """
        check_positive("batch_size", batch_size)
        fraction = check_fraction(capacity_token_fraction)
        options = Options(None if layers is None else tuple(layers), tuple(full), predicted)
        collector = tracing.Collector(options.of(self.config))
        if is_data(data_or_texts):
            block = self.block(tokens_per_sample)
            batches = self.open_data(
                data_or_texts, subset, block, batch_size, sample_break_mode, context_window
            )
            vocab, asked = len(batches.dictionary), batches.asked
        else:
            texts = [data_or_texts] if isinstance(data_or_texts, str) else data_or_texts
            ids, vocab = self.ids(texts)
            batches = text_batches(ids, batch_size, self.config.max_positions)
            asked = {"texts": len(ids), "batch_size": batch_size}
        if max_tokens is not None:
            check_positive("max_tokens", max_tokens)
            batches = up_to(batches, max_tokens)
        chosen = list(batches)
        score_batches(
            self, chosen, fraction=fraction, vocab=vocab, seed=seed, progress=progress, trace=collector
        )
        meta = describe_run(self, chosen, fraction, seed) | asked
        return collector.trace(self.config.experts, meta)


def load(
    checkpoint: str | Path,
    world_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    dictionary: str | Path | None = None,
    bpe: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> Model:
    """Load a checkpoint of fairseq's ``moe`` branch onto ``world_size`` ranks.

    Args:
        checkpoint: a folder, ``model.pt``, ``model-shared.pt``, any ``model-rank-N.pt``, or "demo"; all name the
            same model (:func:`moekit.checkpoint.find`).
        world_size: ranks, each with a share of the experts; any number, whatever the number of files. None: one for
            every GPU, one on the CPU.
        device: "cuda" (a GPU a rank), "cpu", or "auto": GPUs where there are any.
        dtype: "float32", "float16", "bfloat16", or "auto": the checkpoint's own on GPUs, float32 on the CPU.
        dictionary: ``dict.txt`` or its folder; rows of the matrices beyond it are not loaded. None: the one beside the
            checkpoint, if there is one; else all rows are loaded, and each data set's dictionary decides.
        bpe: the folder with ``encoder.json``, ``vocab.bpe`` and ``dict.txt`` that turn text into ids. None: where the
            checkpoint lies, or ``gpt2_bpe`` there or beside it; needed only when text is.
        config: fields of the checkpoint's :class:`~moekit.nn.config.ModelConfig` to replace, such as ``second_expert``; not
            those that give the weights their shapes.
        backend: what computes: "triton", "loop" (slow, and plain to see that it is right), "grouped_mm" (the same with
            torch's grouped product for the experts), or "auto": the fastest there is.
        progress: show a bar.

    Raises:
        ValueError: the checkpoint is incomplete or not what it should be, or an argument makes no sense.
        moekit.ranks.RankError: a rank failed.
    """
    start = time.perf_counter()
    devices = ranks.choose_devices(world_size, device)
    world_size = len(devices)
    files = ckpt.find(checkpoint)
    plan = ckpt.survey(files, dictionary_size(files, dictionary))
    plan = replace(plan, config=changed(plan.config, config or {}))
    kind = weights_dtype(dtype, devices[0], plan)
    backend = choose_backend(backend, devices[0], kind)

    pool = ranks.start(world_size, devices[0].type)
    try:
        model = Model(plan, files, pool, kind, bpe)
        total = sum(source.bytes * (world_size if i == 0 else 1) for i, source in enumerate(plan.sources))
        with progress_bar("loading", total, "B", show=progress) as bar:
            model.parts = pool.call(
                loading.load, plan, kind, backend, on_report=lambda rank, n: bar.update(n)
            )
            plan.opened.clear()
            bar.update(bar.total - bar.n)  # what is not tensors
        model.load_seconds = time.perf_counter() - start
    except BaseException:
        pool.close()
        raise
    return model
