"""Database servers for one test, and a proxy that can cut or silence the link to them."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import psycopg
import pymysql
import pytest

_DEADLINE_SECONDS = 60.0
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    # An immediate stop loses no data without it; only a crash of the machine would.
    "fsync": "off",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "autovacuum": "off",
    # A restart must not wait for a full checkpoint.
    "checkpoint_timeout": "1h",
}
_MARIADB_SETTINGS = {
    "bind-address": "127.0.0.1",
    # Written at each commit but not synchronized: only a crash of the machine would lose data.
    "innodb-flush-log-at-trx-commit": "2",
    "innodb-buffer-pool-size": "32M",
}
# Outside the range of ephemeral ports, so that no outgoing connection takes the port during a
# restart.
_PORTS = range(20_000, 32_000)
# PgBouncer and MariaDB may be in /usr/sbin, which not every user has in the PATH.
_PROGRAM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


def needs_program(name: str, path: Path | str | None) -> str:
    """The path of a program. If it is missing, the test fails in CI and is skipped elsewhere."""
    if path is not None:
        return str(path)
    if os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed")
    pytest.skip(f"{name} is not installed")


def postgres_program(name: str) -> str:
    """The path of a program of the newest installed PostgreSQL.

    Debian installs them in one directory per version, outside the PATH.
    """
    versions = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3])
    )
    return needs_program("PostgreSQL", versions[-1] if versions else shutil.which(name))


def free_port() -> int:
    """A free TCP port of 127.0.0.1."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclasses.dataclass(frozen=True, slots=True)
class ServerUser:
    """The system user of server programs, which refuse to run as root."""

    name: str | None
    """``None`` for the user that runs the tests."""

    @classmethod
    def choose(cls, name: str = "postgres") -> Self:
        """The system user ``name`` if the tests run as root, otherwise the current user."""
        return cls(name if os.geteuid() == 0 else None)

    def make_folder(self) -> Path:
        """Create a folder of this user; pytest's own folders are not accessible to other users."""
        folder = Path(tempfile.mkdtemp(prefix="bgjobs-"))
        if self.name is not None:
            shutil.chown(folder, self.name, self.name)
        return folder

    def popen(self, command: Sequence[str], folder: Path, **options: Any) -> subprocess.Popen[str]:
        """Start a program as this user, with its output in ``folder/log``."""
        if self.name is not None:
            options |= {"user": self.name, "group": self.name, "extra_groups": []}
        with (folder / "log").open("a") as log:
            return subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                # Ctrl-C in the terminal of the tests must not reach it.
                start_new_session=True,
                **options,
            )


Transcript = list[str]
"""The statements of one transaction, and the replies to them after ``< ``:
``["BEGIN", "< BEGIN", "UPDATE shop …", "< UPDATE 1", "COMMIT"]``."""


class _Protocol(abc.ABC):
    """The protocol of one connection, as far as the proxy must understand it."""

    client_begins = False
    """Whether the client sends the first message."""

    @abc.abstractmethod
    def read(self, connection: socket.socket) -> bytes:
        """Read one message; empty at the end."""

    def read_first(self, client: socket.socket) -> bytes:
        """Read the first message of a client that begins."""
        raise NotImplementedError

    @abc.abstractmethod
    def statement(self, message: bytes) -> str | None:
        """The statement in a message, if it has one."""

    @abc.abstractmethod
    def answer(self, message: bytes) -> str | None:
        """The server's reply to a completed statement, such as ``UPDATE 1``."""

    @abc.abstractmethod
    def begins(self, statement: str, transcript: Transcript) -> bool:
        """Whether a statement is the first of a transaction."""


class _PostgresProtocol(_Protocol):
    client_begins = True

    def __init__(self) -> None:
        self._prepared: dict[bytes, str] = {}

    def read(self, connection: socket.socket) -> bytes:
        return self._read(connection, 5)

    def read_first(self, client: socket.socket) -> bytes:
        # The first message has no type byte.
        return self._read(client, 4)

    def _read(self, connection: socket.socket, head: int) -> bytes:
        header = _read(connection, head)
        if not header:
            return b""
        (length,) = struct.unpack("!I", header[-4:])
        return header + _read(connection, length - 4)

    def statement(self, message: bytes) -> str | None:
        """The text of a simple query, or of a prepared statement when it is bound."""
        kind, body = message[:1], message[5:]
        if kind == b"Q":
            return body[:-1].decode()
        if kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            self._prepared[name] = text.decode()
        if kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            return self._prepared.get(name)
        return None

    def answer(self, message: bytes) -> str | None:
        return message[5:-1].decode() if message[:1] == b"C" else None

    def begins(self, statement: str, transcript: Transcript) -> bool:
        return statement.startswith("BEGIN")


class _MysqlProtocol(_Protocol):
    _QUERY, _OK, _ERROR = 3, 0, 0xFF

    def __init__(self) -> None:
        self._verb: str | None = None
        """The verb of the statement without a reply so far."""

    def read(self, connection: socket.socket) -> bytes:
        header = _read(connection, 4)
        if not header:
            return b""
        return header + _read(connection, int.from_bytes(header[:3], "little"))

    def statement(self, message: bytes) -> str | None:
        # Each command restarts the sequence numbers at 0.
        is_query = message[3] == 0 and message[4] == self._QUERY
        text = message[5:].decode("utf-8", "replace") if is_query else None
        self._verb = text.split(maxsplit=1)[0] if text else None
        return text

    def answer(self, message: bytes) -> str | None:
        verb, self._verb = self._verb, None
        if verb is None or message[4] == self._ERROR:
            return None
        if message[4] == self._OK:
            return f"{verb} {_short_number(message[5:])}"
        # An INSERT … RETURNING; its rows follow.
        return verb if verb == "INSERT" else None

    def begins(self, statement: str, transcript: Transcript) -> bool:
        """There is no BEGIN: the statement after a commit or rollback begins a transaction."""
        return any(entry in ("COMMIT", "ROLLBACK") for entry in transcript)


def _short_number(data: bytes) -> int:
    """Decode a length-encoded integer of MySQL of one or two bytes."""
    return data[0] if data[0] < 0xFB else int.from_bytes(data[1:3], "little")


class Server(abc.ABC):
    """A database server with its own data, on a free port of 127.0.0.1, without passwords."""

    user: str
    """The administrator's name."""
    speaks: ClassVar[Callable[[], _Protocol]]
    """The protocol for a proxy in front of it."""
    stop_signals: Mapping[str, signal.Signals]
    """The signals for a clean stop and for a crash."""

    def __init__(self, system_user: str) -> None:
        self.port = free_port()
        self._user = ServerUser.choose(system_user)
        self._find_programs()
        self.folder = self._user.make_folder()
        self._process: subprocess.Popen[str] | None = None
        try:
            initialization = self._user.popen(self._initialization(), self.folder)
            assert initialization.wait(_DEADLINE_SECONDS) == 0, self.log()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _find_programs(self) -> None:
        """Find the server's programs, or skip the test."""

    @abc.abstractmethod
    def _initialization(self) -> Sequence[str]:
        """The command that creates the data directory."""

    @abc.abstractmethod
    def _command(self) -> Sequence[str]:
        """The command that runs the server."""

    @abc.abstractmethod
    def execute(self, statement: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """Run a statement on a new connection, past any proxy; returns its rows."""

    @abc.abstractmethod
    def url(self, database: str, *, port: int | None = None) -> str:
        """The URL of a database.

        :param port: the port of a proxy in front of it.
        """

    @abc.abstractmethod
    def end_connections(self, database: str) -> int:
        """End all connections to a database; returns their number."""

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Whether the server answers a query."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The id of the server's main process while it runs."""
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        """Start the server.

        :param wait: wait until it answers; it may have to recover first.
        """
        self._launch()
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while wait and not self._answers():
            assert time.monotonic() < deadline, f"no {type(self).__name__}: {self.log()}"
            assert self._process is not None
            if self._process.poll() is not None:
                # After an immediate stop, old processes may still hold the shared memory.
                self._launch()
            time.sleep(0.05)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server: ``fast`` ends all sessions cleanly, ``immediate`` is a crash."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGCONT)
        process.send_signal(self.stop_signals[mode])
        process.wait(_DEADLINE_SECONDS)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server and start it again."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server and delete its data."""
        with contextlib.suppress(ProcessLookupError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def create_database(self) -> str:
        """Create an empty database; returns its name."""
        name = f"test_{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def log(self) -> str:
        """The text of the server's log."""
        return (self.folder / "log").read_text()

    def _launch(self) -> None:
        self._process = self._user.popen(self._command(), self.folder)


class PostgresServer(Server):
    """A PostgreSQL server.

    :param settings: additional settings of ``postgresql.conf``.
    """

    user = "postgres"
    speaks = _PostgresProtocol
    stop_signals: ClassVar = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

    def __init__(self, **settings: str) -> None:
        self._settings = _SETTINGS | settings
        super().__init__("postgres")

    def execute(self, statement: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """Run a statement on a new connection, past any proxy; returns its rows."""
        with psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            dbname=database or "postgres",
            autocommit=True,
            connect_timeout=10,
        ) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def url(
        self,
        database: str = "postgres",
        driver: str = "postgresql+psycopg",
        *,
        port: int | None = None,
    ) -> str:
        """The URL of a database.

        :param port: the port of a proxy or a pooler in front of it.
        """
        return (
            f"{driver}://{self.user}@127.0.0.1:{port or self.port}/{database}"
            # Not encrypted, because the proxy reads the protocol.
            "?sslmode=disable&gssencmode=disable"
        )

    def end_connections(self, database: str) -> int:
        return len(
            self.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{database}'"
            )
        )

    def _find_programs(self) -> None:
        self._initdb, self._postgres = map(postgres_program, ("initdb", "postgres"))

    def _initialization(self) -> Sequence[str]:
        return [
            self._initdb,
            *("-D", str(self.folder / "data"), "-U", self.user, "-A", "trust"),
            *("-E", "UTF8", "--locale", "C", "--no-sync", "--no-instructions"),
        ]

    def _command(self) -> Sequence[str]:
        settings = self._settings | {"unix_socket_directories": str(self.folder)}
        options = [word for item in settings.items() for word in ("-c", "=".join(item))]
        return [self._postgres, "-D", str(self.folder / "data"), "-p", str(self.port), *options]

    def _answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


class MariaServer(Server):
    """A MariaDB server."""

    user = "root"
    speaks = _MysqlProtocol
    stop_signals: ClassVar = {"fast": signal.SIGTERM, "immediate": signal.SIGKILL}

    def __init__(self) -> None:
        super().__init__("mysql")

    def execute(self, statement: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """Run a statement on a new connection, past any proxy; returns its rows."""
        with self._cursor(database) as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    @contextlib.contextmanager
    def _cursor(self, database: str | None) -> Iterator[Any]:
        connection = pymysql.connect(
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            database=database,
            autocommit=True,
            read_timeout=10,
            ssl_disabled=True,
        )
        with contextlib.closing(connection), connection.cursor() as cursor:
            yield cursor

    def url(self, database: str = "", *, port: int | None = None) -> str:
        # Without TLS: PyMySQL reads the system's certificates again for each connection.
        address = f"{self.user}@127.0.0.1:{port or self.port}/{database}"
        return f"mysql+pymysql://{address}?ssl_disabled=true"

    def end_connections(self, database: str) -> int:
        found = f"SELECT id FROM information_schema.processlist WHERE db = '{database}'"
        with self._cursor(None) as cursor:
            cursor.execute(found)
            numbers = [number for (number,) in cursor.fetchall()]
            for number in numbers:
                # KILL fails for a connection that has already ended.
                with contextlib.suppress(pymysql.err.OperationalError):
                    cursor.execute(f"KILL {number}")
        return len(numbers)

    def _find_programs(self) -> None:
        self._install, self._mariadbd = (
            needs_program("MariaDB", shutil.which(name, path=_PROGRAM_PATH))
            for name in ("mariadb-install-db", "mariadbd")
        )

    def _initialization(self) -> Sequence[str]:
        return [
            self._install,
            *("--no-defaults", f"--datadir={self.folder / 'data'}", "--skip-test-db"),
            # A separate folder: concurrent initializations delete each other's temporary tables.
            f"--tmpdir={self.folder}",
            "--auth-root-authentication-method=normal",
        ]

    def _command(self) -> Sequence[str]:
        settings = _MARIADB_SETTINGS | {
            "datadir": self.folder / "data",
            "tmpdir": self.folder,
            "port": self.port,
            "socket": self.folder / "socket",
            "pid-file": self.folder / "pid",
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [self._mariadbd, "--no-defaults", *options]

    def _answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except pymysql.err.OperationalError:
            return False
        return True


Matches = Callable[[Transcript], bool]
When = Literal["before", "after"]
Mode = Literal["pass", "cut", "silent"]


class Proxy:
    """A TCP proxy to a server on this host; the test chooses its faults.

    It reads the protocol, so that it can cut a connection at an exact statement. Connections must
    not be encrypted: the URL of PostgreSQL needs ``sslmode=disable`` and ``gssencmode=disable``.

    :param server: the server; it can be started later.
    """

    def __init__(self, server: Server) -> None:
        self._server = ("127.0.0.1", server.port)
        self.speaks = server.speaks
        self._mode: Mode = "pass"
        self._changed = threading.Condition()
        self._rule: _Rule | None = None
        self._links: set[_Link] = set()
        self._listener = socket.create_server(("127.0.0.1", free_port()))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def let_pass(self) -> None:
        """Forward everything, including data that arrived while the link was silent."""
        for link in self._list_links():
            link.is_silent = False
        self._set_mode("pass")

    def cut(self) -> None:
        """Close all connections, and each new one at once."""
        self._set_mode("cut")
        self.cut_once()

    def cut_once(self) -> None:
        """Close all connections; new ones work."""
        for link in self._list_links():
            link.close()

    def go_silent(self) -> None:
        """Keep connections open, let new ones open, and forward nothing in either direction."""
        self._set_mode("silent")

    def cut_when(self, matches: Matches, when: When = "before", times: int = 1) -> threading.Event:
        """Cut the connection whose transaction ``matches``, at its last statement.

        :param when: ``before`` the server gets the statement, or ``after`` the server has executed
            it, in place of the reply.
        :param times: how many connections to cut; after that everything passes.
        :returns: an event that is set after the last cut.
        """
        self._rule = _Rule(matches, when, times)
        return self._rule.done

    def go_silent_when(self, matches: Matches) -> threading.Event:
        """Silence the connection whose transaction ``matches``, at its last statement.

        Other connections are not affected. :meth:`let_pass` delivers the statement and everything
        after it to the server.

        :returns: an event that is set when the connection goes silent.
        """
        self._rule = _Rule(matches, "silent", 1)
        return self._rule.done

    def close(self) -> None:
        """Close all connections and end all threads."""
        # Closing the socket does not wake the thread in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        links = self._list_links()
        self.cut()
        for thread in [self._thread, *(thread for link in links for thread in link.threads)]:
            if thread.ident is not None:
                thread.join(_DEADLINE_SECONDS)
                assert not thread.is_alive(), f"{thread.name} hangs"

    def _set_mode(self, mode: Mode) -> None:
        with self._changed:
            self._mode = mode
            self._changed.notify_all()

    def _list_links(self) -> list[_Link]:
        with self._changed:
            return list(self._links)

    def _accept(self) -> None:
        while True:
            try:
                client = _without_delay(self._listener.accept()[0])
            except OSError:
                return
            with self._changed:
                # Under the lock, so that a later cut finds the link and closes it.
                if self._mode != "cut":
                    link = _Link(self, client)
                    self._links.add(link)
                    link.threads[0].start()
                    continue
            _close(client)

    # Used by the links

    def connect(self) -> socket.socket:
        """A connection to the server."""
        return _without_delay(socket.create_connection(self._server))

    def wait_while_silent(self, link: _Link) -> None:
        """Wait until the link is no longer silent, or is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: link.is_closed or not (link.is_silent or self._mode == "silent")
            )

    def wake_waiting(self) -> None:
        """Wake all waiting threads, so that they check their condition again."""
        with self._changed:
            self._changed.notify_all()

    def rule_for(self, transcript: Transcript) -> _Rule | None:
        """The rule that applies to this transcript, if any."""
        rule = self._rule
        return rule if rule is not None and rule.applies(transcript) else None

    def forget(self, link: _Link) -> None:
        """Remove a link that has ended."""
        with self._changed:
            self._links.discard(link)


def _without_delay(link: socket.socket) -> socket.socket:
    """Send each message at once. By default, the kernel waits for the other side to acknowledge the
    message before, which takes 40 ms."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


class _Rule:
    def __init__(self, matches: Matches, then: When | Literal["silent"], times: int) -> None:
        self.then = then
        self.done = threading.Event()
        self._matches = matches
        self._left = times
        self._lock = threading.Lock()

    def applies(self, transcript: Transcript) -> bool:
        with self._lock:
            if not self._left or not self._matches(transcript):
                return False
            self._left -= 1
            return True

    def applied(self) -> None:
        if not self._left:
            self.done.set()


def commits(*parts: str) -> Matches:
    """Match a transaction at its commit if it contains each of the patterns in ``parts``."""

    def matches(transcript: Transcript) -> bool:
        whole = "\n".join(transcript)
        return transcript[-1] == "COMMIT" and all(re.search(part, whole) for part in parts)

    return matches


class _Link:
    """One connection through the proxy: a thread for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.is_closed = self.is_silent = False
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._protocol = proxy.speaks()
        self._transcript: Transcript = []
        self._cut_at_answer: _Rule | None = None
        self.threads = [
            threading.Thread(target=self._run, args=[work], name=f"proxy-{name}", daemon=True)
            for name, work in (("up", self._forward_to_server), ("down", self._forward_to_client))
        ]

    def close(self) -> None:
        self.is_closed = True
        self._proxy.wake_waiting()
        _close(self._client)
        if self._server is not None:
            _close(self._server)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            pass
        finally:
            self.close()
            self._proxy.forget(self)

    def _forward_to_server(self) -> None:
        """Forward messages from the client to the server."""
        self._proxy.wait_while_silent(self)
        if self.is_closed:
            return
        self._server = self._proxy.connect()
        if self.is_closed:
            # close() was called before this connection existed.
            _close(self._server)
            return
        self.threads[1].start()
        if self._protocol.client_begins:
            self._server.sendall(self._protocol.read_first(self._client))
        while not self.is_closed:
            message = self._protocol.read(self._client)
            self._proxy.wait_while_silent(self)
            if not message or self.is_closed:
                return
            statement = self._protocol.statement(message)
            if statement is not None and self._ends_at(statement):
                return
            self._server.sendall(message)

    def _forward_to_client(self) -> None:
        """Forward messages from the server to the client."""
        assert self._server is not None
        while not self.is_closed:
            message = self._protocol.read(self._server)
            self._proxy.wait_while_silent(self)
            if not message or self.is_closed:
                return
            answer = self._protocol.answer(message)
            if answer is not None:
                if self._cut_at_answer is not None:
                    self._cut_at_answer.applied()
                    return
                self._transcript.append(f"< {answer}")
            self._client.sendall(message)

    def _ends_at(self, statement: str) -> bool:
        """Apply the rule for this statement; returns whether the connection ends."""
        if self._protocol.begins(statement, self._transcript):
            self._transcript = []
        self._transcript.append(statement)
        rule = self._proxy.rule_for(self._transcript)
        if rule is None:
            return False
        if rule.then == "after":
            self._cut_at_answer = rule
            return False
        if rule.then == "silent":
            self.is_silent = True
            rule.applied()
            self._proxy.wait_while_silent(self)
            return self.is_closed
        rule.applied()
        self.close()
        return True


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return b""
        data += part
    return data


def _close(connection: socket.socket) -> None:
    # Closing the socket does not wake a thread in recv().
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class PgBouncer:
    """A PgBouncer in transaction mode in front of a PostgreSQL server, on a free port.

    :param server_port: the port of PostgreSQL.
    :param connections: the number of server connections for each database.
    """

    def __init__(self, server_port: int, connections: int = 3) -> None:
        self.port = free_port()
        program = needs_program("PgBouncer", shutil.which("pgbouncer", path=_PROGRAM_PATH))
        self._user = ServerUser.choose()
        self.folder = self._user.make_folder()
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": self.folder,
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": connections,
            "admin_users": PostgresServer.user,
        }
        (self.folder / "pgbouncer.ini").write_text(
            "[databases]\n"
            f"* = host=127.0.0.1 port={server_port} user={PostgresServer.user}\n"
            "[pgbouncer]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
        )
        self._process = self._user.popen([program, "pgbouncer.ini"], self.folder)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return self
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    log = (self.folder / "log").read_text()
                    self.__exit__()
                    raise AssertionError(f"no PgBouncer: {log}") from None
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # A program ignores SIGQUIT if the tests were started in the background by a shell.
            self._process.kill()
        self._process.wait(_DEADLINE_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)
