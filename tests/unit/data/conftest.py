"""Tokenizers built in memory, so that no test needs a network."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["Could you explain how 13 quick foxes jump over a lazy dog, please? Hello world, this is a reply."] * 20
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
TEMPLATES = {}
TEMPLATES["qwen"] = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES["bos"] = (
    "<bos>{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ message.role }}] {{ message.content }}"
    "{% if message.role == 'assistant' %} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def build_tokenizer(*, template=None, adds_bos=False, adds_eos=False, eos="<eos>", bos="<bos>"):
    backend = byte_bpe()
    if adds_bos or adds_eos:
        single = f"{'<bos> ' if adds_bos else ''}$A{' <eos>' if adds_eos else ''}"
        ids = [(name, backend.token_to_id(name)) for name in ("<bos>", "<eos>")]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token=eos, bos_token=bos)
    tokenizer.chat_template = TEMPLATES[template] if template else None
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
