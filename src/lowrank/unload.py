"""Merging every adapter of a model into its base, taking that back, and leaving the plain base model."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from lowrank.errors import MergeError
from lowrank.inject import eject
from lowrank.wrappers import lora_layers, wrappers


def merge_all(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Merges the adapters (None: the active ones) in every layer. Raises MergeError with the base untouched."""
    names = None if adapter_names is None else list(adapter_names)
    _check_finite(model, names)
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

    keep_base: hold every unmerged weight until all layers are merged, so that a failure leaves the base
    untouched; else each is let go as its layer is done, and only what can be seen in the adapters'
    tensors is checked first.
    Where the input and output embeddings were tied and now differ, config.tie_word_embeddings is set to
    False. Raises MergeError if the architecture computes something else without the tie.
    """
    names = None if adapter_names is None else list(adapter_names)
    was_tied = _tied(model)
    if was_tied and _unties(model, merge, names) and _forward_reads_tie(model):
        raise MergeError(
            f"{type(model).__name__} ties its embeddings and its forward depends on that, so the tied pair cannot "
            "be untied for this merge. Leave the embeddings and lm_head out of the adapter, or keep it unmerged."
        )
    if merge and keep_base:
        merge_all(model, names)
    elif merge:
        _check_finite(model, names)
        for path, layer in lora_layers(model):
            try:
                layer.merge(adapter_names=names)
            except MergeError as error:
                raise MergeError(
                    f"{path}: {error} Layers before it are merged; load the base again, or use safe_merge=True."
                ) from error
            layer.forget_unmerged()
    else:
        unmerge_all(model)
    eject(model)
    if was_tied and not _tied(model):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return model


def _check_finite(model: nn.Module, names: list[str] | None) -> None:
    for path, layer in lora_layers(model):
        for name in layer.active_adapters if names is None else names:
            if name in layer.r:
                for key, parameter in layer.adapter_parameters(name).items():
                    if not torch.isfinite(parameter).all():
                        raise MergeError(
                            f"{path}.{key} has NaN or infinity in it; the base is untouched."
                        )


def _tied(model: nn.Module) -> bool:
    """Whether the configuration ties the embeddings and they are one tensor."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return False
    if not config.get_text_config().tie_word_embeddings:
        return False
    try:
        pair = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        return False
    return all(module is not None for module in pair) and pair[0].weight is pair[1].weight


def _unties(model: nn.Module, merge: bool, names: list[str] | None) -> bool:
    """Whether unloading changes one of the pair: a saved module runs there, or an adapter is merged into it."""
    pair = [id(model.get_input_embeddings()), id(model.get_output_embeddings())]
    for _, wrapper in wrappers(model):
        if id(wrapper) in pair:
            acting = wrapper.active_adapters if names is None else names
            held = wrapper.r if hasattr(wrapper, "r") else wrapper.modules_to_save
            if any(name in held for name in acting) and (merge or not hasattr(wrapper, "r")):
                return True
    return False


def _forward_reads_tie(model: nn.Module) -> bool:
    return "config.tie_word_embeddings" in inspect.getsource(type(model).forward)
