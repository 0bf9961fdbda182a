"""What gloo lacks of NCCL, for Megatron's calls: one backend name, split sizes as lists, unequal shapes, a barrier
without devices.
"""

import torch
import torch.distributed as dist

from hymeg.platform.patches import patch


def install() -> None:
    _install_groups()
    _install_all_to_all()
    _install_unequal_shapes()


def _install_groups() -> None:
    init_process_group, new_group, barrier = dist.init_process_group, dist.new_group, dist.barrier

    def init(backend=None, device_id=None, **kwargs):
        return init_process_group(backend=backend if backend == "fake" else "gloo", **kwargs)

    def new(
        ranks=None,
        timeout=None,
        backend=None,
        pg_options=None,
        use_local_synchronization=False,
        group_desc=None,
        device_id=None,
    ):
        backend = "fake" if dist.get_backend() == "fake" else "gloo"
        return new_group(ranks, timeout, backend, None, use_local_synchronization, group_desc)

    patch(dist, "init_process_group", init, "training/initialize.py:352 asks for NCCL and a device")
    patch(dist, "new_group", new, "parallel_state.py:259 gives NCCL options")
    patch(
        dist,
        "barrier",
        lambda group=None, async_op=False, device_ids=None: barrier(group, async_op),
        "parallel_state.py:1033 names devices",
    )


def _install_all_to_all() -> None:
    all_to_all_single = dist.all_to_all_single

    def as_list(sizes):
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    def with_lists(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        return all_to_all_single(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), group, async_op
        )

    patch(
        dist,
        "all_to_all_single",
        with_lists,
        "tensor_parallel/mappings.py:460 gives split sizes as arrays; gloo wants lists",
    )


def _install_unequal_shapes() -> None:
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def rows(tensor) -> int:
        return tensor.shape[0] if tensor.dim() else 1

    def gather(tensor_list, tensor, group=None, async_op=False):
        longest = max(map(rows, tensor_list))
        if all(rows(t) == longest for t in tensor_list):
            return all_gather(tensor_list, tensor, group, async_op)
        if async_op:
            raise NotImplementedError("an asynchronous all_gather of unequal shapes over gloo")
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: rows(tensor)] = tensor.detach()
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(gathered, padded, group)
        for target, source in zip(tensor_list, gathered, strict=True):
            target.copy_(source[: rows(target)])

    def scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
        sizes = list(map(rows, input_list))
        if len(set(sizes)) == 1:
            return reduce_scatter(output, input_list, op, group, async_op)
        if async_op:
            raise NotImplementedError("an asynchronous reduce_scatter of unequal shapes over gloo")
        reduced = torch.cat([t.detach() for t in input_list])
        dist.all_reduce(reduced, op, group)
        output.copy_(reduced.split(sizes)[dist.get_rank(group)])

    patch(dist, "all_gather", gather, "tensor_parallel/mappings.py:154 gathers shards of unequal length")
    patch(dist, "reduce_scatter", scatter, "tensor_parallel/mappings.py:197 scatters shards of unequal length")
