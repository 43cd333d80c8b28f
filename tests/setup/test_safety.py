"""What must not stand in the product: ways to run what somebody else wrote, and checks of it that -O takes away."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.setup.repository import PACKAGES, ROOT

SOURCES = sorted(path for package in (*PACKAGES, "examples") for path in (ROOT / package).rglob("*.py"))
# Names that load or run code, wherever they are called from. pickle.dumps makes bytes and runs nothing.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads",
    "shelve.open", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "torch.load",
    "torch.hub.load", "torch.jit.load", "numpy.load", "np.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "subprocess.getoutput", "tempfile.mktemp",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "shell", "allow_pickle"}
# The one unpickler: a subclass that builds primitives alone.
UNPICKLER = ("nanoengine/channel.py", "_PrimitiveUnpickler")
# Modules that read what a client, another process or a model's author wrote. An assertion may state what the code
# above it guarantees (and help mypy to see it); it must not look at what was read. So each is listed with its text.
READERS = (
    "configs/checkpoint.py", "configs/model_files.py", "configs/registry.py", "launch/server/bodies.py",
    "launch/server/middleware.py", "launch/server/response_format.py", "launch/server/schema.py",
    "launch/server/tokens.py",
    "launch/server/request_id.py", "nanoengine/channel.py", "nanoengine/chat_template.py", "nanoengine/front_socket.py",
    "nanoengine/grammar.py", "nanoengine/grammar_process.py", "nanoengine/messages.py", "nanoengine/prompts.py",
    "nanoengine/sampling_params.py", "nanoengine/step.py", "nanoengine/structured_outputs.py",
    "nanoengine/template_sandbox.py", "nanoengine/tokenizer.py", "workers/weight_files.py",
)  # fmt: skip
ALLOWED_ASSERTIONS = {
    "nanoengine/structured_outputs.py": {"isinstance(schema, dict)", "self.grammar is not None"},
    "workers/weight_files.py": {"promised is not None"},
}


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _problems(source: str) -> list[str]:
    tree = ast.parse(source)
    found = []
    for name, call in _calls(tree):
        if name in FORBIDDEN:
            found.append(f"line {call.lineno}: {name}()")
        for keyword in call.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in FORBIDDEN_ARGUMENTS and not is_false:
                found.append(f"line {call.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN
            found.extend(f"line {node.lineno}: from {node.module} import it as {name}" for name in sorted(names))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_somebody_else_wrote(path: Path) -> None:
    assert _problems(path.read_text(encoding="utf-8")) == []


UNSAFE = (
    "import pickle\npickle.loads(b)", "from pickle import loads", "torch.load(f)", "eval('1')", "yaml.load(x)",
    "exec(x)",
    "subprocess.run(x, shell=True)", "f(trust_remote_code=True)", "f(trust_remote_code=option)", "np.load(x)",
)  # fmt: skip


@pytest.mark.parametrize("source", UNSAFE)
def test_the_check_itself_sees(source: str) -> None:
    assert _problems(source)


def test_there_is_one_unpickler_and_it_builds_primitives_alone() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
                found.append((str(path.relative_to(ROOT)), node.name))
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("pickle.Unpickler")), path
    assert found == [UNPICKLER]


@pytest.mark.parametrize("name", READERS)
def test_no_assertion_stands_between_what_is_read_and_what_it_could_do(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    asserted = {ast.unparse(node.test) for node in ast.walk(tree) if isinstance(node, ast.Assert)}
    assert asserted <= ALLOWED_ASSERTIONS.get(name, set())
