"""The serving loop: rows of requests are put into open `Server`s while these run, block after block.

Requests whose options are equal share a `Server`, and with it an engine, and so do their rows; a row has its own seed.
All servers together have ``seats`` seats; rows get them in the order in which they came. A server fills fewer at a time
if its options need so much memory. Each turn of the loop seats rows, fills one block of every server's, and reports it.
"""

import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dllm_fast.decoding.memory import free, need, rows_within
from dllm_fast.decoding.options import Options
from dllm_fast.decoding.request import Row, check_suffix, plan_row
from dllm_fast.decoding.server import Server
from dllm_fast.families.bypass import unwrapped
from dllm_fast.patch import bound_family, bound_pool
from dllm_fast.serve.messages import Accepted, Block, Cancel, Draft, Failed, Load, Refused, Request

Event = Accepted | Refused | Failed | Block | Draft | Load


@dataclass
class Job:
    """A row, the choice of a request that it is, and how much of it was told."""

    request: Request
    choice: int
    row: Row
    options: Options  # of the server that it may sit in
    told: int = 0  # tokens of the answer

    @property
    def prompt(self) -> int:
        return len(self.request.prompts[self.choice])

    def news(self) -> Block | None:
        """What the last block brought, if the request wants to know it."""
        if not (self.row.done or self.request.blocks):
            return None
        end = len(self.row.ids) if self.row.done else self.row.settled
        begin, self.told = self.told, max(self.told, end - self.prompt)
        ids = self.row.ids[self.prompt + begin : self.prompt + self.told].tolist()
        return Block(self.request.number, self.choice, begin, ids, self.row.counts.nfe, self.row.done)


class Loop:
    """Serves requests for a patched ``model`` with ``seats`` rows at a time.

    ``emit`` is called with lists of events, in the thread that calls `run`. `put` may be called from any thread.
    ``positions``: of a prompt with its answer, at most; None: the model's own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        seats: int,
        emit: Callable[[list[Event]], None],
        positions: int | None = None,
    ):
        self.family, self.model, self.pool = bound_family(model), unwrapped(model), bound_pool(model)
        self.seats, self.emit, self.positions = seats, emit, positions or self.family.positions
        self.free = free(self.family)  # beside the weights, for all that will ever run
        self.inbox: queue.SimpleQueue[Request | Cancel | None] = queue.SimpleQueue()
        self.waiting: deque[Job] = deque()
        self.seated: dict[int, Job] = {}  # by the row's index, which no other row has
        self.servers: dict[Options, Server] = {}
        self.rows = 0  # that ever were
        self.load = Load(0, 0)

    def put(self, message: Request | Cancel | None) -> None:
        """Serve a request, cancel one, or, for None, return from `run`."""
        self.inbox.put(message)

    def run(self) -> None:
        """Serve until None is put."""
        while True:
            if not self.take_messages():
                return
            self.turn()

    def take_messages(self) -> bool:
        """Take in what was put; wait for it if there is nothing else to do. False: it is time to stop."""
        idle = not (self.waiting or self.seated)
        while idle or not self.inbox.empty():
            message = self.inbox.get()
            if message is None:
                return False
            if isinstance(message, Cancel):
                self.cancel(message.number, message.choice)
            else:
                self.accept(message)
            idle = False
        return True

    def accept(self, request: Request) -> None:
        """Plan the request's rows, or refuse it."""
        try:
            options = request.options.resolved(self.model, self.family)
            rows: list[Row] = []
            for choice, prompt in enumerate(request.prompts):
                rows.append(plan_row(options, self.family, self.rows + choice, prompt, "prompt", choice))
            check_suffix(options, rows)
            self.check_memory(options, max(len(row.ids) for row in rows))
        except ValueError as error:
            self.emit([Refused(request.number, str(error))])
            return
        except Exception as error:  # a value that nobody thought of: this request's trouble alone
            self.emit([Failed(request.number, f"{type(error).__name__}: {error}")])
            return
        self.rows += len(rows)
        for choice, row in enumerate(rows):
            job = Job(request, choice, row, options)
            if request.drafts:
                row.draft = self.drafting(job)
            self.waiting.append(job)
        self.emit([Accepted(request.number)])

    def check_memory(self, options: Options, slots: int) -> None:
        """Raise ValueError if not even one row of so many slots fits: on a CPU, the system would kill this process."""
        needed = need(self.family, options, 1, slots, options.block_length)
        if self.free is not None and needed > self.free:
            raise ValueError(
                f"with its options one choice needs {needed / 2**30:.1f} GiB of memory beside the weights, and "
                f"{self.free / 2**30:.1f} GiB were free"
            )

    def drafting(self, job: Job) -> Callable[[torch.Tensor, int], None]:
        def draft(ids: torch.Tensor, end: int) -> None:
            begin = job.prompt + job.told
            self.emit([Draft(job.request.number, job.choice, job.told, ids[begin : max(end, begin)].tolist())])

        return draft

    def cancel(self, number: int, choice: int | None = None) -> None:
        """Free the seats of a request, or of one choice, and forget its rows that wait. Unknown ones are done."""

        def meant(job: Job) -> bool:
            return job.request.number == number and choice in (None, job.choice)

        self.waiting = deque(job for job in self.waiting if not meant(job))
        for index in [index for index, job in self.seated.items() if meant(job)]:
            self.seated.pop(index).row.stop()

    def turn(self) -> None:
        """Seat waiting rows, fill a block of each server's rows, and tell what is new."""
        self.seat()
        for options, server in list(self.servers.items()):
            if server.busy:
                self.fill(options, server)
            if not server.busy:
                server.close()
                self.servers.pop(options, None)
        self.tell_load()

    def seat(self) -> None:
        """Put rows into their servers, the first that came first, while there are seats."""
        while self.waiting and len(self.seated) < self.seats:
            job = self.waiting.popleft()
            if job.options not in self.servers:
                limits = self.free, self.family, job.options, self.seats, self.positions, job.options.block_length
                seats = max(1, rows_within(*limits))
                server = Server(self.model, self.family, self.pool, job.options, [], seats, is_open=True)
                self.servers[job.options] = server
            self.servers[job.options].add(job.row)
            self.seated[job.row.index] = job

    def fill(self, options: Options, server: Server) -> None:
        """Fill a block. An error fails the requests of this server, and no others."""
        try:
            server.advance()
        except (RuntimeError, ValueError, MemoryError) as error:
            self.fail(options, f"{type(error).__name__}: {error}")
            return
        events: list[Event] = []
        for row in server.going:
            job = self.seated.get(row.index)
            if job is None:  # cancelled, or told already
                continue
            if row.error is not None:
                events.append(Failed(job.request.number, row.error))
            elif (news := job.news()) is not None:
                events.append(news)
            if row.done:
                del self.seated[row.index]
        for event in events:
            if isinstance(event, Failed):
                self.cancel(event.number)
        if events:
            self.emit(events)

    def fail(self, options: Options, error: str) -> None:
        """Give up a server and all requests with rows in it. Its engine is in no state to be kept."""
        del self.servers[options]
        numbers = {job.request.number for job in self.seated.values() if job.options == options}
        for number in numbers:
            self.cancel(number)
        self.emit([Failed(number, error) for number in numbers])

    def tell_load(self) -> None:
        load = Load(len(self.seated), len(self.waiting))
        if load != self.load:
            self.load = load
            self.emit([load])
