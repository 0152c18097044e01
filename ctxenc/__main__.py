"""The commands: python -m ctxenc COMMAND or ctxenc COMMAND."""

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import ctxenc
from ctxenc.runs.errors import UserError, near_names, one_line
from ctxenc.training.console import say


class Parser(argparse.ArgumentParser):
    """Raise UserError for a wrong argument: one line in place of the usage, with near names."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message in our words."""
        if wrong := re.fullmatch(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", message, re.DOTALL):
            name, value, known = wrong[1], wrong[2], wrong[3].replace("'", "")
            near = near_names(value.strip("'"), known.split(", "))
            message = f"{name} must be one of {known}, got {value}{'; ' + near if near.startswith('near') else ''}"
        elif "required" in message:
            message += f" ({self.prog} --help)"
        raise UserError(re.sub(r"^argument (\S+): must ", r"\1 must ", message))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse an unknown option here: the parser above knows the names of other options."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if option := next((each.split("=")[0] for each in unknown if each.startswith("-")), None):
            near = near_names(option, re.findall(r"--[\w-]+", self.format_usage()))
            raise UserError(f"unknown option {option}; {near} ({self.prog} --help)")
        if unknown:
            raise UserError(f"unexpected argument {unknown[0]} ({self.prog} --help)")
        return namespace, unknown


class Command(NamedTuple):
    """Hold a command's help text and the extra that it needs."""

    summary: str
    extra: str


COMMANDS = {
    "finetune": Command("train a timm model with ContextEncoding in place of SE, beside the SE baseline", "train"),
    "evaluate": Command("measure the accuracy of a run", "train"),
    "predict": Command("name the classes of images with a run's model", "train"),
    "export": Command("write a run's model as ONNX or as a torch.export program, and verify it", "train,export"),
    "segment": Command("train EncNet, measure it, or segment images with it", "train"),
    "look": Command("picture which codeword owns which pixel, the use of the codewords, and the gates", "train"),
    "convert": Command("turn PyTorch-Encoding's or mmsegmentation's EncNet into a safetensors file of ours", "train"),
    "inspect": Command(
        "list the SE blocks of a model, with parameters, MACs and time before and after a swap", "train"
    ),
    "doctor": Command("check the fused kernels on this machine, and time them", "timm"),
}


FIRST = """\
Three things to do first:

# the demo: EncNet beside an FCN with SE, in a few minutes on a CPU
python -m ctxenc segment train
# fine-tune a pretrained network, swapped, on your own images: a folder for each class in PATH
python -m ctxenc finetune --model seresnet50 --pretrained --data PATH
# what a swap changes in a network: parameters, MACs and time
python -m ctxenc inspect seresnet50

python -m ctxenc --help lists all commands."""


def import_command(command: str) -> Any:
    """Import the module of one command, with add_arguments(parser) and run(args). Skip the others to keep --help fast."""
    return importlib.import_module(f"ctxenc.commands.{command}")


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Build the parser of all commands; only the chosen one gets its arguments."""
    parser = Parser(
        prog="ctxenc",
        description="Context encoding for image backbones.",
        epilog="'ctxenc COMMAND --help' tells the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"ctxenc {ctxenc.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        description = command.summary[0].upper() + command.summary[1:] + "."
        sub = commands.add_parser(name, help=command.summary, description=description)
        if name == chosen:
            import_command(name).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, also without a command, where it prints the first commands to run; 2 for a user error or a file that the
            system refuses (one line on stderr); 130 after Ctrl-C; 143 after SIGTERM in training; 141 if the reader of the output
            has gone. With CTXENC_TRACEBACK=1 errors are raised instead.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments:
        print(FIRST)
        return 0
    chosen = next((each for each in arguments if not each.startswith("-")), None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some characters
    try:
        args = build_parser(chosen).parse_args(arguments)
        import_command(args.command).run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout again at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError, ImportError, KeyboardInterrupt) as error:
        message, code = explain(error, chosen)
        if not message or os.environ.get("CTXENC_TRACEBACK") == "1":
            raise
        say(f"ctxenc: {message}", sys.stderr)
        return code
    return 0


def explain(error: BaseException, chosen: str | None) -> tuple[str, int]:
    """Return the line and the exit code for an expected error; an empty line for any other."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ImportError):
        if isinstance(error.__cause__, ModuleNotFoundError):  # ctxenc.viz names its own extra
            error = error.__cause__
        if (
            not isinstance(error, ModuleNotFoundError)
            or chosen not in COMMANDS
            or not error.name
            or error.name.split(".")[0] == "ctxenc"
        ):
            return "", 1
        extra = COMMANDS[chosen].extra
        return f"error: {chosen} needs the package {error.name}: pip install 'ctxenc[{extra}]'", 2
    if isinstance(error, OSError):
        return f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {one_line(error)}", 2
    return f"error: {error}".replace("fill_empty=True", "--fill-empty"), 2


if __name__ == "__main__":
    sys.exit(main())
