"""Merging every adapter of a model into its base, taking that back, and leaving the plain base model."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowrank.errors import MergeError
from lowrank.inject import eject
from lowrank.layer import LoraLayer
from lowrank.saved_module import ModulesToSaveWrapper
from lowrank.wrappers import lora_layers, wrappers


def merge_all(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Merges the adapters (None: the active ones) in every layer. Raises MergeError with the base untouched."""
    names = None if adapter_names is None else [*dict.fromkeys(adapter_names)]
    _check_mergeable(model, names)
    before = [(layer, list(layer.merged_adapters)) for _, layer in lora_layers(model)]
    try:
        for path, layer in lora_layers(model):
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


def unmerge_all(model: nn.Module) -> None:
    """Every base weight as it was before any merge, bit for bit."""
    for _, layer in lora_layers(model):
        layer.unmerge()


def unload(
    model: nn.Module,
    *,
    merge: bool,
    adapter_names: Sequence[str] | None = None,
    keep_base: bool = False,
) -> nn.Module:
    """`model` without adapters: with them merged into its weights, or as the base was.

    merge: the copies of saved modules that the merged adapters have stay too; else the originals do.
    keep_base: hold every unmerged weight until all layers are merged, so that a failure leaves the base
    untouched; else each is let go as its layer is done, and only what can be seen in the adapters'
    tensors is checked first.
    Where the input and output embeddings were tied and now differ, config.tie_word_embeddings is set to
    False. Raises MergeError if the architecture computes something else without the tie.
    """
    names = None if adapter_names is None else [*dict.fromkeys(adapter_names)]
    tied = _tied_pair(model)
    if merge:
        _check_mergeable(model, names)
        if tied and not tied.isdisjoint(_changed(model, names)) and _forward_reads_tie(model):
            raise MergeError(
                f"{type(model).__name__} ties its embeddings and its forward depends on that, so the tied pair cannot "
                "be untied for this merge. Leave the embeddings and lm_head out of the adapter, or keep it unmerged."
            )
        if keep_base:
            merge_all(model, names)
        else:
            _merge_for_good(model, names)
    else:
        unmerge_all(model)
    eject(model, copies_of=names if merge else ())
    if tied and not _tied_pair(model):
        _untie_the_rest(model)
    return model


def _merge_for_good(model: nn.Module, names: list[str] | None) -> None:
    for done, (path, layer) in enumerate(lora_layers(model)):
        try:
            layer.merge(adapter_names=names)
        except MergeError as error:
            advice = (
                " The layers before it are merged: load the base again, or use safe_merge=True."
            )
            raise MergeError(f"{path}: {error}{advice if done else ''}") from error
        layer.forget_unmerged()


def _check_mergeable(model: nn.Module, names: list[str] | None) -> None:
    """Raises MergeError for all that can be seen before anything is changed."""
    for path, wrapper in wrappers(model):
        if wrapper.disable_adapters:
            raise MergeError("The adapters are disabled: enable_adapter_layers() before merging.")
        wanted = wrapper.active_adapters if names is None else names
        if isinstance(wrapper, ModulesToSaveWrapper):
            copies = [name for name in wanted if name in wrapper.modules_to_save]
            if len(copies) > 1:
                raise MergeError(
                    f"{path}: adapters {copies} each have their own copy of this module; merge one of them."
                )
            continue
        for name in wanted:
            for key, parameter in (
                wrapper.adapter_parameters(name).items() if name in wrapper.r else ()
            ):
                if not torch.isfinite(parameter).all():
                    raise MergeError(
                        f"{path}.{key} has NaN or infinity in it; the base is untouched."
                    )


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
    if isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    weight = module.unmerged_weight() if isinstance(module, LoraLayer) else module.weight
    return weight.untyped_storage().data_ptr()


def _changed(model: nn.Module, names: list[str] | None) -> set[int]:
    """The ids of all modules whose weights a merge replaces: the wrappers, and what saved modules hold."""
    found: set[int] = set()
    for _, wrapper in wrappers(model):
        wanted = wrapper.active_adapters if names is None else names
        if isinstance(wrapper, LoraLayer):
            if wrapper.merged or any(name in wrapper.r for name in wanted):
                found.add(id(wrapper))
        elif any(name in wrapper.modules_to_save for name in wanted):
            found |= {id(wrapper), *map(id, wrapper.original_module.modules())}
    return found


def _forward_reads_tie(model: nn.Module) -> bool:
    return "config.tie_word_embeddings" in inspect.getsource(type(model).forward)


def _untie_the_rest(model: Any) -> None:
    """Says in the configuration that nothing is tied, and makes it so.

    transformers drops from a saved file every tensor that its class could tie, and without the tie it
    would not fill them when loading: BERT's output bias, the encoder's own embedding.
    """
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        path, _, attribute = name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        parameter = parameters.get(attribute)
        if parameter is not None and parameter is model.get_parameter(source):
            parameters[attribute] = nn.Parameter(
                parameter.detach().clone(), requires_grad=parameter.requires_grad
            )
