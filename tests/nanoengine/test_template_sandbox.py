"""Templates that come with a model nobody has looked at: no way out, and an end in time, whatever they do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from configs.errors import NanoEngineError, RequestError, TokenizerError
from nanoengine import template_sandbox
from nanoengine.chat_template import ChatTemplate

CHAT = [{"role": "user", "content": "hi"}]
LONG = "('a' * 1000000)"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}X{% endfor %}{% endfor %}"


def again(first: str, then: str, start: str = "'aaaa'") -> str:
    """`x` becomes `first`, which speaks of `x`, many times over."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {first} %}}{{% endfor %}}{then}"
    )


GREEDY = {
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": ENDLESS.replace("X", ""),
    "nested loops with text": ENDLESS,
    "loops over text": f"{{% for c in {LONG} * 10 %}}{{% for d in {LONG} * 10 %}}{{% endfor %}}{{% endfor %}}",
    "a block that is set": "{% set x %}" + ENDLESS + "{% endset %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times a list": "{{ (range(99999)|list) * 99999 }}",
    "power": "{{ 9**(9**9) }}",
    "squares": again("ns.x * ns.x", "", "3"),
    "plus": again("ns.x + ns.x", ""),
    "tilde": again("ns.x ~ ns.x", ""),
    "lists": again("ns.x + ns.x", "", "[1]"),
    "shared lists": again("[ns.x, ns.x]", "{{ ns.x }}"),
    "shared tuples": again("(ns.x, ns.x)", "{{ ns.x == ns.x }}"),
    "shared dicts": again("dict(a=ns.x, b=ns.x)", "{{ ns.x|tojson }}"),
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "nested format": "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "format filter": "{{ '%999999999d'|format(1) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "replace": f"{{{{ {LONG}.replace('', {LONG}) }}}}",
    "replace filter": f"{{{{ {LONG}|replace('a', {LONG}) }}}}",
    "join": f"{{{{ {LONG}.join({LONG}) }}}}",
    "join filter": f"{{{{ {LONG}|join({LONG}) }}}}",
    "mapped": "{{ range(99999)|map('center', 99999)|list|length }}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(100000) }}",
    "indent": "{{ ('\\n' * 1000000)|indent(100000) }}",
    "round": "{{ 3.5|round(999999999, 'ceil') }}",
    "sum": "{{ ([[1]] * 1000000)|sum(start=[]) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "long": "x" * 3_000_000,
    "filler": "{{ lipsum(n=1000000) }}",
}


@pytest.mark.parametrize("source", GREEDY.values(), ids=GREEDY)
def test_a_template_that_never_ends_or_fills_memory_is_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "CPU_SECONDS", 0.2)
    began = time.thread_time()
    with pytest.raises((RequestError, TokenizerError)):
        ChatTemplate({"default": source}, {}).render(CHAT)
    assert time.thread_time() - began < 2


WAYS_OUT = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir(canary) }}",
    "{{ (''|attr('__class__')|attr('__base__')).__subclasses__() }}",
    "{{ joiner.__init__.__globals__['os'].mkdir(canary) }}",
    "{{ namespace.__init__.__globals__.os.mkdir(canary) }}",
    "{{ raise_exception.__globals__.datetime.sys.modules.os.mkdir(canary) }}",
    "{{ strftime_now.__globals__['__builtins__']['open'](canary, 'w') }}",
    "{{ self.__init__.__globals__.__builtins__.open(canary, 'w') }}",
    "{{ self._TemplateReference__context.environment.from_string('x').module.__loader__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception).x.y }}",
    "{{ ('{0.__class__}'|format(1)).x.y }}",
    "{% set f = '{0.__globals__}'.format %}{{ f(raise_exception).x.y }}",
    "{% include canary %}",
    "{% import 'os' as os %}{{ os.mkdir(canary) }}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'x': 1}) }}",
    "{{ messages|map('_look_at_the_clock')|list }}{{ messages.__class__.x.y }}",
]


@pytest.mark.parametrize("source", WAYS_OUT)
def test_a_template_finds_no_way_out(source: str, tmp_path: Path) -> None:
    chat = [dict(message) for message in CHAT]
    with pytest.raises(NanoEngineError):
        ChatTemplate({"default": source}, {}).render(chat, canary=str(tmp_path / "canary"))
    assert not (tmp_path / "canary").exists()
    assert chat == CHAT


def test_what_templates_do_is_allowed() -> None:
    source = (
        "{%- set ns = namespace(found=false, parts=[]) -%}"
        "{%- for m in messages -%}"
        "{%- set ns.parts = ns.parts + [m.role ~ ': ' ~ m['content']|trim] -%}"
        "{%- if m.role == 'user' and not ns.found -%}{%- set ns.found = true -%}{%- endif -%}"
        "{%- endfor -%}"
        "{{ ns.parts|join('; ') }} {{ {'a': [1, (2, 3)]}|tojson(indent=2)|length }} {{ '%s-%03d' % ('x', 7) }} "
        "{{ 'x' * 3 }} {{ [1, 2, 3]|sum }} {{ '{:>4}'.format('y') }} {{ 'a,b'.split(',')[-1] }} {{ 2**10 }}"
        "{% for key, value in {'k': 1}.items() %} {{ loop.index }}{{ key }}{{ value }}{% endfor %}"
    )
    chat = [*CHAT, {"role": "assistant", "content": " yo "}]
    assert ChatTemplate({"default": source}, {}).render(chat) == (
        "user: hi; assistant: yo 52 x-007 xxx 6    y b 1024 1k1"
    )


def test_sixteen_thousand_messages_are_rendered() -> None:
    source = "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' + m.content + '\n' }}{% endfor %}"
    text = ChatTemplate({"default": source}, {}).render(CHAT * 16384)
    assert text == "<|user|>hi\n" * 16384
