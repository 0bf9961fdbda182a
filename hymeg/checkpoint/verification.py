"""A checkpoint's files held against their checksums: all of a folder, whichever kind; and what to say of one that has
none.

What is compared with what: a file with the sums of the folder's manifest (`hymeg.checksums`); one of the hub's cache,
or fetched by `hf download --local-dir`, with the SHA-256 (large files) or Git's SHA-1 that the hub gave with it; one of
a distributed checkpoint that has neither with the CRC-32 of each tensor stored in it.
"""

import contextlib
import functools
import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from isal import isal_zlib

from hymeg.checkpoint.dist_files import METADATA
from hymeg.checkpoint.metadata_file import stored_places
from hymeg.checkpoint.stored_tensor import begin_of_record
from hymeg.checkpoint.workers import check_num_workers, dealt, run
from hymeg.checksums import (
    MANIFEST,
    Damaged,
    FilePart,
    FileSum,
    ReadFile,
    damaged_blocks,
    read_manifest,
    sum_of_file,
)
from hymeg.errors import UserError
from hymeg.files import drop_from_cache, opened, some
from hymeg.hf.safetensors_files import read_header
from hymeg.progress import Progress

_BIG = re.compile(r".*\.(safetensors|distcp)|\.metadata|model\.safetensors\.index\.json|metadata\.json|\d+")
_READ_BYTES = 4 << 20


def verification_notes(folder: Path, *beside: Path) -> Iterator[str]:
    """What to say before `folder` is read, and small files of the folders `beside`: that there are no checksums; that
    small files, which people edit, are not those that were written. (What else is read is verified as it is read.)

    Raises:
        Damaged: a manifest is.
    """
    manifest = read_manifest(folder / MANIFEST)
    if manifest is None:
        has_hashes = any(map(_hub_hash, folder.glob("*.safetensors")))
        how = ": `inspect --verify` compares it with the hub's hashes" if has_hashes else ""
        yield f"{folder}: written without checksums, what is read of it is not verified{how}"
    for place in dict.fromkeys((folder, *beside)):
        for name, expected in _of_small_files(place).items():
            path = place / name
            if not path.is_file():
                yield f"{path}: was there when the folder was written, and is not now"
            elif sum_of_file(path) != expected:
                yield f"{path}: was changed after it was written, or is damaged"


def _of_small_files(folder: Path) -> dict[str, FileSum]:
    manifest = read_manifest(folder / MANIFEST) or {}
    return {name: found for name, found in manifest.items() if not _BIG.fullmatch(name)}


class Finding(NamedTuple):
    """A damaged file."""

    path: Path
    what: str  # in words
    tensors: tuple[str, ...]  # that lie, or may lie, where it is damaged

    def __str__(self) -> str:
        return f"{self.path}: {self.what}{f'; there lie: {some(self.tensors, 5)}' if self.tensors else ''}"


Report = Callable[[int], None]  # that so many more bytes are done
_Check = Callable[[Path, Report], list[Finding]]


class Verified(NamedTuple):
    num_files: int  # that were compared
    num_bytes: int
    damaged: list[Finding]
    unverified: list[Path]  # nothing is known of what they should hold

    def __str__(self) -> str:
        state = f"{len(self.damaged)} damaged" if self.damaged else "none damaged"
        others = f"; {len(self.unverified):,} without checksums, not verified" if self.unverified else ""
        return f"{self.num_files:,} files, {self.num_bytes:,} bytes verified: {state}{others}"


def verify_folder(folder: str | os.PathLike, workers: int = 2) -> Verified:
    """Every file of a checkpoint's folder, all its iterations included, or of text for pre-training, read from the disk
    and compared.

    Raises:
        UserError: there is no such folder, or a file cannot be read.
    """
    check_num_workers(workers)
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of a checkpoint")
    findings: list[Finding] = []
    checks: list[tuple[int, Path, _Check]] = []  # the size first
    unverified = []
    for place in sorted({folder, *(path for path in folder.rglob("*") if path.is_dir())}):
        known: dict[str, FileSum] = {}
        manifests = sorted({place / MANIFEST, *place.glob(f"*.{MANIFEST}")})
        for path in manifests:
            try:
                manifest = read_manifest(path)
            except Damaged as error:
                findings.append(Finding(path, error.what, ()))
            else:
                known |= manifest or {}
        for name, expected in known.items():
            if (place / name).is_file():
                checks.append((expected.size, place / name, functools.partial(_compared_with_sums, expected)))
            else:
                findings.append(Finding(place / name, "missing", ()))
        for path in sorted(path for path in place.iterdir() if path.is_file()):
            if path.name in known or path in manifests:
                continue
            if (hub_hash := _hub_hash(path)) is not None:
                checks.append((path.stat().st_size, path, functools.partial(_compared_with_hub, hub_hash)))
            elif path.suffix == ".distcp" and (place / METADATA).is_file():
                checks.append((path.stat().st_size, path, _compared_with_zips))
            elif path.suffix in (".safetensors", ".distcp", ".bin", ".idx") or path.name == METADATA:
                unverified.append(path)

    def work(dealt_checks: Iterator[tuple[int, Path, _Check]], report: Report) -> list[Finding]:
        return [finding for _, path, check in dealt_checks for finding in check(path, report)]

    checks.sort(key=lambda check: -check[0])
    num_bytes = sum(size for size, _, _ in checks)
    for _, path, _ in checks:
        drop_from_cache(path)
    outcome = run(work, [dealt(checks)] * min(workers, max(len(checks), 1)), Progress("verifying", num_bytes))
    findings += [finding for of_worker in outcome.results for finding in of_worker]
    return Verified(len(checks), num_bytes, sorted(findings), unverified)


def _compared_with_sums(expected: FileSum, path: Path, report: Report) -> list[Finding]:
    wrong = damaged_blocks(path, expected, report)
    where = some((f"{part.start} to {part.stop - 1}" for part in wrong), 3)
    what = f"bytes {where} are not those that were written"
    return [Finding(path, what, tuple(_tensors_at(path, wrong)))] if wrong else []


# ---- hashes that the hub gave


def _hub_hash(path: Path) -> str | None:
    """SHA-256, 64 digits, or Git's SHA-1, 40: huggingface_hub names the blobs of its cache so, to which the files of a
    snapshot are links, and keeps it in .cache/huggingface/download/NAME.metadata, second line, of a --local-dir.
    """
    told = [os.path.basename(os.readlink(path))] if path.is_symlink() else []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        told += (path.parent / f".cache/huggingface/download/{path.name}.metadata").read_text().splitlines()[1:2]
    return next((name for name in told if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", name)), None)


def _compared_with_hub(expected: str, path: Path, report: Report) -> list[Finding]:
    digest = hashlib.sha256()
    if len(expected) == 40:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            report(len(data))
    if digest.hexdigest() == expected:
        return []
    return [Finding(path, f"not the hub's file: {digest.name} is {digest.hexdigest()}, not {expected}", ())]


# ---- what lies where


def _tensors_at(path: Path, wrong: list[range]) -> list[str]:
    """Of a file's tensors those in these bytes, as far as can be told."""
    try:
        places = [
            (key, start, length)
            for key, start, length in _places(path)
            if any(start < part.stop and part.start < start + length for part in wrong)
        ]
        if path.suffix == ".distcp":
            places = [place for place in places if _is_broken(path, *place[1:])] or places
    except (UserError, OSError):
        return []
    return list(dict.fromkeys(key for key, _, _ in places))


def _places(path: Path) -> list[tuple[str, int, int]]:
    """Name, position and length of each tensor, or other object, that is stored in a file."""
    if path.suffix == ".safetensors":
        return [(name, entry.offset, entry.nbytes) for name, entry in read_header(path, opened).items()]
    if path.suffix != ".distcp":
        return []
    return [(key, *place) for key, file, *place in stored_places(path.parent) if file == path.name]


def _compared_with_zips(path: Path, report: Report) -> list[Finding]:
    broken = []
    for key, position, length in _places(path):
        if _is_broken(path, position, length):
            broken.append(key)
        report(length)
    what = "stored tensors that do not have the CRC-32 that was stored with them"
    return [Finding(path, f"{len(broken)} {what}", tuple(broken))] if broken else []


def _is_broken(path: Path, position: int, length: int) -> bool:
    """Whether a record of the zip that torch.save wrote has another CRC-32 than it should have. What is no zip is not
    known to be broken.
    """
    with contextlib.closing(ReadFile(path, None)) as file:
        window = FilePart(file, position, length)
        if window.read_at(0, 4) != b"PK\3\4":
            return False
        try:
            with zipfile.ZipFile(window) as archive:
                return any(_crc_of(window, record) != record.CRC for record in archive.infolist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error):
            return True


def _crc_of(window: FilePart, record: zipfile.ZipInfo) -> int:
    """As far as the record lies in the window. Raises ValueError, struct.error where it does not even begin there."""
    window.seek(begin_of_record(window, record))
    rest, crc = record.compress_size, 0
    while data := window.read(min(_READ_BYTES, rest)):
        rest, crc = rest - len(data), isal_zlib.crc32(data, crc)
    return crc
