"""The worker: claim, run, settle, until it is told to stop."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Literal

from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from . import schema
from .app_state import AppState, import_jobs
from .errors import BgJobsError
from .heart import Heart
from .identity import this_process
from .lanes import Finished, Lane, Lanes, Pool, Route, routes
from .maintenance import Pruner, Sweeper
from .memory import memory_in_use
from .models import Job
from .outage import Outage
from .outbox import Outbox
from .pools.child import Limits
from .pools.process import ProcessPool
from .pools.thread import ThreadPool
from .rollup import Tally
from .scheduler import STEP_SECONDS, Clock
from .signals import emit_settled, worker_started, worker_stopped
from .spec import JobSpec, Key, Outcome, Settled
from .states import JobStatus, OutcomeKind
from .store import LeaseView, Store
from .version import __version__
from .wakeups import Wake, WakeUps

_logger = logging.getLogger("flask_bgjobs")

_FOLLOW_SECONDS = 0.25
"""How often running jobs are looked after: cancel requests, leases, progress."""
_GATHER_SECONDS = 0.005
"""While threads are busy, outcomes are gathered so long, to be settled in one transaction."""
_HORIZON_SECONDS = 60.0
_PRUNE_SECONDS = 300.0
_PRUNE_PAUSE_SECONDS = 0.05
"""Between two steps of pruning, for others that want to write."""
_ROLL_UP_SECONDS = 5.0
_LAST_SETTLE_TRIES = 3
_END_SECONDS = 8.0
"""After the grace of its jobs, for a worker to stop those that are left and to record the rest."""
_DEADLINES_PER_LEASE = 4
_LEAST_DEADLINE_SECONDS = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker works; what is ``None`` comes from the configuration."""

    name: str | None = None
    """Shown on the dashboard; host and pid by default."""
    queues: Sequence[str] | None = None
    """Served in this strict order; all by default."""
    pool: Literal["thread", "process"] | None = None
    """Of the queues that name none."""
    concurrency: int | None = None
    """Jobs at once in that pool."""
    burst: bool = False
    """Stop when nothing is pending or running in the queues."""
    max_jobs: int | None = None
    """After so many jobs a child process is replaced; with the thread pool the worker stops."""
    max_time: float | None = None
    """The same after so many seconds."""
    max_memory: float | None = None
    """The same when it holds so many MiB of memory."""
    shutdown_timeout: float | None = None
    """Seconds that running jobs have to end after a stop was asked for."""
    scheduler: bool = True
    """Prune, and run what recurs; polling, promotion and rescue go on without it."""
    app: str | None = None
    """From where child processes import the app; ``BGJOBS_APP`` goes before it."""
    show_logs: bool = False
    """Whether child processes print their log lines, as the command does."""


class Worker:
    """One worker process's loop.

    :param state: the app whose jobs it runs.
    :raises BgJobsError: when it cannot work: an in-memory database, missing tables, or a process
        pool without ``BGJOBS_APP``.
    """

    def __init__(self, state: AppState, options: WorkerOptions | None = None) -> None:
        options = options or WorkerOptions()
        config = state.config
        self.state = state
        self.name = options.name or f"{socket.gethostname()}-{os.getpid()}"
        self.queues = options.queues if options.queues is not None else config.queues
        self.routes = _routes(state, options, self.queues)
        """Which jobs go into which pool."""
        self.concurrency = sum(route.size for route in self.routes)
        self.counts: collections.Counter[JobStatus] = collections.Counter()
        """Settled jobs by their new status."""
        self._options = options
        self._store = state.store.with_deadline(_deadline(config.lease))
        self._grace = (
            config.shutdown_timeout
            if options.shutdown_timeout is None
            else options.shutdown_timeout
        )
        self._id = 0
        self._stops = 0
        self._is_draining = False
        """It claims nothing more, and ends when what it runs has ended, however long that takes."""
        self._wake = Wake()
        self._outbox = Outbox(self._store)
        self._tally = Tally()
        self._rolled_up = -float("inf")
        self._claimed = 0
        self._suspects: collections.deque[JobSpec] = collections.deque()
        self._suspect_running: JobSpec | None = None
        self._held: set[Key] = set()
        """What it claimed, until the outcome is recorded."""
        self._claim_in_doubt = False
        self._marked: set[Key] = set()
        self._followed = 0.0
        self._look_due = False
        self._looked = self._swept = -float("inf")
        self._outage = Outage(self.name)
        self._limits = Limits(
            max_jobs=options.max_jobs, max_time=options.max_time, max_memory=options.max_memory
        )
        # Child processes keep to them by themselves.
        self._own_limits = self._limits if self.routes[0].pool == "thread" else Limits()
        self._begun = time.monotonic()
        self._sweeper = Sweeper(self._store, config.lease)
        self._pruner = Pruner(self._store, config.retention)
        self._prune_due = options.scheduler
        state.check_can_work({route.pool for route in self.routes}, self._app)
        _check_tables(state)
        import_jobs(state)

    def stop(self) -> None:
        """Ask the worker to stop: running jobs get their grace; the second call ends that.

        Safe to call from a signal handler and from any thread.
        """
        self._stops += 1
        grace = self._grace if self._stops == 1 else 0.0
        # Also a database that says nothing, or that others keep locked, must not hold a worker.
        self._store.give_up_at = time.monotonic() + grace + _END_SECONDS
        self._wake.set()

    @property
    def has_code_running(self) -> bool:
        """Whether code still runs that no interruption could stop."""
        return self._pools.running() > 0 or self._clock.hangs

    @property
    def pool(self) -> str:
        """Where its jobs run: ``thread``, ``process`` or both."""
        return "+".join(route.pool for route in self.routes)

    @property
    def _app(self) -> str | None:
        return self.state.config.app or self._options.app

    def run(self) -> None:
        """Work until told to stop, or until the options say that it is done.

        :raises BgJobsError: when child processes cannot build the app.
        """
        self._pools = self._open_pools()
        try:
            self._start()
            try:
                while not self._is_done():
                    self._guard(self._turn)
                    self._wait()
                self._drain()
            finally:
                self._end()
        finally:
            self._pools.close()

    # Beginning and end

    def _start(self) -> None:
        notice = self._store.prepare(wal=self.state.config.sqlite_wal)
        if notice:
            _logger.info(notice)
        self._register()
        self._heart = Heart(self._store, self._id, self.state.config.heartbeat_interval)
        self._clock = Clock(self._on_news, self.state.config.poll_interval)
        if self._options.scheduler:
            self._clock.every(_PRUNE_SECONDS, self._on_prune_time)
        self._clock.start()
        self._wake_ups = WakeUps(self._store, self._on_news, self.state.config.poll_interval)
        self.state.enqueued.append(self._on_enqueued)
        self.state.emit(worker_started, worker=self.name)

    def _open_pools(self) -> Lanes:
        lanes = [
            Lane(route, functools.partial(self._open_pool, route), self._on_finished)
            for route in self.routes
        ]
        return Lanes(lanes)

    def _open_pool(self, route: Route, on_finished: Finished) -> Pool:
        if route.pool == "thread":
            return ThreadPool(self.state, route.size, on_finished)
        assert self._app is not None
        limits = self._limits if route is self.routes[0] else None
        return ProcessPool(
            self._app,
            route.size,
            on_finished,
            limits=limits,
            show_logs=self._options.show_logs,
        )

    def _end(self) -> None:
        self.state.enqueued.remove(self._on_enqueued)
        self._clock.stop()
        self._wake_ups.stop()
        self._pools.close()
        self._guard(lambda: self._roll_up(at_once=True))
        self._guard(lambda: self._store.stop_worker(self._id))
        self._heart.stop()
        self._store.dispose()
        self.state.emit(worker_stopped, worker=self.name)

    def _register(self) -> None:
        self._id = register(
            self.state,
            self.name,
            store=self._store,
            pool=self.pool,
            concurrency=self.concurrency,
            queues=self.queues,
        )

    def _start_over(self) -> None:
        """Go on under a new id, after another worker took this one's lease and jobs."""
        _logger.warning("Lease lost | Worker: %s | It starts over under a new id", self.name)
        if any(spec is self._suspect_running for spec in self._pools.take_unstarted()):
            # No outcome of it will come.
            self._suspect_running = None
        self._suspects.clear()
        self._outbox.take_told()
        self._held.clear()
        self._marked.clear()
        for spec in self._pools.running_specs():
            self._pools.cancel(spec)
        self._register()
        self._heart.beat_for(self._id)

    # One turn

    def _turn(self) -> None:
        if self._heart.lease_lost:
            self._start_over()
        self._settle()
        self._give_back_unseen()
        self._follow_running()
        self._look()
        self._sweep()
        self._start_suspect()
        self._claim()
        self._roll_up()
        self._prune()

    def _settle(self) -> None:
        for settled in self._outbox.record(self._id, self.name):
            self._after_settle(settled)

    def _after_settle(self, settled: Settled) -> None:
        spec = settled.spec
        self._held.discard(spec.key)
        self._marked.discard(spec.key)
        if self._suspect_running is spec:
            self._suspect_running = None
        if settled.status is None:
            _logger.warning(
                "Lease lost | Job: %s | Attempt: %s | Its outcome (%s) was not recorded",
                spec.id,
                spec.attempt,
                settled.outcome.kind.value,
            )
            return
        self.counts[settled.status] += 1
        self._tally.note(settled)
        self._look_due |= settled.status is JobStatus.PENDING
        if settled.delay_seconds is not None and settled.delay_seconds <= _HORIZON_SECONDS:
            self._clock.wake_in([settled.delay_seconds])
        emit_settled(self.state.app, settled)

    def _give_back_unseen(self) -> None:
        """Give back what a claim took whose commit got no answer."""
        if not self._claim_in_doubt:
            return
        unseen = [spec for spec in self._store.held_by(self._id) if spec.key not in self._held]
        for spec in unseen:
            self._outbox.put(spec, _given_back(spec))
        self._settle()
        self._claim_in_doubt = False

    def _follow_running(self) -> None:
        """Write what running jobs told, stop what was cancelled or is no longer ours."""
        now = time.monotonic()
        busy = self._pools.running() or self._pools.unstarted() or self._suspects
        if not busy or now - self._followed < _FOLLOW_SECONDS:
            return
        self._followed = now
        self._show_started()
        view = self._write_told()
        held = self._pools.running_specs(), self._pools.unstarted_specs(), self._suspects
        for spec in [spec for specs in held for spec in specs]:
            lost = view.attempts.get(spec.id) != spec.attempt
            if not lost and spec.id not in view.cancelling:
                continue
            if spec in self._suspects:
                self._suspects.remove(spec)
                self._outbox.put(spec, Outcome(spec.id, spec.attempt, OutcomeKind.CANCELLED))
            else:
                self._pools.cancel(spec)

    def _write_told(self) -> LeaseView:
        """Write what running jobs told; where that fails, it waits for the next time."""
        told = self._outbox.take_told()
        for key, report in self._pools.reports().items():
            told[key] = told[key].followed_by(report) if key in told else report
        try:
            return self._store.observe(self._id, told)
        except BaseException:
            self._outbox.keep_told(told)
            raise

    def _show_started(self) -> None:
        """Show jobs as started that run for longer than a moment."""
        running = self._pools.running_specs()
        new = [spec for spec in running if spec.key not in self._marked]
        if new:
            self._store.mark_started(self._id, new)
            self._marked |= {spec.key for spec in new}

    def _look(self) -> None:
        """See what there is to do: make due jobs claimable, set the clock for those due soon."""
        now = time.monotonic()
        # The monotonic bound holds also when the clock's own time jumps or its thread hangs.
        late = now - self._looked >= self._wake_ups.poll_seconds()
        if not (self._clock.drifted() or self._look_due or late):
            return
        # Before the look: what comes from now on needs another one.
        self._look_due = False
        work = self._store.look(self.queues, self._id)
        if work.drain and not self._is_draining:
            _logger.info("Worker draining | Worker: %s | Somebody asked it to end", self.name)
            self._is_draining = True
            self._give_back_unstarted()
        promoted = 0
        if work.due_in is not None and work.due_in <= _HORIZON_SECONDS:
            promoted = self._store.promote()
            self._clock.wake_in(self._store.upcoming(_HORIZON_SECONDS, STEP_SECONDS))
        if work.pending or promoted:
            self._pools.expect_jobs()
        self._looked = now

    def _sweep(self) -> None:
        now = time.monotonic()
        if now - self._swept < self.state.config.heartbeat_interval:
            return
        self._swept = now
        for settled in self._sweeper.sweep(self._id):
            self._look_due = True
            self._tally.note(settled)
            emit_settled(self.state.app, settled)

    def _roll_up(self, *, at_once: bool = False) -> None:
        """Add what was settled to the numbers that charts are drawn from."""
        now = time.monotonic()
        if self._tally and (at_once or now - self._rolled_up >= _ROLL_UP_SECONDS):
            self._rolled_up = now
            self._store.add_to_rollup(self._tally.cells())
            self._tally.clear()

    def _prune(self) -> None:
        """Delete a few of the jobs that have outlived their retention."""
        if not self._prune_due:
            return
        try:
            self._prune_due = self._pruner.step()
        except IntegrityError as error:
            # A foreign key that is checked at the commit: nobody can tell which row is held.
            _logger.warning("Jobs not pruned | Worker: %s | Error: %s", self.name, error.orig)
            self._prune_due = False
        if not self._prune_due and self._pruner.deleted:
            _logger.info(
                "Jobs pruned | Worker: %s | Deleted: %d | Held by other tables: %d",
                self.name,
                self._pruner.deleted,
                self._pruner.held,
            )

    def _claim(self) -> None:
        if self._is_draining:
            return
        for lane in self._pools:
            if lane.expects_jobs and (room := self._room(lane)) > 0:
                self._claim_for(lane, room)
        self._start_suspect()

    def _claim_for(self, lane: Lane, room: int) -> None:
        route = lane.route
        self._claim_in_doubt = True
        specs = self._store.claim(self._id, room, route.queues, without=route.others)
        self._claim_in_doubt = False
        self._held |= {spec.key for spec in specs}
        claimed = time.monotonic()
        self._claimed += len(specs)
        lane.expects_jobs = len(specs) == room
        if specs:
            self._wake_ups.note_work()
        self._suspects.extend(spec for spec in specs if spec.suspect)
        lane.submit([spec for spec in specs if not spec.suspect], claimed)

    def _room(self, lane: Lane) -> int:
        """How many jobs to claim for a lane: suspects that wait for their turn count as well."""
        waiting = sum(lane.route.serves(spec.queue) for spec in self._suspects)
        if waiting and self._suspect_running is None:
            # The next free place is for one of them, or they would wait for ever.
            return 0
        room = lane.room() - waiting
        if self._own_limits.max_jobs is not None:
            room = min(room, self._own_limits.max_jobs - self._claimed)
        return room

    def _start_suspect(self) -> None:
        """Run one suspect, its start committed first, so that a crash is known to be its own."""
        if self._suspect_running is not None or not self._suspects:
            return
        # One that would wait in its pool had its start committed, and could be blamed unseen.
        spec = next(filter(self._pools.can_begin, self._suspects), None)
        if spec is None:
            return
        started = self._store.mark_started(self._id, [spec])
        # Not before: where the database is away, it stays among those that wait.
        self._suspects.remove(spec)
        if spec.id in started:
            self._suspect_running = spec
            self._pools.submit(spec, time.monotonic())

    # Waiting, stopping, outages

    def _wait(self) -> None:
        may_claim = any(lane.expects_jobs and self._room(lane) > 0 for lane in self._pools)
        if may_claim and not (self._stops or self._is_draining):
            return
        busy = self._pools.running() or self._pools.unstarted()
        if self._pools.unstarted() and self._outbox:
            time.sleep(_GATHER_SECONDS)
            return
        seconds = self._wake_ups.poll_seconds()
        if busy or self._suspects:
            seconds = min(seconds, _FOLLOW_SECONDS)
        self._wake.wait(min(seconds, _PRUNE_PAUSE_SECONDS) if self._prune_due else seconds)

    def _is_done(self) -> bool:
        if self._stops:
            return True
        if self._is_used_up():
            return True
        idle = not (self._pools.running() or self._pools.unstarted() or self._outbox)
        idle = idle and not self._suspects
        if self._is_draining:
            return idle
        max_jobs = self._own_limits.max_jobs
        if max_jobs is not None and self._claimed >= max_jobs:
            return idle
        return self._options.burst and idle and self._nothing_left()

    def _is_used_up(self) -> bool:
        limits = self._own_limits
        if limits.max_time is not None and time.monotonic() - self._begun >= limits.max_time:
            return True
        return limits.max_memory is not None and memory_in_use() >= limits.max_memory

    def _nothing_left(self) -> bool:
        left = True
        try:
            # A retry without a delay is due already.
            self._store.promote()
            left = self._store.unfinished(self.queues)
        except SQLAlchemyError as error:
            self._wait_out(error)
        return not left and self._looked > 0

    def _drain(self) -> None:
        """Give back what has not started, let the rest finish, then give that back as well."""
        self._give_back_unstarted()
        grace_ends = time.monotonic() + self._grace
        if running := self._pools.running():
            _logger.info(
                "Worker stopping | Worker: %s | Running: %d | Grace: %g s; a second signal ends it",
                self.name,
                running,
                self._grace,
            )
        while self._pools.running() and time.monotonic() < grace_ends and self._stops < 2:
            self._guard(self._drain_turn)
            self._wake.wait(min(_FOLLOW_SECONDS, max(0.0, grace_ends - time.monotonic())))
        self._give_back_running()
        for _ in range(_LAST_SETTLE_TRIES):
            self._guard(self._settle)
            if not self._outbox:
                break

    def _give_back_unstarted(self) -> None:
        for spec in [*self._pools.take_unstarted(), *self._suspects]:
            self._outbox.put(spec, _given_back(spec))
        self._suspects.clear()

    def _drain_turn(self) -> None:
        self._settle()
        self._follow_running()

    def _give_back_running(self) -> None:
        """Stop the code first: another worker may start the job as soon as it is given back."""
        running = self._pools.running_specs()
        given_back = {spec.key for spec in running}
        for spec in running:
            self._pools.cancel(spec)
        deadline = time.monotonic() + self._pools.stop_seconds
        while self._pools.running() and time.monotonic() < deadline:
            self._wake.wait(deadline - time.monotonic())
        # Before the outcomes: a job that ends at this moment is in both, and not in neither.
        still_running = {spec.key: spec for spec in self._pools.running_specs()}
        for spec, outcome in self._outbox.take_all():
            still_running.pop(spec.key, None)
            stopped_by_us = spec.key in given_back
            if stopped_by_us and outcome.kind is not OutcomeKind.COMPLETED:
                outcome = _given_back(spec)._replace(report=outcome.report)
            self._outbox.put(spec, outcome)
        for spec in still_running.values():
            _logger.warning("Job %s did not stop; it is given back while its code runs", spec.id)
            self._outbox.put(spec, _given_back(spec))

    def _guard(self, step: Callable[[], None]) -> None:
        """Run a step that uses the database; live through an outage."""
        try:
            step()
        except SQLAlchemyError as error:
            self._wait_out(error)
        else:
            self._outage.is_over()

    def _wait_out(self, error: SQLAlchemyError) -> None:
        self._pause(self._outage.goes_on(error, len(self._outbox)))

    def _pause(self, seconds: float) -> None:
        """Wait, unless a stop was asked for."""
        end = time.monotonic() + seconds
        while not self._stops and (left := end - time.monotonic()) > 0:
            self._wake.wait(left)

    # Called from other threads

    def _on_finished(self, spec: JobSpec, outcome: Outcome) -> None:
        self._outbox.put(spec, outcome)
        self._wake.set()

    def _on_news(self) -> None:
        """There may be something to do: a job is due or was enqueued, or the poll is."""
        self._look_due = True
        self._wake.set()

    def _on_prune_time(self) -> None:
        self._prune_due = True

    def _on_enqueued(self, _job: Job) -> None:
        self._on_news()


def register(
    state: AppState,
    name: str,
    *,
    store: Store | None = None,
    pool: str = "thread",
    concurrency: int = 1,
    queues: Sequence[str] | None = None,
) -> int:
    """The id of a new worker row for this process.

    :param store: through which it is written; the app's by default.
    """
    me = this_process()
    return (store or state.store).register_worker(
        {
            "name": name,
            "host": me.host,
            "pid": me.pid,
            "process": me.process,
            "version": __version__,
            "pool": pool,
            "concurrency": concurrency,
            "queues": None if queues is None else json.dumps(queues),
            "beats": 0,
        }
    )


def _deadline(lease: float) -> float:
    """Seconds that the database may take for a transaction: there must be time for a second try."""
    return max(_LEAST_DEADLINE_SECONDS, lease / _DEADLINES_PER_LEASE)


def _given_back(spec: JobSpec) -> Outcome:
    return Outcome(spec.id, spec.attempt, OutcomeKind.GIVEN_BACK)


def _routes(state: AppState, options: WorkerOptions, queues: Sequence[str] | None) -> list[Route]:
    config = state.config
    default = options.pool or config.pool
    found = routes(default, config.queue_pools, queues, config.concurrency_of)
    if options.concurrency is not None:
        found[0] = dataclasses.replace(found[0], size=options.concurrency)
    return found


def _check_tables(state: AppState) -> None:
    missing = schema.missing_tables(state)
    if missing:
        raise BgJobsError(
            f"the database has no table {missing[0]}: run `flask db migrate` and `flask db "
            "upgrade`, or `flask bgjobs init-db` without Flask-Migrate"
        )
