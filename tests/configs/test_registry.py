"""Names of models lead to directories, and unknown ones to a list of the known."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError, ModelError, UnknownModelError
from configs.registry import known_models, load_model_path


def test_demo_is_known_and_lies_in_the_package() -> None:
    assert Path(load_model_path("demo")).name == "demo_model"
    assert "demo" in known_models()


@pytest.mark.parametrize("name", ["nonsense", "./nowhere", "/no/such/dir"])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownModelError, match=r"known models: .*demo"):
        load_model_path(name)


def test_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert load_model_path(str(tmp_path)) == str(tmp_path.resolve())


def test_own_registry_file_adds_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    registry = tmp_path / "models.yaml"
    registry.write_text("mine: mine\ngone: ./gone\n")
    monkeypatch.setenv("NANOENGINE_MODEL_PATHS", str(registry))
    assert load_model_path("mine") == str((tmp_path / "mine").resolve())
    with pytest.raises(ModelError, match="not a directory"):
        load_model_path("gone")
    with pytest.raises(UnknownModelError, match="demo, gone, mine"):
        load_model_path("other")


@pytest.mark.parametrize("text", ["- a\n", "a: 3\n", "a: [\n"])
def test_malformed_own_registry_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    registry = tmp_path / "models.yaml"
    registry.write_text(text)
    monkeypatch.setenv("NANOENGINE_MODEL_PATHS", str(registry))
    with pytest.raises(ConfigError, match=r"models\.yaml"):
        load_model_path("demo")


def test_name_with_a_slash_is_looked_up_in_the_local_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnknownModelError, match="allow_download"):
        load_model_path("org/name")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert load_model_path("org/name") == str(snapshot)
