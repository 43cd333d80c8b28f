"""Incremental detokenising against decoding at once, and stop strings against searching the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine.detokenizer import REPLACEMENT, IncrementalDetokenizer, StopChecker, TokenPieces
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.tokenizers_for_tests import write_byte_fallback, write_byte_level, write_metaspace

UNICODE = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("中国的首都是北京😀👩‍👧é ")), max_size=40
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def byte_level(folder: Path) -> Tokenizer:
    return Tokenizer(write_byte_level(folder / "byte_level"))


@pytest.fixture(scope="module")
def byte_fallback(folder: Path) -> Tokenizer:
    return Tokenizer(write_byte_fallback(folder / "byte_fallback"))


@pytest.fixture(scope="module")
def metaspace(folder: Path) -> Tokenizer:
    return Tokenizer(write_metaspace(folder / "metaspace"))


class Windowed:
    """The same tokenizer without its byte form: the slow twin of the fast path."""

    pieces: TokenPieces | None = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.special_token_ids = tokenizer.special_token_ids
        self.decode = tokenizer.decode


def increments(
    tokenizer: Tokenizer | Windowed, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True
) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, prompt, skip)
    pieces = [stream.append([token]) for token in ids]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    assert stream.finish() == ""
    return pieces


@given(text=UNICODE)
@settings(max_examples=150, deadline=None)
def test_increments_of_any_text_add_up_to_it_and_split_no_character(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    for tokenizer in (byte_level, Windowed(byte_level)):
        pieces = increments(tokenizer, ids)
        assert "".join(pieces) == text
        if REPLACEMENT not in text:
            assert not any(REPLACEMENT in piece for piece in pieces)


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_increments_of_random_ids_add_up_to_decoding_them_at_once(
    byte_level: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    # Past the vocabulary too: a padded one has ids without a token.
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 2), max_size=40))
    expected = byte_level.decode(ids, skip)
    assert "".join(increments(byte_level, ids, skip=skip)) == expected
    assert "".join(increments(Windowed(byte_level), ids, skip=skip)) == expected


@given(text=UNICODE)
@settings(max_examples=100, deadline=None)
def test_byte_fallback_increments_add_up_to_decoding_at_once(byte_fallback: Tokenizer, text: str) -> None:
    ids = byte_fallback.encode(text)
    for tokenizer in (byte_fallback, Windowed(byte_fallback)):
        assert "".join(increments(tokenizer, ids)) == byte_fallback.decode(ids) == text


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_byte_fallback_counts_open_bytes_as_the_decoder_does(byte_fallback: Tokenizer, data: st.DataObject) -> None:
    """Characters cut anywhere, between words: each run of bytes is valid, or the start of one character."""
    runs = data.draw(st.lists(st.sampled_from([[3 + b for b in "😀".encode()[:n]] for n in range(5)]), max_size=6))
    the, space = byte_fallback.encode("the")[-1:], byte_fallback.encode("a  ", add_special_tokens=False)[-1:]
    ids = [token for run in runs for token in [*run, *data.draw(st.sampled_from([the, space]))]]
    assert "".join(increments(byte_fallback, ids)) == byte_fallback.decode(ids)


@given(ids=st.lists(st.integers(0, 9), max_size=20))
@settings(max_examples=100, deadline=None)
def test_a_decoder_of_no_byte_form_is_decoded_through_the_window(metaspace: Tokenizer, ids: list[int]) -> None:
    assert metaspace.pieces is None
    assert "".join(increments(metaspace, ids)) == metaspace.decode(ids)


def test_a_character_of_several_tokens_comes_out_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a𐀀b", add_special_tokens=False)
    assert len(ids) == 6
    assert increments(byte_level, ids) == ["a", "", "", "", "𐀀", "b", ""]


def test_a_character_that_stays_open_ends_as_replacement(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a𐀀", add_special_tokens=False)[:-1]
    assert increments(byte_level, ids)[-1] == REPLACEMENT
    assert byte_level.decode(ids) == "a" + REPLACEMENT


@pytest.mark.parametrize("windowed", [False, True])
def test_text_goes_on_where_the_prompt_ended(byte_fallback: Tokenizer, windowed: bool) -> None:
    tokenizer = Windowed(byte_fallback) if windowed else byte_fallback
    the = byte_fallback.encode("the", add_special_tokens=False)
    assert increments(tokenizer, the, prompt=the)[0] == " the"
    assert increments(tokenizer, the)[0] == "the"
    bos = [1]  # skipped, so nothing stands in front
    assert increments(tokenizer, the, prompt=bos)[0] == "the"
    open_character = [3 + byte for byte in "中".encode()]
    assert increments(tokenizer, open_character[2:], prompt=the + open_character[:2])[0] == "中"


def test_a_run_of_garbage_costs_no_more_than_its_length(byte_level: Tokenizer) -> None:
    """Text that always ends in U+FFFD must not be decoded again and again from its start."""
    lone = byte_level.encode("𐀀", add_special_tokens=False)[-1:]
    windowed = IncrementalDetokenizer(Windowed(byte_level), [])
    first = [windowed.append(lone) for _ in range(200)]
    assert "".join(first).startswith(REPLACEMENT * 64)


def test_special_tokens_are_skipped_or_shown(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|im_end|>b")
    assert "".join(increments(byte_level, ids)) == "ab"
    assert "".join(increments(byte_level, ids, skip=False)) == "a<|im_end|>b"


# --- stop strings ---


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


def first_match(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    text=st.text("ab中", max_size=24),
    stops=st.lists(st.text("ab中", min_size=1, max_size=5), max_size=4),
    sizes=st.lists(st.integers(0, 4), max_size=12),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], sizes: list[int]) -> None:
    checker = StopChecker(stops)
    emitted = ""
    seen = ""
    for piece in cut(text, sizes):
        seen += piece
        new, matched = checker.feed(piece)
        emitted += new
        if matched:
            break
        # Exactly what may still become a stop string is held back.
        held = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
        assert emitted == seen[: len(seen) - held]
    else:
        emitted += checker.flush()
    assert (emitted, checker.matched) == first_match(text, stops)


def test_a_stop_string_split_over_tokens_is_not_emitted(byte_level: Tokenizer) -> None:
    checker, stream = StopChecker(["首都"]), IncrementalDetokenizer(byte_level, [])
    out = "".join(checker.feed(stream.append([token]))[0] for token in byte_level.encode("中国的首都是"))
    assert (out, checker.matched) == ("中国的", "首都")
    assert checker.feed("more") == ("", "首都")


def test_a_long_stop_string_costs_little_for_each_character() -> None:
    """The naive search for the held-back tail is quadratic in the stop string."""
    checker = StopChecker(["a" * 1023 + "b"] * 16)
    for _ in range(40):
        checker.feed("a" * 100)
    assert checker.matched is None
    assert len(checker.flush()) == 1023
