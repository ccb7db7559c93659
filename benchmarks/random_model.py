"""A public model's shape with random weights, in a folder that every command takes: what a card needs to be measured.

.venv/bin/python benchmarks/random_model.py qwen2.5-7b /tmp/random-7b

Its tokenizer has a token a byte, and names without meaning for the rest of the vocabulary; a random policy hardly ever
samples the one token that ends an action, so that every action is as long as it may be.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from archer_fast.backbone import build_causal_lm, wrap_tokenizer
from archer_fast.public_models import public_config

STOP = "<end>"


def byte_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """One token a byte, `STOP`, and fillers up to `vocab_size`."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), STOP]
    names += [f"<{i}>" for i in range(len(names), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap_tokenizer(tokenizer, eos_token=STOP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a name that `archer-fast plan` knows, such as qwen2.5-7b")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    args = parser.parse_args()
    config = public_config(args.name)
    if args.layers is not None:
        config |= {"num_hidden_layers": args.layers}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = build_causal_lm(config.pop("model_type"), **config, bos_token_id=None, eos_token_id=256)
    model.save_pretrained(args.folder, max_shard_size="2GB")
    byte_tokenizer(config["vocab_size"]).save_pretrained(args.folder)
    print(f"{model.num_parameters() / 1e9:.2f} B parameters in {args.folder}")


if __name__ == "__main__":
    main()
