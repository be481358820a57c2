"""`ModulesToSaveWrapper`: a module of which each adapter trains and saves a whole copy of its own."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank.errors import AdapterNameError, RowsError
from lowrank.mixed_batch import by_adapter
from lowrank.routing import Routing


class AuxiliaryTrainingWrapper(nn.Module):
    """`original_module`, frozen, with what adapters train of it besides LoRA: which of them act, and learn.

    Two modules descend from it: ModulesToSaveWrapper and TrainableTokensWrapper.
    """

    original_module: Any

    def __init__(self, routing: Routing | None = None):
        super().__init__()
        self.routing = routing or Routing()
        self._active: list[str] = []
        self._disabled = False

    @property
    def adapters(self) -> list[str]:
        """The adapters that have something of their own here."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their name within this module; empty if it has none."""
        raise NotImplementedError

    def conflict(self, names: Iterable[str]) -> str:
        """Why these adapters cannot act here together, or an empty text."""
        raise NotImplementedError

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self._active if name in self.adapters]

    @property
    def active_adapter(self) -> str | list[str]:
        """As a LoraLayer's: with those that have nothing here, because transformers asks one module for all."""
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """These adapters act from now on, and only they can be trained (none, with `inference_mode`).

        Raises AdapterNameError if they cannot act together.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        why = self.conflict(names)
        if why:
            raise AdapterNameError(why)
        self._active = names
        self.set_requires_grad(self.adapters, False)
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            for parameter in self.adapter_parameters(name).values():
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        self._disabled = not enabled


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """`original_module`, frozen, beside one trainable copy for each adapter, under PEFT's names.

    The copy of the active adapter runs; without one, or disabled, the original does.
    """

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, original_module: nn.Module, routing: Routing | None = None):
        super().__init__(routing)
        self.original_module = original_module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if (
                "original_module" not in modules
                or "modules_to_save" not in modules
                # torch's TransformerEncoderLayer asks its attention for this one
                or (name.startswith("_") and name != "_qkv_same_embed_dim")
            ):
                raise
            return getattr(self.running_module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # tie_weights() of transformers: lm_head.weight = embed_tokens.weight
        original = self.__dict__.get("_modules", {}).get("original_module")
        if isinstance(value, nn.Parameter) and original is not None:
            setattr(original, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def running_module(self) -> nn.Module:
        """The module that forward uses now."""
        names = (
            []
            if self._disabled
            else [name for name in self._active if name in self.modules_to_save]
        )
        return self.modules_to_save[names[0]] if names else self.original_module

    @property
    def adapters(self) -> list[str]:
        return list(self.modules_to_save)

    def conflict(self, names: Iterable[str]) -> str:
        """Two whole modules do not add up."""
        present = [name for name in names if name in self.modules_to_save]
        if len(present) < 2:
            return ""
        return (
            f"Adapters {present} each have their own copy of the same module (modules_to_save): only one "
            "of them can be active at a time."
        )

    def add_adapter(self, name: str) -> None:
        """A copy of the original module for the adapter, not yet active."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(False)

    def delete_adapter(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]
            self._active = [active for active in self._active if active != name]

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        off = self.routing.disabled_copies
        off[:] = [other for other in off if other is not self] + ([] if enabled else [self])

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        if name not in self.modules_to_save:
            return {}
        return {
            f"modules_to_save.{name}.{key}": p
            for key, p in self.modules_to_save[name].named_parameters()
        }

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """For each key of the adapter's file, below this module's path, the name of its tensor; PEFT's name."""
        if adapter_name not in self.modules_to_save:
            return {}
        state = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in state}

    def without(self, adapters: Iterable[str] | None) -> nn.Module:
        """What stays in the model when this wrapper is taken out: the copy of these adapters, or the original.

        None: what runs now.
        """
        if adapters is None:
            return self.running_module
        copies = [self.modules_to_save[name] for name in adapters if name in self.modules_to_save]
        return copies[0] if copies else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.routing.names is not None and not self._disabled:
            return self._mixed_forward(*args, **kwargs)
        return self.running_module(*args, **kwargs)

    def _mixed_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Each row through its own adapter's copy, or through the original if that has none."""
        y = self.original_module(x, *args, **kwargs)
        where = type(self.original_module).__name__

        def copied(name: str, x: Tensor, y: Tensor) -> Tensor:
            if args or kwargs or not isinstance(y, Tensor):
                raise RowsError(
                    f"A {where} in modules_to_save takes or gives more than one tensor, which adapter_names=… cannot "
                    "split into rows. Run the adapters one after another."
                )
            return self.modules_to_save[name](x)

        return by_adapter(self.routing, self.adapters, x, y, copied, where)
