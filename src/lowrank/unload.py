"""Merging every adapter of a model into its base, taking that back, and leaving the plain base model."""

import inspect
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowrank.bases.kinds import quantisation_of
from lowrank.errors import MergeError
from lowrank.inject import eject
from lowrank.layer import LoraLayer
from lowrank.layer_replication import keep, restore
from lowrank.log import logger
from lowrank.saved_module import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from lowrank.trainable_tokens import TrainableTokensWrapper
from lowrank.wrappers import inner, lora_layers, mergeable, wrappers


def merge_all(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Merges the adapters (None: the active ones) in every layer. Raises MergeError with the base untouched."""
    names = None if adapter_names is None else [*dict.fromkeys(adapter_names)]
    _check_mergeable(model, names)
    before = [(layer, list(layer.merged_adapters)) for _, layer in mergeable(model)]
    pairs = _tied_layers(model)
    try:
        for path, layer in mergeable(model):
            try:
                layer.merge(adapter_names=names)
            except MergeError as error:
                raise MergeError(f"{path}: {error}") from error
    except MergeError:
        for layer, merged in before:
            if layer.merged_adapters != merged:
                layer.unmerge()
                layer.merge(adapter_names=merged)
        raise
    _keep_tied(pairs)
    _say_what_rounding_took(model)


def unmerge_all(model: nn.Module) -> None:
    """Every base weight as it was before any merge, bit for bit."""
    for _, layer in mergeable(model):
        layer.unmerge()


def unload(
    model: nn.Module,
    *,
    merge: bool,
    adapter_names: Sequence[str] | None = None,
    keep_base: bool = False,
    keep_quantised: bool = False,
) -> nn.Module:
    """`model` without adapters: with them merged into its weights, or as the base was.

    merge: the copies of saved modules that the merged adapters have stay too; else the originals do.
    keep_base: hold every unmerged weight until all layers are merged, so that a failure leaves the base
    untouched; else each is let go as its layer is done, and only what can be seen in the adapters'
    tensors is checked first.
    keep_quantised: without a merge, leave the weights that LoftQ quantised; else the originals come back.
    Layers stacked by layer_replication stay so with merge, each with tensors of its own; else the original ones
    come back. Where the input and output embeddings were tied and now differ, config.tie_word_embeddings is set to
    False. Raises MergeError if the architecture computes something else without the tie.
    """
    names = None if adapter_names is None else [*dict.fromkeys(adapter_names)]
    tied = _tied_pair(model)
    if merge:
        _check_mergeable(model, names)
        if tied and _comes_apart(model, tied, names):
            refuse_to_untie(model)
        if keep_base:
            merge_all(model, names)
        else:
            _merge_for_good(model, names)
    else:
        unmerge_all(model)
        for _, layer in () if keep_quantised else lora_layers(model):
            layer.restore_original()
    eject(model, copies_of=names if merge else ())
    keep(model) if merge else restore(model)
    if tied and not _tied_pair(model):
        _untie_the_rest(model)
    return model


def _merge_for_good(model: nn.Module, names: list[str] | None) -> None:
    pairs = _tied_layers(model)
    for done, (path, layer) in enumerate(mergeable(model)):
        try:
            layer.merge(adapter_names=names)
        except MergeError as error:
            advice = (
                " The layers before it are merged: load the base again, or use safe_merge=True."
            )
            raise MergeError(f"{path}: {error}{advice if done else ''}") from error
        layer.forget_unmerged()
    _keep_tied(pairs)
    _say_what_rounding_took(model)


def _say_what_rounding_took(model: nn.Module) -> None:
    """One line in the log after a merge into weights of few bits: what it lost, against what it was to add."""
    merged = [
        (layer.merge_loss, quantisation_of(layer.get_base_layer()))
        for _, layer in lora_layers(model)
        if layer.merge_loss is not None and layer.merged
    ]
    if merged:
        logger.warning(
            "Merged into weights in %s: rounding them took %.2g times what the adapters add (median of %d layers). To keep "
            "it all, merge into the 16-bit base (lowrank merge), or leave the adapter beside this one.",
            merged[0][1],
            statistics.median(loss for loss, _ in merged),
            len(merged),
        )


def _check_mergeable(model: nn.Module, names: list[str] | None) -> None:
    """Raises MergeError for all that can be seen before anything is changed."""
    for path, wrapper in wrappers(model):
        if wrapper.disable_adapters:
            raise MergeError("The adapters are disabled: enable_adapter_layers() before merging.")
        wanted = wrapper.active_adapters if names is None else names
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            why = wrapper.conflict(wanted)
            if why:
                raise MergeError(f"{path}: {why}")
        if isinstance(wrapper, ModulesToSaveWrapper):
            continue
        if isinstance(wrapper, LoraLayer) and not wrapper.r.keys().isdisjoint(wanted):
            why = wrapper.kind.store(wrapper.get_base_layer()).read_only
            if why:
                raise MergeError(f"{path}: {why}")
        for name in wanted:
            for key, parameter in (
                wrapper.adapter_parameters(name).items() if name in wrapper.adapters else ()
            ):
                if not torch.isfinite(parameter).all():
                    raise MergeError(
                        f"{path}.{key} has NaN or infinity in it; the base is untouched."
                    )


def _tied_layers(model: nn.Module) -> list[tuple[LoraLayer, LoraLayer]]:
    """The (embedding, head) that share a weight, and may share adapters."""
    pairs = []
    for _, head in lora_layers(model):
        leader = next((found for n in head.r if (found := head.leader(n)) is not None), None)
        if leader is not None and leader.unmerged_parameter() is head.unmerged_parameter():
            pairs.append((leader, head))
    return pairs


def _keep_tied(pairs: list[tuple[LoraLayer, LoraLayer]]) -> None:
    """Gives the heads the merged weight of their embedding, as one tensor, where the same was merged into both."""
    for embedding, head in pairs:
        names = head.merged_adapters
        if names and set(names) == set(embedding.merged_adapters) and all(map(head.leader, names)):
            merged = embedding.get_base_layer()._parameters[embedding.kind.weight]
            head.get_base_layer()._parameters[head.kind.weight] = merged


# --- tied embeddings ------------------------------------------------------------------------------


def _tied_pair(model: Any) -> set[int]:
    """The ids of the input and output embeddings, if the configuration ties them and they share one tensor.

    Adapters are seen through: of a saved module the original counts, of a merged layer the unmerged weight.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return set()
    if not config.get_text_config().tie_word_embeddings:
        return set()
    with _originals_running(model):
        try:
            pair = [model.get_input_embeddings(), model.get_output_embeddings()]
        except NotImplementedError:
            return set()
    if any(module is None for module in pair) or _storage(pair[0]) != _storage(pair[1]):
        return set()
    return {id(module) for module in pair}


@contextmanager
def _originals_running(model: nn.Module) -> Iterator[None]:
    saved = [module for _, module in wrappers(model) if isinstance(module, ModulesToSaveWrapper)]
    were_disabled = [wrapper.disable_adapters for wrapper in saved]
    for wrapper in saved:
        wrapper.enable_adapters(False)
    try:
        yield
    finally:
        for wrapper, disabled in zip(saved, were_disabled, strict=True):
            wrapper.enable_adapters(not disabled)


def _storage(module: Any) -> int:
    if isinstance(module, LoraLayer):
        weight: Any = module.original_weight()
    elif isinstance(module, TrainableTokensWrapper):
        weight = module.unmerged_weight()
    else:
        weight = inner(module).weight
    return weight.untyped_storage().data_ptr()


def _comes_apart(model: nn.Module, tied: set[int], names: list[str] | None) -> bool:
    """Whether a merge gives the tied pair different weights."""
    changed: set[int] = set()
    copies: set[int] = set()  # the weights that saved copies give the pair
    shared = 0
    for _, wrapper in wrappers(model):
        wanted = wrapper.active_adapters if names is None else names
        merged = not isinstance(wrapper, ModulesToSaveWrapper) and wrapper.merged
        if not merged and not any(name in wrapper.adapters for name in wanted):
            continue
        if (
            isinstance(wrapper, TrainableTokensWrapper)
            and {id(wrapper), id(wrapper.leader)} == tied
        ):
            return False
        if isinstance(wrapper, LoraLayer) and _alike(wrapper, tied, wanted):
            return False
        changed.add(id(wrapper))
        if isinstance(wrapper, ModulesToSaveWrapper) and id(wrapper) in tied:
            copies |= {
                id(wrapper.modules_to_save[n].weight) for n in wanted if n in wrapper.adapters
            }
            shared += 1
        if isinstance(wrapper, ModulesToSaveWrapper):
            changed |= {id(module) for module in wrapper.original_module.modules()}
    return not tied.isdisjoint(changed) and not (shared == len(tied) and len(copies) == 1)


def _alike(head: LoraLayer, tied: set[int], wanted: Sequence[str]) -> bool:
    """Whether the adapters to be merged into a head, and those already in it, are all its embedding's too."""
    names = {n for n in (*wanted, *head.merged_adapters) if n in head.r}
    leaders = {id(head.leader(name)) for name in names}
    leader = next((head.leader(name) for name in names), None)
    if leader is None or len(leaders) > 1 or {id(head), id(leader)} != tied:
        return False
    return names == {n for n in (*wanted, *leader.merged_adapters) if n in leader.r}


def refuse_to_untie(model: nn.Module) -> None:
    """Raises MergeError if the architecture computes something else without the tie."""
    if "config.tie_word_embeddings" in inspect.getsource(type(model).forward):
        raise MergeError(
            f"{type(model).__name__} ties its embeddings and its forward depends on that, so the tied pair cannot "
            "be untied for this merge. Leave the embeddings and lm_head out of the adapter, or keep it unmerged."
        )


def say_untied(model: Any) -> None:
    """Says in the configuration that the embeddings are two tensors."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _untie_the_rest(model: Any) -> None:
    """Says in the configuration that nothing is tied, and makes it so.

    transformers drops from a saved file every tensor that its class could tie, and without the tie it
    would not fill them when loading: BERT's output bias, the encoder's own embedding.
    """
    say_untied(model)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        path, _, attribute = name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        parameter = parameters.get(attribute)
        if parameter is not None and parameter is model.get_parameter(source):
            parameters[attribute] = nn.Parameter(
                parameter.detach().clone(), requires_grad=parameter.requires_grad
            )
