"""Ways to cut a model's layers into pipeline stages, where embedding, head and multi-token prediction weigh something
too.
"""

import itertools
from typing import Any

from hymeg.hf.config import HyConfig

VIRTUAL_STAGES = (1, 2, 3, 4, 5, 6)


def pipeline_splits(config: HyConfig, pp: int) -> list[dict[str, Any]]:
    """Fields of `Layout`: equal stages where layers divide, and a layout string that leaves the last stage fewer layers
    for its head.
    """
    if pp == 1:
        return [{}]
    found = []
    for vpp in VIRTUAL_STAGES:
        if config.num_hidden_layers < pp * vpp:
            break
        if config.num_hidden_layers % (pp * vpp) == 0:
            found.append({"virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None})
        found.append({"pipeline_model_parallel_layout": balanced(config, pp * vpp)})
    return found


def tail_weight(config: HyConfig) -> float:
    """Head and multi-token-prediction layers in MoE layers' worth of products: what the last stage has more than
    others.
    """
    hidden = config.hidden_size
    attention = 2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    experts = (
        3
        * hidden
        * (config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size)
    )
    head = config.vocab_size * hidden
    return (head * (1 + config.num_nextn_predict_layers) + config.num_nextn_predict_layers * 2 * hidden * hidden) / (
        attention + experts
    ) + config.num_nextn_predict_layers


def balanced(config: HyConfig, num_stages: int) -> str:
    """A layout string: the last stage has as many layers fewer as its tail weighs; of the others, the later ones have
    one more where they do not divide, since the earlier ones hold more micro-batches."""
    layers = config.num_hidden_layers
    last = max(0, round((layers + tail_weight(config)) / num_stages - tail_weight(config)))
    each, more = divmod(layers - last, num_stages - 1)
    counts = [each] * (num_stages - 1 - more) + [each + 1] * more
    return layout_string([*counts, last], config.num_nextn_predict_layers)


def layout_string(counts: list[int], num_mtp_layers: int) -> str:
    """Megatron's notation of stages with so many layers: `Et*5|(t*5|)*13t*6|t*4mL`."""
    first, *middle, last = counts
    text = f"E{_layers(first)}|"
    for count, run in itertools.groupby(middle):
        times = len(list(run))
        text += f"{_layers(count)}|" if times == 1 else f"({_layers(count)}|)*{times}"
    return text + _layers(last) + "m" * num_mtp_layers + "L"


def _layers(count: int) -> str:
    return "t" * count if count < 2 else f"t*{count}"
