"""Where the API keys come from, that one of several is enough, and that none of them shows anywhere."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from configs.engine import EngineConfig, ServerConfig
from configs.errors import ConfigError
from launch.cli import main, parse
from launch.keys import ApiKeys, load_keys


def test_settings_file_and_environment_add_up(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who has which\nalpha\n\n  beta # of Bob\nga#mma\n", encoding="utf-8")
    path.chmod(0o600)
    environ = {"NANOENGINE_API_KEY": "delta,epsilon zeta", "HOME": "/"}
    keys = load_keys(ServerConfig(api_key=("eta", "alpha"), api_key_file=str(path)), environ)
    good = ["alpha", "beta", "ga#mma", "delta", "epsilon", "zeta", "eta"]
    assert len(keys.digests) == len(good)
    assert all(keys.accept(key.encode()) for key in good)
    assert not any(keys.accept(key) for key in (b"", b"#", b"of", b"alph", b"alphaa", b"ALPHA", b"delta,epsilon"))
    assert environ == {"HOME": "/"}, "a child would inherit the keys"


def test_no_key_is_no_guard() -> None:
    keys = load_keys(ServerConfig(), {})
    assert not keys
    assert not keys.accept(b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"# nothing\n\n", "holds no key"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a b\n", "without blanks"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_an_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A server must not run unguarded because its file of keys was empty."""
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_keys(ServerConfig(api_key_file=str(path)), {})
    assert "a b" not in str(error.value)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_key_file_that_others_can_read_is_warned_of(
    tmp_path: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("alpha\n")
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        load_keys(ServerConfig(api_key_file=str(path)), {})
    assert ("chmod 600" in caplog.text) is warned
    assert "alpha" not in caplog.text


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of an answer must not tell which key, or how much of one, was right."""
    compared: list[bytes] = []
    monkeypatch.setattr("hmac.compare_digest", lambda left, right: compared.append(right) or left == right)
    keys = ApiKeys.of(["one", "two", "three"])
    for given in (b"one", b"three", b"none", b"x" * 10**6):
        compared.clear()
        keys.accept(given)
        assert compared == [*keys.digests]


def test_no_repr_and_no_error_shows_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(["--api-key", "sesame3", "--api-key", "sesame4"])
    assert config.server.api_key == ("sesame3", "sesame4")
    assert "sesame" not in repr(config) + str(config) + repr(ApiKeys.of(config.server.api_key))
    for arguments in (
        ["--api-key", "sesame3", "sesame4"],
        ["--api-key", "sesame3", "--host", "0.0.0.0", "--api-key", "sesame4 x"],
        ["--api-key", ""],
    ):
        assert main(arguments) == 2
        assert "sesame" not in capsys.readouterr().err
    with pytest.raises(ConfigError) as error:
        ServerConfig(api_key=(b"sesame3",))  # type: ignore[arg-type]
    assert "sesame" not in str(error.value)


def test_python_may_give_one_key_or_several() -> None:
    assert EngineConfig.create(api_key="a").server.api_key == ("a",)
    assert EngineConfig.create(api_key=["a", "b"]).server.api_key == ("a", "b")


def test_a_public_address_needs_a_key_or_the_word_insecure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[EngineConfig] = []

    async def serve(config: EngineConfig, *_: object) -> int:
        served.append(config)
        return 0

    monkeypatch.setattr("launch.supervisor._serve", serve)
    monkeypatch.setattr("launch.supervisor.configure_server_logging", lambda config: None)
    public = ["--host", "0.0.0.0", "--port", "0"]
    assert main(public) == 2
    assert "--insecure" in capsys.readouterr().err
    assert not served
    assert main([*public, "--insecure"]) == 0
    assert main([*public, "--api-key", "k"]) == 0
    monkeypatch.setenv("NANOENGINE_API_KEY", "k")
    assert main(public) == 0
    assert "NANOENGINE_API_KEY" not in os.environ
    assert [config.server.api_key for config in served] == [()] * 3, "behind the guard nobody needs the keys"
