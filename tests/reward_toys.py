"""Tiny backbones and tokenizers for reward-model tests, built on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from equipoise.models.aspects import Aspect

WORDS = ["a", "be", "cat", "dog", "eel", "fox", "good", "hat", "ice", "jam", "kind", "low", "mean", "no", "oak", "pig"]
WIDE = 0.3  # initializer_range: with the usual 0.02 the outputs of a tiny network hardly depend on its input
ASPECTS = [
    Aspect("toxicity", False, (1.0, 5.0), mean=3.0, std=0.5),
    Aspect("set/politeness", True, None, mean=-40.0, std=7.0),
    Aspect("safety", True, (0.0, 1.0), mean=0.2, std=0.1),
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def word_tokenizer(*, chat: bool = False) -> Any:
    """An encoder's tokenizer: whole words, [CLS] a [SEP] b [SEP], segment ids 0 and 1."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def plain_word_tokenizer() -> Any:
    """A decoder's tokenizer of whole words: <|eos|>, and no special tokens around a text."""
    vocabulary = {token: i for i, token in enumerate(["<|eos|>", "<|unk|>", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", unk_token="<|unk|>")


def byte_tokenizer(*, pad: str | None = None, chat: bool = False) -> Any:
    """A decoder's tokenizer: bytes, <|eos|>, no special tokens around a text, and no pad token unless given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|eos|>", "<|start|>", "<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|eos|>", pad_token=pad, chat_template=CHAT_TEMPLATE if chat else None
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    return fast


def qwen_tokenizer() -> Any:
    """Qwen2's own class, which `AutoTokenizer` insists on for this architecture; its pad token is its EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])


def _encoder_size(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": WIDE,
        **more,
    }


def _decoder_size(**more: Any) -> dict[str, Any]:
    return _encoder_size(vocab_size=259, max_position_embeddings=256, pad_token_id=None, eos_token_id=0, **more)


def config_of(architecture: str) -> Any:
    """A two-layer config of one architecture."""
    if architecture == "bert":
        return transformers.BertConfig(**_encoder_size())
    if architecture == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=5 + len(WORDS),
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=64,
            initializer_range=WIDE,
        )
    if architecture == "roberta":
        return transformers.RobertaConfig(**_encoder_size(type_vocab_size=1))
    if architecture == "deberta-v2":
        return transformers.DebertaV2Config(**_encoder_size(relative_attention=True, pos_att_type=["p2c", "c2p"]))
    if architecture == "modernbert":
        ids = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        return transformers.ModernBertConfig(**_encoder_size(**ids))
    if architecture == "llama":
        return transformers.LlamaConfig(**_decoder_size(num_key_value_heads=1))
    if architecture == "qwen2":
        return transformers.Qwen2Config(**_decoder_size(num_key_value_heads=1))
    if architecture == "gpt2":
        return transformers.GPT2Config(
            vocab_size=259,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=256,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=WIDE,
        )
    raise ValueError(architecture)


ENCODERS = ["bert", "distilbert", "roberta", "deberta-v2", "modernbert"]
DECODERS = ["llama", "qwen2", "gpt2"]
TOKENIZERS = {"llama": byte_tokenizer, "gpt2": byte_tokenizer, "qwen2": qwen_tokenizer}


def save_backbone(directory: Path, architecture: str = "bert", *, tokenizer: Any = None, config: Any = None) -> Path:
    """A directory with a headless random network and its tokenizer, as a pretrained backbone would come."""
    config = config or config_of(architecture)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(directory)
    if tokenizer is None:
        tokenizer = TOKENIZERS.get(architecture, word_tokenizer)()
    tokenizer.save_pretrained(directory)
    return directory
