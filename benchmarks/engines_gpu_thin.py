"""A CUDA library without the code that one GPU does not take: the same file, zeros in its place.

Of each fat binary in the section `.nv_fatbin` the machine code for the GPU stays, or that of the
same generation before it; where there is none, the PTX that its driver compiles. The layout of the
file does not change, so that nothing has to be linked again, and zeros compress to nothing.

A fat binary is a header (magic u32, version u16, size of the header u16, size of what follows u64)
and entries, each with a header of its own (kind u16: 1 PTX, 2 machine code; u16; size of the header
u32; size of the code u64; …; compute capability × 10 as u32 at byte 28).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, MACHINE_CODE = 1, 2


class Code(NamedTuple):
    """One entry of a fat binary: bytes `start` to `stop` of the file."""

    kind: int
    capability: int
    start: int
    stop: int


def thin(library: bytearray, capability: int) -> int:
    """Zero what a GPU of this compute capability (× 10) does not take; the bytes of code kept.

    Raises ValueError for a file without fat binaries.
    """
    kept = 0
    for entries in fat_binaries(library):
        wanted = chosen(entries, capability)
        for code in entries:
            if code in wanted:
                kept += code.stop - code.start
            else:
                library[code.start : code.stop] = bytes(code.stop - code.start)
    return kept


def chosen(entries: list[Code], capability: int) -> list[Code]:
    """The entries that the driver would take for a GPU."""
    machine = [code for code in entries if code.kind == MACHINE_CODE]
    exact = [code for code in machine if code.capability == capability]
    generation = [
        code
        for code in machine
        if code.capability // 10 == capability // 10 and code.capability <= capability
    ]
    compiled = [code for code in entries if code.kind == PTX and code.capability <= capability]
    return exact or generation or compiled


def fat_binaries(library: bytearray) -> Iterator[list[Code]]:
    """The entries of each fat binary."""
    begin, end = section(library, ".nv_fatbin")
    while (begin := library.find(MAGIC, begin, end)) >= 0:
        header, size = struct.unpack_from("<6xHQ", library, begin)
        at, stop = begin + header, begin + header + size
        entries = []
        while at < stop:
            kind, own, length = struct.unpack_from("<H2xIQ", library, at)
            (capability,) = struct.unpack_from("<I", library, at + 28)
            entries.append(Code(kind, capability, at + own, at + own + length))
            at += own + length
        yield entries
        begin = stop


def section(library: bytearray, name: str) -> tuple[int, int]:
    """First byte of a section of a 64-bit ELF file, and the byte after it."""
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count, names = struct.unpack_from("<HHH", library, 58)
    headers = [struct.unpack_from("<I20xQQ", library, table + size * i) for i in range(count)]
    strings = headers[names][1]
    for label, offset, length in headers:
        start = strings + label
        if library[start : library.index(0, start)].decode() == name:
            return offset, offset + length
    raise ValueError(f"no section {name}")


def thin_file(source: Path, target: Path, capability: int) -> None:
    """Write the thin form of a library to `target`."""
    library = bytearray(source.read_bytes())
    kept = thin(library, capability)
    target.write_bytes(library)
    print(f"{source.name}: {len(library) / 1e6:.1f} MB, {kept / 1e6:.1f} MB of code kept")
