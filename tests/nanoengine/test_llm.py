"""The blocking client against a scheduler that follows a script: order, errors, interrupts, leaving."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import CapacityError, ConfigError, EngineDeadError, RequestError, UnknownModelError, to_wire
from nanoengine.beam_params import BeamSearchParams
from nanoengine.llm import LLM
from nanoengine.llm_engine import LLMEngine
from nanoengine.messages import Abort, AddRequest, Deltas, EngineFailure, Message, TokenDelta
from nanoengine.progress import Progress
from nanoengine.sampling_params import SamplingParams
from tests.nanoengine import fake_engine
from tests.nanoengine.fake_engine import (
    ENDLESS,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    FakeEngineProcess,
    expected,
    invented_tokens,
)
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("fake_process")
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def llm(model: str, settings: dict[str, Any], fake_process: None) -> Iterator[LLM]:
    with LLM(model, **settings) as llm:
        yield llm


# -- generate --------------------------------------------------------------------------------------------------


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [[n, n + 1] for n in range(40)]
    params = [SamplingParams(max_tokens=1 + n * 7 % 13) for n in range(40)]  # so that they end in another order
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == prompts
    for output, prompt, each in zip(outputs, prompts, params, strict=True):
        assert each.max_tokens is not None
        assert output.outputs[0].token_ids == expected(prompt, each.max_tokens)
        assert output.outputs[0].finish_reason == "length"
        assert output.finished


@pytest.mark.parametrize(
    ("prompts", "ids"),
    [
        ([1, 2, 3], [[1, 2, 3]]),
        ((1, 2, 3), [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ({"prompt_token_ids": [4]}, [[4]]),
        ([{"prompt_token_ids": [4], "prompt": "four"}, [5]], [[4], [5]]),
        ([], []),
    ],
)
def test_a_prompt_of_ids_may_be_written_in_each_form(llm: LLM, prompts: Any, ids: list[list[int]]) -> None:
    assert [output.prompt_token_ids for output in llm.generate(prompts, use_tqdm=False)] == ids


def test_a_prompt_of_text_is_encoded_and_its_answer_decoded(llm: LLM, process: FakeEngineProcess) -> None:
    tokenizer = llm.get_tokenizer()
    process.tokens_of = lambda request: tokenizer.encode("北京。 and more")[: request.params["max_tokens"]]
    for prompt in ("中国的首都是", {"prompt": "中国的首都是"}):
        [output] = llm.generate(prompt, use_tqdm=False)
        assert output.prompt == "中国的首都是"
        assert output.prompt_token_ids == tokenizer.encode("中国的首都是")
        assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)


def test_a_stop_string_frees_the_scheduler_too(llm: LLM, process: FakeEngineProcess) -> None:
    ids = [llm.get_tokenizer().encode(char)[0] for char in "abcdef"] * 9
    process.tokens_of = lambda request: ids
    [output] = llm.generate("x", SamplingParams(stop="cd", max_tokens=50), use_tqdm=False)
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("ab", "cd")
    llm.generate("x", SamplingParams(stop="a"), use_tqdm=False)  # by now the abort has arrived
    assert next(abort.reason for abort in process.aborted) == "stop"


@pytest.mark.parametrize(
    ("prompts", "param", "words"),
    [
        ([[1], [VOCAB_SIZE]], "prompt", "^prompt 1: .*from 0 to"),
        ([[1], []], "prompt", "^prompt 1: .*at least 1 token"),
        ([[1], [1] * MAX_MODEL_LEN], "prompt", "^prompt 1: .*at most"),
        ([[1], [2.5]], "prompt", "^prompt 1: token ids must be ints"),
        ([[1], [True]], "prompt", "^prompt 1: token ids must be ints"),
        ([[1], None], "prompt", "^prompt 1: a prompt must be text"),
        ([1.5, 2], "prompt", "^token ids must be ints"),
        ([1, "x"], "prompt", "^token ids must be ints"),
        (7, "prompt", "^a prompt must be text"),
        ("", "prompt", "^the prompt must hold"),
        ({"prompt": 3}, "prompt", "^prompt must be text"),
        ({"prompt_token_ids": "3"}, "prompt", "^prompt_token_ids must be a list"),
        ({"text": "x"}, "prompt", "unknown key 'text'"),
        ({}, "prompt", "must hold prompt or prompt_token_ids"),
    ],
)
def test_a_bad_prompt_is_named_and_none_is_submitted(
    llm: LLM, process: FakeEngineProcess, prompts: Any, param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        llm.generate(prompts, use_tqdm=False)
    assert refused.value.param == param
    llm.generate([1], use_tqdm=False)
    assert len(process.added) == 1, "a part of a refused batch was submitted"


@pytest.mark.parametrize("params", [[SamplingParams()], [SamplingParams()] * 3, [SamplingParams(), {}], {}, "x"])
def test_parameters_that_do_not_fit_the_prompts_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError) as refused:
        llm.generate([[1], [2]], params, use_tqdm=False)
    assert refused.value.param == "sampling_params"


def test_beam_search_and_generate_refuse_each_others_parameters(llm: LLM) -> None:
    with pytest.raises(RequestError, match="params must be a BeamSearchParams, got SamplingParams"):
        llm.beam_search([[1]], SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="must be one for all prompts or one for each, got 3 for 2"):
        llm.beam_search([[1], [2]], [BeamSearchParams()] * 3)
    with pytest.raises(RequestError, match="sampling_params must be a SamplingParams; beam_search takes"):
        llm.generate([1], BeamSearchParams())  # type: ignore[arg-type]


def test_a_request_that_fails_does_not_stop_the_others(llm: LLM, process: FakeEngineProcess) -> None:
    def script(request: AddRequest) -> list[Message]:
        if request.prompt_token_ids == [2]:
            error = to_wire(RequestError("can never fit the K/V cache"))
            return [Deltas(1, [TokenDelta(request.request_id, 0, 0, [], "error", error=error)])]
        return [Deltas(1, [TokenDelta(request.request_id, 0, 0, [7], "length")])]

    process.script = script
    good, bad, other = llm.generate([[1], [2], [3]], use_tqdm=False)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].error) == ("error", "can never fit the K/V cache")
    assert good.outputs[0].token_ids == other.outputs[0].token_ids == [7]


def test_the_same_seed_reaches_the_scheduler_in_every_run(model: str) -> None:
    seeds = []
    for _ in range(2):
        with LLM(model) as llm:
            llm.generate([[1], [1]], use_tqdm=False)
            seeds.append([request.seed for request in FakeEngineProcess.made[-1].added])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2, "samples of one prompt must differ"


# -- death and interrupts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"max_restarts": 0}])
@pytest.mark.parametrize("how", ["process", "message"])
def test_when_the_engine_dies_finished_answers_stay_and_later_calls_raise(
    llm: LLM, process: FakeEngineProcess, how: str
) -> None:
    process.tokens_per_step = 4
    process.tokens_of = lambda request: ENDLESS[:4] if request.prompt_token_ids == [1] else ENDLESS
    steps = itertools.count(1)

    def end() -> None:
        if len(process.added) < 2 or next(steps) != 3:  # the first request has had its end by then
            return
        if how == "process":
            process.die("killed by signal 9")
        else:
            process.inject(EngineFailure(1, to_wire(CapacityError("out of killed blocks"))))

    process.on_step = end
    done, cut = llm.generate([[1], [2]], SamplingParams(max_tokens=50), use_tqdm=False)
    assert (done.outputs[0].finish_reason, done.outputs[0].token_ids) == ("length", [5] * 4)
    assert cut.outputs[0].finish_reason == "error"
    assert "killed" in str(cut.outputs[0].error)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="killed"):
            llm.generate([1], use_tqdm=False)
    with pytest.raises(EngineDeadError, match="killed"):
        llm.add_request([1])


@pytest.mark.parametrize("settings", [{"max_restarts": 0}])
def test_an_engine_that_died_while_idle_is_noticed_by_the_next_call(llm: LLM, process: FakeEngineProcess) -> None:
    process.die()
    assert isinstance(llm._engine, LLMEngine)
    keeper = llm._engine._keeper
    until(lambda: keeper.look().is_final)  # its thread looks at once
    with pytest.raises(EngineDeadError, match="signal 9"):
        llm.generate([1], use_tqdm=False)


def test_a_malformed_message_ends_the_engine_instead_of_hanging(llm: LLM, process: FakeEngineProcess) -> None:
    process.hold.set()
    process.inject(Abort("x", None, "a scheduler never says that"))
    [output] = llm.generate([1], use_tqdm=False)
    assert output.outputs[0].finish_reason == "error"


def test_an_interrupt_aborts_what_is_open_and_leaves_the_engine_usable(llm: LLM, process: FakeEngineProcess) -> None:
    process.tokens_of = lambda request: ENDLESS
    ours, steps = threading.get_ident(), itertools.count(1)

    def interrupt() -> None:
        if len(process.added) == 2 and next(steps) == 20:
            signal.pthread_kill(ours, signal.SIGINT)

    process.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], SamplingParams(max_tokens=50), use_tqdm=False)
    process.on_step, process.tokens_of = None, invented_tokens
    [output] = llm.generate([3], use_tqdm=False)
    assert output.outputs[0].token_ids == expected([3])
    assert {abort.request_id for abort in process.aborted} == {request.request_id for request in process.added[:2]}


# -- one request at a time -------------------------------------------------------------------------------------


def test_step_brings_what_arrived_since_the_last_call(llm: LLM) -> None:
    names = [llm.add_request([n], SamplingParams(max_tokens=5)) for n in range(3)]
    lengths: dict[str, list[int]] = {name: [] for name in names}
    last = {}
    while llm.has_unfinished_requests():
        outputs = llm.step()
        assert outputs
        for output in outputs:
            lengths[output.request_id].append(len(output.outputs[0].token_ids))
            last[output.request_id] = output
    for n, name in enumerate(names):
        assert lengths[name] == sorted(set(lengths[name])), "an output came twice"
        assert last[name].finished
        assert last[name].outputs[0].token_ids == expected([n], 5)
    assert llm.step() == []


def test_step_returns_in_time_when_nothing_comes(llm: LLM, process: FakeEngineProcess) -> None:
    process.hold.set()
    llm.add_request([1])
    assert llm.step(timeout=0) == []
    assert llm.step(timeout=0.05) == []
    process.hold.clear()
    assert llm.step(timeout=5)


def test_generate_leaves_requests_alone_that_were_added_before(llm: LLM, process: FakeEngineProcess) -> None:
    name = llm.add_request([9], SamplingParams(max_tokens=3), request_id="mine")
    assert [output.prompt_token_ids for output in llm.generate([[1], [2]], use_tqdm=False)] == [[1], [2]]
    process.hold.set()
    outputs = []
    while llm.has_unfinished_requests():
        outputs += llm.step()
    assert {output.request_id for output in outputs} == {name}
    assert outputs[-1].outputs[0].token_ids == expected([9], 3)


@pytest.mark.parametrize("hold", [True, False])
def test_an_aborted_request_comes_back_as_such(llm: LLM, process: FakeEngineProcess, hold: bool) -> None:
    if hold:
        process.hold.set()
    process.tokens_of = lambda request: ENDLESS
    name = llm.add_request([1], SamplingParams(max_tokens=50))
    if not hold:
        llm.step()
    llm.abort(name)
    llm.abort(name)
    llm.abort("unknown")
    [output] = llm.step()
    assert output.outputs[0].finish_reason == "abort"
    assert not llm.has_unfinished_requests()


def test_an_id_is_refused_until_its_last_output_was_fetched(llm: LLM) -> None:
    llm.add_request([1], SamplingParams(max_tokens=1), request_id="a")
    with pytest.raises(RequestError, match="still runs"):
        llm.add_request([1], request_id="a")
    llm.generate([2], use_tqdm=False)  # brings the news of "a" along
    with pytest.raises(RequestError, match="still runs"):
        llm.add_request([1], request_id="a")
    while llm.has_unfinished_requests():
        llm.step()
    llm.add_request([1], request_id="a")


# -- chat ------------------------------------------------------------------------------------------------------


def test_chat_renders_the_template_and_encodes_it_without_adding_tokens(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    [output] = llm.chat(MESSAGES, use_tqdm=False)
    assert output.prompt == tokenizer.render_chat(MESSAGES)
    assert output.prompt_token_ids == tokenizer.apply_chat_template(MESSAGES)
    [bare] = llm.chat(MESSAGES, use_tqdm=False, add_generation_prompt=False)
    assert str(output.prompt).startswith(str(bare.prompt))
    assert len(str(bare.prompt)) < len(str(output.prompt))


def test_several_conversations_are_answered_in_order(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": f"{n}"}] for n in range(3)]
    outputs = llm.chat(conversations, SamplingParams(max_tokens=1), use_tqdm=False)
    assert [output.prompt for output in outputs] == [llm.get_tokenizer().render_chat(each) for each in conversations]


@pytest.mark.parametrize("messages", [[], "hello", [[]], ["hello"], [{"content": "x"}], [MESSAGES, "x"]])
def test_a_malformed_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError) as refused:
        llm.chat(messages, use_tqdm=False)
    assert refused.value.param == "messages"


# -- start and end ---------------------------------------------------------------------------------------------


def test_close_twice_and_after_the_with_block_is_harmless(model: str) -> None:
    with LLM(model) as llm:
        llm.close()
        llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([1], use_tqdm=False)
    assert llm.step() == []


def test_open_requests_end_when_the_engine_is_closed(llm: LLM, process: FakeEngineProcess) -> None:
    process.hold.set()
    llm.add_request([1])
    llm.close()
    [output] = llm.step()
    assert output.outputs[0].finish_reason == "error"


def test_a_forgotten_engine_ends_its_process(model: str) -> None:
    llm = LLM(model)
    assert FakeEngineProcess.made[-1].stops == 0
    del llm
    assert FakeEngineProcess.made[-1].stops == 1


def test_two_engines_at_once_and_one_after_the_other_do_not_meet(model: str) -> None:
    with LLM(model) as first, LLM(model) as second:
        one, two = FakeEngineProcess.made
        assert first.generate([1], use_tqdm=False)[0].outputs[0].token_ids == expected([1])
        assert second.generate([2], use_tqdm=False)[0].outputs[0].token_ids == expected([2])
        assert (len(one.added), len(two.added)) == (1, 1)
        first.close()
        assert second.generate([3], use_tqdm=False)[0].finished
    with LLM(model) as third:
        assert third.generate([4], use_tqdm=False)[0].finished


@pytest.mark.parametrize("error", [CapacityError("more memory than there is"), KeyboardInterrupt()])
def test_a_start_that_fails_says_why_and_leaves_no_process(
    model: str, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(FakeEngineProcess, "start_error", error)
    with pytest.raises(type(error)):
        LLM(model)
    assert FakeEngineProcess.made[-1].stops >= 1


def test_an_engine_that_dies_before_it_answers_the_greeting_is_reported(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: FakeEngineProcess) -> None:
        self.is_mute = True
        original(self)
        self.die("exit code 1")

    original = FakeEngineProcess.start
    monkeypatch.setattr(FakeEngineProcess, "start", start)
    with pytest.raises(EngineDeadError, match="exit code 1"):
        LLM(model)


def test_an_engine_that_never_answers_the_greeting_is_given_up(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoengine.llm_engine.GREETING_TIMEOUT", 0.3)
    monkeypatch.setattr(FakeEngineProcess, "_take", lambda *_: None)
    with pytest.raises(Exception, match="did not answer a greeting"):
        LLM(model)
    assert FakeEngineProcess.made[-1].stops >= 1


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": "no-such-model"}, UnknownModelError, "demo"),
        ({"no_such_setting": 1}, ConfigError, "no_such_setting"),
        ({"block_size": 0}, ConfigError, "block_size"),
        ({"api_key": "x"}, ConfigError, "base_url"),
        ({"base_url": "http://127.0.0.1:1", "block_size": 4}, ConfigError, "block_size"),
        ({"base_url": "ftp://127.0.0.1"}, ConfigError, "base_url"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_a_process_starts(
    model: str, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        LLM(**({"model": model} | settings))
    assert not FakeEngineProcess.made


def test_without_a_tokenizer_ids_go_in_and_out_and_text_is_refused(model: str) -> None:
    with LLM(model, skip_tokenizer_init=True) as llm:
        assert llm.tokenizer is None
        [output] = llm.generate([1, 2], use_tqdm=False)
        assert (output.outputs[0].token_ids, output.outputs[0].text) == (expected([1, 2]), "")
        for call in (lambda: llm.generate("x"), lambda: llm.chat(MESSAGES)):
            with pytest.raises(RequestError, match="skip_tokenizer_init"):
                call()


# -- progress --------------------------------------------------------------------------------------------------


def test_the_bar_shows_both_speeds_and_is_quiet_when_asked(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate([[1], [2]], use_tqdm=False)
    assert capfd.readouterr() == ("", "")
    llm.generate([[1], [2]])
    shown = capfd.readouterr().err
    assert "2/2" in shown
    assert "prefill" in shown
    assert "decode" in shown


def test_progress_counts_each_prompt_and_each_token_once() -> None:
    class Request:
        finished = False
        num_prompt_tokens = 10
        num_generated_tokens = 0

    requests = [Request(), Request()]
    with Progress(2, enabled=False) as progress:
        for request, tokens in itertools.product(requests, (0, 1, 1, 4)):
            request.num_generated_tokens = tokens
            request.finished = tokens == 4
            progress.update(request)
    assert (progress.num_prefilled, progress.num_decoded, progress.num_finished) == (20, 8, 2)


def test_the_fake_model_has_no_weights(model: str) -> None:
    assert not list(Path(model).glob("*.safetensors"))
    assert fake_engine.VOCAB_SIZE > 343
