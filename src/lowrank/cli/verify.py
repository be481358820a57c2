"""Prove that a merged folder is the same function as base + adapter.

Every tensor of MERGED is compared with W + ΔW computed in float64 from the files of BASE and
ADAPTER, and its outputs, from plain transformers in a process of its own, with those of base +
adapter computed unmerged. Exit status 1 if it falls short.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
