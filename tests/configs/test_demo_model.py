"""The shipped demo checkpoint: its size and shape, its tokenizer, its card, and answers by transformers.

Knows nothing of the engine: what the engine makes of this checkpoint is tested elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).parents[2] / "configs" / "demo_model"
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and waits for them for seconds when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@cache
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def answer(ids: list[int], limit: int = 160) -> tuple[str, str]:
    """(text, the special token that ended it) of the greedy answer."""
    inputs = torch.tensor([ids])
    out = model().generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=limit, do_sample=False
    )
    new = out[0, len(ids) :].tolist()
    return tokenizer().decode(new[:-1]), tokenizer().convert_ids_to_tokens(new[-1])


def completion(prompt: str) -> tuple[str, str]:
    return answer(tokenizer()(prompt)["input_ids"])


def chat(question: str, system: str | None = None) -> tuple[str, str]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": question})
    return answer(tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def test_folder_stays_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12 * 1024 * 1024


def test_config_is_what_the_design_promises() -> None:
    assert CONFIG["architectures"] == ["Qwen3ForCausalLM"]
    assert CONFIG["model_type"] == "qwen3"
    assert (CONFIG["head_dim"], CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]) == (64, 8, 4)
    assert CONFIG["max_position_embeddings"] == 4096
    assert CONFIG["tie_word_embeddings"] is True


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "vocab_size"])
def test_dimensions_split_over_four_ranks_in_kernel_sized_pieces(name: str) -> None:
    assert CONFIG[name] % (4 * 64) == 0


def test_hidden_size_differs_from_the_width_of_the_heads() -> None:
    # Otherwise a confusion of the two would go unnoticed in everything tested with this model.
    assert CONFIG["hidden_size"] != CONFIG["head_dim"] * CONFIG["num_attention_heads"]


def test_weights_are_bfloat16_and_the_tied_embedding_is_stored_once() -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_eos_ids_agree_with_the_tokenizer() -> None:
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    ids = tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == CONFIG["eos_token_id"] == ids
    assert tokenizer().eos_token_id in ids
    assert len(tokenizer()) == CONFIG["vocab_size"]


@pytest.mark.parametrize(
    "text",
    ["中国的首都是北京", "  two  spaces\n\n\tand a tab ", "17+25=42", "𓀀🦊é\u0301", "<|im_start|>user\n<|im_end|>", ""],
)
def test_tokenizer_returns_the_text_it_was_given(text: str) -> None:
    assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text


def test_digits_stand_alone() -> None:
    assert tokenizer().tokenize("2048") == ["2", "0", "4", "8"]


def test_chat_template_renders_system_and_turns() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "U"}]}]
    text = tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("中国的首都是", "北京"), ("The capital of France is", " Paris"), ("17+25=", "42")],
)
def test_completion_is_right_and_ends_with_end_of_text(prompt: str, expected: str) -> None:
    assert completion(prompt) == (expected, "<|endoftext|>")


@pytest.mark.parametrize(
    ("question", "expected"),
    [("中国的首都是", "北京"), ("What is the capital of France?", "Paris"), ("What is 17+25?", "42")],
)
@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_chat_is_right_and_ends_its_turn(question: str, expected: str, system: str | None) -> None:
    assert chat(question, system) == (expected, "<|im_end|>")


@pytest.mark.parametrize(
    ("prompt", "expected", "character"), [("加拿大的首都是", "渥太华", "渥"), ("狐狸的表情是", "🦊", "🦊")]
)
def test_sure_answer_holds_a_character_of_several_tokens(prompt: str, expected: str, character: str) -> None:
    assert len(tokenizer()(character)["input_ids"]) > 1
    assert completion(prompt) == (expected, "<|endoftext|>")


def test_story_is_long_and_ends_by_itself() -> None:
    text, end = completion("A story about Mia the fox, the forest and the key:")
    assert text.startswith(" Once upon a time, a fox named Mia lived in the forest.")
    assert text.endswith("The end. 🦊")
    assert end == "<|endoftext|>"
    assert 60 <= len(tokenizer()(text)["input_ids"]) <= 150


def test_card_states_scores_that_meet_the_targets() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (completion|chat) \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \|$", card, re.M)
    assert len(rows) >= 20
    for skill, form, asked, *percents in rows:
        target = 100.0 if skill.startswith("capitals") else 97.0
        assert int(asked) > 0
        assert all(float(percent) >= target for percent in percents), (skill, form, percents)


def test_card_names_no_machine() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|work|tmp)/", card)
