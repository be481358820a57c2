"""The data sets of Axolotl's configurations: `datasets: - path, type, field_…`."""

from collections.abc import Callable
from typing import Any

from lowrank.importing.config import Config, Unmapped
from lowrank.importing.data import DataSet, Reading, data_name, jinja, together

# the prompt that Stanford's Alpaca was trained with, and Axolotl's `type: alpaca` writes
ALPACA = (
    "{% if input is defined and input %}Below is an instruction that describes a task, paired with an input that "
    "provides further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ instruction }}\n\n### Input:\n{{ input }}\n\n### Response:\n"
    "{% else %}Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{{ instruction }}\n\n### Response:\n{% endif %}"
)
PLACE = ("path", "name", "split", "data_files", "ds_type", "type", "revision")
OWN = (
    *("field_system", "field_instruction", "field_input", "field_output", "field"),
    *("format", "no_input_format", "system_prompt", "system_format"),
)
SPOKEN = (
    *("field_messages", "message_property_mappings", "message_field_role", "field_tools"),
    *("message_field_content", "roles", "roles_to_train", "train_on_eos", "chat_template"),
    *("field_chosen", "field_rejected", "field_system", "conversation"),
)
# who may speak under which names; ShareGPT's are read, and OpenAI's
SPEAKERS = {
    "user": {"human", "user"},
    "assistant": {"gpt", "assistant", "model", "chatgpt"},
    "system": {"system"},
    "tool": {"tool", "observation", "function_response"},
}


def training_sets(value: Any, config: Config) -> dict[str, Any]:
    return together(_all(value, "datasets", config), config, lambda other: other.names)


def evaluation_sets(value: Any, config: Config) -> dict[str, Any]:
    sets = _all(value, "test_datasets", config)
    names = [name for one in sets for name in one.names]
    return {"data.eval": names[0] if len(names) == 1 else names} if names else {}


def pretraining_sets(value: Any, config: Config) -> dict[str, Any]:
    entries = [{"path": value}] if isinstance(value, str) else value
    sets = []
    for i, entry in enumerate(entries):
        column = entry.get("text_column", "text")
        reading = Reading("text", {column: "text"})
        sets.append(DataSet(_names(entry), reading, ("pretraining_dataset", i)))
    return {"train.task": "text", **together(sets, config, lambda other: other.names)}


def _all(value: Any, key: str, config: Config) -> list[DataSet]:
    sets = []
    for i, entry in enumerate(value):
        keys = (key, i)
        try:
            sets.append(DataSet(_names(entry), _reading(entry, keys, config), keys))
        except Unmapped as unmapped:
            config.miss(keys, entry.get("path"), str(unmapped))
    return sets


def _names(entry: dict[str, Any]) -> list[str]:
    files = entry.get("data_files")
    if files:
        return [files] if isinstance(files, str) else list(files)
    if entry.get("revision"):
        raise Unmapped("a revision of a data set; download it")
    return [data_name(entry["path"], entry.get("name"), entry.get("split"))]


def _reading(entry: dict[str, Any], keys: tuple[str | int, ...], config: Config) -> Reading:
    kind = entry.get("type")
    known: tuple[str, ...] = ()
    if isinstance(kind, dict):
        found = _preferred(kind, config) if config["rl"] else _custom(kind)
        learnt = found if config["rl"] else found._replace(loss_on=_loss_on(config, "completion"))
    else:
        name = str(kind or "").split(":")[0]
        base, _, style = name.partition(".")
        if config["rl"] in ("dpo", "ipo", "kto"):
            learnt, known = _pairs(base, style, entry, config), SPOKEN
        elif base in TYPES:
            learnt, known = TYPES[base](entry, config)
        else:
            raise Unmapped(f"type {kind!r}; of Axolotl's there are: {', '.join(TYPES)}, and fields")
    for key, held in entry.items():
        if key not in (*PLACE, *known) and held not in (None, False):
            matters = key not in ("trust_remote_code", "preprocess_shards")
            config.miss((*keys, key), held, "an option of data sets that lowrank has not", matters)
    return learnt


def _loss_on(config: Config, otherwise: str) -> str:
    return "all" if config["train_on_inputs"] else otherwise


def _alpaca(entry: dict[str, Any], config: Config) -> tuple[Reading, tuple[str, ...]]:
    if ":" in str(entry["type"]) or "." in str(entry["type"]):
        raise Unmapped(f"the style {entry['type']!r}; data.prompt_template can say it in Jinja")
    reading = Reading("alpaca", {}, ALPACA, False, _loss_on(config, "completion"))
    return reading, ()


def _completion(entry: dict[str, Any], config: Config) -> tuple[Reading, tuple[str, ...]]:
    return Reading("text", {entry.get("field") or "text": "text"}), ("field",)


def _sharegpt(entry: dict[str, Any], config: Config) -> tuple[Reading, tuple[str, ...]]:
    return Reading("sharegpt", loss_on=_loss_on(config, "assistant")), ("conversation",)


def _chat(entry: dict[str, Any], config: Config) -> tuple[Reading, tuple[str, ...]]:
    """Axolotl learns every turn of the assistant, unless the roles say otherwise."""
    roles = set(entry.get("roles_to_train") or ["assistant"])
    learnt = {frozenset({"assistant"}): "assistant", frozenset({"gpt"}): "assistant"}.get(
        frozenset(roles), "all" if {"user", "assistant", "system"} <= roles else None
    )
    if learnt is None:
        raise Unmapped(f"roles_to_train {sorted(roles)}; here the assistant, or all")
    if entry.get("train_on_eos") not in (None, "turn"):
        raise Unmapped(f"train_on_eos {entry['train_on_eos']}; here the end of every learnt turn")
    column = entry.get("field_messages") or "messages"
    loss_on = _loss_on(config, learnt)
    tools = {entry["field_tools"]: "tools"} if entry.get("field_tools") else {}
    if _openai(entry):
        return Reading("messages", {column: "messages", **tools}, loss_on=loss_on), SPOKEN
    return Reading("sharegpt", {column: "conversations", **tools}, loss_on=loss_on), SPOKEN


def _openai(entry: dict[str, Any]) -> bool:
    """Whether turns have role and content; False where they have from and value."""
    mapping = entry.get("message_property_mappings") or {}
    role = mapping.get("role") or entry.get("message_field_role") or "role"
    content = mapping.get("content") or entry.get("message_field_content") or "content"
    for target, names in (entry.get("roles") or {}).items():
        strange = set(names) - SPEAKERS.get(target, set())
        if strange:
            raise Unmapped(f"roles of other names: {', '.join(sorted(strange))} for {target}")
    if (role, content) not in (("role", "content"), ("from", "value")):
        raise Unmapped(f"turns with {role} and {content}; here role and content, or from and value")
    return role == "role"


def _custom(kind: dict[str, Any]) -> Reading:
    """Fields and formats of one's own, as a prompt template."""
    strange = [key for key, held in kind.items() if key not in OWN and held]
    if strange or kind.get("system_prompt"):
        raise Unmapped(f"{', '.join(strange) or 'system_prompt'}: data.prompt_template can say it")
    asked, answer = kind.get("field_instruction", "instruction"), kind.get("field_output", "output")
    given = kind.get("field_input", "input")
    names = {"instruction": asked, "input": given}
    plain = jinja(kind.get("no_input_format") or kind.get("format") or "{instruction}", names)
    full = jinja(kind.get("format") or "{instruction} {input}", names)
    template = (
        plain
        if full == plain
        else f"{{% if {given} is defined and {given} %}}{full}{{% else %}}{plain}{{% endif %}}"
    )
    return Reading("prompt-completion", {answer: "completion"}, template, False)


def _preferred(kind: dict[str, Any], config: Config) -> Reading:
    """`user_defined.default`: fields of one's own for preference training."""
    formats = {f"{name}_format": f"{{{name}}}" for name in ("prompt", "chosen", "rejected")}
    formats["completion_format"] = "{completion}"
    for key, plain in formats.items():
        if kind.get(key, plain) != plain:
            raise Unmapped(f"{key} {kind[key]!r}; rows are taken as they stand")
    wanted = ("completion", "label") if config["rl"] == "kto" else ("chosen", "rejected")
    columns = {kind.get(f"field_{name}", name): name for name in ("prompt", *wanted)}
    return Reading("kto" if config["rl"] == "kto" else "preference", columns)


# columns of the styles that Axolotl knows: chatml.intel, llama3.argilla, …
PAIRS = {
    "": {},
    "default": {},
    "ultra": {},
    "prompt_pairs": {},
    "intel": {"question": "prompt"},
    "icr": {"input": "prompt"},
    "argilla": {"instruction": "prompt", "chosen_response": "chosen"},
}


def _pairs(base: str, style: str, entry: dict[str, Any], config: Config) -> Reading:
    kto = config["rl"] == "kto"
    if base == "chat_template" and style in ("", "default") and not kto:
        column = entry.get("field_messages") or "messages"
        pair = {entry.get(f"field_{name}", name): name for name in ("chosen", "rejected")}
        _openai(entry)
        return Reading("sharegpt-preference", {column: "conversations", **pair})
    if style == "argilla_chat" and not kto:
        return Reading("chosen-rejected")
    if style not in PAIRS:
        raise Unmapped(f"type {entry.get('type')!r}; styles: {', '.join(filter(None, PAIRS))}")
    if base not in ("chat_template", "chatml", "llama3", ""):
        raise Unmapped(f"type {entry.get('type')!r}; the template {base!r}")
    if base in ("chatml", "llama3"):
        config.remark(
            f"type {entry['type']}: the tokenizer's own chat template is used here, not {base}'s"
        )
    columns = dict(PAIRS[style])
    if kto:
        return Reading(
            "kto", {theirs: ours for theirs, ours in columns.items() if ours == "prompt"}
        )
    if style == "argilla":
        columns["rejected_response"] = "rejected"
    return Reading("preference", columns)


TYPES: dict[str, Callable[[dict[str, Any], Config], tuple[Reading, tuple[str, ...]]]] = {
    "alpaca": _alpaca,
    "chat_template": _chat,
    "completion": _completion,
    "sharegpt": _sharegpt,
}
