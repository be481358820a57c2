"""`Quantisation`: how the weights of a base are rounded. Values only; no tensor, no module."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lowrank.errors import ConfigError, did_you_mean

FORMATS = ("nf4", "fp4", "int8", "int4", "int3", "int2", "int1", "nf2", "fp8")
IN_BLOCKS = ("nf4", "nf2", "fp4")  # of 64 entries, unless another number is said
BACKENDS = ("lowrank", "bitsandbytes", "torchao", "hqq", "gptq", "awq")


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a base are rounded: what an adapter's file names.

    format: "nf4" (QLoRA, Dettmers et al. 2023, §3), "fp4", "int8" (LLM.int8's weights, Dettmers et al. 2022),
    "int4" and fewer, "nf2" (LoftQ's), "fp8". backend: whose bytes hold them. Two quantisations that differ in the backend alone may stand for
    the same numbers: see `rounding`. Raises ConfigError for a name that is neither.
    """

    format: str
    backend: str = "lowrank"
    block_size: int | None = (
        None  # entries that share a scale, 64 for nf4 and fp4; None: a row's share one
    )
    double: bool = False  # the scales themselves in 8 bits (QLoRA §3)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("format", self.format, FORMATS),
            ("backend", self.backend, BACKENDS),
        ):
            if value not in known:
                raise ConfigError(
                    f"A quantisation's {name} is one of {', '.join(known)}, not {value!r}."
                    f"{did_you_mean(str(value), known)}"
                )

        if self.block_size is None and self.format in IN_BLOCKS:
            object.__setattr__(self, "block_size", 64)

    @property
    def bits(self) -> int:
        """Of one entry of W, without its share of the scales."""
        return int(self.format[-1])

    @property
    def rounding(self) -> tuple[str, int | None, bool, str]:
        """What decides the numbers: two quantisations that agree in it stand for the same ones.

        lowrank's bytes are bitsandbytes'; any other back end rounds in a way of its own.
        """
        whose = "bitsandbytes" if self.backend == "lowrank" else self.backend
        return self.format, self.block_size, self.double, whose

    def __str__(self) -> str:
        """In words: "nf4 in blocks of 64, doubly quantised (bitsandbytes)"."""
        scales = "by row" if self.block_size is None else f"in blocks of {self.block_size}"
        doubly = ", doubly quantised" if self.double else ""
        return f"{self.format} {scales}{doubly} ({self.backend})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Quantisation":
        """The reverse of `to_json`. Keys of a later version are left out. Raises ConfigError."""
        known = {field.name for field in fields(cls)}
        if "format" not in values:
            raise ConfigError(f"A quantisation has to name its format; found {dict(values)!r}.")
        return cls(**{key: value for key, value in values.items() if key in known})
