"""Each case in a fresh process: what was imported before decides, and nothing may stay behind."""

import subprocess
import sys
import textwrap

import pytest

from lowrank import compat
from lowrank.compat.absent import PeftMixedModel


def run(program, *flags, env=None):
    done = subprocess.run(
        [sys.executable, "-W", "error", *flags, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


HIDE_PEFT = """
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    '''As if no PEFT were installed: only the shim's folder can hold one.'''
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        if name == "peft" and found and "shim" not in str(found.origin):
            return None
        return found
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
assert not is_peft_available()
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
        from transformers import trainer_utils
        before = list(sys.path), trainer_utils.PeftModel, sys.modules["peft"]
        try:
            with lowrank.compat.standing_in():
                import peft as inside
                assert inside.PeftModel is trainer_utils.PeftModel is lowrank.PeftModel
                assert lowrank.compat.is_ours()
                raise KeyError
        except KeyError:
            pass
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
    with pytest.raises(NotImplementedError, match="lowrank does LoRA only"):
        PeftMixedModel()
