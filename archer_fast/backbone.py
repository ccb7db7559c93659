"""A Hugging Face causal LM as a packed trunk: the only file that imports transformers."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from archer_fast.adapter_folder import base_of, merged
from archer_fast.adapters import Adapters
from archer_fast.attention import Layout, PackedLayout, choose_impl
from archer_fast.config import AttentionImpl
from archer_fast.pass_counts import PassCounts
from archer_fast.ranks import Ranks
from archer_fast.sharding import ShardedModel, sharded_like, whole_on_leader

logger = logging.getLogger(__name__)

_ATTENTION_NAME = "archer_fast"
_ADAPTER = re.compile(r"\.lora_(A|B)\.")


def _packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, h, T, d], rotated
    key: Tensor,  # [1, h_kv, T, d]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """What every layer calls: hand the packed tokens to the layout of this pass."""
    if attention_mask is not None or softcap is not None or dropout:
        raise ValueError(
            "packed attention: wanted no attention_mask, softcap or attention dropout, got "
            f"mask={attention_mask is not None}, softcap={softcap}, dropout={dropout}"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, h, d]
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    return layout.attend(cast(int, module.layer_idx), q, k, v, scale, sliding_window)[None], None


class Backbone(nn.Module):
    """One causal LM and its tokenizer: packed hidden states, and the vocabulary matrix apart.

    `forward` never applies the lm_head: `archer_fast.ops` meets the vocabulary at action tokens alone.
    Dropout is always off (log-probs must equal those of the sampler).
    """

    def __init__(self, model: transformers.PreTrainedModel, tokenizer: Any, attention: AttentionImpl = "auto") -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.adapters: Adapters | None = None  # in the model, where there are any
        self.adapter: str | None = None  # the one that acts in this backbone's passes
        self.checkpoints_activations = False  # blocks are computed again in backward
        self.counts = PassCounts()
        self._sharding: ShardedModel | None = None
        _fuse_activations(model)
        parameter = next(model.parameters())
        self.attention_impl = choose_impl(attention, parameter.device, parameter.dtype)
        # A name that transformers knows no mask for: it builds none, and our layout isolates sequences.
        transformers.AttentionInterface.register(_ATTENTION_NAME, _packed_attention)
        model.config._attn_implementation = _ATTENTION_NAME
        model.config.use_cache = False
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Gradients flow in either mode; dropout stays off so that log-probs are the sampler's."""
        del mode
        super().train(False)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.lm_head_weight.shape[0])

    @property
    def max_positions(self) -> int:
        """The model's window in tokens."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    @property
    def num_layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def lm_head_weight(self) -> Tensor:
        """[V, H]."""
        return cast(Tensor, self.model.get_output_embeddings().weight)

    def layout(self, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> PackedLayout:
        return PackedLayout(cu_seqlens, lengths, self.attention_impl)

    def forward(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        """input_ids, position_ids [T] -> the last layer's hidden states after the final norm, [T, H].

        Where the weights are sharded, only inside `gathered` or `streamed`, and so with `lm_head_weight`.
        """
        self._act()
        inputs = {"input_ids": input_ids[None], "position_ids": position_ids[None], "use_cache": False}
        with self._checkpointing():
            if self.sharding is not None:
                hidden = self.sharding.last_hidden(**inputs, layout=layout)[0]
            else:
                hidden = cast(Tensor, self.model.base_model(**inputs, layout=layout).last_hidden_state[0])
        counts = self.counts.of(hidden)
        counts.tokens += input_ids.shape[0]
        counts.pairs += layout.num_pairs
        return hidden

    def _act(self) -> None:
        """Let this backbone's adapter, or the base alone, act in what is computed next."""
        if self.adapters is not None:
            self.adapters.activate(self.adapter)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Blocks that are entered inside are computed again in backward, under the adapter that acts now."""
        if not (self.checkpoints_activations and torch.is_grad_enabled()):
            yield
            return
        blocks = self._blocks("model.activation_checkpointing: wanted false")
        for block in blocks:
            block.training = block.gradient_checkpointing = True  # the first until transformers has asked for it
            run = functools.partial(_checkpointed, self._act, block)
            block._gradient_checkpointing_func = run  # type: ignore[assignment]
        try:
            yield
        finally:
            for block in blocks:
                block.training = block.gradient_checkpointing = False
                del block._gradient_checkpointing_func

    def _blocks(self, wanted: str) -> list[GradientCheckpointingLayer]:
        """The decoder's blocks; ValueError, which begins with what was wanted, where none are known."""
        blocks = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise ValueError(f"{wanted}, transformers knows no blocks in {self.model.config.model_type!r}")
        return blocks

    # -- weights that are divided over the ranks -----------------------------------------------------

    @property
    def sharding(self) -> ShardedModel | None:
        return self._sharding

    def shard(self, ranks: Ranks) -> Backbone:
        """Divide the weights over the ranks from now on, those of adapters excepted. Every rank calls; copies are made
        before it, an optimizer is given the parameters after it."""
        blocks = self._blocks("model.shard: wanted none")
        ignored = {p for name, p in self.model.named_parameters() if _ADAPTER.search(name)}
        self._sharding = ShardedModel(self.model, blocks, ranks, ignored)
        return self

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, any number of passes without gradients are taken; of a sharded model every rank enters."""
        return nullcontext() if self.sharding is None else self.sharding.gathered()

    def streamed(self) -> AbstractContextManager[None]:
        """Inside, every rank takes the same number of passes, with gradients or without."""
        return nullcontext() if self.sharding is None else self.sharding.streamed()

    def frozen_copy(self) -> Backbone:
        """The same weights now, never trained: the reference policy and the frozen critic trunk."""
        assert self.sharding is None, "copies are made of whole weights"
        model = copy.deepcopy(self.model)
        if self.adapters is not None:
            _drop_adapters(model)
        twin = Backbone(model, self.tokenizer, self.attention_impl)
        twin.checkpoints_activations = self.checkpoints_activations
        twin.requires_grad_(False)
        return twin

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own: those of adapters in it belong to whoever adapts."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            if self.adapters is None or not _ADAPTER.search(name):
                yield name, parameter

    def linear_layers(self) -> list[str]:
        """Names of the linear layers that an adapter may change: all but the lm_head's, the last part of each."""
        head = self.model.get_output_embeddings()
        found = {
            name.rpartition(".")[2]
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        }
        return sorted(found)

    @torch.no_grad()
    def check_logits(self, name: str) -> None:
        """ValueError for a model whose logits are not hidden @ lm_head.T (a bias, a scale, a soft cap on them)."""
        ids = torch.arange(4, device=self.device) % self.vocab_size
        layout = self.layout(torch.tensor([0, 4], dtype=torch.int32, device=self.device), (4,))
        positions = torch.arange(4, device=self.device)
        ours = (self(ids, positions, layout) @ self.lm_head_weight.T).float()
        theirs = (
            self.model(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout)
            .logits[0]
            .float()
        )
        tolerance = 1e-3 if self.lm_head_weight.dtype == torch.float32 else 5e-2
        if not torch.allclose(ours.log_softmax(-1), theirs.log_softmax(-1), rtol=tolerance, atol=tolerance):
            raise ValueError(
                f"model: {name!r} ({self.model.config.model_type}) has logits that are more than hidden @ lm_head.T "
                "(a bias, a scale or a soft cap); such models are not supported"
            )

    def fingerprint(self) -> int:
        """A checksum of every weight's name and bits: equal for equal weights, whatever file they came from and
        whether or not others adapt them."""
        return fingerprint((name.replace(".base_layer.", "."), p) for name, p in self.named_parameters())

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder (safetensors, config, tokenizer) that any tool of that world loads."""
        assert self.sharding is None, "the leading rank writes what `writer` has gathered"
        self._write(folder, None)

    def writer(self) -> Callable[[Path], None]:
        """What writes the weights of now as `save` does. Every rank asks for it, and the leading one calls it: the
        weights are on its CPU then, where they are sharded."""
        if self.sharding is None:
            return self.save
        weights = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        kept = weights.keys() & self.model.state_dict().keys()  # not the buffers that are made anew
        whole = whole_on_leader({name: weights[name] for name in sorted(kept)}, self.sharding.ranks)
        return functools.partial(self._write, weights=whole)

    def _write(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        assert self.adapters is None, "a base is saved before others adapt it"
        config = self.model.config
        config._attn_implementation = "sdpa"
        try:
            self.model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
            self.tokenizer.save_pretrained(folder)
        finally:
            config._attn_implementation = _ATTENTION_NAME

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Set the weights to those that `save` wrote there; ValueError where they are not of this model's shape."""
        try:
            saved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.dtype)
            own = self.model.state_dict()
            weights = {k: sharded_like(v, own[k]) if k in own else v for k, v in saved.state_dict().items()}
            self.model.load_state_dict(weights)
        except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder}: wanted the weights of this model: {error}") from error


def _checkpointed(act: Callable[[], None], block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """The forward of a block, again in backward.

    Other passes may lie between the two: the adapter that acts here must act there again. And dropout that stands in
    the block itself (OPT) must be off in both.
    """
    block.training = False

    @contextmanager
    def again() -> Iterator[None]:
        act()
        yield

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), again()

    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> int:
    """A checksum of names and bits."""
    names, tensors = zip(*weights, strict=True)
    hashes = torch.stack([torch.hash_tensor(p.detach()) for p in tensors])
    return zlib.crc32("".join(names).encode() + hashes.cpu().numpy().tobytes())


def _drop_adapters(model: nn.Module) -> None:
    """Put the layers that peft has wrapped back in their places."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(base := getattr(child, "base_layer", None), nn.Module):
                setattr(parent, name, base)


def _fuse_activations(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """GPT-2's tanh-approximated GELU by torch's one kernel instead of eight. Returns what was exchanged."""
    found: list[tuple[nn.Module, str, nn.Module]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    for parent, name, _ in found:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    return found


@contextmanager
def borrowed(
    model: transformers.PreTrainedModel, tokenizer: Any, attention: AttentionImpl = "auto", *, dropout: bool = False
) -> Iterator[Backbone]:
    """Somebody's model as a `Backbone` inside the block; behind it attention, cache and modes are again as they were.

    dropout: leave the modules' modes alone (the dropout of adapters that train), instead of switching dropout off.
    A backward pass through activation checkpoints belongs inside the block: it runs the layers again.
    """
    config = model.config
    before = config._attn_implementation, config.use_cache
    modes = [(module, module.training) for module in model.modules()]
    exchanged = _fuse_activations(model)
    try:
        backbone = Backbone(model, tokenizer, attention)
        if dropout:
            for module, training in modes:
                module.training = training
        yield backbone
    finally:
        config._attn_implementation, config.use_cache = before
        for parent, name, child in exchanged:
            setattr(parent, name, child)
        for module, training in modes:
            module.training = training


def load_backbone(
    name_or_path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: AttentionImpl = "auto",
    stop_token: str | None = None,
) -> tuple[Backbone, int]:
    """Load a local folder or hub name; return it with the id of the token that ends an action.

    Where the folder holds a LoRA adapter, its base is loaded and the adapter merged into it.
    Errors: ValueError where nothing loads from that name, for a model that is no decoder, for a tokenizer of another
    vocabulary, or where it has no stop token.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name_or_path)
        base = base_of(Path(name_or_path))
        model = transformers.AutoModelForCausalLM.from_pretrained(base or name_or_path, dtype=dtype)
        if base is not None:
            model = merged(model, Path(name_or_path))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        near, cause = _nearest_folder(name_or_path), str(error).split("\n", 1)[0]
        raise ValueError(f"model: nothing loads from {name_or_path!r}{near}: {cause}") from error
    _check_decoder(model, name_or_path)
    _check_vocabulary(model, tokenizer, name_or_path)
    cast(nn.Module, model).to(device)
    if model.device.type == "cpu":
        # Weights of a mapped file lie at odd addresses, and small products on CPU differ in their last bit with
        # the alignment: a run that goes on from a file must compute what it would have computed.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    backbone = Backbone(model, tokenizer, attention)
    backbone.check_logits(name_or_path)
    return backbone, stop_token_id(tokenizer, stop_token)


def _check_decoder(model: transformers.PreTrainedModel, name: str) -> None:
    """What predicts masked tokens sees those that follow, unless it was configured not to."""
    config = model.config
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"model: wanted a decoder (a causal language model), got {name!r}, an encoder ({config.model_type})"
        )


def _check_vocabulary(model: transformers.PreTrainedModel, tokenizer: Any, name: str) -> None:
    """Models may have rows that no token needs; tokens that were added to a tokenizer alone may lack theirs."""
    num_rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if tokenizer.vocab_size > num_rows:
        raise ValueError(
            f"model: the tokenizer of {name!r} has {tokenizer.vocab_size} tokens and its model embeds {num_rows}; "
            "wanted the tokenizer that the model was trained with"
        )


def stop_token_id(tokenizer: Any, stop_token: str | None) -> int:
    """The id that ends an action: `stop_token` if given, else the tokenizer's end-of-sequence token."""
    if stop_token is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("stop_token: this tokenizer has no eos_token; name a token that ends an action")
        return int(tokenizer.eos_token_id)
    ids = tokenizer.encode(stop_token, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"stop_token: wanted text of exactly one token, got {stop_token!r} = {len(ids)} tokens")
    return int(ids[0])


def wrap_tokenizer(tokenizer: Any, *, eos_token: str) -> Any:
    """A `tokenizers.Tokenizer` in the Hugging Face face that `save` writes."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos_token, pad_token=eos_token, clean_up_tokenization_spaces=False
    )


def limit_threads(threads: int | None) -> None:
    """How many CPU threads torch may use in this process; None leaves its own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one. ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: wanted auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r} was asked for, but torch finds no GPU")
    return device


def build_causal_lm(architecture: str, **config: Any) -> transformers.PreTrainedModel:
    """A randomly initialised decoder, e.g. build_causal_lm("llama", hidden_size=64, ...)."""
    if architecture not in transformers.CONFIG_MAPPING:
        near = difflib.get_close_matches(architecture, list(transformers.CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"architecture: {architecture!r} is unknown to transformers{hint}")
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(architecture, **config))
    return cast(transformers.PreTrainedModel, made)


def quiet() -> None:
    """Keep transformers' own progress bars and notices out of ours (called by the CLI, never at import)."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _nearest_folder(name: str) -> str:
    path = Path(name)
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near and near[0] != path.name else ""
