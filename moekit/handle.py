"""A loaded model on its ranks: what every call needs to know of it."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch

from moekit import arguments, paths, ranks
from moekit import checkpoint as ckpt
from moekit.arguments import Capacity, Choice, check
from moekit.batches import Batch
from moekit.checked import Instance
from moekit.data.codec import FILES as CODEC_FILES
from moekit.data.codec import Codec, Ids, has_codec, places
from moekit.data.dictionary import Dictionary
from moekit.fairseq_data import Batches, Data, open_data
from moekit.nn import intervene
from moekit.nn.config import ModelConfig
from moekit.nn.gates import gate_of
from moekit.nn.operations import DTYPES
from moekit.nn.quantise import KINDS, dtype_name
from moekit.symbols import PAD
from moekit.versions import versions


class Handle:
    """A model on its ranks; made by :func:`moekit.load`. A context manager: leaving it stops the ranks.

    Attributes:
        config: the model's :class:`~moekit.nn.config.ModelConfig`.
        files: the checkpoint's files.
        world_size: the number of ranks.
        device: "cuda" or "cpu".
        dtype: torch's dtype of the weights and of what is computed.
        experts: the type of the experts' matrices, "int8" or "fp8"; None: ``dtype``.
        checkpoint: the files that :func:`moekit.load` read, as a trace names them (:func:`origin`); empty where none were read.
        changes: the fields of the config that differ from the checkpoint's own, by ``load``'s ``config``.
        parts: one dict per rank, what :func:`moekit.worker.loading.load` returns there; empty before that.
        load_seconds: the seconds that :func:`moekit.load` took.
        cached_tokens: that a pass of a rank may have where all of their keys and values are in a cache; 0: none is known to
            have room.
        intervention: what :meth:`route` changes at the moment, or None.
    """

    def __init__(
        self,
        plan: ckpt.Plan,
        files: ckpt.Files,
        pool: ranks.Ranks,
        dtype: torch.dtype,
        dictionary: Dictionary | None = None,
        codec: Codec | None = None,
        experts: str | None = None,
    ):
        self.config: ModelConfig = plan.config
        self.plan, self.files, self.ranks, self.dtype, self.experts = plan, files, pool, dtype, experts
        self._dictionary = dictionary
        if codec is not None:
            self.codec = codec
        self.checkpoint: dict[str, Any] = {}
        self.changes: dict[str, Any] = {}
        self.parts: list[dict] = []
        self.load_seconds = math.nan
        self.cached_tokens = 0
        self.intervention: intervene.Intervention | None = None
        # Keys of generations that are still on the ranks; the next generation ends them.
        self.abandoned: list[int] = []
        # The shapes of steps that the GPUs are warmed up for (moekit.scoring.warm_up).
        self.warm: set[tuple] = set()

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def device(self) -> str:
        return self.ranks.devices[0].type

    @property
    def versions(self) -> dict[str, str | None]:
        """What a result of this model depends on; ``cuts`` are those of its ranks, None where no kernel has any."""
        found = versions()
        if self.parts:
            found["cuts"] = "; ".join(sorted({part["cuts"] for part in self.parts} - {None})) or None
        return found

    @functools.cached_property
    def codec(self) -> Codec | Ids:
        """Turns text into ids and back (``load``'s ``bpe``). Without a codec, it shows ids and raises an error for text."""
        return find_codec(self.files, self.config, None, self._dictionary)

    @functools.cached_property
    def dictionary(self) -> Dictionary | None:
        """The model's own: ``load`` was given it, or it lies beside the checkpoint or with the codec; else None."""
        if self._dictionary is None and self.codec.reads_text:
            return self.codec.dictionary
        return self._dictionary

    def __repr__(self) -> str:
        c = self.config
        kind = "" if self.experts is None else f" in {self.experts}"
        experts = f"{len(c.moe_layers)} with {c.experts} experts{kind}" if c.moe_layers else "all dense"
        return (
            f"<moekit model {self.files.shared.parent}: {c.layers} layers, {experts}, "
            f"{dtype_name(self.dtype)} on {self.world_size} x {self.device}>"
        )

    @property
    def reads_text(self) -> bool:
        """Whether there is a codec that turns text into ids; without one, ``codec`` shows ids."""
        return self.codec.reads_text

    @property
    def vocab(self) -> int:
        """V, the types that the next token is chosen from: those of the model's dictionary, else all rows of its matrices."""
        return self.config.vocab_rows if self.dictionary is None else len(self.dictionary)

    @property
    def first(self) -> int:
        """The symbol that begins a text: ``</s>``, or ``<s>`` where the model was trained with ``add_bos_token``."""
        return self.config.first

    def ids(self, name: str, texts: Any, first: int | None = None) -> list[np.ndarray]:
        """A text, texts, ids or lists of ids, from any iterables, as [n] int64 arrays of ids; ``name`` is the argument's.

        Args:
            first: a symbol that comes before the ids of each; None: none does.

        Raises:
            ValueError: they are something else, an id is none of the dictionary's, or there is text and no codec.
        """
        read = [
            self.codec.encode(ids) if isinstance(ids, str) else ids
            for ids in arguments.sequences(name, texts)
        ]
        lengths = np.fromiter(map(len, read), np.int64, len(read))
        found = _joined(read, int(lengths.sum()))
        # All are looked at together: a call for each id takes longer than some models take to read it.
        wrong = np.flatnonzero((found < 0) | (found >= self.vocab) | (found == PAD))
        if len(wrong):
            ends = np.cumsum(lengths)
            number = int(np.searchsorted(ends, wrong[0], side="right"))
            token = read[number][wrong[0] - ends[number]]
            raise ValueError(
                f"{arguments.one_of(name)} {number} has the id {arguments.shown(token)}; expected 0 to {self.vocab - 1}, "
                f"without {PAD}, the padding"
            )
        starts = np.cumsum(lengths) - lengths
        if first is not None:
            found = np.insert(found, starts, first)
            lengths, starts = lengths + 1, starts + np.arange(len(starts))
        return [
            found[start:end] for start, end in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        ]

    def capacity(self, asked: float | str | None) -> float | None:
        """The capacity fraction of a call that asks for ``asked``: an intervention's own replaces it, and a dense model has none."""
        asked = check("capacity_token_fraction", asked, Capacity())
        if not self.config.moe_layers:
            return None
        own = ... if self.intervention is None else self.intervention.capacity_token_fraction
        return asked if own is ... else own

    @contextlib.contextmanager
    def route(
        self,
        *,
        mask: Mapping[int, Iterable[int]] | Iterable[tuple[int, int]] = (),
        force: intervene.Force | Iterable[intervene.Force] = (),
        drop_second: bool = False,
        capacity_token_fraction: float | str | EllipsisType | None = ...,
    ) -> Iterator[Handle]:
        """Change the routing of every call in the ``with`` block, on all ranks.

        :class:`moekit.nn.intervene.Intervention` says exactly what each change does.

        Args:
            mask: experts that get no token: ``{layer: [experts]}`` or ``[(layer, expert), ...]``.
            force: tokens that go to chosen experts, see :class:`moekit.nn.intervene.Force`.
            drop_second: only first choices are dispatched.
            capacity_token_fraction: in place of that of each call; None drops nothing, and ``...`` keeps the call's.

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

    def open_data(self, data: Data | str | Path, *options: Any, **more: Any) -> Batches:
        """Data for this model, checked: a :class:`moekit.fairseq_data.Data`, or the arguments of one."""
        data = data if isinstance(data, Data) else Data(data, *options, **more)
        if (data.tokens_per_sample or 1) > self.config.max_positions:
            raise ValueError(
                f"tokens_per_sample={data.tokens_per_sample}: expected at most the model's {self.config.max_positions} positions"
            )
        limits = {"max_positions": self.config.max_positions, "add_bos": self.config.add_bos}
        batches = open_data(data, **limits, dictionary=self.dictionary)
        check_size(len(batches.dictionary), f"{data.data}: its dict.txt", self.config)
        return batches

    def close(self) -> None:
        """Stop the ranks and free their memory."""
        self.ranks.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _joined(read: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """The ids of ``read``, ``count`` in number, one after the other as int64; one that is too large for it as the largest."""
    ids = itertools.chain.from_iterable
    try:
        return np.fromiter(ids(read), np.int64, count)
    except OverflowError:
        return np.fromiter((max(-1, min(token, arguments.MOST)) for token in ids(read)), np.int64, count)


# what an argument that takes a model may be
MODEL = Instance(Handle, "a model that moekit.load gave")


def weights_dtype(dtype: str, device: torch.device, plan: ckpt.Plan) -> torch.dtype:
    """What :func:`load`'s ``dtype`` means on ``device``."""
    if check("dtype", dtype, Choice(("auto", *DTYPES))) == "auto":
        return torch.float32 if device.type == "cpu" else plan.dtype
    return DTYPES[dtype]


def experts_dtype(experts: str | None, files: ckpt.Files, config: ModelConfig) -> torch.dtype | None:
    """What :func:`load`'s ``experts`` means: the type of the experts' matrices, None for that of the other weights.

    Raises:
        ValueError: the model has no experts, or there is no such type.
    """
    experts = check("experts", experts, Choice(tuple(KINDS), optional=True))
    if experts is None:
        return None
    if not config.moe_layers:
        raise ValueError(
            f"experts={experts!r}: the model in {files.shared.parent} is dense, it has no experts: leave it out"
        )
    return KINDS[experts]


def find_dictionary(files: ckpt.Files, dictionary: str | Path | None) -> Dictionary | None:
    """The dictionary that ``load`` was given or finds beside the checkpoint; None if there is none.

    Raises:
        ValueError: it was given and is not there, or is no dictionary.
    """
    if dictionary is None:
        path = files.shared.parent
    else:
        path = paths.of_demo(dictionary, "bpe") or check("dictionary", dictionary, arguments.Path())
    with arguments.reading(path):
        path = path / "dict.txt" if path.is_dir() else path
        if path.is_file():
            return Dictionary(path)
    if dictionary is not None:
        raise ValueError(f"there is no dictionary {path}; expected a dict.txt or its folder")
    return None


def find_codec(
    files: ckpt.Files, config: ModelConfig, bpe: str | Path | None, dictionary: Dictionary | None
) -> Codec | Ids:
    """What turns text into ids; where its files are missing or another model's, something that shows ids.

    Raises:
        ValueError: ``bpe`` was given, and its files are missing or another model's.
    """
    try:
        return _codec(files, config, bpe, dictionary)
    except ValueError as error:
        if bpe is not None:
            raise
        return Ids(str(error))


def _codec(
    files: ckpt.Files, config: ModelConfig, bpe: str | Path | None, dictionary: Dictionary | None
) -> Codec:
    folders = places(files.shared.parent)
    if bpe is not None:
        folders = [paths.of_demo(bpe, "bpe") or check("bpe", bpe, arguments.Path())]
    with arguments.reading(folders[0]):
        place = next(filter(has_codec, folders), None)
    if place is None:
        raise ValueError(
            f"text needs {', '.join(CODEC_FILES)}, expected in {' or '.join(map(str, folders))}: put them there, or give "
            "load(bpe=...) their folder"
        )
    with arguments.reading(place):
        codec = Codec.load(place)
    check_size(len(codec), str(place), config)
    if dictionary is not None and (difference := codec.dictionary.difference(dictionary)):
        raise ValueError(f"the codec is of another dictionary than the model: {difference}")
    return codec


def check_size(types: int, whose: str, config: ModelConfig) -> None:
    """Check that the model's matrices have a row for each of a dictionary's ``types``; else a ValueError."""
    if types > config.vocab_rows:
        raise ValueError(
            f"{whose} has {types} types, the model knows {config.vocab_rows}: use the model's own dict.txt, and the data "
            "that was binarised with it"
        )


def describe_run(
    model: Handle, batches: Sequence[Batch], fraction: float | None, seed: int
) -> dict[str, Any]:
    """The meta of a trace, without what was asked of the data; ``fraction`` is the capacity in effect (:meth:`Handle.capacity`).

    Returns:
        ``checkpoint`` (:func:`origin`), ``config`` (the fields that ``load`` changed, where it changed any),
        ``capacity_token_fraction``, ``groups`` (routing
        groups as [samples, tokens a sample, how many], padding included), ``add_bos`` and ``second_expert`` (of the model's
        config; of the latter None where the gate draws nothing), ``seed``, ``intervention``, ``dtype``,
        ``experts`` ("int8", "fp8" or None: ``dtype``), ``device``, ``world_size``, ``backend``, ``versions``, ``created`` (UTC).
    """
    from datetime import UTC, datetime

    change = model.intervention
    draws = bool(model.config.moe_layers) and gate_of(model.config).draws
    shapes = Counter(batch.tokens.shape for batch in batches)
    return {
        # A user may change the meta of a trace, and other traces tell the same checkpoint.
        "checkpoint": copy.deepcopy(model.checkpoint),
        **({"config": dict(model.changes)} if model.changes else {}),
        "capacity_token_fraction": fraction,
        "intervention": None if change is None else change.describe(),
        "second_expert": model.config.second_expert if draws else None,
        "groups": [[*shape, count] for shape, count in sorted(shapes.items())],
        "add_bos": model.config.add_bos,
        "seed": seed,
        "dtype": dtype_name(model.dtype),
        "experts": model.experts,
        "device": model.device,
        "world_size": model.world_size,
        "backend": model.parts[0]["backend"],
        "versions": model.versions,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def origin(files: ckpt.Files) -> dict[str, Any]:
    """A checkpoint's ``path``, ``files`` with name and size, and :func:`fingerprint`.

    It is made when the checkpoint is loaded: later the files may be others, or gone.
    """
    return {
        "path": str(files.shared.parent.resolve()),
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in files.all],
        "fingerprint": fingerprint(files.all),
    }


def fingerprint(paths: Sequence[Path], edge: int = 65_536) -> str:
    """A cheap identity of files: SHA-256 of their names, sizes, and first and last ``edge`` bytes, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(edge))
            file.seek(max(0, size - edge))
            digest.update(file.read(edge))
    return digest.hexdigest()
