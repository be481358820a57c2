"""`LoraModel`: a model with adapters in it, and what can be done to all of its layers at once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowrank import functional
from lowrank.adapter_file import Adapter
from lowrank.adding import activate, add_to_model
from lowrank.combine import combine
from lowrank.config import LoraConfig
from lowrank.errors import (
    CombineError,
    ConfigError,
    RowsError,
    did_you_mean,
)
from lowrank.fingerprint import fingerprint
from lowrank.init import Init
from lowrank.inject import check_name, eject
from lowrank.log import logger
from lowrank.routing import BASE
from lowrank.start_factors import as_plain_lora, start_factors
from lowrank.state import adapter_keys, get_peft_model_state_dict, set_peft_model_state_dict
from lowrank.unload import merge_all, unload, unmerge_all
from lowrank.wrappers import adapter_names, wrappers


class LoraModel(nn.Module):
    """A model with adapters in it, and what can be done to all of its layers at once.

    Sits between PeftModel and the base model (`base_model.model`), as in PEFT, so that parameter names
    agree. Attributes of the base model answer as before.
    """

    prefix = "lora_"

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapter: str | list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @property
    def active_adapters(self) -> list[str]:
        return (
            [self.active_adapter]
            if isinstance(self.active_adapter, str)
            else list(self.active_adapter)
        )

    def add_adapter(
        self,
        name: str,
        config: LoraConfig,
        cast_to_float32: bool,
        meta: bool,
        inits: Mapping[str, Init] | None = None,
    ) -> None:
        """One more adapter, not active. Layers that had none so far follow the others in what is active.

        Raises AdapterNameError if the name is taken.
        """
        if config.bias != "none" or any(c.bias != "none" for c in self.peft_config.values()):
            raise ConfigError(
                "bias='all' or 'lora_only' trains the base's own biases, which several adapters cannot share."
            )
        known = {module for _, module in wrappers(self.model)}
        disabled = any(module.disable_adapters for module in known)
        self.peft_config[name] = add_to_model(
            self.model, config, name, cast_to_float32, meta, inits
        )
        for _, module in wrappers(self.model):
            if module not in known:
                module.set_adapter(self.active_adapters)
                module.enable_adapters(not disabled)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        seed: int = 0,
    ) -> None:
        """A new adapter, not active, made of others: `lowrank.combine.combine` under PEFT's names.

        "linear" is Σ wᵢ·ΔWᵢ exactly, for any ranks; PEFT's arithmetic on A and B is "linear_factors".
        svd_full_matrices and svd_driver choose how PEFT computes its SVD and change nothing here.
        Raises AdapterNameError if the name is taken or an adapter unknown; CombineError for what cannot be
        combined. The model is then as it was.
        """
        del svd_full_matrices, svd_driver
        if svd_clamp is not None:
            raise CombineError(
                f"svd_clamp={svd_clamp!r} would cut off the factors' largest entries, and with them the best "
                "approximation; leave it out."
            )
        check_name(self.model, adapter_name)
        self.check_known(adapters)
        with torch.no_grad():
            combined = combine(
                [as_plain_lora(self._adapter(name)) for name in adapters],
                weights,
                combination_type,
                svd_rank=svd_rank,
                density=density,
                majority_sign_method=majority_sign_method,
                seed=seed,
                check_base=False,
                names=[f"adapter {name!r}" for name in adapters],
            )
        known = {module for _, module in wrappers(self)}
        self.add_adapter(adapter_name, combined.config, cast_to_float32=True, meta=True)
        try:
            # the other adapters in the model decide whether a path leads through a base_layer; two parameters
            # of one module differ in nothing else
            keys = adapter_keys(self, adapter_name)
            shorter = {key.replace(".base_layer.", "."): key for key in keys}
            found = {}
            for key, tensor in combined.tensors.items():
                ours = key.removeprefix("base_model.")
                same = ours in keys
                found[ours if same else shorter.get(ours.replace(".base_layer.", "."), ours)] = (
                    tensor
                )
            set_peft_model_state_dict(self, found, adapter_name)
        except Exception:
            self.delete_adapter(adapter_name)
            eject(self.model, keep=known)
            raise

    def _adapter(self, name: str) -> Adapter:
        """One of the adapters by its file's keys, which begin a module further out."""
        tensors = get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)
        start = start_factors(self, name)
        return Adapter(
            self.peft_config[name],
            {f"base_model.{key}": tensor for key, tensor in tensors.items()},
            {"base": fingerprint(self, name)},
            {f"base_model.{key}": tensor for key, tensor in start.items()},
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters, and no others, act and (without `inference_mode`) trainable.

        Raises AdapterNameError for an unknown name. A merge is undone first, with a warning in the log.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else [*dict.fromkeys(adapter_name)]
        self.check_known(names)
        activate(self.model, self.peft_config, names, inference_mode)
        self.active_adapter = names[0] if len(names) == 1 else names

    def enable_adapter_layers(self) -> None:
        """Lets the active adapters act again; what was merged is merged again."""
        for _, module in wrappers(self.model):
            module.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """From now on the model is its base, until `enable_adapter_layers`."""
        trained = [name for name, config in self.peft_config.items() if config.bias != "none"]
        if trained:
            logger.warning(
                "Adapters %s trained biases of the base itself (bias=…): disabling leaves those changed.",
                trained,
            )
        for _, module in wrappers(self.model):
            module.enable_adapters(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter for good. If it was the only active one, the first that is left becomes active.

        Raises MergeError if it is merged.
        """
        self.check_known([adapter_name])
        functional.delete_adapter(self.model, adapter_name)
        del self.peft_config[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        left = [name for name in self.active_adapters if name != adapter_name]
        if not left and self.peft_config:
            left = list(self.peft_config)[:1]
            self.set_adapter(left, inference_mode=self.peft_config[left[0]].inference_mode)
        self.active_adapter = left[0] if len(left) == 1 else left

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Adds the adapters (None: the active ones) to the base weights; `unmerge_adapter` takes them out.

        Raises MergeError with the base untouched.
        """
        self.check_known(adapter_names or [])
        merge_all(self.model, adapter_names)

    def unmerge_adapter(self) -> None:
        """Puts back the base weights as they were before any merge, every bit of them."""
        unmerge_all(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """The base model with the adapters merged into its weights, and no trace of lowrank left in it.

        safe_merge: keep all unmerged weights in memory until every layer is merged, so that a failure
        leaves the base untouched. A tied pair of embeddings is untied where the merge changes one of them,
        in the weights and in the configuration.
        """
        self.check_known(adapter_names or [])
        return unload(self.model, merge=True, adapter_names=adapter_names, keep_base=safe_merge)

    def unload(self, keep_quantised: bool = False) -> nn.Module:
        """The base model as it was, without adapters; or with the weights that LoftQ quantised, to be saved."""
        return unload(self.model, merge=False, keep_quantised=keep_quantised)

    def check_known(self, names: Sequence[str]) -> None:
        functional.check_known(names, self.peft_config)


@contextmanager
def rows(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, row i of every batch goes through adapter names[i] (`"__base__"`: through none).

    Whatever happens inside, afterwards the active adapters act on all rows again. Raises RowsError for an
    unknown name, and while an adapter is merged or the adapters are disabled.
    """
    known = adapter_names(model)
    unknown = sorted({name for name in names if name != BASE and name not in known})
    if unknown:
        raise RowsError(
            f"adapter_names has {unknown}; there are: {', '.join(known)}, and {BASE!r} for none."
            + did_you_mean(unknown[0], [*known, BASE])
        )
    found = [module for _, module in wrappers(model)]
    if any(getattr(module, "merged", False) for module in found):
        raise RowsError(
            "adapter_names=… while an adapter is merged into all rows: unmerge_adapter() first."
        )
    if any(module.disable_adapters for module in found):
        raise RowsError(
            "adapter_names=… while the adapters are disabled: enable_adapter_layers() first."
        )
    if not found or not names:
        raise RowsError("adapter_names=… needs a model with adapters, and a name for each row.")
    with found[0].routing.route(names):
        yield
