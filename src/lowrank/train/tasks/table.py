"""What can be trained: a row for each task. Nothing heavy is imported before a task is used."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lowrank.errors import did_you_mean
from lowrank.train.data.shapes import Judged, Preference, Row
from lowrank.train.data.task_shapes import Asked, Labelled, Question, Related, Tagged


@dataclass(frozen=True)
class Task:
    """What a task takes, and how it is done. `settings` is anything with .data, .train and .eval."""

    name: str  # of the row in TASKS
    task_type: str  # LoraConfig's, and the key of transformers' class in model_folder.TASKS
    about: str
    takes: type  # which rows of train/data/shapes.py
    # (rows, tokenizer, settings, max_length=, like=) -> Encoded. like: for rows of evaluation, the model_options
    # of those of training, as far as they are known
    prepare: Callable[..., Any]
    # (Given) -> trainer.Training
    train: Callable[..., Any]
    # (model, tokenizer, data, settings) -> evaluate.Evaluation
    evaluate: Callable[..., Any]
    says: bool = True  # the loss is that of tokens, in nats
    unused: tuple[str, ...] = ()  # settings of which it makes nothing: they are refused


# settings of which some tasks alone make something
OF_PROMPTS = ("data.loss_on", "data.chat_template", "data.prompt_template", "train.packing")
OF_ANSWERS = tuple(
    f"eval.{name}"
    for name in ("max_new_tokens", "metrics", "temperature", "top_p", "top_k", "seed")
)
OF_CLASSES, OF_DECODERS, OF_SPANS = (
    ("data.problem_type",),
    ("data.max_target_length",),
    ("data.doc_stride",),
)
OF_HEADS = (*OF_CLASSES, *OF_DECODERS, *OF_SPANS)
WITHOUT_ANSWERS = (*OF_PROMPTS, *OF_ANSWERS)
# of which tasks that compare whole answers make nothing
OF_FINE_TUNING = (
    *("data.loss_on", "train.packing", *OF_HEADS),
    *(f"eval.{name}" for name in ("metrics", "temperature", "top_p", "top_k", "seed")),
)


Functions = Callable[..., Any]


def later(path: str) -> Functions:
    """The function "module:name" of this folder, imported when it is called."""
    module, _, name = path.partition(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"lowrank.train.tasks.{module}"), name)(*args, **kwargs)

    return call


def functions(module: str) -> tuple[Functions, Functions, Functions]:
    """A task's functions, of a module that has all of them."""
    return later(f"{module}:prepare"), later(f"{module}:train"), later(f"{module}:score")


TASKS = {
    task.name: task
    for task in (
        Task(
            "sft",
            "CAUSAL_LM",
            "answers to prompts",
            Row,
            later("sft:prepare"),
            later("sft:train"),
            later("sft:score"),
            unused=OF_HEADS,
        ),
        Task(
            "text",
            "CAUSAL_LM",
            "continued pretraining on text",
            Row,
            later("text:prepare"),
            later("sft:train"),
            later("text:score"),
            unused=(*OF_ANSWERS, *OF_HEADS, "data.loss_on"),
        ),
        Task(
            "sequence-classification",
            "SEQ_CLS",
            "a text's class, its classes, or a number",
            Labelled,
            *functions("classification"),
            says=False,
            unused=(*WITHOUT_ANSWERS, *OF_DECODERS, *OF_SPANS),
        ),
        Task(
            "token-classification",
            "TOKEN_CLS",
            "a tag for each word",
            Tagged,
            *functions("tagging"),
            says=False,
            unused=(*WITHOUT_ANSWERS, *OF_HEADS),
        ),
        Task(
            "question-answering",
            "QUESTION_ANS",
            "where in a text the answer stands",
            Question,
            *functions("extractive"),
            says=False,
            unused=(*WITHOUT_ANSWERS, *OF_CLASSES, *OF_DECODERS),
        ),
        Task(
            "seq2seq",
            "SEQ_2_SEQ_LM",
            "answers of an encoder-decoder model",
            Row,
            *functions("seq2seq"),
            unused=("data.loss_on", "train.packing", *OF_CLASSES, *OF_SPANS),
        ),
        Task(
            "embedding",
            "FEATURE_EXTRACTION",
            "texts that belong together, near each other",
            Related,
            *functions("embedding"),
            says=False,
            unused=(*WITHOUT_ANSWERS, *OF_HEADS),
        ),
        Task(
            "dpo",
            "CAUSAL_LM",
            "pairs of a better and a worse answer",
            Preference,
            *functions("dpo"),
            says=False,
            unused=OF_FINE_TUNING,
        ),
        Task(
            "kto",
            "CAUSAL_LM",
            "answers judged good or bad",
            Judged,
            *functions("kto"),
            says=False,
            unused=OF_FINE_TUNING,
        ),
        Task(
            "reward",
            "SEQ_CLS",
            "a model that scores answers, from pairs",
            Preference,
            *functions("reward_model"),
            says=False,
            unused=(*OF_FINE_TUNING, "eval.generate", "eval.max_new_tokens"),
        ),
        Task(
            "grpo",
            "CAUSAL_LM",
            "sampled answers that reward functions score",
            Asked,
            *functions("grpo"),
            says=False,
            unused=(
                *OF_FINE_TUNING,
                *("eval.max_new_tokens", "train.group_by_length"),
                "eval.during_training",  # it always is
            ),
        ),
    )
}
# what other tools and LoraConfig call them: suggested, never assumed
ELSEWHERE = {
    "sft": ("CAUSAL_LM", "causal_lm", "clm", "instruct", "chat", "completion"),
    "text": ("pretrain", "pretraining", "pt", "cpt", "continued-pretraining"),
    "seq2seq": ("SEQ_2_SEQ_LM", "seq2seq_lm", "summarization", "summarisation", "translation"),
    "sequence-classification": ("SEQ_CLS", "classification", "text-classification", "seq_cls"),
    "token-classification": ("TOKEN_CLS", "ner", "tagging", "token_cls"),
    "question-answering": ("QUESTION_ANS", "qa", "extractive-qa", "squad"),
    "embedding": ("FEATURE_EXTRACTION", "embeddings", "retrieval", "sentence-embedding"),
    "dpo": ("preference", "ipo"),
    "kto": ("unpaired-preference",),
    "reward": ("rm", "reward-model", "reward_model", "reward-modeling"),
    "grpo": ("rl", "rlvr", "ppo", "rloo", "reinforcement"),
}


def meant(name: str) -> str:
    """The task that another tool calls `name`, or that looks like it, in a question; empty if there is none."""
    found = next((task for task, names in ELSEWHERE.items() if name in names), None)
    return f" Did you mean {found!r}?" if found in TASKS else did_you_mean(name, TASKS)
