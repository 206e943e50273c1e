"""Files of documents, one JSON object a line, as the Pile is released (Gao et al. 2020, arXiv 2101.00027): as text.

{"text": "...", "meta": {"pile_set_name": "Wikipedia (en)"}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moekit import json_text
from moekit.data.progress import bar
from moekit.headlines import first_line

# The ends of such files' names.
DOCUMENTS = (".jsonl.zst", ".jsonl")
# Bytes of a line at most: a longer one is damage, or is meant to fill the memory.
MOST = 2**30
# Bytes of a file that are read at a time. Compressed, they can stand for 30,000 times as many.
PIECE = 4096
# Characters of a domain's name at most: it is written once for each line, of which a text may have as many as bytes.
LONGEST_NAME = 100
# Lines whose domains are written at a time.
LABELS = 1 << 13
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
                domain = document["domain"]
                body = document["text"].replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
                count = body.count("\n") + 2
                words.write(body + "\n\n")
                for start in range(0, count, LABELS):
                    labels.write(f"{domain}\n" * min(LABELS, count - start))
                documents, lines = documents + 1, lines + count
                seen.add(domain)
                progress.update(read - done)
                done = read
            progress.update(path.stat().st_size - done)
    for part, path in zip(parts, (text, domains), strict=True):
        part.replace(path)
    return {"documents": documents, "lines": lines, "domains": len(seen)}


def _documents(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The documents of a file with their ``domain``, and how many of its bytes are read so far."""
    unpack = _unpacker(path) if path.name.endswith(".zst") else None
    number = 1
    try:
        with open(path, "rb") as file:
            pieces = iter(lambda: file.read(PIECE), b"")
            for line in _lines(pieces if unpack is None else unpack(pieces)):
                if line.strip():
                    document = json_text.loads(line)
                    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
                        raise ValueError("no object with a text")
                    # Half a surrogate pair, which JSON can spell, is no text.
                    document["text"].encode()
                    document["domain"] = _domain(document)
                    document["domain"].encode()
                    yield document, file.tell()
                number += 1
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: {first_line(error, 120)}; expected a JSON object with a text in each line, as in the Pile"
        ) from None


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a stream, without their ends."""
    rest: list[bytes] = []
    size = 0
    for piece in pieces:
        first, *more = piece.split(b"\n")
        rest.append(first)
        if more:
            yield b"".join(rest)
            yield from more[:-1]
            rest, size = [more[-1]], 0
        size += len(piece) if not more else len(rest[0])
        if size > MOST:
            raise ValueError(f"a line of more than {MOST} bytes")
    if any(rest):
        yield b"".join(rest)


def _unpacker(path: Path) -> Callable[[Iterable[bytes]], Iterator[bytes]]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{path} is compressed, and zstandard is missing: pip install 'moekit[eval]'"
        ) from None

    def unpack(pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The plain bytes of a stream of frames; a piece is so small that it cannot fill the memory."""
        frame = None
        try:
            for piece in pieces:
                while piece:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(piece)
                    # What follows a frame's end is the next one.
                    piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        if frame is not None:
            raise ValueError("the file ends in the middle; fetch it again")

    return unpack


def _domain(document: dict[str, Any]) -> str:
    meta = document.get("meta")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    # A label is a line.
    name = " ".join(name.split()) if isinstance(name, str) else ""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a pile_set_name of {len(name):,} characters, more than {LONGEST_NAME}")
    return name or UNNAMED
