"""The recipes of the paper's setting: what they say, and two steps of each on a random Qwen2 of a few thousand weights.

Model, tokenizer and data are built here; the shipped file is trained as it is, through `equipoise train` with
overrides for names and sizes alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.run_toys import metrics, train
from tests.toy import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from equipoise.config import load_recipe

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "paper"
ASPECTS = ["politeness", "meaningfulness", "actionability", "safety"]
SIZES = ["0.5b", "7b", "14b"]
RECIPES = ["reward", *(f"{algorithm}_{size}" for algorithm in ("grpo", "ppo", "dpo") for size in SIZES)]
# hidden, layers, intermediate, width of keys and of values, vocabulary, matrices of that height (1: tied)
SHAPES = {
    "0.5b": (896, 24, 4864, 128, 151_936, 1),
    "7b": (3584, 28, 18_944, 512, 152_064, 2),
    "14b": (5120, 48, 13_824, 1024, 152_064, 2),
}
TEXTS = [f"how do i {WORDS[20 + i % 12]} it" for i in range(10)]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen_tokenizer() -> Any:
    """Qwen2's own class with merges learnt here: the only one `AutoTokenizer` gives back beside a Qwen2 config."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=learnt["vocab"], merges=merges)
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class World:
    """A random Qwen2 with its tokenizer, and PROMPTS, SCORED and PAIRS as the recipes ask for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = qwen_tokenizer()
        config = Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        self.model = folder / "base"
        kinds = ["adversarial", "benign"]
        self.prompts = write_rows(
            folder / "prompts.jsonl", [{"prompt": text, "kind": kinds[i % 2]} for i, text in enumerate(TEXTS)]
        )
        self.scored = write_rows(
            folder / "scored.jsonl",
            [
                {"prompt": text, "response": WORDS[i], "scores": {name: ((i + k) % 5) / 4 for k, name in scored(i)}}
                for i, text in enumerate(TEXTS * 2)
            ],
        )
        self.pairs = write_rows(
            folder / "pairs.jsonl",
            [{"prompt": text, "chosen": "please", "rejected": WORDS[i + 3]} for i, text in enumerate(TEXTS)],
        )
        self.reward_model = folder / "reward" / "model"
        train(FOLDER / "reward.yaml", folder / "reward", *self.overrides("reward"))

    def overrides(self, recipe: str) -> list[str]:
        """What makes a shipped recipe small: names and sizes; the method stays."""
        always = ["threads=1", "micro_batch_size=2"]
        algorithm = recipe.split("_")[0]
        if algorithm == "reward":
            sizes = ["batch_size=8", "num_epochs=1", "input.max_length=64"]
            return [*always, *sizes, f"model.model={self.model}", f"data={self.scored}"]
        always.append(f"policy.model={self.model}")
        if algorithm == "dpo":
            return [*always, f"data={self.pairs}", "batch_size=4", "validation_fraction=0.2", "max_length=64"]
        online = ["num_steps=2", "sampling.max_tokens=4", f"data={self.prompts}"]
        online += ["prompts_per_step=2"] if algorithm == "grpo" else ["prompts_per_step=4"]
        online += [f"scorers.0.reward_model={self.reward_model}"]
        if recipe in ("ppo_7b", "ppo_14b"):
            online.append(f"critic.model.model={self.model}")
        return [*always, *online]


def scored(row: int) -> list[tuple[int, str]]:
    """Aspects of one row: one of the four is missing."""
    return [(k, name) for k, name in enumerate(ASPECTS) if k != row % 4]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("paper"))


def test_the_folder_holds_these_recipes() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_setting_is_the_paper_s(name: str) -> None:
    config: Any = load_recipe(FOLDER / f"{name}.yaml")
    if name == "reward":
        assert list(config.aspects) == ASPECTS
        return
    algorithm, size = name.split("_")
    assert config.algorithm == algorithm
    assert config.policy.model == f"Qwen/Qwen2.5-{size.upper()}-Instruct" and config.policy.lora is not None
    if algorithm != "dpo":
        assert config.objective_weights == dict.fromkeys(ASPECTS, 0.25)
        assert config.prompts_per_step * config.group_size == 64


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dpo"])
def test_the_sizes_differ_in_model_memory_and_step_alone(algorithm: str) -> None:
    parts = {"policy", "critic", "micro_batch_size", "optimizer"}
    dumps = [load_recipe(FOLDER / f"{algorithm}_{size}.yaml").model_dump(exclude=parts) for size in SIZES]
    assert dumps[0] == dumps[1] == dumps[2]


def billions(number: float) -> str:
    return f"{number / 1e9:.{1 if number >= 1e9 else 2}f} GB"


def parameters(size: str) -> int:
    """Weights of a Qwen2 model, counted from its shape."""
    hidden, layers, inner, narrow, vocabulary, matrices = SHAPES[size]
    attention = 2 * hidden * hidden + hidden + 2 * (hidden * narrow + narrow)
    return vocabulary * hidden * matrices + layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden


def adapter_bytes(size: str, rank: int) -> int:
    """float32 adapters of all seven linear maps of every layer, their gradients and Adam's two moments."""
    hidden, layers, inner, narrow, *_ = SHAPES[size]
    return 16 * rank * layers * (2 * 2 * hidden + 2 * (hidden + narrow) + 3 * (hidden + inner))


def test_the_count_of_parameters_is_that_of_the_real_class() -> None:
    hidden, layers, inner, narrow, vocabulary, matrices = SHAPES["0.5b"]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=matrices == 1,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    assert sum(shape.numel() for shape in shapes.values()) == parameters("0.5b")
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (narrow, hidden)


@pytest.mark.parametrize("name", RECIPES)
def test_the_memory_in_the_comment_is_what_the_arithmetic_gives(name: str) -> None:
    text = " ".join((FOLDER / f"{name}.yaml").read_text().split("algorithm:")[0].replace("#", "").split())
    said = re.findall(r"[\d.]+ GB", text)
    if name == "reward":
        assert said == [billions(16 * parameters("0.5b"))]
        return
    algorithm, size = name.split("_")
    config: Any = load_recipe(FOLDER / f"{name}.yaml")
    wanted = [billions(2 * parameters(size)), billions(adapter_bytes(size, config.policy.lora.r))]
    if algorithm != "dpo":
        tokens = config.max_prompt_tokens + config.sampling.max_tokens
        _, layers, _, narrow, *_ = SHAPES[size]
        wanted.append(billions(64 * tokens * layers * 2 * narrow * 2))
        assert f"64 rows of {tokens} tokens" in text
    if algorithm == "ppo":
        wanted += [billions(2 * parameters("0.5b")), billions(adapter_bytes("0.5b", 16))]
    assert said == wanted


@pytest.mark.parametrize("name", RECIPES[1:])
def test_two_steps_on_a_random_qwen2(name: str, world: World, tmp_path: Path) -> None:
    train(FOLDER / f"{name}.yaml", tmp_path / "run", *world.overrides(name))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    if not name.startswith("dpo"):
        assert lines[-1].keys() >= {f"reward/{aspect}/mean" for aspect in ASPECTS}
    reloaded, built = AutoTokenizer.from_pretrained(tmp_path / "run" / "model"), qwen_tokenizer()
    text = "<|im_start|>user\nhow do i fix it?<|im_end|>"
    assert reloaded(text)["input_ids"] == built(text)["input_ids"]
    assert reloaded.decode(reloaded(text)["input_ids"]) == text


def test_the_reward_model_learns_four_aspects_in_two_steps(world: World) -> None:
    assert [line["step"] for line in metrics(world.folder / "reward")] == [1, 2]
    report = json.loads((world.folder / "reward" / "reward_report.json").read_text())
    assert list(report["aspects"]) == ASPECTS
