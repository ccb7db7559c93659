"""Tiny GPT-2 and RoBERTa folders with tokenizers of their own, made on the spot: what `from_pretrained` reads."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

# Twenty Questions as the original writes it down; a few words of other scripts, so that their bytes have merges too.
TEXTS = (
    "Questions:\nIs the object alive? No.\nIs it bigger than a car? No.\nIs the object a piece of furniture? Yes.\n",
    "Questions:\nIs it something that you can eat? No.\nCan you hold it in one hand? Yes.\nIs it made of metal? Yes.\n",
    "Questions:\nDoes the object have wheels? Invalid Question.\nIs it a vehicle? No.\nIs it found at home? Yes.\n",
    "Questions:\nIs it used for a sport? Yes.\nIs it a ball? No.\nIs the object a tennis racket? Yes.\n",
    "Is the object a dog?\nIs it a cat?\nIs it a guitar?\nIs it a bread?\nIs it a lamp?\nIs it an apple?\n",
    "Yes.\nNo.\nInvalid Question.\nThe object was a crème brûlée.\nObjet: café.\n物体は何ですか。\n",
)
GPT2_EOS = "<|endoftext|>"
ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4; the real one's pad is 1 too


def make_gpt2(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    width: int = 32,
    layers: int = 2,
    heads: int = 2,
    n_positions: int = 1024,
    vocab_size: int = 400,
    initializer_range: float = 0.02,
    newline_boost: float = 0.0,
    fragment_boost: float = 0.0,
    merge_newlines: bool = False,
) -> Path:
    """A random GPT-2 with its tokenizer, as a folder; the same bytes for the same arguments.

    initializer_range: .02 (GPT-2's own) gives nearly flat distributions; .3 peaked ones, a few tokens having most of
    the mass, another few for another context.
    newline_boost: added to the logit of "\\n", in every context; shared out among all tokens whose text has a newline,
    where there are several. At width 32, initializer_range .3 and a boost of 4, one token in eight has one.
    fragment_boost: added to the logits of tokens that are no text alone, being parts of a character. There are 130 of
    them: at 0 most of such a model's actions have a "\\ufffd", at -3 one in fifty.
    merge_newlines: the tokenizer also merges across words, so that tokens such as "?\\n" exist, as they do in
    vocabularies of newer models; without it a newline is always a token of its own, or of newlines alone, as in GPT-2.
    """
    tokenizer = _byte_level_bpe((GPT2_EOS,), vocab_size, use_regex=not merge_newlines)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=GPT2_EOS, bos_token=GPT2_EOS, unk_token=GPT2_EOS
    )
    eos_id = tokenizer.token_to_id(GPT2_EOS)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=n_positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        initializer_range=initializer_range,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    texts = [fast.decode([token]) for token in range(len(fast))]
    newlines = [token for token, text in enumerate(texts) if "\n" in text]
    fragments = [token for token, text in enumerate(texts) if "\ufffd" in text]
    if newline_boost or fragment_boost:
        share = newline_boost - math.log(len(newlines))
        _boost(model, dict.fromkeys(fragments, fragment_boost) | dict.fromkeys(newlines, share))
    return _save(model, fast, folder)


def make_roberta(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    width: int = 32,
    layers: int = 2,
    heads: int = 2,
    max_position_embeddings: int = 514,
    vocab_size: int = 400,
    initializer_range: float = 0.02,
) -> Path:
    """A random RoBERTa (pooler included) with its tokenizer, as a folder; the same bytes for the same arguments."""
    tokenizer = _byte_level_bpe(ROBERTA_SPECIALS, vocab_size, use_regex=True)
    start, pad, end, unknown, mask = ROBERTA_SPECIALS
    ids = {name: tokenizer.token_to_id(name) for name in ROBERTA_SPECIALS}
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, ids[end]), (start, ids[start]), trim_offsets=True, add_prefix_space=False
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        cls_token=start,
        eos_token=end,
        sep_token=end,
        pad_token=pad,
        unk_token=unknown,
        mask_token=AddedToken(mask, lstrip=True, special=True),
        model_max_length=max_position_embeddings - 2,
    )
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max_position_embeddings,
        type_vocab_size=1,
        initializer_range=initializer_range,
        bos_token_id=ids[start],
        pad_token_id=ids[pad],
        eos_token_id=ids[end],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RobertaModel(config)
    return _save(model, fast, folder)


def _byte_level_bpe(specials: tuple[str, ...], vocab_size: int, use_regex: bool) -> Tokenizer:
    """All 256 bytes are in it, so every text has tokens and comes back whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=None if use_regex else 8,  # or whole lines become tokens
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@torch.no_grad()
def _boost(model: GPT2LMHeadModel, boosts: dict[int, float]) -> None:
    """The head has no bias: the first channel of the last norm's output becomes a 1 that only these tokens read."""
    norm, head = model.transformer.ln_f, model.lm_head.weight
    norm.weight[0], norm.bias[0] = 0.0, 1.0
    head[:, 0] = 0.0
    for token, boost in boosts.items():
        head[token, 0] = boost


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
