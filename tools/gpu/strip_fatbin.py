#!/usr/bin/env python3
"""Zero every GPU program in a shared library except those for one architecture, so that it packs small enough to be
carried.

    strip_fatbin.py IN.so OUT.so --keep 90

The library still loads: headers and sizes stay, only the payloads of other architectures become zeros, which compress
to nothing. For transformer_engine 2.20.2 (cu13) 343 MB become 24 MB under xz after `strip -s`. Loading was tried;
launching kernels was not.
"""

import argparse
import mmap
import shutil
import struct
import subprocess

FATBIN_MAGIC = 0xBA55ED50
ELF, PTX = 2, 1


def section(path, name):
    """File offset and size of an ELF section, as readelf prints them."""
    for line in subprocess.run(
        ["readelf", "-SW", path], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        words = line.replace("[", " ").replace("]", " ").split()
        if name in words:
            at = words.index(name)
            return int(words[at + 3], 16), int(words[at + 4], 16)
    raise SystemExit(f"{path}: no section {name}")


def entries(data, start, size):
    """(payload offset, payload size, kind, sm) of every program in the section."""
    pos = start
    while pos < start + size - 16:
        magic, _, header, body = struct.unpack_from("<IHHQ", data, pos)
        if magic != FATBIN_MAGIC:
            pos += 8 - pos % 8
            continue
        end, entry = pos + header + body, pos + header
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            sm = struct.unpack_from("<I", data, entry + 28)[0]
            yield entry + entry_header, payload, kind, sm
            entry += entry_header + payload
        pos = end


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("source"), parser.add_argument("target")
parser.add_argument("--keep", type=int, default=90)
args = parser.parse_args()
shutil.copy(args.source, args.target)
zeroed = kept = 0
with open(args.target, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
    for offset, size, kind, sm in list(entries(data, *section(args.source, ".nv_fatbin"))):
        if kind == ELF and sm == args.keep:
            kept += size
        else:
            data[offset : offset + size] = bytes(size)
            zeroed += size
print(f"kept {kept / 1e6:.1f} MB for sm_{args.keep}, zeroed {zeroed / 1e6:.1f} MB")
