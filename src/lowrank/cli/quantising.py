"""What `model.quantize` and `--quantize` mean: checked together, before anything is read."""

import argparse
from typing import Literal

from lowrank.cli.settings import RunSettings, SettingsError
from lowrank.errors import listed
from lowrank.quantisation import Quantisation

FORMATS = ("none", "nf4", "fp4", "int8")
BACKENDS = ("auto", "bitsandbytes", "torchao", "lowrank")


def wanted(settings: RunSettings) -> Quantisation | None:
    """Of a run's settings. Raises SettingsError for those that go against each other, and what cannot be had here."""
    model = settings.model
    given = {name for name, origin in settings.origin.items() if origin != "default"}
    problems = []
    if model.quantize == "none":
        problems += [
            f"{name} has no meaning with model.quantize none: give --model.quantize nf4 too, or leave it out."
            for name in ("model.double_quant", "model.quantize_backend")
            if name in given
        ]
    if model.quantize == "int8" and "model.double_quant" in given and model.double_quant:
        problems.append(
            "model.double_quant is for the 4-bit formats: int8 has one scale a row. Leave it out."
        )
    if model.quantize != "none" and settings.train.method == "full":
        problems.append(
            f"train.method full trains every weight, and those of model.quantize {model.quantize} are rounded: "
            "they do not train. Choose train.method lora."
        )
    if problems:
        raise SettingsError(listed(problems))
    return of_words(model.quantize, model.quantize_backend, model.double_quant)


def of_words(format: str, backend: str, double: bool) -> Quantisation | None:
    """None for "none"."""
    from lowrank.quantised_loading import quantisation_for

    return None if format == "none" else quantisation_for(format, backend, double)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize",
        choices=("auto", *FORMATS),
        default="auto",
        help="round the base's weights while loading; auto: as the adapter was trained",
    )
    parser.add_argument(
        "--quantize-backend", "--quantize_backend", choices=BACKENDS, default="auto"
    )
    parser.add_argument(
        "--double-quant",
        "--double_quant",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="with --quantize, 4 bits: the scales in 8 bits too (yes)",
    )


def of_flags(args: argparse.Namespace) -> Quantisation | Literal["as named"] | None:
    """Of `evaluate`'s and `generate`'s flags."""
    if args.quantize == "auto":
        if args.double_quant is not None or args.quantize_backend != "auto":
            raise SettingsError(
                "--double-quant and --quantize-backend go with a --quantize nf4, fp4 or int8"
            )
        return "as named"
    return of_words(args.quantize, args.quantize_backend, args.double_quant is not False)
