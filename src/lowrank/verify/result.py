"""What `verify` found, and what it concludes from it: plain dataclasses and pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

TENSOR_TOLERANCE = (
    0.01  # of the adapter's change, beyond rounding: room for a sum taken in bfloat16
)
DEFAULT_TOLERANCE = 0.1  # of the adapter's effect on the outputs
NOISE = 1e-5  # of the outputs' size: differences below are float32's own, between two right models

# the weights that the change of an adapter trained on a quantised base is added to
DEQUANTISED, ORIGINAL = "dequantised", "original"
ONTO = (DEQUANTISED, ORIGINAL)


@dataclass(frozen=True)
class TensorCheck:
    """One tensor of the merged folder against its exact value W + ΔW, in float64."""

    name: str
    dtype: str
    role: str  # "adapted" (LoRA, DoRA), "saved" (whole in the adapter's file), "base" (untouched)
    # None where it cannot be told: another shape, an infinite value, no ΔW
    error: float | None  # beyond rounding, worst row, as a share of ‖ΔW‖ there
    present: float | None = None  # the share of ΔW found: 1 all of it, 0 none
    moved: float | None = None  # ‖M − W‖ / ‖ΔW‖: 0 where the base's weight still stands
    rounding: float | None = None  # ‖round(W+ΔW) − (W+ΔW)‖ / ‖ΔW‖
    problem: str = ""  # empty: right

    @property
    def missed(self) -> bool:
        """Nothing but rounding away from the base's weight: the merge left this tensor out."""
        return self.moved is not None and self.moved <= 0.05 + 1.5 * (self.rounding or 0)

    @property
    def rescaled(self) -> bool:
        """The change has the right direction and another size: M ≈ W + present·ΔW."""
        if self.moved is None or self.present is None:
            return False
        astray = self.moved**2 - self.present**2 - (self.rounding or 0) ** 2
        return abs(astray) <= 0.25 * (1 - self.present) ** 2


@dataclass(frozen=True)
class OutputCheck:
    """Merged and base+adapter on the same inputs, both computed in float32, and the base beside them."""

    what: str  # "logits", "start_logits, end_logits", "last_hidden_state"
    source: str  # where the inputs come from, in words
    inputs: int
    positions: int  # rows compared: tokens, or sequences for a classifier
    max_difference: float  # |merged − (base+adapter)|
    mean_difference: float
    rms_difference: float
    max_effect: float  # |(base+adapter) − base|: what the adapter does on these inputs
    mean_effect: float
    effect: float  # its rms
    size: float  # rms of base+adapter's own outputs
    kl: float | None = None  # KL(base+adapter ‖ merged), nats per position
    kl_effect: float | None = None  # KL(base+adapter ‖ base)
    top1_agreement: float | None = None  # share of positions with the same first choice
    top1_agreement_base: float | None = None  # the same for base+adapter and base
    perplexity_base: float | None = None
    perplexity_adapter: float | None = None  # base+adapter
    perplexity_merged: float | None = None
    perplexity_tokens: int = 0

    @property
    def relative_difference(self) -> float | None:
        """rms difference as a share of the adapter's effect; None where the effect is zero."""
        return self.rms_difference / self.effect if self.effect else None


@dataclass(frozen=True)
class Candidates:
    """What an adapter trained on a quantised base can be merged onto: both, as they would be written.

    Each `OutputCheck` has the quantised base as "base", the quantised base + adapter, which is what was trained, as
    "adapter", and the candidate as "merged".
    """

    quantisation: str  # of the base that the adapter was trained on, in words
    dtype: str  # that both are rounded to
    dequantised: OutputCheck  # what the quantised weights stand for, + ΔW
    original: OutputCheck  # the weights that were quantised, + ΔW
    original_base: float | None  # the perplexity of the original base without the adapter
    gain: float | None = (
        None  # loss of the dequantised candidate − of the original one, nats a supervised token
    )
    gain_error: float | None = None  # its standard error, over the examples
    onto: str = DEQUANTISED  # the one to write
    why: str = ""

    @property
    def by_name(self) -> dict[str, OutputCheck]:
        return {DEQUANTISED: self.dequantised, ORIGINAL: self.original}


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. `passed` is the verdict, `reasons` why not, `warnings` what to know."""

    base: str
    adapter: str
    merged: str
    task: str
    dtype: str  # of the merged folder's weights
    passed: bool
    reasons: list[str]
    warnings: list[str]
    tolerance: float  # the most that `relative_difference` may be
    outputs: OutputCheck | None
    adapted: int  # tensors that the adapter changes, also those saved whole
    untouched: int
    right: int  # tensors, of both sorts, that hold exactly what they should
    rounding: float | None  # over all adapted tensors: ‖round(W+ΔW) − (W+ΔW)‖ / ‖ΔW‖
    worst: list[TensorCheck] = field(default_factory=list)  # wrong ones first, then by rounding
    missing: list[str] = field(default_factory=list)  # tensors the merged folder lacks
    unexpected: list[str] = field(default_factory=list)  # tensors it has and its model does not
    tied_base: bool | None = None  # input and output embeddings are one tensor; None: no such pair
    tied_merged: bool | None = None
    onto: str | None = (
        None  # of a quantised base: ΔW on its weights "dequantised", or on the "original" ones
    )
    candidates: Candidates | None = None  # both of these, against the quantised base + adapter
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)


def judge_tensors(
    checks: list[TensorCheck], missing: list[str], unexpected: list[str]
) -> list[str]:
    """Why the merged folder's tensors are not those of base + adapter; empty if they are."""
    reasons = []
    if missing:
        reasons.append(f"The merged folder lacks {_names(missing)}.")
    if unexpected:
        reasons.append(f"The merged folder has {_names(unexpected)} that its model does not use.")
    wrong = {role: [c for c in checks if c.role == role and c.problem] for role in ROLES}
    adapted = [check for check in checks if check.role == "adapted"]
    if adapted and all(c.present == 0 and c.rounding == 0 and c.error == 0 for c in adapted):
        reasons.append(
            "The adapter changes nothing: every ΔW is exactly zero. Was it trained? "
            "There is nothing to verify."
        )
    if wrong["adapted"]:
        reasons.append(_about_adapted(wrong["adapted"], len(adapted)))
    if wrong["saved"]:
        names = _names([check.name for check in wrong["saved"]])
        reasons.append(f"Not what the adapter's file holds whole: {names}.")
    if wrong["base"]:
        names = _names([check.name for check in wrong["base"]])
        reasons.append(f"Not as in the base, though the adapter does not touch them: {names}.")
    return reasons


ROLES = ("adapted", "saved", "base")


def _about_adapted(wrong: list[TensorCheck], total: int) -> str:
    head = f"{len(wrong)} of {total} adapted tensors do not hold W + ΔW"
    missed = [check.name for check in wrong if check.problem and check.missed]
    if len(missed) == total:
        return f"{head}: they are the base's. Nothing was merged."
    if missed:
        return f"{head}; the adapter's change was left out in {_names(missed)}."
    present = [check.present for check in wrong if check.present is not None]
    alike = len(present) == total and max(present) - min(present) < 0.02
    if alike and all(check.rescaled for check in wrong):
        return f"{head}: each has {present[0]:.3f} times the adapter's change. Merged with another scaling?"
    if len(wrong) == total and all(abs(share) < 0.2 for share in present):
        return f"{head}: they hold some other change. Merged with another adapter?"
    return f"{head}: {_names([check.name for check in wrong])}."


def judge_outputs(
    outputs: OutputCheck, dtype: str, tolerance: float, rounding: float | None, tensors_right: bool
) -> tuple[list[str], list[str]]:
    """(reasons to fail, warnings) from the outputs, or from the rounding where outputs say nothing."""
    if not math.isfinite(outputs.size):
        return [
            f"Base + adapter gives outputs that are not finite on these {outputs.inputs} inputs, so that nothing is "
            "proven. Is the base whole?"
        ], []
    reasons, warnings = [], []
    noise = NOISE * outputs.size
    advice = "" if dtype == "float32" else " Merge in float32 to keep it: --dtype float32."
    share = outputs.relative_difference
    if outputs.effect <= noise:
        warnings.append(
            f"The adapter has no effect on these {outputs.inputs} inputs (it changes the outputs by "
            f"{outputs.effect:.1e}, their size is {outputs.size:.1e}), so comparing outputs proves nothing; "
            "the tensors are the proof. Give inputs that it was trained for (--data)."
        )
        if outputs.rms_difference > noise:
            reasons.append(
                f"The merged model's outputs differ by {outputs.rms_difference:.1e}, while the adapter "
                "changes nothing on these inputs."
            )
        elif rounding is not None and rounding > tolerance:
            reasons.append(
                f"Rounding to {dtype} costs {rounding:.1%} of the adapter's change of the weights; "
                f"the tolerance is {tolerance:.1%}.{advice}"
            )
    elif outputs.rms_difference > tolerance * outputs.effect + noise:
        assert share is not None
        cause = f", all of it by rounding to {dtype}." if tensors_right else "."
        reasons.append(
            f"On the outputs, the merged model is off by {share:.1%} of the adapter's effect{cause} "
            f"The tolerance is {tolerance:.1%}.{advice if tensors_right else ''}"
        )
    elif share is not None and share > 0.01 and outputs.rms_difference > noise and tensors_right:
        warnings.append(
            f"Rounding to {dtype} moves the outputs by {share:.1%} of the adapter's effect "
            f"(tolerance {tolerance:.1%}).{advice}"
        )
    return reasons, warnings


def judge_onto(onto: str, candidates: Candidates) -> list[str]:
    """What to know of a folder that is not what was trained: a right merge, and yet another model."""
    check = candidates.by_name[onto]
    if onto == DEQUANTISED or check.relative_difference is None:
        return []
    kept = candidates.dequantised.relative_difference or 0.0
    losses = ""
    if check.perplexity_merged and check.perplexity_adapter:
        was, here = math.log(check.perplexity_adapter), math.log(check.perplexity_merged)
        losses = (
            f" Its loss on the given rows is {here:.4f}, in training's form {was:.4f} nats a token."
        )
    return [
        f"The adapter was trained on a base quantised to {candidates.quantisation}, and this folder holds the original "
        f"weights + ΔW: its outputs differ from those of training by {check.relative_difference:.1%} of the adapter's "
        f"effect, where the dequantised weights + ΔW differ by {kept:.1%}.{losses}"
    ]


def judge_ties(
    tied_base: bool | None, tied_merged: bool | None, must_untie: bool
) -> tuple[list[str], list[str]]:
    """(reasons to fail, warnings) from whether the embeddings are one tensor."""
    if must_untie and tied_merged:
        return [
            "Input and output embeddings are one tensor in the merged folder, but the adapter changes "
            "only one of them. Untie them: tie_word_embeddings=False, with both tensors written."
        ], []
    if tied_base and tied_merged is False and not must_untie:
        return [], [
            "The base's input and output embeddings are one tensor; in the merged folder they are two "
            "equal ones, which costs memory and changes nothing else."
        ]
    return [], []


def _names(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    rest = len(names) - most
    return shown + (f" and {rest} more" if rest > 0 else "")
