"""Pre-training data: Megatron's indexed datasets, blends and splits, from its own flags."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters
from megatron.training.utils import get_blend_and_blend_per_split, print_rank_0

from hymeg.checksums import MANIFEST, read_manifest
from hymeg.errors import UserError
from hymeg.hf.tokenizer import end_of_document_id, load_tokenizer


def contents(prefix: Path) -> str:
    """What is in a data set, by its checksums where it has some. The checksum of files of another length is not
    theirs.
    """
    files = [prefix.with_name(f"{prefix.name}.{suffix}") for suffix in ("bin", "idx")]
    manifest = read_manifest(prefix.with_name(f"{prefix.name}.{MANIFEST}")) or {}
    sums = [manifest.get(file.name) for file in files]
    return " and ".join(
        f"{size} bytes" + (f" of CRC-32 {known.crc:08X}" if known and known.size == size else "")
        for size, known in zip((file.stat().st_size for file in files), sums, strict=True)
    )


class _FreshMasks:
    """Megatron caches the loss mask of a process's first sample, and masks that sample's padding tokens in the cache:
    every later sample would be masked in the same places, and the loss depend on which rank read which sample first
    (gpt_dataset.py:266)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.masks_and_position_ids_are_cacheable = False


class TextDataset(_FreshMasks, GPTDataset):
    """Samples of `seq_length` tokens cut from concatenated documents.

    Megatron keeps where they are cut in a cache that knows the data set by its path alone: written anew under that,
    with other documents, it would be cut as the old one was. Here its contents are part of what it is known by.
    """

    def __init__(self, dataset: IndexedDataset, path: str, *args, **kwargs):
        known_by = path if "://" in path else f"{path}, {contents(Path(path))}"
        super().__init__(dataset, known_by, *args, **kwargs)


class RandomDataset(_FreshMasks, MockGPTDataset):
    """Made-up samples (`--mock-data`)."""


class Filled(torch.utils.data.Dataset):
    """All of a data set, filled up to a multiple of the ranks that draw from it with samples without a loss. Else some
    of Megatron's would begin anew before the others end, and count samples twice, others in each evaluation.
    """

    def __init__(self, dataset: GPTDataset | BlendedDataset, num_ranks: int):
        self.dataset, self._num_samples = dataset, -(-len(dataset) // num_ranks) * num_ranks
        self.index_split = Split.valid

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict:
        if index < len(self.dataset):
            return self.dataset[index]
        sample = self.dataset[0]
        return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}


class WithEnd:
    """Megatron's wrapper of a tokenizer, with the token that tools/preprocess_data.py ends documents with as `eod`. The
    wrapper's own is EOS, which `--eod-mask-loss` would look for in vain.
    """

    def __init__(self, tokenizer, directory: str):
        self._tokenizer = tokenizer
        self.eod = end_of_document_id(directory, load_tokenizer(directory))

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_tokenizer"], name)


def build_index(args: argparse.Namespace, tokenizer) -> None:
    """Write the index files of a text run, where they are not there yet: for one rank, before any process group. Later,
    Megatron's wait for rank 0 ends after `--distributed-timeout-minutes`, too few for a first run on terabytes.

    Args:
        args: validated by Megatron, its global variables set.
    """
    # Of a phase of training it is known only with the checkpoint how many samples it has.
    if not (args.mock_data or args.dataloader_fast_cache_load or args.phase_transition_iterations):
        iterations = args.train_iters  # by which Megatron knows a schedule of iterations from one of samples
        update_train_iters(args)
        build_datasets(args, tokenizer, get_train_valid_test_num_samples(), lambda: True)
        args.train_iters = iterations


def build_datasets(
    args: argparse.Namespace, tokenizer, num_samples: tuple[int, int, int], is_reader: Callable[[], bool]
) -> tuple:
    """The training, validation and test datasets; None for a split without samples.

    Args:
        tokenizer: Megatron's wrapper around the tokenizer.
        num_samples: how many samples of each split the run will draw at least.
        is_reader: whether this rank reads samples.

    Raises:
        UserError: several data sets without weights, of which Megatron takes each once, have not as many samples.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=WithEnd(tokenizer, args.hf_model) if args.eod_mask_loss else tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    print_rank_0("> building datasets ...")
    built = BlendedMegatronDatasetBuilder(
        RandomDataset if args.mock_data else TextDataset, num_samples, is_reader, config
    ).build()
    for split, dataset, needed in zip(("training", "validation", "test"), built, num_samples, strict=True):
        is_taken = isinstance(dataset, BlendedDataset) and not (args.skip_train and split == "training")
        if is_taken and needed is not None and len(dataset) < needed:
            weighted = (f"{len(part)} {part.dataset.path_prefix}" for part in dataset.datasets)
            raise UserError(
                f"data sets without weights are taken once each, which gives {len(dataset):,} samples for {split}, and "
                f"the run takes {needed:,}; write a weight before each, as in {' '.join(weighted)}, or ask for less "
                "(--train-iters, --eval-iters)"
            )
    train, valid, test = built
    if args.full_validation:
        valid = [
            None if dataset is None else Filled(dataset, args.data_parallel_size)
            for dataset in (valid if isinstance(valid, list) else [valid])
        ]
    return train, valid, test
