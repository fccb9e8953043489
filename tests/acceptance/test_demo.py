"""The demo with real processes, real signals and a real browser."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright import sync_api

from example_app import samples
from example_app.drawing import draw_photo
from tests.conftest import wait_until

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 30
JOB_SECONDS = 60
HAS_PROC = Path("/proc/self/environ").exists()

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(not HAS_PROC, reason="finds the demo's processes in /proc"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Demo:
    """``python -m example_app.demo`` in its own instance folder."""

    def __init__(self, instance: Path, port: int) -> None:
        self.port = port
        self._instance = instance
        self._log = instance.with_name(f"{instance.name}-{port}.log")
        # Without variables that configure the shop differently.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SHOP_")}
        environment |= {
            "PORT": str(port),
            "SHOP_INSTANCE_PATH": str(instance),
            "PYTHONUNBUFFERED": "1",
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "example_app.demo"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_until_started(self) -> None:
        def started() -> bool:
            assert self._process.poll() is None, self.output
            return "Ctrl-C stops both" in self.output and "Worker started" in self.output

        wait_until(started, "the demo's start")

    def find_in_output(self, pattern: str) -> str:
        found = re.search(pattern, self.output)
        assert found is not None, self.output
        return found[1]

    @property
    def address(self) -> str:
        return self.find_in_output(r"The shop +(http://\S+)/")

    @property
    def login(self) -> tuple[str, str]:
        return self.find_in_output(r"Sign in as +(\S+)"), self.find_in_output(
            r"with password +(\S+)"
        )

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def wait_until_ended(self) -> int:
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the demo did not end:\n{self.output}")

    def processes(self, command: str = "") -> list[int]:
        """The ids of the demo's processes with ``command`` in their command line."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            # An unreadable process has ended or belongs to another user: it is not the demo's.
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes()
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                marker = f"SHOP_INSTANCE_PATH={self._instance}".encode()
                is_ours = marker in environment.split(b"\0")
                if is_ours and command.encode() in line:
                    found.append(int(folder.name))
        return found

    def child(self, command: str) -> int:
        (pid,) = self.processes(command)
        return pid

    def close(self) -> None:
        """Kill all processes that are left, for example after a failed test."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(END_SECONDS)


StartDemo = Callable[..., Demo]


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[StartDemo]:
    demos: list[Demo] = []

    def start() -> Demo:
        demo = Demo(tmp_path / "instance", free_port())
        demos.append(demo)
        demo.wait_until_started()
        return demo

    yield start
    for demo in demos:
        demo.close()


def test_signals_stop_the_demo(start_demo: StartDemo) -> None:
    """Ctrl-C or SIGTERM stops the web server and the worker, the demo exits with code 0, and it can
    be started again with the same login."""
    logins = set()
    for number in (signal.SIGINT, signal.SIGTERM):
        demo = start_demo()
        logins.add(demo.login)
        # The demo, the web server, the worker, its fork server and at least one child process.
        assert len(demo.processes()) >= 5
        demo.send(number)
        assert demo.wait_until_ended() == 0, demo.output
        assert demo.processes() == []
        assert "Both have stopped." in demo.output
        assert "Traceback" not in demo.output.partition("Stopping the web server")[2]
    assert len(logins) == 1


@pytest.mark.parametrize(("command", "name"), [("waitress", "web server"), ("worker", "worker")])
def test_demo_ends_if_one_process_is_killed(start_demo: StartDemo, command: str, name: str) -> None:
    """If the web server or the worker is killed, the demo names it, stops the other and fails."""
    demo = start_demo()
    os.kill(demo.child(command), signal.SIGKILL)
    assert demo.wait_until_ended() == 1
    assert f"The {name} stopped unexpectedly" in demo.output
    # The child processes of a killed worker end by themselves, a little later.
    wait_until(lambda: not demo.processes(), "the end of the child processes")


def test_taken_port_is_replaced(demo: Demo) -> None:
    """If the port is taken, the demo says so and uses another port."""
    assert f"Port {demo.port} is taken" in demo.output
    assert demo.address != f"http://127.0.0.1:{demo.port}"
    with urllib.request.urlopen(demo.address) as answer:
        assert "Corner Shop" in answer.read().decode()


@pytest.mark.parametrize("port", ["http", "-1", "70000"])
def test_invalid_port_is_refused(tmp_path: Path, port: str) -> None:
    """An invalid PORT is refused in one line with exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "example_app.demo"],
        cwd=ROOT,
        env={**os.environ, "PORT": port, "SHOP_INSTANCE_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"PORT={port} is not a port: give a number from 0 to 65535.\n"


def find_chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        message = "no chromium is installed (apt-get install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A demo for several tests, which was started with a port that is taken."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        demo = Demo(tmp_path_factory.mktemp("demo") / "instance", port)
        try:
            demo.wait_until_started()
            yield demo
        finally:
            demo.close()


@pytest.fixture(scope="session")
def chromium() -> str:
    return find_chromium()


@pytest.fixture
def page(chromium: str, demo: Demo) -> Iterator[sync_api.Page]:
    """A browser at the shop of a running demo, not signed in."""
    quiet = ["networking", "timer-throttling"]
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-component-update", "--disable-sync"]
    arguments += [f"--disable-background-{name}" for name in quiet]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(base_url=demo.address)
        page.set_default_timeout(30_000)
        yield page
        browser.close()


@pytest.mark.browser
def test_dispatched_job_retries_and_succeeds(page: sync_api.Page, demo: Demo) -> None:
    """A user signs in, dispatches a job that fails once, and sees it retry and succeed on its page
    and in the list. The browser reports no error and sends no request to another host."""
    faults: list[str] = []
    page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(demo.address) else faults.append(request.url)
        ),
    )

    sign_in(page, *demo.login)
    job_id = dispatch(page, "FlakyJob", '{"succeed_on": 2}', retry_delay="8")

    page.goto(f"/jobs/job/{job_id}")
    wait_for_text(page, f"Job {job_id} retrying")
    wait_for_text(page, "ConnectionError: the warehouse did not answer (attempt 1)")
    wait_for_text(page, f"Job {job_id} completed")
    wait_for_text(page, "the warehouse answered on attempt 2")
    wait_for_text(page, "1 of 3")

    page.goto("/jobs/list?status=completed")
    row = page.locator(f"tr#job-{job_id}")
    sync_api.expect(row).to_contain_text("FlakyJob")
    sync_api.expect(row).to_contain_text("completed")
    assert faults == []


@pytest.mark.browser
def test_worker_survives_hanging_and_crashing_jobs(page: sync_api.Page, demo: Demo) -> None:
    """The sample photos get thumbnails, a job that hangs or ignores signals is cancelled from the
    dashboard, and a job that crashes fails. After that the same worker makes the thumbnails of
    another photo."""
    worker = demo.child("worker")
    sign_in(page, *demo.login)

    def shown() -> int:
        page.goto("/")
        return page.locator(".photo img").count()

    wait_until(lambda: shown() == samples.SAMPLE_PHOTOS, "the thumbnails")
    # This raises if a thumbnail is not a valid image.
    decode = "all => Promise.all(all.map(each => { each.loading = 'eager'; return each.decode() }))"
    page.locator(".photo img").evaluate_all(decode)

    for name in ("hang", "stubborn"):
        job_id = start_trouble(page, name)
        wait_for_text(page, f"Job {job_id} running")
        page.get_by_role("button", name="Cancel", exact=True).click()
        wait_for_text(page, f"Job {job_id} cancelled")

    job_id = start_trouble(page, "crash")
    wait_for_text(page, f"Job {job_id} failed")
    wait_for_text(page, "Crashed: the process that ran it was killed by SIGKILL")
    assert demo.child("worker") == worker

    page.goto("/")
    page.locator(".products a").last.click()
    page.get_by_role("link", name="Change photo").click()
    photo = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": draw_photo("another one")}
    before = page.locator(".photo img").get_attribute("src")
    page.get_by_label("Photo").set_input_files(files=[photo])
    page.get_by_role("button", name="Upload").click()
    wait_for_text(page, "completed")
    assert page.locator(".photo img").get_attribute("src") != before


def start_trouble(page: sync_api.Page, name: str) -> int:
    """Enqueue a job that makes trouble and go to its page; returns its id."""
    page.goto("/admin/trouble")
    page.get_by_role("button", name=f"Enqueue {name}").click()
    page.wait_for_url("**/jobs/job/*")
    return int(page.url.rpartition("/")[2])


def sign_in(page: sync_api.Page, email: str, password: str) -> None:
    page.goto("/jobs/")
    page.get_by_label("E-mail").fill(email)
    page.get_by_label("Password").fill(password)
    page.get_by_role("main").get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/jobs/")


def dispatch(page: sync_api.Page, job: str, parameters: str, retry_delay: str) -> int:
    """Fill in the dispatch form and send it; returns the new job's id."""
    page.goto("/jobs/dispatch")
    label = page.locator("#job option", has_text=job).inner_text()
    page.get_by_label("Job", exact=True).select_option(label=label)
    page.get_by_label("Parameters").fill(parameters)
    page.get_by_label("Retry delay").fill(retry_delay)
    page.get_by_role("button", name="Dispatch").click()
    page.wait_for_load_state()
    found = re.search(r"[Jj]ob (\d+)", page.inner_text("main"))
    assert found is not None, page.inner_text("main")
    return int(found[1])


def wait_for_text(page: sync_api.Page, text: str) -> None:
    """Wait until the page shows ``text`` by its live update."""
    main = page.get_by_role("main")
    sync_api.expect(main).to_contain_text(text, timeout=JOB_SECONDS * 1000)
