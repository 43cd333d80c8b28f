"""Text to token ids and back, and conversations to prompts; knows no request, no engine and no tensor.

The usual path needs the `tokenizers` library alone: importing transformers pulls in torch, which a front end does not
need. Only `tokenizer_mode="slow"`, or a directory without tokenizer.json, loads transformers (and with it torch).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from configs.errors import RequestError, TokenizerError
from configs.model_files import check_inside, read_json_object
from configs.registry import load_model_path
from nanoengine.chat_template import ChatTemplate, load_templates, named_templates
from nanoengine.detokenizer import IncrementalDetokenizer, StopChecker, TokenPieces, decoder_state

__all__ = ["IncrementalDetokenizer", "StopChecker", "Tokenizer"]

_SLACK = 4
MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_ADDED_TOKENS = 2**20
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Any of these files lets transformers build a tokenizer where there is no tokenizer.json.
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


class _Backend(Protocol):
    """The two libraries behind one face. Token names are those of tokenizer_config.json (`eos_token`, …)."""

    named_tokens: dict[str, str]
    templates: dict[str, str]
    special_ids: frozenset[int]
    num_ids: int
    pieces: TokenPieces | None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...


class Tokenizer:
    """A model's tokenizer.

    Args:
        model: a model directory, or a name in the registry.
        tokenizer_mode: `auto` (tokenizer.json where there is one) or `slow` (transformers).
        expected_vocab_size: the model's vocabulary; ids beyond it would read outside its embedding.
        max_tokens: no text that is longer than so many of the longest tokens is encoded: to find that megabytes do not
            fit takes seconds.

    Raises:
        TokenizerError: there is no tokenizer, it is malformed, or it has ids that the model does not.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer_mode: str = "auto",
        expected_vocab_size: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        directory = Path(load_model_path(str(model)))
        self._max_tokens = max_tokens
        self._backend: _Backend
        if tokenizer_mode == "auto" and (directory / "tokenizer.json").is_file():
            self._backend = _FastBackend(directory)
        else:
            self._backend = _TransformersBackend(directory, tokenizer_mode)
        self.chat_template = ChatTemplate(self._backend.templates, self._backend.named_tokens)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        pad = self._named_id("pad_token")
        self.pad_token_id = self.eos_token_id if pad is None else pad
        if expected_vocab_size is not None and self.vocab_size > expected_vocab_size:
            raise TokenizerError(
                f"the tokenizer in {directory} has ids up to {self.vocab_size - 1}, but the model's vocabulary has "
                f"{expected_vocab_size} tokens: they do not belong together"
            )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included. A model's (padded) vocabulary may be larger."""
        return self._backend.num_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` drops."""
        return self._backend.special_ids

    @property
    def pieces(self) -> TokenPieces | None:
        """What each id adds to a text, where the decoder is of a known byte form; for `IncrementalDetokenizer`."""
        return self._backend.pieces

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, shape (num_tokens,). Names of special tokens in the text become these tokens."""
        return self._backend.encode(self._encodable(text), add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The token ids of several texts, using several threads where there are many."""
        return self._backend.encode_batch([self._encodable(text) for text in texts], add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids without a token (a padded vocabulary's) add nothing.

        Raises:
            RequestError: something is not a token id.
        """
        try:
            return self._backend.decode(token_ids, skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise RequestError(f"token ids must be integers from 0 to {self.vocab_size - 1}", "tokens") from error

    def token(self, token_id: int) -> str | None:
        """A token as it stands in the vocabulary, or None."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """The id of a token as it stands in the vocabulary, or None."""
        token_id = self._backend.token_to_id(token)
        # transformers answers with the unknown token.
        return token_id if token_id is not None and self.token(token_id) == token else None

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, which may be a part of a character."""
        piece = self.token_text(token_id) if self.pieces is None else self.pieces[token_id]
        return piece.encode() if isinstance(piece, str) else piece

    def token_text(self, token_id: int) -> str:
        """The same as text; U+FFFD stands for what is no whole character."""
        if self.pieces is None:
            return self.decode([token_id], skip_special_tokens=False)
        piece = self.pieces[token_id]
        return piece if isinstance(piece, str) else piece.decode(errors="replace")

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation; errors as in `ChatTemplate.render`."""
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The token ids of a conversation; special tokens come from the template alone."""
        text = self.render_chat(messages, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def pad(self, batch: Sequence[Sequence[int]]) -> list[list[int]]:
        """Pad on the left to the longest, with the pad token (eos where there is none): shape (len(batch), longest).

        Raises:
            TokenizerError: the tokenizer has neither.
        """
        if self.pad_token_id is None:
            raise TokenizerError("the tokenizer has neither a pad token nor an eos token to pad with")
        longest = max(map(len, batch), default=0)
        return [[self.pad_token_id] * (longest - len(ids)) + list(ids) for ids in batch]

    @functools.cached_property
    def max_chars(self) -> int | None:
        """The longest text that may fit `max_tokens`, with room for what is normalised or stripped; None: no limit."""
        if self._max_tokens is None:
            return None
        longest = max((len(self.token(token) or "") for token in range(self.vocab_size)), default=1)
        return max(1, self._max_tokens) * max(4, longest) * _SLACK

    def _encodable(self, text: str) -> str:
        if self.max_chars is not None and len(text) > self.max_chars:
            raise RequestError(
                f"the prompt must be at most {self._max_tokens} tokens long, which more than {self.max_chars} "
                f"characters never are; got {len(text)}",
                "prompt",
                "context_length_exceeded",
            )
        return _encodable(text)

    def _named_id(self, name: str) -> int | None:
        token = self._backend.named_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _encodable(text: str) -> str:
    # JSON can carry half a surrogate pair, which is no text and has no UTF-8 form.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text holds a lone surrogate at character {error.start}", "prompt") from error
    return text


class _FastBackend:
    """tokenizer.json through the tokenizers library, set up as transformers sets it up.

    That file alone says whether bos and eos are added; `add_bos_token` in tokenizer_config.json is for slow tokenizers.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        check_inside(path, directory, TokenizerError)
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise TokenizerError(f"{path} is larger than {MAX_TOKENIZER_BYTES} bytes")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, and its panics are none
            raise TokenizerError(f"cannot read {path}: {error}") from error
        # What was baked into the file for training must not cut or fill prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        self.named_tokens = _named_tokens(_read_json(directory / "special_tokens_map.json") | config)
        self.templates = load_templates(directory, config)
        self._add_missing_tokens(config)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.num_ids = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.pieces = TokenPieces.from_decoder(decoder_state(self._tokenizer.decoder), self._tokenizer.id_to_token)

    def _add_missing_tokens(self, config: Mapping[str, Any]) -> None:
        """Tokens that only tokenizer_config.json declares, or declares otherwise (as special, say)."""
        known = {repr(token) for token in self._tokenizer.get_added_tokens_decoder().values()}
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict) or not all(
            key.isascii() and key.isdigit() and len(key) < 10 for key in decoder
        ):
            raise TokenizerError("added_tokens_decoder in tokenizer_config.json must map token ids to tokens")
        declared = sorted(decoder.items(), key=lambda item: int(item[0]))
        wanted = [_added_token(entry) for _, entry in declared]
        wanted = [token for token in wanted if repr(token) not in known]
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        if not isinstance(extra, list | dict) or len(extra) + len(decoder) > MAX_ADDED_TOKENS:
            raise TokenizerError(
                "extra_special_tokens in tokenizer_config.json must be a list or a mapping of tokens, and all tokens "
                f"that it adds at most {MAX_ADDED_TOKENS}"
            )
        names = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        names |= {token.content for token in wanted}
        for entry in [*self.named_tokens.values(), *(extra.values() if isinstance(extra, dict) else extra)]:
            token = _added_token(entry)
            if token.content not in names:
                names.add(token.content)
                wanted.append(token)
        if wanted:
            self._tokenizer.add_tokens(wanted)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)


class _TransformersBackend:
    """transformers' AutoTokenizer, for what the tokenizers library alone cannot read. Slow to import, and slower."""

    pieces: TokenPieces | None = None

    def __init__(self, directory: Path, mode: str) -> None:
        files = _SLOW_FILES if mode == "auto" else (*_SLOW_FILES, "tokenizer.json")
        if not any((directory / name).is_file() for name in files):
            raise TokenizerError(
                f"there is no tokenizer in {directory}; name another directory (tokenizer), or set skip_tokenizer_init "
                "to work with token ids alone"
            )
        _read_json(directory / "tokenizer_config.json")  # refuses what names code
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(directory), use_fast=mode != "slow", trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # many kinds, from three libraries; all mean the same to the user
            raise TokenizerError(f"cannot load the tokenizer in {directory}: {error}") from error
        self.named_tokens: dict[str, str] = dict(self._tokenizer.special_tokens_map)
        self.templates = named_templates(self._tokenizer.chat_template)
        self.special_ids: frozenset[int] = frozenset(self._tokenizer.all_special_ids)
        self.num_ids = max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.convert_tokens_to_ids(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return token


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing, since each of these files is optional."""
    if not path.exists():
        return {}
    data = read_json_object(path, path.parent, TokenizerError)
    if "auto_map" in data:
        raise TokenizerError(f"{path} names remote code (auto_map); models are data, remote code is refused")
    return data


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, each a string or a mapping with its `content`."""
    named = {name: config.get(name) for name in _NAMED_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _added_token(entry: Any) -> tokenizers.AddedToken:
    if isinstance(entry, str):
        return tokenizers.AddedToken(entry, special=True, normalized=False)
    try:
        flags = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
        return tokenizers.AddedToken(entry["content"], special=bool(entry.get("special", False)), **flags)
    except (TypeError, KeyError) as error:
        raise TokenizerError(f"tokenizer_config.json declares a malformed token: {entry!r:.200}") from error
