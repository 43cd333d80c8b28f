"""The routes: what each reads of a request, and what it answers; knows neither sockets nor how a token is made."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response

from configs.errors import RequestError
from launch.server.bodies import JsonRoute
from launch.server.chat import prepare_chat, tokenize_chat
from launch.server.echo import Echo
from launch.server.engine import Engine
from launch.server.errors import model_not_found
from launch.server.formats import ChatFormat, CompletionFormat
from launch.server.generation import respond, resume
from launch.server.health import Condition, condition_of
from launch.server.page import shown_view
from launch.server.peers import ask_others, is_from_peer
from launch.server.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    check_num_sequences,
    num_outputs,
)
from launch.server.tokens import AbortRequest, GenerateRequest, TokensFormat
from nanoengine.tokenizer import Tokenizer
from nanoengine.version import __version__

router = APIRouter(route_class=JsonRoute)
_STARTED = int(time.time())


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


def _serving(request: Request, model: str | None) -> Engine:
    """The engine, when it serves this model right now, full queue or not. Raises ApiError 404 or 503."""
    engine = _engine(request)
    served = engine.config.served_model_name
    if model is not None and model != served:
        raise model_not_found(model, served)
    condition = _condition(request)
    if condition.state.request == 503:
        raise condition.error()
    return engine


def _condition(request: Request) -> Condition:
    return condition_of(_engine(request), request.app.state.lifecycle)


def _tokenizer(engine: Engine, param: str) -> Tokenizer:
    if engine.tokenizer is None:
        raise RequestError(
            "this server runs without a tokenizer (skip_tokenizer_init): send token ids to /v1/completions", param
        )
    return engine.tokenizer


# -- generation -------------------------------------------------------------------------------------------------


@router.post("/v1/completions")
async def create_completion(request: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
    """Continue one or several prompts."""
    engine = _serving(request, body.model)
    body.check()
    params, prompts = body.params(engine.config.default_sampling), body.prompts()
    check_num_sequences(len(prompts), params)
    engine.check_queue(len(prompts))
    echo = await _echo(engine, body, prompts) if body.echo else None
    if isinstance(prompts[0], str):
        # In a thread: a long text takes milliseconds, which every open stream would wait.
        prompts = await asyncio.to_thread(_tokenizer(engine, "prompt").encode_batch, prompts)
    answer_id = f"cmpl-{request.state.request_id}"
    answer = CompletionFormat(
        answer_id,
        engine.config.served_model_name,
        len(prompts),
        num_outputs(params),
        bool(body.return_token_ids),
        body.include_usage,
        echo=echo,
        usage_in_chunks=body.usage_in_chunks,
    )
    with body.own_words():
        return await respond(
            request, engine, body.salted(prompts), params, answer_id, answer, bool(body.stream), body.scheduling()
        )


async def _echo(engine: Engine, body: CompletionRequest, prompts: list[str] | list[list[int]]) -> Echo:
    """The prompts as they are shown in front of their answers: texts as they came, token ids decoded."""
    tokenizer = _tokenizer(engine, "echo")

    def texts() -> list[str]:
        try:
            return [each if isinstance(each, str) else tokenizer.decode(each, False) for each in prompts]
        except RequestError as error:
            raise RequestError(error.message, "prompt", error.code) from None

    return Echo(await asyncio.to_thread(texts), tokenizer.token_text, body.echo_alone, body.logprobs)


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: Annotated[ChatCompletionRequest, Body()]) -> Response:
    """Answer a conversation."""
    engine = _serving(request, body.model)
    body.check()
    params, tokenizer = body.params(engine.config.default_sampling), _tokenizer(engine, "messages")
    engine.check_queue()
    chat = await asyncio.to_thread(prepare_chat, body, tokenizer, engine.config.server, params)
    answer_id = f"chatcmpl-{request.state.request_id}"
    answer = ChatFormat(
        answer_id,
        engine.config.served_model_name,
        1,
        num_outputs(params),
        bool(body.return_token_ids),
        body.include_usage,
        tokenizer.token_bytes,
        body.top_logprobs or 0,
        chat.echo,
        body.usage_in_chunks,
        reader=chat.reader,
    )
    prompts = body.salted([chat.prompt_token_ids])
    with chat.own_words():
        return await respond(
            request, engine, prompts, chat.params, answer_id, answer, bool(body.stream), body.scheduling()
        )


@router.post("/generate")
async def generate(request: Request, body: Annotated[GenerateRequest, Body()]) -> Response:
    """Continue one prompt of token ids, with token ids."""
    engine = _serving(request, body.model)
    params, prompt = body.params(engine.config.default_sampling), body.prompt()
    engine.check_queue()
    answer_id = f"gen-{request.state.request_id}"
    answer = TokensFormat(answer_id, engine.config.served_model_name, 1, params.n, True, False)
    return await respond(request, engine, [prompt], params, answer_id, answer, bool(body.stream), body.scheduling())


@router.post("/abort")
async def abort(request: Request, body: Annotated[AbortRequest, Body()]) -> dict[str, list[str]]:
    """End requests: they answer what they have, with finish_reason "abort". Tells which of them were open here.

    Ids that are unknown, or ended meanwhile, are no error. Under --api-server-count those of other front ends end too.
    """
    names = body.names()
    return {"aborted": await _engine(request).abort_named(names)}


@router.get("/v1/streams/{stream_id}")
async def resume_stream(request: Request, stream_id: str, last_event_id: str | None = None) -> Response:
    """Go on with a stream that was asked for with `X-Stream-Resume: 1`, behind the event named by Last-Event-ID."""
    return await resume(request, stream_id, last_event_id)


# -- models -----------------------------------------------------------------------------------------------------


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_model_card(_engine(request))]}


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """The model, by name."""
    engine = _engine(request)
    if model != engine.config.served_model_name:
        raise model_not_found(model, engine.config.served_model_name)
    return _model_card(engine)


def _model_card(engine: Engine) -> dict[str, Any]:
    return {
        "id": engine.config.served_model_name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "nanoengine",
        "root": engine.config.model.model,
        "max_model_len": engine.config.max_model_len,
    }


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> dict[str, str]:
    """Forget every cached prefix; what runs is not disturbed."""
    await _serving(request, None).reset_prefix_cache()
    return {"status": "reset"}


# -- probes -----------------------------------------------------------------------------------------------------


@router.get("/health")
@router.get("/readyz")
async def health(request: Request) -> JSONResponse:
    """200 while the engine serves, 503 while it loads, recovers or is dead, or the server drains. Queues no work."""
    condition = _condition(request)
    if condition.state.probe != 200:
        return condition.error().response()
    return JSONResponse({"status": condition.state.code})


@router.get("/livez")
async def live() -> dict[str, str]:
    """200 as long as this process answers."""
    return {"status": "alive"}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Requests in the engine, of all front ends together: all, those with a token already, those that wait for one."""
    engine = _engine(request)
    total, waiting = engine.num_unfinished, engine.num_queued
    front_dir = request.app.state.front_dir
    if front_dir is not None and not is_from_peer(request.scope):
        for other in await ask_others(request, front_dir):
            total, waiting = total + other["server_load"], waiting + other["waiting"]
    return {"server_load": total, "running": total - waiting, "waiting": waiting}


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of nanoengine."""
    return {"version": __version__}


@router.get("/engine/state")
async def engine_state(request: Request) -> dict[str, Any]:
    """What goes on in the engine: sequences, totals, a map of the K/V blocks, and this process's recent latencies.

    Told while the server drains, too: that is when somebody wants to know what is left.
    """
    engine = _engine(request)
    if not engine.is_ready:
        raise _condition(request).error()
    return shown_view(await engine.engine_view(), engine.config)


# -- tokens -----------------------------------------------------------------------------------------------------


@router.post("/tokenize")
async def tokenize(request: Request, body: Annotated[TokenizeRequest, Body()]) -> dict[str, Any]:
    """The token ids of a prompt, or of a conversation with the chat template around it."""
    engine = _serving(request, body.model)
    body.check()
    tokenizer = _tokenizer(engine, "prompt" if body.messages is None else "messages")
    if body.messages is None:
        assert body.prompt is not None
        ids = await asyncio.to_thread(tokenizer.encode, body.prompt, body.add_special_tokens is not False)
    else:
        ids = await asyncio.to_thread(tokenize_chat, body, tokenizer)
    strings = [tokenizer.token(token) for token in ids] if body.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": engine.config.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


@router.post("/detokenize")
async def detokenize(request: Request, body: Annotated[DetokenizeRequest, Body()]) -> dict[str, str]:
    """The text of token ids, special tokens shown."""
    engine = _serving(request, body.model)
    body.refuse_unsupported()
    tokenizer = _tokenizer(engine, "tokens")
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)}
