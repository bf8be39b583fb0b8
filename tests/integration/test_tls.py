"""Both servers over TLS, by the settings alone, against real Postgres and real Valkey.

Neither of the embedded servers is built with TLS, so a proxy of this test's ends it in front of
them: what is tried is our side, the checks of certificate and name included.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import pytest
from kombu import Connection
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from schema.errors import BrokerUnavailableError, DatabaseUnavailableError
from workers import AsyncJobClient, Settings, registry
from workers.connection import open_redis
from workers.local import LocalStack
from workers.store.database import Database
from workers.store.jobs import JobStore
from workers.transport import broker_settings

SSL_REQUEST = bytes.fromhex("0000000804d2162f")


def openssl(*words: object) -> None:
    command = ["openssl", *(str(word) for word in words)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a certificate for localhost, and another authority."""
    folder = tmp_path_factory.mktemp("pki")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        openssl(
            "req", "-x509", *key, "-subj", f"/CN={name}", "-days", 2,
            "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem",
        )  # fmt: skip
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    openssl(
        "req", *key, "-subj", "/CN=localhost", "-keyout", folder / "server.key",
        "-out", folder / "server.csr",
    )  # fmt: skip
    openssl(
        "x509", "-req", "-in", folder / "server.csr", "-CA", folder / "ca.pem",
        "-CAkey", folder / "ca.key", "-CAcreateserial", "-days", 2,
        "-extfile", folder / "names", "-out", folder / "server.pem",
    )  # fmt: skip
    return folder


class TlsProxy:
    """Ends TLS in front of a server on a Unix socket."""

    def __init__(self, socket: Path, pki: Path, *, asks: bool) -> None:
        self.socket, self.asks = socket, asks  # Postgres' clients ask for TLS in plain first
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(pki / "server.pem", pki / "server.key")

    async def serve(self) -> asyncio.Server:
        tls = None if self.asks else self.context
        return await asyncio.start_server(self._client, "127.0.0.1", 0, ssl=tls)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError):
            if self.asks:
                if await reader.readexactly(8) != SSL_REQUEST:
                    writer.close()  # no word in plain
                    return
                writer.write(b"S")
                await writer.start_tls(self.context)
            behind = await asyncio.open_unix_connection(str(self.socket))
            await asyncio.gather(self._pump(reader, behind[1]), self._pump(behind[0], writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


@pytest.fixture
async def ports(stack: LocalStack, database_url: str, pki: Path) -> AsyncIterator[tuple[int, int]]:
    """Ports of Postgres and Valkey behind TLS."""
    folder = Path(str(make_url(database_url).query["host"]))
    postgres = folder / ".s.PGSQL.5432"
    valkey = Path(stack.redis_url.removeprefix("unix://").split("?")[0])
    servers = [
        await TlsProxy(postgres, pki, asks=True).serve(),
        await TlsProxy(valkey, pki, asks=False).serve(),
    ]
    yield tuple(server.sockets[0].getsockname()[1] for server in servers)  # type: ignore[misc]
    for server in servers:
        server.close()


def database_over_tls(url: str, port: int, ca: Path, host: str = "localhost") -> str:
    parts = make_url(url)
    return (
        f"postgresql://{parts.username}@{host}:{port}/{parts.database}"
        f"?sslmode=verify-full&sslrootcert={quote(str(ca))}"
    )


def redis_over_tls(port: int, ca: Path, host: str = "localhost") -> str:
    return f"rediss://{host}:{port}/0?ssl_cert_reqs=required&ssl_ca_certs={quote(str(ca))}"


async def test_jobs_go_over_tls(ports: tuple[int, int], database_url: str, pki: Path) -> None:
    settings = Settings(
        database_url=SecretStr(database_over_tls(database_url, ports[0], pki / "ca.pem")),
        redis_url=SecretStr(redis_over_tls(ports[1], pki / "ca.pem")),
        served_model_name=f"m{uuid4().hex}",
    )
    async with AsyncJobClient(settings) as client:
        job = await client.submit("hello")
        assert (await job.status()).state == "queued"
        connection = await client.connection()
        assert await connection.redis.llen(f"promptmill.{settings.served_model_name}\x06\x165") == 1


async def test_celery_goes_over_tls(ports: tuple[int, int], pki: Path) -> None:
    broker = broker_settings(redis_over_tls(ports[1], pki / "ca.pem"))

    def ping(url: str) -> None:
        with Connection(url, transport=broker["broker_transport"], connect_timeout=5) as connection:
            connection.channel().client.ping()

    await asyncio.to_thread(ping, broker["broker_url"])
    with pytest.raises(Exception, match=r"(?i)certificate"):
        await asyncio.to_thread(ping, redis_over_tls(ports[1], pki / "stranger.pem"))


@pytest.mark.parametrize(("ca", "host"), [("stranger", "localhost"), ("ca", "127.0.0.1")])
async def test_who_cannot_prove_its_name_is_refused(
    ca: str, host: str, ports: tuple[int, int], database_url: str, pki: Path
) -> None:
    url = database_over_tls(database_url, ports[0], pki / f"{ca}.pem", host)
    database = Database(url)
    with pytest.raises(DatabaseUnavailableError):
        await JobStore(database).counts()
    await database.aclose()
    redis = open_redis(redis_over_tls(ports[1], pki / f"{ca}.pem", host))
    with pytest.raises(BrokerUnavailableError):
        await registry.served_models(redis)
    await redis.aclose()
