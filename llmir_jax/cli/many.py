"""One command on many processes: options to join by, and who reads and writes what the user sees."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from llmir_jax.cli import options
from llmir_jax.errors import LlmirError

F = TypeVar("F", bound=Callable[..., Any])
AUTO = "auto"


def on_many_processes(command: F) -> F:
    """--coordinator, --num-processes and --process-id: the command runs in several processes as in one."""

    @functools.wraps(command)
    def run(
        *args: Any, coordinator: str | None, num_processes: int | None, process_id: int | None, **kwargs: Any
    ) -> Any:
        _check(coordinator, num_processes, process_id)
        with joined(coordinator, num_processes, process_id):
            return command(*args, **kwargs)

    decorated: Any = run
    for option in (
        click.option("--process-id", type=click.IntRange(min=0), metavar="I", help="Which process this is, from 0."),
        click.option("--num-processes", type=options.COUNT, metavar="N", help="How many processes run this command."),
        click.option(
            "--coordinator",
            metavar="HOST:PORT",
            help="Where process 0 is, to run as one of several; auto where a TPU pod, GKE or Slurm tells.",
        ),
    ):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    numbers = (num_processes, process_id)
    if coordinator in (None, AUTO):
        if numbers != (None, None):
            raise click.UsageError("--num-processes and --process-id go with --coordinator HOST:PORT")
        return
    if num_processes is None or process_id is None:
        raise click.UsageError("--coordinator HOST:PORT needs --num-processes and --process-id too")
    if process_id >= num_processes:
        raise click.UsageError(
            f"--process-id {process_id}: of {num_processes} processes the last is {num_processes - 1}"
        )
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdecimal():
        raise click.UsageError(f"--coordinator {coordinator}: expected HOST:PORT or auto")


@contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Iterator[None]:
    """Within it this process is one of several, if it is to be; only process 0 writes to stdout.

    Raises LlmirError for processes that do not come or have other versions. A failure within is told to the others.
    """
    if coordinator is None:
        yield
        return
    from llmir_jax import processes  # here, since --help needs no JAX

    _keep_stdout()
    if coordinator == AUTO:
        processes.join()
    else:
        processes.join(coordinator, num_processes, process_id)
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    reason: str | None = None
    try:
        yield
    except LlmirError as error:
        reason = str(error)
        raise
    except BaseException as error:
        if options.is_device_error(error):
            processes.verdict(5)  # most often another process has died, which the watch says better
        reason = str(error) or type(error).__name__
        raise
    finally:
        sys.stdout.flush()
        processes.leave(reason)


def _keep_stdout() -> None:
    """Only Python writes to stdout: what libraries write (gloo, of connections) goes to stderr."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file of the operating system: in tests
        return
    sys.stdout.flush()
    sys.stdout = open(os.dup(number), "w", encoding=sys.stdout.encoding, errors="backslashreplace")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), number)


def from_first(read: Callable[[], str | None]) -> str | None:
    """What process 0 reads, in all of them."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return read()
    from llmir_jax import processes

    if not processes.is_first():
        text = processes.broadcast_text("")
    else:
        try:
            own = read()
        except BaseException:
            processes.broadcast_text("!")
            raise
        text = processes.broadcast_text("-" if own is None else f"+{own}")
    if text == "!":
        raise LlmirError("process 0 could not read its input")
    return text[1:] if text.startswith("+") else None
