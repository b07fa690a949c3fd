"""``llmir``: the command line. Bad input ends with one line on stderr: exit code 2 for wrong usage, 1 for the rest."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import click

import llmir_jax
from llmir_jax.cli.accuracy import accuracy_command
from llmir_jax.cli.bench import bench_command
from llmir_jax.cli.compile import compile_command
from llmir_jax.cli.generate import generate_command
from llmir_jax.cli.options import is_device_error
from llmir_jax.cli.plan import plan_command
from llmir_jax.cli.quantize import quantize_command
from llmir_jax.errors import LlmirError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PIPE_CLOSED = 141  # 128 + SIGPIPE


class _Commands(click.Group):
    """A group whose failures are one line each."""

    def main(  # type: ignore[override]  # one form of the two
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name, **extra)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "llmir"
            _fail(f"{_one_line(error.format_message()).rstrip('.')}; see `{command} --help`", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except LlmirError as error:
            _fail(str(error), 1)
        except KeyboardInterrupt:
            click.echo("llmir: interrupted", err=True)
            sys.exit(INTERRUPTED)
        except MemoryError:
            _fail("out of memory", 1)
        except OSError as error:
            if error.errno == errno.EPIPE:
                _discard_stdout()
                sys.exit(PIPE_CLOSED)
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}", 1)
        except Exception as error:
            if not is_device_error(error):
                raise
            _fail(str(error), 1)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"llmir: error: {_one_line(message) or 'failed'}", err=True)
    sys.exit(code)


def _discard_stdout() -> None:
    """Nobody reads stdout any more: without this the interpreter complains when it flushes it at the end."""
    with suppress(OSError, ValueError):  # not a file of the operating system: in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(llmir_jax.__version__, prog_name="llmir")
def llmir() -> None:
    """Text from language models by decoders that are derived from plain Flax forwards."""


llmir.add_command(generate_command)
llmir.add_command(compile_command)
llmir.add_command(quantize_command)
llmir.add_command(plan_command)
llmir.add_command(accuracy_command)
llmir.add_command(bench_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``llmir`` with the arguments given, or with those of the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no error
    llmir.main(args=argv, prog_name="llmir")


if __name__ == "__main__":
    main()
