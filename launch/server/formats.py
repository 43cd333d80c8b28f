"""The two shapes of an answer, completion and chat completion, whole and in chunks; knows no engine and no transport.

One object serves one request. It keeps what was sent of each choice, since the engine's outputs are cumulative.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from nanoengine.outputs import RequestOutput


class AnswerFormat:
    """What both shapes share. A request of several prompts has one choice for each, in their order."""

    object_name = ""
    chunk_name = ""

    def __init__(self, answer_id: str, model: str, num_prompts: int, with_ids: bool, with_usage: bool) -> None:
        self._base: dict[str, Any] = {"id": answer_id, "created": int(time.time()), "model": model}
        self._with_ids, self._with_usage = with_ids, with_usage
        self._latest: list[RequestOutput | None] = [None] * num_prompts
        self._sent_chars = [0] * num_prompts
        self._sent_ids = [0] * num_prompts

    # -- whole --------------------------------------------------------------------------------------------------

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The answer as one object."""
        self._latest = list(outputs)
        choices = []
        for index, output in enumerate(outputs):
            last = output.outputs[0]
            choice = {"index": index, **self._whole_text(last.text), "logprobs": None}
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
        choice: dict[str, Any] = {"index": index, **self._new_text(text), "logprobs": None}
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
        if text or ids or last.finish_reason is not None:
            yield self._chunk([choice])

    def usage_chunk(self) -> dict[str, Any] | None:
        """The last chunk of a stream that asked for counts."""
        return self._chunk([]) | {"usage": self.usage()} if self._with_usage else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._base, "object": self.chunk_name, "choices": choices}
        if self._with_usage:
            chunk["usage"] = None
        return chunk

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

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _new_text(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatFormat(AnswerFormat):
    """`chat.completion`; the first chunk of a choice names the role."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _new_text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _opening(self, index: int) -> Iterator[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
