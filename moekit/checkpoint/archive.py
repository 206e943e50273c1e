"""The layout of a file of ``torch.save``: a zip archive, or consecutive parts in files from before torch 1.6."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moekit.checkpoint.contents import clip, short, storage_sizes
from moekit.checkpoint.objects import Pairs, Unreadable
from moekit.checkpoint.pickles import EACH, MOST_BYTES, Parsed, parse

# The records of a zip archive (section 4.3 of PKWARE's APPNOTE.TXT).
END = struct.Struct("<4s4H2LH")
END_64_POINTER = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
# Of an entry of the directory: flags, method, checksum, packed size, size, sizes of name, extra field and note, and the
# place of the header.
ENTRY = struct.Struct("<4s4x2H4x3L3H8xL")
# Of the header before a member: sizes of name and extra field.
HEADER = struct.Struct("<4s22x2H")
START = b"PK\x03\x04"

# The most members of an archive, one for each storage; a file with all experts of the 52B has 50,000.
MOST_ENTRIES = 1 << 18
# The value of the first pickle of an old file.
MAGIC = 0x1950A86A20F9469CFC6C


class Record(NamedTuple):
    """A range of bytes in a file: a member of an archive, or a storage of an old file.

    Attributes:
        start: the offset of the first byte in the file.
        size: the size in bytes.
        checksum: CRC32 of the bytes; None if the file has no checksum.
    """

    name: str
    start: int
    size: int
    checksum: int | None


@dataclass(frozen=True)
class Layout:
    """What the pickle of a file makes, and the records of the storages in the file."""

    pickle: Parsed
    storages: dict[str, Record]
    # The folder in which all members of an archive lie.
    folder: str | None = None


def layout(memory: np.ndarray, file: BinaryIO, each: int = EACH) -> Layout:
    """The layout of a file, mapped into ``memory`` [bytes] uint8.

    Args:
        file: the same file, opened.
        each: see :func:`moekit.checkpoint.pickles.parse`.

    Raises:
        Unreadable: the file is not from ``torch.save``, or it is damaged.
    """
    if memory[:4].tobytes() == START:
        return _of_archive(memory, file, each)
    return _of_old_file(memory, each)


def _of_archive(memory: np.ndarray, file: BinaryIO, each: int) -> Layout:
    records = _members(memory, file)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise Unreadable("is a zip archive, but not one of torch.save: it has no data.pkl")
    folder = pickles[0].removesuffix("/data.pkl")
    if f"{folder}/constants.pkl" in records:
        raise Unreadable("is a TorchScript program, not a checkpoint of fairseq")
    order = records.get(f"{folder}/byteorder")
    if order is not None and _content(memory, order) != b"little":
        raise Unreadable("was written on a big-endian machine, which is not supported")
    data = f"{folder}/data/"
    storages = {name[len(data) :]: r for name, r in records.items() if name.startswith(data)}
    pickle = parse(_content(memory, records[pickles[0]]), each=each, storages=len(storages))
    return Layout(pickle, storages, folder)


def _content(memory: np.ndarray, record: Record) -> memoryview:
    if record.size > MOST_BYTES:
        raise Unreadable(
            f"has a {record.name} of {record.size:,} bytes; expected {MOST_BYTES:,} at most: it may be hostile"
        )
    content = memory[record.start : record.start + record.size].data
    if record.checksum is not None and zlib.crc32(content) != record.checksum:
        raise Unreadable(f"is damaged: {record.name} does not have the checksum that its archive tells")
    return content


def _members(memory: np.ndarray, file: BinaryIO) -> dict[str, Record]:
    """All members of a zip archive whose members are stored without compression."""
    entries, at, end = _directory(memory)
    data, number = memory.data, file.fileno()
    records: dict[str, Record] = {}
    for _ in range(entries):
        _, flags, method, checksum, packed, size, name_size, extra_size, note_size, header = _unpack(
            ENTRY, data, at, b"PK\x01\x02"
        )
        at += ENTRY.size
        spelled = bytes(data[at : at + name_size])
        at += name_size + extra_size
        if size == 0xFFFFFFFF or packed == 0xFFFFFFFF or header == 0xFFFFFFFF:
            size, packed, header = _of_64_bits(bytes(data[at - extra_size : at]), size, packed, header)
        at += note_size
        if at > end:
            raise Unreadable("is damaged: the directory of its zip archive is longer than told")
        name = spelled.decode("utf-8", "replace")
        if name in records:
            raise Unreadable(f"is a zip archive with two members of the name {short(name)}")
        if method != 0 or packed != size or flags & 1:
            raise Unreadable(
                f"is a zip archive whose {short(name)} is compressed; torch.save never does that"
            )
        # The header before a member repeats these fields; it is read for its length. Its name shows whether the entry of
        # the directory belongs to this member. It lies in a page of its own, and to map one and take it away takes three
        # times as long as a call of the system.
        found = _read(number, HEADER.size + name_size, header) if header < len(data) else b""
        _, name_size, extra_size = _unpack(HEADER, found, 0, START)
        if found[HEADER.size :] != spelled or name_size != len(spelled):
            raise Unreadable(f"is damaged: its {short(name)} lies where another member should")
        begin = header + HEADER.size + name_size + extra_size
        if begin + size > len(data):
            raise Unreadable(f"is damaged or cut short: its {short(name)} ends behind the end of the file")
        # torch writes 0 if checksums are switched off.
        records[name] = Record(name, begin, size, checksum if checksum or not size else None)
    return records


def _read(file: int, size: int, at: int) -> bytes:
    try:
        return os.pread(file, size, at)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror}): check the disk, or fetch it again") from error


def _directory(memory: np.ndarray) -> tuple[int, int, int]:
    """(number of entries, first byte, last byte + 1) of a zip archive's directory."""
    tail_start = max(0, len(memory) - END.size - 0xFFFF)
    where = memory[tail_start:].tobytes().rfind(b"PK\x05\x06")
    if where < 0 or tail_start + where + END.size > len(memory):
        raise Unreadable(
            f"is cut short: it has {len(memory):,} bytes and begins as a zip archive, but the directory at the archive's "
            "end is missing"
        )
    end = tail_start + where
    data = memory.data
    _, _, _, _, entries, size, start, _ = _unpack(END, data, end, b"PK\x05\x06")
    pointer = end - END_64_POINTER.size
    if pointer >= 0 and memory[pointer : pointer + 4].tobytes() == b"PK\x06\x07":
        end = _unpack(END_64_POINTER, data, pointer, b"PK\x06\x07")[2]
        entries, size, start = _unpack(END_64, data, end, b"PK\x06\x06")[7:10]
    if start + size > end or entries * ENTRY.size > size:
        raise Unreadable("is damaged: the directory of its zip archive does not fit into the file")
    if entries > MOST_ENTRIES:
        raise Unreadable(
            f"is a zip archive of {entries:,} members; expected {MOST_ENTRIES:,} at most: it may be hostile"
        )
    return entries, start, start + size


def _of_64_bits(extra: bytes, *values: int) -> tuple[int, ...]:
    """``values``, in which values that do not fit into 32 bits are replaced from the extra field with number 1."""
    at = 0
    while at + 4 <= len(extra):
        number, size = struct.unpack_from("<2H", extra, at)
        if number == 1:
            count = values.count(0xFFFFFFFF)
            if size < 8 * count or at + 4 + size > len(extra):
                break
            wide = iter(struct.unpack_from(f"<{count}Q", extra, at + 4))
            return tuple(next(wide) if value == 0xFFFFFFFF else value for value in values)
        at += 4 + size
    raise Unreadable("is damaged: a size in the directory of its zip archive is missing")


def _unpack(form: struct.Struct, data: memoryview | bytes, at: int, signature: bytes) -> tuple[Any, ...]:
    try:
        # A number below zero would count from the end.
        found = form.unpack_from(data, at) if at >= 0 else (b"",)
    except (struct.error, OverflowError):
        found = (b"",)
    if found[0] != signature:
        raise Unreadable("is damaged: the parts of its zip archive are not where its directory says")
    return found


def _of_old_file(memory: np.ndarray, each: int) -> Layout:
    """The layout of an old file.

    It holds three pickles (a number, the version, the machine), the content, the names of the storages, and the storages.
    Before each storage, eight bytes hold its length in numbers.
    """
    data = memory[:MOST_BYTES].data
    magic = parse(data)
    if magic.value != MAGIC:
        raise Unreadable("is a pickle, but not one that torch.save wrote")
    version = parse(data, magic.end)
    machine = parse(data, version.end)
    if isinstance(machine.value, Pairs) and ("little_endian", False) in machine.value:
        raise Unreadable("was written on a big-endian machine, which is not supported")
    content = parse(data, machine.end, each)
    names = parse(data, content.end)
    if not isinstance(names.value, list):
        raise Unreadable("is damaged: the list of its storages is missing")
    sizes = storage_sizes(content)
    at, storages = names.end, {}
    for name in names.value:
        if not isinstance(name, str) or name not in sizes or name in storages:
            raise Unreadable(f"is damaged: it lists a storage {short(name)} that none of its tensors has")
        count, size = int.from_bytes(memory[at : at + 8].tobytes(), "little"), sizes[name]
        at += 8
        if count * size > len(memory) - at:
            raise Unreadable(
                f"is cut short: it has {len(memory):,} bytes, and its storage {clip(name)} ends behind them"
            )
        storages[name] = Record(name, at, count * size, None)
        at += count * size
    return Layout(content, storages)
