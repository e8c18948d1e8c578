"""Loading tokenizers, training them, and telling Megatron of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from sparsecod_mcore.data import (
    FileCorpus,
    TextTokenizer,
    load_tokenizer,
    megatron_tokenizer_arguments,
    train_tokenizer,
)
from sparsecod_mcore.data.tokenizer import EOS_TOKENS
from sparsecod_mcore.errors import UserError


def save_words(path: Path, words: dict[str, int], special: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(path))
    return path


def test_training_is_deterministic_and_makes_the_size_asked_for(
    corpus_path: Path, tokenizer_path: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    assert train_tokenizer(FileCorpus([str(corpus_path)]), tmp_path / "again.json", 400) == 400
    assert (tmp_path / "again.json").read_bytes() == tokenizer_path.read_bytes()
    assert (tokenizer.vocabulary_size, tokenizer.eos_token, tokenizer.eos_id) == (400, "<|endoftext|>", 0)


@given(st.text(), st.sampled_from(["", "<|endoftext|>", " <|endoftext|>\n"]))
def test_every_text_comes_back_and_has_one_end(tokenizer: TextTokenizer, text: str, spelled: str) -> None:
    text = text + spelled + text
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.eos_id) == 1
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids[:-1]) == text


def test_training_refuses_what_makes_no_tokenizer(corpus_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="vocabulary of 256 tokens is too small"):
        train_tokenizer(FileCorpus([str(corpus_path)]), tmp_path / "t.json", 256)
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(FileCorpus([str(tmp_path / "empty.jsonl")]), tmp_path / "t.json", 400)
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="line 1 is not valid JSON"):
        train_tokenizer(FileCorpus([str(tmp_path / "bad.jsonl")]), tmp_path / "t.json", 400)
    assert not (tmp_path / "t.json").exists()


def test_a_smaller_vocabulary_than_asked_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "little.txt").write_text("aa bb aa bb")
    size = train_tokenizer(FileCorpus([str(tmp_path / "little.txt")]), tmp_path / "t.json", 4096)
    assert 257 < size < 4096
    assert f"{size} tokens of 4,096" in capsys.readouterr().out


@pytest.mark.parametrize("eos", EOS_TOKENS)
def test_the_end_of_text_is_found_under_usual_names(eos: str, tmp_path: Path) -> None:
    path = save_words(tmp_path / "t.json", {"a": 0, "b": 1}, ["<pad>", eos])
    assert (load_tokenizer(path).eos_token, load_tokenizer(path).eos_id) == (eos, 3)


def test_the_end_of_text_can_be_named(tmp_path: Path) -> None:
    path = save_words(tmp_path / "t.json", {"a": 0}, ["</s>", "[END]"])
    assert load_tokenizer(path, "[END]").eos_id == 2
    with pytest.raises(UserError, match=r"no token '\[EN\]' \(did you mean '\[END\]'\?\)"):
        load_tokenizer(path, "[EN]")
    path = save_words(tmp_path / "t.json", {"a": 0}, ["[END]"])
    with pytest.raises(UserError, match=r"no end-of-text token of a usual name .* --eos-token"):
        load_tokenizer(path)


def test_gaps_in_the_ids_count_towards_the_vocabulary(tmp_path: Path) -> None:
    assert load_tokenizer(save_words(tmp_path / "t.json", {"a": 0, "</s>": 9}, [])).vocabulary_size == 10


def test_stored_truncation_and_padding_are_off(tokenizer_path: Path, tmp_path: Path) -> None:
    stored = Tokenizer.from_file(str(tokenizer_path))
    stored.enable_truncation(4)
    stored.enable_padding(length=64)
    stored.save(str(tmp_path / "t.json"))
    text = "Variance grows with depth unless something holds it back."
    assert load_tokenizer(tmp_path / "t.json").encode(text) == load_tokenizer(tokenizer_path).encode(text)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "cut.json").write_text('{"model": {')
    for name, reason in {
        "absent.json": "cannot be read",
        "": "cannot be read",
        "config.json": "is not a tokenizer.json",
        "cut.json": "is not valid JSON",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            load_tokenizer(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_gpt_neox(shared_data: Path) -> None:
    neox = load_tokenizer(shared_data / "gpt-neox-20b" / "tokenizer.json")
    assert (neox.vocabulary_size, neox.eos_token, neox.eos_id) == (50277, "<|endoftext|>", 0)
    ids = neox.encode("Call me  Ishmael.<|endoftext|>")
    assert ids.count(0) == 1
    assert neox.decode(ids[:-1]) == "Call me  Ishmael.<|endoftext|>"


def test_megatron_builds_the_tokenizer(tokenizer: TextTokenizer) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    arguments = SimpleNamespace(
        **megatron_tokenizer_arguments(tokenizer),
        pad_vocab_size=True,
        padded_vocab_size=None,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=2,
        rank=0,
    )
    built = build_tokenizer(arguments)
    assert (built.vocab_size, built.eod) == (400, 0)
    assert arguments.padded_vocab_size == 512
