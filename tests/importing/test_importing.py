"""Configurations of other programs: what each key becomes, and that none is lost."""

import dataclasses
import json

import configurations
import pytest

from lowrank.cli.settings import known_settings, resolve
from lowrank.cli.values import check_value
from lowrank.importing import PROGRAMS, ImportingError, translate
from lowrank.importing.written import as_yaml, missed_lines

# keys that change what is learnt and have no counterpart, with their lines
LOST = {
    "axolotl": {"datasets.0.shards": 13, "neftune_noise_alpha": 35, "lora_dropuot": 36},
    "llama-factory": {"dataset.theirs": 12, "use_galore": 31},
    "trl": {},
    "mlx-lm": {"num_layers": 6, "optimizer_config.adamw.eps": 14, "lr_schedule.warmup_init": 24},
}


def config(tmp_path, text, program=None, **options):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return translate(path, program, **options)


def values(translated):
    return {m.name: m.value for m in translated.mapped.values()}


def lost(translated):
    return {row.key: int(row.where.split(":")[1]) for row in translated.missed if row.matters}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_whole_configuration(program, tmp_path):
    found = translate(configurations.write(tmp_path, program))
    assert found.program == PROGRAMS[program].title
    wanted = {
        name: value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value
        for name, value in configurations.SETTINGS[program].items()
    }
    assert values(found) == wanted
    assert lost(found) == LOST[program]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_key_is_mapped_or_listed(program, tmp_path):
    found = translate(configurations.write(tmp_path, program))
    text = as_yaml(found, found.mapped.values(), found.missed)
    for key in found.written:
        assert f"# {key}," in text or f": {key}" in text, key


@pytest.mark.parametrize("program", PROGRAMS)
def test_our_settings_reader_takes_the_translation(program, tmp_path):
    found = translate(configurations.write(tmp_path, program), model="embedded")
    known = known_settings()
    kept = [m for m in found.mapped.values() if m.name in known]
    path = tmp_path / "translated.yaml"
    path.write_text(as_yaml(found, kept, found.missed), encoding="utf-8")
    settings = resolve(path, {}, ("model.path", "data.train"))
    for entry in kept:
        assert settings[entry.name] == check_value(entry.value, known[entry.name].type)
        assert settings.origin[entry.name].startswith("translated.yaml:")


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_rule_names_settings_that_are_there(program):
    """A rename of one of ours shows here, for the rules that merely rename."""
    known = known_settings()
    for name in configurations.SETTINGS[program]:
        assert name in known


def test_secrets_are_not_shown(tmp_path):
    found = translate(configurations.write(tmp_path, "llama-factory"))
    text = "\n".join(missed_lines(found.missed))
    assert "hf_hub_token: …" in text
    assert "hf_private" not in as_yaml(found, found.mapped.values(), found.missed)


def test_the_layers_of_mlx_are_counted_from_the_end(tmp_path):
    path = configurations.write(tmp_path, "mlx-lm")
    from lowrank.embedded import model_path
    from lowrank.model_folder import load_config

    count = load_config(str(model_path())).num_hidden_layers
    found = translate(path, model="embedded")
    assert values(found)["lora.layers_to_transform"] == [count - 2, count - 1]
    assert "num_layers" not in lost(found)


MINIMAL = "base_model: a/b\nadapter: lora\nlora_r: 4\nlora_alpha: 4\nmicro_batch_size: 1\n"


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        (
            "{path: a/b, name: part, split: 'train[:9]', type: completion, field: body}",
            {"data.train": "a/b:part@train[:9]", "data.shape": "text", "data.columns": {"body": "text"}},
        ),
        (
            "{path: json, data_files: [x.json, y.json], type: sharegpt}",
            {"data.train": ["x.json", "y.json"], "data.shape": "sharegpt", "data.loss_on": "assistant"},
        ),
        (
            "{path: a/b, type: {field_instruction: q, field_input: c, field_output: a, format: 'Q: {instruction} ({input}) A:', no_input_format: 'Q: {instruction} A:'}}",
            {
                "data.train": "a/b",
                "data.shape": "prompt-completion",
                "data.columns": {"a": "completion"},
                "data.chat_template": False,
                "data.prompt_template": "{% if c is defined and c %}Q: {{ q }} ({{ c }}) A:{% else %}Q: {{ q }} A:{% endif %}",
            },
        ),
    ],
)  # fmt: skip
def test_data_sets_of_axolotl(entry, wanted, tmp_path):
    got = values(config(tmp_path, f"{MINIMAL}datasets:\n  - {entry}\n"))
    assert {name: value for name, value in got.items() if name in wanted} == wanted


def test_the_prompt_of_alpaca_in_axolotl(tmp_path):
    from lowrank.train.data.rows import read_rows

    found = values(config(tmp_path, f"{MINIMAL}datasets: [{{path: a/b, type: alpaca}}]\n"))
    assert found["data.chat_template"] is False
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"instruction": "Add.", "input": "1 2", "output": "3"}\n{"instruction": "Go.", "output": "ok"}\n'
    )
    options = {"shape": found["data.shape"], "prompt_template": found["data.prompt_template"]}
    first, second = read_rows([rows], **options)
    assert first.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert second.prompt.startswith("Below is an instruction that describes a task. Write")
    assert second.prompt.endswith("### Instruction:\nGo.\n\n### Response:\n")


def test_data_sets_that_are_read_in_two_ways(tmp_path):
    text = f"{MINIMAL}datasets: [{{path: a/b, type: sharegpt}}, {{path: c/d, type: completion}}]\n"
    found = config(tmp_path, text)
    assert values(found)["data.train"] == "a/b"
    (row,) = [row for row in found.missed if row.matters]
    assert (row.key, row.value) == ("datasets.1", ["c/d"])
    assert "another way than those of a/b" in row.why


@pytest.mark.parametrize(
    ("text", "shape", "columns"),
    [
        ("rl: dpo\ndatasets: [{path: a/b, type: chatml.intel}]", "preference", {"question": "prompt"}),
        ("rl: dpo\ndatasets: [{path: a/b, type: {field_prompt: p}}]", "preference", {"p": "prompt"}),
        ("rl: kto\ndatasets: [{path: a/b, type: llama3.argilla}]", "kto", {"instruction": "prompt"}),
        ("rl: dpo\ndatasets: [{path: a/b, type: chat_template.default}]", "sharegpt-preference", {"messages": "conversations"}),
    ],
)  # fmt: skip
def test_preferences_of_axolotl(text, shape, columns, tmp_path):
    found = values(config(tmp_path, f"{MINIMAL}{text}\n"))
    assert found["train.task"] == text[4:7]
    assert found["data.shape"] == shape
    assert found["data.columns"] == columns


@pytest.mark.parametrize(
    ("about", "stage", "shape", "columns"),
    [
        ('"ranking": true, "columns": {"chosen": "good", "rejected": "bad"}', "dpo", "alpaca-preference", {"good": "chosen", "bad": "rejected"}),
        ('"columns": {"kto_tag": "tag"}', "kto", "kto", {"instruction": "prompt", "output": "completion", "tag": "label"}),
        ('"columns": {"prompt": "body"}', "pt", "text", {"body": "text"}),
        ('"formatting": "sharegpt", "ranking": true', "rm", "sharegpt-preference", None),
    ],
)  # fmt: skip
def test_descriptions_of_llama_factory(about, stage, shape, columns, tmp_path):
    (tmp_path / "dataset_info.json").write_text(f'{{"mine": {{"file_name": "x.json", {about}}}}}')
    text = f"stage: {stage}\nmodel_name_or_path: a/b\ndataset: mine\nfinetuning_type: lora\n"
    found = values(config(tmp_path, text))
    assert found["data.train"] == str(tmp_path / "x.json")
    assert (found["data.shape"], found.get("data.columns")) == (shape, columns)
    assert found["train.task"] == {"dpo": "dpo", "kto": "kto", "pt": "text", "rm": "reward"}[stage]


@pytest.mark.parametrize(
    ("keys", "task", "rate"),
    [
        ("packing: true", "sft", 2e-5),
        ("beta: 0.2", "dpo", 1e-6),
        ("num_generations: 4\nbeta: 0.0", "grpo", 1e-6),
        ("desirable_weight: 1.5\nbeta: 0.1", "kto", 1e-6),
        ("lora_task_type: SEQ_CLS", "reward", 1e-4),
    ],
)
def test_what_a_file_of_trl_is_for(keys, task, rate, tmp_path):
    found = config(
        tmp_path, f"model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\n{keys}\n"
    )
    assert values(found)["train.task"] == task
    assert values(found)["train.learning_rate"] == rate
    # TRL switches all dropout off for these
    assert values(found)["lora.lora_dropout"] == (0.05 if task in ("sft", "grpo") else 0.0)
    said = config(
        tmp_path,
        f"model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\n{keys}\n",
        task="dpo",
    )
    assert values(said)["train.task"] == "dpo"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.2", {"train.warmup_steps": 0}),
        ("warmup_steps: 0.1", {"train.warmup_ratio": 0.1}),
        ("max_grad_norm: 0", {"train.max_grad_norm": 1e9}),
        ("save_strategy: 'no'\nsave_steps: 5", {"train.save_steps": 1_000_000_000}),
        ("eval_strategy: epoch\neval_steps: 5", {"train.eval_steps": None}),
        ("load_best_model_at_end: true", {"train.load_best_model_at_end": True}),
        ("optim: paged_adamw_32bit", {"train.optimizer": "paged_adamw"}),
        ("use_peft: false", {"train.method": "full"}),
        ("max_steps: -1", {"train.max_steps": None}),
    ],
)
def test_arguments_that_mean_something_else(text, wanted, tmp_path):
    found = values(config(tmp_path, f"dataset_name: c/d\nmodel_name_or_path: a/b\n{text}\n", "trl"))
    assert {name: found.get(name) for name in wanted} == wanted


def test_a_total_batch_of_axolotl(tmp_path):
    found = values(config(tmp_path, f"{MINIMAL.replace('size: 1', 'size: 2')}batch_size: 12\n"))
    assert found["train.batch_size"] == 2
    assert found["train.gradient_accumulation_steps"] == 6


def test_json_and_nothing_told(tmp_path):
    path = tmp_path / "args.json"
    path.write_text('{"model_name_or_path": "a/b",\n "dataset_name": "c/d", "use_peft": true}')
    assert translate(path).mapped["data.train"].source == "dataset_name, line 2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 1\n", "tell no program"),
        ("- a\n- b\n", "expected keys and values"),
        ("a: [1\nb: 2\n", "config.yaml:2: not YAML"),
        ("", "expected keys and values"),
    ],
)
def test_what_cannot_be_read(text, words, tmp_path):
    with pytest.raises(ImportingError, match=words):
        config(tmp_path, text)
    with pytest.raises(ImportingError, match="no such file"):
        translate(tmp_path / "none.yaml")


def test_values_of_the_wrong_type_are_listed_and_nothing_breaks(tmp_path):
    found = config(tmp_path, f"{MINIMAL}datasets: 3\nwarmup_steps: many\noptimizer: muon\n")
    assert set(lost(found)) == {"datasets", "warmup_steps", "optimizer"}


@pytest.mark.interop
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "Reward", "GRPO"])
def test_every_argument_of_trl_is_known_and_its_defaults_lose_nothing(name, tmp_path):
    """A file of saved arguments holds all of them, most as TRL has them anyway."""
    trl = pytest.importorskip("trl")
    fields = dataclasses.fields(getattr(trl, f"{name}Config"))
    given = {f.name: f.default for f in fields if isinstance(f.default, str | int | float)}
    assert set(given) <= set(PROGRAMS["trl"].rules)
    arguments = {"model_name_or_path": "a/b", "dataset_name": "c/d", "use_peft": True, **given}
    if name == "Reward":
        arguments["lora_task_type"] = "SEQ_CLS"
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(arguments))
    found = translate(path, "trl")
    assert values(found)["train.task"] == name.lower()
    assert lost(found) == {}
