"""Group relative policy optimisation (Shao et al. 2024): sampled answers, scored by reward functions."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowrank.errors import LowrankWarning
from lowrank.train.data.encode import prompt_ids
from lowrank.train.data.problems import DataError
from lowrank.train.data.render import prompt_text
from lowrank.train.data.shapes import Row
from lowrank.train.evaluate import Answer, Evaluation, answer_rows, asked_text, spread
from lowrank.train.run.trainer import Training
from lowrank.train.settings import Sections
from lowrank.train.tasks.given import Given
from lowrank.train.tasks.on_trl import LOSSES, beta_of, check_settings, train_on_trl
from lowrank.train.tasks.rewards import cannot_do_without, reward_functions, total

GENERATIONS = 8  # for each prompt, without train.num_generations
LONGEST = 256  # tokens of an answer, at most, without train.max_completion_length


@dataclass(frozen=True)
class Prompts:
    """Prompts to answer, as text, and the answers that reward functions may compare with."""

    examples: list[dict[str, str]]  # {"prompt", "answer"}; "prompt" alone where some have no answer
    rows: list[Row]
    ids: list[list[int]]  # of the prompts
    tokens: int
    longest: int
    dropped: int  # prompts that leave no room for an answer
    max_length: int  # of prompt and answer together
    max_completion_length: int
    supervised: int = 0
    truncated: int = 0
    model_options: dict[str, Any] = field(default_factory=dict)

    def parts(self, i: int, tokenizer: Any) -> list[tuple[str, list[tuple[str, bool]]]]:
        """What there is to see of `rows[i]`: nothing of a prompt is learnt."""
        return [("", [(tokenizer.decode(self.ids[i], clean_up_tokenization_spaces=False), False)])]

    @property
    def summary(self) -> str:
        return (
            f"{len(self.examples)} prompts, {self.tokens} tokens, longest {self.longest}, dropped "
            f"{self.dropped}, answers of up to {self.max_completion_length} tokens"
        )


def prepare(
    rows: Sequence[Row],
    tokenizer: Any,
    settings: Sections,
    *,
    max_length: int,
    like: dict[str, Any] | None = None,
) -> Prompts:
    """The prompts of `rows`; one that leaves no room for an answer within `max_length` is dropped.

    Raises TaskSettingsError for settings that GRPO cannot honour, RewardError, and DataError if no
    prompt stays.
    """
    train, template = settings.train, settings.data.chat_template
    answer_length = train.max_completion_length or min(LONGEST, max_length // 2)
    check_settings("grpo", settings, _problems(settings, max_length, answer_length))
    reward_functions(names_of(settings))
    asked = [row for row in rows if row.prompt is not None]
    if len(asked) < len(rows):
        raise DataError(
            f"{len(rows) - len(asked)} of {len(rows)} rows are text without a prompt, and GRPO answers prompts"
        )
    texts = [prompt_text(row.prompt, tokenizer, template, row.tools) for row in asked]
    ids = prompt_ids(texts, tokenizer, templated(tokenizer, settings))
    kept = [i for i, tokens in enumerate(ids) if 0 < len(tokens) <= max_length - answer_length]
    if not kept:
        raise DataError(
            f"none of the {len(rows)} prompts leaves room for {answer_length} tokens of an answer within "
            f"{max_length}.\nLower train.max_completion_length or shorten the prompts."
        )
    answered = check_answers([asked[i] for i in kept], settings)
    return Prompts(
        examples=[
            {"prompt": texts[i]} | ({"answer": asked[i].answer} if answered else {}) for i in kept
        ],
        rows=[asked[i] for i in kept],
        ids=[ids[i] for i in kept],
        tokens=sum(len(ids[i]) for i in kept),
        longest=max(len(ids[i]) for i in kept),
        dropped=len(rows) - len(kept),
        max_length=max_length,
        max_completion_length=answer_length,
    )


def check_answers(rows: Sequence[Row], settings: Sections) -> bool:
    """Whether all rows have an answer. Raises DataError if not, and a reward function asks for one."""
    without = [row for row in rows if not row.answer]
    asking = [name for name in names_of(settings) if cannot_do_without(name, "answer")]
    if without and asking:
        raise DataError(
            f"{len(without)} of {len(rows)} rows have no answer (the first: {without[0].where}), and "
            f"{', '.join(asking)} of train.reward_functions compares with one.\n"
            "Give the answers (completion), or rewards that need none: format:…, length:…, a function of "
            "your own without `answer`."
        )
    return not without


def _problems(settings: Sections, max_length: int, answer_length: int) -> list[str]:
    train, problems = settings.train, []
    names, weights = names_of(settings), train.reward_weights
    if not names:
        problems.append(
            "train.reward_functions is missing: what a good answer is, such as final_number or mine.py:score"
        )
    if weights is not None and len(weights) != len(names):
        problems.append(
            f"train.reward_weights has {len(weights)} numbers for {len(names)} reward functions"
        )
    group, batch = train.num_generations or GENERATIONS, train.batch_size
    rows = batch * train.gradient_accumulation_steps
    if group < 2:
        problems.append("train.num_generations 1: answers to a prompt are compared with each other")
    elif rows % group:
        problems.append(
            f"train.batch_size {batch} times gradient_accumulation_steps counts answers, and {rows} is no "
            f"multiple of train.num_generations {group}"
        )
    if train.fsdp:
        problems.append(
            "train.fsdp: TRL's GRPO does not run on FSDP2. DeepSpeed's ZeRO-3 shares the weights too "
            "(train.deepspeed)"
        )
    if answer_length >= max_length:
        problems.append(
            f"train.max_completion_length {answer_length} leaves no room for a prompt: data.max_length "
            f"{max_length} is for both"
        )
    return problems


def names_of(settings: Sections) -> list[str]:
    names = settings.train.reward_functions
    return [names] if isinstance(names, str) else names or []


def templated(tokenizer: Any, settings: Sections) -> bool:
    return settings.data.chat_template and bool(tokenizer.chat_template)


def train(given: Given) -> Training:
    """Train what is trainable in the model, in place, on answers that it samples itself.

    Its evaluations have the scores of `measure` (of `options`), or else those of `score`, and no loss.
    Warns where no step had anything to learn from, since all answers to a prompt scored alike.
    """
    model, tokenizer, settings = given.model, given.tokenizer, given.settings
    train, evaluation = settings.train, given.evaluation
    arguments = {
        "beta": beta_of("grpo", train),
        "loss_type": train.loss_type or LOSSES["grpo"][0],
        "num_generations": train.num_generations or GENERATIONS,
        "max_completion_length": given.train.max_completion_length,
        "temperature": train.temperature or 1.0,
        "reward_weights": train.reward_weights,
        "train_sampling_strategy": "random",  # TRL's own, in groups
        "num_generations_eval": 1,
    }
    options = {}
    if evaluation:
        options["measure"] = lambda: score(model, tokenizer, evaluation, settings).scores
    result = train_on_trl(
        "grpo",
        given,
        arguments=arguments,
        prompt_ids=lambda texts: prompt_ids(texts, tokenizer, templated(tokenizer, settings)),
        reward_funcs=reward_functions(names_of(settings)),
        **options,
    )
    alike = [line.get("frac_reward_zero_std") for line in result.history if "loss" in line]
    if alike and set(alike) == {1.0}:
        warnings.warn(
            "at every step all answers to a prompt had the same reward, so that nothing was learnt. Try "
            "easier prompts, other train.reward_functions, a higher train.temperature, or more "
            "train.num_generations.",
            LowrankWarning,
            stacklevel=2,
        )
    return result


def score(model: nn.Module, tokenizer: Any, data: Prompts, settings: Sections) -> Evaluation:
    """Mean reward of greedy answers, and of answers sampled as in training, to some of the prompts."""
    names, given = names_of(settings), settings.train
    functions = reward_functions(names)
    weights = given.reward_weights or [1.0] * len(names)
    asked = spread(data.rows, settings.eval.generate)
    examples = spread(data.examples, settings.eval.generate)
    named = {"prompt": "prompts"}
    columns = {named.get(name, name): [e[name] for e in examples] for name in data.examples[0]}

    def rewarded(**sampling: Any) -> tuple[list[str], list[float]]:
        texts = answer_rows(
            model,
            tokenizer,
            asked,
            max_new_tokens=data.max_completion_length,
            batch_size=settings.eval.batch_size,
            chat_template=settings.data.chat_template,
            **sampling,
        )
        return texts, total(functions, weights, texts, **columns)

    if not asked:
        return Evaluation({}, len(data.rows), 0, 0, [])
    texts, rewards = rewarded()
    with torch.random.fork_rng():
        torch.manual_seed(given.seed)
        _, sampled = rewarded(
            do_sample=True, temperature=given.temperature or 1.0, top_p=1.0, top_k=0
        )
    scores = {"reward": sum(rewards) / len(asked), "sampled_reward": sum(sampled) / len(asked)}
    full = sum(weights)
    answers = [
        Answer(asked_text(row), row.answer, text, reward >= full)
        for row, text, reward in zip(asked, texts, rewards, strict=True)
    ]
    return Evaluation(scores, len(data.rows), 0, len(asked), answers)
