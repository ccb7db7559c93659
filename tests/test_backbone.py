"""The packed trunk against plain transformers, family by family, and what loads, saves and refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from archer_fast.attention import PackedLayout
from archer_fast.backbone import Backbone, borrowed, build_causal_lm, load_backbone, stop_token_id
from archer_fast.model_costs import LiveMemory
from archer_fast.tiny_model import STOP_TOKEN, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (9, 1, 14, 2, 11, 14)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 10},
    "mistral": {"sliding_window": 4},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},  # dropout must stay off
}
MakeLM = Callable[..., transformers.PreTrainedModel]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["Is it alive? Yes.\n", "Is it red? No.\n"], 300)


def pack(sequences: list[Tensor], backbone: Backbone) -> tuple[Tensor, Tensor, PackedLayout]:
    lengths = tuple(s.numel() for s in sequences)
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    return torch.cat(sequences).int(), position_ids.int(), backbone.layout(cu, lengths)


def random_sequences(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(make_lm: MakeLM, family: str, attention: Any) -> None:
    model = make_lm(family, **FAMILIES[family])
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    backbone = Backbone(model, tokenizer=None, attention=attention)
    backbone.train()
    sequences = random_sequences(37)

    wanted = torch.cat([plain(input_ids=s[None], use_cache=False).logits[0] for s in sequences])
    input_ids, position_ids, layout = pack(sequences, backbone)
    assert layout.impl == attention
    hidden = backbone(input_ids, position_ids, layout)
    got = hidden @ backbone.lm_head_weight.T
    # Log-probs, because that is what is trained; logits here reach 30.
    torch.testing.assert_close(got.log_softmax(-1), wanted.log_softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())

    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
    wanted.backward(upstream)
    got.backward(upstream)
    expected, found = gradients(plain), gradients(model)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_window_of_mistral_matters(make_lm: MakeLM) -> None:
    """So that the comparison above is one of windows."""
    windowed = Backbone(make_lm("mistral", sliding_window=4), None)
    full = Backbone(make_lm("mistral", sliding_window=None), None)
    input_ids, position_ids, layout = pack(random_sequences(37, (12,)), full)
    difference = (windowed(input_ids, position_ids, layout) - full(input_ids, position_ids, layout)).abs().amax(1)
    assert (difference[:4] < 1e-5).all() and (difference[4:] > 1e-2).all()


def test_no_token_sees_another_sequence(make_lm: MakeLM) -> None:
    backbone = Backbone(make_lm(), None)
    sequences = random_sequences(37, (5, 6, 5))
    before = backbone(*pack(sequences, backbone))
    sequences[1] = (sequences[1] + 1) % 37
    after = backbone(*pack(sequences, backbone))
    changed = (before != after).any(1)
    assert changed.tolist() == [False] * 5 + [True] * 6 + [False] * 5


def test_sizes(make_lm: MakeLM) -> None:
    for family, sizes in FAMILIES.items():
        backbone = Backbone(make_lm(family, **sizes), None)
        assert (backbone.hidden_size, backbone.vocab_size, backbone.num_layers, backbone.max_positions) == (
            24,
            37,
            2,
            96,
        )
        assert backbone.attention_impl == "sdpa"
        assert backbone.device == torch.device("cpu")


def test_what_attention_cannot_do_is_refused(make_lm: MakeLM) -> None:
    """Gemma 2 caps its scores: silence would be another model's numbers."""
    backbone = Backbone(make_lm("gemma2", head_dim=6, sliding_window=50, query_pre_attn_scalar=6), None)
    with pytest.raises(ValueError, match=r"packed attention: wanted no .*softcap.* got .*softcap=50"):
        backbone(*pack(random_sequences(37, (3,)), backbone))


def test_an_attention_that_cannot_run_here_is_refused(make_lm: MakeLM) -> None:
    with pytest.raises(ValueError, match=r"varlen.*CUDA"):
        Backbone(make_lm(), None, "varlen")


def test_frozen_copy_stays_as_it_was(make_lm: MakeLM) -> None:
    backbone = Backbone(make_lm(tie_word_embeddings=True), None, "reference")
    batch = pack(random_sequences(37, (4, 3)), backbone)
    before = backbone(*batch).detach()
    twin = backbone.frozen_copy()
    assert twin.attention_impl == "reference"
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in backbone.parameters())
    assert twin.lm_head_weight is twin.model.get_input_embeddings().weight  # still tied
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(twin(*batch), before, rtol=0, atol=0)
    assert (backbone(*batch) - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_loads_in_plain_transformers(make_lm: MakeLM, tokenizer: Any, family: str, tmp_path: Path) -> None:
    backbone = Backbone(make_lm(family, vocab_size=len(tokenizer), **FAMILIES[family]), tokenizer)
    batch = pack(random_sequences(len(tokenizer), (7,)), backbone)
    logits = backbone(*batch) @ backbone.lm_head_weight.T
    backbone.save(tmp_path)
    assert (tmp_path / "model.safetensors").exists()

    class Seen:
        def __init__(self) -> None:
            self.layers: list[int] = []
            self.num_pairs = 0

        def attend(self, layer: int, *args: Any) -> Tensor:
            self.layers.append(layer)
            return batch[2].attend(layer, *args)

    seen = Seen()
    torch.testing.assert_close(backbone(*batch[:2], seen) @ backbone.lm_head_weight.T, logits, rtol=0, atol=0)
    assert seen.layers == [0, 1]  # saving has not given our attention away

    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        again = plain(input_ids=batch[0][None].long()).logits[0]
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
    # For model type qwen2 transformers ignores the saved tokenizer.json's pre-tokenizer and puts Qwen's in its place.
    if family != "qwen2":
        text = "Is it älive?  Maybe 17.\n"
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert their_tokenizer.encode(text) == tokenizer.encode(text)
        assert their_tokenizer.decode(their_tokenizer.encode(text)) == text

    ours, stop = load_backbone(str(tmp_path))
    assert stop == tokenizer.eos_token_id
    torch.testing.assert_close(ours(*batch) @ ours.lm_head_weight.T, logits, rtol=0, atol=0)


def test_load_takes_dtype_attention_and_stop_token(make_lm: MakeLM, tokenizer: Any, tmp_path: Path) -> None:
    Backbone(make_lm(vocab_size=len(tokenizer)), tokenizer).save(tmp_path)
    backbone, stop = load_backbone(str(tmp_path), dtype=torch.bfloat16, attention="reference", stop_token="?")
    assert backbone.lm_head_weight.dtype == torch.bfloat16
    assert backbone.attention_impl == "reference"
    assert tokenizer.decode([stop]) == "?"


def test_a_path_that_is_not_there_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "policy-12").mkdir()
    with pytest.raises(ValueError, match=r"model: nothing loads from '.*polcy-12' \(did you mean '.*policy-12'\?\)"):
        load_backbone(str(tmp_path / "polcy-12"))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model: nothing loads from '{tmp_path}'"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_an_encoder_is_no_policy(architecture: str, tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.AutoConfig.for_model(architecture, vocab_size=len(tokenizer), **sizes)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"model: wanted a decoder .*, got '{tmp_path}', an encoder \({architecture}\)"
    ):
        load_backbone(str(tmp_path))


def test_what_is_no_language_model_is_told_in_one_line(tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model: nothing loads from '{tmp_path}': .*T5Config") as error:
        load_backbone(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_vocabulary_is_told(make_lm: MakeLM, tokenizer: Any, tmp_path: Path) -> None:
    Backbone(make_lm(vocab_size=5), tokenizer).save(tmp_path)
    with pytest.raises(ValueError, match=rf"tokenizer of '{tmp_path}' has \d+ tokens and its model embeds 5; wanted"):
        load_backbone(str(tmp_path))


def test_an_unknown_architecture_is_named_with_its_neighbour() -> None:
    with pytest.raises(ValueError, match="architecture: 'lama' is unknown to transformers; did you mean 'llama'"):
        build_causal_lm("lama", hidden_size=8)


def test_stop_token(tokenizer: Any) -> None:
    assert stop_token_id(tokenizer, None) == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(STOP_TOKEN)
    assert stop_token_id(tokenizer, "?") == tokenizer.encode("?")[0]
    with pytest.raises(ValueError, match=r"stop_token: wanted text of exactly one token, got 'Yes\. No' = \d+ tokens"):
        stop_token_id(tokenizer, "Yes. No")
    with pytest.raises(ValueError, match="stop_token: wanted text of exactly one token, got '' = 0 tokens"):
        stop_token_id(tokenizer, "")


def test_a_tokenizer_without_an_end_asks_for_a_stop_token() -> None:
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(["a b"], 300).backend_tokenizer)
    assert bare.eos_token_id is None
    with pytest.raises(ValueError, match="stop_token: this tokenizer has no eos_token; name a token"):
        stop_token_id(bare, None)
    assert stop_token_id(bare, STOP_TOKEN) == 0


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [("phi", {"hidden_size": 32}), ("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.5})],
)
def test_logits_that_are_more_than_a_product_are_refused(
    make_lm: Callable[..., transformers.PreTrainedModel], architecture: str, extra: dict[str, float]
) -> None:
    backbone = Backbone(make_lm(architecture, **extra), None)
    with pytest.raises(ValueError, match=f"model: 'm' \\({architecture}\\) has logits that are more than"):
        backbone.check_logits("m")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_logits_of_the_supported_families_pass(
    make_lm: Callable[..., transformers.PreTrainedModel], architecture: str
) -> None:
    Backbone(make_lm(architecture), None).check_logits("m")


def test_gelu_of_gpt2_is_one_kernel_and_given_back(make_lm: MakeLM) -> None:
    """By the model's own forward pass before, inside and behind the block."""
    model = make_lm("gpt2").eval()
    ids = torch.arange(12)[None]
    wanted = model(ids).logits
    kinds = [type(block.mlp.act) for block in model.transformer.h]
    with borrowed(model, None):
        assert {type(block.mlp.act) for block in model.transformer.h} == {torch.nn.GELU} != set(kinds)
        model.config._attn_implementation = "sdpa"
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert [type(block.mlp.act) for block in model.transformer.h] == kinds
    assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_are_computed_again_give_the_same_gradients(make_lm: MakeLM, family: str, attention: Any) -> None:
    backbone = Backbone(make_lm(family, **FAMILIES[family]), None, attention)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, backbone.vocab_size, (12,), generator=generator)
    positions = torch.cat([torch.arange(7), torch.arange(5)])
    cu_seqlens = torch.tensor([0, 7, 12], dtype=torch.int32)
    found = []
    for backbone.checkpoints_activations in (False, True):
        backbone.zero_grad()
        with LiveMemory(backbone.parameters()) as memory:
            hidden = backbone(ids, positions, backbone.layout(cu_seqlens, (7, 5)))
            kept = memory.now
            hidden.square().sum().backward()
        gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        found.append((hidden.detach(), gradients, kept))
    (hidden, plain, all_kept), (again, checkpointed, few_kept) = found
    assert torch.equal(hidden, again) and plain.keys() == checkpointed.keys() and len(plain) > 10
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert few_kept < all_kept / 2, "it ran"
    assert not any(module.training for module in backbone.modules()), "no block is left in training mode"


def test_no_block_is_computed_twice_without_gradients(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(make_lm(), None)
    backbone.checkpoints_activations = True
    copied = backbone.frozen_copy()
    assert copied.checkpoints_activations
    monkeypatch.setattr("archer_fast.backbone.checkpoint", None)
    ids = torch.tensor([1, 2, 3])
    with torch.no_grad():
        copied(ids, torch.arange(3), copied.layout(torch.tensor([0, 3], dtype=torch.int32), (3,)))
    with pytest.raises(TypeError, match="NoneType"):
        backbone(ids, torch.arange(3), backbone.layout(torch.tensor([0, 3], dtype=torch.int32), (3,)))
    assert not any(module.training for module in backbone.modules()), "after a fault neither"


def test_a_model_without_blocks_to_compute_again_is_refused(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone(make_lm(), None)
    backbone.checkpoints_activations = True
    monkeypatch.setattr("archer_fast.backbone.GradientCheckpointingLayer", torch.nn.Bilinear)
    layout = backbone.layout(torch.tensor([0, 3], dtype=torch.int32), (3,))
    with pytest.raises(ValueError, match=r"model\.activation_checkpointing: wanted false, .* blocks in 'llama'"):
        backbone(torch.arange(3), torch.arange(3), layout)


def test_dropout_that_stands_in_a_block_itself_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT asks the block's own `training`, which transformers' checkpointing wants to be on."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.5}
    model = build_causal_lm("opt", word_embed_proj_dim=32, vocab_size=50, max_position_embeddings=64, **sizes)
    backbone = Backbone(model, None)
    ids, layout = torch.arange(1, 9), backbone.layout(torch.tensor([0, 8], dtype=torch.int32), (8,))
    found = []
    for backbone.checkpoints_activations in (False, True):
        backbone.zero_grad()
        backbone(ids, torch.arange(8), layout).square().sum().backward()
        found.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


_LOADS = """
import re, sys
import torch
from archer_fast.backbone import load_backbone

def resident(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))

load_backbone(sys.argv[1])  # whatever is imported on the way
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
load_backbone(sys.argv[2])
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak of its memory: `make test-all` on Linux"
)
def test_loading_takes_little_more_memory_than_the_checkpoint(make_lm: MakeLM, tmp_path: Path) -> None:
    """In shards, as large models come; the pages of a single file stay mapped until its last weight is copied."""
    tokenizer = train_tokenizer(["a b", "b a"], 37)
    large = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    for name, sizes in (("small", {}), ("large", large)):
        make_lm(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path / name, max_shard_size="50MB")
        tokenizer.save_pretrained(tmp_path / name)
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert size > 300e6
    arguments = [sys.executable, "-c", _LOADS, str(tmp_path / "small"), str(tmp_path / "large")]
    peak = int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    assert size < peak < 1.2 * size
