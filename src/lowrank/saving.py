"""The adapters of a model as files."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lowrank import __version__
from lowrank.adapter_file import Adapter, read_tensors
from lowrank.bases.kinds import KINDS
from lowrank.config import LoraConfig
from lowrank.errors import AdapterMismatchError
from lowrank.fingerprint import fingerprint
from lowrank.init import computed_again, taken_out
from lowrank.log import logger
from lowrank.quantised_base import METADATA_KEY, quantised_layers, to_json
from lowrank.start_factors import as_plain_lora, start_factors
from lowrank.state import get_peft_model_state_dict
from lowrank.wrappers import lora_layers

_SAME = 1e-3  # of ‖B₀·A₀‖: what an SVD or QR of the same weight may differ by in another library


def adapter_of(
    model: Any,
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | str = "auto",
) -> Adapter:
    """One adapter of a PeftModel, as it is written to a file: configuration, tensors, metadata and start."""
    tensors = get_peft_model_state_dict(
        model,
        state_dict=state_dict,
        adapter_name=name,
        save_embedding_layers=save_embedding_layers,
    )
    config = dataclasses.replace(
        model.peft_config[name],
        inference_mode=True,
        auto_mapping=_auto_mapping(model.get_base_model(), model.peft_config[name]),
    )
    metadata: dict[str, Any] = {
        "versions": {"lowrank": __version__, "torch": torch.__version__},
        "base": fingerprint(model, name),
    }
    quantised = quantised_layers(model)
    if quantised:
        metadata[METADATA_KEY] = to_json(quantised)
    if model.run_settings:
        metadata["run"] = model.run_settings
    start = start_factors(model, name, loftq=config.init_lora_weights == "loftq")
    return Adapter(config, tensors, metadata, start)


def _auto_mapping(base: nn.Module, config: LoraConfig) -> dict[str, str] | None:
    """Which class the base is, where no task type says so: PEFT's AutoPeftModel reads it."""
    if config.task_type is not None:
        return None
    return {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}


def converted(
    adapter: Adapter, name: str, as_plain: bool, initial: str | PathLike | None
) -> Adapter:
    """`adapter` in the form to be written: PEFT's own, or as a plain LoRA.

    initial: the folder of the adapter as it was before training, which PEFT needs for the conversion. Here
    it is only compared. Raises AdapterMismatchError if it holds another start.
    """
    if initial is not None:
        _compare_initial(adapter, name, initial)
    return as_plain_lora(adapter) if as_plain or initial is not None else adapter


def _compare_initial(adapter: Adapter, name: str, initial: str | PathLike) -> None:
    tensors, _ = read_tensors(initial)
    different = []
    for key in adapter.tensors:
        other = key.replace("lora_B", "lora_A").replace("embedding_B", "embedding_A")
        if other == key or other not in adapter.tensors:
            continue
        if key not in tensors or other not in tensors:
            different.append(f"{key} is not in it")
            continue
        theirs = _product(tensors[key], tensors[other])
        ours = torch.zeros_like(theirs)
        if key in adapter.start:
            ours = _product(adapter.start[key], adapter.start[other])
        if theirs.shape != ours.shape or (theirs - ours).norm() > _SAME * ours.norm():
            different.append(f"{key}: B₀·A₀ is another")
    if different:
        raise AdapterMismatchError(
            f"path_initial_model_for_weight_conversion={str(initial)!r} does not hold what adapter {name!r} started "
            f"from: {', '.join(different[:3])}. The start is kept here: as_plain_lora=True needs no such path."
        )


def _product(B: Tensor, A: Tensor) -> Tensor:
    return B.flatten(1).double().cpu() @ A.flatten(1).double().cpu()


def warn_of_other_readers(model: nn.Module, name: str, config: LoraConfig) -> None:
    """Says in the log who cannot read the files that were just written, and what can be done."""
    init = config.init_lora_weights
    layers = [layer for _, layer in lora_layers(model) if layer.start_factors(name)]
    if not layers:
        return
    why = ""
    if not taken_out(init):
        why = f"its configuration says init_lora_weights={init!r}, but its start is taken out of the base's weights"
    elif not computed_again(init):
        why = f"the start of {init!r} cannot be computed again"
    elif any(layer.kind is not KINDS[0] for layer in layers):
        why = f"PEFT computes the start of {init!r} rightly for nn.Linear only"
    if why:
        logger.warning(
            "Adapter %r is saved with its start beside it, which lowrank reads; %s. For PEFT, vLLM and others: "
            "save_pretrained(…, as_plain_lora=True).",
            name,
            why,
        )
