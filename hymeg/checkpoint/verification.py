"""A checkpoint's files held against their checksums: all of a folder, whichever kind; and what to say of one that has
none.

What is compared with what: a file with the sums of the folder's manifest (`hymeg.checksums`); one of the hub's cache,
or fetched by `hf download --local-dir`, with the SHA-256 (large files) or Git's SHA-1 that the hub gave with it; one of
a distributed checkpoint that has neither with the CRC-32 of each tensor stored in it.
"""

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
from hymeg.checkpoint.stored_tensor import FileWindow
from hymeg.checkpoint.workers import check_num_workers, dealt, run
from hymeg.checksums import MANIFEST, Damaged, FileSum, damaged_blocks, read_manifest, sum_of_file
from hymeg.errors import UserError
from hymeg.files import drop_from_cache, opened
from hymeg.hf.safetensors_files import SafetensorsFile
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
        how = ": `inspect --verify` compares it with the hub's hashes" if _has_hub_hashes(folder) else ""
        yield f"{folder}: written without checksums, what is read of it is not verified{how}"
    for place in dict.fromkeys((folder, *beside)):
        for name, expected in _of_small_files(place).items():
            path = place / name
            if not path.is_file():
                yield f"{path}: was there when the folder was written, and is not now"
            elif sum_of_file(path) != expected:
                yield f"{path}: was changed after it was written, or is damaged"


def _of_small_files(folder: Path) -> dict[str, FileSum]:
    manifest = read_manifest(folder / MANIFEST)
    return {name: found for name, found in manifest.files.items() if not _BIG.fullmatch(name)} if manifest else {}


class Finding(NamedTuple):
    """A damaged file."""

    path: Path
    what: str  # in words
    tensors: tuple[str, ...]  # that lie, or may lie, where it is damaged

    def __str__(self) -> str:
        names = ", ".join(self.tensors[:5]) + (", ..." if len(self.tensors) > 5 else "")
        return f"{self.path}: {self.what}{f'; there lie: {names}' if names else ''}"


class Report(NamedTuple):
    num_files: int  # that were compared
    num_bytes: int
    damaged: list[Finding]
    unverified: list[Path]  # nothing is known of what they should hold

    def __str__(self) -> str:
        state = f"{len(self.damaged)} damaged" if self.damaged else "none damaged"
        others = f"; {len(self.unverified):,} without checksums, not verified" if self.unverified else ""
        return f"{self.num_files:,} files, {self.num_bytes:,} bytes verified: {state}{others}"


class _Check(NamedTuple):
    path: Path
    size: int
    how: Callable[[Path, Callable[[int], None]], list[Finding]]


def verify_folder(folder: str | os.PathLike, workers: int = 2) -> Report:
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
    checks, unverified = [], []
    for place in sorted({folder, *(path for path in folder.rglob("*") if path.is_dir())}):
        known: dict[str, FileSum] = {}
        manifests = sorted({place / MANIFEST, *place.glob(f"*.{MANIFEST}")})
        for path in manifests:
            try:
                manifest = read_manifest(path)
            except Damaged as error:
                findings.append(Finding(path, error.what, ()))
            else:
                known |= manifest.files if manifest else {}
        for name, expected in known.items():
            if (place / name).is_file():
                checks.append(_Check(place / name, expected.size, _ComparedWithSums(expected)))
            else:
                findings.append(Finding(place / name, "missing", ()))
        for path in sorted(path for path in place.iterdir() if path.is_file()):
            if path.name not in known and path not in manifests:
                how = _otherwise(path)
                if how:
                    checks.append(_Check(path, path.stat().st_size, how))
                elif path.suffix in (".safetensors", ".distcp", ".bin", ".idx") or path.name == ".metadata":
                    unverified.append(path)

    def work(dealt_checks: Iterator[_Check], report: Callable[[int], None]) -> list[Finding]:
        return [finding for check in dealt_checks for finding in check.how(check.path, report)]

    checks.sort(key=lambda check: -check.size)
    num_bytes = sum(check.size for check in checks)
    for check in checks:
        drop_from_cache(check.path)
    outcome = run(work, [dealt(checks)] * min(workers, max(len(checks), 1)), Progress("verifying", num_bytes))
    findings += [finding for of_worker in outcome.results for finding in of_worker]
    return Report(len(checks), num_bytes, sorted(findings), unverified)


class _ComparedWithSums:
    def __init__(self, expected: FileSum):
        self.expected = expected

    def __call__(self, path: Path, report: Callable[[int], None]) -> list[Finding]:
        wrong = damaged_blocks(path, self.expected, report)
        if not wrong:
            return []
        where = ", ".join(f"{part.start} to {part.stop - 1}" for part in wrong[:3]) + (", ..." if wrong[3:] else "")
        return [Finding(path, f"bytes {where} are not those that were written", tuple(_tensors_at(path, wrong)))]


def _otherwise(path: Path) -> Callable[[Path, Callable[[int], None]], list[Finding]] | None:
    """How to verify a file that no manifest has, if there is a way."""
    if (hub_hash := _hub_hash(path)) is not None:
        return lambda path, report: _compared_with_hub(path, hub_hash, report)
    if path.suffix == ".distcp" and (path.parent / METADATA).is_file():
        return _compared_with_zips
    return None


# ---- hashes that the hub gave


def _has_hub_hashes(folder: Path) -> bool:
    return any(_hub_hash(path) for path in folder.glob("*.safetensors"))


def _hub_hash(path: Path) -> str | None:
    """SHA-256, 64 digits, or Git's SHA-1, 40: huggingface_hub names the blobs of its cache so, to which the files of a
    snapshot are links, and keeps it in .cache/huggingface/download/NAME.metadata, second line, of a --local-dir.
    """
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", name := os.path.basename(os.readlink(path))):
        return name
    try:
        kept = (path.parent / ".cache/huggingface/download" / f"{path.name}.metadata").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return kept[1] if len(kept) > 1 and re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", kept[1]) else None


def _compared_with_hub(path: Path, expected: str, report: Callable[[int], None]) -> list[Finding]:
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
        if path.suffix == ".safetensors":
            tensors = SafetensorsFile(path, opened).tensors
            places = [(name, tensor.offset, tensor.nbytes) for name, tensor in tensors.items()]
        elif path.suffix != ".distcp":
            return []
        else:
            places = [item for item in _stored_items(path.parent) if item.file == path.name]
            broken = [item for item in places if _overlaps(item[1], item[2], wrong) and _is_broken(path, item)]
            places = broken or places
            places = [(item.key, item.position, item.length) for item in places]
    except (UserError, OSError):
        return []
    return list(dict.fromkeys(name for name, start, length in places if _overlaps(start, length, wrong)))


def _overlaps(start: int, length: int, wrong: list[range]) -> bool:
    return any(start < part.stop and part.start < start + length for part in wrong)


class _Item(NamedTuple):
    """One stored tensor or object of a distributed checkpoint."""

    key: str
    position: int
    length: int
    file: str


def _stored_items(folder: Path) -> list[_Item]:
    return [_Item(key, position, length, file) for key, file, position, length in stored_places(folder)]


def _compared_with_zips(path: Path, report: Callable[[int], None]) -> list[Finding]:
    items = [item for item in _stored_items(path.parent) if item.file == path.name]
    broken = []
    for item in items:
        if _is_broken(path, item):
            broken.append(item.key)
        report(item.length)
    what = "stored tensors that do not have the CRC-32 that was stored with them"
    return [Finding(path, f"{len(broken)} {what}", tuple(broken))] if broken else []


def _is_broken(path: Path, item: _Item) -> bool:
    """Whether a record of the zip that torch.save wrote has another CRC-32 than it should have. What is no zip is not
    known to be broken.
    """
    with open(path, "rb", buffering=0) as file:
        window = FileWindow(file.fileno(), item.position, item.length)
        if window.read_at(0, 4) != b"PK\3\4":
            return False
        try:
            with zipfile.ZipFile(window) as archive:
                return any(_crc_of(window, record) != record.CRC for record in archive.infolist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error):
            return True


def _crc_of(window: FileWindow, record: zipfile.ZipInfo) -> int:
    """As far as the record lies in the window. Raises ValueError, struct.error where it does not even begin there."""
    window.seek(record.header_offset + 26)
    name_length, extra_length = struct.unpack("<2H", window.read(4))
    window.seek(record.header_offset + 30 + name_length + extra_length)
    rest, crc = record.compress_size, 0
    while data := window.read(min(_READ_BYTES, rest)):
        rest, crc = rest - len(data), isal_zlib.crc32(data, crc)
    return crc
