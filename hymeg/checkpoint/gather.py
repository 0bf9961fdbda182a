"""A distributed checkpoint whose files lie on several nodes' own disks, put together: every rank writes its files where
it runs, and rank 0 alone what describes them. The files are copied as they are, optimizer state included.
"""

import filecmp
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hymeg.checkpoint.companions import carry, companions, config_folder
from hymeg.checkpoint.conversion import check_apart
from hymeg.checkpoint.dist_files import FORMAT_FILE, METADATA, RELEASE, TRACKER, iteration_folder
from hymeg.checkpoint.metadata_file import stored_places
from hymeg.checkpoint.options import Options, Say
from hymeg.checkpoint.sinks.new_folder import new_folder
from hymeg.checkpoint.sources.dist_folder import open_dist
from hymeg.checksums import MANIFEST, FileSum, Summer, open_verified, read_manifest, write_manifest
from hymeg.errors import UserError
from hymeg.files import some, write_whole
from hymeg.hf.config import CONFIG_FILE
from hymeg.progress import Progress

_BLOCK_BYTES = 8 << 20


class Gathered(NamedTuple):
    """What was put together."""

    iteration: int | None  # None: no training made it
    num_files: int
    num_bytes: int


def gather(folders: Sequence[str | Path], dist: str | Path, **options: Any) -> Gathered:
    """Copy the one checkpoint that lies scattered over `folders` into the folder `dist`.

    Args:
        folders: what --save named on each node, or the iteration's folders in them.
        options: `iteration`, `overwrite`, as `options.Options` has them.

    Raises:
        UserError: a file is missing in all folders, truncated, damaged, or differs in two of them; `dist` cannot be
            written. Nothing is left behind.
    """
    how = Options.taken(("iteration", "overwrite"), options)
    dist, folders = Path(dist), [Path(folder) for folder in folders]
    described, iteration = _described(folders, how.iteration)
    name = RELEASE if iteration is None else f"iter_{iteration:07d}"
    parts = list(dict.fromkeys(part.resolve() for folder in folders if (part := _part(folder, name, described))))
    check_apart(dist, parts)
    files = _files(parts, described, how.say)
    num_bytes = sum(path.stat().st_size for path in files.values())
    beside = companions(dict.fromkeys([*parts, *(part.parent for part in parts)]))
    record = {"command": "gather", "from": [str(part) for part in parts], "iteration": iteration}
    with new_folder(dist, num_bytes, how.overwrite, record, how.say) as partial:
        (partial / name).mkdir()
        progress, done, sums = Progress("gathering", num_bytes), 0, {}
        expected = read_manifest(described / MANIFEST) or {}  # rank 0 writes it of all ranks' files
        # FORMAT_FILE makes it valid, and comes last.
        for file_name, path in sorted(files.items(), key=lambda item: item[0] == FORMAT_FILE):
            sums[file_name] = _copy(path, expected.get(file_name), partial / name / file_name, progress, done)
            done += sums[file_name].size
        progress.show(done, at_end=True)
        write_manifest(partial / name / MANIFEST, sums)
        open_dist(partial / name)
        config = config_folder(*(folder for part in parts for folder in (part, part.parent)))
        carry(beside | ({CONFIG_FILE: config / CONFIG_FILE} if config else {}), partial)
        write_whole(partial / TRACKER, (RELEASE if iteration is None else str(iteration)).encode())
    return Gathered(iteration, len(files), num_bytes)


def _described(folders: Sequence[Path], iteration: int | None) -> tuple[Path, int | None]:
    """The iteration's folder that holds its `.metadata`, and which iteration it is."""
    found, errors = [], []
    for folder in folders:
        try:
            place, number = iteration_folder(folder, iteration)
        except UserError as error:
            errors.append(str(error))
            continue
        if (place / METADATA).is_file():
            found.append((place, number))
    if not found:
        raise UserError(
            f"no folder holds {METADATA} and {FORMAT_FILE}, which rank 0 writes on its node; give that node's folder, "
            f"too ({'; '.join(errors[:2]) or folders[0]})"
        )
    for place, number in found[1:]:
        if number != found[0][1] or not filecmp.cmp(place / METADATA, found[0][0] / METADATA, shallow=False):
            raise UserError(
                f"{found[0][0]} and {place} are two saves, not parts of one; give --iteration N, or one of them"
            )
    return found[0]


def _part(folder: Path, name: str, described: Path) -> Path | None:
    """Where in `folder` files of the iteration may be: in its folder, or in `folder` itself."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give what --save named on each node")
    if (folder / name).is_dir():
        return folder / name
    return folder if folder.resolve() == described.resolve() or any(folder.glob("*.distcp")) else None


def _files(parts: Sequence[Path], described: Path, say: Say) -> dict[str, Path]:
    """Every file of the checkpoint, by its name: those that `.metadata` names, and what is beside them."""
    needed: dict[str, int] = {}
    for _, file, position, length in stored_places(described):
        needed[file] = max(needed.get(file, 0), position + length)
    files, surplus = {METADATA: described / METADATA, FORMAT_FILE: described / FORMAT_FILE}, []
    for part in parts:
        for path in sorted(part.iterdir()):
            if path.suffix == ".distcp" and path.name not in needed:
                surplus.append(path)
                continue
            if not path.is_file() or path.name == MANIFEST:
                continue
            one = files.setdefault(path.name, path)
            if one != path and path.name in needed and not filecmp.cmp(one, path, shallow=False):
                raise UserError(
                    f"{one} and {path} differ; they are of two saves: remove the one that does not belong here"
                )
    if missing := sorted(needed.keys() - files.keys(), key=_rank):
        ranks = sorted({rank for name in missing if (rank := _rank(name)[0]) is not None})
        raise UserError(
            f"{len(missing)} of {len(needed)} files are in none of the {len(parts)} folders: {some(missing, 5)} (of "
            f"ranks {some(ranks, 5)}); give the folders of the nodes on which they ran, too"
        )
    for name, size in needed.items():
        if (found := files[name].stat().st_size) < size:
            raise UserError(f"{files[name]}: truncated: {found} bytes, {size} are needed; copy it again")
    if surplus:
        say(f"left out, of another save: {some((path.name for path in surplus), 5)}")
    return files


def _rank(name: str) -> tuple[int | None, str]:
    """Of the rank that wrote a file, `__RANK_NUMBER.distcp`."""
    found = re.match(r"__(\d+)_\d+\.distcp", name)
    return int(found[1]) if found else 0, name


def _copy(source: Path, expected: FileSum | None, target: Path, progress: Progress, done: int) -> FileSum:
    """Copy a file to the disk, after `done` bytes of others, and verify it as far as its sums are known; its sums."""
    summer, position = Summer(), 0
    try:
        with open_verified(source, expected) as file, open(target, "wb") as copy:
            while block := file.read(_BLOCK_BYTES):
                copy.write(block)
                summer.add(position, block)
                position += len(block)
                progress.show(done + position)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError as error:
        progress.close()
        raise UserError(f"{source}: cannot be copied to {target}: {error.strerror or error}") from error
    return summer.result()
