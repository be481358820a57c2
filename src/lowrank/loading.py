"""An adapter's files into a model. `model` is a PeftModel."""

from os import PathLike
from typing import Any

from lowrank.adapter_file import Adapter, read_adapter, read_start, read_tensors
from lowrank.config import LoraConfig
from lowrank.errors import AdapterMismatchError
from lowrank.fingerprint import check_base as check_fingerprint
from lowrank.fused_experts import for_fused_tensors
from lowrank.start_factors import check_start, replace_start
from lowrank.state import LoadResult, set_peft_model_state_dict

# what an adapter that is there must share with the file whose tensors replace its own
_SAME = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("trainable_token_indices", "layer_replication"),
)


def adapter_to_load(
    path: str | PathLike,
    config: LoraConfig | None = None,
    *,
    subfolder: str | None = None,
    ignore_unknown: bool = False,
    **hub: Any,
) -> Adapter:
    """The adapter in a folder or on the hub. config: in place of the one there.

    Raises AdapterFileError, also if its start was taken out of W and can neither be read nor computed.
    """
    if config is None:
        adapter = read_adapter(path, subfolder=subfolder, ignore_unknown=ignore_unknown, **hub)
    else:
        tensors, metadata = read_tensors(path, subfolder=subfolder, **hub)
        start = read_start(path, config, metadata, subfolder=subfolder, **hub)
        adapter = Adapter(config, tensors, metadata, start)
    check_start(adapter.config, adapter.tensors, adapter.start, path)
    return adapter


def fill(
    model: Any,
    name: str,
    adapter: Adapter,
    where: str | PathLike,
    *,
    is_trainable: bool,
    strict: bool,
    check_base: bool,
) -> LoadResult:
    """Loads the tensors into the adapter `name`, which is there. where: for the texts of errors.

    Raises BaseMismatchError or AdapterMismatchError, and then nothing was loaded.
    """
    if check_base:
        check_fingerprint(model, name, adapter.metadata.get("base"), adapter.tensors, where)
    fitting = for_fused_tensors(model.get_base_model(), adapter.tensors)
    result = set_peft_model_state_dict(model, fitting, name, strict=strict)
    if not is_trainable:
        model.eval()
    elif name in model.active_adapters:
        model.set_adapter(model.active_adapter)
    return result


def take_start(model: Any, name: str, adapter: Adapter) -> None:
    """Gives an adapter that was there the start that belongs to the tensors just loaded into it."""
    here, init = model.peft_config[name], adapter.config.init_lora_weights
    replace_start(model, name, here.init_lora_weights, init, adapter.start)
    here.init_lora_weights = init


def check_same_meaning(saved: LoraConfig, here: LoraConfig, name: str, where: Any) -> None:
    """Raises AdapterMismatchError if the tensors saved under one configuration mean something else under the other."""
    differ = [f for f in _SAME if getattr(saved, f) != getattr(here, f)]
    if differ:
        found = ", ".join(f"{f}={getattr(saved, f)!r} (here {getattr(here, f)!r})" for f in differ)
        raise AdapterMismatchError(
            f"{where} was saved with {found}: its tensors would mean something else in adapter {name!r}. Load it under "
            f"another name, or delete_adapter({name!r}) first."
        )
