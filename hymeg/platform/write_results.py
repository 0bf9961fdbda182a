"""What a checkpoint's writer tells of a file. Results pass through a process that knows nothing of Megatron: so this
module doesn't either.
"""

from torch.distributed.checkpoint.storage import WriteResult

from hymeg.checksums import FileSum


class LastOfFile(WriteResult):
    """The last result of a file, with the file's sums."""

    def __init__(self, result: WriteResult, file_sum: FileSum):
        super().__init__(result.index, result.size_in_bytes, result.storage_data)
        object.__setattr__(self, "file_sum", file_sum)

    def __reduce__(self):
        return LastOfFile, (WriteResult(self.index, self.size_in_bytes, self.storage_data), self.file_sum)
