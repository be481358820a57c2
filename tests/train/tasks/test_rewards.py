import pytest

from lowrank.train.tasks.rewards import RewardError, last_number, reward_functions, total


def rewards(names, completions, **more):
    return [f(completions=completions, **more) for f in reward_functions(names)]


def test_final_numbers_are_compared_as_gsm8k_is_scored():
    said = ["So 12.\n#### 1,200", "it is 1200.0", "#### 12", "none", "10-1200 or $1,200."]
    found = rewards(["final_number"], said, answer=["9 bags\n#### 1200"] * 5)
    assert found == [[1.0, 1.0, 0.0, 0.0, 1.0]]
    assert last_number("from -3 to 10-20") == "20"
    assert last_number("-3") == "-3"


def test_rules_of_form():
    said = ["<think>a\nb</think> yes", "yes", " one two three "]
    assert rewards(["format:<think>.*</think>.*"], said, answer=[""] * 3) == [[1.0, 0.0, 0.0]]
    assert rewards(["length:2"], [*said, "a " * 5], answer=[""] * 4) == [[0.5, 1.0, 0.5, 0.0]]
    assert rewards(["exact_match"], ["a  b", "a"], answer=["a b", "b"]) == [[1.0, 0.0]]


def test_a_function_of_the_users_is_given_what_it_takes(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def vowels(completions, prompts):\n"
        "    return [len(c) + len(p) if c else None for c, p in zip(completions, prompts)]\n"
        "def everything(**columns):\n    return [float(len(columns))]\n"
        "def short(completions):\n    return [1.0]\n"
        "def nan(completions):\n    return [float('nan')] * len(completions)\n"
        "def asks(completions, level):\n    return [0.0]\n"
    )
    both = reward_functions([f"{path}:vowels", "exact_match"])
    given = {"prompts": ["ab", "c"], "answer": ["xyz", "d"], "completion_ids": [[1], []]}
    assert total(both, [0.5, 2.0], ["xyz", ""], **given) == [4.5, 0.0]
    assert rewards([f"{path}:everything"], ["a"], answer=["b"], step=3) == [[3.0]]
    with pytest.raises(RewardError, match="gave 1 numbers for 2 completions"):
        rewards([f"{path}:short"], ["a", "b"])
    with pytest.raises(RewardError, match="gave nan for 'a'"):
        rewards([f"{path}:nan"], ["a"])
    with pytest.raises(RewardError, match=r"asks for level; there are completions, answer"):
        rewards([f"{path}:asks"], ["a"], answer=["b"])
    with pytest.raises(RewardError, match=r"has no function 'vowel'.*Did you mean 'vowels'"):
        reward_functions([f"{path}:vowel"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("final_numbers", "Did you mean 'final_number'"),
        ("format:(", "no regular expression"),
        ("length:many", "a number of words"),
        ("gone.py:f", "there is no file gone.py"),
    ],
)
def test_rewards_that_there_are_not(name, why):
    with pytest.raises(RewardError, match=why):
        reward_functions([name])
