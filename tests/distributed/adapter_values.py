"""The adapters of a model as all ranks hold them together."""

import math

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.utils import unwrap_model


def adapter_values(chunks: list[torch.nn.Module]) -> dict[str, dict]:
    """key -> {"shape", "values": flat, "apart": by how much copies of a part differ}; empty for a model without."""
    mine = []
    for model in unwrap_model(chunks):
        if model.adapters is not None:
            for shard in model.sharded_state_dict(metadata={}).values():
                data = shard.data.detach().clone()
                mine.append(
                    (shard.key, shard.global_shape, shard.global_offset, is_main_replica(shard.replica_id), data)
                )
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    found, apart = {}, {}
    shards = [shard for of_rank in gathered for shard in of_rank]
    for key, shape, offset, is_main, data in sorted(shards, key=lambda shard: not shard[3]):
        whole = found.setdefault(key, torch.full(shape, math.nan))
        place = tuple(slice(start, start + size) for start, size in zip(offset, data.shape, strict=True))
        if is_main:
            assert whole[place].isnan().all(), f"{key}: two ranks say that {offset} is theirs"
            whole[place] = data
        else:
            apart[key] = max(apart.get(key, 0.0), (whole[place] - data).abs().max().item())
    assert not any(whole.isnan().any() for whole in found.values())
    return {
        key: {"shape": list(whole.shape), "values": whole.flatten().tolist(), "apart": apart.get(key, 0.0)}
        for key, whole in found.items()
    }
