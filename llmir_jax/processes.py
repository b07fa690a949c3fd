"""One program on several processes, most often one a host: joining, agreeing, and noticing that one has died.

Every process runs the same program on the same input, and JAX's programs run on the devices of all of them. Process 0
talks to the user. Beside JAX's own service every process keeps a connection to process 0: a process that is killed
closes it at once, one whose host has gone is silent, and either ends the others with one line, for their main threads
may wait inside a collective for ever.
"""

import atexit
import json
import os
import platform
import random
import secrets
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

import llmir_jax
from llmir_jax.errors import LlmirError

BEAT = 2.0
"""Seconds between signs of life."""
SILENCE = 30.0
"""Seconds without one after which a process counts as dead."""
START_TIMEOUT = 300
"""Seconds that processes wait for each other at the start."""
_AGAIN = "; start all processes again"


def num_processes() -> int:
    """How many processes run this program; 1 if they have not joined."""
    return int(jax.process_count())


def is_first() -> bool:
    """Whether this process talks to the user."""
    return jax.process_index() == 0


def versions() -> dict[str, str]:
    """What must be the same in all processes."""
    found = {"llmir-jax": llmir_jax.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
    return found | {name: version(name) for name in ("jax", "jaxlib", "flax")}


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the processes of this program, before JAX is used: `jax.distributed.initialize`, and the watch over them.

    Args:
        coordinator: "host:port" of process 0. None where a cluster tells (Slurm, TPU pods, GKE); the other two too.
        num_processes: of this program, 1 and more.
        process_id: which of them this is, from 0.

    Raises:
        LlmirError: no cluster tells, others do not come, or they have other versions.
    """
    if jax.distributed.is_initialized():
        watch(coordinator)
        return
    # A CPU has no other way to other processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=60,  # as long as the watch is not there yet
            shutdown_timeout_seconds=10,
        )
    except (ValueError, RuntimeError) as error:
        where = "the cluster" if coordinator is None else coordinator
        raise LlmirError(f"processes cannot join through {where}: {str(error).splitlines()[0]}") from None
    watch(coordinator)


_watched: list["_Watch"] = []


def watch(coordinator: str | None = None) -> None:
    """Check that all processes have the same versions, and end this one with a line if another ends before it.

    `join` does so, and so do decoders on a mesh where a program has called `jax.distributed.initialize` itself. A
    program that is watched ends with `leave`: without it the others take a process that ends for one that has died.

    Args:
        coordinator: "host:port" of process 0, as `join` takes it. None where others find it by its own name.

    Raises:
        LlmirError: other versions, or a process that ends meanwhile.
    """
    if jax.process_count() == 1 or _watched:
        return
    found = _Hub(jax.process_count(), coordinator) if is_first() else None
    address = broadcast_text(found.address if found is not None else "")
    watched: _Watch = found if found is not None else _Spoke(address)
    _watched.append(watched)
    differing = watched.compare(versions())
    if differing is not None:
        watched.close()
        raise LlmirError(differing)
    watched.start()


def leave(reason: str | None = None) -> None:
    """Say that this process ends as it should, or why not; the others then do not take it for dead."""
    for watched in _watched:
        watched.leave(reason)


def verdict(seconds: float) -> None:
    """Wait for the watch to end this process, as long as that may take it after a collective has failed."""
    if _watched:
        time.sleep(seconds)


def broadcast_text(text: str) -> str:
    """What process 0 has, in all of them."""
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    try:
        size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
        padded = np.zeros(size, np.uint8)
        if is_first():
            padded[:] = content
        received = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    except jax.errors.JaxRuntimeError as error:
        verdict(BEAT)
        raise LlmirError(f"a process has ended while others waited for it: {str(error).splitlines()[0]}") from None
    return received.astype(np.uint8).tobytes().decode()


def shared_seeds() -> Callable[[], int]:
    """Draws seeds of 32 bits, in one process at random, in several the same in each."""
    if jax.process_count() == 1:
        return lambda: secrets.randbits(32)
    base = int(broadcast_text(str(secrets.randbits(64))))
    drawn = random.Random(base)
    return lambda: drawn.getrandbits(32)


# -- the watch ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class _Peer:
    """The connection to another process."""

    number: int
    connection: socket.socket
    seen: float = field(default_factory=time.monotonic)
    has_left: bool = False
    buffer: bytes = b""

    def send(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # that it is closed is noticed where it is read
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None if there is none in time. Raises OSError if the other end is closed."""
        self.connection.settimeout(timeout)
        while b"\n" not in self.buffer:
            try:
                received = self.connection.recv(1 << 16)
            except TimeoutError:
                return None
            if not received:
                raise OSError("closed")
            self.buffer += received
        line, _, self.buffer = self.buffer.partition(b"\n")
        self.seen = time.monotonic()
        message: dict[str, Any] = json.loads(line)
        return message


class _Watch(ABC):
    """Connections of this process, and the threads that read them."""

    def __init__(self) -> None:
        self.peers: list[_Peer] = []
        self._is_closing = False

    @abstractmethod
    def compare(self, own: Mapping[str, str]) -> str | None:
        """None if all processes have the same versions, else what differs."""

    def start(self) -> None:
        """Begin to watch."""
        atexit.register(self._before_exit)  # which comes before JAX's own, that waits for the others and then aborts
        for peer in self.peers:
            threading.Thread(target=self._follow, args=(peer,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def _before_exit(self) -> None:
        if not self._is_closing:  # a program that has failed, most often since another process has died
            time.sleep(BEAT)

    def leave(self, reason: str | None) -> None:
        self._is_closing = True
        for peer in self.peers:
            peer.send({"left": reason})

    def close(self) -> None:
        self._is_closing = True
        for peer in self.peers:
            with suppress(OSError):
                peer.connection.close()

    def _beat(self) -> None:
        while not self._is_closing:
            for peer in self.peers:
                peer.send({"beat": True})
            time.sleep(BEAT)

    def _follow(self, peer: _Peer) -> None:
        while not self._is_closing:
            try:
                message = peer.read(BEAT)
            except OSError:
                if peer.has_left or self._is_closing:
                    return
                self._end(f"process {peer.number} of {jax.process_count()} has died: its connection closed{_AGAIN}")
            if message is None and time.monotonic() - peer.seen > SILENCE:
                silent = f"has not answered for {SILENCE:.0f} s"
                self._end(f"process {peer.number} of {jax.process_count()} {silent}{_AGAIN}")
            if message is not None and "left" in message:
                peer.has_left = True
                if message["left"] is not None:
                    self._end(f"process {peer.number} of {jax.process_count()} has failed: {message['left']}")
            if message is not None and "end" in message:
                self._end(message["end"])

    def _end(self, what: str) -> NoReturn:
        """End this process, and tell others: from a thread, since the main one may wait for the dead process."""
        self._is_closing = True
        for peer in self.peers:
            peer.send({"end": what})
        sys.stderr.write(f"llmir: error: {what}\n")
        sys.stderr.flush()
        os._exit(1)


class _Hub(_Watch):
    """Process 0's end: a connection from each of the others."""

    def __init__(self, count: int, coordinator: str | None) -> None:
        super().__init__()
        self._count = count
        self._server = socket.create_server(("", 0))
        host = socket.gethostbyname(socket.gethostname())
        if host.startswith("127.") and coordinator is not None:
            host = coordinator.rpartition(":")[0]  # its own name may be of loopback, which others cannot reach
        self.address = f"{host}:{self._server.getsockname()[1]}"

    def compare(self, own: Mapping[str, str]) -> str | None:
        found: dict[int, dict[str, str]] = {}
        last = time.monotonic() + START_TIMEOUT
        while len(found) < self._count - 1:
            try:
                self._server.settimeout(max(last - time.monotonic(), 0.01))
                connection, _ = self._server.accept()
            except OSError:
                missing = sorted(set(range(1, self._count)) - set(found))
                return f"process {missing[0]} of {self._count} has not come within {START_TIMEOUT} s"
            peer = _Peer(number=-1, connection=connection)
            try:
                hello = peer.read(max(last - time.monotonic(), 0.01)) or {}
                number, theirs = hello["process"], hello["versions"]
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # of no process of this program, or of one that has ended
                continue
            peer.number, found[number] = number, theirs
            self.peers.append(peer)
        differing = next((_difference(0, own, n, theirs) for n, theirs in sorted(found.items()) if theirs != own), None)
        for peer in self.peers:
            peer.send({"differing": differing})
        return differing


class _Spoke(_Watch):
    """Any other process's end: a connection to process 0."""

    def __init__(self, address: str) -> None:
        super().__init__()
        host, _, port = address.rpartition(":")
        try:
            connection = socket.create_connection((host, int(port)), timeout=START_TIMEOUT)
        except OSError as error:
            raise LlmirError(f"process 0 does not answer at {address}: {error}") from None
        self.peers.append(_Peer(number=0, connection=connection))

    def compare(self, own: Mapping[str, str]) -> str | None:
        (first,) = self.peers
        first.send({"process": jax.process_index(), "versions": own})
        try:
            answer = first.read(START_TIMEOUT)
        except OSError:
            answer = None
        if answer is None:
            return "process 0 does not answer"
        differing: str | None = answer["differing"]
        return differing


def _difference(a: int, ours: Mapping[str, str], b: int, theirs: Mapping[str, str]) -> str:
    name = next(name for name in ours if theirs.get(name) != ours[name])
    return (
        f"processes must have the same versions: {name} is {ours[name]} in process {a} and "
        f"{theirs.get(name, 'missing')} in process {b}; install the same in all"
    )
