"""Run a model folder on given inputs with transformers alone: the merged side of `verify`.

It is run as a process of its own, `python -P probe.py JOB`, and imports nothing of lowrank, so what
it sees is what anybody sees who loads the folder. JOB is a folder: job.json and inputs.safetensors
are read, output-N.safetensors and answer.json written.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def outputs_of(model: Any, inputs: Mapping[str, Tensor], fields: Sequence[str]) -> Tensor:
    """(positions, values) in float32: the named outputs of one example, leading dimensions flattened."""
    result = model(**inputs)
    values = [result[field].float() for field in fields]
    if len(values) > 1:  # start_logits and end_logits, each (1, tokens)
        return torch.cat([value.reshape(1, -1) for value in values])
    return values[0].reshape(-1, values[0].shape[-1])


def by_number(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """{"0.input_ids": …, "1.input_ids": …} as one dictionary an example."""
    examples: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        examples.setdefault(int(number), {})[name] = value
    return [examples[number] for number in sorted(examples)]


def numbered(examples: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inverse of `by_number`."""
    return {
        f"{i}.{name}": value.clone()  # a file holds no two tensors that share memory
        for i, example in enumerate(examples)
        for name, value in example.items()
    }


def main(folder: Path) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    auto = getattr(transformers, job["auto_class"])
    model, info = auto.from_pretrained(
        job["model"], dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model.eval()
    for i, example in enumerate(by_number(load_file(folder / "inputs.safetensors"))):
        output = outputs_of(model, example, job["fields"]).contiguous()
        save_file({"output": output}, folder / f"output-{i}.safetensors")
    answer = {
        "class": type(model).__name__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "lowrank": sorted(name for name in sys.modules if name.split(".")[0] == "lowrank"),
    }
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
