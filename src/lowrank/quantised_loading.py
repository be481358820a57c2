"""A base with its weights rounded while it is loaded, tensor by tensor."""

import dataclasses
import importlib.util
from typing import Any, NamedTuple

import torch

from lowrank.bases.bitsandbytes_layers import keep_all_unpacked
from lowrank.errors import LowrankError, MissingExtraError, QuantisationError
from lowrank.quantisation import Quantisation

BLOCK_SIZE = 64  # of the 4-bit formats: what bitsandbytes takes when transformers loads a model


class Backend(NamedTuple):
    formats: tuple[str, ...]
    package: str | None  # that has to be installed


# all run on a CPU and on CUDA
BACKENDS = {
    "bitsandbytes": Backend(("nf4", "fp4", "int8"), "bitsandbytes"),
    "lowrank": Backend(("nf4", "fp4", "int8"), None),
    "torchao": Backend(("int8",), "torchao"),
}
# the first one that is installed; bitsandbytes' 8 bits round the inputs too, which no merge can do
AUTO = {
    "nf4": ("bitsandbytes", "lowrank"),
    "fp4": ("bitsandbytes", "lowrank"),
    "int8": ("lowrank",),
}
EXTRAS = {"bitsandbytes": "bnb", "torchao": "torchao"}


def quantisation_for(format: str, backend: str = "auto", double: bool = True) -> Quantisation:
    """What `model.quantize` and its two companions mean on this machine.

    double: the scales of a 4-bit format in 8 bits too; of no meaning for int8. Raises QuantisationError for a format
    that the back end does not have, MissingExtraError for one that is not installed.
    """
    if backend == "auto":
        backend = next(name for name in AUTO[format] if _here(BACKENDS[name]))
    row = BACKENDS[backend]
    others = [name for name, other in BACKENDS.items() if format in other.formats and _here(other)]
    if format not in row.formats:
        instead = f" For {format}: {' or '.join(others)}." if others else ""
        raise QuantisationError(
            f"{backend} holds {' and '.join(row.formats)} here, and no {format}.{instead}"
        )
    if not _here(row):
        raise MissingExtraError(
            f"{backend} is not installed: pip install 'lowrank[{EXTRAS[backend]}]'.\n"
            f"Without it, {format} is held by: {' or '.join(others)}."
        )
    if format == "int8":
        return Quantisation("int8", backend)
    return Quantisation(format, backend, BLOCK_SIZE, double)


def held_here(quantisation: Quantisation) -> Quantisation:
    """The same numbers, by the same back end if it is installed here, else by one that stands for them."""
    if quantisation.backend not in BACKENDS:
        raise QuantisationError(
            f"A base in 16 or 32 bits is not rounded to {quantisation} while it is loaded: only a model that is "
            f"stored so has it. Rounded while loading: {', '.join(BACKENDS)}."
        )
    ours = quantisation.block_size not in (None, BLOCK_SIZE) or not _here(BACKENDS["bitsandbytes"])
    if quantisation.backend == "bitsandbytes" and ours:
        return dataclasses.replace(quantisation, backend="lowrank")
    quantisation_for(quantisation.format, quantisation.backend)  # raises for what is missing
    return quantisation


def transformers_config(quantisation: Quantisation, compute_dtype: torch.dtype) -> Any:
    """What `from_pretrained(…, quantization_config=…)` is given for it."""
    if quantisation.backend == "lowrank":
        from lowrank.quantizer import QuantizationConfig

        return QuantizationConfig(
            quantisation.format, quantisation.double, quantisation.block_size, compute_dtype
        )
    if quantisation.backend == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if quantisation.format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantisation.format,
        bnb_4bit_use_double_quant=quantisation.double,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_quantised(
    folder: str,
    task: str,
    quantisation: Quantisation | None,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    **of_config: Any,
) -> Any:
    """The model in `folder` on `device`, each weight rounded as it is read: the float model is never whole in memory.

    quantisation: None for a folder that is stored quantised, which is loaded as it is. dtype: of what is not
    quantised, and of the products. Raises QuantisationError.
    """
    import lowrank.quantizer  # noqa: F401  # transformers then knows what is stored in our format
    from lowrank.model_folder import (
        load_config,
        load_model,
        quantised_by,
        refuse_lacking,
        without_head,
    )

    config = load_config(folder, revision)
    stored = quantised_by(config)
    options: dict[str, Any] = {"device_map": {"": device}, **of_config}
    if quantisation is not None:
        if stored is not None:
            raise QuantisationError(
                f"{folder} is stored quantised already ({stored}), and is not rounded once more.\n"
                "Leave the quantisation out, or name the base in 16 or 32 bits."
            )
        options["quantization_config"] = transformers_config(quantisation, dtype)
    try:
        loaded = load_model(folder, task, dtype=dtype, revision=revision, quantised=True, **options)
    except (LowrankError, ImportError, NotImplementedError) as error:
        if stored is None:
            raise
        cuda = "" if torch.cuda.is_available() else ", and torch sees no CUDA device here"
        raise QuantisationError(
            f"{folder} is stored quantised ({stored}) and cannot be loaded{cuda}: {error}\n"
            "Name the base in 16 or 32 bits instead, and have it rounded while it is loaded: --quantize nf4."
        ) from error
    refuse_lacking(folder, without_head(loaded.missing, task))
    keep_all_unpacked(loaded.model)
    return loaded.model


def _here(backend: Backend) -> bool:
    return backend.package is None or importlib.util.find_spec(backend.package) is not None
