#!/usr/bin/env python3
"""Training that hands its weights to a transformers model in another process, every N steps: as to an inference engine.

    torchrun --nproc-per-node 2 examples/hand_over.py --every 2 --expert-model-parallel-size 2 [flags of pretrain_hy.py]

Rank 0 starts the other process, which begins with random weights and reads no checkpoint. After each hand-over both
compute the logits of the same tokens, and the largest difference is printed. `hymeg.checkpoint.live.export_weights` is
all that a real engine needs; the rest is a socket.
"""

import argparse
import subprocess
import sys
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hymeg import platform

platform.install()

import torch  # noqa: E402

from hymeg.checkpoint.live import export_weights  # noqa: E402
from hymeg.errors import UserError  # noqa: E402
from hymeg.hf.config import HyConfig  # noqa: E402
from hymeg.platform import device, megatron  # noqa: E402

NUM_TOKENS = 32


class HandOver:
    """The trainer's side, on every rank.

    Attributes:
        differences: of the logits, the largest after each hand-over; on rank 0.
        logits: of the trainer, after the last hand-over.
    """

    def __init__(self, every: int):
        self.every, self.differences = every, []
        self.config: HyConfig | None = None
        self.logits = torch.empty(0)
        self.connection: Connection | None = None

    def after_step(self, iteration: int, model_chunks: list, optimizer) -> None:
        if iteration % self.every:
            return
        megatron.gather_weights(model_chunks, optimizer)
        if self.config is None:
            self._start()
        for name, tensor in export_weights(model_chunks, self.config, layout="fused", to_rank=0):
            self.connection.send((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
            self.connection.send_bytes(tensor.flatten().cpu().view(torch.uint8).numpy())
        tokens = torch.arange(NUM_TOKENS)[None] * 7 % self.config.pad_token_id
        self.logits = logits_of(model_chunks, tokens)[..., : self.config.vocab_size].float().cpu()
        if self.connection is not None:
            self.connection.send(tokens.tolist())
            theirs = torch.tensor(self.connection.recv())
            self.differences.append((theirs - self.logits).abs().max().item())
            print(f"hand-over after step {iteration}: logits differ by {self.differences[-1]:.1e} at most", flush=True)

    def _start(self) -> None:
        from megatron.training import get_args

        args = get_args()
        if args.pipeline_model_parallel_size > 1:
            raise UserError("--pipeline-model-parallel-size: this example compares logits of one stage; give 1")
        self.config = HyConfig.from_dir(args.hf_model)
        if torch.distributed.get_rank() == 0:
            with Listener(("localhost", 0), authkey=b"hand-over") as listener:
                address = f"{listener.address[1]}"
                self.process = subprocess.Popen([sys.executable, __file__, "--hold", args.hf_model, "--port", address])
                self.connection = listener.accept()

    def end(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.process.wait()


@torch.no_grad()
def logits_of(model_chunks: list, tokens: torch.Tensor) -> torch.Tensor:
    """Of the model as it is, `[b, s, padded_vocab]`, on every rank."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    (model,) = model_chunks
    model.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model(tokens.to(device.current()), positions.to(device.current()), None)
    model.train()
    return gather_from_tensor_model_parallel_region(logits)


def hold(folder: str, port: int) -> None:
    """The other process: take weights, then tokens, give logits, until the connection ends."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with Client(("localhost", port), authkey=b"hand-over") as connection:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        while True:
            try:
                tokens = take(connection, model, config.num_hidden_layers)
            except EOFError:
                return
            with torch.no_grad():
                connection.send(model(torch.tensor(tokens)).logits.tolist())


@torch.no_grad()
def take(connection: Connection, model: torch.nn.Module, num_layers: int) -> list[list[int]]:
    """Fill the model, every tensor of it; the tokens that come after its weights."""
    places = model.state_dict()
    missing = set(places)
    while isinstance(said := connection.recv(), tuple):
        name, dtype, shape = said
        tensor = torch.frombuffer(bytearray(connection.recv_bytes()), dtype=getattr(torch, dtype)).view(shape)
        if name.startswith(f"model.layers.{num_layers}."):
            continue  # multi-token prediction, which transformers does not have
        places[name].copy_(tensor)
        missing.remove(name)
    if missing:
        raise RuntimeError(f"not handed over: {sorted(missing)}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--every", type=int, default=1, help="steps between hand-overs")
    parser.add_argument("--hold", metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given, flags = parser.parse_known_args()
    if given.hold:
        hold(given.hold, given.port)
        return
    from hymeg.training import run

    hand_over = HandOver(given.every)
    with megatron.after_steps(hand_over.after_step):
        try:
            run.main(flags)
        finally:
            hand_over.end()


if __name__ == "__main__":
    main()
