"""The two shapes of an answer, completion and chat completion, whole and in chunks; knows no engine and no transport.

One object serves one request. It keeps what was sent of each choice, since the engine's outputs are cumulative.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from launch.server.chat_output import ChatReader, ReaderFactory, message_of
from launch.server.echo import LEAST_LOGPROB, Echo, TokenEntry, show_entries
from nanoengine.outputs import CompletionOutput, Logprob, RequestOutput


@dataclasses.dataclass(slots=True)
class _Sent:
    """What was sent of a choice. `offset` counts the characters of its tokens whose log-probabilities were sent."""

    begun: bool = False
    ended: bool = False
    chars: int = 0
    ids: int = 0
    logprobs: int = 0
    offset: int = 0


class AnswerFormat:
    """What both shapes share. Each prompt has `num_outputs` choices; they follow each other in the prompts' order."""

    object_name = ""
    chunk_name = ""
    no_text: Mapping[str, Any] = {}  # what a choice shows that has no new text

    def __init__(
        self,
        answer_id: str,
        model: str,
        num_prompts: int,
        num_outputs: int,
        with_ids: bool,
        with_usage: bool,
        token_bytes: Callable[[int], bytes] | None = None,
        num_top_logprobs: int = 0,
        echo: Echo | None = None,
        usage_in_chunks: bool = False,
    ) -> None:
        self._base: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": model}
        self._with_ids, self._with_usage = with_ids, with_usage
        self._num_outputs = num_outputs
        self._latest: list[RequestOutput | None] = [None] * num_prompts
        self._sent = [_Sent() for _ in range(num_prompts * num_outputs)]
        self._token_bytes = token_bytes  # None without a tokenizer
        self._num_top = num_top_logprobs
        self._echo = echo
        self._usage_in_chunks = usage_in_chunks

    # -- whole --------------------------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The answer as one object."""
        outputs = [self._echoed(number, output) for number, output in enumerate(outputs)]
        self._latest = list(outputs)
        choices = []
        for number, output in enumerate(outputs):
            for each in output.outputs:
                index = number * self._num_outputs + each.index
                choice = {"index": index, **self._whole_text(index, each)}
                self._add_logprobs(choice, output, each, self._sent[index])
                choice |= {
                    "finish_reason": self._finish_reason(index, each.finish_reason),
                    "stop_reason": each.stop_reason,
                }
                if self._with_ids:
                    choice |= {"token_ids": each.token_ids, "prompt_token_ids": output.prompt_token_ids}
                choices.append(choice | self._prompt_of_choice(output))
        prompt = self._prompt_of_answer(outputs[0])
        return {**self._base, "object": self.object_name, "choices": choices, "usage": self.usage(), **prompt}

    def usage(self) -> dict[str, Any]:
        """Token counts over all prompts, each counted once, and all that was generated for them."""
        known = [output for output in self._latest if output is not None]
        prompt = sum(len(output.prompt_token_ids) for output in known)
        # Alone, an echo shows none of what was generated.
        alone = self._echo is not None and self._echo.alone
        completion = 0 if alone else sum(output.metrics.num_completion_tokens for output in known)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in known)},
        }

    # -- in chunks ----------------------------------------------------------------------------------------------

    def chunks(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What an output of prompt `number` adds to its choices: for each none, one or several chunks."""
        if not output.finished and not any(each.token_ids for each in output.outputs):
            return  # some of its prompt was told of, as far as it is computed
        output = self._latest[number] = self._echoed(number, output)
        for each in output.outputs:
            yield from self._choice_chunks(number * self._num_outputs + each.index, output, each)

    def _choice_chunks(self, index: int, output: RequestOutput, each: CompletionOutput) -> Iterator[dict[str, Any]]:
        sent = self._sent[index]
        if sent.ended:
            return
        text, ids, is_first = each.text[sent.chars :], each.token_ids[sent.ids :], not sent.begun
        if not text and not ids and each.finish_reason is None:
            return  # one of the others has news
        sent.ended = each.finish_reason is not None
        sent.chars += len(text)
        sent.ids += len(ids)
        parts = self._new_parts(index, text, sent.ended)
        choice: dict[str, Any] = {"index": index, **(parts.pop() if parts else self.no_text)}
        has_text = any(choice[name] for name in self.no_text)
        self._add_logprobs(choice, output, each, sent)
        sent.begun = True
        choice["finish_reason"] = self._finish_reason(index, each.finish_reason)
        if sent.ended:
            choice["stop_reason"] = each.stop_reason
        if self._with_ids:
            choice["token_ids"] = ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        prompt = self._prompt_of_choice(output) if is_first else {}
        choice |= prompt
        if is_first:
            yield from self._opening(index, output)
        for part in parts:
            yield self._chunk([{"index": index, **part, "logprobs": None, "finish_reason": None}])
        if has_text or (ids and self._with_ids) or choice["logprobs"] or prompt or sent.ended:
            yield self._chunk([choice])

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last chunk of a stream that asked for counts."""
        return self._chunk([]) | {"usage": self.usage()} if self._with_usage else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._base, "object": self.chunk_name, "choices": choices}
        if self._with_usage:
            chunk["usage"] = self.usage() if self._usage_in_chunks else None
        return chunk

    def _add_logprobs(self, choice: dict[str, Any], output: RequestOutput, each: CompletionOutput, sent: _Sent) -> None:
        """Give a choice the log-probabilities that were not sent yet; null when there are none.

        OpenAI's shapes name a token by its text. `output_logprobs`, beside the ids where these are asked for, names it
        by id, as vLLM's `prompt_logprobs` does.
        """
        choice["logprobs"] = None
        if each.logprobs is None:
            return
        first = sent.logprobs
        new: list[TokenEntry] = list(zip(each.token_ids[first:], each.logprobs[first:], strict=True))
        sent.logprobs += len(new)
        prompt = [] if sent.begun or self._echo is None else self._echo.entries(output)
        if prompt or new or not first:
            choice["logprobs"] = self._show_logprobs([*prompt, *new], sent)
        if self._with_ids:
            choice["output_logprobs"] = show_entries([entry for _, entry in new])

    def _echoed(self, number: int, output: RequestOutput) -> RequestOutput:
        return output if self._echo is None else self._echo.applied(number, output)

    def _prompt_of_choice(self, output: RequestOutput) -> dict[str, Any]:
        """Log-probabilities of the prompt where vLLM puts them for this shape: beside each choice, or …"""
        return {}

    def _prompt_of_answer(self, output: RequestOutput) -> dict[str, Any]:
        """… once, beside all choices."""
        return {}

    def _show_logprobs(self, entries: list[TokenEntry], sent: _Sent) -> dict[str, Any]:
        raise NotImplementedError

    def _opening(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """Chunks in front of the first text of a choice."""
        return iter(())

    def _whole_text(self, index: int, each: CompletionOutput) -> dict[str, Any]:
        raise NotImplementedError

    def _new_parts(self, index: int, text: str, last: bool) -> list[dict[str, Any]]:
        """What further text adds to a choice, each for a chunk of its own."""
        raise NotImplementedError

    def _finish_reason(self, index: int, reason: str | None) -> str | None:
        return reason


class CompletionFormat(AnswerFormat):
    """`text_completion`, which is the name of its chunks too."""

    object_name = chunk_name = "text_completion"
    no_text: Mapping[str, Any] = {"text": ""}

    def _show_logprobs(self, entries: list[TokenEntry], sent: _Sent) -> dict[str, Any]:
        """Parallel lists. A token's offset counts the characters of the tokens before it."""
        shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, logprobs in entries:
            if logprobs is None:
                assert self._echo is not None
                text = self._echo.token_text(token_id)
                chosen = top = None
            else:
                text = _token_text(token_id, logprobs.get(token_id))
                chosen, top = _finite(logprobs.get(token_id)), _by_text(logprobs)
            shown["tokens"].append(text)
            shown["token_logprobs"].append(chosen)
            shown["top_logprobs"].append(top)
            shown["text_offset"].append(sent.offset)
            sent.offset += len(text)
        return shown

    def _prompt_of_choice(self, output: RequestOutput) -> dict[str, Any]:
        return _prompt_logprobs(output)

    def _whole_text(self, index: int, each: CompletionOutput) -> dict[str, Any]:
        return {"text": each.text}

    def _new_parts(self, index: int, text: str, last: bool) -> list[dict[str, Any]]:
        return [{"text": text}] if text else []


class ChatFormat(AnswerFormat):
    """`chat.completion`; the first chunk of a choice names the role. `reader` makes what reads a choice's text."""

    object_name = "chat.completion"
    no_text: Mapping[str, Any] = {"delta": {}}

    def __init__(self, *args: Any, reader: ReaderFactory, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._make_reader = reader
        self._readers: dict[int, ChatReader] = {}

    def _show_logprobs(self, entries: list[TokenEntry], sent: _Sent) -> dict[str, Any]:
        content = []
        for token_id, logprobs in entries:
            assert logprobs is not None, "a chat shows none of its prompt's"
            likeliest = sorted(logprobs.items(), key=lambda item: item[1].rank)[: self._num_top]
            shown = self._show_token(token_id, logprobs.get(token_id))
            content.append(shown | {"top_logprobs": [self._show_token(*each) for each in likeliest]})
        return {"content": content, "refusal": None}

    def _show_token(self, token_id: int, logprob: Logprob | None) -> dict[str, Any]:
        raw = None if self._token_bytes is None else list(self._token_bytes(token_id))
        return {"token": _token_text(token_id, logprob), "logprob": _finite(logprob), "bytes": raw}

    chunk_name = "chat.completion.chunk"

    def _whole_text(self, index: int, each: CompletionOutput) -> dict[str, Any]:
        # A call that max_tokens cut off is a call, as it is in a stream.
        return {"message": message_of(self._reader(index, each.finish_reason == "length").feed(each.text, True))}

    def _new_parts(self, index: int, text: str, last: bool) -> list[dict[str, Any]]:
        return [{"delta": delta} for delta in self._reader(index, True).feed(text, last)]

    def _finish_reason(self, index: int, reason: str | None) -> str | None:
        return self._readers[index].finish_reason(reason)

    def _reader(self, index: int, eager: bool) -> ChatReader:
        if index not in self._readers:
            self._readers[index] = self._make_reader(eager)
        return self._readers[index]

    def _prompt_of_answer(self, output: RequestOutput) -> dict[str, Any]:
        return _prompt_logprobs(output)

    def _opening(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        chunk = self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        yield chunk if index else chunk | self._prompt_of_answer(output)


def _prompt_logprobs(output: RequestOutput) -> dict[str, Any]:
    return {} if output.prompt_logprobs is None else {"prompt_logprobs": show_entries(output.prompt_logprobs)}


def _by_text(logprobs: dict[int, Logprob]) -> dict[str, float]:
    """The likeliest first; of tokens with the same text the likeliest is shown."""
    top: dict[str, float] = {}
    for token_id, logprob in sorted(logprobs.items(), key=lambda item: item[1].rank):
        top.setdefault(_token_text(token_id, logprob), _finite(logprob))
    return top


def _token_text(token_id: int, logprob: Logprob | None) -> str:
    """A token's text, or its id where nobody knows the text."""
    if logprob is None or logprob.decoded_token is None:
        return f"token_id:{token_id}"
    return logprob.decoded_token


def _finite(logprob: Logprob | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob.logprob, LEAST_LOGPROB)
