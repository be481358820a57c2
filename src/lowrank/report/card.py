"""The README.md of a run's result, which the hub shows as its page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.card import is_on_hub, put_card
from lowrank.report.chart import loss_label, step_image
from lowrank.report.data import Metric, RunReport
from lowrank.report.text import written

PLOT = "loss.png"
# LoraConfig's task types, as the hub calls what such a model does
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_TEXT = """# {title}

{kind} of `{base}`, trained with lowrank on {data}: {summary}

{metrics}{plot}## Use

```python
{use}
```

## How it was trained

| setting | value |
|---|---|
{settings}

| | |
|---|---|
{costs}

{versions}

The licence of the base model is not recorded here; it applies to what is made of the base.
"""
_ADAPTER = """from lowrank import AutoPeftModel{auto}  # or: from peft import …

model = AutoPeftModel{auto}.from_pretrained("this folder or repository")"""
_MODEL = """from transformers import AutoModel{auto}

model = AutoModel{auto}.from_pretrained("this folder or repository")"""
AUTO = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}


class About(NamedTuple):
    """What a card says beside the report's numbers."""

    name: str  # of the result
    base: str
    data: Sequence[str]  # as the run was told; files are named without their folders
    evaluated_on: Sequence[str]
    task_type: str
    task: str
    adapter: bool  # or every weight
    settings: Mapping[str, Any]  # of those that may be shown


def write_run_card(folder: Path, report: RunReport, about: About) -> bool:
    """README.md and the loss curves beside it; a card that a person wrote or changed stays.

    Nothing of it names a folder, shows a row, or holds a token. Returns whether the card was written.
    """
    plotted = step_image(folder / PLOT, report.losses, loss_label(report))
    return put_card(folder, run_card(report, about, plotted), replace=True)


def run_card(report: RunReport, about: About, plotted: bool) -> str:
    """The card's text, its YAML front matter first (the hub's fields, the metrics as its model-index)."""
    import yaml

    front = yaml.safe_dump(_front(report, about), sort_keys=False, allow_unicode=True)
    auto = AUTO.get(about.task_type, "ForCausalLM")
    if not about.adapter and auto == "ForFeatureExtraction":
        auto = ""  # transformers' AutoModel itself
    body = _TEXT.format(
        title=about.name,
        kind="A LoRA adapter" if about.adapter else "All weights",
        base=_base(about.base),
        data=_listed(about.data),
        summary=report.summary,
        metrics=_metrics(report.metrics, about),
        plot=f"![loss by optimiser steps]({PLOT})\n\n" if plotted else "",
        use=(_ADAPTER if about.adapter else _MODEL).format(auto=auto),
        settings="\n".join(f"| `{name}` | {_cell(v)} |" for name, v in about.settings.items()),
        costs="\n".join(
            f"| {c.name} | {c.value}{f' ({c.note})' if c.note else ''} |" for c in report.costs
        ),
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )
    return f"---\n{front}---\n\n{body}"


def _front(report: RunReport, about: About) -> dict[str, Any]:
    on_hub = is_on_hub(about.base) and "/" in about.base
    data = [name.split(":")[0].split("@")[0] for name in about.data if _hub_data(name)]
    pipeline = PIPELINES.get(about.task_type, "text-generation")
    results = [
        {"type": m.name.replace(" ", "_"), "name": m.name, "value": round(value, 6)}
        for m in report.metrics
        if (value := m.after if m.after is not None else m.full) is not None
    ]
    found: dict[str, Any] = {"base_model": about.base} if on_hub else {}
    found |= {
        "library_name": "peft" if about.adapter else "transformers",
        "pipeline_tag": pipeline,
        "license": "unknown",
        "tags": [*(["lora"] if about.adapter else []), "lowrank", about.task],
    }
    if data:
        found["datasets"] = list(dict.fromkeys(data))
    if results:
        name = _listed(about.evaluated_on or about.data)
        dataset = {"name": name, "type": data[0] if data else name}
        result = {"task": {"type": pipeline}, "dataset": dataset, "metrics": results}
        found["model-index"] = [{"name": about.name, "results": [result]}]
    return found


def _metrics(metrics: Sequence[Metric], about: About) -> str:
    if not metrics:
        return ""
    after = "with the adapter" if about.adapter else "fine-tuned"
    rows = [
        f"| {m.name} | {written(m, m.before)} | {written(m, m.after if m.after is not None else m.full)} | {m.note} |"
        for m in metrics
    ]
    on = f" on {_listed(about.evaluated_on)}" if about.evaluated_on else ""
    return "\n".join([f"| {on.strip()} | base | {after} | |", "|---|---:|---:|---|", *rows, "", ""])


def _base(name: str) -> str:
    return name if is_on_hub(name) else Path(name).name


def _hub_data(name: str) -> bool:
    return (
        is_on_hub(name.split(":")[0].split("@")[0]) and "/" in name and "." not in Path(name).suffix
    )


def _listed(names: Sequence[str]) -> str:
    """Names on the hub and of the package in full; of files and folders the last part alone."""
    return ", ".join(n if _hub_data(n) or n.startswith("embedded") else Path(n).name for n in names)


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
