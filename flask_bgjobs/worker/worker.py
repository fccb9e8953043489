"""The worker: it claims, runs and settles jobs until it is asked to stop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import socket
import time
from collections.abc import Callable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from ..errors import BgJobsError
from ..execution.pools.kinds import PoolSettings
from ..execution.pools.process.child import Limits
from ..execution.pools.protocol import Finished, Pool
from ..flow.limits.definition import rules
from ..flow.limits.keeper import LimitKeeper
from ..flow.schedules.ticker import Ticker
from ..flow.unknown_jobs import UnknownJobs
from ..job.records import JobSpec, Key, Outcome, Settled
from ..job.statuses import JobStatus, OutcomeKind
from ..models import Job
from ..observability.failures import CallThread, report_lost
from ..operations import schema
from ..signals import worker_started, worker_stopped
from ..state import AppState, call_now, import_jobs
from ..store import MAKE_TABLES, LeaseView, Work
from ..system.memory import memory_in_use
from ..system.safe_logging import logger as _logger
from ..system.threads import require_alive
from . import shutdown
from .claims import Claims
from .clock import STEP_SECONDS, Clock
from .heartbeat import Heartbeat, LoopProgress
from .listener import Wake, WakeUps
from .options import WorkerOptions
from .outage import Outage
from .outbox import Outbox
from .pool_health import PoolHealth
from .prune import Pruner, Pruning
from .registration import checked_name, register
from .rescue import Sweeper
from .rollup import RollupWriter
from .routing import Route, RoutedPool, WorkerPools, routes

_OBSERVE_SECONDS = 0.25
"""Interval for reading cancel requests and leases of running jobs, and writing their progress."""
_GATHER_SECONDS = 0.005
"""How long outcomes are gathered while jobs wait in a pool, to settle them in one transaction."""
_GATHER_FOLLOWERS_SECONDS = 0.0005
"""How long outcomes of jobs with limits are gathered while others run. Jobs that started together
often end almost together. One handover for all of them is faster than several."""
_HORIZON_SECONDS = 60.0
"""Jobs due within this time get a trigger of the clock; a later poll finds the others."""
_PROMOTE_SECONDS = 0.1
"""How long a poll promotes due jobs before the worker goes on with those that are pending."""
_FREED_PER_SWEEP = 100
"""Waiting jobs that a sweep makes pending, however busy the worker is. A worker that does not have
their code may claim them again, so they are not all made pending at once."""
_PRUNE_INTERVAL_SECONDS = 300.0
_PRUNE_PAUSE_SECONDS = 0.05
"""Pause between two steps of pruning, in which other connections can write."""
_LAST_SETTLE_TRIES = 3
_LAST_LOCKS_SECONDS = 3.0
"""How long a stopping worker waits for rows that other transactions have locked."""
_LAST_CALLS_SECONDS = 3.0
"""How long a stopping worker waits for the host's ``on_failure`` functions."""
_END_SECONDS = 8.0
"""Time after the grace period in which a worker stops its jobs and records their outcomes."""
_TRANSACTIONS_PER_LEASE = 4
_MIN_TRANSACTION_SECONDS, _MAX_TRANSACTION_SECONDS = 2.0, 600.0
"""PostgreSQL accepts up to 24 days, but no transaction of a worker takes ten minutes."""


class Worker:
    """The main loop of one worker process.

    :param state: the app whose jobs the worker runs.
    :raises BgJobsError: when the database is in memory or has no tables, when a process pool has no
        import path of the app, or when the name is too long or holds control characters.
    """

    def __init__(self, state: AppState, options: WorkerOptions | None = None) -> None:
        options = options or WorkerOptions()
        config = state.config
        self.state = state
        self.name = checked_name(options.name) or f"{socket.gethostname()}-{os.getpid()}"
        self.queues = options.queues if options.queues is not None else config.queues
        self.routes = _routes(state, options, self.queues)
        """The route of each pool, starting with the default pool."""
        self.concurrency = sum(route.size for route in self.routes)
        self.counts: collections.Counter[JobStatus] = collections.Counter()
        """Number of settled jobs by their new status."""
        self._options = options
        self._store = state.store.with_deadline(_transaction_seconds(config.lease))
        self.grace_seconds = (
            config.shutdown_timeout
            if options.shutdown_timeout is None
            else options.shutdown_timeout
        )
        """Grace period of running jobs after a stop request, in seconds."""
        self._id = 0
        self._stops = 0
        """Number of stop requests."""
        self._has_started = False
        self._is_draining = False
        """Whether the worker claims no more jobs, and stops when its jobs have finished."""
        self._wake = Wake()
        self._outbox = Outbox(self._store)
        self._rollup = RollupWriter(self._store, self.name)
        self._shown_as_started: set[Key] = set()
        """Running attempts whose start was written to the database."""
        self._observed_at = 0.0
        self._poll_due = False
        self._polled_at = self._swept_at = -float("inf")
        self._outage = Outage(self.name)
        self._clock = Clock(self._poll_soon, config.poll_interval)
        self._limits = Limits(
            max_jobs=options.max_jobs, max_time=options.max_time, max_memory=options.max_memory
        )
        # Child processes are replaced at these limits, so the worker itself has none.
        self._own_limits = Limits() if self.routes[0].kind.forks else self._limits
        self._claims = Claims(self._store, self._outbox, max_jobs=self._own_limits.max_jobs)
        self._suspects = self._claims.suspects
        self._started_at = time.monotonic()
        self._sweeper = Sweeper(self._store, config.lease)
        self._unknown_jobs = UnknownJobs(state, self._store, self.name, self.queues)
        self._limit_keeper = LimitKeeper(state, self._store, self.name)
        self._pools = WorkerPools([])
        self._pool_health = PoolHealth(config.lease)
        state.check_can_work(forks=any(r.kind.forks for r in self.routes), app=self._app)
        _check_tables(state)
        import_jobs(state)
        pruner = Pruner(self._store, config.retention, rules(state))
        self._pruning = Pruning(pruner, self.name, is_due=options.scheduler)
        self.ticker = Ticker(state, self._store) if options.scheduler else None
        """The schedules that the worker fires; ``None`` if it fires none."""

    def stop(self) -> None:
        """Ask the worker to stop. Running jobs have a grace period, which a second call ends.

        Safe to call from a signal handler and from any thread.
        """
        self._stops += 1
        grace = self.grace_seconds if self._stops == 1 else 0.0
        # A database that does not answer, or that is locked, must not delay the stop further.
        self._store.give_up_at = time.monotonic() + grace + _END_SECONDS
        self._wake.set()

    @property
    def pool(self) -> str:
        """The kinds of its pools: ``thread``, ``process``, or both joined by ``+``."""
        return "+".join(route.pool for route in self.routes)

    @property
    def _app(self) -> str | None:
        return self.state.config.app or self._options.app

    def run(self) -> None:
        """Run jobs until :meth:`stop` is called or a limit of the options is reached.

        Before it raises an exception, the worker gives its jobs back, if it can reach the database.

        :raises BgJobsError: when child processes cannot build the app.
        :raises WorkerFailed: when a thread of the worker has ended, when jobs that cannot be
            stopped fill a pool, or when no child process could start for the time of a lease.
        """
        # Signal receivers then use the session of this context, and not the caller's.
        with self.state.app.app_context():
            self._run()

    def _run(self) -> None:
        self._pools = self._open_pools()
        try:
            with contextlib.ExitStack() as cleanup:
                self._start(cleanup)
                try:
                    self._work()
                except BaseException:
                    self._give_up()
                    raise
        finally:
            self._pools.close()

    @property
    def has_code_running(self) -> bool:
        """Whether job code runs, or the clock hangs; after :meth:`run`, code that did not stop."""
        return self._pools.running() > 0 or self._clock.hangs

    @property
    def has_threads_running(self) -> bool:
        """After :meth:`run`: whether pool threads are alive because job code did not stop."""
        return any(thread.is_alive() for thread in self._pools.threads)

    def _work(self) -> None:
        while not (self._stops or self._has_reached_limit()):
            self._guard(self._turn)
            if self._stops or self._is_done():
                break
            self._wait()
        self._drain()

    def _give_up(self) -> None:
        """Give all jobs back at once, because the worker cannot go on."""
        while self._stops < 2:
            self.stop()
        try:
            self._drain()
        except Exception:
            _logger.exception("Worker %s could not give its jobs back", self.name)

    # Start and end

    def _start(self, cleanup: contextlib.ExitStack) -> None:
        """Start the threads that run beside the loop, and register the worker.

        :param cleanup: gets a callback for each thread, to stop it. The callbacks run in reverse
            order, also when a later start fails.
        """
        calls = self.state.call_soon = CallThread()
        cleanup.callback(setattr, self.state, "call_soon", call_now)
        cleanup.callback(calls.finish, _LAST_CALLS_SECONDS)
        cleanup.callback(self._emit_stopped)
        cleanup.callback(self._store.dispose)
        notice = self._store.prepare(wal=self.state.config.sqlite_wal)
        if notice:
            _logger.info(notice)
        self._register()
        cleanup.callback(lambda: self._guard(lambda: self._store.stop_worker(self._id)))
        self._progress = LoopProgress(self.state.config.lease)
        self._store.on_attempt = self._progress.note_if_own_thread
        self._heartbeat = Heartbeat(
            self._store, self._id, self.state.config.heartbeat_interval, self._progress
        )
        cleanup.callback(self._heartbeat.stop)
        self._limit_keeper.register()
        if self.ticker is not None:
            # With thousands of schedules this takes seconds, in which the heartbeat goes on.
            self.ticker.register()
        cleanup.callback(lambda: self._guard(lambda: self._rollup.write(at_once=True)))
        cleanup.callback(self._pools.close)
        if self._options.scheduler:
            self._clock.every(_PRUNE_INTERVAL_SECONDS, self._pruning.begin)
        self._clock.start()
        cleanup.callback(self._clock.stop)
        self._wake_ups = WakeUps(self._store, self._poll_soon, self.state.config.poll_interval)
        cleanup.callback(self._wake_ups.stop)
        self.state.enqueued.append(self._on_enqueued)
        cleanup.callback(self.state.enqueued.remove, self._on_enqueued)
        if not self.state.registry:
            _logger.warning(
                "No job is allowed | Worker: %s | It can run no job: name the modules of functions "
                "decorated with @bgjobs.job in BGJOBS_IMPORTS, or list names in "
                "BGJOBS_ALLOWED_JOBS",
                self.name,
            )
        self._has_started = True
        self.state.emit_in_worker(worker_started, worker=self.name)

    def _emit_stopped(self) -> None:
        if self._has_started:
            self.state.emit_in_worker(worker_stopped, worker=self.name)

    def _open_pools(self) -> WorkerPools:
        pools = []
        with contextlib.ExitStack() as undo:
            for route in self.routes:
                open_pool = functools.partial(self._open_pool, route)
                pools.append(RoutedPool(route, open_pool, self._on_finished))
                undo.callback(pools[-1].pool.close)
            undo.pop_all()
        return WorkerPools(pools)

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
            schedules=None if self.ticker is None else self.ticker.names,
        )

    def _start_over(self) -> None:
        """Continue under a new id, after another worker took this worker's lease and jobs."""
        _logger.warning("Lease lost | Worker: %s | It starts over under a new id", self.name)
        self._claims.forget(self._pools.take_unstarted())
        self._poll_due = True
        self._outbox.take_reports()
        self._shown_as_started.clear()
        for spec in self._pools.running_specs():
            self._pools.cancel(spec)
        self._register()
        if self.ticker is not None:
            self.ticker.take_back()
        self._heartbeat.switch_to(self._id)

    # One turn

    def _turn(self) -> None:
        self._progress.note()
        self._check_threads()
        if self._heartbeat.lease_lost:
            self._start_over()
        # Outcomes that arrive during a handover are left to the next one.
        if not self._hand_over():
            self._settle()
        self._claims.give_back_unseen(self._id, self._settle)
        self._observe_running()
        self._pool_health.check_overdue(self._pools)
        for spec in self._pool_health.take_from_failing(self._pools):
            self._outbox.put(spec, shutdown.given_back(spec))
        self._poll()
        self._sweep()
        self._free()
        self._admit()
        self._start_suspects()
        self._claim()
        self._rollup.write()
        self._pruning.step()

    def _check_threads(self) -> None:
        own = [self._heartbeat.thread, *self._clock.threads, *self._wake_ups.threads]
        require_alive([*own, *self._pools.threads, *self._store.threads])

    def _settle(self) -> None:
        for settled in self._outbox.record(self._id, self.name):
            if settled.spec.limits_json is not None:
                self._limit_keeper.is_due = True
            self._after_settle(settled)

    def _hand_over(self) -> bool:
        """Record completed attempts of jobs with limits, and claim the jobs that follow, in one
        transaction. Without it, other steps do the same in three.

        :returns: whether that was possible now.
        """
        if self._is_draining or len(self.routes) > 1 or not self._outbox.has_limited_completions:
            return False
        (routed,) = self._pools
        if self._claims.room(routed) <= 0 or not self._claims.may_hand_over():
            return False
        if self._pools.running():
            time.sleep(_GATHER_FOLLOWERS_SECONDS)
        room = self._claims.room(routed)
        if self._claims.hand_over(self._id, routed, room, self._after_settle):
            self._limit_keeper.is_due = True
        self._wake_ups.note_work()
        return True

    def _after_settle(self, settled: Settled) -> None:
        self._take_note(settled)
        # It calls signal receivers, which may be slow.
        self._progress.note()

    def _take_note(self, settled: Settled) -> None:
        spec = settled.spec
        key = spec.key
        self._pool_health.forget(key)
        self._shown_as_started.discard(key)
        if self._claims.note_end(spec):
            self._poll_due = True
        if settled.status is None:
            _logger.warning(
                "Lease lost | Job: %s | Attempt: %s | Its outcome (%s) was not recorded",
                spec.id,
                spec.attempt,
                settled.outcome.kind.value,
            )
            return
        self.counts[settled.status] += 1
        self._unknown_jobs.note(settled)
        self._rollup.note(settled)
        if settled.status is JobStatus.PENDING:
            self._poll_due = True
        if settled.delay_seconds is not None and settled.delay_seconds <= _HORIZON_SECONDS:
            self._clock.wake_in([settled.delay_seconds])
        self._announce(settled)

    def _announce(self, settled: Settled) -> None:
        self.state.emit_settled(settled)
        report_lost(self.state, settled)

    def _observe_running(self) -> None:
        """Write the reports of running jobs, and stop jobs that are cancelled or have no lease."""
        now = time.monotonic()
        busy = self._pools.running() or self._pools.unstarted() or self._suspects
        if not busy or now - self._observed_at < _OBSERVE_SECONDS:
            return
        self._observed_at = now
        self._show_as_started()
        view = self._write_reports()
        waiting = list(self._suspects)
        held = self._pools.running_specs(), self._pools.unstarted_specs(), waiting
        for spec in [spec for specs in held for spec in specs]:
            lost = view.attempts.get(spec.id) != spec.attempt
            if not lost and spec.id not in view.cancelling:
                continue
            if spec in waiting:
                self._suspects.remove(spec)
                self._poll_due = True
                self._outbox.put(spec, Outcome(spec.id, spec.attempt, OutcomeKind.CANCELLED))
            else:
                self._pools.cancel(spec)

    def _write_reports(self) -> LeaseView:
        """Write the reports of running jobs. The outbox keeps those that cannot be written."""
        reports = self._outbox.take_reports()
        for key, report in self._pools.reports().items():
            reports[key] = reports[key].followed_by(report) if key in reports else report
        try:
            return self._store.observe(self._id, reports)
        finally:
            if reports:
                self._outbox.keep_reports(reports)

    def _show_as_started(self) -> None:
        """Write the start of running jobs. For short jobs, it is written with their outcome."""
        running = self._pools.running_specs()
        new = [spec for spec in running if spec.key not in self._shown_as_started]
        if new:
            locked = self._store.mark_started(self._id, new).locked
            self._shown_as_started |= {spec.key for spec in new if spec.id not in locked}

    def _poll(self) -> None:
        """Promote due jobs, enqueue those of due ticks, set the clock for the next ones, and read
        drain requests."""
        now = time.monotonic()
        # A monotonic limit: it works even if the wall clock jumps or the clock's thread hangs.
        late = now - self._polled_at >= self._wake_ups.poll_seconds()
        if not (self._clock.drifted() or self._poll_due or late):
            return
        # Cleared before the query: jobs that arrive during the query need another poll.
        self._poll_due = False
        work = self._store.look(self.queues, self._id, schedules=bool(self.ticker))
        if work.drain and not self._is_draining:
            _logger.info("Worker draining | Worker: %s | It ends after its running jobs", self.name)
            self._is_draining = True
            shutdown.give_back_unstarted(self._pools, self._suspects, self._outbox)
        promoted = 0
        if work.due_in is not None and work.due_in <= _HORIZON_SECONDS:
            promoted = self._promote(for_seconds=_PROMOTE_SECONDS)
            self._clock.wake_in(self._store.upcoming(_HORIZON_SECONDS, STEP_SECONDS))
        if work.notices or (work.limit_in is not None and work.limit_in <= 0):
            self._limit_keeper.is_due = True
        elif work.limit_in is not None and work.limit_in <= _HORIZON_SECONDS:
            self._clock.wake_in([work.limit_in])
        # First, so that a backlog of pending jobs does not hold ticks back.
        fired = self._fire(work)
        if work.pending or promoted or fired:
            self._pools.expect_jobs()
        self._polled_at = now

    def _promote(self, *, for_seconds: float) -> int:
        """Promote due jobs, and poll again soon if there are more."""
        began = time.monotonic()
        promoted = self._store.promote(self.state.config.weights, seconds=for_seconds)
        if time.monotonic() - began >= for_seconds:
            self._poll_due = True
        return promoted

    def _fire(self, work: Work) -> bool:
        """Enqueue the jobs of due ticks.

        :returns: whether there may be new jobs.
        """
        if not self.ticker or self._is_draining:
            return False
        self.ticker.note_time(work.now)
        if work.tick_in is None or work.tick_in > _HORIZON_SECONDS:
            return False
        if work.tick_in > 0:
            self._clock.wake_in([work.tick_in])
            return False
        may_be_more = self.ticker.fire()
        self._progress.note()
        # The next poll sets the clock for the next tick.
        if may_be_more:
            self._poll_due = True
        return may_be_more

    def _sweep(self) -> None:
        now = time.monotonic()
        if now - self._swept_at < self.state.config.heartbeat_interval:
            return
        self._swept_at = now
        self.state.expire(self._store)
        self._progress.note()
        self._free_waiting(_FREED_PER_SWEEP)
        self._progress.note()
        self._limit_keeper.sweep()
        self._progress.note()
        for settled in self._sweeper.sweep(self._id):
            self._poll_due = True
            self._rollup.note(settled)
            self._announce(settled)
            self._progress.note()

    def _free(self) -> None:
        """Free more of the jobs that wait for code that this worker has, if no others are pending:
        as many as it can run now."""
        if room := self._room_for_waiting():
            self._free_waiting(room)

    def _free_waiting(self, limit: int) -> None:
        if not self._is_draining and self._unknown_jobs.free(limit):
            self._pools.expect_jobs()

    def _admit(self) -> None:
        """Let jobs run that wait for their limits, where there is room.

        A worker that ends leaves this to others, except those whose jobs it has just run.
        """
        if self._limit_keeper.is_due and self._limit_keeper.admit():
            self._pools.expect_jobs()

    def _room_for_waiting(self) -> int:
        """Number of waiting jobs to free at once; 0 if there are none, or others are pending."""
        if not self._unknown_jobs.may_free_more or any(r.expects_jobs for r in self._pools):
            return 0
        return sum(max(0, self._claims.room(routed)) for routed in self._pools)

    def _claim(self) -> None:
        if self._is_draining:
            return
        for routed in self._pools:
            if not routed.expects_jobs or (room := self._claims.room(routed)) <= 0:
                continue
            if self._claims.take(self._id, routed, room):
                self._wake_ups.note_work()
        self._start_suspects()

    def _start_suspects(self) -> None:
        if self._claims.start_suspects(self._id, self._pools):
            self._poll_due = True

    # Waiting, stopping, outages

    def _wait(self) -> None:
        may_claim = any(r.expects_jobs and self._claims.room(r) > 0 for r in self._pools)
        may_claim = may_claim or self._room_for_waiting() > 0
        if may_claim and not (self._stops or self._is_draining):
            return
        if self._limit_keeper.is_due and not self._stops:
            return
        busy = self._pools.running() or self._pools.unstarted()
        if self._pools.unstarted() and self._outbox.unlocked:
            time.sleep(_GATHER_SECONDS)
            return
        seconds = self._wake_ups.poll_seconds()
        if busy or self._suspects or self._outbox:
            seconds = min(seconds, _OBSERVE_SECONDS, self._suspects.seconds_until_next())
        self._sleep(min(seconds, _PRUNE_PAUSE_SECONDS) if self._pruning.is_due else seconds)

    def _sleep(self, seconds: float) -> None:
        """Wait until the worker is woken up, for ``seconds`` at most."""
        self._progress.note(seconds)
        self._wake.wait(seconds)

    def _is_done(self) -> bool:
        """Whether there is nothing left to do for this worker."""
        # In this order: a job that starts in between is then counted at least once.
        idle = not (self._pools.unstarted() or self._pools.running() or self._outbox)
        idle = idle and not self._suspects
        if self._is_draining:
            return idle
        if self._claims.has_reached_limit:
            return idle
        return self._options.burst and idle and self._has_no_jobs_left()

    def _has_reached_limit(self) -> bool:
        limits = self._own_limits
        if limits.max_time is not None and time.monotonic() - self._started_at >= limits.max_time:
            return True
        return limits.max_memory is not None and memory_in_use() >= limits.max_memory

    def _has_no_jobs_left(self) -> bool:
        has_unfinished = True
        try:
            # A retry without a delay is due at once.
            self._store.promote(self.state.config.weights)
            self._free_waiting(_FREED_PER_SWEEP)
            self._limit_keeper.admit_all()
            has_unfinished = self._store.unfinished(self.queues)
        except SQLAlchemyError as error:
            self._back_off(error)
        return not has_unfinished and self._polled_at > 0

    def _drain(self) -> None:
        """Give unstarted jobs back, let running jobs finish in the grace period, give back the
        rest."""
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
            self._sleep(min(_OBSERVE_SECONDS, max(0.0, grace_ends - time.monotonic())))
        shutdown.give_back_running(self._pools, self._outbox, self._sleep)
        # A pool that failed in the grace period has put its jobs back into its queue.
        shutdown.give_back_unstarted(self._pools, self._suspects, self._outbox)
        self._settle_last()

    def _settle_last(self) -> None:
        """Record the last outcomes; wait up to 3 s for rows that other transactions have locked."""
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
        self._observe_running()

    def _guard(self, step: Callable[[], None]) -> None:
        """Run a step that uses the database; on a database error, log it and wait (backoff)."""
        try:
            step()
        except SQLAlchemyError as error:
            self._back_off(error)
        else:
            self._outage.record_success()

    def _back_off(self, error: SQLAlchemyError) -> None:
        self._pause(self._outage.record_failure(error, len(self._outbox)))

    def _pause(self, seconds: float) -> None:
        """Wait for some seconds, or until a stop is requested."""
        end = time.monotonic() + seconds
        while not self._stops and (left := end - time.monotonic()) > 0:
            self._sleep(left)

    # Called from other threads

    def _on_finished(self, spec: JobSpec, outcome: Outcome) -> None:
        self._outbox.put(spec, outcome)
        self._wake.set()

    def _poll_soon(self) -> None:
        """Poll soon: a job is due or was enqueued, or the poll interval has passed."""
        self._poll_due = True
        self._wake.set()

    def _on_enqueued(self, _job: Job) -> None:
        self._poll_soon()


def _transaction_seconds(lease: float) -> float:
    """Deadline of one transaction: a part of the lease, so that there is time for another try."""
    seconds = max(_MIN_TRANSACTION_SECONDS, lease / _TRANSACTIONS_PER_LEASE)
    return min(seconds, _MAX_TRANSACTION_SECONDS)


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
