"""`python -m lowrank.compat program.py …`: Python as usual, but with `import peft` answered by lowrank.

python -m lowrank.compat program.py [arguments]    like `python program.py [arguments]`
python -m lowrank.compat -m module [arguments]     like `python -m module [arguments]`
python -m lowrank.compat path                      the folder to put on PYTHONPATH by yourself

The shim goes first on PYTHONPATH, so that child processes (torchrun, accelerate launch, workers) have it too.
"""

import os
import subprocess
import sys

from lowrank.compat import SHIM


def main() -> int:
    words = sys.argv[1:]
    if words == ["path"]:
        print(SHIM)
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if sys.flags.ignore_environment:
        print(
            "python -m lowrank.compat: -E and -I hide PYTHONPATH; leave them out.", file=sys.stderr
        )
        return 2
    path = [SHIM, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
    command = [sys.executable, *interpreter_options(sys.orig_argv, words), *words]
    if os.name == "nt":  # there, exec starts a second process and lets this one end
        return subprocess.call(command, env=environment)
    os.execve(sys.executable, command, environment)


def interpreter_options(argv: list[str], words: list[str]) -> list[str]:
    """What stands between `python` and `-m lowrank.compat` in `argv`, the whole command line: `-W error`, `-u`."""
    options = argv[1 : len(argv) - len(words)]
    *options, last = options
    if last == "lowrank.compat":  # `-m lowrank.compat`, `-um lowrank.compat`
        *options, last = options
    last = last.removesuffix("lowrank.compat").removesuffix("m")
    return options if last == "-" else [*options, last]


if __name__ == "__main__":
    sys.exit(main())
