"""The two shapes of an answer, completion and chat completion, whole and in chunks; knows no engine and no transport.

One object serves one request. It keeps what was sent of each choice, since the engine's outputs are cumulative.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from nanoengine.outputs import CompletionOutput, Logprob, RequestOutput

# JSON has no infinity; OpenAI and vLLM send this for what can hardly come.
LEAST_LOGPROB = -9999.0


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
    ) -> None:
        self._base: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": model}
        self._with_ids, self._with_usage = with_ids, with_usage
        self._num_outputs = num_outputs
        self._latest: list[RequestOutput | None] = [None] * num_prompts
        self._sent = [_Sent() for _ in range(num_prompts * num_outputs)]
        self._token_bytes = token_bytes  # None without a tokenizer
        self._num_top = num_top_logprobs

    # -- whole --------------------------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The answer as one object."""
        self._latest = list(outputs)
        choices = []
        for number, output in enumerate(outputs):
            for each in output.outputs:
                index = number * self._num_outputs + each.index
                choice = {"index": index, **self._whole_text(each.text)}
                choice["logprobs"] = self._new_logprobs(each, self._sent[index])
                choice |= {"finish_reason": each.finish_reason, "stop_reason": each.stop_reason}
                if self._with_ids:
                    choice |= {"token_ids": each.token_ids, "prompt_token_ids": output.prompt_token_ids}
                choices.append(choice)
        return {**self._base, "object": self.object_name, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts over all prompts, each counted once, and all that was generated for them."""
        known = [output for output in self._latest if output is not None]
        prompt = sum(len(output.prompt_token_ids) for output in known)
        completion = sum(output.metrics.num_completion_tokens for output in known)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in known)},
        }

    # -- in chunks ----------------------------------------------------------------------------------------------

    def chunks(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What an output of prompt `number` adds to its choices: for each no chunk, or one or two."""
        self._latest[number] = output
        for each in output.outputs:
            index = number * self._num_outputs + each.index
            yield from self._choice_chunks(index, each, output.prompt_token_ids)

    def _choice_chunks(
        self, index: int, output: CompletionOutput, prompt_token_ids: list[int]
    ) -> Iterator[dict[str, Any]]:
        sent = self._sent[index]
        if sent.ended:
            return
        text, ids, is_first = output.text[sent.chars :], output.token_ids[sent.ids :], not sent.begun
        if not text and not ids and output.finish_reason is None:
            return  # one of the others has news
        sent.begun, sent.ended = True, output.finish_reason is not None
        sent.chars += len(text)
        sent.ids += len(ids)
        choice: dict[str, Any] = {"index": index, **self._new_text(text)}
        choice["logprobs"] = self._new_logprobs(output, sent)
        choice["finish_reason"] = output.finish_reason
        if sent.ended:
            choice["stop_reason"] = output.stop_reason
        if self._with_ids:
            choice["token_ids"] = ids
            if is_first:
                choice["prompt_token_ids"] = prompt_token_ids
        if is_first:
            yield from self._opening(index)
        if text or (ids and self._with_ids) or choice["logprobs"] or sent.ended:
            yield self._chunk([choice])

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last chunk of a stream that asked for counts."""
        return self._chunk([]) | {"usage": self.usage()} if self._with_usage else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._base, "object": self.chunk_name, "choices": choices}
        if self._with_usage:
            chunk["usage"] = None
        return chunk

    def _new_logprobs(self, output: CompletionOutput, sent: _Sent) -> dict[str, Any] | None:
        """The log-probabilities that were not sent yet; None when there are none."""
        if output.logprobs is None:
            return None
        first = sent.logprobs
        entries = list(zip(output.token_ids[first:], output.logprobs[first:], strict=True))
        sent.logprobs += len(entries)
        return self._show_logprobs(entries, sent) if entries or not first else None

    def _show_logprobs(self, entries: list[tuple[int, dict[int, Logprob]]], sent: _Sent) -> dict[str, Any]:
        raise NotImplementedError

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        """Chunks in front of the first text of a choice."""
        return iter(())

    def _whole_text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _new_text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFormat(AnswerFormat):
    """`text_completion`, which is the name of its chunks too."""

    object_name = chunk_name = "text_completion"

    def _show_logprobs(self, entries: list[tuple[int, dict[int, Logprob]]], sent: _Sent) -> dict[str, Any]:
        """Parallel lists. A token's offset counts the characters of the tokens before it."""
        shown: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, logprobs in entries:
            text = _token_text(token_id, logprobs.get(token_id))
            shown["tokens"].append(text)
            shown["token_logprobs"].append(_finite(logprobs.get(token_id)))
            top: dict[str, float] = {}
            for each, logprob in sorted(logprobs.items(), key=lambda item: item[1].rank):
                top.setdefault(_token_text(each, logprob), _finite(logprob))
            shown["top_logprobs"].append(top)
            shown["text_offset"].append(sent.offset)
            sent.offset += len(text)
        return shown

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _new_text(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatFormat(AnswerFormat):
    """`chat.completion`; the first chunk of a choice names the role."""

    object_name = "chat.completion"

    def _show_logprobs(self, entries: list[tuple[int, dict[int, Logprob]]], sent: _Sent) -> dict[str, Any]:
        content = []
        for token_id, logprobs in entries:
            likeliest = sorted(logprobs.items(), key=lambda item: item[1].rank)[: self._num_top]
            shown = self._show_token(token_id, logprobs.get(token_id))
            content.append(shown | {"top_logprobs": [self._show_token(*each) for each in likeliest]})
        return {"content": content, "refusal": None}

    def _show_token(self, token_id: int, logprob: Logprob | None) -> dict[str, Any]:
        raw = None if self._token_bytes is None else list(self._token_bytes(token_id))
        return {"token": _token_text(token_id, logprob), "logprob": _finite(logprob), "bytes": raw}

    chunk_name = "chat.completion.chunk"

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _new_text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])


def _token_text(token_id: int, logprob: Logprob | None) -> str:
    """A token's text, or its id where nobody knows the text."""
    if logprob is None or logprob.decoded_token is None:
        return f"token_id:{token_id}"
    return logprob.decoded_token


def _finite(logprob: Logprob | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob.logprob, LEAST_LOGPROB)
