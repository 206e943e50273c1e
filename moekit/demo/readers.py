"""Readers of plain-text documents from HTML manuals, source code, R data and Metamath databases."""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path


@dataclass(frozen=True)
class Document:
    """`blocks`: paragraphs of prose (one line each) or blank-line-separated runs of lines of code."""

    # The suffix of the file's path if the file holds several documents.
    name: str
    blocks: list[list[str]]


FUNCTION_WORDS = {
    "english": r"\b(the|and|of|to|is|in|that|for|with|this|are|be|it|on|as|you|can|not|from|or|by)\b",
    "german": r"\b(der|die|das|und|ist|nicht|ein|eine|zu|den|mit|für|von|auf|sie|wird|werden|dem|im|oder)\b",
    "french": r"\b(le|la|les|et|est|des|une|un|pour|dans|que|qui|vous|sur|pas|par|du|avec|ce|ou|en)\b",
}
BLOCK_TAGS = re.compile("p|h[1-6]|[duo]l|li|dt|dd|td|th|tr|table|div|title|item|section|body")
SKIPPED_TAGS = re.compile("head|script|style|pre|nav|header|footer|aside|button|noscript|info|screen")
VOID_TAGS = re.compile("area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr")
NOTICE = re.compile(
    r"copyright|licen[sc]e|warrant|all rights reserved|free software|redistribut|\$Id|written by"
    r"|identification",
    re.IGNORECASE,
)


class _Paragraphs(HTMLParser):
    """Text of the block elements of HTML or Mallard pages."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.text: list[str] = []
        # Name of the outermost skipped element.
        self.skipped = ""
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped:
            self.depth += tag == self.skipped
        elif SKIPPED_TAGS.fullmatch(tag) or ("hidden" in dict(attrs) and not VOID_TAGS.fullmatch(tag)):
            self.skipped, self.depth = tag, 1
        elif BLOCK_TAGS.fullmatch(tag):
            self.close_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            self.depth -= tag == self.skipped
            if not self.depth:
                self.skipped = ""
        elif BLOCK_TAGS.fullmatch(tag):
            self.close_paragraph()

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.text.append(data)

    def close_paragraph(self) -> None:
        self.paragraphs.append(" ".join("".join(self.text).split()))
        self.text = []


def is_prose(paragraph: str, language: str) -> bool:
    """Whether a paragraph is running text in `language`, and not a fragment, a table or untranslated text."""
    if re.match(r"[0-9A-Z]{1,2}\.[0-9.]*\s", paragraph):
        # The paragraph is a numbered heading, mostly from a table of contents.
        return False
    letters = [c for c in paragraph if c.isalpha()]
    if len(paragraph) < 40 or len(letters) < 0.65 * len(paragraph):
        return False
    if language == "russian":
        return sum("а" <= c.lower() <= "я" or c in "ёЁ" for c in letters) > 0.6 * len(letters)
    hits = {name: len(re.findall(words, paragraph.lower())) for name, words in FUNCTION_WORDS.items()}
    return hits[language] > 0 and hits[language] == max(hits.values())


def html(language: str) -> Callable[[Path], Iterator[Document]]:
    """A reader of HTML (or Mallard) pages that keeps paragraphs in `language`; front pages have no such paragraphs."""

    def read(path: Path) -> Iterator[Document]:
        if path.name.startswith("index."):
            return
        parser = _Paragraphs()
        parser.feed(path.read_text(encoding="utf-8", errors="ignore"))
        parser.close_paragraph()
        yield Document("", [[p] for p in parser.paragraphs if is_prose(p, language)])

    return read


def code(path: Path) -> Iterator[Document]:
    """Source code without its copyright notices and data tables; a file is one document."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    blocks = [block.splitlines() for block in re.split(r"\n\s*\n", text)]
    blocks = [
        block
        for block in blocks
        if not NOTICE.search("\n".join(block))
        and max(map(len, block), default=0) <= 300
        and sum(c.isalpha() for line in block for c in line) > 0.4 * sum(len(line.strip()) for line in block)
    ]
    yield Document("", blocks)


def r_novels(path: Path) -> Iterator[Document]:
    """The chapters of novels from R character vectors (one string per printed line) in a lazy-load database.

    A record is a length (4 bytes, big-endian) and a zlib stream holding one vector in R's XDR
    serialisation (R Internals, section 1.8): 23 bytes of header, the type STRSXP, a count, then type,
    length and bytes of each string.
    """
    data = path.read_bytes()
    novel = 0
    while data:
        stream = zlib.decompressobj()
        vector, data = stream.decompress(data[4:]), stream.unused_data
        kind, count = struct.unpack_from(">ii", vector, 23)
        if not vector.startswith(b"X\n") or kind & 0xFF != 16:
            raise ValueError(
                f"{path}: found a record of type {kind & 0xFF}, expected a character vector (16)"
            )
        lines, at = [], 31
        for _ in range(count):
            _, length = struct.unpack_from(">ii", vector, at)
            lines.append(vector[at + 8 : at + 8 + length].decode("utf-8"))
            at += 8 + length
        novel += 1
        chapters = re.split(r"^(?:CHAPTER|Chapter) .*$", "\n".join(lines), flags=re.MULTILINE)[1:]
        for number, chapter in enumerate(chapters, 1):
            paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", chapter)]
            kept = [[p] for p in paragraphs if not re.fullmatch(r"(?i)|the end|finis|(end of )?volume .*", p)]
            yield Document(f"#novel{novel}-chapter{number}", kept)


def metamath(path: Path) -> Iterator[Document]:
    """Theorems of a Metamath database without proofs: a block is a comment and a statement; 40 blocks per document."""
    text = path.read_text(encoding="ascii")
    pattern = re.compile(
        r"\$\(((?:(?!\$\)).)*?)\$\)\s+(\S+)\s+\$[ap]\s+((?:(?!\$[=.]).)*?)\s+\$[=.]", re.DOTALL
    )
    blocks = []
    for comment, label, statement in pattern.findall(text):
        comment = re.sub(
            r"\((Contributed|Revised|Proof\s+shortened|Proof\s+modification|New\s+usage)[^)]*\)", "", comment
        )
        blocks.append([" ".join(comment.split()), f"{label} {' '.join(statement.split())}"])
    for start in range(0, len(blocks), 40):
        yield Document(f"#theorem{start}", blocks[start : start + 40])
