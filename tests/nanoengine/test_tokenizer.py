"""The tokenizer against transformers' own, its chat templates, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import RequestError, TokenizerError
from configs.registry import load_model_path
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.tokenizers_for_tests import TEMPLATE, write_byte_fallback, write_byte_level, write_metaspace

MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is the capital of 中国? <|im_end|> 😀"},
    {"role": "assistant", "content": "北京", "tool_calls": None},
    {"role": "user", "content": "  Thanks!\n"},
]
TEXTS = ["", " ", "中国的首都是", "a<|im_end|>b <|im_start|>", "two words, naïve\n\n\tx", "😀👩‍👩‍👧", "<s>the  the</s>"]


def demo(folder: Path) -> Path:
    path = Path(load_model_path("demo"))
    if not (path / "tokenizer.json").is_file():
        pytest.skip("the demo model is not there yet")
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "demo": demo,
    "byte_level": lambda folder: write_byte_level(folder / "byte_level"),
    "byte_fallback": lambda folder: write_byte_fallback(folder / "byte_fallback", chat_template=TEMPLATE),
    "metaspace": lambda folder: write_metaspace(folder / "metaspace", chat_template=TEMPLATE),
    "explicit_no_bos": lambda folder: write_byte_level(folder / "no_bos", add_bos_token=False),
    "bos_and_eos": lambda folder: write_byte_level(
        folder / "bos_and_eos", bos_token="<|endoftext|>", add_bos_token=True, add_eos_token=True
    ),
    "tokens_only_in_config": lambda folder: write_byte_level(
        folder / "extra", bos_token="<bos>", additional_special_tokens=["<extra>"],
        added_tokens_decoder={"343": {"content": "two words", "special": True}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tokenizer, Any]]:
    """Ours and transformers' tokenizer of a kind, made once."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, tuple[Tokenizer, Any]] = {}

    def get(kind: str) -> tuple[Tokenizer, Any]:
        if kind not in made:
            path = KINDS[kind](folder)
            made[kind] = Tokenizer(path), AutoTokenizer.from_pretrained(path)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_ids_text_and_special_tokens_equal_transformers(
    pairs: Callable[[str], tuple[Tokenizer, Any]], kind: str
) -> None:
    ours, theirs = pairs(kind)
    for text in [*TEXTS, "<extra><bos>"]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [theirs.encode(text) for text in TEXTS]
    assert ours.special_token_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_token_id == (theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id)


@pytest.mark.parametrize("kind", ["demo", "byte_level", "byte_fallback"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chat_prompts_equal_transformers(
    pairs: Callable[[str], tuple[Tokenizer, Any]], kind: str, generation_prompt: bool
) -> None:
    ours, theirs = pairs(kind)
    asked: dict[str, Any] = {"add_generation_prompt": generation_prompt}
    assert ours.render_chat(MESSAGES, **asked) == theirs.apply_chat_template(MESSAGES, tokenize=False, **asked)
    assert ours.apply_chat_template(MESSAGES, **asked) == theirs.apply_chat_template(
        MESSAGES, return_dict=False, **asked
    )


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_encoding_and_equals_transformers(
    pairs: Callable[[str], tuple[Tokenizer, Any]], text: str
) -> None:
    ours, theirs = pairs("byte_level")
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == text


TEMPLATES = {
    "whitespace": "{% for m in messages %}\n    {% if true %}\n  {{ m.role }}\n    {% endif %}\n{% endfor %}\nend\n",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "specials": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ undefined_name }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "variables": "{{ enable_thinking }} {{ tools is none }} {{ documents is none }}",
    "null": "{{ messages[2].tool_calls is defined }}",
    "year": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_transformers_renders_them(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    path = write_byte_level(tmp_path, chat_template=TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert Tokenizer(path).render_chat(MESSAGES, enable_thinking=False) == expected


def test_a_template_file_wins_and_named_templates_are_understood(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    path = write_byte_level(tmp_path, chat_template=named)
    assert Tokenizer(path).render_chat(MESSAGES) == "plain"
    assert Tokenizer(path).render_chat(MESSAGES, tools=[{"type": "function"}]) == "tools"
    (path / "chat_template.jinja").write_text("file")
    assert Tokenizer(path).render_chat(MESSAGES) == "file"


@pytest.mark.parametrize(
    ("template", "kind", "message"),
    [
        ("{{ raise_exception('only users may speak') }}", RequestError, "only users may speak"),
        ("{{ messages[9].content + 1 }}", RequestError, "messages"),
        ("{{ 1 / 0 }}", RequestError, "ZeroDivisionError"),
        ("{% if %}", TokenizerError, "malformed"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", TokenizerError, "refused"),
        ("{{ messages.append(1) }}", TokenizerError, "refused"),
        (None, TokenizerError, "no default chat template"),
        ([{"name": "tool_use", "template": "x"}], TokenizerError, "tool_use"),
    ],
)
def test_a_template_that_fails_says_why(tmp_path: Path, template: object, kind: type[Exception], message: str) -> None:
    tokenizer = Tokenizer(write_byte_level(tmp_path, chat_template=template))
    with pytest.raises(kind, match=message):
        tokenizer.render_chat(MESSAGES)


def test_an_empty_conversation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one message"):
        Tokenizer(write_byte_level(tmp_path)).render_chat([])


def test_padding_is_on_the_left_with_the_pad_token_or_eos(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_level(tmp_path / "a"))
    pad = tokenizer.encode("<|endoftext|>")[0]
    assert tokenizer.pad([[5], [6, 7, 8], []]) == [[pad, pad, 5], [6, 7, 8], [pad] * 3]
    without = Tokenizer(write_byte_level(tmp_path / "b", pad_token=None))
    assert without.pad([[5], [6, 7]]) == [[without.eos_token_id, 5], [6, 7]]
    neither = Tokenizer(write_byte_level(tmp_path / "c", pad_token=None, eos_token=None))
    with pytest.raises(TokenizerError, match="neither a pad token"):
        neither.pad([[5], [6, 7]])


def test_a_vocabulary_larger_than_the_models_is_reported(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path)
    size = Tokenizer(path).vocab_size
    Tokenizer(path, expected_vocab_size=size)
    Tokenizer(path, expected_vocab_size=size + 100)  # a padded vocabulary
    with pytest.raises(TokenizerError, match=f"ids up to {size - 1}.*has {size - 1} tokens"):
        Tokenizer(path, expected_vocab_size=size - 1)


def test_slow_mode_goes_through_transformers_and_says_the_same(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path)
    fast, slow = Tokenizer(path), Tokenizer(path, tokenizer_mode="slow")
    assert slow.pieces is None
    for text in TEXTS:
        assert slow.encode(text) == fast.encode(text)
        assert slow.decode(fast.encode(text)) == fast.decode(fast.encode(text))
    assert slow.render_chat(MESSAGES) == fast.render_chat(MESSAGES)
    assert slow.special_token_ids <= fast.special_token_ids
    assert (slow.eos_token_id, slow.pad_token_id, slow.vocab_size) == (
        fast.eos_token_id,
        fast.pad_token_id,
        fast.vocab_size,
    )


def test_a_directory_without_a_tokenizer_points_at_the_setting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for mode in ("auto", "slow"):
        with pytest.raises(TokenizerError, match="skip_tokenizer_init"):
            Tokenizer(tmp_path, tokenizer_mode=mode)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_malformed_file_is_named(tmp_path: Path, name: str) -> None:
    path = write_byte_level(tmp_path)
    (path / name).write_text("{ not json")
    with pytest.raises(TokenizerError, match=name):
        Tokenizer(path)


def test_baked_in_truncation_and_padding_leave_prompts_alone(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path)
    data = json.loads((path / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("a text of several tokens")) == "a text of several tokens"


def test_what_is_no_text_or_no_id_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_level(tmp_path))
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("half a pair: \ud83d")
    for ids in ([-1], [2**40], ["a"], [1.5]):
        with pytest.raises(RequestError, match="token ids must be"):
            tokenizer.decode(ids)  # type: ignore[arg-type]


def test_the_fast_path_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path)
    code = (
        "import sys; from nanoengine.tokenizer import Tokenizer; t = Tokenizer(sys.argv[1]);"
        "t.apply_chat_template([{'role': 'user', 'content': 'hi'}]);"
        "sys.exit(str([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]) if 'torch' in sys.modules"
        " or 'transformers' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
