"""A verification and metrics as a run gives them."""

from lowrank.report.data import Metric
from lowrank.verify.result import OutputCheck, TensorCheck, Verification

METRICS = [
    Metric("exact match", 0.0, 0.965, 0.98, ".1%", True, "160 rows of the test part"),
    Metric("loss", 4.62, 0.451, None, ".3f", higher_is_better=False),
]
VERIFICATION = Verification(
    base="embedded",
    adapter="runs/lora",
    merged="runs/merged",
    task="CAUSAL_LM",
    dtype="bfloat16",
    passed=True,
    reasons=[],
    warnings=["Rounding to bfloat16 moves the outputs by 5.7% of the adapter's effect."],
    tolerance=0.1,
    outputs=OutputCheck(
        what="logits",
        source="4 examples given",
        inputs=4,
        positions=60,
        max_difference=0.172,
        mean_difference=0.02,
        rms_difference=0.0258,
        max_effect=3.37,
        mean_effect=0.338,
        effect=0.456,
        size=9.4,
        kl=1.6e-4,
        kl_effect=0.0447,
        top1_agreement=0.984,
        top1_agreement_base=0.863,
        perplexity_base=21.5,
        perplexity_adapter=2.25,
        perplexity_merged=2.26,
        perplexity_tokens=56,
    ),
    adapted=35,
    untouched=13,
    right=48,
    rounding=0.058,
    worst=[
        TensorCheck(
            name="model.layers.1.self_attn.q_proj.weight",
            dtype="bfloat16",
            role="adapted",
            error=0.0,
            present=1.003,
            moved=1.01,
            rounding=0.125,
        )
    ],
    tied_base=True,
    tied_merged=True,
)
