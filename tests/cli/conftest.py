"""Commands through the real entry, beside a host that is up for as long as a file's tests take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.support.hosts import Up, up

from xenbus.cli.main import run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def host() -> Iterator[Up]:
    with up() as running:
        yield running


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("domain", "list") -> (code, stdout, stderr)`, without colours; no traceback ever."""
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(words))
        out, err = capsys.readouterr()
        assert "Traceback" not in err, err
        return int(code), out, err

    return call


@pytest.fixture
def on_host(host: Up, command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command` with this host's directory in the environment."""
    monkeypatch.setenv("XENBUS_DIR", str(host.root))
    return command
