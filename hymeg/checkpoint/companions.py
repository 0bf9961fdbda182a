"""The small files that travel with a checkpoint's weights: config.json, tokenizer, chat templates, code, licence."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hymeg.errors import UserError
from hymeg.files import write_whole
from hymeg.hf.config import CONFIG_FILE

TEMPLATES = "additional_chat_templates"
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template.*"
    rf"|.*\.tiktoken|tokenization_.*\.py|{TEMPLATES}/.*\.jinja"
)
_VOCABULARY = re.compile(r"tokenizer\.(json|model)|vocab\.(json|txt)|.*\.tiktoken")  # without which there is none
_OTHERS = re.compile(r"generation_config\.json|(configuration|modeling)_.*\.py|(LICENSE|NOTICE|Notice|License).*")
_MAX_BYTES = 256 << 20


def config_folder(*folders: Path) -> Path | None:
    """The first that holds config.json."""
    return next((folder for folder in folders if (folder / CONFIG_FILE).is_file()), None)


def carried_files(folder: Path) -> dict[str, Path]:
    """What goes along with the weights of a folder, config.json excepted, by its path inside the folder.

    Raises:
        UserError: a file is a link to nothing, or too large to be what its name says.
    """
    found = {}
    for path in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")]):
        name = str(path.relative_to(folder))
        if path.is_dir() or not (_TOKENIZER.fullmatch(name) or _OTHERS.fullmatch(name)):
            continue
        if not path.exists():
            raise UserError(f"{path}: a link to a file that is not there; fetch the file again, or remove the link")
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise UserError(f"{path}: {size} bytes, too many for a tokenizer's file ({_MAX_BYTES}); move it elsewhere")
        found[name] = path
    return found


def companions(folders: Iterable[Path]) -> dict[str, Path]:
    """The carried files of several folders: each from the first that has it, but what belongs to a tokenizer from no
    folder behind the first that has one.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        complete = has_tokenizer(found)
        for name, path in carried_files(folder).items():
            if name not in found and not (complete and _TOKENIZER.fullmatch(name)):
                found[name] = path
    return found


def has_tokenizer(files: Iterable[str]) -> bool:
    return any(_VOCABULARY.fullmatch(name) for name in files)


def notes_of_tokenizer(files: Iterable[str], folder: Path) -> list[str]:
    """What to say where a Hugging Face folder gives none along."""
    return [] if has_tokenizer(files) else [f"no tokenizer in {folder}, nor in what is written; copy its files there"]


def carry(files: Mapping[str, Path], folder: Path) -> None:
    """Copy `files` into `folder`, each whole. Raises UserError where one cannot be read or written."""
    for name, path in files.items():
        try:
            data = path.read_bytes()
            os.makedirs((folder / name).parent, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be read or copied: {error.strerror or error}") from error
        write_whole(folder / name, data)
