"""A tokenizer that loses text is refused when loaded, and one that would is refused when saved."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from equipoise.data import check_tokenizer, load_tokenizer, save_tokenizer_checked
from equipoise.errors import ConfigError

CORPUS = ["Could you explain how thirteen quick foxes jump over the lazy dogs, please? Hello world"]


def word_level(corpus=CORPUS, unknown=True):
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        corpus, trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>" if unknown else None)


def letters_only():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(["aeiou" * 5], trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def with_config(path, model_type):
    AutoConfig.for_model(model_type).save_pretrained(path)
    return path


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "gpt2", "gpt_neox", "mistral", "bert"])
def test_generic_tokenizers_survive_beside_these_architectures(tmp_path, make_tokenizer, model_type):
    for name, tokenizer in (("bytes", make_tokenizer(template="qwen", adds_bos=True)), ("words", word_level())):
        path = tmp_path / name
        if model_type:
            with_config(path, model_type)
        save_tokenizer_checked(tokenizer, path)
        loaded = load_tokenizer(path)
        text = "Hello world,  this is\n<|im_start|> a reply"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.chat_template == tokenizer.chat_template


def test_a_generic_tokenizer_saved_beside_qwen2_is_refused(tmp_path):
    with_config(tmp_path, "qwen2")
    with pytest.raises(ConfigError, match=r"came back as Qwen2Tokenizer.* use an architecture that keeps"):
        save_tokenizer_checked(word_level(), tmp_path)


def test_a_tokenizer_that_encodes_everything_to_nothing_is_refused_on_loading(tmp_path):
    with_config(tmp_path, "qwen2")
    word_level(["Could you explain this"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"Qwen2Tokenizer encodes .* to no ids: every text would be lost") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_tokenizer_that_loses_characters_is_refused(tmp_path):
    letters_only().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"loses text: 'Could you .* comes back as"):
        load_tokenizer(tmp_path)


def test_unknown_words_are_an_honest_loss_unless_nothing_else_is_left():
    check_tokenizer(word_level(["Could you explain this"]))
    with pytest.raises(ConfigError, match=r"encodes every word of .* to '<unk>'"):
        check_tokenizer(word_level(["nothing in common"]))


def test_a_lost_template_or_special_token_is_refused(tmp_path, make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(template="qwen")
    real = type(tokenizer).save_pretrained

    def forgets_the_template(self, directory):
        real(self, directory)
        (tmp_path / "chat_template.jinja").unlink()

    monkeypatch.setattr(type(tokenizer), "save_pretrained", forgets_the_template)
    with pytest.raises(ConfigError, match="chat_template is None instead of"):
        save_tokenizer_checked(tokenizer, tmp_path)


def test_another_tokenizers_template_in_the_directory_is_noticed(tmp_path, make_tokenizer):
    save_tokenizer_checked(make_tokenizer(template="qwen"), tmp_path)
    with pytest.raises(ConfigError, match=r"chat_template is .* instead of None.* a directory without another"):
        save_tokenizer_checked(make_tokenizer(), tmp_path)


def test_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(with_config(tmp_path, "gpt2"))


def test_a_broken_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def test_a_name_that_exists_nowhere(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no-such-owner/no-such-model: no tokenizer could be loaded") as error:
        load_tokenizer("no-such-owner/no-such-model")
    assert "\n" not in str(error.value)
