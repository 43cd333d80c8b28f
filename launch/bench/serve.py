"""Loads a running server with OpenAI's API and measures how it answers: latencies, throughput, errors.

Any such server will do; nothing of ours is asked of it. How each figure is taken stands in `launch/bench/load.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.errors import ConfigError
from launch.bench import latency, plot
from launch.bench.datasets import DatasetSpec, LoadRequest, load
from launch.bench.hardware import hardware, hardware_line
from launch.bench.load import PATHS, LoadResult, LoadSpec, Record, play, run_load
from launch.client.api import ApiClient
from launch.client.connection import ClientError

DEFAULT_NUM_PROMPTS = 100
SWEPT = ("request-rate", "max-concurrency")
# The options of each data set, beside those of all; a default of None is DatasetSpec's.
_INVENTED = ("input_len", "range_ratio", "prompts", "vocab_size")
_DATASET_OPTIONS: dict[str, tuple[str, ...]] = {
    "random": _INVENTED,
    "shared-prefix": (*_INVENTED, "prefix_len", "num_prefixes"),
    "jsonl": (),
}
# Fields of the request body that belong to the measurement itself.
_RESERVED = {"model", "prompt", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n"}


def add_parser(commands: Any) -> None:
    """Declare `serve`."""
    parser = commands.add_parser("serve", help=__doc__.splitlines()[0])
    _add_server(parser.add_argument_group("the server"))
    _add_load(parser.add_argument_group("the load"))
    _add_prompts(parser.add_argument_group("the prompts"))
    _add_results(parser.add_argument_group("the results"))
    parser.set_defaults(run=run)


def _add_server(group: Any) -> None:
    group.add_argument("--base-url", default="http://127.0.0.1:8000", help="its address (default: %(default)s)")
    group.add_argument("--model", help="the model's name there (default: the first of /v1/models)")
    group.add_argument("--api-key", help="the key it wants (default: the environment's OPENAI_API_KEY)")
    group.add_argument("--endpoint", choices=tuple(PATHS), default="completions", help="(default: %(default)s)")
    group.add_argument("--timeout", type=float, default=3600, help="seconds for one request (default: %(default)s)")


def _add_load(group: Any) -> None:
    group.add_argument("--request-rate", type=float, default=math.inf, help="requests a second (default: inf, at once)")
    group.add_argument(
        "--burstiness", type=float, default=1.0,
        help="1: arrivals are a Poisson process; less: they come in bursts; more: evener (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--max-concurrency", type=int, help="requests that are open at once (default: no limit)")
    group.add_argument(
        "--num-prompts", type=int, help=f"requests (default: {DEFAULT_NUM_PROMPTS}, or all that --dataset-path holds)"
    )
    group.add_argument(
        "--num-warmups", type=int, default=1,
        help="requests before them, one by one, that are not measured; of a file those that follow, or its first ones "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--sweep", metavar="NAME=V1,V2,…",
        help=f"one run for each value of {' or '.join(SWEPT)}, e.g. request-rate=1,2,4,inf; invented prompts are new "
        "ones in each run (of seed, seed + 1, …), those of a file the same",
    )  # fmt: skip


def _add_prompts(group: Any) -> None:
    spec = DatasetSpec()
    group.add_argument("--dataset", choices=tuple(_DATASET_OPTIONS), default=spec.name, help="default: %(default)s")
    group.add_argument(
        "--input-len", "--suffix-len", type=int,
        help=f"tokens of a prompt; of shared-prefix those behind the prefix (default: {spec.input_len})",
    )  # fmt: skip
    group.add_argument(
        "--output-len", type=int, default=spec.output_len, help="tokens asked for (default: %(default)s)"
    )
    group.add_argument(
        "--range-ratio", type=float,
        help=f"r draws both lengths between (1 - r) and (1 + r) times these (default: {spec.range_ratio:g})",
    )  # fmt: skip
    group.add_argument("--prefix-len", type=int, help=f"tokens (default: {spec.prefix_len})")
    group.add_argument("--num-prefixes", type=int, help=f"default: {spec.num_prefixes}")
    group.add_argument(
        "--dataset-path", type=Path, metavar="FILE",
        help="for jsonl: a JSON object a line, with prompt (text or token ids) or messages, and output_len where it "
        "is not --output-len",
    )  # fmt: skip
    group.add_argument(
        "--prompts", choices=("ids", "text"),
        help="invented prompts as token ids, of exact length, or as English words, about one token each; chat takes "
        "text alone (default: ids for completions)",
    )  # fmt: skip
    group.add_argument("--vocab-size", type=int, help=f"random ids are less than this (default: {spec.vocab_size})")
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="(default: %(default)s)")
    group.add_argument("--ignore-eos", action="store_true", help="ask for answers of exactly the length")
    group.add_argument("--extra-body", metavar="JSON", help="further fields of each request, as a JSON object")


def _add_results(group: Any) -> None:
    group.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="goals, e.g. ttft:500 tpot:50")
    group.add_argument("--output", "--json", type=Path, metavar="FILE", help="write settings and figures as JSON")
    group.add_argument("--save-requests", action="store_true", help="with every request's times in that file")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the sweep's latency-throughput curve as PNG")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns 0; 1 when no request was completed or the server was lost; 130 when interrupted.

    Raises:
        ConfigError: settings that cannot be. Other errors of the tree: the server cannot be measured at all.
    """
    runs = plan(arguments)
    goals = latency.parse_goals(arguments.goodput)
    _check_files(arguments)
    report: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": _settings(arguments),
        "client": hardware(),
    }
    machine = f"client: {hardware_line()}"
    print(machine, flush=True)
    measured = Measured()
    try:
        asyncio.run(_measure(arguments, runs, measured))
    except ClientError as error:
        if not measured.results:
            raise
        # A sweep may well be what a server does not survive: what was measured until then is the more wanted.
        measured.failure = f"run {len(measured.results) + 1} of {len(runs)}: {error.message}"
        print(f"error: {measured.failure}", file=sys.stderr)
    summaries = [latency.figures(result, goals) for result in measured.results]
    _show(runs, summaries)
    if arguments.output is not None:
        report |= {"model": measured.model, "interrupted": measured.interrupted, "failure": measured.failure}
        report["runs"] = [
            planned.changed | summary | ({"requests": _requests_of(result)} if arguments.save_requests else {})
            for planned, summary, result in zip(runs, summaries, measured.results, strict=False)
        ]
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None and summaries:
        plot.draw(
            arguments.plot, f"{measured.model}, {arguments.dataset}; {machine}", runs[0].swept, _points(runs, summaries)
        )
    if measured.interrupted:
        return 130
    return 0 if measured.failure is None and any(summary["completed"] for summary in summaries) else 1


# -- what is to be done -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a measurement. `swept` names what distinguishes it from the others; empty when it is the only one."""

    spec: LoadSpec
    requests: list[LoadRequest]
    warmups: list[LoadRequest]
    swept: str = ""
    value: float = math.nan

    @property
    def changed(self) -> dict[str, Any]:
        """What was swept and its value, for JSON, which has no infinity."""
        return {self.swept: self.value if math.isfinite(self.value) else "inf"} if self.swept else {}


def plan(arguments: argparse.Namespace) -> list[Run]:
    """Everything that will be sent, one run or one for each value of a sweep. Raises ConfigError."""
    for name, least in (("num_prompts", 1), ("num_warmups", 0), ("max_concurrency", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}", name)
    for name in ("request_rate", "burstiness", "timeout"):
        _check_positive(f"--{name.replace('_', '-')}", getattr(arguments, name))
    _check_use(arguments)
    _fill_in(arguments)
    spec = LoadSpec(
        "",
        arguments.endpoint,
        arguments.request_rate,
        arguments.burstiness,
        arguments.max_concurrency,
        arguments.timeout,
        arguments.seed,
        _fields(arguments),
    )
    if arguments.sweep is None:
        return [Run(spec, *_prompts(arguments, arguments.seed))]
    swept, values = _parse_sweep(arguments)
    return [
        Run(
            _at(spec, swept, value),
            *_prompts(arguments, arguments.seed + number),
            swept,
            value,
        )
        for number, value in enumerate(values)
    ]


def _check_use(arguments: argparse.Namespace) -> None:
    """Refuse options that would change nothing."""
    for name in sorted({name for names in _DATASET_OPTIONS.values() for name in names}):
        if getattr(arguments, name) is not None and name not in _DATASET_OPTIONS[arguments.dataset]:
            raise ConfigError(f"--{name.replace('_', '-')} does not go with --dataset {arguments.dataset}", name)
    if arguments.vocab_size is not None and (arguments.prompts == "text" or arguments.endpoint == "chat"):
        raise ConfigError("--vocab-size is of token ids, and the prompts are text", "vocab_size")
    is_paced = math.isfinite(arguments.request_rate) or (arguments.sweep or "").startswith("request-rate")
    if arguments.burstiness != 1 and not is_paced:
        raise ConfigError("--burstiness needs --request-rate", "burstiness")


def _fill_in(arguments: argparse.Namespace) -> None:
    """Put the defaults of the data set where nothing was given, so that the JSON tells what was used."""
    usual = {field.name: field.default for field in dataclasses.fields(DatasetSpec)}
    usual["prompts"] = "text" if arguments.endpoint == "chat" else "ids"
    for name in _DATASET_OPTIONS[arguments.dataset]:
        if getattr(arguments, name) is None:
            setattr(arguments, name, usual[name])


def _at(spec: LoadSpec, swept: str, value: float) -> LoadSpec:
    if swept == "request-rate":
        return dataclasses.replace(spec, request_rate=value)
    return dataclasses.replace(spec, max_concurrency=int(value))


def _parse_sweep(arguments: argparse.Namespace) -> tuple[str, list[float]]:
    name, _, listed = arguments.sweep.partition("=")
    if name not in SWEPT or not listed:
        raise ConfigError(
            f"--sweep must be like {SWEPT[0]}=1,2,4 or {SWEPT[1]}=1,2,4, got {arguments.sweep!r}", "sweep"
        )
    if getattr(arguments, name.replace("-", "_")) not in (None, math.inf):
        raise ConfigError(f"--sweep {name} and --{name} exclude each other", "sweep")
    values: list[float] = []
    for text in listed.split(","):
        try:
            value = float(text) if name == "request-rate" else int(text)
        except ValueError:
            raise ConfigError(f"--sweep {name} must list numbers, got {text!r}", "sweep") from None
        _check_positive(f"--sweep {name}", value)
        values.append(value)
    return name, values


def _check_positive(flag: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{flag} must be greater than 0, got {value:g}", flag.lstrip("-"))


def _prompts(arguments: argparse.Namespace, seed: int) -> tuple[list[LoadRequest], list[LoadRequest]]:
    """The requests to measure and those to warm up with."""
    chosen = {name: getattr(arguments, name) for name in _DATASET_OPTIONS[arguments.dataset]}
    as_text = chosen.pop("prompts", "text" if arguments.endpoint == "chat" else "ids") == "text"
    spec = DatasetSpec(
        arguments.dataset,
        output_len=arguments.output_len,
        endpoint=arguments.endpoint,
        as_text=as_text,
        path=arguments.dataset_path,
        seed=seed,
        **chosen,
    )
    if arguments.dataset != "jsonl":
        count = arguments.num_prompts or DEFAULT_NUM_PROMPTS
        drawn = load(spec, count + arguments.num_warmups)
        return drawn[:count], drawn[count:]
    everything = load(spec, None)
    count = arguments.num_prompts or len(everything)
    if count > len(everything):
        raise ConfigError(
            f"--num-prompts must be at most {len(everything)}, as many as {spec.path} holds, got {count}", "num_prompts"
        )
    following = itertools.islice(itertools.cycle(everything), count, count + arguments.num_warmups)
    return everything[:count], list(following)


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """What each request's body holds beside what is measured."""
    fields: dict[str, Any] = {"temperature": arguments.temperature}
    if arguments.ignore_eos:
        fields["ignore_eos"] = True
    if arguments.extra_body is not None:
        try:
            extra = json.loads(arguments.extra_body)
        except ValueError:
            extra = None
        if not isinstance(extra, dict):
            raise ConfigError(f"--extra-body must be a JSON object, got {arguments.extra_body!r:.100}", "extra_body")
        if taken := sorted(_RESERVED & extra.keys()):
            raise ConfigError(f"--extra-body must not hold {taken[0]}, which the measurement sets", "extra_body")
        fields |= extra
    return fields


def _check_files(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        if arguments.sweep is None:
            raise ConfigError("--plot draws a curve over several runs: give --sweep too", "plot")
        plot.check(arguments.plot)
    if arguments.save_requests and arguments.output is None:
        raise ConfigError("--save-requests needs --output FILE", "save_requests")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {arguments.output.parent}", "output")


# -- doing it ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """What there is so far, of as many runs as were begun."""

    model: str = ""
    results: list[LoadResult] = dataclasses.field(default_factory=list)
    interrupted: bool = False
    failure: str | None = None


async def _measure(arguments: argparse.Namespace, runs: list[Run], measured: Measured) -> None:
    """Fill `measured`. Ctrl-C, which asyncio turns into a cancellation, ends it early and is noted."""
    api = ApiClient(arguments.base_url, arguments.api_key or os.environ.get("OPENAI_API_KEY") or None)
    try:
        card = await api.model(arguments.model)
        measured.model = str(card["id"])
        # A server of ours sends nothing for tokens without text (special ones, parts of a character), unless it is
        # asked for their ids; a first token would be noticed late.
        fields = {"return_token_ids": True} if card.get("owned_by") == "nanoengine" else {}
        for planned in runs:
            spec = dataclasses.replace(planned.spec, model=measured.model, fields=fields | planned.spec.fields)
            await _warm_up(api, planned.warmups, spec, arguments)
            with tqdm(total=len(planned.requests), unit="request", disable=None, leave=False) as bar:
                result = await run_load(api, planned.requests, spec, bar.update)
            measured.results.append(result)
            if result.interrupted:
                measured.interrupted = True
                return
    except asyncio.CancelledError:
        measured.interrupted = True
    finally:
        api.close()


async def _warm_up(api: ApiClient, requests: list[LoadRequest], spec: LoadSpec, arguments: argparse.Namespace) -> None:
    """The first requests pay for what happens once. Raises ClientError when one fails: so would the others."""
    for number, request in enumerate(requests):
        record = Record(number, request.output_len)
        await play(api, request, spec, record)
        if record.error_kind is not None:
            ids = isinstance(request.prompt, list) and record.error_kind in ("HTTP 400", "HTTP 422")
            hint = " (--prompts text sends text, --vocab-size N other token ids)" if ids else ""
            raise ClientError(record.error_kind, f"warming up failed: {record.error_kind}: {record.error}{hint}")


# -- telling it -------------------------------------------------------------------------------------------------


def _points(runs: list[Run], summaries: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    return [(planned.value, summary) for planned, summary in zip(runs, summaries, strict=False)]


def _show(runs: list[Run], summaries: list[dict[str, Any]]) -> None:
    if not summaries:
        print("interrupted before anything was measured")
    elif not runs[0].swept:
        print(latency.render(summaries[0]))
    else:
        print(latency.render_sweep(runs[0].swept, _points(runs, summaries)))
        for value, summary in _points(runs, summaries):
            for line in latency.render_errors(summary)[1:]:
                print(f"{runs[0].swept} {value:g}: {line}")
    if any(summary["interrupted"] for summary in summaries):
        print("interrupted: the figures are of what was complete by then")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON takes them, without the key."""
    kept = {name: value for name, value in vars(arguments).items() if name not in ("run", "command", "api_key")}
    return {name: _plain(value) for name, value in kept.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def _requests_of(result: LoadResult) -> list[dict[str, Any]]:
    return [dataclasses.asdict(record) | {"tpot": record.tpot} for record in result.records]
