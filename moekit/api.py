"""``moekit.load`` and the model that it returns, ready for any number of calls."""

from __future__ import annotations

import itertools
import reprlib
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit import checkpoint as ckpt
from moekit.arguments import Choice, Flag, Whole, check, shown
from moekit.batches import Batch, text_batches, up_to
from moekit.domains import evaluate_domains
from moekit.fairseq_data import Batches, Data, is_data
from moekit.generation.run import generate, stream
from moekit.handle import (
    Handle,
    describe_run,
    experts_dtype,
    find_codec,
    find_dictionary,
    origin,
    weights_dtype,
)
from moekit.interrupts import import_whole
from moekit.nn.changes import changed, differences
from moekit.nn.gates import PROVEN, top_k_of
from moekit.nn.operations import choose_backend
from moekit.nn.policies import USUAL
from moekit.nn.record import Options
from moekit.planning.fitting import cached_tokens, fitting, too_long
from moekit.planning.residence import residence, residency
from moekit.planning.runs import Run, room, unknown
from moekit.profiling import profile
from moekit.progress import bar as progress_bar
from moekit.ranks import WHERE, LentRanks, RankError, Ranks, RayRanks, choose_devices, prepare, ready, start
from moekit.ranks.devices import waking
from moekit.routing import trace as tracing
from moekit.scoring import Evaluation, score_batches, summarize, token_table, warm_up
from moekit.symbols import BOS
from moekit.worker import loading

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from moekit.nn.config import ModelConfig

SEED = Whole(0)


class Model(Handle):
    """A model and its verbs. A context manager: leaving it stops the ranks."""

    generate = generate

    stream = stream

    profile = profile

    def evaluate(
        self,
        data: str | Path | None = None,
        subset: str = "valid",
        tokens_per_sample: int | None = None,
        batch_size: int = 1,
        capacity_token_fraction: float | str | Iterable[float | str | None] | None = None,
        sample_break_mode: str = "none",
        context_window: int = 0,
        max_batches: int | None = None,
        seed: int = 1,
        progress: bool = True,
        trace: bool | Options = False,
        *,
        domains: str | Path | Mapping[str, str | Path] | None = None,
    ) -> Evaluation | pd.DataFrame:
        """Score binarised data as ``fairseq_cli.eval_lm --is-moe`` does; the result does not depend on the world size.

        Args:
            data: a folder with ``dict.txt``, ``{subset}.bin`` and ``{subset}.idx``, or "demo".
            tokens_per_sample: tokens of a block, context included; None: as many as the model has positions.
            batch_size: samples that are routed together. With a capacity this changes the result, as in fairseq.
            capacity_token_fraction: None drops nothing. F > 0 gives each expert ``ceil(F * tokens)`` places a batch,
                "training" (or a negative number) the training's rule (:func:`moekit.nn.gate.capacity`).
            sample_break_mode: "none", "complete", "complete_doc" or "eos", as in fairseq.
            context_window: tokens of context that are not scored again.
            max_batches: stop after this many batches.
            seed: of gates that draw their second expert.
            progress: show a bar.
            trace: also record the routing; :class:`moekit.nn.record.Options` select what is recorded.
            domains: texts of several domains, in place of ``data``; then ``capacity_token_fraction`` may be a list
                (:func:`moekit.domains.evaluate_domains`).

        Returns:
            The loss, with a row for each scored token; with ``domains`` a table with a row for each capacity and domain.

        Raises:
            ValueError: an argument makes no sense, or a file is missing.
            moekit.ranks.RankError: a rank failed.
        """
        if (data is None) == (domains is None):
            raise ValueError(
                f"data={shown(data)}, domains={shown(domains)}: expected one of the two, not both"
            )
        max_batches = check("max_batches", max_batches, Whole(optional=True))
        if domains is not None:
            if trace:
                raise ValueError(f"trace={shown(trace)}: a table of domains has none; trace one of them")
            how = Data("demo", subset, tokens_per_sample, batch_size, sample_break_mode, context_window)
            fractions = capacity_token_fraction
            return evaluate_domains(self, domains, how, fractions, max_batches, seed, progress)
        asked = Data(data, subset, tokens_per_sample, batch_size, sample_break_mode, context_window)
        fraction, seed = self.capacity(capacity_token_fraction), check("seed", seed, SEED)
        collector = self._collector(trace)
        batches = self._open(asked)
        vocab = len(batches.dictionary)
        chosen = list(itertools.islice(batches, max_batches))
        warm_up(self, chosen, fraction, vocab, progress)
        start = time.perf_counter()
        scores = score_batches(
            self, chosen, fraction=fraction, vocab=vocab, seed=seed, progress=progress, trace=collector
        )
        seconds = time.perf_counter() - start
        found = summarize(chosen, scores, seconds, self.config.add_bos, str(asked.prefix))
        if collector is None:
            return found
        traced = self._trace(collector, chosen, fraction, seed, batches.data.asked(), of_data=True)
        return replace(found, trace=traced)

    def score(
        self,
        texts: str | Iterable[str] | Iterable[int] | Iterable[Iterable[int]],
        batch_size: int = 1,
        capacity_token_fraction: float | str | None = None,
        seed: int = 1,
    ) -> pd.DataFrame:
        """Log-probabilities of texts. The model reads each after ``</s>``, as it reads fairseq's blocks, or after ``<s>``
        if it was trained with ``add_bos_token``.

        Args:
            texts: a text, texts, ids, or lists of ids. The other arguments are those of :meth:`evaluate`.

        Returns:
            One row per token: ``sample`` (the text's number), ``position``, ``token`` (dictionary id of what is read
            there: at position 0 the symbol that begins the text), ``target`` (the text's own token, which is predicted),
            ``piece`` (the target as text) and ``logprob`` (of the target, natural log, float32).

        Raises:
            ValueError, moekit.ranks.RankError: as :meth:`trace`.
        """
        fraction, seed = self.capacity(capacity_token_fraction), check("seed", seed, SEED)
        batches = self._batches(texts, check("batch_size", batch_size, Whole()))
        scores = score_batches(self, batches, fraction=fraction, vocab=self.vocab, seed=seed, progress=False)
        table = token_table(batches, {"logprob": scores}, whose="the text")
        table.insert(4, "piece", self.codec.pieces(table["target"]))
        return table

    def trace(
        self,
        data_or_texts: str | Path | Iterable[str] | Iterable[int] | Iterable[Iterable[int]],
        subset: str = "valid",
        tokens_per_sample: int | None = None,
        batch_size: int = 1,
        capacity_token_fraction: float | str | None = None,
        *,
        layers: Iterable[int] | None = None,
        full: Iterable[int] = (),
        predicted: bool = False,
        max_tokens: int | None = None,
        sample_break_mode: str = "none",
        context_window: int = 0,
        seed: int = 1,
        progress: bool = True,
    ) -> tracing.Trace:
        """Record where the router sends every token; the result does not depend on the world size.

        Args:
            data_or_texts: a folder of binarised data or "demo", read as :meth:`evaluate` reads it; or a text, texts or their
                ids: each is a sample, and ``batch_size`` of them are routed together. ``subset`` and what cuts data into
                samples have no effect on texts.
            layers, full, predicted: what to record (:class:`moekit.nn.record.Options`).
            max_tokens: stop before the batch that would make the trace longer; the first batch is always traced.

        The other arguments are those of :meth:`evaluate`.

        Raises:
            ValueError: an argument makes no sense, or a file is missing.
            moekit.ranks.RankError: a rank failed.
        """
        fraction, seed = self.capacity(capacity_token_fraction), check("seed", seed, SEED)
        max_tokens = check("max_tokens", max_tokens, Whole(optional=True))
        collector = self._collector(Options(layers, full, predicted))
        if of_data := is_data(data_or_texts):
            batches = self._open(
                Data(data_or_texts, subset, tokens_per_sample, batch_size, sample_break_mode, context_window)
            )
            vocab, asked = len(batches.dictionary), batches.data.asked()
        else:
            batches = self._batches(data_or_texts, check("batch_size", batch_size, Whole()))
            texts = sum(len(batch.ids) for batch in batches)
            vocab, asked = self.vocab, {"texts": texts, "batch_size": int(batch_size)}
        chosen = list(batches if max_tokens is None else up_to(batches, max_tokens))
        score_batches(
            self, chosen, fraction=fraction, vocab=vocab, seed=seed, progress=progress, trace=collector
        )
        return self._trace(collector, chosen, fraction, seed, asked, of_data)

    def residency(self, clear: bool = False) -> pd.DataFrame:
        """How many experts a model with ``load``'s ``resident`` fetched since loading, or since the last call with ``clear``.

        Args:
            clear: afterwards set all counts to zero, and fill the slots as after loading.

        Returns:
            One row per MoE layer, of all ranks together: ``layer``, ``requests`` (choices), ``hits`` (requests whose expert was
            in a slot), ``value`` (hits / requests), ``copied`` (experts copied to their device; a pass copies each once at
            most), ``GiB`` of them, ``ahead`` (those copied ahead of their request) and ``used`` (of those, the requested).

            Padding counts, as its experts are fetched like any others: a batch of texts of several lengths has more requests
            than its trace has choices, and other hits; so has data whose last block is shorter than the others. Without padding,
            as of texts with ``batch_size=1``, both are those of :func:`moekit.metrics.cache_hits` with one rank, for generated text
            with ``prompt=True``.

        Raises:
            ValueError: all experts are on their devices.
        """
        return residency(self, check("clear", clear, Flag()))

    def _open(self, data: Data) -> Batches:
        """Binarised data with at least one sample that the model can take."""
        batches = self.open_data(data)
        if not len(batches):
            raise ValueError(
                f"{data.prefix}: all {batches.skipped:,} samples are longer than the model's {self.config.max_positions} "
                "positions; sample_break_mode='none' cuts the text into blocks that fit"
            )
        return batches

    def _batches(self, texts: Any, batch_size: int) -> list[Batch]:
        return text_batches(self.ids("texts", texts), batch_size, self.config.max_positions, self.first)

    def _collector(self, trace: bool | Options) -> tracing.Collector | None:
        options = Options.asked(trace)
        return None if options is None else tracing.Collector(options.of(self.config))

    def _trace(
        self,
        collector: tracing.Collector,
        batches: Sequence[Batch],
        fraction: float | None,
        seed: int,
        asked: dict[str, Any],
        of_data: bool,
    ) -> tracing.Trace:
        found = collector.trace(self.config.experts, describe_run(self, batches, fraction, seed) | asked)
        if of_data and self.config.add_bos:
            # fairseq has the <s> that begins a sample as its own target, which no result counts.
            begun = np.flatnonzero((found.token == BOS) & (found.target == BOS))
            found.logprob[begun[np.unique(found.sample[begun], return_index=True)[1]]] = np.nan
        return found


@ckpt.no_collector()
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
    ranks: Ranks | str | None = None,
    verify: bool = True,
    placement: Mapping[int, Sequence[int]] | None = None,
    experts: str | None = None,
    resident: int | None = None,
    gpu_memory: str | float | None = None,
    policy: str | tracing.Trace | Path = USUAL,
    prefetch: bool = True,
) -> Model:
    """Load a checkpoint of fairseq's ``moe`` branch onto ``world_size`` ranks.

    Args:
        checkpoint: a folder, ``model.pt``, ``model-shared.pt``, any ``model-rank-N.pt``; all name the same model
            (:func:`moekit.checkpoint.find`). "demo" is the model in the repository, "demo-dense" its dense sibling.
        world_size: ranks, each with a share of the experts; any number, whatever the number of files. None: one for
            every GPU, one on the CPU.
        device: "cuda" (one GPU per rank), "cpu", or "auto": GPUs where there are any.
        dtype: "float32", "float16", "bfloat16", or "auto": the checkpoint's own on GPUs, float32 on the CPU.
        dictionary: ``dict.txt`` or its folder; rows of the matrices beyond it are not loaded. None: the one beside the
            checkpoint, if there is one; else all rows are loaded, and each data set's dictionary decides. "demo" is the
            demo's.
        bpe: the folder with ``encoder.json``, ``vocab.bpe`` and ``dict.txt`` that turn text into ids; "demo" is the
            demo's. None: where the checkpoint lies, or ``gpt2_bpe`` there or beside it; needed only when text is.
        config: fields of the checkpoint's :class:`~moekit.nn.config.ModelConfig` to replace, such as ``second_expert``; not
            those that give the weights their shapes.
        backend: what computes: "triton", "loop" (slow and simple; the others are checked against it), "grouped_mm" (as "loop",
            with torch's grouped product for the experts), or "auto": the fastest that runs here.
        progress: show a bar.
        ranks: "local" (as None) or "ray", for ranks on this machine or on the Ray cluster that it belongs to, which end when
            the model is closed. Or a pool that :func:`moekit.ranks.start` or :class:`moekit.ranks.RayRanks` made: world size
            and device are the pool's, and closing the model empties the ranks for another one.
        verify: compare the checksum of each tensor that is read with the file's, and warn of weights that are not finite.
            The result is remembered until a file changes, so that only the first load takes the time.
        placement: for each layer with experts, the rank of each expert, such as
            :func:`moekit.metrics.fitted_placement` finds; as many on each rank as without it. It changes who computes, and
            no result. None: rank after rank in the order of the experts.
        experts: "int8" or "fp8" (e4m3): the experts' matrices have numbers of one byte and a float32 scale for each row,
            made while they are read; all other weights keep ``dtype``. None: the experts have ``dtype``, too.
        resident: how many experts of each layer stay on the device of their rank; the others are in host memory (pinned, for
            GPUs) and are fetched when a token needs them. No result depends on it. None: all.
        gpu_memory: what a rank may take of its GPU, such as "14GiB" or a number of bytes; ``resident`` follows from it
            (:func:`moekit.plan`). "auto": what is free.
        policy: which experts stay: "lru" (requested last), "lfu" (requested most often), or a trace of the model or its
            file, whose most requested ones stay always. Another one than "lru" needs ``resident`` or ``gpu_memory``, as False for
            ``prefetch`` does.
        prefetch: in passes of few tokens, also fetch the experts of the next layer that this layer's choices predict.

    Raises:
        ValueError: the checkpoint is incomplete, damaged or not what it should be, an argument makes no sense, or the model
            does not fit (:func:`moekit.plan` has the numbers).
        moekit.ranks.RankError: a rank failed.
    """
    began = time.perf_counter()
    # Checkpoints are read with it.
    import_whole("omegaconf")
    world_size = check("world_size", world_size, Whole(optional=True))
    verify = check("verify", verify, Flag())
    if isinstance(ranks, str):
        ranks = None if check("ranks", ranks, Choice(WHERE)) == "local" else "ray"
    devices = None
    if ranks is None:
        devices = choose_devices(world_size, device)
        if len(devices) > 1:
            prepare()
    elif ranks != "ray":
        devices = _devices_of(ranks, world_size, device)
    files = ckpt.find(checkpoint)
    known = find_dictionary(files, dictionary)
    # The free memory is read before the ranks start, which take some of it.
    far = devices is None or (ranks is not None and any(ranks.nodes))
    free = None if far else room(devices, lent=ranks is not None)
    pool = None
    if ranks is None and len(devices) > 1 and ready():
        # The ranks come up while the headers are read here.
        pool = start(len(devices), devices[0].type, wait=False)
    try:
        types = None if known is None else len(known)
        with waking(devices if ranks is None else ()):
            plan = ckpt.survey(files, types)
            own = plan.config
            plan = replace(plan, config=changed(own, {} if config is None else config))
            codec = None if bpe is None else find_codec(files, plan.config, bpe, known)
            if ranks == "ray":
                # Only the cluster knows the devices.
                pool = RayRanks(world_size, device=device)
                devices = pool.devices
            world_size = len(devices)
            plan = replace(plan, physical=ckpt.physical_of(placement, plan.config, world_size))
            weights = weights_dtype(dtype, devices[0], plan)
            kind = experts_dtype(experts, files, plan.config)
            backend = choose_backend(backend, devices[0], weights, kind)
            run = Run.of(plan.config, devices, weights, backend, types, one_byte=kind is not None)
            free = free or unknown(world_size)
            run, within = fitting(run, free, resident, gpu_memory)
            if said := too_long(run, free, within):
                # Behind this function there is the frame of its decorator.
                warnings.warn(said, stacklevel=3)
            limited = resident is not None or gpu_memory is not None
            staying = residence(run, policy, prefetch, limited)
        if pool is None:
            pool = start(world_size, devices[0].type) if ranks is None else LentRanks(ranks)
        _check_seen(pool, files)
        _check_gate(pool, plan.config, weights)
        model = Model(plan, files, pool, weights, known, codec, experts)
        model.checkpoint, model.changes = origin(files), differences(own, plan.config)
        model.cached_tokens = cached_tokens(run, within)
        total = sum(source.bytes * (world_size if source.common else 1) for source in plan.sources)
        with progress_bar("loading", total, "B", show=progress) as bar:
            how = plan, weights, backend, verify, kind, staying
            model.parts = pool.call(loading.load, *how, on_report=lambda rank, n: bar.update(n))
            plan.opened.clear()
            ckpt.warn_nonfinite(found for part in model.parts for found in part["nonfinite"])
            # The bytes of the files that are no tensors.
            bar.update(bar.total - bar.n)
        model.load_seconds = time.perf_counter() - began
    except BaseException as error:
        if pool is not None:
            pool.close()
        if isinstance(error, RankError) and (said := _of_a_file(error, files)):
            raise ValueError(said) from error
        raise
    return model


def _of_a_file(error: RankError, files: ckpt.Files) -> str | None:
    """The error's sentence, if a rank failed because a checkpoint file is wrong; else None."""
    said = str(error.__cause__)
    names = [str(name) for path in files.all for name in (path, path.resolve())]
    about = isinstance(error.__cause__, ValueError) and said.startswith(tuple(names))
    return said if about else None


def _check_gate(pool: Ranks, config: ModelConfig, dtype: torch.dtype) -> None:
    """Check that a gate of the user's works on every rank: what it raises in a pass costs all ranks, as others wait there."""
    if config.dense:
        return
    # One that is entered under a name of the branch is refused here.
    top_k_of(config)
    if config.gate in PROVEN:
        return
    for fault in pool.call(loading.try_gate, config, dtype):
        if fault is not None:
            raise ValueError(fault)


def _check_seen(pool: Ranks, files: ckpt.Files) -> None:
    """Check that every node sees the checkpoint's files under their paths; a ValueError names the first that does not."""
    if not any(pool.nodes):
        return
    found = dict(pool.call(loading.missing, {path.absolute(): path.stat().st_size for path in files.all}))
    for node, wrong in found.items():
        if wrong:
            of = [rank for rank, name in enumerate(pool.nodes) if name == node]
            raise ValueError(
                f"node {node} (ranks {of}) does not see the checkpoint as this machine does: {wrong[0]}"
                + (f", and {len(wrong) - 1} more files" if wrong[1:] else "")
                + "; put it where all nodes see it under one path"
            )


def _devices_of(pool: Ranks, world_size: int | None, device: str) -> list[torch.device]:
    """The devices of the pool that ``load`` was given; a ValueError where its other arguments contradict the pool."""
    if not isinstance(pool, Ranks):
        raise ValueError(f"ranks is {reprlib.repr(pool)}: expected a pool that moekit.ranks.start made")
    if world_size not in (None, pool.world_size):
        raise ValueError(
            f"world_size is {world_size!r}, and ranks has {pool.world_size}: leave world_size out"
        )
    if device not in ("auto", pool.devices[0].type):
        raise ValueError(f"device is {device!r}, and ranks is on {pool.devices[0].type}: leave device out")
    return pool.devices
