"""A Jinja environment for templates that nobody has read: no way out of it, and bounds on time and memory.

Jinja's sandbox keeps a template from Python's internals; it does not keep one from looping for hours or from building a
string of gigabytes, in one operation that nothing can interrupt. So loops and calls look at the clock, and what can
make much out of little is asked for its size before it is done. It knows no model and no conversation.
"""

from __future__ import annotations

import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.filters
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# CPU time of one rendering. A conversation of 16,000 messages takes 0.3 s.
CPU_SECONDS = 1.0
MAX_SOURCE_CHARS = 2**20
MAX_CHARS = 2**24
"""The longest text, or list, that may be made, and the longest prompt."""
MAX_INT_BITS = 4096
MAX_WIDTH = 100_000
"""The largest number that may say how wide, how often or how precisely."""

MAX_WEIGHT = 2**20
"""How many values a list may hold, those of the lists in it included: what shows or compares it visits each."""

_CLOCK, _JOIN, _WEIGH = "_look_at_the_clock", "_join_bounded", "_weighed"
_BINARY = frozenset({"+", "*", "**", "%"})
# Methods and filters whose result can be larger than what they are given: the product of their arguments' sizes.
_GROWING = frozenset({
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "round",
    "slice", "tojson", "translate", "wordwrap", "xmlattr", "zfill",
})  # fmt: skip
_REMOVED_FILTERS = ("urlize",)  # its expressions take long on texts made for them
_WIDE = re.compile(r"\d{6}")

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("_deadline", default=float("inf"))


class _Watched(NodeTransformer):
    """Puts a look at the clock into each loop, and bounds into `~`, for which Jinja asks nobody."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        look = nodes.Filter(nodes.Const(""), _CLOCK, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(look))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(node, _WEIGH, [], [], None, None)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx != "load" else nodes.Filter(node, _WEIGH, [], [], None, None)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(node, _WEIGH, [], [], None, None)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), _JOIN, [], [], None, None)


class _Namespace(Namespace):
    """Shown without what it holds: two that hold each other twice would fill any memory."""

    def __repr__(self) -> str:
        return "<Namespace>"


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox with bounds. A template that exceeds one ends with jinja2's SecurityError."""

    intercepted_binops = _BINARY

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.globals.pop("lipsum")
        self.globals["namespace"] = _Namespace
        for name in _REMOVED_FILTERS:
            del self.filters[name]

    def finish(self) -> None:
        """Bound the filters; call it once all are there."""
        for name in _GROWING & set(self.filters):
            self.filters[name] = _bounded_filter(name, self.filters[name])
        self.filters[_CLOCK], self.filters[_JOIN] = _clock_filter, _joined
        self.filters[_WEIGH], self.filters["sum"] = _weighed, _sum_of_numbers

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        watched = _Watched().visit(source)
        watched.set_environment(self)
        watched.set_lineno(1)
        return super()._generate(watched, *args, **kwargs)

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> jinja2.Template:
        """Compile. Raises SecurityError for a template that is too long."""
        if isinstance(source, str) and len(source) > MAX_SOURCE_CHARS:
            raise SecurityError(f"it has {len(source)} characters, at most {MAX_SOURCE_CHARS} are allowed")
        return super().from_string(source, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every `+`, `*`, `**` and `%` of a template."""
        sizes = _length(left), _length(right)
        if operator == "+" and max(sizes) >= 0:
            _check_length(max(0, sizes[0]) + max(0, sizes[1]), MAX_CHARS if isinstance(left, str) else MAX_WEIGHT)
        elif operator == "*" and max(sizes) >= 0:
            is_text = isinstance(left, str) or isinstance(right, str)
            _check_length(_size(left) * _size(right), MAX_CHARS if is_text else MAX_WEIGHT)
        elif operator == "%" and isinstance(left, str):
            _check_widths(left, right)
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INT_BITS:
                raise SecurityError(f"a number of more than {MAX_INT_BITS} bits")
        return _weighed(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template: of its macros, of functions, and of methods of what it was given."""
        _look_at_the_clock()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        of, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(of, str) and name in _GROWING:
            _check_growth(name, of, *args, *kwargs.values())
        result = super().call(context, obj, *args, **kwargs)
        _check_length(_length(result))
        return _weighed(result)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text. Raises SecurityError where a bound is exceeded, and whatever the template raises."""
    token = _deadline.set(time.thread_time() + CPU_SECONDS)
    try:
        parts, length = [], 0
        for part in template.generate(**variables):
            length += len(part)
            _check_length(length)
            parts.append(part)
        return "".join(parts)
    finally:
        _deadline.reset(token)


def _look_at_the_clock() -> None:
    if time.thread_time() > _deadline.get():
        raise SecurityError(f"it takes more than {CPU_SECONDS:g} s")


@jinja2.pass_context  # what is given a context is not computed once and for all when the template is compiled
def _clock_filter(context: Context, value: str) -> str:
    _look_at_the_clock()
    return value


@jinja2.pass_environment
def _sum_of_numbers(
    environment: jinja2.Environment, iterable: Any, attribute: str | int | None = None, start: Any = 0
) -> Any:
    if not isinstance(start, int | float):
        raise SecurityError("sum adds up numbers alone: lists would be copied again and again")
    return jinja2.filters.do_sum(environment, iterable, attribute, start)


def _weighed(value: Any) -> Any:
    """The same, where it is no list that holds a few small ones many times over, as `[x, x]` again and again does."""
    if isinstance(value, list | tuple | dict) and _weight(value, {}) > MAX_WEIGHT:
        raise SecurityError(f"a list of more than {MAX_WEIGHT} values")
    return value


def _weight(value: Any, known: dict[int, int]) -> int:
    if not isinstance(value, list | tuple | dict):
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # should it hold itself
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = min(MAX_WEIGHT + 1, 1 + sum(_weight(each, known) for each in inner))
    return known[id(value)]


def _joined(values: list[Any]) -> str:
    texts = [str(value) for value in values]
    _check_length(sum(map(len, texts)))
    return "".join(texts)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Some filters are handed the context or the environment first; jinja2 marks them with an attribute.
    skipped = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _look_at_the_clock()
        _check_growth(name, *args[skipped:], *kwargs.values())
        result = function(*args, **kwargs)
        _check_length(_length(result))
        return result

    return bounded


def _check_growth(name: str, *values: Any) -> None:
    product = 1
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise SecurityError(f"{name} with the number {value:.0f}, at most {MAX_WIDTH} is allowed")
        product *= max(1, min(_size(value), MAX_CHARS))
    if name.startswith("format"):
        _check_widths(*values)
    # Each of what is formatted or joined appears once.
    elif product > 4 * MAX_CHARS:
        raise SecurityError(f"{name} that may make more than {MAX_CHARS} characters")


def _check_widths(*values: Any) -> None:
    for value in values:
        for each in _flat(value):
            if (isinstance(each, str) and _WIDE.search(each)) or (isinstance(each, int) and abs(each) > MAX_WIDTH):
                raise SecurityError("a format with a number of more than five digits")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    else:
        yield value


def _length(value: Any) -> int:
    """Of a text or a list; -1 for what has none."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else -1


def _size(value: Any) -> int:
    return abs(value) if isinstance(value, int) else max(1, _length(value))


def _check_length(length: int, limit: int = MAX_CHARS) -> None:
    if length > limit:
        raise SecurityError(f"it makes something longer than {limit}")
