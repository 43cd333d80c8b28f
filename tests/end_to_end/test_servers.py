"""Two real servers side by side on one machine: they never meet, rest quietly, load little, and die completely."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.bench import processes
from tests.launch.server_process import ServerProcess
from tests.nanoengine.process_tools import leaked_memory, shared_memory
from tests.waiting import until

# Each process of the tree starts this thread: when the file `dump` appears, it writes its sys.modules beside it.
SITE = """
import json, os, sys, threading, time
def dump():
    here = os.environ["MODULES_DUMP"]
    while not os.path.exists(here + "/dump"):
        time.sleep(0.5)
    with open(f"{here}/{os.getpid()}.part", "w") as file:
        json.dump({"argv": sys.orig_argv, "modules": sorted(sys.modules)}, file)
    os.rename(f"{here}/{os.getpid()}.part", f"{here}/{os.getpid()}.json")
threading.Thread(target=dump, daemon=True).start()
"""


class Pair:
    """Two servers, started at the same moment."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.servers = [ServerProcess("--tp", "2", run_base=base) for _ in range(2)]
        self.urls: list[str] = []
        self.trees: list[list[int]] = []

    def wait_ready(self) -> None:
        self.urls = [server.wait_ready(120) for server in self.servers]
        self.trees = [processes.tree(server.process.pid) for server in self.servers]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    base = tmp_path_factory.mktemp("run", numbered=True)
    (base / "site").mkdir()
    (base / "site" / "sitecustomize.py").write_text(SITE)
    with pytest.MonkeyPatch.context() as patch:
        inherited = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(base / "site"), *([inherited] if inherited else [])]))
        patch.setenv("MODULES_DUMP", str(base / "site"))
        two = Pair(base)
        with two.servers[0], two.servers[1]:
            two.wait_ready()
            yield two


def answer(url: str) -> str:
    body = json.dumps({"model": "demo", "prompt": "中国的首都是", "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        text: str = json.load(response)["choices"][0]["text"]
        return text


def test_two_servers_at_once_get_two_ports_and_both_answer(pair: Pair) -> None:
    assert pair.urls[0] != pair.urls[1]
    assert [answer(url) for url in pair.urls] == ["北京", "北京"]
    assert not set(pair.trees[0]) & set(pair.trees[1])
    run_directories = list(pair.base.glob("nanoengine-*"))
    assert len(run_directories) == 2
    assert all(directory.stat().st_mode & 0o077 == 0 for directory in run_directories)


def test_idle_servers_leave_the_processor_alone(pair: Pair) -> None:
    pids = [pid for tree in pair.trees for pid in tree]
    time.sleep(1)
    before, seconds = processes.cpu_seconds(pids), 4.0
    time.sleep(seconds)
    # 3 % of a core is promised for one server (`python -m launch.bench lifecycle` measures it); five times that here.
    assert (processes.cpu_seconds(pids) - before) / seconds < 2 * 5 * 0.03


def test_each_kind_of_process_loads_only_what_it_needs(pair: Pair) -> None:
    site = pair.base / "site"
    (site / "dump").touch()
    num_processes = sum(map(len, pair.trees))
    until(lambda: len(list(site.glob("*.json"))) >= num_processes, why="a process did not tell what it has loaded")
    kinds: dict[str, list[set[str]]] = {"launch": [], "scheduler": [], "worker": []}
    for file in site.glob("*.json"):
        process = json.loads(file.read_text())
        modules = set(process["modules"])
        command = " ".join(process["argv"])
        kind = "launch" if "-m launch" in command else "scheduler" if "nanoengine.engine" in command else "worker"
        if kind != "worker" or "workers.worker" in modules:  # multiprocessing's resource tracker is no rank
            kinds[kind].append(modules)
    assert {kind: len(found) for kind, found in kinds.items()} == {"launch": 2, "scheduler": 2, "worker": 4}
    for modules in kinds["launch"]:
        assert not modules & {"torch", "transformers", "workers"}
    for modules in kinds["scheduler"]:
        assert not modules & {
            "torch",
            "transformers",
            "tokenizers",
            "fastapi",
            "uvicorn",
            "workers",
            "launch",
            "jinja2",
        }
    for modules in kinds["worker"]:
        unwanted = {"transformers", "tokenizers", "fastapi", "uvicorn", "launch", "nanoengine.scheduler"}
        assert not modules & unwanted


def test_killed_server_leaves_nothing_and_does_not_touch_its_neighbour(pair: Pair) -> None:
    """Runs last: it ends the first server the hard way."""
    shared = shared_memory()
    (killed, other), (tree, other_tree) = pair.servers, pair.trees
    killed.process.kill()
    until(
        lambda: not any(processes.alive(pid) for pid in tree) and len(list(pair.base.glob("nanoengine-*"))) == 1,
        why="a killed server left a process or its run directory",
    )
    until(lambda: not leaked_memory(shared), 5)
    assert answer(pair.urls[1]) == "北京"
    assert other.stop(seconds=15) == 0
    assert not any(processes.alive(pid) for pid in other_tree)
    assert not list(pair.base.glob("nanoengine-*"))
