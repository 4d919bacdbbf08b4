"""The members of an uncompressed tar and the offsets of their bytes. Formats: ustar, GNU long names, pax.

Headers are not trusted: lengths must stay inside the file, and members that cannot be read by offset and length (links, sparse files,
compression) are errors with a remedy. `tarfile` parses each header block, but not the file: `TarFile` stops silently at a damaged
header, reads names and pax records of any length into memory, and accepts broken pax records (Python 3.11.7).
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.data.errors import DataError

IMAGES = frozenset({"jpg", "jpeg", "jfif", "jpe", "png", "webp", "bmp", "ppm", "pgm", "gif", "tif", "tiff"})
_BLOCK = 512
_LONGEST_NAME = 1 << 20  # bytes of a long name or of pax records
_BEHIND = 1 << 16  # bytes searched after the end mark for another tar: of tars joined by cat only the first would be read
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # headers that describe the next member
_LINKS = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link"}
_WITHOUT_DATA = {
    **_LINKS,
    tarfile.DIRTYPE: "a directory",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    """A file in a tar: name, and where its bytes are."""

    name: str
    offset: int
    length: int


def members(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order; the tar is bytes start .. stop of the file.

    Reads headers only (about 5 us each). Raises DataError on a truncated, damaged or compressed tar, and on an image that is a
    link or a sparse file.
    """
    with open(path, "rb") as file:
        descriptor = file.fileno()
        stop = os.fstat(descriptor).st_size if stop is None else stop
        at, pax, name = start, {}, ""
        while True:
            block = os.pread(descriptor, _BLOCK, at)
            if len(block) < _BLOCK or at + _BLOCK > stop:
                raise DataError(f"shard {path}: truncated: no end mark before byte {stop}; copy or pack it again")
            if not any(block):
                rest = os.pread(descriptor, min(_BEHIND, stop - at), at)
                if any(rest[begin + 257 : begin + 262] == b"ustar" for begin in range(0, len(rest), _BLOCK)):
                    raise DataError(f"shard {path}: another tar follows its end mark at byte {at}; join tars with tar -A")
                return
            header = _header(path, block, at)
            kind, length = header.type, header.size
            if kind not in _EXTENSIONS and "size" in pax:
                length = _whole(path, pax["size"], at)
            # tar programs differ in whether data follow such a header: members would be lost without a word
            if length and kind in _WITHOUT_DATA:
                raise DataError(
                    f"shard {path}: {pax.get('path') or name or header.name!r} at byte {at} is {_WITHOUT_DATA[kind]} with a length of "
                    f"{length} bytes; make the tar again, of files alone"
                )
            offset = at + _BLOCK
            if offset + length > stop:
                raise DataError(
                    f"shard {path}: truncated inside {header.name!r}, which ends at byte {offset + length} of {stop}; "
                    "copy or pack it again"
                )
            if kind in _EXTENSIONS and length > _LONGEST_NAME:
                raise _damaged(path, at)
            if kind == tarfile.GNUTYPE_LONGNAME:
                name = _text(os.pread(descriptor, length, offset))
            elif kind == tarfile.XHDTYPE:
                pax = _pax(path, os.pread(descriptor, length, offset), at)
            elif kind not in _EXTENSIONS:
                name = pax.get("path") or name or header.name
                sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax)
                elsewhere = "a sparse file" if sparse else _LINKS.get(kind)
                if elsewhere and name.rpartition(".")[2].lower() in IMAGES:
                    raise DataError(
                        f"shard {path}: {pax.get('GNU.sparse.name', name)!r} is {elsewhere}, whose bytes are not stored after its header; "
                        "make the tar again with --dereference --hard-dereference, without --sparse"
                    )
                if header.isreg() and not sparse:
                    yield Member(name, offset, length)
                name, pax = "", {}
            at = offset + -(-length // _BLOCK) * _BLOCK


def read(path: str | Path, member: Member) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), member.length, member.offset)


def _header(path: str | Path, block: bytes, at: int) -> tarfile.TarInfo:
    """A parsed header block. Raises DataError if its checksum does not match."""
    with contextlib.suppress(tarfile.HeaderError):
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.size >= 0:
            return header
    packed = _COMPRESSED.get(block[:2]) if at == 0 else None
    if packed:
        raise DataError(
            f"shard {path}: no tar header at byte 0; it is {packed} compressed; decompress it (examples are read by offset)"
        )
    raise _damaged(path, at)


def _damaged(path: str | Path, at: int) -> DataError:
    return DataError(f"shard {path}: no tar header at byte {at}; copy or pack it again")


def _whole(path: str | Path, text: str, at: int) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 20:  # 2^64 has 20 digits
        raise _damaged(path, at)
    return int(text)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(path: str | Path, data: bytes, at: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`; LENGTH in bytes, of the whole record."""
    records, begin = {}, 0
    while begin < len(data):
        digits, space, _ = data[begin : begin + 20].partition(b" ")
        end = begin + int(digits) if space and digits.isdigit() else begin
        key, equal, value = data[begin + len(digits) + 1 : end - 1].partition(b"=")
        if not equal or not begin < end <= len(data):  # a length of 0 would loop for ever
            raise _damaged(path, at)
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        begin = end
    return records
