"""The README.md of a saved adapter, which the hub shows as its page."""

import hashlib
import re
from pathlib import Path

from lowrank.config import LoraConfig
from lowrank.files import write_text
from lowrank.hub import REPO_ID

_CARD = """---
{front}
---

# LoRA adapter

An adapter for `{base}`: r={r}, lora_alpha={lora_alpha}, on {targets}.{trained_on}

```python
from lowrank import PeftModel  # or: from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```
"""


def write_card(folder: Path, config: LoraConfig, quantisation: str = "") -> None:
    """Writes README.md into `folder`, unless there is one of a person's, or of a run.

    quantisation: of the base that it was trained on, in words; empty in 16 or 32 bits.
    """
    base = config.base_model_name_or_path or "unknown"
    on_hub = is_on_hub(base)
    front = ["library_name: peft", "tags:", "- lora", "- lowrank"]
    if on_hub and base != "unknown":
        front.insert(0, f"base_model: {base}")
    targets = config.target_modules
    put_card(
        folder,
        _CARD.format(
            front="\n".join(front),
            base=base if on_hub else Path(base).name,
            r=config.r,
            lora_alpha=config.lora_alpha,
            trained_on=f"\nIt was trained on that base quantised: {quantisation}."
            if quantisation
            else "",
            targets=targets if isinstance(targets, str) else ", ".join(targets or []),
        ),
    )


def is_on_hub(name: str) -> bool:
    """Whether this names something on the hub, and not a folder of somebody's."""
    return REPO_ID.fullmatch(name) is not None and not Path(name).exists()


# the last line of a card of ours: a digest of what stands above, by which one that a person changed is known
_SEAL = "\n<!-- written by lowrank {digest}; a card that is changed is not replaced -->\n"
_SEALED = re.compile(r"(?s)(.*)\n<!-- written by lowrank (\w+);[^\n]*-->\n")


def put_card(folder: Path, text: str, replace: bool = False) -> bool:
    """Writes README.md into `folder` where there is none; with `replace` also over one as lowrank wrote it.

    Returns whether it was written.
    """
    path = folder / "README.md"
    if path.exists() and not (replace and _untouched(path.read_text(encoding="utf-8"))):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text + _SEAL.format(digest=_digest(text)))
    return True


def _untouched(text: str) -> bool:
    found = _SEALED.fullmatch(text)
    return found is not None and _digest(found[1]) == found[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
