"""The numbers that tasks are measured by: how each is written, and which way is better."""

from typing import NamedTuple


class MetricKind(NamedTuple):
    title: str
    format: str = ".3f"
    higher_is_better: bool = True
    over: str = (
        "{rows} evaluation rows"  # what it was taken over: a format of an Evaluation's counts
    )


ANSWERS = "answers to {answered} evaluation rows"
TOKENS = "{tokens} tokens of {rows} evaluation rows"
GREEDY = "greedy " + ANSWERS
SAMPLED = "as in training: " + ANSWERS
# by their names in run.json
METRICS = {
    "exact_match": MetricKind("exact match", ".1%", over=ANSWERS),
    "rouge_l": MetricKind("ROUGE-L", over=ANSWERS),
    "loss": MetricKind("loss", higher_is_better=False, over=TOKENS),
    "perplexity": MetricKind("perplexity", higher_is_better=False, over=TOKENS),
    "preference_accuracy": MetricKind("preference accuracy", ".1%"),
    "reward_margin": MetricKind("reward margin"),
    "chosen_loss": MetricKind("loss on the better answers", higher_is_better=False),
    "reward": MetricKind("mean reward", over=GREEDY),
    "sampled_reward": MetricKind("mean reward, sampled", over=SAMPLED),
}
