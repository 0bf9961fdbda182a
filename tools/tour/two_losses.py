"""One loss twice: by hymeg, from a distributed checkpoint, and by transformers, from the Hugging Face folder exported
of it; fp32, on CPU.
"""

import argparse
import contextlib
import logging
import os
import sys
import warnings

from hymeg.errors import exit_on_user_error

LARGEST_DIFFERENCE = 1e-5  # rounding; a tensor in the wrong place costs 1e-2 and more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", required=True, metavar="DIR", help="distributed checkpoint, with config.json")
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--data-path",
        required=True,
        metavar="PREFIX",
        help="data made by tools/preprocess_data.py; its first tokens are taken",
    )
    parser.add_argument("--num-sequences", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--seq-length", type=int, default=128, metavar="N", help="(default: 128)")
    args = parser.parse_args()

    os.environ["HYMEG_PLATFORM"] = "cpu"
    # Of Megatron and PyTorch, about a process without a launcher.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with exit_on_user_error():
        from hymeg import platform

        platform.install()
        tokens = first_tokens(args.data_path, args.num_sequences, args.seq_length)
        ours, theirs = loss_here(args.dist, tokens), loss_in_transformers(args.hf, tokens)
    print(
        f"loss of {args.num_sequences} x {args.seq_length} tokens: {ours:.6f} by hymeg, {theirs:.6f} by transformers, "
        f"{abs(ours - theirs):.0e} apart"
    )
    sys.exit(not abs(ours - theirs) <= LARGEST_DIFFERENCE)


def first_tokens(prefix: str, num_sequences: int, seq_length: int):
    """[num_sequences, seq_length + 1]"""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    count, documents = num_sequences * (seq_length + 1), IndexedDataset(prefix)
    tokens = np.concatenate([documents[number] for number in range(len(documents))])[:count]
    return torch.from_numpy(tokens.astype(np.int64)).view(num_sequences, seq_length + 1)


def loss_here(dist: str, tokens) -> float:
    """The mean over all tokens, in a world of this process alone."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.arguments import validate_args

    from hymeg.checkpoint.dist_files import iteration_folder
    from hymeg.models.hy import construct
    from hymeg.training.arguments import parse
    from hymeg.training.preflight import preflight
    from hymeg.training.run import model_config_from_args

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    needed = f"--seq-length {tokens.shape[1] - 1} --mock-data --train-iters 1 --lr 1 --finetune"
    flags, config = parse(["--hf-model", dist, "--load", dist, *needed.split()])
    preflight(flags, config, lambda note: None)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        validate_args(flags)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        model = construct(model_config_from_args(flags), ProcessGroupCollection.use_mpu_process_groups()).eval()
        folder = iteration_folder(dist)[0]
        model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))["model"])
    positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
    with torch.no_grad():
        return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().item()


def loss_in_transformers(hf: str, tokens) -> float:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


if __name__ == "__main__":
    main()
