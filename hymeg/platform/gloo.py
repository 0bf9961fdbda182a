"""What gloo lacks of NCCL, for Megatron's calls. Importing this module replaces the names."""

import torch
import torch.distributed as dist

from hymeg.platform.patches import replaces


def _without(argument: str):
    def call(original, *args, **kwargs):
        kwargs.pop(argument, None)
        return original(*args, **kwargs)

    return call


replaces(dist, "init_process_group", "training/initialize.py:352 names a device")(_without("device_id"))
replaces(dist, "new_group", "parallel_state.py:426 wants gloo, in a fake world too")(_without("backend"))
replaces(dist, "barrier", "parallel_state.py:1033 names devices")(_without("device_ids"))


@replaces(dist, "all_to_all_single", "tensor_parallel/mappings.py:460 gives split sizes as arrays; gloo wants lists")
def _all_to_all_single(original, output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
    sizes = output_split_sizes, input_split_sizes
    return original(output, input, *(s.tolist() if hasattr(s, "tolist") else s for s in sizes), **kwargs)


def _rows(tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


@replaces(dist, "all_gather", "tensor_parallel/mappings.py:154 gathers shards of unequal length")
def _all_gather(all_gather, tensor_list, tensor, group=None, async_op=False):
    longest = max(map(_rows, tensor_list))
    if all(_rows(t) == longest for t in tensor_list):
        return all_gather(tensor_list, tensor, group, async_op)
    if async_op:
        raise NotImplementedError("an asynchronous all_gather of unequal shapes over gloo")
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: _rows(tensor)] = tensor.detach()
    gathered = [torch.empty_like(padded) for _ in tensor_list]
    all_gather(gathered, padded, group)
    for target, source in zip(tensor_list, gathered, strict=True):
        target.copy_(source[: _rows(target)])


@replaces(dist, "reduce_scatter", "tensor_parallel/mappings.py:197 scatters shards of unequal length")
def _reduce_scatter(reduce_scatter, output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
    sizes = list(map(_rows, input_list))
    if len(set(sizes)) == 1:
        return reduce_scatter(output, input_list, op, group, async_op)
    if async_op:
        raise NotImplementedError("an asynchronous reduce_scatter of unequal shapes over gloo")
    reduced = torch.cat([t.detach() for t in input_list])
    dist.all_reduce(reduced, op, group)
    output.copy_(reduced.split(sizes)[dist.get_rank(group)])
