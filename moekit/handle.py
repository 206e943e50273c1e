"""A loaded model on its ranks: what every call needs to know of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch

from moekit import checkpoint as ckpt
from moekit import ranks
from moekit.arguments import check_positive
from moekit.batches import Batch
from moekit.data.codec import FILES as CODEC_FILES
from moekit.data.codec import Codec
from moekit.data.dictionary import Dictionary
from moekit.fairseq_data import Batches, open_data
from moekit.generation.request import prompt_ids
from moekit.nn import intervene
from moekit.nn.config import ModelConfig
from moekit.versions import versions

if TYPE_CHECKING:
    pass


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Handle:
    """A model on its ranks; made by :func:`moekit.load`. A context manager: leaving it stops the ranks.

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
        return find_codec(self.files, self.config, self.bpe)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<moekit model {self.files.shared.parent}: {c.layers} layers, {len(c.moe_layers)} with {c.experts} experts, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.world_size} x {self.device}>"
        )

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
        return [prompt_ids(text, number, codec, vocab) for number, text in enumerate(texts)], vocab

    @contextlib.contextmanager
    def route(
        self,
        *,
        mask: Mapping[int, Iterable[int]] | Iterable[tuple[int, int]] = (),
        force: intervene.Force | Iterable[intervene.Force] = (),
        drop_second: bool = False,
        capacity_token_fraction: float | EllipsisType | None = ...,
    ) -> Iterator[Handle]:
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
    ) -> Batches:
        """Data for this model, see :meth:`evaluate`."""
        check_positive("batch_size", batch_size)
        check_positive("tokens_per_sample", tokens_per_sample)
        if tokens_per_sample > self.config.max_positions:
            raise ValueError(
                f"tokens_per_sample={tokens_per_sample} is more than the model's {self.config.max_positions} positions"
            )
        batches = open_data(
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

    def close(self) -> None:
        """Stop the ranks and free their memory."""
        self.ranks.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def find_codec(
    files: ckpt.Files, config: ModelConfig, bpe: str | Path | None, dictionary: Dictionary | None = None
) -> Codec:
    """What turns text into the ids of a model whose files these are; ``bpe`` is ``load``'s.

    Raises:
        ValueError: its files are nowhere to be found, or its dictionary is not the model's.
    """
    folder = files.shared.parent
    places = [Path(bpe)] if bpe else [folder, folder / "gpt2_bpe", folder.parent / "gpt2_bpe"]
    for place in places:
        if all((place / name).is_file() for name in CODEC_FILES):
            codec = Codec.load(place)
            if len(codec) > config.vocab_rows:
                raise ValueError(
                    f"{place} has {len(codec)} types, the model knows {config.vocab_rows}: not its dictionary"
                )
            return codec
    where = " or ".join(map(str, places))
    raise ValueError(
        f"text needs {', '.join(CODEC_FILES)}, expected in {where}: put them there, or give load(bpe=...) their folder"
    )


def pieces(codec: Codec | None, ids: Iterable[int]) -> list[str]:
    """Each token for the eye; by its id where there is no codec."""
    return codec.pieces(ids) if codec is not None else [f" {number}" for number in ids]


def describe_run(
    model: Handle, batches: Sequence[Batch], fraction: float | None, seed: int
) -> dict[str, Any]:
    """A trace's meta, but for what was asked of the data.

    Returns:
        ``checkpoint`` (``path``, ``files`` with name and size, ``fingerprint``, see :func:`fingerprint`),
        ``capacity_token_fraction``, ``groups`` (routing
        groups as [samples, tokens a sample, how many], padding included), ``seed``, ``intervention``, ``dtype``,
        ``device``, ``world_size``, ``kernel``, ``versions``, ``created`` (UTC).
    """
    from datetime import UTC, datetime

    change = model.intervention
    shapes = Counter(batch.tokens.shape for batch in batches)
    return {
        "checkpoint": {
            "path": str(model.files.shared.parent.resolve()),
            "files": [{"name": path.name, "bytes": path.stat().st_size} for path in model.files.all],
            "fingerprint": fingerprint(model.files.all),
        },
        "capacity_token_fraction": fraction if change is None else change.fraction(fraction),
        "intervention": None if change is None else change.describe(),
        "groups": [[*shape, count] for shape, count in sorted(shapes.items())],
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device,
        "world_size": model.world_size,
        "kernel": model.parts[0]["kernel"],
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
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
