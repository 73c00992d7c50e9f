"""Several processes as one run: ranks, as torchrun starts them.

Each rank runs its share of the batches (reap/text/share.py) and leaves its sums in a file beside
the output, as any run does while it is at work (reap/runs/partial.py). Rank 0 adds the files when
all have theirs. What has to be said meanwhile is little, and goes over one TCP connection from each
rank to rank 0, a JSON object a line: at the start what every rank is about to run, which must be
the same, at the end that its file is whole, and that the output is written; with --until-stable
also what each has summed where a look is due (`reap.runs.meetings`).

Why files, and not a reduction by torch.distributed: sums are exact, so that the order of adding is
of no matter; they are small (840 bytes per expert, 5 MB for 48 layers of 128) and are sent once; a
run that ends early has to leave them on disk anyhow; and a rank that is through need not run again
when another is lost. All ranks have to see the folder of the output, as they see the model's. Of
torch.distributed only the store is used, in which rank 0 says where it listens.

Why a connection: the kernel closes it when a process ends, however it ends, and tells of a machine
that is gone within half a minute. No thread has to say that it is alive, which one that computes
may be late to do.

On paper, a thousand GPUs and 1e12 tokens. Memory: that of one process per rank, and a
connection for each at rank 0. Text: every rank reads all of it, which a tokenizer of 1e6 tokens a
second does for 1e9 tokens in 17 minutes; 1e12 are a thousand runs, each of a part of the text,
whose files add up like shards. Files: a thousand of 5 MB (0.7 GB with pairs for 64 layers of 512
experts), read one at a time. A tree is not needed, but `reap combine --incomplete` is a node of
one. Range: counts are int64, which 1e12 tokens times 8 experts fill to a millionth; a sum has room
for 2**31 addends of 2**288, or 2**62 of 2**257, which no norm of a model is near, and one that
outgrows it is an error. Limbs carry at least every 2**28 addends, and at every addition of files.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from itertools import chain
from types import FrameType
from typing import Any

from reap.errors import INTERRUPTED, ReapError, first_line
from reap.statistics.joining import differences

_JOIN_SECONDS = 300.0  # for all ranks to come
_LAST_WORDS_SECONDS = 10.0
# What wakes the main thread when a rank is lost: of itself this signal does nothing.
_WAKE = signal.SIGURG
_AGAIN = "start all ranks again"
Message = dict[str, Any]


def world() -> tuple[int, int]:
    """(rank, number of ranks) of this process, as its environment says; (0, 1) outside torchrun.
    ReapError for what is no number."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return 0, 1
    try:
        rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise ReapError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} in the "
            "environment name no rank: start this by torchrun, or without them"
        )
    return rank, size


def refuse_ranks(what: str) -> None:
    """ReapError, naming `what`, in a process that is one of several."""
    _, size = world()
    if size > 1:
        raise ReapError(
            f"{what} runs as one process, and the environment makes this one of {size} "
            "(WORLD_SIZE): start it without torchrun; `reap calibrate` can be started with it"
        )


def own_device(device: str) -> str:
    """The device of this rank: of `device` "auto" or "cuda" its own GPU of this machine. ReapError
    for one that all ranks would share, or that spreads a model over several."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    _, size = world()
    if device not in ("auto", "cuda"):
        raise ReapError(
            f"device {device!r} in a run of {size} ranks: every rank has a whole model, on a GPU "
            "of its own: give cuda, cpu or auto, or start one process"
        )
    local = os.environ.get("LOCAL_RANK", "")
    if not local.isdecimal() or int(local) >= torch.cuda.device_count():
        raise ReapError(
            f"LOCAL_RANK is {local or 'not set'}, and this machine has {torch.cuda.device_count()} "
            "GPUs: start one rank per GPU, by torchrun --nproc-per-node"
        )
    return f"cuda:{local}"


class Lost(ReapError):
    """Another rank has ended, or stops all. `told`: rank 0 says why."""

    def __init__(self, line: str, told: bool = False) -> None:
        super().__init__(line)
        self.told = told


class Ranks:
    """This process and the other ranks, connected, inside a `with`. There, in the main thread, a
    `Lost` is raised as soon as another rank has ended; in other threads by `check`. An error that
    leaves the `with` is told to the others, which stop. Afterwards `speaks` says whether this rank
    is to tell its error to the user: rank 0, or where that has ended without a word, another."""

    def __init__(self) -> None:
        self.rank, self.size = world()
        self.speaks = self.rank == 0
        self.lost: Lost | None = None
        self._peers: dict[int, _Peer] = {}
        self._news = threading.Condition()
        self._closing = False
        self._handler: Any = None
        self._listens = False

    def __enter__(self) -> Ranks:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(_WAKE, self._raise_lost)
        try:
            self._connect()
            self._listens = True
            threading.Thread(target=self._listen, daemon=True).start()
            self.check()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._closing = True
        try:
            if error is not None and error is not self.lost and self.lost is not None:
                # A signal came first: torchrun sends one to all when one has ended.
                notes = [*getattr(error, "__notes__", ()), str(self.lost)]
                error.__notes__ = notes  # type: ignore[attr-defined]
            if error is not None:
                self._stop_others(error)
        finally:
            self._close()

    def check(self) -> None:
        """Lost, when another rank is."""
        if self.lost is not None:
            raise self.lost

    def agree(self, about: Mapping[str, Any]) -> None:
        """ReapError, in all ranks, unless all call this with the same JSON; it names what is not
        the same in the first that differs."""
        mine = json.loads(json.dumps(about))
        if self.rank:
            self._send(0, {"agree": mine})
            self._receive(0, "agreed")
            return
        for rank, peer in sorted(self._peers.items()):
            for name, theirs, ours in differences(self._receive(rank, "agree"), mine):
                raise ReapError(
                    f"{peer.name} differs from rank 0: {name} is {theirs} there, and {ours} here: "
                    "start all ranks with the same model, text, options and versions"
                )
        for rank in self._peers:
            self._send(rank, {"agreed": True})

    def exchange(self, mine: Any, answer: Callable[[Iterator[Any]], Any]) -> Any:
        """In all ranks what `answer` makes, in rank 0, of what each gave, its own first. JSON."""
        if self.rank:
            self._send(0, {"given": mine})
            return self._receive(0, "answer")
        given = chain([mine], (self._receive(rank, "given") for rank in sorted(self._peers)))
        found = answer(given)
        for _ in given:  # what it did not look at
            pass
        for rank in self._peers:
            self._send(rank, {"answer": found})
        return found

    def wait_for_all(self) -> None:
        """Returns in rank 0 when all others wait here too; in these when rank 0 releases them."""
        if self.rank:
            self._send(0, {"ready": True})
            self._receive(0, "released")
            return
        for rank in self._peers:
            self._receive(rank, "ready")

    def release(self) -> None:
        """Rank 0: all that wait may go on, and end. Nobody is missed from here on."""
        self._closing = True
        for peer in self._peers.values() if self.rank == 0 else ():
            with suppress(OSError):
                peer.write({"released": True})

    def _connect(self) -> None:
        from torch.distributed import PrefixStore, rendezvous

        try:
            found, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS)))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            # Kept, because it may be the server itself.
            self._store = PrefixStore(f"reap/{attempt}", found)
            if self.rank == 0:
                self._accept()
            else:
                self._call()
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, ReapError):
                raise
            raise ReapError(
                f"rank {self.rank} of {self.size} did not find the others: {first_line(error)}: "
                "start all ranks by torchrun, within five minutes"
            ) from error

    def _accept(self) -> None:
        """Rank 0: a connection from every other, which knows the word in the store."""
        word = secrets.token_hex(16)
        ends = time.monotonic() + _JOIN_SECONDS
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(
            ("", 0), family=family, backlog=self.size, dualstack_ipv6=both
        ) as server:
            self._store.set("rank 0", json.dumps([server.getsockname()[1], word]))
            while len(self._peers) < self.size - 1:
                server.settimeout(max(0.01, ends - time.monotonic()))
                try:
                    link, _ = server.accept()
                except TimeoutError:
                    absent = min(set(range(1, self.size)) - self._peers.keys())
                    raise ReapError(
                        f"rank {absent} of {self.size} did not come within five minutes: look at "
                        "what it says, and start all ranks again"
                    ) from None
                link.settimeout(_LAST_WORDS_SECONDS)
                peer = _Peer(link, "")
                with suppress(OSError, ValueError, KeyError, TypeError):
                    hello = peer.read()
                    if hello["word"] == word:
                        self._keep(hello["rank"], peer, hello["from"])
                        continue
                link.close()  # a stranger

    def _call(self) -> None:
        port, word = json.loads(self._store.get("rank 0"))
        host = os.environ["MASTER_ADDR"]
        peer = _Peer(socket.create_connection((host, port), timeout=_JOIN_SECONDS), "")
        self._keep(0, peer, f"on {host}")
        origin = f"process {os.getpid()} on {socket.gethostname()}"
        peer.write({"word": word, "rank": self.rank, "from": origin})

    def _keep(self, rank: int, peer: _Peer, origin: str) -> None:
        peer.name = f"rank {rank} of {self.size} ({origin})"
        peer.link.settimeout(None)
        peer.link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                peer.link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._peers[rank] = peer

    def _listen(self) -> None:
        """In a thread of its own: what the others say, until all have ended."""
        with selectors.DefaultSelector() as waiting, suppress(OSError, ValueError):
            for rank, peer in self._peers.items():
                self._take(rank, peer.whole())  # of what came with its first words
                waiting.register(peer.link, selectors.EVENT_READ, rank)
            while waiting.get_map():
                for key, _ in waiting.select():
                    peer = self._peers[key.data]
                    if peer.receive():
                        self._take(key.data, peer.whole())
                    else:
                        waiting.unregister(peer.link)
                        peer.link.close()
                        self._take(key.data, [], ended=True)

    def _take(self, rank: int, messages: list[Message], ended: bool = False) -> None:
        peer = self._peers[rank]
        stop = next((message["stop"] for message in messages if "stop" in message), None)
        with self._news:
            peer.inbox += [message for message in messages if "stop" not in message]
            peer.stops |= ended or stop is not None
            peer.told |= stop is not None
            # Then rank 0 may end at any moment.
            self._closing |= any("released" in message for message in messages)
            self._news.notify_all()
        if stop is not None:
            self._lose(Lost(stop, told=True) if rank == 0 else Lost(f"{peer.name}: {stop}"))
        elif ended:
            self._lose(Lost(f"{peer.name} has ended without a word, killed perhaps: {_AGAIN}"))

    def _lose(self, lost: Lost) -> None:
        with self._news:
            if self._closing or self.lost is not None:
                return
            self.lost = lost
            self._news.notify_all()
        if self._handler is not None:
            with suppress(OSError):
                signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _raise_lost(self, _: int, frame: FrameType | None) -> None:
        whole = (Ranks.__enter__.__code__, Ranks.__exit__.__code__)  # not to be torn
        while frame is not None and frame.f_code not in whole:
            frame = frame.f_back
        if frame is None and not self._closing:
            self.check()

    def _receive(self, rank: int, word: str) -> Any:
        with self._news:
            while not self._peers[rank].inbox:
                self.check()
                self._news.wait()
            return self._peers[rank].inbox.popleft()[word]

    def _send(self, rank: int, message: Message) -> None:
        try:
            self._peers[rank].write(message)
        except OSError:  # it has ended, and may have said why
            with self._news:
                self._news.wait_for(lambda: self.lost is not None, _LAST_WORDS_SECONDS)
            self.check()
            raise ReapError(f"{self._peers[rank].name} is not reached: {_AGAIN}") from None

    def _stop_others(self, error: BaseException) -> None:
        """Tell why this rank stops. Rank 0 is given time to say so."""
        plain = isinstance(error, Exception)
        line = " ".join(str(error).split()) if plain else INTERRUPTED
        for peer in self._peers.values():
            with suppress(OSError):
                peer.write({"stop": line or type(error).__name__})
        if self.rank == 0:
            return
        if 0 not in self._peers:  # it was not found
            self.speaks = True
            return
        if plain and self._listens:
            with self._news:
                self._news.wait_for(lambda: self._peers[0].stops, _LAST_WORDS_SECONDS)
        if self.lost is None:
            self.speaks = plain and not self._peers[0].told
        else:  # rank 0 has ended, and one is enough to tell that
            self.speaks = self.rank == 1 and not self.lost.told

    def _close(self) -> None:
        self._closing = True
        if self._handler is not None:
            signal.signal(_WAKE, self._handler)
            self._handler = None
        for peer in self._peers.values():
            with suppress(OSError):
                # To close it, with words of theirs unread, could lose ours. The listener does.
                peer.link.shutdown(socket.SHUT_WR)
            if not self._listens:
                peer.link.close()


class _Peer:
    """A connection: JSON objects, one per line."""

    def __init__(self, link: socket.socket, name: str) -> None:
        self.link, self.name = link, name
        self.inbox: deque[Message] = deque()
        self.told = False  # it has said why it stops
        self.stops = False  # it has, or has ended
        self._buffer = bytearray()

    def write(self, message: Message) -> None:
        self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> bool:
        """Waits for some bytes. False at the end of the connection."""
        try:
            more = self.link.recv(1 << 16)
        except ConnectionError:
            return False
        self._buffer += more
        return bool(more)

    def whole(self) -> list[Message]:
        """Messages that have come, each once."""
        if b"\n" not in self._buffer:  # of a long one there are many parts
            return []
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        return [json.loads(line) for line in lines]

    def read(self) -> Message:
        """The first message; ValueError where none comes."""
        while b"\n" not in self._buffer:
            if not self.receive() or len(self._buffer) > 4096:
                raise ValueError("no message")
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return dict(json.loads(line))
