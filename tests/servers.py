"""Servers of a test's own, and a link to them that can be cut, silenced and timed."""

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
    # An immediate stop loses nothing by it: only a crash of the machine would.
    "fsync": "off",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "autovacuum": "off",
    # Starting again must not take the time of a whole checkpoint.
    "checkpoint_timeout": "1h",
}
_MARIADB_SETTINGS = {
    "bind-address": "127.0.0.1",
    # Written at each commit and not synchronized: only a crash of the machine would lose it.
    "innodb-flush-log-at-trx-commit": "2",
    "innodb-buffer-pool-size": "32M",
}
# Outside the range from which outgoing connections take theirs, so that a port that is free for
# the moment of a restart stays so.
_PORTS = range(20_000, 32_000)
# Where PgBouncer and MariaDB are; not every user has /usr/sbin in the PATH.
_PROGRAM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


def needs_program(name: str, path: Path | str | None) -> str:
    """The path of a program; without it the test fails in CI and is skipped elsewhere."""
    if path is not None:
        return str(path)
    if os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed")
    pytest.skip(f"{name} is not installed")


def postgres_program(name: str) -> str:
    """The path of a program of the newest PostgreSQL here.

    Debian keeps them out of the PATH, in a directory per version.
    """
    versions = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3])
    )
    return needs_program("PostgreSQL", versions[-1] if versions else shutil.which(name))


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens at."""
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
    """Who server programs run as: they refuse to run as root."""

    name: str | None
    """``None``: whoever runs the tests."""

    @classmethod
    def choose(cls, name: str = "postgres") -> Self:
        """The system's user ``name`` when the tests run as root, else oneself."""
        return cls(name if os.geteuid() == 0 else None)

    def make_folder(self) -> Path:
        """A new folder that belongs to this user; pytest's own ones are closed to others."""
        folder = Path(tempfile.mkdtemp(prefix="bgjobs-"))
        if self.name is not None:
            shutil.chown(folder, self.name, self.name)
        return folder

    def popen(self, command: Sequence[str], folder: Path, **options: Any) -> subprocess.Popen[str]:
        """The program, started as this user, with its output in ``folder/log``."""
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
                # Ctrl-C in the terminal of the tests is not meant for it.
                start_new_session=True,
                **options,
            )


Transcript = list[str]
"""Of one transaction: its statements, and with ``< `` before it what the server said of each:
``["BEGIN", "< BEGIN", "UPDATE shop …", "< UPDATE 1", "COMMIT"]``."""


class _Protocol(abc.ABC):
    """What is said on one connection, as far as the proxy must understand it."""

    client_begins = False
    """Whether the client speaks before the server does."""

    @abc.abstractmethod
    def read(self, connection: socket.socket) -> bytes:
        """One message; empty at the end."""

    def read_first(self, client: socket.socket) -> bytes:
        """The first message of a client that begins."""
        raise NotImplementedError

    @abc.abstractmethod
    def statement(self, message: bytes) -> str | None:
        """The text of what a message asks the server to run."""

    @abc.abstractmethod
    def answer(self, message: bytes) -> str | None:
        """What the server says of a statement that it has done: ``UPDATE 1``."""

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
        # It has no type.
        return self._read(client, 4)

    def _read(self, connection: socket.socket, head: int) -> bytes:
        header = _read(connection, head)
        if not header:
            return b""
        (length,) = struct.unpack("!I", header[-4:])
        return header + _read(connection, length - 4)

    def statement(self, message: bytes) -> str | None:
        """Also the text of what was prepared."""
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
        """Of the statement whose answer has not begun."""

    def read(self, connection: socket.socket) -> bytes:
        header = _read(connection, 4)
        if not header:
            return b""
        return header + _read(connection, int.from_bytes(header[:3], "little"))

    def statement(self, message: bytes) -> str | None:
        # Every command begins to count its messages anew.
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
        # Of an INSERT … RETURNING; its rows follow.
        return verb if verb == "INSERT" else None

    def begins(self, statement: str, transcript: Transcript) -> bool:
        """There is no BEGIN: what follows the end of one transaction is of the next."""
        return any(entry in ("COMMIT", "ROLLBACK") for entry in transcript)


def _short_number(data: bytes) -> int:
    """The number that MySQL writes in one byte, or in the two after a mark."""
    return data[0] if data[0] < 0xFB else int.from_bytes(data[1:3], "little")


class Server(abc.ABC):
    """A database server with data of its own, on a free port of 127.0.0.1, for trusted users."""

    user: str
    """Who may do everything in it."""
    speaks: ClassVar[Callable[[], _Protocol]]
    """What a proxy in front of it must understand."""
    stop_signals: Mapping[str, signal.Signals]
    """What ends all sessions in order, and what is a crash."""

    def __init__(self, system_user: str) -> None:
        self.port = free_port()
        self._user = ServerUser.choose(system_user)
        self._find_programs()
        self.folder = self._user.make_folder()
        self._process: subprocess.Popen[str] | None = None
        try:
            made = self._user.popen(self._initialization(), self.folder)
            assert made.wait(_DEADLINE_SECONDS) == 0, self.log()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _find_programs(self) -> None:
        """Find the programs, or skip the test."""

    @abc.abstractmethod
    def _initialization(self) -> Sequence[str]:
        """The command that makes its data."""

    @abc.abstractmethod
    def _command(self) -> Sequence[str]:
        """The command that runs it."""

    @abc.abstractmethod
    def execute(self, statement: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """What a statement answers on a connection of its own, past any proxy."""

    @abc.abstractmethod
    def url(self, database: str, *, port: int | None = None) -> str:
        """The URL of a database.

        :param port: of a proxy in front of it.
        """

    @abc.abstractmethod
    def end_connections(self, database: str) -> int:
        """End all connections to a database; how many they were."""

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Whether it can be used."""

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
        """Of the server's first process, while it runs."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        """Start it.

        :param wait: until it answers; it may have to recover first.
        """
        self._launch()
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while wait and not self._answers():
            assert time.monotonic() < deadline, f"no {type(self).__name__}: {self.log()}"
            assert self._process is not None
            if self._process.poll() is not None:
                # Processes of the last run may still hold its memory after an immediate stop.
                self._launch()
            time.sleep(0.05)

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it: ``fast`` ends all sessions in order, ``immediate`` is a crash."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGCONT)
        process.send_signal(self.stop_signals[mode])
        process.wait(_DEADLINE_SECONDS)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it and start it again."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop it and delete its data."""
        with contextlib.suppress(ProcessLookupError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def create_database(self) -> str:
        """The name of a new, empty database."""
        name = f"test_{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def log(self) -> str:
        """What it has written to its log."""
        return (self.folder / "log").read_text()

    def _launch(self) -> None:
        self._process = self._user.popen(self._command(), self.folder)


class PostgresServer(Server):
    """A PostgreSQL server.

    :param settings: more of ``postgresql.conf``.
    """

    user = "postgres"
    speaks = _PostgresProtocol
    stop_signals: ClassVar = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

    def __init__(self, **settings: str) -> None:
        self._settings = _SETTINGS | settings
        super().__init__("postgres")

    def execute(self, statement: str, database: str | None = None) -> list[tuple[Any, ...]]:
        """What a statement answers on a connection of its own, past any proxy."""
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

        :param port: of a proxy or a pooler in front of it.
        """
        return (
            f"{driver}://{self.user}@127.0.0.1:{port or self.port}/{database}"
            # The proxy reads along.
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
        """What a statement answers on a connection of its own, past any proxy."""
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
        # Without TLS: PyMySQL reads the certificates of the system anew for each connection.
        where = f"{self.user}@127.0.0.1:{port or self.port}/{database}"
        return f"mysql+pymysql://{where}?ssl_disabled=true"

    def end_connections(self, database: str) -> int:
        found = f"SELECT id FROM information_schema.processlist WHERE db = '{database}'"
        with self._cursor(None) as cursor:
            cursor.execute(found)
            numbers = [number for (number,) in cursor.fetchall()]
            for number in numbers:
                with contextlib.suppress(pymysql.err.OperationalError):
                    # It has ended by itself meanwhile.
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
            # Of its own: servers that are made at once take each other's temporary tables away.
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
    """A TCP link to a server on this host, whose faults the test chooses.

    It reads the protocol along, so that it can cut a connection at one exact statement. Nothing may
    be encrypted: the URL of PostgreSQL needs ``sslmode=disable`` and ``gssencmode=disable``.

    :param server: one that runs, now or later.
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
        """Forward everything, also what came in while the link was silent, as a network does."""
        for link in self._copy_of_links():
            link.is_silent = False
        self._set_mode("pass")

    def cut(self) -> None:
        """Close all connections, and new ones as soon as they come."""
        self._set_mode("cut")
        self.cut_once()

    def cut_once(self) -> None:
        """Close all connections; new ones pass."""
        for link in self._copy_of_links():
            link.close()

    def go_silent(self) -> None:
        """Keep connections open, let new ones open, and forward nothing in either direction."""
        self._set_mode("silent")

    def cut_when(self, matches: Matches, when: When = "before", times: int = 1) -> threading.Event:
        """Cut the connection whose transaction ``matches``, as soon as its last statement comes.

        :param when: ``before`` the server gets the statement, or ``after`` it has done it, in
            place of its answer.
        :param times: so often; then all passes.
        :returns: set when it was cut so often.
        """
        self._rule = _Rule(matches, when, times)
        return self._rule.done

    def go_silent_when(self, matches: Matches) -> threading.Event:
        """Go silent as soon as the last statement of a transaction that ``matches`` comes.

        Only that one connection goes silent. The server gets what was sent on it, with the
        statement, when the link is told to pass.

        :returns: set when it went silent.
        """
        self._rule = _Rule(matches, "silent", 1)
        return self._rule.done

    def close(self) -> None:
        """Close everything."""
        # Closing alone does not wake the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        links = self._copy_of_links()
        self.cut()
        for thread in [self._thread, *(thread for link in links for thread in link.threads)]:
            if thread.ident is not None:
                thread.join(_DEADLINE_SECONDS)
                assert not thread.is_alive(), f"{thread.name} hangs"

    def _set_mode(self, mode: Mode) -> None:
        with self._changed:
            self._mode = mode
            self._changed.notify_all()

    def _copy_of_links(self) -> list[_Link]:
        with self._changed:
            return list(self._links)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                # Within the lock: who cuts afterwards finds the link, and closes it.
                if self._mode != "cut":
                    link = _Link(self, client)
                    self._links.add(link)
                    link.threads[0].start()
                    continue
            _close(client)

    # For its links

    def connect(self) -> socket.socket:
        """A connection to the server."""
        return socket.create_connection(self._server)

    def wait_until_it_passes(self, link: _Link) -> None:
        """Return when the link is no longer silent or was closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: link.is_closed or not (link.is_silent or self._mode == "silent")
            )

    def wake_waiting(self) -> None:
        """Let those that wait look again."""
        with self._changed:
            self._changed.notify_all()

    def rule_for(self, transcript: Transcript) -> _Rule | None:
        """The rule for this moment of a connection's life, if there is one."""
        rule = self._rule
        return rule if rule is not None and rule.applies(transcript) else None

    def forget(self, link: _Link) -> None:
        """Let go of a link that has ended."""
        with self._changed:
            self._links.discard(link)


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
    """Whether a transaction is about to commit that holds each of ``parts`` (patterns)."""

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
            for name, work in (("up", self._go_up), ("down", self._go_down))
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

    def _go_up(self) -> None:
        """From the client to the server."""
        self._proxy.wait_until_it_passes(self)
        if self.is_closed:
            return
        self._server = self._proxy.connect()
        if self.is_closed:
            # Before there was this connection to close.
            _close(self._server)
            return
        self.threads[1].start()
        if self._protocol.client_begins:
            self._server.sendall(self._protocol.read_first(self._client))
        while not self.is_closed:
            message = self._protocol.read(self._client)
            self._proxy.wait_until_it_passes(self)
            if not message or self.is_closed:
                return
            statement = self._protocol.statement(message)
            if statement is not None and self._ends_at(statement):
                return
            self._server.sendall(message)

    def _go_down(self) -> None:
        """From the server to the client."""
        assert self._server is not None
        while not self.is_closed:
            message = self._protocol.read(self._server)
            self._proxy.wait_until_it_passes(self)
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
        """Whether a rule cuts the connection at this statement."""
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
            self._proxy.wait_until_it_passes(self)
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
    # Closing alone does not wake a thread that reads.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class PgBouncer:
    """A PgBouncer in transaction mode in front of a PostgreSQL server, on a free port.

    :param server_port: of PostgreSQL.
    :param connections: to the server at once, for each database.
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
            self._process.send_signal(signal.SIGQUIT)
        self._process.wait(_DEADLINE_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)
