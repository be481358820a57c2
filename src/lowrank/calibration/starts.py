"""From what a calibration left on the layers to their start values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lowrank.calibration.lora_ga import GRADIENT
from lowrank.config import LoraConfig
from lowrank.errors import InitDataError, listed
from lowrank.init import Init, Start
from lowrank.init import corda as corda_start
from lowrank.init import lora_ga as lora_ga_start
from lowrank.init.corda import CordaEigens
from lowrank.init_config import LoraGAConfig
from lowrank.targets import Target, walk


class Calibration(NamedTuple):
    attribute: str  # of the layer, where it was left
    made_by: str
    fits: Callable[[Any, Target], bool]
    init: Callable[[Any, Target, nn.Module, LoraConfig], Init]


def calibrated_inits(
    model: nn.Module, config: LoraConfig, targets: Sequence[Target]
) -> dict[str, Init]:
    """For each target, by path, the initialisation with this layer's statistics bound to it; {} if it needs none.

    Raises InitDataError where the statistics are not there, or were made for another rank.
    """
    calibration = _CALIBRATIONS.get(config.init_lora_weights)
    if calibration is None:
        return {}
    modules = dict(walk(model))
    found, problems = {}, []
    for target in targets:
        module = modules[target.path]
        data = module.__dict__.get(calibration.attribute)
        if data is None:
            problems.append(f"{target.path} has no data.")
        elif not calibration.fits(data, target):
            problems.append(f"{target.path}: its data are for another shape or r than {target.r}.")
        else:
            found[target.path] = calibration.init(data, target, module, config)
    if problems:
        raise InitDataError(
            f"init_lora_weights={config.init_lora_weights!r} starts from data: run {calibration.made_by} with this "
            f"model and configuration first.\n" + listed(problems[:5])
        )
    return found


def starts_from_data(init: bool | str) -> bool:
    """Whether `init_lora_weights=init` takes out of W what only a calibration's data give."""
    return init in _CALIBRATIONS


def forget_calibration(model: nn.Module, config: LoraConfig, targets: Sequence[Target]) -> None:
    """Takes what was used off the layers."""
    calibration = _CALIBRATIONS.get(config.init_lora_weights)
    if calibration is not None:
        modules = dict(walk(model))
        for target in targets:
            modules[target.path].__dict__.pop(calibration.attribute, None)


def _corda(eigens: CordaEigens, target: Target, module: nn.Module, config: LoraConfig) -> Init:
    return lambda read, shape, r, scaling: Start(*corda_start.factors(eigens, scaling), True)


def _lora_ga(gradient: Tensor, target: Target, module: nn.Module, config: LoraConfig) -> Init:
    options = config.lora_ga_config or LoraGAConfig()
    matrix = target.kind.store(module).read_snapshot(gradient)

    def init(read: Callable[[], Tensor], shape: tuple[int, int], r: int, scaling: float) -> Start:
        A, B = lora_ga_start.factors(
            read().detach(),
            matrix,
            r,
            scaling,
            direction=options.direction,
            scale=options.scale,
            stable_gamma=options.stable_gamma,
        )
        return Start(A, B, True)

    return init


_CALIBRATIONS: dict[bool | str, Calibration] = {
    "corda": Calibration(
        "eigens",
        "preprocess_corda(model, config, run_model=…)",
        lambda eigens, t: eigens.U_WC.shape == (t.out, t.r) and eigens.V_WC.shape == (t.in_, t.r),
        _corda,
    ),
    "lora_ga": Calibration(
        GRADIENT,
        "preprocess_loraga(model, config, train_step)",
        lambda gradient, t: gradient.numel() == t.out * t.in_,
        _lora_ga,
    ),
}
