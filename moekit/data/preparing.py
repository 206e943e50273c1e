"""Preparation of binarised data and a verified checkpoint, from downloads or own text; each step runs once."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit import paths
from moekit.data import codec, corpus, record, sources
from moekit.data.binarise import Binarised, Summary, binarise
from moekit.data.codec import Codec
from moekit.data.documents import DOCUMENTS, unfold
from moekit.data.download import DownloadError, discard, download, human
from moekit.data.encode import encode_files
from moekit.data.lock import locked
from moekit.data.settings import Settings
from moekit.data.unpacking import unpack

if TYPE_CHECKING:
    import pandas as pd

Say = Callable[[str], Any]


@dataclass(frozen=True)
class Prepared:
    """The result of :func:`prepare`: the paths and counts of the data and the checkpoint.

    Attributes:
        data_bin: the folder to give to fairseq, or to moekit as ``data``.
        bpe: the folder with the three files of the :class:`Codec`.
        texts: the text files by subset.
        summaries: counts of the binarised data, by subset.
        checkpoint: the model's folder; None if the settings name no checkpoint.
        files: the checkpoint's files, one dict per file.
        done: the steps that ran in this run; empty if all results existed.
    """

    data_bin: Path
    bpe: Path
    texts: dict[str, list[Path]]
    summaries: dict[str, Summary]
    checkpoint: Path | None
    files: list[dict[str, Any]]
    done: list[str]

    @cached_property
    def codec(self) -> Codec:
        return Codec.load(self.bpe)

    def binarised(self, subset: str) -> Binarised:
        return Binarised(self.data_bin / subset)

    def subsets_table(self) -> pd.DataFrame:
        """One row per subset: bytes of text, lines, tokens, bytes per token, percent of unknown tokens, unknown types."""
        import pandas as pd

        rows = {}
        for subset, summary in self.summaries.items():
            size = sum(path.stat().st_size for path in self.texts[subset])
            rows[subset] = {
                "text": human(size),
                "lines": summary.lines,
                "tokens": summary.tokens,
                "bytes a token": round(size / summary.tokens, 2),
                "unknown %": round(summary.unknown_percent, 4),
                "unknown types": summary.unknown_types,
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def files_table(self) -> pd.DataFrame:
        """One row per file of the checkpoint."""
        import pandas as pd

        return pd.DataFrame(self.files)

    def passage(self, lines: int = 2, words: int = 12) -> str:
        """The beginnings of the first ``lines`` lines with more than ``words`` words, or of fewer lines if the text ends.

        Of a text without such lines, the first ones that are not blank.
        """
        return "\n".join(self._beginnings(lines, words, words) or self._beginnings(lines, words, 0))

    def _beginnings(self, lines: int, words: int, blanks: int) -> list[str]:
        """The first ``words`` words of lines that have ``blanks`` blanks at least."""
        found = []
        for path in next(iter(self.texts.values())):
            with open(path, encoding="utf-8") as file:
                long = (line.split() for line in file if line.strip() and line.count(" ") >= blanks)
                found += [" ".join(line[:words]) for line in itertools.islice(long, lines - len(found))]
        return found


def prepare(settings: Settings, say: Say = print) -> Prepared:
    """Run the steps of ``settings`` that are not done yet; after an interruption, continue at the unfinished step.

    Args:
        say: called with one line per step, also for steps that were done before.

    Raises:
        ValueError: a requested file is not available, or a file is not as expected; the message names it.
        DownloadError, NoSpace: as :func:`moekit.data.download`.
    """
    started = time.monotonic()
    steps = Steps(say)
    with locked(settings.data_dir):
        name, texts = _texts(settings, steps)
        bpe = _bpe(settings, steps)
        home = settings.data_dir / name
        _claim(home, settings, texts)
        texts = {subset: _unfolded(subset, files, home, steps) for subset, files in texts.items()}
        _copied(bpe / "dict.txt", home / "data-bin", steps)
        summaries = {
            subset: _subset(subset, files, home, bpe, settings, steps) for subset, files in texts.items()
        }
        checkpoint, files = _checkpoint(settings, steps)
    seconds = time.monotonic() - started
    if steps.done:
        say(f"Prepared in {seconds:.1f} s: {home / 'data-bin'}")
    else:
        say(f"Nothing to do: everything is there and unchanged ({seconds:.1f} s): {home / 'data-bin'}")
    return Prepared(home / "data-bin", bpe, texts, summaries, checkpoint, files, steps.done)


class Steps:
    """Reports each step to the user, and keeps the names of the steps that ran in this run."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.done: list[str] = []

    def report(self, step: str, done_now: bool, result: str) -> None:
        if done_now:
            self.done.append(step)
        self._say(f"{step}: {result}" + ("" if done_now else " (was there)"))


def _bpe(settings: Settings, steps: Steps) -> Path:
    """The folder with the encoder's and the dictionary's files."""
    if settings.bpe == "demo":
        return paths.DEMO_BPE
    folder = settings.data_dir / "gpt2_bpe"
    for remote in sources.GPT2_BPE:
        _downloaded(remote, folder / remote.name, settings, steps)
    return folder


def _texts(settings: Settings, steps: Steps) -> tuple[str, corpus.Texts]:
    """The name of the prepared data, and its text files."""
    if settings.source == "demo":
        return "demo", corpus.demo()
    if settings.source == "wikitext-103":
        folder = settings.data_dir / "wikitext-103" / "text"
        _unpacked(sources.WIKITEXT_103, folder, settings, steps)
        return "wikitext-103", corpus.wikitext(folder)
    return corpus.name_of(settings.source), corpus.own(settings.source, settings.data_dir)


def _claim(home: Path, settings: Settings, texts: corpus.Texts) -> None:
    """Make ``home`` the folder of this source, and remove the results of text files that no longer exist."""
    home.mkdir(parents=True, exist_ok=True)
    source = (
        settings.source
        if settings.source in ("demo", "wikitext-103")
        else str(Path(settings.source).expanduser().resolve())
    )
    owner = record.read(home / corpus.MARK)
    if owner is None:
        record.write(home / corpus.MARK, {"source": source})
    elif owner["source"] != source:
        raise ValueError(
            f"{home} holds what was made of {owner['source']}; choose another data_dir for {source}"
        )
    for folder, ends in (
        (home / "bpe", (".bpe", ".bpe.json")),
        (home / "data-bin", (".bin", ".idx", ".json", corpus.DOMAINS, corpus.DOMAINS + ".json")),
    ):
        folder.mkdir(exist_ok=True)
        for stale in set(corpus.SUBSETS) - set(texts):
            for end in ends:
                (folder / f"{stale}{end}").unlink(missing_ok=True)


def _unfolded(subset: str, files: list[Path], home: Path, steps: Steps) -> list[Path]:
    """Text files in place of files of documents; a subset's documents become one text, which has a domain for each line."""
    folded = [file for file in files if file.name.endswith(DOCUMENTS)]
    if not folded:
        return files
    text, domains = home / "text" / f"{subset}.txt", home / "text" / f"{subset}{corpus.DOMAINS}"
    text.parent.mkdir(exist_ok=True)
    made, now = record.once(
        text.with_name(f"{subset}.json"),
        asked={},
        inputs=folded,
        outputs=[text, domains],
        work=lambda: unfold(folded, text, domains),
    )
    steps.report(
        f"unfold {subset}", now, f"{made['documents']:,} documents of {made['domains']:,} domains in {text}"
    )
    return [text, *(file for file in files if file not in folded)]


def _subset(
    subset: str, files: list[Path], home: Path, bpe: Path, settings: Settings, steps: Steps
) -> Summary:
    """Encode and binarise one subset."""
    encoder_json, vocab_bpe, dict_txt = (bpe / name for name in codec.FILES)
    encoded, data = home / "bpe" / f"{subset}.bpe", home / "data-bin"

    made, now = record.once(
        encoded.with_name(encoded.name + ".json"),
        asked={"keep_empty": settings.keep_empty},
        inputs=[*files, encoder_json, vocab_bpe],
        outputs=[encoded],
        work=lambda: asdict(
            encode_files(files, encoded, encoder_json, vocab_bpe, settings.keep_empty, settings.workers)
        ),
    )
    if made["lines"] == 0:
        raise ValueError(f"{subset}: there is no line of text in {', '.join(map(str, files))}")
    dropped = f", {made['dropped']:,} empty ones dropped" if made["dropped"] else ""
    steps.report(f"encode {subset}", now, f"{made['lines']:,} lines{dropped}")

    made, now = record.once(
        data / f"{subset}.json",
        asked={},
        inputs=[encoded, dict_txt],
        outputs=[data / f"{subset}.bin", data / f"{subset}.idx"],
        work=lambda: asdict(binarise(encoded, data / subset, dict_txt, settings.workers)),
    )
    summary = Summary(**made)
    steps.report(f"binarise {subset}", now, str(summary))

    domains = files[0].with_name(subset + corpus.DOMAINS)
    if domains.is_file() and len(files) == 1 and not dropped:
        _copied(domains, data, steps)
    else:
        # Domain labels of an earlier text would otherwise be used for this text.
        for end in (corpus.DOMAINS, corpus.DOMAINS + ".json"):
            (data / f"{subset}{end}").unlink(missing_ok=True)
    return summary


def _copied(path: Path, folder: Path, steps: Steps) -> None:
    """Copy ``path`` to ``folder``, unless the copy exists."""
    copy = folder / path.name
    _, now = record.once(
        folder / f"{path.name}.json", {}, [path], [copy], lambda: {"copy": str(shutil.copyfile(path, copy))}
    )
    steps.report(f"copy {path.name}", now, f"to {folder}")


def _checkpoint(settings: Settings, steps: Steps) -> tuple[Path | None, list[dict[str, Any]]]:
    """The model's folder, and its files, checked against the model that they describe."""
    if settings.checkpoint == "none":
        return None, []
    remote = sources.CHECKPOINTS[settings.checkpoint]
    folder = settings.data_dir / "checkpoints" / settings.checkpoint
    _unpacked(remote, folder, settings, steps)
    if settings.delete_archive:
        # Its record stays: a later download is compared with it.
        _archive(remote, settings).unlink(missing_ok=True)
    found, now = record.once(
        folder.with_name(folder.name + ".verified.json"),
        asked={"checksums": True},
        inputs=sorted(folder.rglob("*.pt")),
        outputs=[],
        work=lambda: {"files": verify_checkpoint(folder)},
    )
    files = found["files"]
    steps.report(
        f"verify {settings.checkpoint}",
        now,
        f"{len(files)} files ({human(sum(row['bytes'] for row in files))}): every tensor is there once, has its shape and "
        "the checksum that its file tells",
    )
    return folder, files


def verify_checkpoint(folder: Path) -> list[dict[str, Any]]:
    """Check that the checkpoint in ``folder`` is complete and fits the model that it describes; one row per file.

    It warns of files without checksums, and of weights that are not finite.

    Raises:
        ValueError: a file is missing or unreadable; or a tensor is missing, duplicate, damaged, or has a wrong shape.
    """
    from moekit import checkpoint

    checkpoint.warn_nonfinite(checkpoint.inspect(checkpoint.survey(checkpoint.find(folder))))
    return checkpoint.describe(folder)


def _archive(remote: sources.Remote, settings: Settings) -> Path:
    return settings.data_dir / "downloads" / remote.name


def _unpacked(remote: sources.Remote, folder: Path, settings: Settings, steps: Steps) -> None:
    """Unpack the remote archive to ``folder``; a damaged archive is downloaded again from the next mirror."""
    if folder.exists():
        return steps.report(f"unpack {remote.name}", False, str(folder))
    archive = _archive(remote, settings)
    urls, damaged = remote.addresses(settings.mirrors), ""
    while True:
        try:
            origin = _downloaded(remote, archive, settings, steps, urls, spare=remote.unpacked)
        except DownloadError as error:
            raise DownloadError(f"{error}{damaged}") from None
        try:
            files = unpack(archive, folder, limit=2 * remote.unpacked)
            break
        except ValueError as error:
            # The archive is damaged, or it is not the expected one.
            discard(archive)
            damaged += f"; {origin}: {error}"
            urls = urls[urls.index(origin) + 1 :] if origin in urls else []
            if not urls:
                raise type(error)(
                    f"{error}. It was removed: run again, with another mirror if it has to be"
                ) from None
            steps.report(f"unpack {remote.name}", True, f"{error}; asking the next mirror")
    steps.report(f"unpack {remote.name}", True, f"{len(files)} files in {folder}")


def _downloaded(
    remote: sources.Remote,
    path: Path,
    settings: Settings,
    steps: Steps,
    urls: list[str] | None = None,
    spare: int = 0,
) -> str:
    """Download the remote file to ``path``, unless it exists; returns its origin."""
    got, now = download(urls or remote.addresses(settings.mirrors), path, spare=spare, check=remote.check)
    note = "; its hash is recorded for later downloads" if now else ""
    steps.report(f"download {remote.name}", now, f"{human(got.size)}, SHA-256 {got.sha256[:12]}…{note}")
    return got.url
