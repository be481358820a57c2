"""Our quantised layers as transformers loads and saves them: `from_pretrained(…, quantization_config=…)`.

transformers reads one tensor after another, and hands each weight of a linear layer to `Quantise`, which puts a
`QuantisedLinear` in the layer's place: of the float model, one weight is in memory at a time. Names, shards, ties
and devices are transformers' business. What is saved is bitsandbytes' to the byte, and says so: anything that reads
its models reads it. Importing this module makes both classes known to transformers.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank.bases.quantised_linear import QuantisedLinear
from lowrank.quantisation import Quantisation
from lowrank.quantising import quantisable

METHOD = "lowrank"
_KEPT = "_kept_while_loading"
# what bitsandbytes' files hold of one layer, beside its bias
_SAVED = (
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "SCB",
    "weight_format",
    "weight",
)


@register_quantization_config(METHOD)
class QuantizationConfig(QuantizationConfigMixin):
    """How `from_pretrained` is to round the weights of linear layers, on any device that torch runs on.

    format: "nf4", "fp4" or "int8". double: the scales of the 4-bit formats in 8 bits too. block_size: entries that
    share a scale (None: 64; int8 has one scale a row). compute_dtype: of the products, a torch.dtype or its name
    (None: the input's). skip_modules: names of layers that stay as they are, in place of the output embedding; once
    loaded, all that did. Raises ConfigError for an unknown format.
    """

    def __init__(
        self,
        format: str = "nf4",
        double: bool = False,
        block_size: int | None = None,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        **rest: Any,  # `quant_method`, and what a later version adds
    ):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format, self.double, self.skip_modules = format, double, skip_modules
        self.block_size = (block_size or 64) if format != "int8" else None
        name = str(compute_dtype).removeprefix("torch.")
        self.compute_dtype = None if compute_dtype is None else name
        _ = self.quantisation  # a wrong format is said here

    @property
    def quantisation(self) -> Quantisation:
        return Quantisation(self.format, METHOD, self.block_size, self.double)

    def to_dict(self) -> dict[str, Any]:
        """As the model's config.json has it: in bitsandbytes' words, for the files are bitsandbytes'."""
        eight = self.format == "int8"
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": not eight,
            "load_in_8bit": eight,
            "llm_int8_skip_modules": self.skip_modules,
            "bnb_4bit_quant_type": "nf4" if eight else self.format,
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": self.compute_dtype or "float32",
            "bnb_4bit_quant_storage": "uint8",
        }


def in_our_words(stored: Mapping[str, Any]) -> dict[str, Any] | None:
    """bitsandbytes' entry in a config.json as one that has the model loaded into our layers; None for another's."""
    if stored.get("quant_method") != "bitsandbytes":
        return None
    eight = stored.get("load_in_8bit", False)
    return {
        "quant_method": METHOD,
        "format": "int8" if eight else stored.get("bnb_4bit_quant_type", "fp4"),
        "double": not eight and stored.get("bnb_4bit_use_double_quant", False),
        "compute_dtype": None if eight else stored.get("bnb_4bit_compute_dtype"),
        "skip_modules": stored.get("llm_int8_skip_modules"),
    }


class Quantise(ConversionOps):
    """A weight as it comes from the file, put into the model rounded."""

    def __init__(self, hf_quantizer: "Quantizer"):
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        *patterns: Any,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            self.hf_quantizer.install(model, name.removesuffix(".weight"), weight)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}  # it is in the model already, under the names of its codes and scales


class Restore(ConversionOps):
    """The codes and scales of one layer as they come from the file, put into the layer that waits for them.

    transformers copies it, deeply, for each layer: it holds nothing.
    """

    hf_quantizer = True  # what has one gets its tensors in the file's dtype

    def convert(
        self,
        input_dict: dict[str, Any],
        *patterns: Any,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        path = full_layer_name.removesuffix(".weight")
        layer = model.get_submodule(path)
        if not isinstance(layer, QuantisedLinear):  # the plain weight of another layer
            return input_dict
        parts = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        layer.quantisation = _stated(parts) or layer.quantisation
        made = QuantisedLinear(
            layer.in_features,
            layer.out_features,
            False,
            layer.quantisation,
            layer.compute_dtype,
            "meta",
        )
        layer.packed = made.packed  # of the right shapes, to be filled
        layer.load_state_dict(parts, strict=False, assign=True)
        keep(layer)
        if missing_keys is not None:
            missing_keys -= {f"{path}.{name}" for name in _SAVED}
        return {}


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):
    """transformers' view of it. `pre_quantized` is whether the files hold codes and scales already."""

    quantization_config: QuantizationConfig
    is_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.paths

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return self.quantization_config.quantisation.bits / 8
        return param.element_size()

    def get_quantize_ops(self) -> Quantise:
        return Quantise(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        return [WeightConverter(list(_SAVED), "weight", [Restore()])]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        which = stored_paths if self.pre_quantized else quantisable
        self.paths = set(which(model, self.quantization_config.skip_modules))
        if self.pre_quantized:  # layers that wait for their codes
            for path in self.paths:
                self.install(model, path, None)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for layer in model.modules():
            if isinstance(layer, QuantisedLinear):
                layer.packed = vars(layer).pop(_KEPT)
        # saving would undo each conversion of loading; a layer's state dict has the files' names already
        model._weight_conversions = [
            one
            for one in model._weight_conversions
            if not any(isinstance(step, Restore) for step in getattr(one, "operations", ()))
        ]
        # bitsandbytes would quantise some that we do not: those that are taken, and never called
        self.quantization_config.skip_modules = list(linear_layers(model))
        model.is_loaded_in_4bit = self.quantization_config.format != "int8"
        model.is_loaded_in_8bit = self.quantization_config.format == "int8"
        return model

    def install(self, model: Any, path: str, weight: Tensor | None) -> None:
        """A QuantisedLinear in the place of a linear layer; weight (as the file has it) None: on the meta device."""
        layer = model.get_submodule(path)
        W = layer.weight if weight is None else weight
        if isinstance(layer, Conv1D):
            W = W.T
        compute = self.quantization_config.compute_dtype
        made = QuantisedLinear.from_weight(
            W,
            layer.bias,
            self.quantization_config.quantisation,
            None if compute is None else getattr(torch, compute),
        )
        model.set_submodule(path, made.requires_grad_(False))
        keep(made)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # saving makes it a word
        for path, layer in list(model.named_modules()):
            if isinstance(layer, QuantisedLinear):
                W = layer.dequantised(dtype)
                linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(W)
                linear.register_parameter("bias", layer.bias)
                model.set_submodule(path, linear)
        return model


def _stated(parts: Mapping[str, Tensor]) -> Quantisation | None:
    """The quantisation that a layer's entry in the file names; None for int8, which has but one."""
    stated = [tensor for name, tensor in parts.items() if ".quant_state." in name]
    if not stated:
        return None
    values = json.loads(bytes(stated[0].tolist()))
    double = "weight.nested_absmax" in parts
    return Quantisation(values["quant_type"], METHOD, values["blocksize"], double)


def keep(layer: QuantisedLinear) -> None:
    """transformers makes anew the buffers that no file has, and so the scales: they are given back at the end."""
    vars(layer)[_KEPT] = layer.packed
    for held in (layer, layer.weight):  # nothing is drawn for them
        held._is_hf_initialized = True  # type: ignore[union-attr]


def linear_layers(model: nn.Module) -> Iterator[str]:
    """What bitsandbytes' layers can stand for: nn.Linear itself, and GPT-2's Conv1D."""
    for path, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            yield path


def stored_paths(model: Any, skip_modules: list[str] | None) -> Iterator[str]:
    """The layers that a stored model has quantised, by bitsandbytes' rule: all that its config does not skip."""
    skip = HfQuantizer.get_modules_to_not_convert(model, skip_modules, model._keep_in_fp32_modules)
    yield from (path for path in linear_layers(model) if should_convert_module(path, skip))
