"""Names of the Hugging Face hub where a folder is expected: `tencent/Hy-MT2-30B-A3B`, `tencent/Hy3@REVISION`.

What huggingface_hub's cache holds is used without asking the network; what it lacks is fetched, with the library's own
progress bars and under its own locks, so once where several processes share a disk.
"""

import os
import re
from pathlib import Path

from hymeg.errors import UserError
from hymeg.hf.config import CONFIG_FILE
from hymeg.hf.safetensors_files import open_checkpoint

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_UNUSED = ["*.bin", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]


def is_hub_id(name: str | os.PathLike) -> bool:
    """Whether `name` has the form of an id and means nothing on the disk: neither it nor its first part is there."""
    found = _ID.fullmatch(os.fspath(name))
    return bool(found) and not os.path.exists(name) and not os.path.exists(found[1].partition("/")[0])


def local_folder(name: str | os.PathLike, weights: bool = True, flag: str = "") -> Path:
    """The folder `name`, or the cache's of the model of that id.

    Args:
        weights: are needed, too; False: config.json and tokenizer will do.
        flag: that named it, for the message.

    Raises:
        UserError: it is not in the cache, and cannot be fetched.
    """
    if not is_hub_id(name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    repository, revision = _ID.fullmatch(os.fspath(name)).groups()
    wanted = {"revision": revision or "main", "ignore_patterns": _UNUSED + ([] if weights else ["*.safetensors"])}
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        disable_progress_bars()
    cached = None
    for from_cache in (True, False):
        try:
            folder = Path(snapshot_download(repository, local_files_only=from_cache, **wanted))
            if _is_complete(folder, weights):
                if not from_cache or all((folder / name).is_file() for name in _TOKENIZER):
                    return folder
                cached = folder  # as transformers leaves it that loaded the model alone
            reason = f"{folder} is incomplete"  # what the library falls back to where there is no network
        except Exception as error:  # whatever the library and the network raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if cached is not None:
        return cached
    raise UserError(
        f"{f'{flag} {name}'.strip()}: no such folder, and a model of this name is neither in the Hugging Face cache "
        f"nor can be fetched ({reason}); give a folder, fetch it with hf download where there is a network, or check "
        "name and revision (HF_HOME says where the cache is)"
    )


def _is_complete(folder: Path, weights: bool) -> bool:
    if not (folder / CONFIG_FILE).is_file():
        return False
    try:
        return not weights or bool(open_checkpoint(folder))
    except UserError:
        return False
