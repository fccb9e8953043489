"""The worker: claim, run, settle, until it is told to stop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Literal

from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from ..errors import BgJobsError, WorkerFailed
from ..execution.pools.kinds import PoolSettings
from ..execution.pools.process.child import Limits
from ..execution.pools.protocol import Finished, Pool
from ..execution.pools.trouble import Overdue
from ..job.records import JobSpec, Key, Outcome, Settled
from ..job.rollup import Tally
from ..job.row_check import bad_row, checked
from ..job.statuses import JobStatus, OutcomeKind
from ..job.text import shown
from ..models import Job
from ..observability.failures import CallThread, report_lost
from ..operations import schema
from ..signals import worker_started, worker_stopped
from ..state import AppState, call_now, import_jobs
from ..store import MAKE_TABLES, LeaseView, Store
from ..system.identity import this_process
from ..system.memory import memory_in_use
from ..system.safe_logging import logger as _logger
from ..system.threads import require_alive
from ..version import __version__
from . import shutdown
from .clock import STEP_SECONDS, Clock
from .heartbeat import Heartbeat, LoopProgress
from .listener import Wake, WakeUps
from .outage import Outage
from .outbox import Outbox
from .prune import Pruner
from .rescue import Sweeper
from .routing import Lane, Lanes, Route, routes
from .suspects import Suspects

_MAX_NAME = 255
_FOLLOW_SECONDS = 0.25
"""How often running jobs are looked after: cancel requests, leases, progress."""
_GATHER_SECONDS = 0.005
"""While threads are busy, outcomes are gathered so long, to be settled in one transaction."""
_HORIZON_SECONDS = 60.0
_PRUNE_SECONDS = 300.0
_PRUNE_PAUSE_SECONDS = 0.05
"""Between two steps of pruning, for others that want to write."""
_ROLL_UP_SECONDS = 5.0
_WATCH_SECONDS = 1.0
"""How often jobs are looked for that cannot be stopped."""
_FIRST_OVERDUE_SECONDS = 10.0
"""After so long such a job is logged, and again each time that this has doubled."""
_LAST_SETTLE_TRIES = 3
_LAST_LOCKS_SECONDS = 3.0
_LAST_CALLS_SECONDS = 3.0
"""For the host's functions for failed attempts."""
_END_SECONDS = 8.0
"""After the grace of its jobs, for a worker to stop those that are left and to record the rest."""
_DEADLINES_PER_LEASE = 4
_LEAST_DEADLINE_SECONDS, _MOST_DEADLINE_SECONDS = 2.0, 600.0
"""PostgreSQL accepts up to 24 days; no transaction of a worker's takes ten minutes."""


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
    :raises BgJobsError: when it cannot work: an in-memory database, missing tables, a process pool
        without ``BGJOBS_APP``, or a name that is too long or holds control characters.
    """

    def __init__(self, state: AppState, options: WorkerOptions | None = None) -> None:
        options = options or WorkerOptions()
        config = state.config
        self.state = state
        self.name = _checked(options.name) or f"{socket.gethostname()}-{os.getpid()}"
        self.queues = options.queues if options.queues is not None else config.queues
        self.routes = _routes(state, options, self.queues)
        """Which jobs go into which pool."""
        self.concurrency = sum(route.size for route in self.routes)
        self.counts: collections.Counter[JobStatus] = collections.Counter()
        """Settled jobs by their new status."""
        self._options = options
        self._store = state.store.with_deadline(_deadline(config.lease))
        self.grace_seconds = (
            config.shutdown_timeout
            if options.shutdown_timeout is None
            else options.shutdown_timeout
        )
        """What running jobs have to end after a stop was asked for."""
        self._id = 0
        self._stops = 0
        self._has_started = False
        self._is_draining = False
        """It claims nothing more, and ends when what it runs has ended, however long that takes."""
        self._wake = Wake()
        self._outbox = Outbox(self._store)
        self._tally = Tally()
        self._rolled_up = -float("inf")
        self._is_rollup_denied = False
        self._claimed = 0
        self._suspects = Suspects()
        self._held: set[Key] = set()
        """What it claimed, until the outcome is recorded."""
        self._claim_in_doubt = False
        self._marked: set[Key] = set()
        self._followed = self._watched = 0.0
        self._overdue_log_at: dict[Key, float] = {}
        """After how many seconds a job that cannot be stopped is logged again."""
        self._look_due = False
        self._looked = self._swept = -float("inf")
        self._outage = Outage(self.name)
        self._clock = Clock(self._on_news, config.poll_interval)
        self._limits = Limits(
            max_jobs=options.max_jobs, max_time=options.max_time, max_memory=options.max_memory
        )
        # Child processes keep to them by themselves.
        self._own_limits = Limits() if self.routes[0].kind.forks else self._limits
        self._begun = time.monotonic()
        self._sweeper = Sweeper(self._store, config.lease)
        self._pruner = Pruner(self._store, config.retention)
        self._prune_due = options.scheduler
        self._pools = Lanes([])
        state.check_can_work(forks=any(r.kind.forks for r in self.routes), app=self._app)
        _check_tables(state)
        import_jobs(state)

    def stop(self) -> None:
        """Ask the worker to stop: running jobs get their grace; the second call ends that.

        Safe to call from a signal handler and from any thread.
        """
        self._stops += 1
        grace = self.grace_seconds if self._stops == 1 else 0.0
        # Also a database that says nothing, or that others keep locked, must not hold a worker.
        self._store.give_up_at = time.monotonic() + grace + _END_SECONDS
        self._wake.set()

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
        :raises WorkerFailed: when a thread of the worker has ended. As with any other exception,
            its jobs were given back as far as the database could be reached.
        """
        # The session that its receivers use is then not the caller's.
        with self.state.app.app_context():
            self._run()

    def _run(self) -> None:
        self._pools = self._open_pools()
        try:
            with contextlib.ExitStack() as ending:
                self._start(ending)
                try:
                    self._work()
                except BaseException:
                    self._give_up()
                    raise
        finally:
            self._pools.close()

    @property
    def has_code_running(self) -> bool:
        """Whether code of jobs runs; after :meth:`run`, code that no interruption could stop."""
        return self._pools.running() > 0 or self._clock.hangs

    @property
    def has_threads_running(self) -> bool:
        """After :meth:`run`: whether threads of its pools live, because code of jobs holds them."""
        return any(thread.is_alive() for thread in self._pools.threads)

    def _work(self) -> None:
        while not self._is_done():
            self._guard(self._turn)
            self._wait()
        self._drain()

    def _give_up(self) -> None:
        """Give all jobs back at once: the worker cannot go on."""
        while self._stops < 2:
            self.stop()
        try:
            self._drain()
        except Exception:
            _logger.exception("Worker %s could not give its jobs back", self.name)

    # Beginning and end

    def _start(self, ending: contextlib.ExitStack) -> None:
        """Start what runs beside the loop.

        :param ending: ends, in the reverse order, what was started, also when the rest fails.
        """
        calls = self.state.call_soon = CallThread()
        ending.callback(setattr, self.state, "call_soon", call_now)
        ending.callback(calls.finish, _LAST_CALLS_SECONDS)
        ending.callback(self._tell_of_end)
        ending.callback(self._store.dispose)
        notice = self._store.prepare(wal=self.state.config.sqlite_wal)
        if notice:
            _logger.info(notice)
        self._register()
        ending.callback(lambda: self._guard(lambda: self._store.stop_worker(self._id)))
        self._progress = LoopProgress(self.state.config.lease)
        self._store.on_attempt = self._progress.note_if_own_thread
        self._heartbeat = Heartbeat(
            self._store, self._id, self.state.config.heartbeat_interval, self._progress
        )
        ending.callback(self._heartbeat.stop)
        ending.callback(lambda: self._guard(lambda: self._roll_up(at_once=True)))
        ending.callback(self._pools.close)
        if self._options.scheduler:
            self._clock.every(_PRUNE_SECONDS, self._on_prune_time)
        self._clock.start()
        ending.callback(self._clock.stop)
        self._wake_ups = WakeUps(self._store, self._on_news, self.state.config.poll_interval)
        ending.callback(self._wake_ups.stop)
        self.state.enqueued.append(self._on_enqueued)
        ending.callback(self.state.enqueued.remove, self._on_enqueued)
        if not self.state.registry:
            _logger.warning(
                "No job is allowed | Worker: %s | It will refuse every job: name the modules of "
                "functions decorated with @bgjobs.job in BGJOBS_IMPORTS, or list names in "
                "BGJOBS_ALLOWED_JOBS",
                self.name,
            )
        self._has_started = True
        self.state.emit_in_worker(worker_started, worker=self.name)

    def _tell_of_end(self) -> None:
        if self._has_started:
            self.state.emit_in_worker(worker_stopped, worker=self.name)

    def _open_pools(self) -> Lanes:
        lanes = []
        with contextlib.ExitStack() as undo:
            for route in self.routes:
                open_pool = functools.partial(self._open_pool, route)
                lanes.append(Lane(route, open_pool, self._on_finished))
                undo.callback(lanes[-1].pool.close)
            undo.pop_all()
        return Lanes(lanes)

    def _open_pool(self, route: Route, on_finished: Finished) -> Pool:
        settings = PoolSettings(
            state=self.state,
            app=self._app,
            limits=self._limits if route is self.routes[0] else None,
            show_logs=self._options.show_logs,
        )
        return route.kind.open(settings, route.size, on_finished)

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
        for spec in self._pools.take_unstarted():
            # No outcome of it will come.
            self._suspects.note_end(spec.key)
        self._suspects.take_waiting()
        self._look_due = True
        self._outbox.take_reports()
        self._held.clear()
        self._marked.clear()
        for spec in self._pools.running_specs():
            self._pools.cancel(spec)
        self._register()
        self._heartbeat.switch_to(self._id)

    # One turn

    def _turn(self) -> None:
        self._progress.note()
        self._check_threads()
        if self._heartbeat.lease_lost:
            self._start_over()
        self._settle()
        self._give_back_unseen()
        self._follow_running()
        self._watch_overdue()
        self._watch_failing()
        self._look()
        self._sweep()
        self._start_suspects()
        self._claim()
        self._roll_up()
        self._prune()

    def _check_threads(self) -> None:
        mine = [self._heartbeat.thread, *self._clock.threads, *self._wake_ups.threads]
        require_alive([*mine, *self._pools.threads, *self._store.threads])

    def _settle(self) -> None:
        for settled in self._outbox.record(self._id, self.name):
            self._after_settle(settled)
            # Each may have called a receiver that took its time.
            self._progress.note()

    def _after_settle(self, settled: Settled) -> None:
        spec = settled.spec
        key = spec.key
        self._held.discard(key)
        self._overdue_log_at.pop(key, None)
        self._marked.discard(key)
        if spec.suspect:
            self._look_due |= self._suspects.note_end(key)
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
        self._tell_of(settled)

    def _tell_of(self, settled: Settled) -> None:
        self.state.emit_settled(settled)
        report_lost(self.state, settled)

    def _give_back_unseen(self) -> None:
        """Give back what a claim took whose commit got no answer."""
        if not self._claim_in_doubt:
            return
        unseen = [spec for spec in self._store.held_by(self._id) if spec.key not in self._held]
        for spec in unseen:
            self._outbox.put(spec, shutdown.given_back(spec))
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
        waiting = list(self._suspects)
        held = self._pools.running_specs(), self._pools.unstarted_specs(), waiting
        for spec in [spec for specs in held for spec in specs]:
            lost = view.attempts.get(spec.id) != spec.attempt
            if not lost and spec.id not in view.cancelling:
                continue
            if spec in waiting:
                self._suspects.remove(spec)
                self._look_due = True
                self._outbox.put(spec, Outcome(spec.id, spec.attempt, OutcomeKind.CANCELLED))
            else:
                self._pools.cancel(spec)

    def _write_told(self) -> LeaseView:
        """Write what running jobs told; where that fails, it waits for the next time."""
        told = self._outbox.take_reports()
        for key, report in self._pools.reports().items():
            told[key] = told[key].followed_by(report) if key in told else report
        try:
            return self._store.observe(self._id, told)
        finally:
            if told:
                self._outbox.keep_told(told)

    def _show_started(self) -> None:
        """Show jobs as started that run for longer than a moment."""
        running = self._pools.running_specs()
        new = [spec for spec in running if spec.key not in self._marked]
        if new:
            locked = self._store.mark_started(self._id, new).locked
            self._marked |= {spec.key for spec in new if spec.id not in locked}

    def _watch_overdue(self) -> None:
        """Log jobs that cannot be stopped.

        :raises WorkerFailed: when they hold a whole pool for good.
        """
        now = time.monotonic()
        if now - self._watched < _WATCH_SECONDS:
            return
        self._watched = now
        for lane in self._pools:
            overdue = lane.pool.overdue()
            for each in overdue:
                self._log_overdue(each, lane.route)
            held = [each for each in overdue if each.seconds >= self.state.config.lease]
            if len(held) >= lane.route.size:
                place = lane.route.kind.place
                raise WorkerFailed(
                    f"no {place} is free: {len(held)} jobs cannot be stopped, for "
                    f"{min(each.seconds for each in held):.0f} s and longer (the log names them). "
                    "Give blocking calls a time limit, or run such jobs in the process pool"
                )

    def _log_overdue(self, job: Overdue, route: Route) -> None:
        log_at = self._overdue_log_at.get(job.spec.key, _FIRST_OVERDUE_SECONDS)
        if job.seconds < log_at:
            return
        self._overdue_log_at[job.spec.key] = 2 * log_at
        reason = "teardown" if job.interruption is None else job.interruption.__name__
        _logger.warning(
            "Job cannot be stopped | Job: %s | Class: %s | Reason: %s | For: %.0f s | In: %s | "
            "It holds a %s until that ends",
            job.spec.id,
            job.spec.target,
            reason,
            job.seconds,
            job.position,
            route.kind.place,
        )

    def _watch_failing(self) -> None:
        """Give back what waits for child processes that cannot start.

        :raises WorkerFailed: when none could start for a lease, in several tries.
        """
        for lane in self._pools:
            failing = lane.pool.failing()
            if failing is None:
                continue
            for spec in lane.take_unstarted():
                self._outbox.put(spec, shutdown.given_back(spec))
            if failing.is_hopeless and failing.seconds >= self.state.config.lease:
                raise WorkerFailed(
                    f"no child process could start for {failing.seconds:.0f} s: {failing.reason}"
                )

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
            shutdown.give_back_unstarted(self._pools, self._suspects, self._outbox)
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
            self._tell_of(settled)
            self._progress.note()

    def _roll_up(self, *, at_once: bool = False) -> None:
        """Add what was settled to the numbers that charts are drawn from."""
        now = time.monotonic()
        if self._tally and (at_once or now - self._rolled_up >= _ROLL_UP_SECONDS):
            self._rolled_up = now
            try:
                self._store.add_to_rollup(self._tally.cells())
            except DBAPIError as error:
                if not self._store.is_denied(error):
                    raise
                if not self._is_rollup_denied:
                    _logger.warning(
                        "Charts not drawn | Worker: %s | Grant SELECT, INSERT, UPDATE and DELETE "
                        "on bgjobs_rollup to its database user | Error: %s",
                        self.name,
                        error.orig,
                    )
                self._is_rollup_denied = True
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
        self._start_suspects()

    def _claim_for(self, lane: Lane, room: int) -> None:
        route = lane.route
        self._claim_in_doubt = True
        specs = self._store.claim(
            self._id,
            room,
            route.queues,
            without=route.others,
            suspects=self._suspects.may_claim,
        )
        suspects = [spec for spec in specs if spec.suspect]
        # The claim is still in doubt, so its jobs are given back if this query fails.
        exclusive = self._store.lost_among_others(suspects) if suspects else ()
        self._claim_in_doubt = False
        self._held |= {spec.key for spec in specs}
        claimed = time.monotonic()
        lane.expects_jobs = len(specs) == room
        if specs:
            self._wake_ups.note_work()
        good = self._without_bad_rows(specs)
        refused = [
            spec
            for spec in good
            if spec.suspect
            and not self._suspects.add(spec, is_exclusive=spec.id in exclusive, claimed=claimed)
        ]
        for spec in refused:
            self._outbox.put(spec, shutdown.given_back(spec))
        self._claimed += len(specs) - len(refused)
        lane.submit([spec for spec in good if not spec.suspect], claimed)

    def _without_bad_rows(self, specs: Sequence[JobSpec]) -> list[JobSpec]:
        """The jobs that can be run; the others fail without having been started."""
        good = []
        for claimed in specs:
            spec, flaw = checked(claimed)
            if flaw is None:
                good.append(spec)
            else:
                self._outbox.put(spec, bad_row(spec, flaw))
        return good

    def _room(self, lane: Lane) -> int:
        """How many jobs to claim for a lane: suspects that wait for their turn count as well."""
        waiting = sum(lane.route.serves(spec.queue) for spec in self._suspects)
        if waiting and self._suspects.may_start_one(lane.route.serves):
            # The next free place is for one of them, or they would wait for ever.
            return 0
        room = lane.room() - waiting
        if self._own_limits.max_jobs is not None:
            room = min(room, self._own_limits.max_jobs - self._claimed)
        return room

    def _start_suspects(self) -> None:
        """Start the suspects whose turn it is, each start committed before its code runs."""
        # Only those that begin at once: the start of one that waits in its pool must not be
        # committed, or it could be blamed for a crash although its code never ran.
        while spec := self._suspects.next(self._pools.can_begin, self._pools.has_own_process):
            started = self._store.mark_started(self._id, [spec])
            claimed = self._suspects.claimed_at(spec)
            # Not before: where the database is away, it stays among those that wait.
            self._suspects.remove(spec)
            if spec.id in started.locked:
                # Its start cannot be committed now, and the others must not wait for that.
                self._outbox.put(spec, shutdown.given_back(spec))
            elif spec.id in started.ours:
                own = self._pools.has_own_process(spec)
                self._suspects.note_start(spec, has_own_process=own)
                self._pools.submit(spec, claimed)
            else:
                # Another worker took the lease: no outcome of it will come.
                self._held.discard(spec.key)
                self._suspects.note_end(spec.key)
                self._look_due = True

    # Waiting, stopping, outages

    def _wait(self) -> None:
        may_claim = any(lane.expects_jobs and self._room(lane) > 0 for lane in self._pools)
        if may_claim and not (self._stops or self._is_draining):
            return
        busy = self._pools.running() or self._pools.unstarted()
        if self._pools.unstarted() and self._outbox.unlocked:
            time.sleep(_GATHER_SECONDS)
            return
        seconds = self._wake_ups.poll_seconds()
        if busy or self._suspects or self._outbox:
            seconds = min(seconds, _FOLLOW_SECONDS, self._suspects.seconds_until_next())
        self._sleep(min(seconds, _PRUNE_PAUSE_SECONDS) if self._prune_due else seconds)

    def _sleep(self, seconds: float) -> None:
        """Wait for news, or for some seconds."""
        self._progress.note(seconds)
        self._wake.wait(seconds)

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
        shutdown.give_back_unstarted(self._pools, self._suspects, self._outbox)
        grace_ends = time.monotonic() + self.grace_seconds
        if running := self._pools.running():
            _logger.info(
                "Worker stopping | Worker: %s | Running: %d | Grace: %g s; a second signal ends it",
                self.name,
                running,
                self.grace_seconds,
            )
        while self._pools.running() and time.monotonic() < grace_ends and self._stops < 2:
            self._guard(self._drain_turn)
            self._sleep(min(_FOLLOW_SECONDS, max(0.0, grace_ends - time.monotonic())))
        shutdown.give_back_running(self._pools, self._outbox, self._sleep)
        # A pool that failed during the grace has put its jobs back into its queue.
        shutdown.give_back_unstarted(self._pools, self._suspects, self._outbox)
        self._settle_last()

    def _settle_last(self) -> None:
        """Record what is left, waiting a little for rows that other transactions keep locked."""
        ends = time.monotonic() + _LAST_LOCKS_SECONDS
        tries = 0
        while self._outbox and tries < _LAST_SETTLE_TRIES:
            self._guard(self._settle)
            if self._outbox.unlocked or time.monotonic() >= ends:
                tries += 1
            elif self._outbox:
                time.sleep(_GATHER_SECONDS)

    def _drain_turn(self) -> None:
        self._settle()
        self._follow_running()

    def _guard(self, step: Callable[[], None]) -> None:
        """Run a step that uses the database; live through an outage."""
        try:
            step()
        except SQLAlchemyError as error:
            self._wait_out(error)
        else:
            self._outage.record_success()

    def _wait_out(self, error: SQLAlchemyError) -> None:
        self._pause(self._outage.record_failure(error, len(self._outbox)))

    def _pause(self, seconds: float) -> None:
        """Wait, unless a stop was asked for."""
        end = time.monotonic() + seconds
        while not self._stops and (left := end - time.monotonic()) > 0:
            self._sleep(left)

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


def _checked(name: str | None) -> str | None:
    if name is not None and not (name.isprintable() and len(name) <= _MAX_NAME):
        raise BgJobsError(
            f"a worker's name has at most {_MAX_NAME} characters, and no control characters: "
            f"{shown(name)}"
        )
    return name


def _deadline(lease: float) -> float:
    """Seconds that the database may take for a transaction: there must be time for a second try."""
    seconds = max(_LEAST_DEADLINE_SECONDS, lease / _DEADLINES_PER_LEASE)
    return min(seconds, _MOST_DEADLINE_SECONDS)


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
        raise BgJobsError(f"the database has no table {missing[0]}: {MAKE_TABLES}")
