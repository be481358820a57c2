"""EVA for a whole model: `initialize_lora_eva_weights` and `get_eva_state_dict`, under PEFT's names."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank.calibration.observe import (
    PREFIX,
    Place,
    SharedInputs,
    adapted,
    finite_rows,
    planned,
    refuse_never_called,
    undisturbed,
    watching,
)
from lowrank.config import LoraConfig
from lowrank.errors import InitDataError, did_you_mean, listed
from lowrank.init import Start
from lowrank.init.eva import IncrementalSVD, directions, redistribute, similarity
from lowrank.init_config import EvaConfig
from lowrank.inject import eject
from lowrank.wrappers import lora_layers, wrappers

_PASSES = 30  # over the data, for components that do not settle

LayerInputs = Callable[[tuple[Tensor, ...], Any, str], Tensor]


def prepare_model_inputs_fn_language_modeling(
    model_input: Mapping[str, Any], peft_config: LoraConfig
) -> Tensor | None:
    """(batch, sequence) bool: the positions that count, neither padding nor masked labels; None for all.

    From `attention_mask`, and `labels` of the same shape (`eva_config.use_label_mask`). Raises
    InitDataError if the batch is no mapping.
    """
    if not isinstance(model_input, Mapping):
        raise InitDataError(
            f"the data loader gives {type(model_input).__name__}, not a mapping of the model's arguments: pass "
            "prepare_model_inputs_fn=None to use every position, and forward_fn=lambda model, batch: model(batch)."
        )
    options = peft_config.eva_config or EvaConfig()
    mask, labels = model_input.get("attention_mask"), model_input.get("labels")
    ids = model_input.get("input_ids")
    if mask is None and ids is not None:
        mask = torch.ones_like(ids)
    if mask is None:
        return None
    mask = mask.bool()
    if options.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != options.label_mask_value)
    return mask


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Tensor | tuple[Tensor, ...], model_input: Tensor | None, layer_name: str
) -> Tensor:
    """(rows, in): the layer's input at the positions of the mask `model_input`.

    An input with one row for each example, such as a pooler's, has no positions and counts whole. Raises
    InitDataError for an input of another shape: which of its rows are padding cannot be known.
    """
    x = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    if model_input is None:
        return x.reshape(-1, x.shape[-1])
    mask = model_input.to(x.device)
    if x.shape[:-1] == mask.shape:
        return x[mask]
    if x.ndim == 2 and len(x) == len(mask) and mask.shape[1:] != (1,):
        return x
    raise InitDataError(
        f"{layer_name} has an input {tuple(x.shape)} for a mask {tuple(mask.shape)}: pass "
        "prepare_layer_inputs_fn={name: function}, which returns the rows that count, (rows, in)."
    )


def _every_row(layer_input: tuple[Tensor, ...], model_input: Any, layer_name: str) -> Tensor:
    return layer_input[0].reshape(-1, layer_input[0].shape[-1])


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """For each targeted layer, by path, its A (rank, in): the leading directions of its inputs.

    The ranks add up to those of the configuration, and go to the layers whose components explain most of
    their inputs' variance (Paischer et al. 2024, §3). The data are run through the base model in eval mode,
    again from the start if need be, until every component that a layer gets has settled (`tau`).
    Memory: 4·r·rho·in floats for each distinct input; layers that share one (q, k, v) share these.

    model: with the adapter `adapter_name`, or a base model with `peft_config`. forward_fn(model, batch):
    default `model(**batch)`. prepare_model_inputs_fn(batch, peft_config) makes from a batch what
    prepare_layer_inputs_fn(inputs of the layer, that, path) gets to select the rows that count, (rows, in);
    a mapping gives some layers a function of their own, and the others count every row.
    gather_distributed_inputs: with torch.distributed, take in the rows of all processes.
    Raises InitDataError if the data span too few directions, or do not reach a layer; the model is as it was.
    """
    if hasattr(model, "peft_config"):
        configs: dict[str, LoraConfig] = model.peft_config  # type: ignore[assignment]
        config = peft_config or configs[adapter_name]
        places = adapted(model, adapter_name)
    elif peft_config is None:
        raise InitDataError("a model without adapters needs peft_config.")
    else:
        config, places = peft_config, planned(model, peft_config)
    options = config.eva_config or EvaConfig()
    functions = _by_path(prepare_layer_inputs_fn, places)
    collection = _Collection(places, options, gather_distributed_inputs)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)

    def see(path: str, inputs: tuple[Tensor, ...]) -> None:
        collection.see(path, inputs, lambda: functions[path](inputs, prepared, path))

    with torch.no_grad(), undisturbed(model, training=False), watching(places, see):
        for batch in _until_settled(dataloader, collection):
            batch = _moved(batch, device)
            prepared = (
                batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
            )
            collection.next_batch()
            forward_fn(model, batch) if forward_fn else model(**batch)
            collection.end_batch()
            if show_progress_bar and sys.stderr.isatty():
                settled = f"{len(collection.settled)} of {len(collection.svds)} inputs have settled"
                print(f"\rEVA: {settled}", end="\n" * collection.done, file=sys.stderr)
    return {
        path: directions(collection.svd(path), rank, options.whiten)
        for path, rank in collection.ranks.items()
    }


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Gives an adapter with `init_lora_weights="eva"` its start: A from the data, B zero, ranks redistributed.

    A layer that gets rank 0 loses the adapter. The configuration then names the layers that are left, and in
    rank_pattern and alpha_pattern what differs among them; with `adjust_scaling_factors` lora_alpha follows
    the rank, so that the scaling stays.
    eva_state_dict: what `get_eva_state_dict` returned; None to compute it (its arguments are passed on).
    Raises InitDataError if it does not fit the model; the model is then as it was.
    """
    config: LoraConfig | None = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        raise InitDataError(
            f"this model has no adapter named {adapter_name!r}: get_peft_model first."
        )
    if config.init_lora_weights != "eva":
        raise InitDataError(
            f"adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}, not 'eva'."
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise InitDataError("pass a dataloader, or the eva_state_dict of get_eva_state_dict.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    found = {path.removeprefix(PREFIX): A for path, A in eva_state_dict.items()}
    places = {p.removeprefix(PREFIX): place for p, place in adapted(model, adapter_name).items()}
    _check_fit(found, places)
    _give(model, adapter_name, config, found)


def _give(
    model: nn.Module, adapter_name: str, config: LoraConfig, found: Mapping[str, Tensor]
) -> None:
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    keep = {module for _, module in wrappers(model)}
    adjust = (config.eva_config or EvaConfig()).adjust_scaling_factors
    for path, layer in list(lora_layers(model)):
        if adapter_name not in layer.r:
            continue
        name = path.removeprefix(PREFIX)
        A, before = found[name], layer.r[adapter_name]
        r, lora_alpha = len(A), layer.lora_alpha[adapter_name]
        if r == 0:
            layer.delete_adapter(adapter_name)
            if not layer.r:
                keep.discard(layer)
            continue
        ratio = (r / before) ** (0.5 if config.use_rslora else 1)  # what the scaling divides by
        scaling = float(layer.scaling[adapter_name])
        if adjust:
            lora_alpha *= ratio
        else:
            scaling /= ratio
        layer.renew(adapter_name, _start(A), r=r, lora_alpha=lora_alpha, scaling=scaling)
        if r != config.r:
            rank_pattern[name] = r
        if lora_alpha != config.lora_alpha:
            alpha_pattern[name] = lora_alpha
    eject(model, keep=keep)
    configs: dict[str, LoraConfig] = model.peft_config  # type: ignore[assignment]
    configs[adapter_name] = replace(
        config,
        target_modules=[name for name, A in found.items() if len(A)],
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


def _start(A: Tensor) -> Callable[..., Start]:
    return lambda read, shape, r, scaling: Start(A.cpu(), torch.zeros(shape[0], r))


def _check_fit(found: Mapping[str, Tensor], places: Mapping[str, Place]) -> None:
    problems = [
        f"{name} is no layer of this adapter.{did_you_mean(name, places)}"
        for name in found
        if name not in places
    ]
    problems += [f"{name} is missing." for name in places if name not in found]
    problems += [
        f"{name}: A is {tuple(found[name].shape)}, the layer has {place.in_} inputs."
        for name, place in places.items()
        if name in found and (found[name].ndim != 2 or found[name].shape[1] != place.in_)
    ]
    if problems:
        raise InitDataError("eva_state_dict does not fit this model: " + listed(problems))


class _Collection:
    """The incremental SVD of each distinct input, and what the layers get of them as of now."""

    def __init__(self, places: Mapping[str, Place], options: EvaConfig, gather: bool):
        self.places, self.options, self.gather = places, options, gather
        self.most = {
            path: min(round(place.r * options.rho), place.in_) for path, place in places.items()
        }
        self.budget = sum(place.r for place in places.values())
        self.ranks = dict.fromkeys(places, 0)
        self.inputs = SharedInputs(places)
        self.svds: dict[str, IncrementalSVD] = {}
        self.before: dict[str, Tensor] = {}  # the components as the last batch left them
        self.steady: dict[
            str, Tensor
        ] = {}  # which of them the batch that was last looked at left in place
        self.settled: set[str] = set()  # inputs all of whose wanted components are steady

    def svd(self, path: str) -> IncrementalSVD:
        return self.svds[self.inputs.leader[path]]

    def see(self, path: str, inputs: tuple[Tensor, ...], rows: Callable[[], Tensor]) -> None:
        if self.inputs.leader.get(path) in self.settled:
            return
        if not self.inputs.is_new(path, inputs[0]):
            return
        x = finite_rows(rows(), path)
        if self.gather:
            x = _of_all_processes(x)
        if path not in self.svds:
            # for all layers that turn out to share this input, whatever their rank
            self.svds[path] = IncrementalSVD(x.shape[1], max(self.most.values()))
        if len(x):
            self.svds[path].update(x)

    def next_batch(self) -> None:
        self.before = {path: svd.V for path, svd in self.svds.items()}

    def end_batch(self) -> None:
        """Shares out the ranks, and finds the inputs that have settled as far as they are needed."""
        called = [path for path in self.places if path in self.inputs.leader]
        ratios = {
            path: self.svd(path).explained_variance_ratio[: self.most[path]] for path in called
        }
        self.ranks.update(redistribute(ratios, self.budget))
        for leader in self.svds.keys() - self.settled:
            V = self.svds[leader].V
            self.steady[leader] = similarity(V, self.before.get(leader, V[:0])) >= self.options.tau
        self.settled = {
            leader
            for leader in self.svds
            if self.steady[leader][: self._needed(leader, called)].all()
        }

    def _needed(self, leader: str, called: list[str]) -> int:
        return max(self.ranks[path] for path in called if self.inputs.leader[path] == leader)

    @property
    def missing(self) -> list[str]:
        return [path for path in self.places if path not in self.inputs.leader]

    @property
    def done(self) -> bool:
        return (
            not self.missing
            and sum(self.ranks.values()) == self.budget
            and len(self.settled) == len(self.svds)
        )


def _until_settled(dataloader: Iterable, collection: _Collection) -> Iterator[Any]:
    """The batches, from the start again if need be, until everything has settled."""
    for again in range(_PASSES):
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
            if collection.done:
                return
        if empty and not again:
            raise InitDataError("the dataloader is empty.")
        refuse_never_called(collection.missing)
        found = sum(collection.ranks.values())
        if found < collection.budget:
            raise InitDataError(
                f"the data span {found} directions for {collection.budget} ranks: give more data, or a smaller r."
            )
        if empty:  # an iterator that can be read once
            break
    left = [path for path in collection.svds if path not in collection.settled]
    warnings.warn(
        f"EVA: {len(left)} of {len(collection.svds)} inputs have not settled to tau={collection.options.tau}, "
        f"{left[0]} among them. Their directions are the best so far; give more data, or a smaller tau.",
        stacklevel=4,
    )


def _of_all_processes(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks, where torch.distributed runs."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    longest = int(torch.cat(counts).max())
    padded = torch.zeros(longest, x.shape[1], dtype=x.dtype, device=x.device)
    padded[: len(x)] = x
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([part[: int(n)] for part, n in zip(everyone, counts, strict=True)])


def _by_path(
    functions: LayerInputs | Mapping[str, LayerInputs] | None, places: Mapping[str, Place]
) -> dict[str, LayerInputs]:
    if not isinstance(functions, Mapping):
        return dict.fromkeys(places, functions or _every_row)
    unknown = [
        f"prepare_layer_inputs_fn: {name!r} is no targeted layer.{did_you_mean(name, places)}"
        for name in functions
        if name not in places
    ]
    if unknown:
        raise InitDataError(listed(unknown))
    return {path: functions.get(path, _every_row) for path in places}


def _moved(value: Any, device: torch.device | None) -> Any:
    """The tensors in `value` on the model's device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
