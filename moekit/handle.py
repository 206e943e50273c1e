"""``moekit.load`` and the handle it returns: a model on its ranks, ready for any number of calls."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch

from moekit import batches as data_order
from moekit import checkpoint as ckpt
from moekit import generate as generation
from moekit import ranks
from moekit import trace as tracing
from moekit.batches import Batch
from moekit.data.codec import FILES as CODEC_FILES
from moekit.data.codec import Codec
from moekit.data.dictionary import Dictionary
from moekit.nn import intervene
from moekit.nn.config import ModelConfig, changed
from moekit.nn.experts import choose_kernel
from moekit.nn.record import Options
from moekit.progress import bar as progress_bar
from moekit.worker import loading, scoring

if TYPE_CHECKING:
    import pandas as pd

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENS_A_PASS = {"cpu": 4096, "cuda": 65_536}  # how many tokens pay off in one forward pass
STEPS_A_CALL = 8
WARM_SHAPES = 4  # that a GPU is warmed up for; texts may have hundreds


@dataclass(frozen=True)
class Evaluation:
    """What :meth:`Model.evaluate` found.

    Attributes:
        loss_base2: mean negative log-probability a token, in bits.
        perplexity: ``2 ** loss_base2``.
        ntokens: tokens scored.
        seconds: scoring alone, without loading and, on GPUs, without :meth:`Model.warm_up`.
        tokens_per_second: ``ntokens / seconds``.
        tokens: a row a token, sorted by sample and position: ``sample_id``, ``position`` (in the sample, from 0),
            ``token`` (dictionary id), ``logprob`` (natural log, float32).
        trace: what the router did, a :class:`moekit.trace.Trace`, if it was asked for.
    """

    loss_base2: float
    perplexity: float
    ntokens: int
    seconds: float
    tokens_per_second: float
    tokens: pd.DataFrame
    trace: tracing.Trace | None = None


class Model:
    """A model on its ranks; made by :func:`load`. A context manager: leaving it stops the ranks.

    Attributes:
        config: the model's :class:`~moekit.nn.config.ModelConfig`.
        files: where it came from.
        world_size, device, dtype: how it runs.
        parts: a dict a rank: ``files``, ``experts``, ``parameters``, ``bytes``, ``seconds`` of its load.
        load_seconds: from the call to ready.
        intervention: what :meth:`route` changes at the moment, or None.
    """

    def __init__(
        self,
        plan: ckpt.Plan,
        files: ckpt.Files,
        pool: ranks.Ranks,
        dtype: torch.dtype,
        bpe: str | Path | None = None,
    ):
        self.config: ModelConfig = plan.config
        self.plan, self.files, self.ranks, self.dtype, self.bpe = plan, files, pool, dtype, bpe
        self.parts: list[dict] = []
        self.load_seconds = math.nan
        self.intervention: intervene.Intervention | None = None
        self.abandoned: list[int] = []  # generations (their keys on the ranks) that the next one ends
        self.warm: set[tuple] = set()  # see warm_up

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def device(self) -> str:
        return self.ranks.devices[0].type

    @functools.cached_property
    def codec(self) -> Codec:
        """Text to ids and back, see ``load``'s ``bpe``.

        Raises:
            ValueError: its files are nowhere to be found, or its dictionary is not the model's.
        """
        folder = self.files.shared.parent
        places = [Path(self.bpe)] if self.bpe else [folder, folder / "gpt2_bpe", folder.parent / "gpt2_bpe"]
        for place in places:
            if all((place / name).is_file() for name in CODEC_FILES):
                codec = Codec.load(place)
                if len(codec) > self.config.vocab_rows:
                    raise ValueError(
                        f"{place} has {len(codec)} types, the model knows {self.config.vocab_rows}: not its dictionary"
                    )
                return codec
        where = " or ".join(map(str, places))
        raise ValueError(
            f"text needs {', '.join(CODEC_FILES)}, expected in {where}: put them there, or give load(bpe=...) their folder"
        )

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<moekit model {self.files.shared.parent}: {c.layers} layers, {len(c.moe_layers)} with {c.experts} experts, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.world_size} x {self.device}>"
        )

    generate = generation.generate
    stream = generation.stream

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
        self.warm_up(chosen, fraction, vocab, progress)
        start = time.perf_counter()
        scores = self.score_batches(
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
        meta = tracing.describe_run(self, chosen, fraction, seed) | batches.asked
        return replace(found, trace=collector.trace(self.config.experts, meta))

    def warm_up(
        self, batches: Sequence[Batch], fraction: float | None, vocab: int, progress: bool = True
    ) -> None:
        """On GPUs, score a step of each shape and forget it, unless one like it has been: a first pass compiles kernels,
        which later processes find on the disk, and connects ranks, and its seconds tell nothing of the work.
        """
        if self.device != "cuda":
            return
        fresh = {}
        for step in plan_steps(batches, self.world_size, TOKENS_A_PASS[self.device]):
            like = (len(step), step[0].tokens.shape, step[0].padded(), fraction is None, vocab)
            if like not in self.warm and len(fresh) < WARM_SHAPES:
                fresh.setdefault(like, step)
        if fresh:
            with progress_bar("warming up", len(fresh), " passes", show=progress, delay=1.0) as bar:
                for step in fresh.values():
                    self.ranks.call(scoring.score, [step], fraction=fraction, vocab=vocab, seed=0)
                    bar.update(1)
            self.warm |= fresh.keys()

    @property
    def reads_text(self) -> bool:
        """Whether the model's :attr:`codec` is there."""
        try:
            return self.codec is not None
        except ValueError:
            return False

    def ids(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> tuple[list[list[int]], int]:
        """Texts, or their ids, as ids; and the types of the dictionary that they are of.

        Raises:
            ValueError: an id is none of the dictionary's, or there is text and no codec.
        """
        vocab = len(self.codec) if any(isinstance(text, str) for text in texts) else self.config.vocab_rows
        codec = self.codec if self.reads_text else None
        return [generation.prompt_ids(text, number, codec, vocab) for number, text in enumerate(texts)], vocab

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
        batches = tracing.text_batches(ids, batch_size, self.config.max_positions)
        scores = self.score_batches(batches, fraction=fraction, vocab=vocab, seed=seed, progress=False)
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
                texts, or their ids: a sample each, routed ``batch_size`` at a time (:func:`moekit.trace.text_batches`).
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
        if tracing.is_data(data_or_texts):
            block = self.block(tokens_per_sample)
            batches = self.open_data(
                data_or_texts, subset, block, batch_size, sample_break_mode, context_window
            )
            vocab, asked = len(batches.dictionary), batches.asked
        else:
            texts = [data_or_texts] if isinstance(data_or_texts, str) else data_or_texts
            ids, vocab = self.ids(texts)
            batches = tracing.text_batches(ids, batch_size, self.config.max_positions)
            asked = {"texts": len(ids), "batch_size": batch_size}
        if max_tokens is not None:
            check_positive("max_tokens", max_tokens)
            batches = tracing.up_to(batches, max_tokens)
        chosen = list(batches)
        self.score_batches(
            chosen, fraction=fraction, vocab=vocab, seed=seed, progress=progress, trace=collector
        )
        meta = tracing.describe_run(self, chosen, fraction, seed) | asked
        return collector.trace(self.config.experts, meta)

    @contextlib.contextmanager
    def route(
        self,
        *,
        mask: Mapping[int, Iterable[int]] | Iterable[tuple[int, int]] = (),
        force: intervene.Force | Iterable[intervene.Force] = (),
        drop_second: bool = False,
        capacity_token_fraction: float | EllipsisType | None = ...,
    ) -> Iterator[Model]:
        """Change the routing of every call in the ``with`` block, on all ranks.

        What each change does exactly stands at :class:`moekit.nn.intervene.Intervention`.

        Args:
            mask: experts that get no token: ``{layer: [experts]}`` or ``[(layer, expert), ...]``.
            force: tokens that go to chosen experts, see :class:`moekit.nn.intervene.Force`.
            drop_second: only first choices are dispatched.
            capacity_token_fraction: in place of that of the calls, None too; ``...`` leaves them theirs.

        Raises:
            ValueError: no such layer or expert, too few experts left, a contradiction, or a block within a block.
        """
        if self.intervention is not None:
            raise ValueError("this is inside another model.route(...) block: give all changes to one")
        self.intervention = intervene.plan(
            self.config,
            mask=mask,
            force=force,
            drop_second=drop_second,
            capacity_token_fraction=capacity_token_fraction,
        )
        try:
            yield self
        finally:
            self.intervention = None

    def block(self, tokens_per_sample: int | None) -> int:
        """Tokens of a block: as many as the model has positions unless told."""
        return self.config.max_positions if tokens_per_sample is None else tokens_per_sample

    def open_data(
        self,
        data: str | Path,
        subset: str,
        tokens_per_sample: int,
        batch_size: int,
        sample_break_mode: str,
        context_window: int,
    ) -> data_order.Batches:
        """Data for this model, see :meth:`evaluate`."""
        check_positive("batch_size", batch_size)
        check_positive("tokens_per_sample", tokens_per_sample)
        if tokens_per_sample > self.config.max_positions:
            raise ValueError(
                f"tokens_per_sample={tokens_per_sample} is more than the model's {self.config.max_positions} positions"
            )
        batches = data_order.open_data(
            data,
            subset,
            tokens_per_sample=tokens_per_sample,
            batch_size=batch_size,
            max_positions=self.config.max_positions,
            sample_break_mode=sample_break_mode,
            context_window=context_window,
            add_bos=self.config.add_bos,
        )
        vocab = len(batches.dictionary)
        if vocab > self.config.vocab_rows:
            raise ValueError(
                f"{data}: its dict.txt has {vocab} types, the model knows {self.config.vocab_rows}: "
                "use the data that was binarised with the model's own dict.txt"
            )
        return batches

    def score_batches(
        self,
        batches: Sequence[Batch],
        *,
        fraction: float | None,
        vocab: int,
        seed: int,
        progress: bool,
        trace: tracing.Collector | None = None,
    ) -> dict:
        """Score batches on all ranks: batch index -> float32 [B, T] log-probabilities of its targets."""
        real = [(b.ids.tolist(), (b.tokens != data_order.PAD).sum(axis=1).tolist()) for b in batches]
        lengths = {sample: n for ids, tokens in real for sample, n in zip(ids, tokens, strict=True)}
        if self.intervention is not None:
            self.intervention.check(lengths)
        longest = max(lengths.values(), default=0)
        if self.config.learned_positions and longest > self.config.max_positions:
            raise ValueError(
                f"a sample has {longest} tokens, <s> and context included, and the model "
                f"{self.config.max_positions} learned positions: cut the data into shorter ones"
            )
        scores = {}
        targets = sum(int((b.targets != data_order.PAD).sum()) for b in batches)
        with progress_bar("scoring", targets, " tokens", show=progress) as bar:
            steps = plan_steps(batches, self.world_size, TOKENS_A_PASS[self.device])
            while some := list(itertools.islice(steps, STEPS_A_CALL)):
                found = self.ranks.call(
                    scoring.score,
                    some,
                    fraction=fraction,
                    vocab=vocab,
                    seed=seed,
                    trace=None if trace is None else trace.options,
                    intervention=self.intervention,
                    on_report=lambda rank, tokens: bar.update(tokens),
                )
                for pairs, parts in found:
                    scores.update(pairs)
                    if trace is not None:
                        trace.add(parts)
        return scores

    def close(self) -> None:
        """Stop the ranks and free their memory."""
        self.ranks.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    checkpoint: str | Path,
    world_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    dictionary: str | Path | None = None,
    bpe: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    kernel: str = "auto",
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
        kernel: how the experts are computed: "triton", "grouped_mm", "loop" (slow, and plain to see that it is right), or
            "auto": the fastest there is.
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
    kernel = choose_kernel(kernel, devices[0], kind)

    pool = ranks.start(world_size, devices[0].type)
    try:
        model = Model(plan, files, pool, kind, bpe)
        total = sum(source.bytes * (world_size if i == 0 else 1) for i, source in enumerate(plan.sources))
        with progress_bar("loading", total, "B", show=progress) as bar:
            model.parts = pool.call(loading.load, plan, kind, kernel, on_report=lambda rank, n: bar.update(n))
            plan.opened.clear()
            bar.update(bar.total - bar.n)  # what is not tensors
        model.load_seconds = time.perf_counter() - start
    except BaseException:
        pool.close()
        raise
    return model


def weights_dtype(dtype: str, device: torch.device, plan: ckpt.Plan) -> torch.dtype:
    """What :func:`load`'s ``dtype`` means on ``device``."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else plan.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dictionary_size(files: ckpt.Files, dictionary: str | Path | None) -> int | None:
    """Types of the dictionary that ``load`` was given or finds beside the checkpoint; None if there is none."""
    path = Path(dictionary).expanduser() if dictionary is not None else files.shared.parent
    path = path / "dict.txt" if path.is_dir() else path
    if not path.is_file():
        if dictionary is not None:
            raise ValueError(f"there is no dictionary {path}")
        return None
    return len(Dictionary(path))


def plan_steps(batches: Iterable[Batch], world_size: int, tokens: int) -> Iterator[list[Batch]]:
    """Pack batches into steps of up to about ``tokens`` tokens a rank; batches of a step are of one shape.

    A step's batches go to the ranks in turn, each rank taking its own in one forward pass.
    """
    shapes: dict[tuple, list[Batch]] = {}
    for batch in batches:
        shapes.setdefault((batch.tokens.shape, batch.padded()), []).append(batch)
    for alike in shapes.values():
        size = world_size * max(1, tokens // alike[0].tokens.size)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def summarize(batches: Sequence[Batch], scores: dict, seconds: float, skip_first: bool) -> Evaluation:
    """Put scored batches into fairseq's figures (``eval_lm`` in fairseq_cli/eval_lm.py).

    Args:
        skip_first: the first target of each sample is the begin-of-sentence symbol, which does not count.
    """
    import numpy as np
    import pandas as pd

    parts: dict[str, list] = {"sample_id": [], "position": [], "token": [], "logprob": []}
    for batch in batches:
        for row, sample in enumerate(batch.ids):
            real = batch.scored(row)
            token, logprob = (
                batch.targets[row][real][skip_first:],
                scores[batch.index][row][real][skip_first:],
            )
            parts["sample_id"].append(np.full(len(token), sample))
            parts["position"].append(np.arange(skip_first, skip_first + len(token)))
            parts["token"].append(token)
            parts["logprob"].append(logprob)
    if not any(len(part) for part in parts["token"]):
        raise ValueError("the data has no tokens to score")
    tokens = pd.DataFrame({name: np.concatenate(part) for name, part in parts.items()})
    tokens = tokens.sort_values(["sample_id", "position"], kind="stable", ignore_index=True)
    loss = -tokens["logprob"].to_numpy(np.float64).mean() / math.log(2)
    return Evaluation(float(loss), float(2**loss), len(tokens), seconds, len(tokens) / seconds, tokens)


def pieces(codec: Codec | None, ids: Iterable[int]) -> list[str]:
    """Each token for the eye; by its id where there is no codec."""
    return codec.pieces(ids) if codec is not None else [f" {number}" for number in ids]


def check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


def check_fraction(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"capacity_token_fraction={value!r}: expected None or a number, as in fairseq")
    return float(value)
