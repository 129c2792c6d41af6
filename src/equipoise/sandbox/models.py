"""Tokenizer and three sizes of a small Llama: enough of a language model to be aligned, built in a second.

Llama with a byte-level BPE tokenizer reloads through plain `AutoTokenizer` with the same ids, and reads any text.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from equipoise.sandbox.datasets import demonstration_rows, prompt_rows

VOCABULARY = 1536
CONTEXT = 256
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Hidden size, layers, heads, feed-forward size: about 1, 4 and 16 million parameters, for the paper's 0.5B, 7B and 14B.
SIZES = {"1m": (128, 4, 4, 352), "4m": (256, 4, 8, 704), "16m": (448, 6, 8, 1216)}
NAMES = {f"sandbox/{size}": size for size in SIZES}


@cache
def tokenizer() -> Any:
    """A byte-level BPE tokenizer, trained on training prompts and demonstrations alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    special = ["<|pad|>", END, "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] for row in prompt_rows("train")] + [row["response"] for row in demonstration_rows()]
    built.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<|pad|>", eos_token=END)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def model_config(size: str) -> Any:
    """The Llama configuration of a size in `SIZES`."""
    from transformers import LlamaConfig

    hidden, layers, heads, feed_forward = SIZES[size]
    words = tokenizer()
    return LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,  # at these widths twice as fast to learn from as the usual 0.02
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def write_model(size: str, directory: Path) -> Path:
    """config.json, tokenizer and chat template of a size; weights are drawn when it is loaded with
    `initialise: random`."""
    directory.mkdir(parents=True, exist_ok=True)
    model_config(size).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@cache
def model_directory(name: str) -> Path:
    """A temporary directory that holds the model of this name (`sandbox/1m`, ...) until the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="equipoise-sandbox-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return write_model(NAMES[name], directory / NAMES[name])
