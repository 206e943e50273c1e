"""Files of documents, one JSON object a line, as the Pile is released (Gao et al. 2020, arXiv 2101.00027): as text.

{"text": "...", "meta": {"pile_set_name": "Wikipedia (en)"}}
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moekit.data.progress import bar

# The ends of such files' names.
DOCUMENTS = (".jsonl.zst", ".jsonl")
# Characters of a line at most: a longer one is damage, or is meant to fill the memory.
MOST = 2**30
# The domain of a document that names none.
UNNAMED = "unnamed"


def unfold(files: Sequence[Path], text: Path, domains: Path) -> dict[str, int]:
    """Write the documents of ``files`` as lines to ``text``, each document with an empty line after it.

    Args:
        domains: gets the document's ``meta.pile_set_name`` for each line of ``text``.

    Returns:
        ``documents``, ``lines`` and ``domains``, how many there are.

    Raises:
        ValueError: a file is damaged or of another form; the error names the line.
    """
    documents = lines = 0
    seen: set[str] = set()
    parts = [path.with_name(path.name + ".part") for path in (text, domains)]
    with (
        open(parts[0], "w", encoding="utf-8", newline="\n") as words,
        open(parts[1], "w", encoding="utf-8", newline="\n") as labels,
        bar(f"unfold {text.name}", sum(path.stat().st_size for path in files)) as progress,
    ):
        for path in files:
            done = 0
            for document, read in _documents(path):
                domain = _domain(document)
                body = document["text"].replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
                count = body.count("\n") + 2
                words.write(body + "\n\n")
                labels.write(f"{domain}\n" * count)
                documents, lines = documents + 1, lines + count
                seen.add(domain)
                progress.update(read - done)
                done = read
            progress.update(path.stat().st_size - done)
    for part, path in zip(parts, (text, domains), strict=True):
        part.replace(path)
    return {"documents": documents, "lines": lines, "domains": len(seen)}


def _documents(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The documents of a file, and how many of its bytes are read so far."""
    number = 0
    try:
        with open(path, "rb") as file, _plain(file, path) as lines:
            while line := lines.readline(MOST):
                number += 1
                if not line.strip():
                    continue
                document = json.loads(line)
                if not isinstance(document, dict) or not isinstance(document.get("text"), str):
                    raise ValueError("no object with a text")
                # Half a surrogate pair, which JSON can spell, is no text.
                document["text"].encode()
                yield document, file.tell()
    except (ValueError, RecursionError, _damage()) as error:
        said = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path}, line {max(number, 1)}: {said}; expected a JSON object with a text in each line, as in the Pile"
        ) from None


def _plain(file: Any, path: Path) -> io.TextIOBase:
    if not path.name.endswith(".zst"):
        return io.TextIOWrapper(file, encoding="utf-8", newline="\n")
    reader = _zstandard(path).ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return io.TextIOWrapper(reader, encoding="utf-8", newline="\n")


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{path} is compressed, and zstandard is missing: pip install 'moekit[eval]'"
        ) from None
    return zstandard


def _damage() -> type[Exception]:
    """The error of a damaged compressed file."""
    try:
        from zstandard import ZstdError
    except ImportError:
        return ValueError
    return ZstdError


def _domain(document: dict[str, Any]) -> str:
    meta = document.get("meta")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    # A label is a line.
    return (" ".join(name.split()) if isinstance(name, str) else "") or UNNAMED
