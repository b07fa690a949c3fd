"""``llmir-opt``: runs passes on a file of IR, in the manner of ``mlir-opt``.

    llmir-opt model.mlir -p inline-calls,lower-to-reference --print-after-all

Ops of dialects that are not registered pass through. Bad input ends with one line on stderr and exit code 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import IO

from xdsl.dialects import arith, builtin, func
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass, PassPipeline
from xdsl.printer import Printer
from xdsl.targets import get_all_targets
from xdsl.transforms import get_all_passes
from xdsl.utils.arg_spec import parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError, DiagnosticException, ParseError, PassFailedException
from xdsl.xdsl_opt_main import xDSLOptMain

from llmir_jax.dialects import llm, stablehlo_ext
from llmir_jax.dialects.parser import IRParser
from llmir_jax.errors import InvalidIRError, LlmirError
from llmir_jax.transforms import PASSES, load_pass

DIALECTS = (builtin.Builtin, arith.Arith, func.Func, stablehlo_ext.StableHLO, stablehlo_ext.CHLO, llm.LLM)
XDSL_PASSES = ("canonicalize", "cse", "dce")


class LLMIROptMain(xDSLOptMain):
    """xDSL's opt driver with the dialects and passes of this project."""

    def register_all_dialects(self) -> None:
        for dialect in DIALECTS:
            self.ctx.load_dialect(dialect)

    def register_all_frontends(self) -> None:
        self.available_frontends["mlir"] = self._parse_mlir

    def _parse_mlir(self, source: IO[str]) -> ModuleOp:
        name = self.args.input_file or "stdin"
        try:
            return IRParser(self.ctx, source.read(), name).parse_module(not self.args.no_implicit_module)
        except (ParseError, DiagnosticException):
            raise
        except Exception as error:  # what xDSL's parser does not turn into an error of its own
            raise InvalidIRError(f"{name}: does not parse: {error}") from error

    def register_all_passes(self) -> None:
        for name in PASSES:
            self.register_pass(name, partial(load_pass, name))
        xdsl_passes = get_all_passes()
        for name in XDSL_PASSES:
            self.register_pass(name, xdsl_passes[name])

    def register_all_targets(self) -> None:
        self.available_targets["mlir"] = get_all_targets()["mlir"]

    def register_all_arguments(self, arg_parser: argparse.ArgumentParser) -> None:
        super().register_all_arguments(arg_parser)
        arg_parser.set_defaults(allow_unregistered_dialect=True)
        arg_parser.add_argument("--print-before-all", action="store_true", help="print the IR before each pass")
        arg_parser.add_argument("--print-after-all", action="store_true", help="print the IR after each pass")

    def get_input_stream(self) -> tuple[IO[str], str]:
        path = self.args.input_file
        try:
            text = sys.stdin.read() if path is None else Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidIRError(f"{path or 'stdin'}: expected a text file, got {error}") from error
        return StringIO(text), "mlir"

    def setup_pipeline(self) -> None:
        unknown = [spec.name for spec in parse_pipeline(self.args.passes) if spec.name not in self.available_passes]
        if unknown:
            raise LlmirError(
                f"unknown pass {', '.join(unknown)}: expected some of {', '.join(sorted(self.available_passes))}"
            )
        try:
            super().setup_pipeline()  # type: ignore[no-untyped-call]
        except ValueError as error:  # an option that the pass does not have, or of the wrong type
            raise LlmirError(f"--passes {self.args.passes}: {error}") from error
        self.pipeline = PassPipeline(self.pipeline.passes, self._traced(self.pipeline.callback))

    def apply_passes(self, prog: ModuleOp) -> None:
        try:
            super().apply_passes(prog)
        except LlmirError as error:  # so that --verify-diagnostics prints it
            raise PassFailedException(str(error)) from error

    def _traced(
        self, verify: Callable[[ModulePass | None, ModuleOp, ModulePass | None], None] | None
    ) -> Callable[[ModulePass | None, ModuleOp, ModulePass | None], None]:
        """xDSL's step between two passes, which verifies the module, and ours, which prints it."""

        def between(previous: ModulePass | None, module: ModuleOp, following: ModulePass | None) -> None:
            if previous is not None and self.args.print_after_all:
                _dump(f"after {previous.name}", module)
            if verify is not None:
                verify(previous, module, following)
            if following is not None and self.args.print_before_all:
                _dump(f"before {following.name}", module)

        return between


def _dump(when: str, module: ModuleOp) -> None:
    print(f"// -----// IR {when} //----- //", file=sys.stderr)
    Printer(sys.stderr).print_op(module)
    print(file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``llmir-opt`` with the arguments given, or with those of the process. Exits with 1 on bad input."""
    try:
        LLMIROptMain("LLMIR's optimizer driver: runs passes on a file of IR", argv).run()  # type: ignore[no-untyped-call]
    except BrokenPipeError:
        sys.exit(1)
    except ParseError as error:
        location = error.span.get_location()
        _fail(f"{location}: {error.msg}")
    except ArgSpecParseError as error:
        _fail(" ".join(str(error).split()))
    except (DiagnosticException, LlmirError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}")


def _fail(message: str) -> None:
    first_line = message.strip().splitlines()[0] if message.strip() else "failed"
    print(f"llmir-opt: error: {first_line}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
