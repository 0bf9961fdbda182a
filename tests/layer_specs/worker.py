"""Builds our model under one layer spec, job by job, and writes down what it is: python worker.py
local|transformer_engine JOBS.json.

A job is `{"argv": [...], "out": FILE}`: the trainer's command line, run in a world of one process, and the file for
torch.save. With `"rank"` and `"world_size"` it is one rank of a larger world that does not exist, of which the model is
constructed and no more; `"gpu"` then holds settings that the command line does not let through. A job with `"what":
"construct"` says what came of it, an error included.

For Transformer Engine's spec its sources must be on PYTHONPATH, and flags have the defaults of a machine with CUDA, but
for the backend. Nothing can run there, so that such a job must have no iteration left to train.
"""

import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what all rooms of the tests use

IMPL = sys.argv[1]
if IMPL == "transformer_engine":
    import stand_in

    stand_in.install()

from hymeg import platform  # noqa: E402

platform.install()

import flag_help  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factories  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from megatron.training import training  # noqa: E402
from megatron.training.arguments import validate_args  # noqa: E402
from model_weights import gather_from  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from hymeg.models import hy  # noqa: E402
from hymeg.platform import for_gpus  # noqa: E402
from hymeg.platform.patches import patched  # noqa: E402
from hymeg.training.arguments import parse  # noqa: E402
from hymeg.training.preflight import preflight  # noqa: E402
from hymeg.training.run import model_config_from_args, train  # noqa: E402

LOST = "mtp.layers.0.enorm.weight"


def parsed(argv: list[str], gpu: dict | None = None):
    with for_gpus() if IMPL == "transformer_engine" else contextlib.nullcontext():
        args, config = parse(argv)
        preflight(args, config, lambda note: None)
    assert args.transformer_impl == IMPL
    vars(args).update({"distributed_backend": "gloo", **(gpu or {})})
    return args, config


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """Transformer Engine's modules refuse to be constructed where CUDA is not available
    (transformer_engine/pytorch/module/base.py:895).
    """
    construct = hy.construct

    def pretending(*args, **kwargs):
        with patched(torch.cuda, "is_available", lambda: True, "module/base.py:895"):
            return construct(*args, **kwargs)

    with patched(hy, "construct", pretending if IMPL == "transformer_engine" else construct, "module/base.py:895"):
        yield


def run(argv: list[str]) -> dict:
    """Let the trainer set up, load, train what iterations are left, save; describe the model and the optimizer that it
    ends with.
    """
    args, config = parsed(argv)
    made = []
    set_up = training.setup_model_and_optimizer

    def watched(*set_up_args, **set_up_kwargs):
        made.extend(set_up(*set_up_args, **set_up_kwargs))
        return made

    with (
        patched(training, "setup_model_and_optimizer", watched, "the test looks at what the trainer made"),
        pretended_cuda(),
    ):
        train(args, config)
    models, optimizer, _ = made
    return {
        **described(unwrap_model(models)[0]),
        "hf": gather_from(config, models),
        "optimizer": optimizer_states(models, optimizer),
    }


def described(model: GPTModel) -> dict:
    """Its tensors by name, what it stores and what unchanged Megatron would, and what the rest of hymeg counts on."""
    tensors = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    parameters = dict(model.named_parameters())
    return {
        "tensors": tensors,
        "stored": stored(model.sharded_state_dict(metadata={})),
        "megatron_stores": stored(GPTModel.sharded_state_dict(model, metadata={})),
        "trainable": {name for name, parameter in parameters.items() if parameter.requires_grad},
        "not_allreduced": {name for name, parameter in parameters.items() if not getattr(parameter, "allreduce", True)},
        "modules": {
            name: f"{type(module).__module__}.{type(module).__qualname__}" for name, module in model.named_modules()
        },
        "missed": model.load_state_dict(
            {name: tensors[name] for name in tensors if name != LOST}, strict=False
        ).missing_keys,
        "head": head_products(model.output_layer),
    }


def head_products(head: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The one product that can run under Transformer Engine's spec: hymeg's own."""
    hidden = torch.randn(3, 2, head.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(head.weight)
    with torch.no_grad():
        return {"hidden": hidden, "weight": head.weight.detach().clone(), "logits": head(hidden)[0]}


def stored(state_dict) -> list[dict]:
    """The shards, of tensors and of objects (those without a dtype), that this process would write."""
    apply_factories(state_dict)
    shards, remaining = [], [state_dict]
    while remaining:
        value = remaining.pop()
        if isinstance(value, ShardedBase):
            shard = {name: getattr(value, name) for name in ("key", "global_shape", "global_offset", "replica_id")}
            shard |= {name: getattr(value, name, None) for name in ("dtype", "local_shape")}
            shards.append(shard | {"size": None if value.data is None else value.data.numel()})
        else:
            remaining.extend(value.values() if isinstance(value, dict) else value)
    return sorted(shards, key=lambda shard: (shard["key"], shard["global_offset"]))


def optimizer_states(models, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The fp32 parameter and the moments of every parameter, by its name."""
    names = {parameter: name for name, parameter in unwrap_model(models)[0].named_parameters()}
    states = {}
    for part in optimizer.chained_optimizers if optimizer is not None else ():
        for parameter in part.model_param_group_index_map:
            tensors = part._get_main_param_and_optimizer_states(parameter)
            states[names[parameter]] = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    return states


def constructed(argv: list[str], rank: int, world_size: int, gpu: dict | None = None) -> list[GPTModel]:
    """The chunks of the model that one rank of a layout holds."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": "1"}
    args, _ = parsed(argv, gpu)
    validate_args(args)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual = args.virtual_pipeline_model_parallel_size
    with pretended_cuda():
        config = model_config_from_args(args)
        return [hy.construct(config, groups, vp_stage=stage) for stage in (range(virtual) if virtual else [None])]


def one_rank(argv: list[str], rank: int, world_size: int, gpu: dict | None = None) -> list[dict]:
    """What one rank of a layout stores."""
    (model,) = constructed(argv, rank, world_size, gpu)
    return stored(model.sharded_state_dict(metadata={}))


def construct(argv: list[str], rank: int, world_size: int) -> dict:
    """Whether a rank's part of the model can be constructed, and which of its classes add weight gradients into the
    fp32 buffers inside their products.
    """
    try:
        modules = [module for chunk in constructed(argv, rank, world_size) for module in chunk.modules()]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    fuses = {m: getattr(m, "fuse_wgrad_accumulation", None) for m in modules}
    return {
        "classes": {type(module).__name__ for module in modules},
        "fusing": {type(module).__name__ for module, fused in fuses.items() if fused},
        "not fusing": {type(module).__name__ for module, fused in fuses.items() if fused is False},
    }


def main(jobs_path: str) -> None:
    with open(jobs_path) as file:
        jobs = json.load(file)
    for job in jobs:
        out, what = job.pop("out"), job.pop("what", "one_rank" if "rank" in job else "run")
        print("===", what, job, flush=True)
        torch.save({"run": run, "one_rank": one_rank, "construct": construct}[what](**job), out)
        training.destroy_global_state()
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()


if __name__ == "__main__":
    torch.set_num_threads(1)
    flag_help.read_once()
    gc.freeze()
    main(sys.argv[2])
