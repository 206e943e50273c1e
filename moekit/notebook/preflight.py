"""Checks of a notebook's parameters before anything is loaded, in its first cell: an error is one sentence."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from moekit import checkpoint as ckpt
from moekit import data, handle, ranks
from moekit import fairseq_data as batches
from moekit.arguments import shown
from moekit.data import Codec, corpus
from moekit.data.dictionary import Dictionary
from moekit.generation.request import KINDS, rules
from moekit.generation.run import generate
from moekit.nn import intervene
from moekit.nn.config import DENSE, ModelConfig
from moekit.nn.gates import top_k_of
from moekit.nn.record import Options
from moekit.notebook.parameters import GENERATION, ParameterError
from moekit.planning.fitting import asked
from moekit.profiling.work import Size
from moekit.routing.domains import lines_of
from moekit.routing.trace import Trace

# Arguments of a generation that a caller leaves out.
DEFAULTS = {
    name: own.default for name, own in inspect.signature(generate).parameters.items() if name in KINDS
}
# Sources of prepare_data that name no file.
NAMED_SOURCES = ("demo", "wikitext-103")


def prepare_data(p: SimpleNamespace) -> data.Settings:
    """What to prepare; the text is there, and ``data_dir`` can be written to. ``p`` holds the checked parameters.

    Raises:
        ParameterError: what is wrong.
    """
    settings = _said(lambda: data.settings(**vars(p)))
    _writable("data_dir", p.data_dir)
    if settings.source not in NAMED_SOURCES:
        for files in _said(_listed, settings).values():
            for file in files:
                _said(_opened, file)
    return settings


def _listed(settings: data.Settings) -> corpus.Texts:
    source = Path(settings.source).expanduser()
    if source.is_dir():
        os.listdir(source)
    return corpus.own(settings.source, settings.data_dir)


def _opened(file: Path) -> None:
    open(file, "rb").close()


def load_shards(p: SimpleNamespace) -> ModelConfig:
    """The checkpoint is whole, the devices are there, ``bpe`` is the model's, and ``output_dir`` can be written to.

    Raises:
        ParameterError: what is wrong.
    """
    if p.ranks == "local":
        # The devices of a cluster are known when it answers.
        _said(ranks.choose_devices, p.world_size, p.device)
    files = _said(ckpt.find, p.checkpoint)
    config = _said(ckpt.survey, files).config
    _said(handle.experts_dtype, p.experts, files, config)
    _said(handle.find_dictionary, files, None)
    _said(asked, config, p.resident, p.gpu_memory, p.ranks == "local")
    if p.bpe is not None:
        _codec(p, files, config)
    _writable("output_dir", p.output_dir)
    return config


def run_inference(p: SimpleNamespace) -> ModelConfig:
    """As :func:`load_shards`; the data is there and the model's, and the settings fit the model and each other."""
    config = load_shards(p)
    _data(p, config)
    if p.prompts:
        _prompts(p, config)
    block = p.tokens_per_sample or config.max_positions
    if p.context_window >= block:
        raise ParameterError(
            f"context_window={p.context_window}: expected less than a block's {block} tokens"
        )
    if p.max_new_tokens >= config.max_positions:
        raise ParameterError(
            f"max_new_tokens={p.max_new_tokens}: the model has {config.max_positions} positions; expected fewer"
        )
    _said(rules, DEFAULTS | generation(p))
    return config


def inspect_routing(p: SimpleNamespace) -> ModelConfig:
    """As :func:`load_shards`; the model has experts, and the data or texts, the layers and the other trace fit it."""
    config = _with_experts(p, "whose routing could be inspected")
    if p.texts is None:
        _data(p, config)
    else:
        _texts(p, config)
    _domains(p)
    _said(Options(p.layers).of, config)
    if p.compare_with is not None:
        _other_trace(p, config)
    return config


def _with_experts(p: SimpleNamespace, what: str) -> ModelConfig:
    """As :func:`load_shards`; a model without experts ``what`` is an error."""
    config = load_shards(p)
    if not config.moe_layers:
        raise ParameterError(
            f"checkpoint={p.checkpoint!r}: {DENSE} {what}; name one with experts, or use run_inference.ipynb"
        )
    return config


def study_routing(p: SimpleNamespace) -> ModelConfig:
    """As :func:`load_shards`; the data has domains, and the capacities and the mask make sense for the model."""
    config = _with_experts(p, "to study")
    _data(p, config)
    _said(lines_of, p.data, p.subset, p.domains)
    if not p.capacity_token_fractions:
        raise ParameterError("capacity_token_fractions=[]: expected at least one share, such as [0.25]")
    _changes(p, config)
    block = p.tokens_per_sample or config.max_positions
    if p.prompt_tokens > block:
        raise ParameterError(f"prompt_tokens={p.prompt_tokens}: expected at most a block's {block} tokens")
    # The last token that is written takes no position.
    if p.max_new_tokens > (room := config.max_positions - p.prompt_tokens + 1):
        raise ParameterError(
            f"max_new_tokens={p.max_new_tokens}: expected at most {room}, as the model has {config.max_positions} positions and "
            f"prompts take {p.prompt_tokens}"
        )
    return config


def evaluate_tasks(p: SimpleNamespace) -> ModelConfig:
    """As :func:`load_shards`, for the baseline too; the tasks and their data sets are there, and so are the domains."""
    config = load_shards(p)
    _codec(p, ckpt.find(p.checkpoint), config)
    if p.baseline is not None:
        files = _said(ckpt.find, p.baseline)
        _codec(p, files, _said(ckpt.survey, files).config)
    try:
        from moekit.tasks.loading import load_tasks
    except ImportError as error:
        raise ParameterError(str(error)) from None
    if not p.tasks:
        raise ParameterError("tasks=[]: expected at least one name")
    _said(load_tasks, p.tasks, p.task_data or {})
    if p.domains is not None:
        for folder in p.domains.values() if isinstance(p.domains, dict) else [p.domains]:
            _data(SimpleNamespace(**vars(p) | {"data": folder}), config)
        if not isinstance(p.domains, dict):
            _said(lines_of, p.domains, p.subset)
    _changes(p, config)
    return config


def _changes(p: SimpleNamespace, config: ModelConfig) -> None:
    """The capacities and the mask make sense for the model."""
    if not all(0 < fraction <= 1 for fraction in p.capacity_token_fractions):
        raise ParameterError(
            f"capacity_token_fractions={p.capacity_token_fractions}: expected shares of a batch's tokens, above 0 up to 1"
        )
    if p.mask and not config.moe_layers:
        raise ParameterError(f"mask={p.mask}: {DENSE} to take away; set mask to None")
    if p.mask:
        _said(lambda: intervene.plan(config, mask=p.mask))


def profile_inference(p: SimpleNamespace) -> ModelConfig:
    """As :func:`load_shards`; the data is there and the model's, and there are blocks to profile."""
    config = load_shards(p)
    _data(SimpleNamespace(**vars(p), subset="valid", tokens_per_sample=None), config)
    if not p.batch_blocks or not all(p.batch_blocks):
        raise ParameterError(
            f"batch_blocks={p.batch_blocks}: expected one number of at least 1 or more of them"
        )
    _said(Size.of, config, "cpu", p.mode, p.steps, 1, config.max_positions)
    return config


def generation(p: SimpleNamespace) -> dict[str, Any]:
    """The arguments of ``Model.generate`` that a notebook's parameters mean.

    A beam search draws nothing, so temperature, top-k and top-p do not count.
    """
    given = {name: getattr(p, name) for name in GENERATION if name != "prompts"}
    if p.beam_size > 1:
        return {name: value for name, value in given.items() if name not in ("temperature", "top_k", "top_p")}
    return given | {"alternatives": 5}


def _codec(p: SimpleNamespace, files: ckpt.Files, config: ModelConfig) -> Codec:
    """``bpe``, or what lies beside the checkpoint, turns text into this model's ids."""
    codec = _said(handle.find_codec, files, config, p.bpe, None)
    if not codec.reads_text:
        raise ParameterError(codec.why)
    return codec


def _prompts(p: SimpleNamespace, config: ModelConfig) -> None:
    """There is a codec to read and write text with."""
    try:
        _codec(p, ckpt.find(p.checkpoint), config)
    except ParameterError as error:
        raise ParameterError(f"prompts={shown(p.prompts)}: {error}; or set prompts to []") from None


def _data(p: SimpleNamespace, config: ModelConfig) -> None:
    """The files are there, their dictionary is the model's, and blocks are no longer than it can read."""
    _said(batches.check_files, p.data, p.subset)
    if (p.tokens_per_sample or 1) > config.max_positions:
        raise ParameterError(
            f"tokens_per_sample={p.tokens_per_sample}: the model has {config.max_positions} positions; expected no more"
        )
    of_data = batches.data_folder(p.data) / "dict.txt"
    _said(handle.check_size, len(_said(Dictionary, of_data)), str(of_data), config)
    _said(batches.check_files, p.data, p.subset, _own_dictionary(p, config))


def _own_dictionary(p: SimpleNamespace, config: ModelConfig) -> Dictionary | None:
    """The dictionary beside the checkpoint, or else its codec's; None where neither is known."""
    files = ckpt.find(p.checkpoint)
    own = _said(handle.find_dictionary, files, None)
    if own is None and (codec := _said(handle.find_codec, files, config, p.bpe, None)).reads_text:
        own = codec.dictionary
    return own


def _texts(p: SimpleNamespace, config: ModelConfig) -> None:
    """There are texts, none is empty, none names a file, and there is a codec to read them with."""
    if not p.texts or "" in p.texts:
        raise ParameterError(f"texts={p.texts!r}: expected at least one text, and none of them empty")
    for text in p.texts:
        rooted = text.startswith(("/", "~/", "./", "../")) and not any(c.isspace() for c in text)
        if rooted or (os.sep in text and len(text) < 1000 and os.path.exists(os.path.expanduser(text))):
            raise ParameterError(
                f"texts={shown(text)} reads as the name of a file or folder, expected the text itself; prepare_data.ipynb "
                "makes data of a file"
            )
    codec = _codec(p, ckpt.find(p.checkpoint), config)
    for number, text in enumerate(p.texts):
        length = len(_said(codec.encode, text))
        if length >= config.max_positions:
            raise ParameterError(
                f"texts: text {number} has {length} tokens, expected at most {config.max_positions - 1}, as one symbol precedes "
                "them; shorten it, or make data of it with prepare_data.ipynb"
            )


def _domains(p: SimpleNamespace) -> None:
    """As many labels as texts, or the one file with a label for each line of the data."""
    if p.domains is None:
        return
    if p.texts is not None:
        if len(p.domains) != len(p.texts):
            raise ParameterError(
                f"domains has {len(p.domains)} labels for {len(p.texts)} texts; expected one for each"
            )
    elif len(p.domains) != 1 or not _said(Path(p.domains[0]).expanduser().is_file):
        raise ParameterError(
            f"domains={p.domains}: expected the one file with a domain for each line of the data's text"
        )
    else:
        _said(lines_of, p.data, p.subset, p.domains[0])


def _other_trace(p: SimpleNamespace, config: ModelConfig) -> None:
    """The trace to compare with is of as many experts and choices, of the same layers and of the same text."""
    other = _said(Trace.load, p.compare_with)
    layers = tuple(sorted(set(p.layers or config.moe_layers)))
    choices = top_k_of(config)
    if (other.num_experts, other.top_k, other.layers) != (config.experts, choices, layers):
        raise ParameterError(
            f"compare_with={p.compare_with!r} has {other.num_experts} experts, {other.top_k} choices a token and the layers "
            f"{list(other.layers)}; this run has {config.experts}, {choices} and {list(layers)}: name a trace of the same, or set "
            "layers"
        )
    token = _said(_of_the_text, p, config, other)
    shared = token >= 0
    differ = int((token != other.token)[shared & (other.token >= 0)].sum())
    if differ or not shared.any():
        raise ParameterError(
            f"compare_with={p.compare_with!r}: {differ or len(other)} of its {len(other)} tokens are not those of this run's text at "
            "the same sample and position; name a trace of the same text, in blocks of as many tokens"
        )


def _of_the_text(p: SimpleNamespace, config: ModelConfig, other: Trace) -> np.ndarray:
    """[T] int64, what this run's text has at the sample and position of each token of the other trace; -1 where it has none."""
    order = np.argsort(other.sample, kind="stable")
    numbers, starts = np.unique(other.sample[order], return_index=True)
    if p.texts is not None:
        codec = _codec(p, ckpt.find(p.checkpoint), config)
        samples = dict(enumerate(np.array([config.first, *codec.encode(text)]) for text in p.texts))
    else:
        how = {"tokens_per_sample": p.tokens_per_sample, "max_positions": config.max_positions}
        samples = batches.open_data(p.data, p.subset, **how, add_bos=config.add_bos).read(numbers)
    token = np.full(len(other), -1, dtype=np.int64)
    for number, rows in zip(numbers.tolist(), np.split(order, starts[1:]), strict=False):
        ids = samples.get(number, token[:0])
        there = rows[other.position[rows] < len(ids)]
        token[there] = ids[other.position[there]]
    return token


def _writable(name: str, place: str) -> None:
    """Make the folder and write to it: permissions alone do not tell, on a read-only mount or for root."""
    folder = Path(place).expanduser().resolve()
    try:
        if folder.is_file():
            raise ParameterError(f"{name}={place!r} is a file; expected a folder, or a name for a new one")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ParameterError(
            f"{name}={place!r}: nothing can be written to {folder} ({error.strerror}); name another folder"
        ) from None


def _said(check: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except ValueError as error:
        raise ParameterError(str(error)) from None
    except OSError as error:
        where = error.filename if error.filename is not None else ", ".join(map(str, arguments))
        raise ParameterError(
            f"{where} cannot be read ({error.strerror or error}); change its permissions or name another"
        ) from None
