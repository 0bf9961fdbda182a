"""Host memory that a save and a load of the distributed optimizer's state take, counted on each rank of two."""

import contextlib
import io
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hymeg import platform

platform.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.arguments import validate_args  # noqa: E402
from megatron.training.checkpointing import _build_sharded_state_dict_metadata  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from hymeg.checkpoint.tiny_checkpoint import write_tiny_checkpoint  # noqa: E402
from hymeg.models.hy import construct  # noqa: E402
from hymeg.training.arguments import parse  # noqa: E402
from hymeg.training.run import model_config_from_args  # noqa: E402

NEEDED = "--train-iters 10 --lr 1e-4 --seq-length 32 --mock-data --bf16 --use-distributed-optimizer"


class Allocated(TorchDispatchMode):
    """The most bytes of storage that were alive at once, of those made while it is open."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        before = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in before | self.seen:
                storage = result.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return results

    def _freed(self, address: int, num_bytes: int) -> None:
        self.seen.discard(address)
        self.now -= num_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("save_memory") / "model"
    write_tiny_checkpoint(folder)
    return str(folder)


def state_dict_of(optimizer, args, chunk, is_loading: bool, **metadata) -> dict:
    """What Megatron saves of the optimizer, or loads into it."""
    metadata = _build_sharded_state_dict_metadata(args) | metadata
    return optimizer.sharded_state_dict(chunk.sharded_state_dict(), is_loading=is_loading, metadata=metadata)


@contextlib.contextmanager
def optimizer_of(rank: int, model: str, *flags: str):
    """A tiny model's distributed optimizer as `rank` of two sees it, with its args and its model's state."""
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", str(rank))
        args, _ = parse(["--hf-model", model, *NEEDED.split(), *flags])
        destroy_num_microbatches_calculator()
        validate_args(args)
        torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
            tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            config = model_config_from_args(args)
            chunk = construct(config, groups).bfloat16()
            chunks = training.wrap_model_chunks_with_ddp(
                [chunk], chunk.config, training.get_megatron_ddp_config(args), bucket_sizes=[None],
                disable_bucketing_per_chunk=[False],
            )  # fmt: skip
            settings, overrides = training.get_megatron_optimizer_config(args)
            optimizer = get_megatron_optimizer(settings, chunks, overrides, use_gloo_process_groups=False)
            for one in optimizer.chained_optimizers:
                one.data_parallel_group_gloo = one.data_parallel_group
            yield optimizer, args, chunks[0]
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def buffers_of(chunk) -> list[int]:
    """Elements of DDP's buffers, with their padding."""
    return [buffer.grad_data.numel() for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_first_of_the_ranks_that_share_parameters_gathers_their_state(model, is_first):
    """In fp32: 12 bytes of every parameter (weight and two moments) until they are written. The others hold their part
    of one buffer at a time.
    """
    with optimizer_of(0 if is_first else 1, model) as (optimizer, args, chunk):
        load_then = state_dict_of(optimizer, args, chunk, is_loading=True)
        with Allocated() as allocated:
            saved = state_dict_of(optimizer, args, chunk, is_loading=False)
        numel, largest = sum(weight.numel() for weight in chunk.parameters()), max(buffers_of(chunk))
        assert load_then and saved
    if is_first:
        assert 12 * numel <= allocated.now < 12.1 * numel
        assert allocated.most <= 12 * numel + 20 * largest
    else:
        assert allocated.now < 1000
        assert 12 * largest / 2 <= allocated.most < 12 * largest / 2 + 1000


def test_megatrons_own_way_gathers_on_every_rank_in_gpu_memory(model):
    """What the default is chosen against."""
    flag = "--no-distrib-optim-fully-reshardable-mem-efficient"
    with optimizer_of(1, model, flag) as (optimizer, args, chunk):
        state_dict_of(optimizer, args, chunk, is_loading=True)
        with Allocated() as allocated:
            saved = state_dict_of(optimizer, args, chunk, is_loading=False)
        assert saved and allocated.now >= 12 * sum(weight.numel() for weight in chunk.parameters())


def test_a_load_takes_12_bytes_a_parameter_on_every_rank(model):
    for rank in (0, 1):
        with optimizer_of(rank, model) as (optimizer, args, chunk):
            with Allocated() as allocated:
                wanted = state_dict_of(optimizer, args, chunk, is_loading=True)
            numel = sum(weight.numel() for weight in chunk.parameters())
            # Beside the buffers the optimizer makes its own state, of half of the parameters.
            own = sum(
                value.numel() * value.element_size()
                for one in optimizer.chained_optimizers
                for values in one.optimizer.state.values()
                for value in values.values()
            )
            assert wanted and 12 * numel <= allocated.most - own < 12.1 * numel


def test_megatrons_sharded_format_takes_a_ranks_own_part(model):
    """dp_reshardable: what docs/training.md advises where host memory is short."""
    with optimizer_of(0, model) as (optimizer, args, chunk):
        state_dict_of(optimizer, args, chunk, is_loading=True)
        with Allocated() as allocated:
            saved = state_dict_of(
                optimizer, args, chunk, is_loading=False, distrib_optim_sharding_type="dp_reshardable"
            )
        numel = sum(weight.numel() for weight in chunk.parameters())
    assert saved and allocated.most < 0.1 * 12 * numel
