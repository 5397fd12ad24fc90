"""The processes (ranks) torchrun started, or the one there is without it: who does what, how all
end.

What they tell each other is little, and goes by the CPU whatever the device: whether all go on, and
what one of them found.
"""

import atexit
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.checks import choose_device
from fastdiff.errors import InputError, LostRank, TrainingError, first_line

S = TypeVar("S")
T = TypeVar("T")

# Set by torchrun, or by whoever starts the processes in its place.
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PLACE = ("MASTER_ADDR", "MASTER_PORT")

ARRIVAL = 10.0  # minutes for all processes to find each other
# A process with nothing left to do waits while another draws, which no one can foresee. When a
# process dies, torchrun ends the others; the limit is for those that hang.
DRAWING = 24 * 60.0
FAREWELL = 5  # seconds in which a process that lost the others waits for what they say of it
ANSWER = 5  # seconds in which the store has to answer
PULSE = 1  # seconds between signs of life

EXPECTED = (InputError, TrainingError, OSError)  # what the command line prints as one line


@dataclass(frozen=True)
class Ranks:
    """Rank ``rank`` of ``count``, on ``device`` (as --device names it; None leaves it open)."""

    rank: int = 0
    count: int = 1
    device: str | None = None
    group: Any = None  # of the CPU
    store: Any = None  # what a rank says that has left the group
    minutes: float = DRAWING  # that a rank waits for another

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's share of what all have: every ``count``-th item."""
        return list(items[self.rank :: self.count])

    def each(
        self, work: Callable[[S], T], items: Sequence[S], *, on_first: bool = False
    ) -> list[T]:
        """``work`` of every item, in their order: one rank does it, all get its answer.

        Answers can be pickled, and lie in the CPU's memory. ``on_first``: rank 0 alone gets them,
        the others an empty list, where all of them are too much for every rank. What a rank raises
        is its own, for ``heard`` to tell.
        """
        mine = [work(item) for item in self.share(items)]
        found = self._to_first(mine) if on_first else self.gather(mine)
        return [found[i % self.count][i // self.count] for i in range(len(items)) if found]

    def together(self, work: Callable[[], T]) -> T:
        """``work()``, while every other rank does the same.

        When it fails anywhere all end here: the first rank that failed raises its error, the others
        leave without a word, with its exit code.
        """
        if self.group is None:
            return work()
        error: BaseException | None = None
        try:
            result = work()
        except (*EXPECTED, SystemExit) as caught:  # this one of a call of ours inside ``work``
            error = caught
        ends = self.gather(None if error is None else isinstance(error, EXPECTED))
        if not any(end is not None for end in ends):
            return result
        if error is not None and True in ends and ends.index(True) == self.rank:
            raise error
        raise SystemExit(2)

    def on_first(self, work: Callable[[], T]) -> T:
        """``work()`` on rank 0 alone; every rank gets its answer, or ends with it."""
        answer: Any = self.together(lambda: work() if self.rank == 0 else None)
        return answer if self.group is None else self.gather(answer)[0]

    def apart(self) -> "Ranks":
        """The same ranks on a line of their own, for another thread: a call of all of them."""
        return self if self.group is None else replace(self, group=_line(self.minutes))

    def leave(self) -> None:
        """Wait until all have come here, and part: each goes on alone."""
        if self.group is not None:
            self.gather(None)
            torch.distributed.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, which can be pickled, in their order. TrainingError when one of
        them is gone."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.count
        with self.lost():
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def _to_first(self, value: T) -> list[T]:
        """``gather`` for rank 0; the others get nothing."""
        if self.group is None:
            return [value]
        values: Any = [None] * self.count if self.rank == 0 else None
        with self.lost():
            torch.distributed.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def numbers(self, *values: int) -> Tensor:
        """Every rank's ``values``, int64 (count, n): as ``gather``, for a tenth of its time."""
        mine = torch.tensor(values, dtype=torch.int64)
        if self.group is None:
            return mine[None]
        found = [torch.empty_like(mine) for _ in range(self.count)]
        with self.lost():
            torch.distributed.all_gather(found, mine, group=self.group)
        return torch.stack(found)

    def joined(self, mine: Tensor) -> Tensor:
        """(N, ...) of every rank's ``mine`` (n, ...), on its device, in the order of the ranks."""
        found = [torch.empty_like(mine) for _ in range(self.count)]
        with self.lost():
            torch.distributed.all_gather(found, mine.contiguous())
        return torch.cat(found)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """InputError, in the first rank, where another has other ``facts`` (JSON values by name)
        than rank 0; the others leave without a word."""
        every = self.gather(dict(facts))
        for rank, found in enumerate(every):
            for name, value in found.items():
                if value != every[0][name]:
                    if self.rank:
                        raise SystemExit(2)
                    raise InputError(
                        f"the ranks disagree: {name} is {value} on rank {rank} and "
                        f"{every[0][name]} on rank 0; start all with the same command, versions "
                        "and data"
                    )

    def agents(self) -> list[str]:
        """The torchrun processes that started the ranks, each under a name that stays its own; none
        without torchrun.

        Processes in whose place torchrun started these had one of them too. What those leave with
        these names in a file is theirs to take up; the store is not the place, as it may go with a
        machine.
        """
        return sorted({name for name in self.gather(_agent()) if name})

    @contextmanager
    def heard(self) -> Iterator[None]:
        """What ends the block here is told to the ranks that wait for this one."""
        try:
            yield
        except Exception as error:
            if self.store is not None:
                said = first_line(error)
                _asked(lambda: self.store.set(f"failed/{self.rank}", said), ANSWER)
            raise

    @contextmanager
    def lost(self) -> Iterator[None]:
        """A block that talks to the other ranks: where one of them is gone, LostRank names it.

        A rank that said why it fails prints that itself, and the others leave without a word; of
        those that miss a silent one the first speaks.
        """
        try:
            yield
        except RuntimeError as error:
            if self.group is None or not _is_of_others(error):
                raise
            gone, speaker = self._roll_call()
            if speaker != self.rank:
                raise SystemExit(2) from error
            who = f"rank {', '.join(map(str, gone))} of {self.count}" if gone else "another rank"
            if gone is None:
                place = os.environ.get(PLACE[0])
                who += f", and with it the store at {place}, by which they met,"
            raise LostRank(
                f"lost {who} without a word: killed, its machine gone, or hanging for longer than "
                f"{self.minutes:g} minutes"
            ) from error

    def _roll_call(self) -> tuple[list[int] | None, int | None]:
        """(the ranks that are gone, the rank that says so), after some seconds: None for the first
        where the store is gone with them, for the second where one has said why it failed.
        """
        if self.store is None:
            return [], self.rank
        found = _asked(self._found_by_store, FAREWELL + ANSWER)
        if found:
            return found[0]
        return None, self.rank if _first_without_store(self.rank) else None

    def _found_by_store(self) -> tuple[list[int], int | None]:
        """:meth:`_roll_call` where the store answers.

        A rank that waits for another cannot answer, but its pulse goes on; one that hangs has a
        pulse and never answers.
        """
        ranks = range(self.count)
        self.store.set(f"here/{self.rank}", "")
        before = [self._pulse_of(rank) for rank in ranks]
        time.sleep(FAREWELL)
        if any(self.store.check([f"failed/{rank}"]) for rank in ranks):
            return [], None
        here = [rank for rank in ranks if self.store.check([f"here/{rank}"])]
        beating = [rank for rank in ranks if self._pulse_of(rank) != before[rank]]
        dead = [rank for rank in ranks if rank not in {*here, *beating}]
        if dead:
            return dead, min({*here, *beating})
        return [rank for rank in ranks if rank not in here], here[0]

    def _pulse_of(self, rank: int) -> int:
        return self.store.add(f"pulse/{rank}", 0)


def _asked(question: Callable[[], T], seconds: float) -> list[T]:
    """The answer to what is asked of the store; none where that went with what held it, or does not
    come: a store whose machine stands still is waited for for ever, whatever limit torch is given.
    """
    answers: list[T] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers


def _first_without_store(rank: int) -> bool:
    """Whether this rank is the first that is left on its machine, where the store is gone: with the
    machine of rank 0, whose agent held it, or with rank 0 itself."""
    return _number("LOCAL_RANK", 0) == 0 or (rank == 1 and not _has_agent())


def _begin_pulse(store: Any, rank: int) -> None:
    """Show from now on that this process lives, whatever its threads wait for."""
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(store, rank, ended), daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join(FAREWELL)

    # The interpreter ends daemons where they are: inside the store, that aborts the process.
    atexit.register(end)


def _beat(store: Any, rank: int, ended: threading.Event) -> None:
    with suppress(RuntimeError):
        store.add(f"pulse/{rank}", 1)
        while not ended.wait(PULSE):
            store.add(f"pulse/{rank}", 1)


ALONE = Ranks()


def refuse_several() -> None:
    """End where this is one of several processes that would all do the same work.

    InputError in the first of them; the others leave without a word, with its exit code.
    """
    count = _number("WORLD_SIZE", 1)
    if count <= 1:
        return
    if _number("RANK", _number("SLURM_PROCID", 0)) != 0:
        raise SystemExit(2)
    raise InputError(
        f"started as {count} processes (WORLD_SIZE), which would each do all of the work and "
        "overwrite each other's: start one process (unset WORLD_SIZE if it is one); started by "
        "torchrun, fastdiff train, sample, nll, rate-distortion, evaluate and reproduce share "
        "theirs"
    )


def _number(name: str, default: int) -> int:
    """An integer of the environment. InputError when it is none."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise InputError(f"the environment's {name} is {text!r}, expected a number") from None


@contextmanager
def said_by_first() -> Iterator[None]:
    """Before the ranks have met: an error that all of them find is said by the first."""
    try:
        yield
    except EXPECTED:
        if _number("RANK", 0):
            raise SystemExit(2) from None
        raise


def join(device: str | None, minutes: float = DRAWING) -> Ranks:
    """Meet the other processes; without torchrun's environment there are none.

    Args:
        device: as --device names it. Each of several processes takes the GPU of its LOCAL_RANK.
        minutes: that a rank waits for another before it says that it is lost.

    Raises:
        InputError: no such device, fewer GPUs than processes, no number where one belongs, or
            several processes that have not been told how to meet.
    """
    if not all(name in os.environ for name in NUMBERS + PLACE):
        refuse_several()
        return Ranks(device=device)
    rank, count, local_rank, local_count = (_number(name, 0) for name in NUMBERS)
    if count == 1:
        return Ranks(device=device)
    try:
        on_gpus = _on_gpus(device, local_count)
    except InputError:
        if local_rank != 0:  # one line is enough of what every process finds
            raise SystemExit(2) from None
        raise
    if on_gpus:
        device = f"cuda:{local_rank}"
        torch.cuda.set_device(choose_device(device))
    attempt = _attempt(rank, count) if _has_agent() else "only"
    if not torch.distributed.is_initialized():
        _meet("nccl" if on_gpus else "gloo", rank, count, attempt, minutes)
    group = _line(minutes)
    _begin_pulse(_store(attempt), rank)
    return Ranks(rank, count, device, group, _store(attempt), minutes)


def _line(minutes: float) -> Any:
    """A group of all ranks on the CPU."""
    limit = datetime.timedelta(minutes=minutes)
    return torch.distributed.new_group(backend="gloo", timeout=limit)


def _meet(backend: str, rank: int, count: int, attempt: str, minutes: float) -> None:
    """``init_process_group``, under names that no earlier attempt has left in the agent's store:
    torch's own are the same each time, and gloo would wait for processes that are gone
    (github.com/pytorch/pytorch/issues/135712).

    Gradients are averaged by this group. On GPUs its limit is twice the CPU group's: those who wait
    there for the same rank speak before torch's watchdog ends the process.
    """
    arrival = datetime.timedelta(minutes=ARRIVAL)
    store: Any
    if _has_agent():
        store = _store(f"torch/{attempt}")
    else:
        store = next(torch.distributed.rendezvous("env://", rank, count, timeout=arrival))[0]
    limit = datetime.timedelta(minutes=minutes * (2 if backend == "nccl" else 1))
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=count, timeout=limit
    )


def _is_of_others(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. gloo's errors have no class of their
    own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _has_agent() -> bool:
    """Whether torchrun's agent holds the store by which the ranks meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _agent() -> str:
    """The name of the torchrun process that started this one: its job, machine, number and hour,
    since in containers the first three come again."""
    job, parent = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.getppid()
    if not job:
        return ""
    try:
        ticks = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        began = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {ticks}"
    except (OSError, IndexError):  # no Linux
        began = ""
    return f"{job} {socket.gethostname()} {parent} {began}"


def _attempt(rank: int, count: int) -> str:
    """A name for these processes, which torchrun may have started in place of others.

    Its count of restarts is each agent's own. So rank 0 names them, and answers all who say hello,
    those of earlier attempts too, until each of its own has taken the name.
    """
    store, mine = _store("meeting"), uuid.uuid4().hex
    store.set(f"hello/{rank}", mine)
    if rank:
        name = store.get(mine).decode()
        store.set(f"{name}/{rank}", "")
        return name
    end = time.monotonic() + 60 * ARRIVAL
    missing = list(range(1, count))
    while missing:
        if time.monotonic() > end:
            raise LostRank(f"ranks {missing} of {count} have not come within {ARRIVAL:g} minutes")
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(store.get(f"hello/{other}"), mine)
        missing = [other for other in missing if not store.check([f"{mine}/{other}"])]
        time.sleep(0.01)
    return mine


def _store(prefix: str) -> Any:
    """A connection of our own to the store by which the ranks have met."""
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 0)
    limit = datetime.timedelta(minutes=ARRIVAL)
    store = torch.distributed.TCPStore(host, port, is_master=False, timeout=limit)
    return torch.distributed.PrefixStore(f"fastdiff/{prefix}", store)


def _on_gpus(device: str | None, local_count: int) -> bool:
    """Whether the processes of this machine, ``local_count`` of them, take a GPU each."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        choose_device(device)
        return False
    if device != "cuda":
        raise InputError(
            f"--device {device} is one GPU for {local_count} processes; with --device cuda each "
            "takes its own"
        )
    if local_count > torch.cuda.device_count():
        raise InputError(
            f"{local_count} processes on this machine and {torch.cuda.device_count()} GPUs; "
            "start as many processes as there are GPUs, or give --device cpu"
        )
    return True
