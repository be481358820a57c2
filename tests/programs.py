"""Programs, each in a process of its own that begins with large libraries imported: that takes most of a short one's time.

A server imports them once and forks for every program. Begun with transformers, a verification loads the merged
model in the program's own process. Where the order of imports matters, of transformers, PEFT and lowrank, programs
begin with OTHERS: what transformers imports itself.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import NamedTuple

TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import lowrank.verify
from folders import InProcess
lowrank.verify._start_probe = InProcess
"""
OTHERS = (
    "import torch._dynamo, torch.distributed.tensor, scipy.optimize, scipy.stats, pandas, datasets"
)

# a training in the program's own process
TRAINING = """
import lowrank.compat
lowrank.compat.install(override=True)
import datasets, matplotlib.figure, matplotlib.backends.backend_svg
from transformers import LlamaForCausalLM, TokenizersBackend, Trainer
import lowrank.cli.record, lowrank.report.text
import lowrank.train.run.resuming, lowrank.train.tasks.sft, lowrank.train.run.stopping
import gc
gc.freeze()  # a collection in a child would go through all of this
"""

# argv: number of processes, then the words of a `lowrank` command, which they run together as torchrun has it
TOGETHER = """
import os, socket, sys
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
size = int(sys.argv[1])
os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
rank, others = 0, []
for other in range(1, size):
    others.append(os.fork())
    if not others[-1]:
        rank = other
        break
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
from lowrank.cli import main
code = main(sys.argv[2:])
sys.stdout.flush()
if rank:
    os._exit(code)
code = max([code, *(os.waitstatus_to_exitcode(os.waitpid(o, 0)[1]) for o in others)])
os._exit(code)
"""


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(words: list[str], folder: Path, timeout: int = 300, begin: str = TRANSFORMERS) -> Done:
    """What `lowrank …`, `python -c CODE` or `python FILE` says when it is run in `folder`, with one thread."""
    out, err = folder / ".stdout", folder / ".stderr"
    job = {"words": [str(word) for word in words], "folder": str(folder), "timeout": timeout}
    server = _server(begin)
    print(json.dumps({**job, "out": str(out), "err": str(err)}), file=server.stdin, flush=True)
    code = int(server.stdout.readline())
    done = Done(code, *(path.read_text(encoding="utf-8", errors="replace") for path in (out, err)))
    out.unlink()
    err.unlink()
    return done


@cache
def _server(begin: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = [str(p) for p in (Path(sys.executable).parent, os.environ["PATH"])]
    process = subprocess.Popen(
        [sys.executable, __file__, begin],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PATH": os.pathsep.join(path)},
    )
    atexit.register(process.kill)
    return process


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the imports print
    exec(sys.argv[1], {})
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            answers.close()
            _become(job)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _become(job: dict) -> None:
    """Runs the program, and ends the process."""
    import signal

    signal.alarm(job["timeout"])
    os.chdir(job["folder"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        code = _program(*job["words"])
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _program(program: str, *words: str) -> int | None:
    if program == "lowrank":
        from lowrank.cli import main

        return main(list(words))
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")  # what `begin` has put there stays
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
    return None


if __name__ == "__main__":
    _serve()
