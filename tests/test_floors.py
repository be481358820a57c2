"""A floor imports only floors below it, and `import lowrank` only what it needs.

Which floor a module stands on is said in docs/architecture.md.
"""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lowrank

PACKAGE = Path(lowrank.__file__).parent
DOCS = PACKAGE.parents[1] / "docs" / "architecture.md"


def floors() -> dict[str, int]:
    """`errors` for errors.py and `cli` for cli/ -> its floor on the page."""
    found: dict[str, int] = {}
    floor = None
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = re.match(r"### Floor (\d)", line)
            floor = int(heading[1]) if heading else None
        elif floor is not None and (item := re.match(r"- `(\w+)(\.py|/)`", line)):
            assert item[1] not in found, f"{item[1]} stands twice on the page"
            found[item[1]] = floor
    return found


FLOOR = floors()


def source_files() -> list[Path]:
    # the shim is a package of its own, `peft`, that stands in for the real one
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "shim" not in path.parts]


def part_of(path: Path) -> str:
    """`errors` for errors.py, `cli` for cli/train.py, an empty text for the package itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, module within lowrank) for every import, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name.split(".", 1)) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            head, _, rest = (node.module or "").partition(".")
            if (
                head == "lowrank" and not rest
            ):  # from lowrank import X: a module, or a public name of one
                names = [(a.name, lowrank._PUBLIC.get(a.name, a.name)) for a in node.names]
                found += [(node.lineno, ["lowrank", where]) for _, where in names]
            else:
                found += [(node.lineno, [head, inside(rest, a.name)]) for a in node.names]
    return [(line, name[1]) for line, name in found if name[0] == "lowrank" and name[1:]]


def inside(module: str, name: str) -> str:
    """`from lowrank.verify import inputs` imports lowrank.verify.inputs."""
    return (
        f"{module}.{name}"
        if (PACKAGE / module.replace(".", "/") / f"{name}.py").exists()
        else module
    )


def test_the_page_has_every_module_and_no_other():
    assert set(FLOOR) == {part_of(path) for path in source_files()} - {""}


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_floor_imports_no_floor_above_it(path):
    part = part_of(path)
    if part == "":
        return  # says where the public names are, and appends the shim; imports no more until one is used
    wrong = []
    for line, module in imported(path):
        other = module.split(".")[0]
        if FLOOR.get(other, 0) > FLOOR[part]:
            wrong.append(
                f"line {line}: {part} (floor {FLOOR[part]}) imports {other} ({FLOOR[other]})"
            )
    assert not wrong, "\n".join(wrong)


def test_neighbours_on_a_floor_make_no_circle():
    graph: dict[str, set[str]] = {}
    for path in source_files():
        others = {module.split(".")[0] for _, module in imported(path)}
        graph.setdefault(part_of(path), set()).update(others & set(FLOOR) - {part_of(path)})
    del graph[""]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_only_the_command_line_imports_the_package_as_a_whole():
    """`import lowrank` gives every name of every floor."""
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(a.name == "lowrank" for a in node.names):
                assert part_of(path) == "cli", f"{path}:{node.lineno}"


def test_every_file_of_a_package_stands_on_the_ones_below_it():
    """Within cli/, train/, verify/ …: no circle of imports."""
    graph = {}
    for path in source_files():
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        top = ast.parse(path.read_text(encoding="utf-8")).body
        graph[name] = {
            module
            for line, module in imported(path)
            if any(
                n.lineno <= line <= (n.end_lineno or 0)
                for n in top
                if isinstance(n, ast.ImportFrom)
            )
        }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above, name])
        if name in done or name not in graph:
            return
        for other in sorted(graph[name]):
            if not name.startswith(f"{other}."):  # a package is there when its parts are imported
                visit(other, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


# --- what is imported when ------------------------------------------------------------------------

OTHERS = [
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "jinja2",
    "yaml",
]


def imported_by(code: str) -> set[str]:
    """The top-level modules that a fresh process has after running `code`."""
    code += "\nimport sys; print('MODULES', *sorted({m.split('.')[0] for m in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("MODULES")[2].split())


def test_importing_the_package_imports_nothing():
    found = imported_by("import lowrank; dir(lowrank); lowrank.__version__")
    assert not {"torch", "safetensors", *OTHERS} & found


def test_the_core_needs_torch_and_safetensors_alone(tmp_path):
    found = imported_by(f"""
import torch
from torch import nn
import lowrank

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Embedding(4, 3), nn.MultiheadAttention(6, 2), nn.Conv1d(3, 4, 2))

config = lowrank.LoraConfig(target_modules=["0", "1", "2", "3"], use_dora=True, init_lora_weights=False)
print(len(lowrank.plan(net(), config)))
model = lowrank.get_peft_model(net(), config)
model.print_trainable_parameters()
model.get_base_model()[0](torch.ones(2, 7)).sum().backward()
model.save_pretrained({str(tmp_path)!r})
lowrank.read_adapter({str(tmp_path)!r})
again = lowrank.PeftModel.from_pretrained(net(), {str(tmp_path)!r}, is_trainable=True)
again.merge_adapter()
again.unmerge_adapter()
again.merge_and_unload()
""")
    assert {"torch", "safetensors", "lowrank"} <= found
    assert not set(OTHERS) & found


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nonsense"]])
def test_the_command_line_answers_without_torch(words):
    found = imported_by(f"from lowrank.cli import main; main({words!r})")
    assert not {"torch", "numpy", *OTHERS} & found
