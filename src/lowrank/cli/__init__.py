"""The command line, `lowrank COMMAND …`: one file a command, imported when called.

A command is a module of this package with its docstring (the description `--help` prints) and two
functions:

    add_arguments(parser: argparse.ArgumentParser) -> None
    run(args: argparse.Namespace) -> int        # the exit status

Exit status: 0 done; 1 a check that ran and failed (`verify`); 2 could not run (usage, settings,
files). A `LowrankError` from below becomes its message on stderr, without a traceback.
Nothing here imports torch: `lowrank --help` answers at once.
"""

import argparse
import importlib
import itertools
import logging
import os
import sys
from collections.abc import Sequence

import lowrank
from lowrank import compat
from lowrank.errors import LowrankError, did_you_mean
from lowrank.train.run.processes import one_voice

# the one line of each command stands here, so that `lowrank --help` imports none of them
COMMANDS = {
    "quickstart": "the whole job on the embedded model: no arguments, no network",
    "plan": "what would be adapted: targets, parameters, bytes; no weights read",
    "import": "translate a configuration of Axolotl, LLaMA-Factory, TRL, mlx-lm",
    "preview": "rows as the model will read them, with what is learnt in colour",
    "train": "train an adapter from a YAML file, from flags, or from both",
    "evaluate": "loss, perplexity, exact match of a base, adapter or merged model",
    "generate": "answer a prompt, with or without an adapter",
    "merge": "write base + adapter as one model folder that transformers loads",
    "verify": "prove that a merged folder is the same function as base + adapter",
    "quantize": "write a model folder in 4 or 8 bits, with what that costs",
    "combine": "make one adapter of several; no model is read",
    "resize": "give an adapter another rank; no model is read",
    "extract": "make an adapter of the difference of two full checkpoints",
    "push": "upload an adapter, or what a run wrote, to the Hugging Face hub",
    "convert": "write an adapter in another program's format; no model is read",
}

MODULES = {"import": "import_"}  # a word of Python's own cannot name a module

# what these say as they are imported (kernels that are not for this machine) is nothing to act on
TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if argv is None:  # a process of our own, before transformers is imported: it then knows us
        compat.install(override=True)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lowrank {lowrank.__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        return _fail(
            "lowrank", f"no command {name!r}.{did_you_mean(name, COMMANDS)} See: lowrank --help"
        )
    try:
        with one_voice():
            return _call(name, rest)
    except LowrankError as error:
        return _fail(f"lowrank {name}", str(error))
    except BrokenPipeError:  # `lowrank plan … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a folder that is not ours
        return _fail(f"lowrank {name}", _words(error))
    except KeyboardInterrupt:
        return _fail(f"lowrank {name}", "interrupted", status=130)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else 2


def _call(name: str, words: list[str]) -> int:
    command = importlib.import_module(f"lowrank.cli.{MODULES.get(name, name)}")
    parser = argparse.ArgumentParser(
        prog=f"lowrank {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    named = [word.split("=")[0] for word in itertools.takewhile("--".__ne__, words)]
    strange = [
        word for word in named if word.startswith("--") and " " not in word and word not in flags
    ]
    if not strange:
        args, strange = parser.parse_known_intermixed_args(words)
    if strange:  # said before what is missing: it may be the one that was mistyped
        # a command may know by what names other tools call its settings
        known = getattr(command, "ELSEWHERE", {}).get(strange[0].lstrip("-").replace("-", "_"))
        hint = did_you_mean(strange[0], flags) if known is None else f" Did you mean --{known}?"
        parser.error(f"unknown argument {strange[0]}.{hint.replace(': ', ' ')}")
    return command.run(args)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lowrank COMMAND …",
            "",
            "LoRA, from plan to proof.",
            "",
            *lines,
            "",
            "lowrank COMMAND --help tells more. lowrank --version prints the version.",
            "Start with: lowrank quickstart",
        ]
    )


def _words(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _fail(who: str, message: str, status: int = 2) -> int:
    print(f"{who}: {message}", file=sys.stderr)
    return status
