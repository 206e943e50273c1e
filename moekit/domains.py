"""Perplexity by domain at several capacities, and what two models differ by; a batch runs again only where it may drop more."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moekit import arguments
from moekit.arguments import Number, Whole, check, shown
from moekit.batches import Batch, count_scored
from moekit.checked import Instance, checked
from moekit.fairseq_data import Data
from moekit.handle import MODEL, Handle
from moekit.nn.gates import gate_of
from moekit.routing.domains import lines_of
from moekit.routing.statistics import Paired, holm, mean_of, paired_sums, units_of
from moekit.scoring import perplexity_of, score_batches, token_table

if TYPE_CHECKING:
    import pandas as pd

# The row of all domains together.
WHOLE = "(all)"
# What is noted where two models did not read the same.
OTHER = "other tokens"


@dataclass(frozen=True)
class DomainScores:
    """Perplexity by domain, and what a comparison with another model pairs.

    Attributes:
        table: as :func:`evaluate_domains` returns it.
        units: for each capacity of the table, one row per sample and domain: ``domain``, ``text`` (the name of the folder; "" where
            the lines of one folder have domains), ``sample``, ``tokens``, ``bits`` (their sum) and ``digest`` (of the targets).
    """

    table: pd.DataFrame
    units: dict[float | str | None, pd.DataFrame]


SCORES = Instance(DomainScores, "what score_domains gives")
HOW = Instance(Data, "moekit.fairseq_data.Data, such as Data('demo')")


def evaluate_domains(
    model: Handle,
    domains: str | Path | Mapping[str, str | Path],
    how: Data,
    fractions: float | str | Iterable[float | str | None] | None,
    max_batches: int | None,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """``Model.evaluate(domains=...)``.

    Args:
        domains: a folder of binarised data for each name; or one folder (or "demo") with ``{subset}.domains.txt`` in it or
            above it, which names the domain of each line of the text. Then a block may hold several domains.
        how: the data's options; its folder does not count.
        fractions: ``capacity_token_fraction``, or several.
        max_batches: of each folder. A :class:`moekit.nn.intervene.Force` holds for each folder that has its sample.

    Returns:
        For each capacity, in the order given, one row per domain and :data:`WHOLE`, the tokens of all: ``capacity`` (the one
        that holds: None, a number or "training"; of a dense model there is None alone), ``domain``, ``tokens``,
        ``bits_per_token`` with ``low`` and ``high`` (95 % bootstrap interval over samples; NaN for fewer than 8),
        ``perplexity``, ``bytes`` (of the text, a line end counts as one; None without a codec), ``bits_per_byte``,
        ``dropped`` (share of choices that found no place in their expert's buffer, of those that asked for one), ``batches``,
        and ``run``, how many of the batches ran at this capacity: the others have their result from a larger one, at which no
        expert was fuller than this one allows.

    Raises:
        ValueError: an argument makes no sense, or a file is missing.
        moekit.ranks.RankError: a rank failed.
    """
    return score_domains(model, domains, how, fractions, max_batches, seed, progress).table


@checked(model=MODEL, how=HOW, max_batches=Whole(), seed=Whole(0))
def score_domains(
    model: Handle,
    domains: str | Path | Mapping[str, str | Path],
    how: Data,
    fractions: float | str | Iterable[float | str | None] | None = None,
    max_batches: int | None = None,
    seed: int = 1,
    progress: bool = True,
) -> DomainScores:
    """:func:`evaluate_domains` with the sums of each sample, for :func:`compare_domains`."""
    import pandas as pd

    named = isinstance(domains, Mapping)
    for name, folder in domains.items() if named else [(None, domains)]:
        check(f"domains[{shown(name)}]" if named else "domains", folder, arguments.Path())
    given = arguments.listed(fractions)
    if not given:
        raise ValueError("capacity_token_fraction=[]: expected at least one")
    held = list(dict.fromkeys(model.capacity(fraction) for fraction in given))
    if not isinstance(domains, Mapping):
        texts = [_labelled(model, replace(how, data=domains), max_batches)]
    elif domains:
        texts = [
            _opened(model, name, replace(how, data=folder), max_batches) for name, folder in domains.items()
        ]
    else:
        raise ValueError("domains={}: expected at least one folder by its name")
    sizes = model.codec.sizes() if model.reads_text else None
    # A forced sample may be in one folder alone, and a capacity may run some batches again.
    whole = [batch for text in texts for batch in text.batches]
    found = [_swept(model, text, whole, held, seed, progress) for text in texts]
    labels = np.concatenate([text.labels for text in texts])
    names = list(dict.fromkeys(name for text in texts for name in text.names))
    rows, units = [], {}
    folders = [text.names[0] if named else "" for text in texts]
    for number, fraction in enumerate(held):
        parts = [sweep[number] for sweep in found]
        table = pd.concat([part.tokens for part in parts], keys=range(len(parts)), names=["text"])
        table = table.reset_index("text")
        told = None if fraction is None else "training" if fraction <= 0 else fraction
        units[told] = _by_unit(table, labels, folders)
        for name in [*names, WHOLE]:
            here = np.full(len(table), True) if name == WHOLE else labels == name
            own = [n for n, text in enumerate(texts) if name == WHOLE or name in text.names]
            row = {"capacity": told, "domain": name, **_measured(model, table[here], sizes)}
            row["batches"] = sum(len(texts[n].batches) for n in own)
            row["run"] = sum(parts[n].run for n in own)
            rows.append(row)
    table = pd.DataFrame(rows)
    table["capacity"] = pd.Series([row["capacity"] for row in rows], dtype=object)
    return DomainScores(table, units)


@checked(before=SCORES, after=SCORES, level=Number(above=0, most=1))
def compare_domains(before: DomainScores, after: DomainScores, *, level: float = 0.05) -> pd.DataFrame:
    """How many bits a token ``after`` needs more than ``before``, by domain: the same samples read by two models.

    Some samples are harder than others for both models. Pairs leave this out, so that two models may differ clearly though
    the intervals of each overlap.

    Returns:
        For each capacity of both and each domain of ``after``, one row: ``capacity``, ``domain``, ``tokens``, ``units``
        (samples), ``difference`` (after - before, bits a token), ``low``, ``high`` (95 % over samples), ``p`` (sign flips over
        samples; Holm's correction over the domains, from which :data:`WHOLE` is left out), ``survives`` (p <= level),
        ``effect`` and ``same_sign`` (:class:`moekit.routing.statistics.Paired`), and ``note``: "too few" samples for an
        interval, or a difference that "does not vary" between them; :data:`OTHER` where the samples or their targets are not
        the same in both, and the figures are NaN.

    Raises:
        ValueError: no capacity is in both.
    """
    import pandas as pd

    both = [capacity for capacity in after.units if capacity in before.units]
    if not both:
        raise ValueError(
            f"before has the capacities {shown([*before.units])}, after {shown([*after.units])}: expected one that is in both"
        )
    frames = []
    for capacity in both:
        pairs = before.units[capacity].merge(
            after.units[capacity], "outer", ["domain", "text", "sample"], suffixes=("_before", "_after")
        )
        names = list(dict.fromkeys(after.table["domain"]))
        told = {
            name: _difference(pairs if name == WHOLE else pairs[pairs["domain"] == name]) for name in names
        }
        frame = pd.DataFrame(
            {
                "domain": name,
                "tokens": one.tokens,
                "units": one.units,
                "difference": one.value,
                "low": one.low,
                "high": one.high,
                "p": one.p,
                "effect": one.effect,
                "same_sign": one.same_sign,
                "note": one.note if one.units else OTHER,
            }
            for name, one in told.items()
        )
        frame.insert(0, "capacity", pd.Series([capacity] * len(frame), dtype=object))
        part = frame["domain"] != WHOLE
        frame.loc[part, "p"] = holm(frame.loc[part, "p"])
        frame.insert(8, "survives", frame["p"] <= level)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _difference(pairs: pd.DataFrame) -> Paired:
    """The statistics of samples side by side; of no unit where a sample is in one alone, or its targets are others."""
    # A digest that is missing is equal to none.
    if pairs.empty or (pairs["digest_before"] != pairs["digest_after"]).any():
        return Paired(0, *[math.nan] * 6, units=0)
    change = pairs["bits_after"] - pairs["bits_before"]
    sums = pairs.assign(change=change).groupby(["text", "sample"])[["change", "tokens_after"]].sum()
    return paired_sums(sums["change"].to_numpy(float), sums["tokens_after"].to_numpy(np.int64))


@dataclass(frozen=True)
class DomainText:
    """Batches of one folder, and the domain of each scored token in the order of :func:`moekit.scoring.token_table`."""

    names: list[str]
    batches: list[Batch]
    labels: np.ndarray
    vocab: int


@dataclass(frozen=True)
class Swept:
    """A text at one capacity: ``tokens`` as ``Evaluation`` has them with choices ``made`` and ``dropped``; how many batches ran."""

    tokens: pd.DataFrame
    run: int


def _opened(model: Handle, name: str, data: Data, max_batches: int | None) -> DomainText:
    if not isinstance(name, str) or not name or name == WHOLE:
        raise ValueError(f"domains has the name {shown(name)}; expected a text other than {WHOLE}")
    opened = model.open_data(data)
    batches = list(itertools.islice(opened, max_batches))
    count = count_scored(batches)
    count -= model.config.add_bos * sum(len(batch.ids) for batch in batches)
    if not count:
        raise ValueError(f"{data.prefix} has no tokens to score; leave the domain {shown(name)} out")
    return DomainText([name], batches, np.full(count, name, dtype=object), len(opened.dictionary))


def _labelled(model: Handle, data: Data, max_batches: int | None) -> DomainText:
    if data.sample_break_mode != "none" or data.context_window:
        raise ValueError(
            "domains of lines are known for data in blocks: expected sample_break_mode='none' and context_window=0, or a "
            "folder for each domain"
        )
    opened = model.open_data(data)
    labels, lengths, ids = lines_of(data.data, data.subset)
    if WHOLE in labels:
        raise ValueError(
            f"{data.prefix}: a line has the domain {WHOLE}, which is the name of all domains together"
        )
    batches = list(itertools.islice(opened, max_batches))
    tokens = token_table(batches, {}, skip_first=model.config.add_bos, whose=str(data.prefix))
    # The target's place in the text: a block has as many targets as it may have tokens.
    block = opened.data.tokens_per_sample
    place = tokens["sample"].to_numpy(np.int64) * block + tokens["position"].to_numpy() - model.config.add_bos
    if (place >= len(ids)).any() or (ids[place] != tokens["target"].to_numpy()).any():
        raise ValueError(
            f"the tokens of {data.prefix} are not in the order of its lines; expected text that was binarised line by line, or a "
            "folder for each domain"
        )
    line = np.repeat(np.arange(len(lengths)), lengths)
    names = labels[line[place]].astype(object)
    return DomainText(sorted(set(names)), batches, names, len(opened.dictionary))


def _swept(
    model: Handle,
    text: DomainText,
    whole: Sequence[Batch],
    fractions: Sequence[float | None],
    seed: int,
    progress: bool,
) -> list[Swept]:
    """The text at each capacity. From the largest to the smallest, a batch runs again only where it may drop more."""
    gate = gate_of(model.config) if model.config.moe_layers else None

    def room(batch: Batch, fraction: float | None) -> float:
        places = None if gate is None or fraction is None else gate.capacity(batch.tokens.size, fraction)
        return math.inf if places is None else places

    order = sorted(
        dict.fromkeys(fractions), key=lambda f: -room(max(text.batches, key=lambda b: b.tokens.size), f)
    )
    scores: dict[int, np.ndarray] = {}
    loads: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
    # The places that an expert had when a batch ran last.
    ran: dict[int, float] = {}
    results = {}
    for fraction in order:
        again = []
        for batch in text.batches:
            bound, known = room(batch, fraction), ran.get(batch.index)
            # Without a capacity, padding is routed in another way, unless it is not routed at all.
            alike = not batch.padded() or model.config.mask_padding
            fits = alike and known is not None and known > bound and loads[batch.index][0] <= bound
            if known != bound and not fits:
                again.append(batch)
                ran[batch.index] = bound
        scores |= score_batches(
            model,
            again,
            fraction=fraction,
            vocab=text.vocab,
            seed=seed,
            progress=progress,
            loads=loads,
            whole=whole,
        )
        made = {index: load[1] for index, load in loads.items()}
        dropped = {index: load[2] for index, load in loads.items()}
        columns = {"logprob": scores, "made": made, "dropped": dropped}
        tokens = token_table(text.batches, columns, skip_first=model.config.add_bos)
        results[fraction] = Swept(tokens, len(again))
    return [results[fraction] for fraction in fractions]


def _by_unit(tokens: pd.DataFrame, labels: np.ndarray, folders: Sequence[str]) -> pd.DataFrame:
    """The sums of :class:`DomainScores`.

    Args:
        tokens: T rows as in :class:`Swept`, with the number of the ``text``.
        labels: [T] domains.
        folders: of each text.
    """
    import pandas as pd

    told = pd.DataFrame(
        {
            "domain": labels,
            "text": np.array(folders, dtype=object)[tokens["text"].to_numpy(np.int64)],
            "sample": tokens["sample"].to_numpy(np.int64),
            "bits": -tokens["logprob"].to_numpy(np.float64) / math.log(2),
            "target": tokens["target"].to_numpy("<i4"),
        }
    )
    found = told.groupby(["domain", "text", "sample"], sort=False)
    return found.agg(
        tokens=("bits", "size"),
        bits=("bits", "sum"),
        digest=(
            "target",
            lambda some: hashlib.blake2b(some.to_numpy().tobytes(), digest_size=16).hexdigest(),
        ),
    ).reset_index()


def _measured(model: Handle, tokens: pd.DataFrame, sizes: np.ndarray | None) -> dict:
    bits = -tokens["logprob"].to_numpy(np.float64) / math.log(2)
    # A sample of each text is a unit.
    sample = tokens["text"].to_numpy(np.int64) << 32 | tokens["sample"].to_numpy(np.int64)
    drawn = units_of(np.unique(sample, return_inverse=True)[1])
    value, low, high = mean_of(bits, drawn.unit, drawn)
    choices = int(tokens["made"].sum())
    size = None if sizes is None else int(sizes[tokens["target"].to_numpy()].sum())
    return {
        "tokens": len(tokens),
        "bits_per_token": value,
        "low": low,
        "high": high,
        "perplexity": perplexity_of(value),
        "bytes": size,
        "bits_per_byte": math.nan if not size else bits.sum() / size,
        "dropped": float(tokens["dropped"].sum() / choices) if choices else 0.0,
    }
