"""The cores as one pool: runs of several cells at a time, one a core, and no core waits for a cell to end.

Numbers do not depend on the pool: each job has as many of torch's threads whatever else is at work. Threads
of Python wait for each other: all together they take as many training steps as four to six cores could, so on
more cores jobs are done by processes. On fewer a thread is cheaper than a fork.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import torch

from ablation.forked import Forks, can_fork

Job = Callable[[], Any]
FORK_FROM = 4  # cores


class Batch:
    """Jobs that belong together, such as the runs of a cell."""

    in_turn = False  # its jobs are done where they are handed out, with all cores, and nothing beside
    most = sys.maxsize  # jobs at work at a time
    may_fork = True  # its jobs bear a fork; if not, they are done in turn where jobs fork

    def __init__(self) -> None:
        self.stop = threading.Event()  # asks jobs at work to end, because their results are not needed
        self.error: Exception | None = None  # of the first job that failed; the others are not begun

    def jobs(self) -> Iterator[Job]:
        """The jobs, each made when a core will soon be free for it. Called once."""
        raise NotImplementedError

    def note(self, result: Any) -> None:
        """Take the result of a job, in the process and thread that hand them out."""
        raise NotImplementedError

    def to_bytes(self, result: Any) -> bytes:
        """A result as it travels from another process."""
        raise NotImplementedError

    def from_bytes(self, content: bytes) -> Any:
        """The result that `to_bytes` made bytes of."""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """Give the batch up; of several errors the first counts."""
        self.error = self.error or error
        self.stop.set()


class Threads:
    """Jobs at work in threads."""

    def __init__(self, workers: int):
        self.executor = ThreadPoolExecutor(workers)
        self.futures: set[Future] = set()

    def submit(self, job: Job, batch: Batch) -> object:
        """Begin a job when a thread is free; returns what `done` calls it."""
        future = self.executor.submit(job)
        self.futures.add(future)
        return future

    def done(self) -> list[tuple[object, Callable[[], Any]]]:
        """Wait for a job to end. Returns those that did, each with a function that gives its result."""
        ended = wait(self.futures, return_when=FIRST_COMPLETED).done
        self.futures -= ended
        return [(future, future.result) for future in ended]

    def drop(self, job: Any) -> bool:
        """True if a job will not be done: it had not begun."""
        dropped = job.cancel()
        if dropped:
            self.futures.discard(job)
        return dropped

    def close(self) -> None:
        """Wait for jobs at work; drop the others."""
        self.executor.shutdown(cancel_futures=True)


SomeBatch = TypeVar("SomeBatch", bound=Batch)  # the kind of batch that a pool is given


class Pool(Generic[SomeBatch]):
    """A process, or a thread with its share of torch's threads, for each of `workers` cores."""

    def __init__(self, workers: int):
        self.threads = torch.get_num_threads()
        self.workers = workers
        self.forks = workers >= FORK_FROM and can_fork()
        self.crew: Threads | Forks = Forks(workers) if self.forks else Threads(workers)
        # A fork has one thread: torch's pool of threads is not in it, and waiting for them never ends.
        self.threads_of_job = 1 if self.forks else max(1, self.threads // workers)
        self.at_work: dict[object, SomeBatch] = {}  # the batch of each job

    def __enter__(self) -> Pool[SomeBatch]:
        torch.set_num_threads(self.threads_of_job)
        return self

    def __exit__(self, *exception: object) -> None:
        """Drop jobs that have not begun, and end the others."""
        for batch in self.at_work.values():
            batch.stop.set()
        self.crew.close()
        torch.set_num_threads(self.threads)

    @contextlib.contextmanager
    def all_cores(self) -> Iterator[None]:
        """Let torch use every core in a block of a `with` statement, while no job is at work."""
        assert not self.at_work
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(self.threads_of_job)

    def finished(self, batches: Iterable[SomeBatch | None]) -> Iterator[SomeBatch]:
        """Do the jobs of all batches in order, and yield each batch when its last job is done or one failed.

        A batch is asked for when a core will soon be free for it; for None the pool finishes first what is at
        work. One job more than there are cores is handed out, so that none waits for the next to be made.
        """
        for batch in batches:
            if batch is None or self.is_in_turn(batch):
                yield from self.collected(0)
            if batch is not None:
                yield from self.hand_out(batch)
                if batch not in self.at_work.values():
                    yield batch
        yield from self.collected(0)

    def is_in_turn(self, batch: SomeBatch) -> bool:
        """True if the jobs of a batch are done by this thread."""
        return batch.in_turn or (self.forks and not batch.may_fork)

    def hand_out(self, batch: SomeBatch) -> Iterator[SomeBatch]:
        """Begin the jobs of a batch; yields others that finish meanwhile."""
        jobs = batch.jobs()
        while batch.error is None:
            for other in self.collected(min(self.workers, batch.most - 1)):
                if other is not batch:
                    yield other
            try:
                job = next(jobs, None)
                if job is None:
                    return
                if self.is_in_turn(batch):
                    with self.all_cores():
                        batch.note(job())
                elif batch.error is None:
                    self.at_work[self.crew.submit(job, batch)] = batch
            except Exception as error:
                batch.fail(error)

    def collected(self, most: int) -> Iterator[SomeBatch]:
        """Take results until at most so many jobs are at work; yields batches none of whose jobs are left."""
        while len(self.at_work) > most:
            for job, result_of in self.crew.done():
                batch = self.at_work.pop(job)
                try:
                    result = result_of()
                    if batch.error is None:
                        batch.note(result)
                except Exception as error:
                    batch.fail(error)
                if batch.error is not None:
                    self.drop(batch)
                if batch not in self.at_work.values():
                    yield batch

    def drop(self, batch: SomeBatch) -> None:
        """Drop the jobs of a batch whose results are not needed."""
        for job in [job for job, other in self.at_work.items() if other is batch]:
            if self.crew.drop(job):
                del self.at_work[job]


@contextlib.contextmanager
def one_thread_a_core(most: int) -> Iterator[ThreadPoolExecutor]:
    """The threads of a pool of at most `most` of the cores that torch uses; torch's own threads are shared
    out among them. At the end jobs that have not begun are cancelled.
    """
    threads = torch.get_num_threads()
    workers = min(threads, most)
    torch.set_num_threads(threads // workers)
    executor = ThreadPoolExecutor(workers)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
