"""PEFT's names of what lowrank does not do: importable, an ancestor of nothing, and clear about it when used.

Libraries import them to ask `isinstance`, or all at once at the top of a file. Using one says that
lowrank does LoRA only.
"""

from typing import TYPE_CHECKING, Any, NoReturn

from lowrank.errors import LowrankError

_METHODS = (
    "AdaLora Adamss AdaptionPrompt BOFT Beft C3A Deft Delora FourierFT Frod Glora Gralora HRA Hira IA3 LNTuning Lily "
    "LoHa LoKr Miss OFT OSF Peanut Poly Psoft Pvera RandLora Road Shadow Shira Supertuning TinyLora TrainableTokens "
    "UniLora VBLoRA Vera WaveFT XLora"
)
_OTHERS = (
    # prompts and prefixes
    "CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder MultitaskPromptTuningConfig MultitaskPromptTuningInit "
    "PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig "
    "PromptEncoderReparameterizationType PromptLearningConfig PromptTuningConfig PromptTuningInit "
    "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    "prompt_embeddings_from_past_key_values bloom_model_postprocess_past_key_value shift_tokens_right "
    # variants of LoRA that LoraConfig refuses by name
    "ArrowConfig BdLoraConfig KasaConfig MontecloraConfig VeloraConfig create_arrow_model "
    # between methods
    "PeftMixedModel convert_to_lora save_as_lora find_kappa_target_modules LoHaLayer LoKrLayer factorization"
)


class NotLoraError(LowrankError, NotImplementedError):
    """What was called belongs to a method that lowrank does not have."""


class _Absent(type):
    """The class of the placeholders: calling one, or reading from it, says what it is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotLoraError(_text(cls))

    def __getattr__(cls, name: str) -> NoReturn:
        raise AttributeError(f"{_text(cls)} (asked for {name!r})")


def _text(cls: type) -> str:
    return f"{cls.__name__} is not LoRA, and lowrank does LoRA only: use the installed PEFT for it."


__all__ = sorted(
    [f"{method}{end}" for method in _METHODS.split() for end in ("Config", "Model")]
    + _OTHERS.split()
)
globals().update(
    {
        name: _Absent(name, (), {"__module__": __name__, "__doc__": "Not LoRA; a placeholder."})
        for name in __all__
    }
)
# diffusers' layerwise casting asks the layers which of their parts to leave out: these have none
for _layer in (name for name in __all__ if name.endswith("Layer")):
    globals()[_layer].adapter_layer_names = ()

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
