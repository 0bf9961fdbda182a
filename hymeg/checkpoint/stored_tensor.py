"""One stored tensor of a distributed checkpoint, as bytes, without torch: what goes around its elements when writing,
where they lie when reading.

Each tensor in a torch_dist checkpoint is a file in the format of `torch.save`: a zip whose records are stored, not
compressed. `data.pkl` is a pickle that describes the tensor (dtype, shape, strides) and names its storage; `byteorder`
and `version` say how to read the rest; `data/0` holds the elements, row-major, its first byte at a multiple of 64. A
zip ends with a directory of its records. All but the CRC of the elements follows from dtype and shape: so a tensor is
written as prefix, elements, suffix, and read back by looking at the prefix alone. The CRC stands twice, both times
behind the elements, so that they can be written as they are read. Sources: PKWARE's APPNOTE.TXT 6.3.9 for the zip;
torch/serialization.py for the records and for what data.pkl may name.
"""

import functools
import math
import pickle
import struct
import zipfile
import zlib
from typing import Any, NamedTuple

from hymeg.checkpoint.mapping import Shape
from hymeg.checkpoint.pickles import called, plain, unpickled
from hymeg.checksums import Damaged, FilePart
from hymeg.errors import UserError
from hymeg.files import shown
from hymeg.hf.dtypes import ITEM_SIZES, WEIGHTS

MAX_STORED_BYTES = 2**32 - 2**20  # beyond, a zip needs the 64-bit form of its headers
_ALIGNMENT = 64
_MAX_RECORDS, _MAX_PICKLE_BYTES, _MAX_PREFIX_BYTES = 64, 65536, 2**20


class Envelope(NamedTuple):
    """The bytes before and after the elements; `crc_at`: where in `after` their CRC stands."""

    before: bytes
    after: bytes
    crc_at: tuple[int, int]

    def closed(self, crc: int) -> bytes:
        """`after` for elements of this CRC-32."""
        closed = bytearray(self.after)
        for position in self.crc_at:
            struct.pack_into("<I", closed, position, crc)
        return bytes(closed)


@functools.cache
def envelope(dtype: str, shape: Shape) -> Envelope:
    """What surrounds the elements of a contiguous tensor. The tensor takes at most MAX_STORED_BYTES."""
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    assert nbytes <= MAX_STORED_BYTES, "cut the tensor into smaller chunks"
    out = _Zip()
    out.record("data.pkl", _pickled(dtype, shape))
    out.record("byteorder", b"little")
    out.record_to_come("data/0", nbytes)
    num_before = len(out.body)
    out.body += struct.pack("<4s3I", b"PK\7\10", 0, nbytes, nbytes)
    out.skipped = nbytes
    out.record("version", b"3\n")
    crc_in_directory = len(out.body) + out.crc_in_directory
    out.end()
    return Envelope(bytes(out.body[:num_before]), bytes(out.body[num_before:]), (4, crc_in_directory - num_before))


def stored_object(value: Any) -> bytes:
    """What torch.save writes for a value without tensors."""
    out = _Zip()
    for name, data in (("data.pkl", pickle.dumps(value, 2)), ("byteorder", b"little"), ("version", b"3\n")):
        out.record(name, data)
    out.end()
    return bytes(out.body)


class _Zip:
    """The zip around `skipped` bytes that are not in `body`."""

    def __init__(self) -> None:
        self.body, self.directory = bytearray(), bytearray()
        self.num_records = self.skipped = self.crc_in_directory = 0

    def record(self, name: str, data: bytes) -> None:
        self._header(name, 0, zlib.crc32(data), len(data), 0)
        self.body += data

    def record_to_come(self, name: str, nbytes: int) -> None:
        """A record of `nbytes` whose CRC follows it; its data begin at a multiple of 64."""
        self.crc_in_directory = len(self.directory) + 16
        self._header(name, 1 << 3, 0, nbytes, _ALIGNMENT)

    def _header(self, name: str, flags: int, crc: int, nbytes: int, alignment: int) -> None:
        path, start, first_of_1980 = f"archive/{name}".encode(), len(self.body) + self.skipped, 1 << 5 | 1
        extra = (
            struct.pack("<2sH", b"FB", fill := -(start + 34 + len(path)) % alignment) + bytes(fill)
            if alignment
            else b""
        )
        common = struct.pack("<5H3IH", 20, flags, 0, 0, first_of_1980, crc, nbytes, nbytes, len(path))
        self.body += b"PK\3\4" + common + struct.pack("<H", len(extra)) + path + extra
        self.directory += b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<4H2I", 0, 0, 0, 0, 0, start) + path
        self.num_records += 1

    def end(self) -> None:
        start = len(self.body) + self.skipped
        self.body += self.directory
        self.body += struct.pack(
            "<4s4H2IH", b"PK\5\6", 0, 0, self.num_records, self.num_records, len(self.directory), start, 0
        )


def _pickled(dtype: str, shape: Shape) -> bytes:
    """data.pkl: a call of torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
    torch_class = b"ctorch\n" + WEIGHTS[dtype].storage.encode() + b"\n"
    storage = [b"(", plain("storage"), torch_class, plain("0"), plain("cpu"), plain(math.prod(shape)), b"tQ"]
    arguments = plain(0), plain(shape), plain(_strides(shape)), plain(False), b"ccollections\nOrderedDict\n)R"
    return b"\x80\x02" + called("torch._utils._rebuild_tensor_v2", *storage, *arguments) + b"."


def _strides(shape: Shape) -> Shape:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class ElementFinder:
    """Where in a stored tensor its elements begin.

    The zip's directory is read once for each dtype, shape and length; after that the same prefix means the same place.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, Shape, int], bytes] = {}

    def find(self, file: FilePart, dtype: str, shape: Shape, what: str) -> int:
        """The offset in the window, for a tensor that must have this dtype and shape, contiguous.

        Args:
            file: a window of exactly the stored tensor.
            what: its name and place, for messages.

        Raises:
            UserError: this is not a stored tensor of that dtype and shape.
        """
        known = self._known.get((dtype, shape, file.length))
        if known is not None and file.read_at(0, len(known)) == known:
            return len(known)
        try:
            begin = _begin_of_elements(file, dtype, shape)
        except Damaged:
            raise
        except Exception as error:  # whatever reading a broken zip or pickle raises; nothing of the file's own is run
            raise UserError(
                f"{what}: not a stored {dtype} tensor of shape {list(shape)}: {error or type(error).__name__}; copy "
                "the checkpoint again"
            ) from None
        self._known[dtype, shape, file.length] = file.read_at(0, begin)
        return begin


def _begin_of_elements(file: FilePart, dtype: str, shape: Shape) -> int:
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if len(records) > _MAX_RECORDS:
            raise ValueError(f"{len(records)} records")
        by_name = {record.filename.partition("/")[2]: record for record in records}
        for name in ("data.pkl", "data/0"):
            if name not in by_name:
                raise ValueError(f"it has no record {name}")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("it is compressed")
        if by_name["data.pkl"].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("data.pkl is too long")
        if "byteorder" in by_name and archive.read(by_name["byteorder"]) != b"little":
            raise ValueError("not in little-endian byte order")
        _check_description(archive.read(by_name["data.pkl"]), dtype, shape)
        elements = by_name["data/0"]
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    begin = begin_of_record(file, elements)
    if elements.file_size != nbytes or not 0 <= begin <= _MAX_PREFIX_BYTES or begin + nbytes > file.length:
        raise ValueError(f"{elements.file_size} bytes of elements at {begin} in {file.length} bytes")
    return begin


def begin_of_record(file: FilePart, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a zip's record begin, behind its header. Raises struct.error where there is none."""
    name_length, extra_length = struct.unpack("<2H", file.read_at(record.header_offset + 26, 4))
    return record.header_offset + 30 + name_length + extra_length


class _Description(pickle.Unpickler):
    """Reads data.pkl without running anything: the names that it may use stand for plain values."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in (names.storage for names in WEIGHTS.values()):
            return name
        raise ValueError(f"data.pkl names {shown(f'{module}.{name}')}, which has no place in a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _check_description(data: bytes, dtype: str, shape: Shape) -> None:
    storage, offset, size, strides, *_ = unpickled(data, _Description)
    if storage[1] != WEIGHTS[dtype].storage:
        raise ValueError(f"it holds a {shown(storage[1])}")
    if tuple(size) != shape:
        raise ValueError(f"its shape is {shown(size)}")
    if offset != 0 or any(length > 1 and a != b for length, a, b in zip(shape, strides, _strides(shape), strict=True)):
        raise ValueError(f"its elements are not in order (offset {shown(offset)}, strides {shown(strides)})")
