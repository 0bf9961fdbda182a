"""One stored tensor of a distributed checkpoint: written as torch writes it, read whatever is wrong with it; numbers
rounded as torch rounds them.
"""

import contextlib
import io
import random
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hymeg.checkpoint.rounding import converted
from hymeg.checkpoint.sources.dist_folder import _row_tensor
from hymeg.checkpoint.stored_tensor import ElementFinder, envelope
from hymeg.checksums import FilePart, ReadFile
from hymeg.errors import UserError

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("wrong", [(2, -1), (2,), (2, True), (2, 2**63)])
@pytest.mark.parametrize("field", ["offsets", "sizes"])
def test_one_chunk_of_no_sizes_among_others_is_refused(field, wrong):
    chunks = [{"offsets": (row, 0), "sizes": (2, 2)} for row in (0, 2, 4)]
    places = {("x", (row, 0)): ("file", 0, 16) for row in (0, 2, 4)} | {("x", wrong): ("file", 0, 16)}
    entry = {"size": (6, 2), "properties": types.SimpleNamespace(state=("float32",)), "chunks": chunks}
    assert len(_row_tensor(Path("folder"), "x", entry, places).bands) == 3
    chunks[1][field] = wrong
    with pytest.raises(UserError, match=r"x: its shape \(6, 2\) and those of its chunks are not sizes of one number"):
        _row_tensor(Path("folder"), "x", entry, places)


def opened(path: Path) -> contextlib.closing[ReadFile]:
    return contextlib.closing(ReadFile(path, None))


def test_a_part_of_a_file_ends_where_it_ends_whatever_is_asked_for(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    with opened(tmp_path / "file") as file:
        part, into = FilePart(file, 6, 10), bytearray(50)
        assert part.read(1 << 60) == bytes(range(6, 16)) and part.read() == b""  # and takes no memory for more
        assert part.seek(4) == 4 and part.readinto(into) == 6 and into[:7] == bytes([*range(10, 16), 0])


@pytest.mark.parametrize(("dtype", "shape"), [("BF16", (5, 7)), ("F32", (300,)), ("F16", (1, 3, 4)), ("F32", (1,))])
def test_a_stored_tensor_is_what_torch_save_writes(tmp_path, dtype, shape):
    tensor = torch.randn(shape).to(TORCH[dtype])
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    around = envelope(dtype, shape)
    ours, theirs = around.before + raw + around.closed(zlib.crc32(raw)), io.BytesIO()
    torch.save(tensor, theirs)
    assert torch.equal(torch.load(io.BytesIO(ours), weights_only=True), tensor)
    assert zipfile.ZipFile(io.BytesIO(ours)).testzip() is None
    assert len(around.before) % 64 == 0
    for data in (ours, theirs.getvalue()):
        (tmp_path / "file").write_bytes(b"before" + data + b"behind")
        with opened(tmp_path / "file") as file:
            window, finder = FilePart(file, 6, len(data)), ElementFinder()
            for _ in range(2):  # by the zip's directory, then by the prefix
                assert window.read_at(finder.find(window, dtype, shape, "it"), len(raw)) == raw
            with pytest.raises(UserError, match=r"its shape is"):
                finder.find(window, dtype, (*shape, 1), "it")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6).t(),
        torch.randn(8, 6)[::2],
        torch.arange(24).view(6, 4),
        torch.randn(6, 4, dtype=torch.float64),
    ],
)
def test_a_stored_tensor_of_another_form_is_refused(tmp_path, tensor):
    torch.save(tensor, tmp_path / "file")
    with opened(tmp_path / "file") as file, pytest.raises(UserError, match="it: not a stored F32 tensor"):
        ElementFinder().find(FilePart(file, 0, file.size), "F32", tuple(tensor.shape), "it")


def test_any_damage_to_a_stored_tensor_is_an_error_or_harmless(tmp_path):
    torch.save(torch.randn(6, 4), tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    choose = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(choose.randint(1, 4)):
            damaged[choose.randrange(len(data))] = choose.randrange(256)
        (tmp_path / "file").write_bytes(damaged[: choose.choice([len(data), choose.randrange(len(data))])])
        with opened(tmp_path / "file") as file, contextlib.suppress(UserError):
            assert ElementFinder().find(FilePart(file, 0, file.size), "F32", (6, 4), "it") + 96 <= file.size


def test_a_description_that_would_take_the_machine_s_memory_is_refused(tmp_path):
    """Whole, with the checksum of a zip: what a hostile file is."""
    torch.save(torch.randn(6, 4), buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(tmp_path / "file", "w") as bad:
        for record in good.infolist():
            data = good.read(record)
            if record.filename.endswith("data.pkl"):
                data = data[:-1] + b"r" + (1 << 24).to_bytes(4, "little") + b"."
            bad.writestr(record.filename, data)
    with (
        opened(tmp_path / "file") as file,
        pytest.raises(UserError, match=r"it: not a stored F32 .* of its memo;"),
    ):
        ElementFinder().find(FilePart(file, 0, file.size), "F32", (6, 4), "it")


def test_numbers_are_rounded_as_torch_rounds_them():
    numbers = torch.cat(
        [
            torch.randn(5000) * 10.0 ** torch.randint(-20, 20, (5000,)),
            torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]),
        ]
    )
    for found, tensor in (("F32", numbers), ("BF16", numbers.bfloat16()), ("F16", numbers.half())):
        raw = memoryview(tensor.view(torch.uint8).numpy().tobytes())
        for wanted, dtype in TORCH.items():
            with np.errstate(over="ignore"):
                result = torch.frombuffer(bytearray(converted(raw, found, wanted)), dtype=dtype)
            assert torch.equal(result.nan_to_num(7), tensor.to(dtype).nan_to_num(7)), (found, wanted)
