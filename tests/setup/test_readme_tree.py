"""The file tree in the README is the tree that git tracks.

The tree is a fenced block with the info string `tree`:

    ```tree
    configs/                      what a user may set
      engine.py                   the frozen configuration
      errors.py, fields.py        several names may share a line
      demo_model/                 a folder without lines of its own stands for all it holds
    ```

Two spaces of indentation are one level; a name that ends in `/` is a folder; two or more spaces end the names, and
what follows is the purpose, which every line must have. A folder that has lines below it lists all of its files
and folders; so does the top level. `__init__.py`, `py.typed` and `.gitignore` go without saying.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.setup.repository import ROOT, tracked_files

UNSAID = {"__init__.py", "py.typed", ".gitignore"}


def parse_tree(block: str) -> set[str]:
    """Paths of the block, folders with a slash at their end. Raises ValueError for a line of another form."""
    paths: set[str] = set()
    parents: list[str] = []
    for line in filter(str.strip, block.splitlines()):
        match = re.fullmatch(r"(?P<indent>(?:  )*)(?P<names>\S+(?:, \S+)*) {2,}(?P<purpose>\S.*)", line)
        if match is None:
            raise ValueError(f"not 'name  purpose': {line!r}")
        depth = len(match["indent"]) // 2
        if depth > len(parents):
            raise ValueError(f"indented below no folder: {line!r}")
        parents = parents[:depth]
        names = match["names"].split(", ")
        for name in names:
            path = "".join(parents) + name
            if path in paths:
                raise ValueError(f"named twice: {path}")
            paths.add(path)
        if len(names) == 1 and names[0].endswith("/"):
            parents = [*parents, names[0]]
    return paths


def expected_tree(listed: set[str], files: list[str]) -> set[str]:
    """What the tree should list, given which of its folders it opens (lists something of)."""
    opened = {folder for path in listed for folder in parents_of(path)}
    expected = set()
    for file in files:
        parents = parents_of(file)
        closed = [folder for folder in parents if folder not in opened]
        if closed:
            expected |= {*parents[: parents.index(closed[0]) + 1]}
        else:
            expected |= {*parents, file}
    return {path for path in expected if Path(path).name not in UNSAID}


def parents_of(path: str) -> list[str]:
    """`a/b/c.py` → [`a/`, `a/b/`]; `a/b/` → [`a/`]."""
    parts = path.rstrip("/").split("/")[:-1]
    return ["/".join(parts[: index + 1]) + "/" for index in range(len(parts))]


def test_the_tree_in_the_readme_is_the_tree_of_the_repository() -> None:
    files = tracked_files()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```tree\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    if block is None:
        pytest.fail("README.md has no ```tree block")
    listed = parse_tree(block[1])
    expected = expected_tree(listed, files)
    missing, gone = sorted(expected - listed), sorted(listed - expected)
    assert not missing, f"tracked, but not in the README's tree: {missing}"
    assert not gone, f"in the README's tree, but not tracked: {gone}"


def test_parsing() -> None:
    block = "a/        folder\n  b.py, c.py  two files\n  d/    closed\ne.md      file\n"
    listed = parse_tree(block)
    assert listed == {"a/", "a/b.py", "a/c.py", "a/d/", "e.md"}
    assert expected_tree(listed, ["a/b.py", "a/c.py", "a/d/x.py", "a/__init__.py", "e.md"]) == listed
    assert "a/new.py" in expected_tree(listed, ["a/b.py", "a/new.py"])


@pytest.mark.parametrize("line", ["name.py", "name.py one space", "    deep.py  no parent", " odd.py  purpose"])
def test_a_malformed_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"name|below"):
        parse_tree(line)
