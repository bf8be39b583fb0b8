"""No password shows, however its address is written: on screens, in logs, or to inspectors."""

from __future__ import annotations

import json

import pytest

from schema.errors import ConfigurationError
from workers.app import make_app
from workers.cli.root import main
from workers.logs import _mask
from workers.settings import Settings
from workers.store.database import parse_url

HUSH = "hush"
#: What people write: well formed, as parameters, and with signs that ought to be percent-encoded.
ADDRESSES = (
    "{}://u:hush@127.0.0.1:1/0",
    "{}://u:a%2Fhush%40@127.0.0.1:1/0",
    "{}://127.0.0.1:1/0?user=u&password=hush",
    "{}://u:x/hush@127.0.0.1:1/0",
    "{}://u:x@hush@127.0.0.1:1/0",
    "{}://u:x#hush@127.0.0.1:1/0",
    "{}://u:x?hush@127.0.0.1:1/0",
    "{}://u:hush@[::1/0",
    "{}://u:hush@127.0.0.1:port/0",
    "{}://u:hush@127.0.0.1:1/0?sslpassword=hush&ssl_password=hush",
)
SOCKETS = ("unix://u:hush@/tmp/none.sock?db=0", "unix:///tmp/none.sock?password=hush")


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("scheme", ["redis", "postgresql"])
def test_no_command_shows_a_password(
    scheme: str,
    address: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", "redis://127.0.0.1:1/0")
    name = {"redis": "PROMPTMILL_REDIS_URL", "postgresql": "PROMPTMILL_DATABASE_URL"}[scheme]
    monkeypatch.setenv(name, address.format(scheme))
    commands = [["config", "show", "--json"], ["submit", "x"]]
    if scheme == "postgresql":
        commands.append(["db", "upgrade"])
    for words in commands:
        main(words)
        shown = "".join(capfd.readouterr())
        assert shown
        assert HUSH not in shown, words


@pytest.mark.parametrize("address", [*(each.format("redis") for each in ADDRESSES), *SOCKETS])
def test_no_log_line_shows_a_password(address: str) -> None:
    line = {"event": f"cannot reach {address}, waiting", "url": address}
    assert HUSH not in json.dumps(_mask(None, "info", line))
    assert "cannot reach" in line["event"]
    assert "waiting" in line["event"]


@pytest.mark.parametrize("address", [*(each.format("redis") for each in ADDRESSES[:3]), *SOCKETS])
def test_celery_shows_no_password_to_who_inspects_a_worker(address: str) -> None:
    app = make_app(Settings(), address.replace("user=", "username="), "m")
    connection = app.connection_for_read()
    info = connection.info()
    assert HUSH in info.pop("password")  # Celery leaves that one out of `stats`
    shown = [info, app.conf.table(with_defaults=False), connection.as_uri(), repr(connection)]
    assert HUSH not in json.dumps(shown, default=repr)
    assert HUSH not in app.conf.humanize()


def test_an_at_sign_in_a_password_is_not_taken_for_a_host() -> None:
    with pytest.raises(ConfigurationError, match="%40") as caught:
        parse_url("postgresql://u:x@hush@127.0.0.1/d")
    assert HUSH not in str(caught.value)
    assert parse_url("postgresql://u:x%40hush@127.0.0.1/d").password == "x@hush"
