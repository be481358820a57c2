"""The README.md of a saved adapter, which the hub shows as its page."""

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
    """Writes README.md into `folder`, unless there is one: a person may have written it.

    quantisation: of the base that it was trained on, in words; empty in 16 or 32 bits.
    """
    path = folder / "README.md"
    if path.exists():
        return
    base = config.base_model_name_or_path or "unknown"
    on_hub = REPO_ID.fullmatch(base) is not None and not Path(base).exists()
    front = ["library_name: peft", "tags:", "- lora", "- lowrank"]
    if on_hub and base != "unknown":
        front.insert(0, f"base_model: {base}")
    targets = config.target_modules
    folder.mkdir(parents=True, exist_ok=True)
    write_text(
        path,
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
