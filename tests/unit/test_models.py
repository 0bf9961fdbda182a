"""What our models add to Megatron's: the head, the router, frozen parts, packed input, and the size of the published
ones.
"""

import dataclasses
import itertools

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from published_models import PUBLISHED
from single_process import build, ensure_world, positions

from hymeg import platform
from hymeg.checkpoint.mapping import num_parameters
from hymeg.checkpoint.tiny_checkpoint import TINY_CONFIG, write_tiny_checkpoint
from hymeg.hf.config import HyConfig
from hymeg.models.flags import architecture_flags
from hymeg.models.hy import HyModelConfig, HyTransformerConfig, construct
from hymeg.models.router import Router


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(folder / "trunk", dtype="fp32")
    write_tiny_checkpoint(folder / "mtp", dtype="fp32", num_mtp_layers=2)
    odd = HyConfig.from_dict(TINY_CONFIG | {"vocab_size": 1000})
    write_tiny_checkpoint(folder / "odd", odd, dtype="fp32")
    write_tiny_checkpoint(
        folder / "bf16-head", HyConfig.from_dict(TINY_CONFIG | {"enable_lm_head_fp32": False}), dtype="fp32"
    )
    return folder


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 900, (2, 64), generator=torch.Generator().manual_seed(0))


def routers(model) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def test_packed_sample_equals_its_sequences(folder):
    model = build(folder / "trunk").eval()
    lengths = [5, 1, 17, 9]
    tokens = torch.randint(0, 900, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    boundaries = torch.tensor([0, 5, 6, 23, 32], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=17, max_seqlen_kv=17
    )
    restarting = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        found = model(tokens, restarting, None, packed_seq_params=packed)
        for start, end in itertools.pairwise(boundaries):
            alone = tokens[:, start:end]
            assert (found[:, start:end] - model(alone, positions(alone), None)).abs().max() <= 1e-5


@pytest.mark.skipif(not platform.is_cpu(), reason="on CUDA nothing watches")
def test_the_layers_of_the_local_spec_go_unwatched(folder, tokens):
    model, seen = build(folder / "mtp"), {}

    def note(name: str) -> None:
        seen.setdefault(name, torch._C._is_torch_function_all_disabled())

    for name in ("embedding", "decoder", "mtp", "output_layer"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: note(name))
    model(tokens, positions(tokens), None, labels=tokens)
    # Of the embedding its first call: multi-token prediction calls it again.
    assert seen == {"embedding": False, "decoder": True, "mtp": True, "output_layer": True}
    assert not torch._C._is_torch_function_all_disabled()


class TestHead:
    def test_logits_are_fp32_from_bf16_weights(self, folder, tokens):
        wrapped = build(folder / "trunk", "--bf16").eval()
        model, states = unwrap_model(wrapped), []
        model.output_layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        with torch.no_grad():
            found = model(tokens, positions(tokens), None).transpose(0, 1)
            hidden, weight = states[0], model.output_layer.weight
            assert hidden.dtype == weight.dtype == torch.bfloat16
            expected = hidden.double() @ weight.double().T
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 1e-5 < (expected.bfloat16() - expected).abs().max()

    def test_without_the_setting_they_are_bf16(self, folder, tokens):
        model = unwrap_model(build(folder / "bf16-head", "--bf16").eval())
        assert model(tokens, positions(tokens), None).dtype == torch.bfloat16

    def test_gradients_of_fp32_logits(self, folder, tokens):
        """Against autograd through the same product in fp32, to the 8 bits of bf16."""
        model = unwrap_model(build(folder / "trunk", "--bf16"))
        head = model.output_layer
        hidden = torch.randn(7, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        target = torch.randn(7, 2, 1024)
        logits, _ = head(hidden)
        (logits * target).sum().backward()
        exact_hidden = hidden.detach().float().requires_grad_()
        exact_weight = head.weight.detach().float().requires_grad_()
        ((exact_hidden @ exact_weight.T) * target).sum().backward()
        for found, exact in ((hidden.grad, exact_hidden.grad), (head.weight.grad, exact_weight.grad)):
            assert found.dtype == torch.bfloat16
            assert (found - exact).norm() / exact.norm() < 2**-8

    def test_rows_that_pad_the_vocabulary_have_no_probability(self, folder, tokens):
        padded = build(folder / "odd").eval()
        plain = build(folder / "odd", "--make-vocab-size-divisible-by", "1").eval()
        with torch.no_grad():
            logits = padded(tokens, positions(tokens), None)
            assert logits.shape[-1] == 1024 and torch.softmax(logits, -1)[..., 1000:].max() == 0
            assert torch.equal(logits[..., :1000], plain(tokens, positions(tokens), None))
            losses = [model(tokens, positions(tokens), None, labels=tokens) for model in (padded, plain)]
        assert torch.allclose(*losses, rtol=1e-6)


class TestRouter:
    def test_bias_and_counts_stay_fp32_in_bf16(self, folder, tokens):
        reference = build(folder / "trunk")
        model = build(folder / "trunk", "--bf16")
        model(tokens, positions(tokens), None)
        for router, exact in zip(routers(model), routers(reference), strict=True):
            assert router.weight.dtype == torch.bfloat16
            assert router.expert_bias.dtype == router.local_tokens_per_expert.dtype == torch.float32
            assert torch.equal(router.expert_bias, exact.expert_bias) and exact.expert_bias.abs().min() > 0

    def test_counts_above_256_are_exact(self, folder):
        model = build(folder / "trunk", "--bf16")
        router = routers(model)[0]
        router._maintain_float32_expert_bias()
        for _ in range(9):
            router._apply_expert_bias(torch.ones(100, 8, dtype=torch.bool))
        assert router.local_tokens_per_expert.tolist() == [900] * 8
        assert router.expert_load.tolist() == [900] * 8

    def test_expert_load_counts_training_tokens_once(self, folder, tokens):
        model = build(folder / "trunk")
        with torch.no_grad():
            model(tokens, positions(tokens), None)
        assert all(router.expert_load.sum() == 0 for router in routers(model))
        model(tokens, positions(tokens), None)
        assert [router.expert_load.sum().item() for router in routers(model)] == [tokens.numel() * 2] * 3

    def test_bias_is_frozen_unless_a_rate_is_given(self, folder):
        assert all(router.frozen_expert_bias for router in routers(build(folder / "trunk")))
        assert not any(
            router.frozen_expert_bias
            for router in routers(build(folder / "trunk", "--moe-router-bias-update-rate", "1e-3"))
        )


def test_jitter_is_for_training(folder, tokens):
    """Megatron's is not: losses of an evaluation, and texts, would be drawn anew each time."""
    model, plain = (build(folder / "trunk", *flags) for flags in (["--moe-input-jitter-eps", "0.1"], []))
    expected = plain(tokens, positions(tokens), None)
    assert not torch.equal(model.train()(tokens, positions(tokens), None), expected)
    assert torch.equal(model.eval()(tokens, positions(tokens), None), expected)


def test_frozen_multi_token_prediction(folder):
    model = build(folder / "mtp", "--mtp-loss-scaling-factor", "0")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("mtp.")} and frozen
    assert all(parameter.requires_grad for parameter in build(folder / "mtp").parameters())


def test_experts_are_reduced_over_their_own_group(folder):
    model = build(folder / "mtp")
    own = {name for name, parameter in model.named_parameters() if not getattr(parameter, "allreduce", True)}
    assert own == {name for name, _ in model.named_parameters() if ".local_experts." in name} and own


@pytest.mark.parametrize(
    ("name", "num_mtp_layers", "expected", "without_mtp"),
    [("Hy-MT2-30B-A3B", 0, 30_064_719_872, 30_064_719_872), ("Hy3", 1, 298_786_140_416, 295_033_528_320)],
)
def test_published_models_have_their_size(monkeypatch, name, num_mtp_layers, expected, without_mtp):
    """The whole model is built, on the meta device. Hy3's published 298,786,155,776 counts the 15,360 expert biases,
    which are buffers.
    """
    config = HyConfig.from_dict(TINY_CONFIG | PUBLISHED[name] | {"num_nextn_predict_layers": num_mtp_layers})
    ensure_world()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    flags = architecture_flags(config)
    fields = {key: value for key, value in flags.items() if key in HyTransformerConfig.__dataclass_fields__}
    transformer = HyTransformerConfig(
        **fields,
        num_moe_experts=config.num_experts,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        transformer_impl="local",
        perform_initialization=False,
    )
    model_config = HyModelConfig(
        transformer=transformer, vocab_size=config.vocab_size, should_pad_vocab=True, seq_length=4096
    )
    with torch.device("meta"):
        model = construct(model_config, ProcessGroupCollection.use_mpu_process_groups())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == expected
    assert sum(size for name, size in sizes.items() if not name.startswith("mtp.")) == without_mtp
    assert num_parameters(dataclasses.replace(config, num_nextn_predict_layers=0)) == without_mtp
    biases = sum(router.expert_bias.numel() for router in routers(model))
    assert (
        num_parameters(config) == expected
        and biases == (config.num_hidden_layers - 1 + num_mtp_layers) * config.num_experts
    )
    if num_mtp_layers:
        assert expected + biases == 298_786_155_776
