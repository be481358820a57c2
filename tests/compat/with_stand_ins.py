"""Runs a program that imports torchvision where only the stand-in for it can be installed.

    python tests/compat/with_stand_ins.py script.py arguments…

transformers and diffusers must not take the stand-in for the real thing: they look first, and are told no.
"""

import runpy
import sys
from pathlib import Path

import diffusers.utils
import transformers.utils

assert not transformers.utils.is_torchvision_available()
assert not diffusers.utils.is_torchvision_available()
sys.path.append(str(Path(__file__).parent / "stand_in_torchvision"))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
