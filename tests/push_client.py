"""What test_push.py runs in a process of its own, whose huggingface_hub knows the stand-in for the hub.

Prints one JSON object: for each step the status and what was printed.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
import urllib.request
from pathlib import Path

import text
from hub_server import READ_TOKEN, TOKEN

from lowrank import compat

compat.install(override=True)  # as the program itself does

from lowrank.cli import main  # noqa: E402

folder, url = Path(sys.argv[1]), os.environ["HF_ENDPOINT"]
time.sleep = lambda seconds: None  # between tries
results = {}
text.save_model(folder / "base")
(folder / "private place").mkdir()
text.write_rows(folder / "private place" / "rows.jsonl", *text.pairs(8))


def faults(*wanted):
    body = json.dumps(wanted).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/faults", body)).close()


def lowrank(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(map(str, words)))
    return [status, out.getvalue(), err.getvalue()]


def train(name, repo_id):
    rows = folder / "private place" / "rows.jsonl"
    given = ["--model", folder / "base", "--data", rows, "--eval_split", "2", "--epochs", "1"]
    given += ["--eval.generate", "1", "--max_new_tokens", "2", "--logging_steps", "1"]
    return lowrank("train", *given, "--output", folder / name, "--push", repo_id)


os.environ.pop("HF_TOKEN", None)
results["no token"] = train("none", "me/none")
for name, token in {"unknown token": "hf_of_nobody", "reading token": READ_TOKEN}.items():
    os.environ["HF_TOKEN"] = token
    results[name] = train("none", "me/none")
os.environ["HF_TOKEN"] = TOKEN
results["somebody else's"] = train("none", "them/none")
results["no name"] = train("none", "a/b/c")
results["nothing was begun"] = not (folder / "none").exists()

results["pushed"] = train("first", "me/first")
faults(["PUT lfs", "drop"], ["POST api/models/me/second/commit", 503])
results["tried again"] = lowrank("push", folder / "first", "my-org/second", "--public")
faults(*[["POST api/repos/create", 500]] * 4)
results["never"] = train("third", "me/third")
results["files of the third"] = sorted(p.name for p in (folder / "third").iterdir())
faults(["POST api/models/me/third/commit", 403])
results["refused while pushing"] = lowrank("push", folder / "third", "me/third")
results["pushed later"] = lowrank("push", folder / "third", "me/third")
results["nothing there"] = lowrank("push", folder / "private place", "me/third")

shutil.copytree(folder / "first", folder / "bare")
(folder / "bare" / "README.md").unlink()
results["without a card"] = lowrank("push", folder / "bare", "me/bare", "--public")
(folder / "first" / "README.md").write_text("By a person.\n")
results["a person's card"] = lowrank("push", folder / "first", "me/first")
print(json.dumps(results))
