"""The two shapes of an answer, completion and chat completion, whole and in chunks; knows no engine and no transport.

One object serves one request. It keeps what was sent of each choice, since the engine's outputs are cumulative.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from nanoengine.outputs import CompletionOutput, Logprob, RequestOutput

# JSON has no infinity; OpenAI and vLLM send this for what can hardly come.
LEAST_LOGPROB = -9999.0


class AnswerFormat:
    """What both shapes share. A request of several prompts has one choice for each, in their order."""

    object_name = ""
    chunk_name = ""

    def __init__(
        self,
        answer_id: str,
        model: str,
        num_prompts: int,
        with_ids: bool,
        with_usage: bool,
        token_bytes: Callable[[int], bytes] | None = None,
        num_top_logprobs: int = 0,
    ) -> None:
        self._base: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": model}
        self._with_ids, self._with_usage = with_ids, with_usage
        self._latest: list[RequestOutput | None] = [None] * num_prompts
        self._sent_chars = [0] * num_prompts
        self._sent_ids = [0] * num_prompts
        self._sent_logprobs = [0] * num_prompts
        self._token_bytes = token_bytes  # None without a tokenizer
        self._num_top = num_top_logprobs

    # -- whole --------------------------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The answer as one object."""
        self._latest = list(outputs)
        choices = []
        for index, output in enumerate(outputs):
            last = output.outputs[0]
            choice = {"index": index, **self._whole_text(last.text), "logprobs": self._new_logprobs(index, last)}
            choice |= {"finish_reason": last.finish_reason, "stop_reason": last.stop_reason}
            if self._with_ids:
                choice |= {"token_ids": last.token_ids, "prompt_token_ids": output.prompt_token_ids}
            choices.append(choice)
        return {**self._base, "object": self.object_name, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts over all prompts."""
        known = [output for output in self._latest if output is not None]
        prompt = sum(len(output.prompt_token_ids) for output in known)
        completion = sum(len(output.outputs[0].token_ids) for output in known)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in known)},
        }

    # -- in chunks ----------------------------------------------------------------------------------------------

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What an output adds to its choice: no chunk, or one or two."""
        is_first = self._latest[index] is None
        self._latest[index] = output
        last = output.outputs[0]
        text = last.text[self._sent_chars[index] :]
        self._sent_chars[index] += len(text)
        choice: dict[str, Any] = {"index": index, **self._new_text(text), "logprobs": self._new_logprobs(index, last)}
        choice["finish_reason"] = last.finish_reason
        if last.finish_reason is not None:
            choice["stop_reason"] = last.stop_reason
        ids: list[int] = []
        if self._with_ids:
            ids = last.token_ids[self._sent_ids[index] :]
            self._sent_ids[index] += len(ids)
            choice["token_ids"] = ids
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if is_first:
            yield from self._opening(index)
        if text or ids or choice["logprobs"] or last.finish_reason is not None:
            yield self._chunk([choice])

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last chunk of a stream that asked for counts."""
        return self._chunk([]) | {"usage": self.usage()} if self._with_usage else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._base, "object": self.chunk_name, "choices": choices}
        if self._with_usage:
            chunk["usage"] = None
        return chunk

    def _new_logprobs(self, index: int, output: CompletionOutput) -> dict[str, Any] | None:
        """The log-probabilities that were not sent yet; None when there are none."""
        if output.logprobs is None:
            return None
        first = self._sent_logprobs[index]
        entries = list(zip(output.token_ids, output.logprobs, strict=True))[first:]
        self._sent_logprobs[index] += len(entries)
        return self._show_logprobs(index, entries) if entries or not first else None

    def _show_logprobs(self, index: int, entries: list[tuple[int, dict[int, Logprob]]]) -> dict[str, Any]:
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

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._offsets = [0] * len(self._latest)

    def _show_logprobs(self, index: int, entries: list[tuple[int, dict[int, Logprob]]]) -> dict[str, Any]:
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
            shown["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(text)
        return shown

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _new_text(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatFormat(AnswerFormat):
    """`chat.completion`; the first chunk of a choice names the role."""

    object_name = "chat.completion"

    def _show_logprobs(self, index: int, entries: list[tuple[int, dict[int, Logprob]]]) -> dict[str, Any]:
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
