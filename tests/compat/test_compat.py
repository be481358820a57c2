"""Each case in a process of its own: what was imported before decides, and nothing may stay behind."""

import ast
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import programs
import pytest

from lowrank import LoraConfig, compat
from lowrank.compat import absent


def run(program):
    """Its output; warnings are errors. None of lowrank, transformers and PEFT has been imported before it."""
    code = "import warnings; warnings.simplefilter('error')\n" + textwrap.dedent(program)
    with tempfile.TemporaryDirectory() as folder:
        done = programs.run(["python", "-c", code], Path(folder), begin=programs.OTHERS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_fresh(program, **environment):
    """As `run`, with nothing imported."""
    done = python("-W", "error", "-c", program, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


HIDE_PEFT = """
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    '''As if no PEFT were installed.'''
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "peft":
            path = [entry for entry in sys.path if "site-packages" not in entry]
        return importlib.machinery.PathFinder.find_spec(name, path, target)
at = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[at] = Hidden
"""


def test_before_transformers_the_shim_answers():
    out = run("""
        import lowrank.compat
        lowrank.compat.install(override=True)
        from importlib.metadata import version
        import lowrank, peft
        from transformers import trainer_utils
        from transformers.utils import is_peft_available
        from transformers.utils.import_utils import is_peft_greater_or_equal
        import accelerate.utils
        assert peft.PeftModel is lowrank.PeftModel is trainer_utils.PeftModel
        assert peft.__version__ == version("peft") == "0.21.2+lowrank"
        assert is_peft_available() and is_peft_greater_or_equal("0.20.0")
        assert accelerate.utils.is_peft_available()
        assert peft.LoraConfig.__module__.startswith("lowrank")
        print(peft.__file__)
    """)
    assert out.startswith(compat.SHIM)


@pytest.mark.interop
def test_after_transformers_took_in_the_installed_peft():
    run("""
        from transformers import Trainer, trainer_utils
        import lowrank, lowrank.compat, peft
        assert peft.PeftModel is trainer_utils.PeftModel
        lowrank.compat.install()
        assert trainer_utils.PeftModel is not lowrank.PeftModel  # never unasked
        lowrank.compat.install(override=True)
        import transformers.trainer
        assert lowrank.PeftModel is trainer_utils.PeftModel is transformers.trainer.PeftModel
        import peft
        assert peft.PeftModel is lowrank.PeftModel
    """)


def test_where_no_peft_is_installed_no_override_is_needed():
    run(
        HIDE_PEFT
        + """
from transformers import trainer_utils
from transformers.utils import is_peft_available
import lowrank, lowrank.compat, sys
assert not is_peft_available()
with lowrank.compat.standing_in():
    assert trainer_utils.PeftModel is lowrank.PeftModel
assert not hasattr(trainer_utils, "PeftModel")
assert not [name for name in sys.modules if name.partition(".")[0] == "peft"]
lowrank.compat.install()
import peft, transformers.trainer
assert is_peft_available()
assert peft.PeftModel is trainer_utils.PeftModel is lowrank.PeftModel
assert transformers.trainer.PeftModel is lowrank.PeftModel
"""
    )


@pytest.mark.interop
def test_standing_in_leaves_everything_as_it_was():
    run("""
        import sys
        import peft
        import lowrank, lowrank.compat
        import types
        from transformers import trainer_utils
        before = list(sys.path), trainer_utils.PeftModel, sys.modules["peft"]
        try:
            with lowrank.compat.standing_in():
                import peft as inside
                assert inside.PeftModel is trainer_utils.PeftModel is lowrank.PeftModel
                assert lowrank.compat.is_ours()
                sys.modules["trl.trainer"] = types.ModuleType("trl.trainer")  # it has taken in ours
                raise KeyError
        except KeyError:
            pass
        assert "trl.trainer" not in sys.modules
        assert before == (list(sys.path), trainer_utils.PeftModel, sys.modules["peft"])
        import peft as after
        assert after is peft and not lowrank.compat.is_ours()
    """)


@pytest.mark.interop
def test_too_late_is_an_error_that_says_why():
    out = run("""
        import sys, types
        sys.modules["trl.trainer.sft_trainer"] = types.ModuleType("trl.trainer.sft_trainer")
        import lowrank.compat
        try:
            lowrank.compat.install(override=True)
        except lowrank.compat.CompatError as error:
            print(error)
    """)
    assert "trl.trainer was imported before lowrank.compat.install()" in out


def test_a_method_that_we_do_not_have_says_so():
    for name in absent.__all__:
        placeholder = getattr(absent, name)
        assert not isinstance(LoraConfig(), placeholder)
        with pytest.raises(NotImplementedError, match=f"{name} is not LoRA, and lowrank does LoRA"):
            placeholder(1, x=2)
    with pytest.raises(AttributeError, match=r"LoRA only.*asked for 'TEXT'"):
        absent.PromptTuningInit.TEXT  # noqa: B018
    # which diffusers' layerwise casting reads
    assert absent.LoHaLayer.adapter_layer_names == absent.LoKrLayer.adapter_layer_names == ()

    class OfAnotherLibrary(absent.PromptLearningConfig):
        pass

    with pytest.raises(NotImplementedError, match="OfAnotherLibrary is not LoRA"):
        OfAnotherLibrary()


@pytest.mark.interop
def test_every_name_that_peft_exports_is_there():
    """And no module is there that PEFT does not have, with all that its __all__ promises."""
    import importlib

    import peft

    modules = {
        ".".join(path.relative_to(compat.SHIM).with_suffix("").parts).removesuffix(".__init__")
        for path in Path(compat.SHIM, "peft").rglob("*.py")
    }
    for name in modules:
        importlib.import_module(name)
    run(f"""
        import importlib, lowrank.compat
        lowrank.compat.install(override=True)
        import peft
        missing = set({sorted(peft.__all__)!r}) - set(peft.__all__)
        assert not missing, missing
        for name in {sorted(modules)!r}:
            module = importlib.import_module(name)
            assert module.__file__.startswith(lowrank.compat.SHIM)
            for exported in module.__all__:
                getattr(module, exported)
    """)


def test_the_shim_holds_no_logic():
    for path in Path(compat.SHIM, "peft").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert doc or isinstance(node, ast.ImportFrom | ast.Assign), path


def python(*words, **environment):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, **environment}
    )


PROGRAM = """
import sys, subprocess
from importlib.metadata import version
from importlib.util import find_spec
print(sys.argv[1:], __name__, sys.path[0], sys.warnoptions, version("peft"), flush=True)
where = "from importlib.util import find_spec; print(find_spec('peft').origin)"
subprocess.run([sys.executable, "-c", where], check=True)
sys.exit(3)
"""


@pytest.mark.parametrize(
    "options", [["-W", "error", "-m", "lowrank.compat"], ["-Werror", "-umlowrank.compat"]]
)
def test_running_a_program_is_python_with_the_shim(tmp_path, options):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = python(*options, str(program), "a", "-m", "b")
    line, of_child = done.stdout.splitlines()
    assert done.returncode == 3, done.stderr
    assert line == f"['a', '-m', 'b'] __main__ {tmp_path} ['error'] 0.21.2+lowrank"
    assert of_child == f"{compat.SHIM}/peft/__init__.py"


def test_running_a_module():
    done = python("-um", "lowrank.compat", "-m", "json.tool", "--help")
    assert done.returncode == 0
    assert "json" in done.stdout


def test_the_folder_for_the_python_path():
    assert python("-m", "lowrank.compat", "path").stdout == compat.SHIM + "\n"


def test_a_wrong_call_says_how():
    done = python("-m", "lowrank.compat")
    assert done.returncode == 2
    assert "program.py" in done.stderr


def test_importing_lowrank_is_enough_where_no_peft_is_installed(tmp_path):
    (tmp_path / "peft").mkdir()  # a folder without code, as an output folder might be called
    run_fresh(
        HIDE_PEFT
        + f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import lowrank
assert "lowrank.peft" not in sys.modules and "torch" not in sys.modules
assert sys.path[-1] == lowrank.compat.SHIM
import peft
assert peft.PeftModel is lowrank.PeftModel
"""
    )


def test_the_environment_variable_opts_out():
    run_fresh(
        HIDE_PEFT
        + """
import lowrank, importlib.util
assert importlib.util.find_spec("peft") is None
""",
        **{compat.OPT_OUT: "1"},
    )


BUILD = """
import torch
from torch import nn
def build():
    return lowrank.get_peft_model(nn.Sequential(nn.Linear(3, 2)), lowrank.LoraConfig(target_modules=["0"]))
"""


def test_transformers_that_came_before_lowrank_learns_of_it_from_the_first_model():
    run(
        HIDE_PEFT
        + "from transformers import Trainer, trainer_utils\nimport lowrank\n"
        + BUILD
        + """
assert not trainer_utils._is_peft_model(None) and not hasattr(trainer_utils, "PeftModel")
assert trainer_utils._is_peft_model(build())
"""
    )


@pytest.mark.interop
def test_beside_an_installed_peft_a_warning_comes_once_and_nothing_is_changed():
    run(
        "import warnings, lowrank\nfrom transformers import Trainer, trainer_utils\n"
        + BUILD
        + """
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    first, second = build(), build()
assert [str(w.category.__name__) for w in seen] == ["LowrankWarning"]
assert "lowrank.compat.install(override=True)" in str(seen[0].message)
assert seen[0].filename == "<string>"
assert not trainer_utils._is_peft_model(first)
with lowrank.compat.standing_in():
    assert trainer_utils._is_peft_model(first)
"""
    )
