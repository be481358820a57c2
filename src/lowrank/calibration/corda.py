"""CorDA for a whole model: `preprocess_corda`, under PEFT's name."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lowrank.calibration.files import read_file, write_file
from lowrank.calibration.observe import (
    Place,
    SharedInputs,
    finite_rows,
    planned,
    refuse_never_called,
    undisturbed,
    watching,
)
from lowrank.config import LoraConfig
from lowrank.errors import InitDataError
from lowrank.init.corda import CordaEigens, decompose
from lowrank.init_config import CordaConfig
from lowrank.log import logger


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Leaves on each targeted layer of `model` what `get_peft_model` with this configuration starts CorDA from.

    run_model: runs the model on sample data, without padding: every position counts. hooked_model: the model
    that it runs, where that is another than `model`. Neither is needed where `lora_config.corda_config` names
    a cache_file or covariance_file that is there. Both kinds of file are written where they are not.
    Memory: (in, in) float32 (float16 with use_float16_for_covariance) for each distinct input of a layer, on
    its device; layers that share one (q, k, v) share its covariance.
    Raises InitDataError if a layer was never called, or a file is of another model; hooks and modes are always
    as they were afterwards.
    """
    options = lora_config.corda_config
    if options is None:
        raise InitDataError("preprocess_corda needs a LoraConfig with init_lora_weights='corda'.")
    places = planned(model, lora_config)
    eigens = _cached(options, places)
    if eigens is None:
        covariances = _covariances(model, lora_config, options, places, run_model, hooked_model)
        eigens = {}
        for i, (path, place) in enumerate(places.items()):
            if options.verbose:
                logger.info("corda: %d of %d, %s", i + 1, len(places), path)
            eigens[path] = _decomposed(path, place, covariances[path], options)
            if options.prune_temporary_fields:
                del covariances[path]
        if options.cache_file is not None:
            write_file(options.cache_file, _named(eigens))
    for path, place in places.items():
        device = place.kind.store(place.module).parameter.device
        found = CordaEigens(*(tensor.to(device) for tensor in eigens[path]))
        place.module.eigens = found  # type: ignore[assignment]


def _decomposed(path: str, place: Place, C: Tensor, options: CordaConfig) -> CordaEigens:
    W = place.kind.store(place.module).read()
    try:
        return decompose(W, C, place.r, options.corda_method)
    except InitDataError as error:
        raise InitDataError(f"{path}: {error}") from error


def _covariances(
    model: nn.Module,
    config: LoraConfig,
    options: CordaConfig,
    places: Mapping[str, Place],
    run_model: Callable[[], object] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    """Each layer's XXᵀ over the number of its inputs, (in, in), by path."""
    if options.covariance_file is not None:
        shapes = {path: (place.in_, place.in_) for path, place in places.items()}
        found = read_file(options.covariance_file, shapes)
        if found is not None:
            return found
    if run_model is None:
        raise InitDataError(
            "preprocess_corda needs run_model, or a cache_file or covariance_file that is there."
        )
    hooked = model if hooked_model is None else hooked_model
    watched = {path: p for path, p in planned(hooked, config).items() if path in places}
    collection = Covariances(watched, options.use_float16_for_covariance)
    with undisturbed(hooked, training=False), watching(watched, collection.see):
        run_model()
    refuse_never_called([path for path in places if not collection.count_of(path)])
    found = {path: collection.mean_of(path) for path in places}
    if not options.prune_temporary_fields:
        for path, place in places.items():
            place.module.covariance_matrix = found[path]
            place.module.sample_count = collection.count_of(path)  # type: ignore[assignment]
    if options.covariance_file is not None:
        write_file(options.covariance_file, found)
    return found


class Covariances:
    """The mean of x·xᵀ over the rows x of each distinct input."""

    def __init__(self, places: Mapping[str, Place], float16: bool):
        self.float16 = float16
        self.inputs = SharedInputs(places)
        self.mean: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def see(self, path: str, inputs: tuple[Tensor, ...]) -> None:
        if not self.inputs.is_new(path, inputs[0]):
            return
        X = finite_rows(inputs[0], path)
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        before = self.count.get(path, 0)
        self.count[path] = total = before + len(X)
        if not total:
            return
        mean = X.T @ (X / total)
        if path in self.mean:
            mean += self.mean[path].to(mean.dtype) * (before / total)
        self.mean[path] = mean.half() if self.float16 else mean

    def mean_of(self, path: str) -> Tensor:
        return self.mean[self.inputs.leader[path]]

    def count_of(self, path: str) -> int:
        return self.count.get(self.inputs.leader.get(path, ""), 0)


def _named(eigens: Mapping[str, CordaEigens]) -> dict[str, Tensor]:
    return {
        f"{path}.eigens.{field}": tensor
        for path, found in eigens.items()
        for field, tensor in found._asdict().items()
    }


def _cached(options: CordaConfig, places: Mapping[str, Place]) -> dict[str, CordaEigens] | None:
    if options.cache_file is None:
        return None
    shapes = {
        f"{path}.eigens.{field}": shape
        for path, place in places.items()
        for field, shape in zip(
            CordaEigens._fields,
            ((place.r,), (place.out, place.r), (place.in_, place.r)),
            strict=True,
        )
    }
    found = read_file(options.cache_file, shapes)
    if found is None:
        return None
    return {
        path: CordaEigens(*(found[f"{path}.eigens.{field}"] for field in CordaEigens._fields))
        for path in places
    }
