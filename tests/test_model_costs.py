"""Counted costs against known sizes, a real pass's FLOPs, and memory that a real pass takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archer_fast.backbone import Backbone, build_causal_lm
from archer_fast.config import LoRAConfig
from archer_fast.model_costs import GameShape, LiveMemory, count
from archer_fast.public_models import PUBLIC_MODELS, public_config

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4},
    "qwen2": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4},
    "qwen3": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4},
    "mistral": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}
for name, sizes in SMALL.items():
    sizes["vocab_size"] = 50
    if name != "gpt2":
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    # Parameters as the models' pages state them; keys and values: 2 x layers x kv heads x 128 (64 of gpt2) x 2 bytes.
    [
        ("qwen2.5-7b", 7_615_616_512, 2 * 28 * 4 * 128 * 2),
        ("llama-3.1-8b", 8_030_261_248, 2 * 32 * 8 * 128 * 2),
        ("mistral-7b", 7_248_023_552, 2 * 32 * 8 * 128 * 2),
        ("gpt2", 124_439_808, 2 * 12 * 12 * 64 * 2),
    ],
)
def test_public_models_have_their_published_sizes(name: str, parameters: int, kv_bytes: int) -> None:
    assert name in PUBLIC_MODELS
    costs = count(public_config(name), torch.bfloat16, LoRAConfig(), GameShape(100), fused=True)
    assert (costs.num_parameters, costs.num_trained, costs.kv_bytes) == (parameters, parameters, kv_bytes)
    assert costs.weight_bytes == 2 * parameters and not costs.adapted
    # Two FLOPs a weight of the blocks' matrices: all but embeddings, head, norms and biases (which are under 1 %).
    blocks = parameters - 2 * costs.vocab_size * costs.hidden_size
    if name != "gpt2":
        assert costs.reading.flops == pytest.approx(2 * blocks, rel=0.001)
        assert costs.training.flops == pytest.approx(6 * blocks, rel=0.001)


def test_an_adapter_trains_little_and_spares_the_gradient_of_the_weights() -> None:
    config = public_config("gpt2")
    plain = count(config, torch.float32, LoRAConfig(), GameShape(50, 4, 5), fused=True)
    adapted = count(config, torch.float32, LoRAConfig(rank=8), GameShape(50, 4, 5), fused=True)
    # Of c_attn, c_proj, c_fc and c_proj of each layer: rank x (in + out).
    h = 768
    assert adapted.num_trained == 12 * 8 * ((h + 3 * h) + (h + h) + (h + 4 * h) + (4 * h + h))
    assert adapted.reading == plain.reading, "the base alone is read"
    assert plain.training.flops == 3 * plain.reading.flops
    # Forward, and the gradient of what goes in (of all layers but the first matrix), and three passes of the adapter.
    wanted = 2 * plain.reading.flops + 6 * adapted.num_trained
    assert adapted.training.flops == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("architecture", SMALL)
def test_flops_of_a_real_pass(architecture: str) -> None:
    costs = count(
        {"model_type": architecture, **SMALL[architecture]}, torch.float32, LoRAConfig(), GameShape(20), fused=False
    )
    backbone = Backbone(build_causal_lm(architecture, **SMALL[architecture]), None, "reference")
    n = 40
    ids = torch.randint(1, 50, (n,))
    layout = backbone.layout(torch.tensor([0, n], dtype=torch.int32), (n,))
    with FlopCounterMode(display=False) as counter:
        hidden = backbone(ids, torch.arange(n), layout)
    # The plain twin's attention computes the whole square, hidden keys too.
    assert counter.get_total_flops() == costs.reading.of(n, n * n)
    with FlopCounterMode(display=False) as counter:
        hidden.sum().backward()
    # Backward of the dense twin: twice its forward; a fused kernel makes the scores once more: half a forward.
    attention = 2 * costs.reading.flops_of_pair * n * n
    assert counter.get_total_flops() == (costs.training.flops - costs.reading.flops) * n + attention
    assert costs.training.flops_of_pair == 3.5 * costs.reading.flops_of_pair


def test_live_memory_counts_what_lives() -> None:
    known = torch.ones(1000)
    with LiveMemory([known]) as memory:
        view = known[2:]
        assert memory.now == 0, "a view of what was there"
        a = known * 2
        b = torch.cat([a, view])
        assert memory.now == memory.peak == 4 * (1000 + 1998)
        del a
        assert (memory.now, memory.peak) == (4 * 1998, 4 * 2998)
        b.add_(1)
        c = b.double()
        assert memory.now == 4 * 1998 + 8 * 1998
        del c, b
    assert memory.now == 0 and memory.peak == 12 * 1998


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no 'model_type'"),
        ({"model_type": 3}, "no 'model_type'"),
        ({"model_type": "lama"}, "'lama' is unknown to transformers; did you mean 'llama'"),
        ({"model_type": "gpt2", "n_layer": "x"}, "model: no decoder is made of this gpt2: "),
        ({"model_type": "t5"}, "model: no decoder is made of this t5: .{1,200}$"),
        ({"model_type": "llama", "num_attention_heads": 0}, "model: no decoder is made of this llama: "),
    ],
)
def test_bad_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(config, torch.float32, LoRAConfig(), GameShape(10), fused=True)


def test_adapters_for_layers_that_are_not_there() -> None:
    config = {"model_type": "gpt2", **SMALL["gpt2"]}
    with pytest.raises(ValueError, match=r"model\.lora\.targets: wanted linear layers of this model, c_attn"):
        count(config, torch.float32, LoRAConfig(rank=4, targets=("q_proj",)), GameShape(10), fused=True)


def test_a_misspelt_public_model() -> None:
    with pytest.raises(ValueError, match=r"got 'qwen2\.5-7B'; did you mean 'qwen2\.5-7b'"):
        public_config("qwen2.5-7B")
