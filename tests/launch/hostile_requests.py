"""Requests that nobody means well with: for each route what advisories of the field's servers were about, and the rest.

A case is what goes over the wire, so that lone surrogates, duplicate keys and broken encodings arrive as they are. Each
must be answered with a 4xx. The comments name the advisories that a group is modelled on.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GENERATE, ABORT = "/generate", "/abort"
POSTS = (COMPLETIONS, CHAT, "/tokenize", "/detokenize", GENERATE, ABORT)
GETS = ("/v1/models", "/load", "/health", "/livez", "/readyz", "/version", "/openapi.json")
MESSAGES = [{"role": "user", "content": "hi"}]
HUGE = 2**63
JSON = {"Content-Type": "application/json"}


class Case(NamedTuple):
    """One request."""

    name: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = JSON
    method: str = "POST"


def _body(path: str) -> dict[str, Any]:
    match path:
        case "/v1/completions":
            return {"prompt": "hi", "max_tokens": 4}
        case "/v1/chat/completions":
            return {"messages": MESSAGES, "max_tokens": 4}
        case "/tokenize":
            return {"prompt": "hi"}
        case "/generate":
            return {"prompt_token_ids": [1, 2], "sampling_params": {"max_tokens": 4}}
        case "/abort":
            return {"request_id": "somebody's"}
        case _:
            return {"tokens": [1, 2]}


def _case(name: str, path: str, **fields: Any) -> Case:
    return Case(f"{path} {name}", path, json.dumps(_body(path) | fields).encode())


# -- numbers: CVE-2026-34756 (n), CVE-2024-8939 (best_of), huge logprobs, max_tokens and their like --------------------

_NUMBERS: dict[str, tuple[Any, ...]] = {
    "n": (0, -1, 10**6, 2**31, HUGE, 10**30, 1.5, "2", True, [2]),
    "best_of": (0, -1, 10**6, HUGE, 1e308, "9"),
    "max_tokens": (-1, HUGE, 10**100, 1.5, "1", {}),
    "min_tokens": (-1, 10**9, HUGE),
    "temperature": (-1, "hot", [], float("inf"), float("nan")),
    "top_p": (-0.1, 1.1, float("nan"), float("-inf")),
    "top_k": (-2, 1.5, 10**40, "all"),
    "min_p": (-1, 2, float("nan")),
    "seed": (-HUGE, HUGE, 10**50, 1.5, "s"),
    "presence_penalty": (-3, 3, float("nan")),
    "frequency_penalty": (-3, 3, 1e999),
    "repetition_penalty": (0, -1, float("nan")),
    "prompt_logprobs": (-1, 21, 10**6, HUGE),
    "priority": (HUGE, -HUGE, 1.5),
    "timeout": (-1, 0, float("nan"), 1e400, "soon"),
    "top_logprobs": (-1, 21, 10**9, HUGE),
}


def _numbers() -> Iterator[Case]:
    for name, values in _NUMBERS.items():
        for value in values:
            more = {"logprobs": True} if name == "top_logprobs" else {}
            yield _case(f"{name}={value!r:.20}", CHAT, **{name: value}, **more)
            if name != "top_logprobs":
                yield _case(f"{name}={value!r:.20}", COMPLETIONS, **{name: value}, stream=True)
    for value in (-1, 21, 10**9, HUGE, 1.5, "5"):
        yield _case(f"logprobs={value!r}", COMPLETIONS, logprobs=value)
    yield _case("1024 prompts of 1024 outputs", COMPLETIONS, prompt=["x"] * 1024, n=1024)
    yield _case("too many prompts", COMPLETIONS, prompt=["x"] * 100_000)


# -- prompts: CVE-2024-8768 (empty prompt), CVE-2025-62164 and -62372 (prompt_embeds), ids outside the vocabulary ------


def _prompts() -> Iterator[Case]:
    odd: dict[str, Any] = {
        "nothing": None, "no prompts": [], "an empty list of ids": [[]], "an empty second": [[1], []], "a number": 5,
        "an object": {"prompt": "x"}, "mixed": ["x", 1], "mixed lists": [[1], "x"], "true": True, "trues": [True, True],
        "nested": [[[1]]], "a negative id": [-1], "an id beyond": [10**6], "a huge id": [HUGE], "a float id": [1.5],
        "an absurd id": [10**400], "infinite": [1, float("inf")],
        "gigantic text": "a b " * 500_000, "gigantic word": "a" * 2_000_000, "gigantic emoji": "😀" * 400_000,
        "gigantic blanks": " " * 2_000_000, "gigantic ids": [1] * 1_000_000, "one too long": ["x", "y " * 100_000],
    }  # fmt: skip
    for name, prompt in odd.items():
        yield _case(f"prompt: {name}", COMPLETIONS, prompt=prompt)
    for name in ("lone surrogate", "low surrogate"):
        text = b"\\ud800" if name.startswith("lone") else b"x\\udfffx"
        yield Case(f"{name} in a prompt", COMPLETIONS, b'{"prompt": "%s", "max_tokens": 2}' % text)
        yield Case(f"{name} in a chat", CHAT, b'{"messages": [{"role": "user", "content": "%s"}]}' % text)
        yield Case(f"{name} in /tokenize", "/tokenize", b'{"prompt": "%s"}' % text)
        for field in ("stop", "cache_salt", "model", "guided_regex", "bad_words"):
            value = b'["%s"]' % text if field == "bad_words" else b'"%s"' % text
            yield Case(f"{name} in {field}", COMPLETIONS, b'{"prompt": "x", "%s": %s}' % (field.encode(), value))
    for embeds in ("gASVAAAA", "UEsDBAoAAAAAAA==", ["x"] * 3, {"__reduce__": "os.system"}, 5):
        yield _case(f"prompt_embeds={embeds!r:.20}", COMPLETIONS, prompt_embeds=embeds)
        yield _case(f"prompt_embeds={embeds!r:.20}", CHAT, prompt_embeds=embeds)
    for tokens in (None, 5, "x", [-1], [HUGE], [2**32], [1.5], ["1"], [None], [[1]], [True], [10**400], {"a": 1}):
        yield _case(f"tokens={tokens!r:.20}", "/detokenize", tokens=tokens)
    for prompt in (5, ["x"], {}, True, "a" * 9_000_000):
        yield _case(f"prompt={prompt!r:.20}", "/tokenize", prompt=prompt)
    yield _case("both forms", "/tokenize", messages=MESSAGES)


# -- lists: bounded in number and in size ------------------------------------------------------------------------------

_LISTS: dict[str, tuple[Any, ...]] = {
    "stop": ([""], ["x"] * 10_000, ["x" * 10**6], [1], 5, {"a": 1}, [["x"]], "", "x" * 10**6),
    "stop_token_ids": ([-1], [HUGE], ["1"], [1] * 10**6, 5, [1.5]),
    "bad_words": ([""], ["x"] * 10**5, ["x" * 10**6], [1], 5),
    "logit_bias": ({"x": 1}, {"1": "x"}, {"-1": 1}, {str(HUGE): 1}, {"1": float("nan")}, {"1.5": 1}, [1],
                   {"99999999": 1}, {str(i): 1 for i in range(100_000)}),
    "allowed_token_ids": ([], [-1], [HUGE], [10**6], ["1"], [1] * 10**6, 5),
    "stream_options": (5, [], "x", {"include_usage": "yes"}, {"secret": 1}, {"include_usage": True}),
    "cache_salt": ("", 5, "x" * 10**6, [], {}),
    "stream": (1, "true", []),
    "echo": (5, "yes", []),
    "model": ("", "demo ", "../demo", "/etc/passwd", "x" * 10**6, 5, [], "demo\x00"),
}  # fmt: skip


def _lists() -> Iterator[Case]:
    for name, values in _LISTS.items():
        for number, value in enumerate(values):
            for path in (COMPLETIONS, CHAT):
                yield _case(f"{name} {number}: {value!r:.20}", path, **{name: value})


# -- forms: GHSA-mgrm-fgjv-mhv8, CVE-2025-48942, -48943 and -48944 (schemas and patterns that are none, or are too much)


def _nest(opening: str, closing: str, levels: int, inner: str = "") -> str:
    return opening * levels + inner + closing * levels


def _forms() -> Iterator[Case]:
    deep: Any = {"type": "string"}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(50_000)}}
    schemas: dict[str, Any] = {
        "unknown type": {"type": "something"}, "bad pattern": {"type": "string", "pattern": "([a-"},
        "lookbehind": {"type": "string", "pattern": "(?<=a)b"}, "number type": {"type": 5}, "enum": {"enum": 5},
        "endless": {"$ref": "#"}, "dangling": {"$ref": "#/$defs/none"}, "remote": {"$ref": "http://127.0.0.1:1/x"},
        "file": {"$ref": "file:///etc/passwd"}, "deep": deep, "wide": wide, "never": False,
        "empty range": {"type": "integer", "minimum": 5, "maximum": 4},
    }  # fmt: skip
    for name, schema in schemas.items():
        yield _case(f"schema: {name}", CHAT, structured_outputs={"json": schema})
        wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield _case(f"response_format: {name}", COMPLETIONS, response_format=wrapped)
    patterns = {
        "unclosed": "(", "class": "[z-a]", "repetition": "a{1000000}", "nul": "a(\x00",
        "backreference": r"(a)\1", "lookahead": "(?=a)b", "parentheses": _nest("(", ")", 20_000, "a"),
        "long": "a" * 2_000_000, "unicode": r"\p{Nothing}", "ending": "(?:", "flag": "(?Z)x",
    }  # fmt: skip
    for name, pattern in patterns.items():
        yield _case(f"regex: {name}", COMPLETIONS, guided_regex=pattern)
        yield _case(f"regex: {name}", CHAT, structured_outputs={"regex": pattern}, stream=True)
    grammars = {
        "left recursion": "start: start", "nothing": " ", "undefined": "start: other", "python": "__import__('os')",
        "import": "%import os.system\nstart: system", "deep": "start: " + _nest("(", ")", 20_000, '"a"'),
        "include": 'start: %json {"$ref": "file:///etc/passwd"}', "long": 'start: "' + "a" * 2_000_000 + '"',
    }  # fmt: skip
    for name, grammar in grammars.items():
        yield _case(f"grammar: {name}", COMPLETIONS, guided_grammar=grammar)
    odd: tuple[dict[str, Any], ...] = (
        {"guided_choice": []}, {"guided_choice": ["x"] * 100_000}, {"guided_choice": [1]},
        {"guided_json": "{"}, {"guided_json": "[" * 100_000}, {"guided_json": 5}, {"guided_regex": 5},
        {"guided_decoding_backend": "outlines"}, {"guided_whitespace_pattern": "("},
        {"structured_outputs": {}}, {"structured_outputs": {"json": {}, "regex": "a"}}, {"structured_outputs": 5},
        {"structured_outputs": {"regex": None}}, {"structured_outputs": {"unknown": 1}},
        {"response_format": {}}, {"response_format": {"type": "x"}}, {"response_format": "json_object"},
        {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "json_schema", "json_schema": 5}},
    )  # fmt: skip
    for number, fields in enumerate(odd):
        yield _case(f"form {number}: {fields!r:.50}", CHAT, **fields)


# -- conversations: CVE-2025-61620 and -62426 (templates from the client), CVE-2025-6242 (URLs), CVE-2026-22773 --------


def _conversations() -> Iterator[Case]:
    def said(content: Any, role: Any = "user", **more: Any) -> list[dict[str, Any]]:
        return [{"role": role, "content": content, **more}]

    conversations: dict[str, Any] = {
        "none": [], "no list": "hi", "null": None, "no object": ["hi"], "numbers": [1], "no role": [{"content": "x"}],
        "odd role": said("x", "root"), "role list": said("x", ["user"]), "no content": [{"role": "user"}],
        "number": said(5), "object": said({"text": "x"}), "no parts": said([]), "part null": said([None]),
        "part type": said([{"type": "python", "text": "x"}]), "part text": said([{"type": "text", "text": 5}]),
        "image": said([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}]),
        "image file": said([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        "image data": said([{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]),
        "audio": said([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]),
        "audio url": said([{"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:22/"}}]),
        "video": said([{"type": "video_url", "video_url": {"url": "gopher://127.0.0.1:25/"}}]),
        "embeds": said([{"type": "image_embeds", "image_embeds": "gASVAAAA"}]), "name": said("x", name=5),
        "unknown field": said("x", secret=1), "gigantic": said("x " * 1_000_000), "many": said("x") * 100_000,
    }  # fmt: skip
    for name, messages in conversations.items():
        yield _case(f"messages: {name}", CHAT, messages=messages)
    tools: tuple[Any, ...] = (
        5, "x", [5], [{}], [{"type": "x"}], [{"type": "function"}], [{"type": "function", "function": {}}],
        [{"type": "function", "function": {"name": 5}}],
        [{"type": "function", "function": {"name": "f", "parameters": 5}}],
    )  # fmt: skip
    for number, value in enumerate(tools):
        yield _case(f"tools {number}", CHAT, tools=value, tool_choice="required")
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    loop = "{% for i in range(999999999) %}{% for j in range(999999999) %}x{% endfor %}{% endfor %}"
    for template in (
        escape,
        loop,
        "{{ cycler.__init__.__globals__.os.system('id') }}",
        5,
        "",
        "{% include '/etc/passwd' %}",
    ):
        yield _case(f"chat_template={template!r:.30}", CHAT, chat_template=template)
        yield _case(f"chat_template_kwargs={template!r:.30}", CHAT, chat_template_kwargs={"chat_template": template})
    for value in ({"tokenize": True}, {"tokenizer": 1}, {"messages": []}, {"self": 1}, 5, [], "x"):
        yield _case(f"chat_template_kwargs={value!r}", CHAT, chat_template_kwargs=value)
    for name in (
        "custom_logit_processor",
        "logits_processors",
        "lora_path",
        "mm_processor_kwargs",
        "kv_transfer_params",
        "documents",
        "trust_remote_code",
        "vllm_xargs",
        "return_hidden_states",
        "__class__",
        "__proto__",
        "",
    ):
        yield _case(f"field {name}", CHAT, **{name: {"x": "__import__('os').system('id')"}})
        yield _case(f"field {name}", COMPLETIONS, **{name: ["gASVAAAA"]})


# -- bodies and headers: CVE-2025-48956 (headers), nesting, encodings, types of content --------------------------------


def _bodies() -> Iterator[Case]:
    raw = {
        "empty": b"", "nothing": b"null", "a list": b"[]", "a text": b'"x"', "cut": b'{"prompt": "x',
        "arrays": b"[" * 100_000, "objects": b'{"a":' * 100_000, "nul": b"\x00" * 99,
        "deep": b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "latin1": b'{"prompt": "\xff\xfe"}', "pickle": b"\x80\x05\x95.",
        "digits": b'{"prompt": "x", "seed": ' + b"9" * 1_000_000 + b"}", "gzip": b"\x1f\x8b\x08\x00",
        "bom": b"\xef\xbb\xbf{",
        "exponent": b'{"prompt": "x", "temperature": 1e999999}', "too large": b" " * (9 * 2**20), "xml": b"<a/>",
        "comment": b'{"prompt": "x" /* */}', "form": b"prompt=x&max_tokens=5", "many keys": json.dumps(
            {f"k{i}": i for i in range(100_000)}).encode(),
    }  # fmt: skip
    for path in POSTS:
        for name, body in raw.items():
            yield Case(f"{path} body: {name}", path, body)
        for content_type in (
            "text/plain",
            "multipart/form-data; boundary=x",
            "application/xml",
            "application/octet-stream",
        ):
            body = json.dumps(_body(path)).encode()
            yield Case(f"{path} as {content_type}", path, body, {"Content-Type": content_type})
        yield Case(f"{path} by GET", path, method="GET")
        yield Case(f"{path} by DELETE", path, method="DELETE")
    for path in GETS:
        yield Case(f"{path} by PUT", path, b"{}", JSON, "PUT")
    headers = {f"X-{i}": "x" * 1000 for i in range(90)}
    for path in (*POSTS, *GETS):
        method = "POST" if path in POSTS else "GET"
        yield Case(f"{path} with 90 kB of headers", path, b"{}", JSON | headers, method)
    paths = (
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/../../x", "/v1/models/../../etc/passwd", "/v1/models/",
        "/v1/models/%00", "/v1/models/" + "x" * 5000, "/V1/MODELS", "/v1//models", "/%ff%fe", "/docs", "/redoc",
        "/metrics/../x", "/static/../../pyproject.toml", "/static/%2e%2e/app.py", "/v1/models/%2e%2e%2fdemo",
    )  # fmt: skip
    for path in paths:
        yield Case(f"GET {path:.40}", path, method="GET")


# -- token ids in and out, and ending what others asked for ------------------------------------------------------------


def _tokens() -> Iterator[Case]:
    for name, values in _NUMBERS.items():
        for value in values if name != "top_logprobs" else ():
            more = {name: value} if name in ("priority", "timeout") else {"sampling_params": {name: value}}
            yield _case(f"{name}={value!r:.20}", GENERATE, **more)
    odd: tuple[Any, ...] = ([], [-1], [HUGE], [10**6], [1.5], ["1"], [True], [[1]], "x", 5, {}, [1] * 10**6, [10**400])
    for number, ids in enumerate(odd):
        yield _case(f"ids {number}", GENERATE, prompt_token_ids=ids)
    fields: tuple[dict[str, Any], ...] = (
        {"input_ids": [1]}, {"text": "x"}, {"sampling_params": {"__class__": "x"}}, {"sampling_params": [1]},
        {"sampling_params": {"custom_params": {}}}, {"sampling_params": {"structured_outputs": {"regex": "("}}},
        {"sampling_params": {"stop": ["x"]}}, {"custom_logit_processor": "gASVAAAA"}, {"lora_path": "/etc/passwd"},
        {"image_data": "http://127.0.0.1:1/x"}, {"rid": ["x"]}, {"return_hidden_states": True}, {"stream": "yes"},
    )  # fmt: skip
    for number, given in enumerate(fields):
        yield _case(f"field {number}: {given!r:.50}", GENERATE, **given)
    for value in (None, 5, [], [5], {"a": 1}, ["x"] * 100_000, True):
        yield _case(f"request_id={value!r:.20}", ABORT, request_id=value)
    yield _case("all, and one", ABORT, abort_all=True)
    yield _case("a pattern", ABORT, pattern="*")


def cases() -> list[Case]:
    """All of them; names are unique."""
    found = [*_numbers(), *_prompts(), *_lists(), *_forms(), *_conversations(), *_bodies(), *_tokens()]
    numbers: collections.Counter[str] = collections.Counter()
    for place, case in enumerate(found):
        numbers[case.name] += 1
        if numbers[case.name] > 1:
            found[place] = case._replace(name=f"{case.name} ({numbers[case.name]})")
    return found
