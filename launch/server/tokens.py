"""`/generate` and `/abort`: what may be sent, and the answer in token ids; knows no engine and no transport.

For programs that hold token ids themselves (reinforcement learning, evaluation, a gateway with its own tokenizer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from configs.errors import RequestError
from launch.server.echo import show_entries
from launch.server.formats import AnswerFormat
from launch.server.schema import Body, refuse_unsupported
from nanoengine.outputs import CompletionOutput, RequestOutput
from nanoengine.prompts import PromptInput, check_cache_salt
from nanoengine.sampling_params import SamplingParams

MAX_ABORT_IDS = 1024
# What a client's own id is made to in the answers of the generating routes.
ANSWER_PREFIXES = ("cmpl-", "chatcmpl-", "gen-")


class GenerateRequest(Body):
    """POST /generate. `input_ids` is SGLang's name for `prompt_token_ids`."""

    model: str | None = None
    prompt_token_ids: list[int] | None = None
    input_ids: list[int] | None = None
    sampling_params: dict[str, Any] | None = None
    stream: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout: float | None = None

    def prompt(self) -> PromptInput:
        """The prompt. Raises RequestError unless it is given once."""
        if (self.prompt_token_ids is None) == (self.input_ids is None):
            raise RequestError(
                "send the prompt as a list of token ids: either prompt_token_ids or input_ids", "prompt_token_ids"
            )
        ids = self.prompt_token_ids if self.input_ids is None else self.input_ids
        return {"prompt_token_ids": ids, "cache_salt": check_cache_salt(self.cache_salt) or None}

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """`sampling_params` are those of SamplingParams, by their names; text is made only when `detokenize` is true.

        Raises RequestError for an unknown name or an impossible value.
        """
        refuse_unsupported(self.model_extra or {}, {})
        try:
            params = SamplingParams.from_dict({**defaults, "detokenize": False, **(self.sampling_params or {})})
        except RequestError as error:
            raise RequestError(error.message, f"sampling_params.{error.param}", error.code) from None
        if self.stream and params.ranks_candidates:
            raise RequestError(
                f"best_of must be n ({params.n}) in a stream, since the best are known only at the end, "
                f"got {params.best_of}", "sampling_params.best_of",
            )  # fmt: skip
        return params

    def scheduling(self) -> dict[str, Any]:
        """Further arguments of `Engine.generate`, where they are given."""
        given = {"priority": self.priority, "timeout": self.timeout}
        return {name: value for name, value in given.items() if value is not None}


class AbortRequest(Body):
    """POST /abort: the ids of answers, or of requests as clients named them; or everything."""

    request_id: str | list[str] | None = None
    abort_all: bool | None = None

    def names(self) -> list[str] | None:
        """What ids the answers may have; None for all. Raises RequestError unless it says what to end."""
        refuse_unsupported(self.model_extra or {}, {})
        if (self.request_id is None) != bool(self.abort_all):
            raise RequestError("send either request_id, one or a list of them, or abort_all: true", "request_id")
        if self.request_id is None:
            return None
        ids = [self.request_id] if isinstance(self.request_id, str) else self.request_id
        if not 0 < len(ids) <= MAX_ABORT_IDS:
            raise RequestError(f"request_id must be 1 to {MAX_ABORT_IDS} ids, got {len(ids)}", "request_id")
        return [*ids, *(prefix + each for each in ids for prefix in ANSWER_PREFIXES)]


class TokensFormat(AnswerFormat):
    """One prompt's outputs as ids, whole or as what is new of them."""

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The answer as one object."""
        self._latest = list(outputs)
        return self._answer(outputs[0], [self._shown(each, 0, 0) for each in outputs[0].outputs])

    def chunks(self, number: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """One event with what is new of each output; the last one has the counts."""
        if not output.finished and not any(each.token_ids for each in output.outputs):
            return  # some of its prompt was told of, as far as it is computed
        self._latest[number] = output
        new = []
        for each in output.outputs:
            sent = self._sent[each.index]
            if sent.ended or (len(each.token_ids) == sent.ids and not each.finished):
                continue
            new.append(self._shown(each, sent.ids, sent.chars))
            sent.ids, sent.chars, sent.ended = len(each.token_ids), len(each.text), each.finished
        if new or output.finished:
            yield self._answer(output, new)

    def usage_chunk(self) -> None:
        """There is none: the last event has the counts."""

    def _answer(self, output: RequestOutput, shown: list[dict[str, Any]]) -> dict[str, Any]:
        answer: dict[str, Any] = {"request_id": self._base["id"], "model": self._base["model"], "outputs": shown}
        if output.finished:
            answer["usage"] = self.usage()
            if output.prompt_logprobs is not None:
                answer["prompt_logprobs"] = show_entries(output.prompt_logprobs)
        return answer

    @staticmethod
    def _shown(each: CompletionOutput, num_ids: int, num_chars: int) -> dict[str, Any]:
        """An output behind so many ids and characters. Its text is left out where none is made."""
        shown: dict[str, Any] = {"index": each.index, "token_ids": each.token_ids[num_ids:]}
        if each.text:
            shown["text"] = each.text[num_chars:]
        if each.logprobs is not None:
            shown["logprobs"] = show_entries(each.logprobs[num_ids:])
        if each.finished:
            shown |= {"finish_reason": each.finish_reason, "stop_reason": each.stop_reason}
            if each.logprobs is not None:
                shown["cumulative_logprob"] = each.cumulative_logprob
        else:
            shown["finish_reason"] = None
        return shown
