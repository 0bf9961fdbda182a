"""Room for a file had beforehand, where the file system can and where it cannot."""

import ctypes
import errno
import os
import subprocess
from types import SimpleNamespace

import pytest

from hymeg import files
from hymeg.files import reserve


@pytest.fixture(params=["allotted", errno.EOPNOTSUPP, errno.EINTR, errno.EPERM, "no fallocate"])
def file_system(request, monkeypatch):
    if request.param == "no fallocate":  # as of macOS
        monkeypatch.setattr(files, "_libc", SimpleNamespace())
    elif request.param != "allotted":

        def fallocate(*_):
            ctypes.set_errno(request.param)
            return -1

        monkeypatch.setattr(files, "_libc", SimpleNamespace(fallocate=fallocate))
    return request.param


def test_a_file_gets_its_length_and_keeps_what_it_holds(tmp_path, file_system):
    (tmp_path / "file").write_bytes(b"header")
    for name in ("file", "new", "empty"):
        reserve(tmp_path / name, 0 if name == "empty" else 3 << 20)
    assert (tmp_path / "file").read_bytes() == b"header" + bytes((3 << 20) - 6)
    assert (tmp_path / "new").read_bytes() == bytes(3 << 20)
    assert (tmp_path / "empty").read_bytes() == b""
    if file_system == "allotted":
        assert (tmp_path / "new").stat().st_blocks * 512 >= 3 << 20


def test_a_disk_without_so_much_room_is_found_at_once(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device|File too large") as raised:
        reserve(tmp_path / "file", 1 << 60)
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG)
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode
        != 0
    ):
        pytest.skip("only root can mount a file system")
    try:
        with pytest.raises(OSError, match="No space left on device"):
            reserve(tmp_path / "file", 2 << 20)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
