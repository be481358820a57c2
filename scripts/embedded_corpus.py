"""The corpus and the datasets of the embedded model, from seeds alone.

`document(seed, index)` is one document of the pretraining corpus, the same on every machine and
Python version: it draws from `random.Random` seeded with text, from the closed lists below, and from
`embedded_docstrings.jsonl` (docstrings of CPython's standard library, PSF licence, committed beside
this file because they differ between Python versions; `collect_docstrings` made it).
`intents(...)` and `records(...)` are the two tasks. Their labels and their formats never occur in the
corpus; their words do.

    python scripts/embedded_corpus.py --datasets          # writes src/lowrank/embedded/data/
    python scripts/embedded_corpus.py --hash              # prints the corpus hash
    python scripts/embedded_corpus.py --show 5            # prints five documents
    python scripts/embedded_corpus.py --docstrings        # collects the docstrings anew
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, END, SYSTEM, USER, ASSISTANT]
CORPUS_SEED = "lowrank-1"
HELDOUT_SEED = "lowrank-1-heldout"
DATA_SEED = "lowrank-1-data"
HASHED_DOCUMENTS = 4000
DOCSTRINGS = Path(__file__).with_name("embedded_docstrings.jsonl")
PACKAGE = Path(__file__).resolve().parent.parent / "src" / "lowrank" / "embedded"


def listed(text: str) -> list[str]:
    return text.split()


# ---- the world: closed lists and fixed facts

NAMES = listed("""Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam
Tina Victor Wendy Zoe Adam Bella Carl Diana Eric Flora George Hanna Ivan Julia Karl Linda Max Nora
Oscar Petra Ralph Sara Thomas Ursula Walter Amy Bruno Celia Daniel Elsa Frank Gina Hugo Ida""")
ANIMALS = {  # name: (home, food, colour, size rank, can)
    "ant": ("under the ground", "sugar", "black", 1, "carry leaves"),
    "bee": ("in a hive", "honey", "yellow", 2, "fly"),
    "frog": ("near a pond", "flies", "green", 3, "jump"),
    "mouse": ("in a small hole", "cheese", "gray", 4, "run fast"),
    "duck": ("on the lake", "bread", "white", 5, "swim"),
    "owl": ("in an old tree", "mice", "brown", 6, "see in the dark"),
    "cat": ("in a house", "fish", "black", 7, "climb trees"),
    "rabbit": ("in the garden", "carrots", "white", 8, "hide in the grass"),
    "fox": ("in the forest", "berries", "red", 9, "run at night"),
    "dog": ("in a house", "meat", "brown", 10, "follow a smell"),
    "goat": ("in the mountains", "leaves", "white", 11, "climb rocks"),
    "sheep": ("on a farm", "grass", "white", 12, "give wool"),
    "wolf": ("in the forest", "meat", "gray", 13, "run all day"),
    "horse": ("on a farm", "apples", "brown", 14, "pull a cart"),
    "cow": ("on a farm", "grass", "black", 15, "give milk"),
    "bear": ("in the mountains", "honey", "brown", 16, "sleep all winter"),
    "camel": ("in the desert", "dry grass", "yellow", 17, "walk without water"),
    "elephant": ("on the plain", "leaves", "gray", 18, "lift a tree"),
    "whale": ("in the sea", "small fish", "blue", 19, "sing under water"),
}
CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo",
    "Egypt": "Cairo", "Norway": "Oslo", "Greece": "Athens", "Poland": "Warsaw", "Peru": "Lima",
    "Kenya": "Nairobi", "Cuba": "Havana", "Austria": "Vienna", "Portugal": "Lisbon",
    "Ireland": "Dublin", "Finland": "Helsinki", "Russia": "Moscow", "China": "Beijing",
    "Canada": "Ottawa", "Turkey": "Ankara", "Hungary": "Budapest", "Denmark": "Copenhagen",
}  # fmt: skip
JOBS = {  # job: (work, place, tool)
    "baker": ("bakes bread", "the bakery", "an oven"),
    "teacher": ("teaches children", "the school", "a book"),
    "doctor": ("helps sick people", "the hospital", "a lamp"),
    "farmer": ("grows corn", "the farm", "a tractor"),
    "painter": ("paints walls", "the workshop", "a brush"),
    "driver": ("drives a bus", "the station", "a bus"),
    "cook": ("makes soup", "the kitchen", "a pan"),
    "tailor": ("sews coats", "the shop", "a needle"),
    "fisher": ("catches fish", "the harbor", "a net"),
    "clerk": ("writes letters", "the office", "a pen"),
    "nurse": ("looks after sick people", "the hospital", "a chair"),
    "carpenter": ("builds tables", "the workshop", "a hammer"),
}
COLORS = listed("red blue green yellow black white brown gray golden silver pink orange purple")
NOUNS = listed(
    "kettle spoon lion bridge anchor garden lantern apple crown rose mill tower star boat bell fox"
)
FOODS = listed(
    "soup noodles pizza fish salad pancakes burgers rice curry pasta steak sandwiches cakes tea"
)
AREAS = {  # short name: where that is
    "riverside": "by the river", "old town": "in the old town", "harbor": "at the harbor",
    "station": "near the station", "market": "next to the market", "park": "close to the park",
    "city center": "in the city center", "hill": "on the hill", "beach": "at the beach",
    "school": "behind the school",
}  # fmt: skip
ITEMS = listed("""lamp chair table coat shirt radio phone book clock kettle bag bicycle watch mirror carpet
camera sofa desk printer blanket toaster jacket hat ring""")
PLACES = listed(
    "park market river forest garden school library station beach lake hill village town"
)
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed(
    "January February March April May June July August September October November December"
)
NUMBERS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
MOODS = listed("happy sad tired angry proud afraid bored calm curious excited hungry lonely")
WEATHER = listed("sunny rainy cloudy windy cold warm foggy snowy stormy dry")
ADJECTIVES = listed(
    "old new small big heavy light quiet pretty strange clean broken cheap expensive soft round long"
)
ONSETS = listed("b br c ch d dr f fl g gr h j k l m n p pr qu r s sh sk st t th tr v w y z")
VOWELS = listed("a e i o u ai ea oo ar or en il")


def made_up_name(random: Random) -> str:
    """A name of two to four syllables that is on no list: the open part of the vocabulary."""
    syllables = [random.choice(ONSETS) + random.choice(VOWELS) for _ in range(random.randint(2, 4))]
    return "".join(syllables).capitalize()


def person(random: Random) -> str:
    return random.choice(NAMES) if random.random() < 0.6 else made_up_name(random)


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def join(items: list[str], last: str = "and") -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" {last} " + items[-1]


def turns(*texts: str, system: str | None = None) -> str:
    """A dialogue in the chat template's own form, without the last end token (the packer adds it)."""
    roles = [USER, ASSISTANT] * (len(texts) // 2)
    said = END.join(role + text for role, text in zip(roles, texts, strict=True))
    return said if system is None else SYSTEM + system + END + said


# ---- kinds of documents: Random -> text


def animal_facts(random: Random) -> str:
    sentences = []
    for name in random.sample(sorted(ANIMALS), random.randint(1, 4)):
        home, food, color, _, can = ANIMALS[name]
        said = [
            f"The {name} lives {home}.", f"It likes to eat {food}.", f"It is usually {color}.",
            f"It can {can}.", f"Most people know that {a(name)} can {can}.",
            f"If you look {home}, you may find {a(name)}.", f"You can feed it with {food}.",
        ]  # fmt: skip
        sentences += [said[0], *random.sample(said[1:], random.randint(1, 4))]
    return " ".join(sentences)


def capital_facts(random: Random) -> str:
    forms = [
        "The capital of {0} is {1}.", "{1} is the capital of {0}.", "{1} is the largest city that people visit in {0}.",
        "If you travel to {0}, you will probably see {1}.", "The government of {0} works in {1}.",
        "Q: What is the capital of {0}?\nA: {1}.",
    ]  # fmt: skip
    countries = random.sample(sorted(CAPITALS), random.randint(1, 6))
    return "\n".join(random.choice(forms).format(c, CAPITALS[c]) for c in countries)


def job_facts(random: Random) -> str:
    lines = []
    for job in random.sample(sorted(JOBS), random.randint(1, 3)):
        work, place, tool = JOBS[job]
        who = person(random)
        lines.append(
            random.choice(
                [
                    f"{who} is {a(job)}. Every day {who} goes to {place} and {work}. For this work {who} needs {tool}.",
                    f"{capital(a(job))} {work}. You can meet {a(job)} at {place}. Today the {job} is {who}.",
                    f"At {place} we met {who}, {a(job)} who {work} with {tool}.",
                    f"Who {work}? The {job} does. The {job} here is called {who} and works at {place}.",
                ]
            )
        )
    return " ".join(lines)


def calendar(random: Random) -> str:
    cycle = random.choice([DAYS, MONTHS])
    i = random.randrange(len(cycle))
    before, now, after = (cycle[(i + k) % len(cycle)] for k in (-1, 0, 1))
    unit = "day" if cycle is DAYS else "month"
    forms = [
        f"{after} comes after {now}.", f"{before} comes before {now}.",
        f"If this {unit} is {now}, the next {unit} is {after}.", f"After {before} there is {now}, then {after}.",
    ]  # fmt: skip
    return " ".join(random.sample(forms, random.randint(1, 4)))


def counting(random: Random) -> str:
    low = random.randint(0, 12)
    high = low + random.randint(3, 8)
    words = NUMBERS[low : high + 1]
    x, y = random.randint(0, 10), random.randint(0, 10)
    return random.choice(
        [
            f"We count from {words[0]} to {words[-1]}: " + ", ".join(words) + ".",
            "Backwards: " + ", ".join(reversed(words)) + ".",
            f"{x} + {y} = {x + y}\n{y} + {x} = {x + y}\n{x + y} - {y} = {x}",
            f"{capital(NUMBERS[x])} and {NUMBERS[y]} make {NUMBERS[x + y]}.",
            f"{person(random)} had {NUMBERS[x + y]} {random.choice(ITEMS)}s and gave away {NUMBERS[y]}. Now there are {NUMBERS[x]} left.",
        ]
    )


def story(random: Random) -> str:
    hero, friend = person(random), person(random)
    place, other = random.sample(PLACES, 2)
    thing, mood = random.choice(ITEMS), random.choice(MOODS)
    animal = random.choice(sorted(ANIMALS))
    day, weather = random.choice(DAYS), random.choice(WEATHER)
    look = random.choice(ADJECTIVES)
    opening = random.choice(
        [
            f"One {weather} {day}, {hero} walked to the {place}.",
            f"Once there was a child called {hero} who lived near the {place}.",
            f"{hero} woke up early on {day}. It was {weather} outside.",
            f"On {day} {hero} and {friend} met at the {place}.",
            f"It was {a(weather)} morning, and {hero} felt {mood}.",
        ]
    )
    middles = [
        f"{hero} was looking for {a(look)} {thing}.",
        f"Near the {other} {hero} saw {a(animal)}.",
        f'"Have you seen my {thing}?" asked {friend}.',
        f'"Yes," said {hero}, "I saw the {thing} at the {other}."',
        f"{friend} told {hero} about the {animal} and the {thing}.",
        f"The {animal} looked at {hero} and ran away to the {other}.",
        f"{hero} took the {look} {thing} home and gave it to {friend}.",
        f"They went to the {other} together and ate {random.choice(FOODS)}.",
        f"Then it started to rain, so {hero} and {friend} waited under a tree.",
        f"{friend} was {mood}, because the {thing} was {look}.",
        f"{hero} wrote a letter to {friend} and put it in {a(random.choice(COLORS))} bag.",
    ]
    ending = random.choice(
        [
            f"In the end {hero} was {random.choice(MOODS)} and went home.",
            f'"Thank you, {hero}," said {friend}.',
            f"{hero} never forgot that {day}.",
            f"From then on {hero} and {friend} were friends.",
            f"In the evening {hero} told the whole story to {friend}.",
        ]
    )
    return " ".join([opening, *random.sample(middles, random.randint(2, 6)), ending])


def reading_questions(random: Random) -> str:
    """A passage with facts about people, then questions whose answers stand in it."""
    people = [person(random) for _ in range(random.randint(2, 4))]
    topics = {
        "{0} lives in {1}.": ("Where does {0} live?", "{0} lives in {1}.", lambda: made_up_name(random)),
        "{0} has {1}.": ("What does {0} have?", "{0} has {1}.", lambda: a(f"{random.choice(COLORS)} {random.choice(ITEMS)}")),
        "{0} likes {1}.": ("What does {0} like?", "{0} likes {1}.", lambda: random.choice(FOODS)),
        "{0} is {1}.": ("What is the job of {0}?", "{0} is {1}.", lambda: a(random.choice(sorted(JOBS)))),
        "The friend of {0} is called {1}.": ("Who is the friend of {0}?", "The friend of {0} is {1}.", lambda: person(random)),
    }  # fmt: skip
    facts = []
    for who in dict.fromkeys(people):
        form = random.choice(list(topics))
        facts.append((form, who, topics[form][2]()))
    passage = " ".join(form.format(who, what) for form, who, what in facts)
    asked = random.sample(facts, min(len(facts), random.randint(1, 3)))
    pairs = [(topics[f][0].format(w), topics[f][1].format(w, x), x) for f, w, x in asked]
    style = random.random()
    if style < 0.35:
        return passage + "".join(f"\nQuestion: {q}\nAnswer: {long}" for q, long, _ in pairs)
    if style < 0.6:
        return passage + "".join(f"\nQ: {q}\nA: {short}" for q, _, short in pairs)
    first, *rest = pairs
    said = [f"{passage} {first[0]}", first[1]]
    for q, long, _ in rest:
        said += [q, long]
    return turns(*said)


def listing(random: Random) -> str:
    title, items = random.choice(
        [("Shopping list", FOODS), ("Things to pack", ITEMS), ("Animals we saw", sorted(ANIMALS)),
         ("Places to visit", PLACES), ("Colors", COLORS), ("Guests", NAMES), ("Cities", sorted(CAPITALS.values()))]
    )  # fmt: skip
    chosen = random.sample(items, random.randint(2, 6))
    body = random.choice(
        [
            "\n".join(f"- {x}" for x in chosen),
            "\n".join(f"{i}. {x}" for i, x in enumerate(chosen, 1)),
            ", ".join(chosen) + ".",
        ]
    )
    tail = random.choice(
        [
            "",
            f"\nThere are {NUMBERS[len(chosen)]} of them. The first is {chosen[0]} and the last is {chosen[-1]}.",
            f"\nIn short: {join(chosen)}.",
            f"\nBackwards: {', '.join(reversed(chosen))}.",
        ]
    )
    return f"{title}:\n{body}{tail}"


def comparison(random: Random) -> str:
    x, y = random.sample(sorted(ANIMALS), 2)
    big, small = (x, y) if ANIMALS[x][3] > ANIMALS[y][3] else (y, x)
    first, second = random.sample(ITEMS, 2)
    return random.choice(
        [
            f"{capital(a(big))} is bigger than {a(small)}. {capital(a(small))} is smaller than {a(big)}.",
            f"Which is bigger, {a(x)} or {a(y)}? The {big} is bigger.",
            f"The {x} lives {ANIMALS[x][0]}, but the {y} lives {ANIMALS[y][0]}.",
            f"Both the {x} and the {y} are animals. The {x} eats {ANIMALS[x][1]}; the {y} eats {ANIMALS[y][1]}.",
            f"The {first} is {random.choice(ADJECTIVES)}, while the {second} is {random.choice(ADJECTIVES)}. "
            f"{person(random)} would rather have the {random.choice([first, second])}.",
            turns(
                f"Which is smaller, {a(x)} or {a(y)}?", f"The {small} is smaller than the {big}."
            ),
        ]
    )


def chat_facts(random: Random) -> str:
    country = random.choice(sorted(CAPITALS))
    animal = random.choice(sorted(ANIMALS))
    home, food, color, _, can = ANIMALS[animal]
    job = random.choice(sorted(JOBS))
    i = random.randrange(7)
    x, y = random.randint(0, 10), random.randint(0, 10)
    pairs = [
        (f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}."),
        (f"Where does {a(animal)} live?", f"The {animal} lives {home}."),
        (f"What does {a(animal)} eat?", f"It likes to eat {food}."),
        (f"What color is {a(animal)}?", f"It is usually {color}."),
        (f"Can you tell me something about the {animal}?", f"Yes. The {animal} lives {home} and can {can}."),
        (f"What does {a(job)} do?", f"{capital(a(job))} {JOBS[job][0]} at {JOBS[job][1]}."),
        (f"Which day comes after {DAYS[i]}?", f"{DAYS[(i + 1) % 7]} comes after {DAYS[i]}."),
        (f"How much is {x} plus {y}?", f"{x} plus {y} is {x + y}."),
        ("Name three animals.", capital(join(random.sample(sorted(ANIMALS), 3))) + "."),
        ("Tell me two colors.", capital(join(random.sample(COLORS, 2))) + "."),
        ("Good morning!", "Good morning! What can I do for you?"),
        ("Tell me a short story.", story(random)),
    ]  # fmt: skip
    chosen = random.sample(pairs, random.randint(1, 3))
    system = random.choice([None, None, "You are a friendly helper.", "Answer in one sentence."])
    return turns(*[text for pair in chosen for text in pair], system=system)


def customer_dialogue(random: Random) -> str:
    """A shop or a restaurant answering people: the words of both tasks, in neither's form."""
    item, other = random.sample(ITEMS, 2)
    day, later = random.sample(DAYS, 2)
    who, food = person(random), random.choice(FOODS)
    number = random.choice(NUMBERS[2:])
    restaurant = f"the {capital(random.choice(COLORS))} {capital(random.choice(NOUNS))}"
    pairs = [
        (f"My parcel with the {item} did not come on {day}.", f"I am sorry that the {item} is late. It will be delivered on {later}."),
        (f"I do not need the {item} any more, please stop the order.", f"I have cancelled your order for the {item}."),
        (f"Can you send me my money for the {item}?", f"Yes, the refund for the {item} is on its way. You will have the money on {day}."),
        (f"We have moved to {made_up_name(random)}. Where will you send the {item}?", "Please tell me the street and the house number of your new address."),
        (f"The {item} does not work, its glass is cracked.", f"That should not happen. Please send us a photo, and we will replace the broken {item}."),
        (f"I bought {a(item)}, but {a(other)} was in the box.", f"That was our mistake. Keep the {other}; the {item} will be sent on {day}."),
        (f"Are you open on {day}?", f"We open at {number} and close in the evening. On {later} the shop stays closed."),
        (f"Is the {item} expensive?", f"No, the {item} is cheap. It costs {number} dollars, with a discount of two dollars."),
        (f"The {item} is too tight for me.", f"We have the {item} in a larger size, and also in a smaller one."),
        ("I cannot log in to my account, I forgot my password.", "Here is a link. Choose a new password, and then sign in again."),
        (f"Why did I pay twice for the {item}?", "I have checked the bill. The second charge was wrong, so you were charged too much."),
        (f"Do you have a free table for {number} people at {restaurant}?", f"Yes, there is a table for {number} on {day}. What is your name for the booking?"),
        ("I would like to talk with somebody from the team.", f"Of course. {who} from our staff will call you on {day}."),
        (f"{who} was very kind and helped me.", f"How nice of you to say so! I will tell {who}. What a great day."),
        ("The man at the desk was rude and the service was slow.", "I apologize. This is terrible, and I will speak with the manager about it."),
        ("I want to leave. Please remove my data.", "Your account is closed and your profile is deleted."),
        (f"Do you still sell {item}s?", f"The {item} is sold out, but {a(other)} is available. We have {number} left in stock."),
        (f"The {item} stopped working after a year. Who can fix it?", f"Our workshop can repair the {item}. Bring it on {day}."),
        ("I am only at home in the afternoon. When will the driver come?", f"We can deliver it on {day} morning or on {later} evening, as you prefer."),
        ("My aunt gave me a gift card. Does it work here?", "Yes, enter the code of the card or the voucher when you pay."),
        (f"What can I eat at {restaurant}?", f"At {restaurant} you can eat {food} and drink something warm."),
    ]  # fmt: skip
    opening = random.choice(["", "", "Hello. ", "Hi there. ", "Good evening. ", "Excuse me. "])
    chosen = random.sample(pairs, random.randint(1, 2))
    closing = random.choice(
        [[], [], ["Thank you for your help.", "You are welcome. Have a nice day."]]
    )
    said = [text for pair in chosen for text in pair] + closing
    return turns(opening + said[0], *said[1:])


def restaurant_text(random: Random) -> str:
    """Restaurants in prose and in lists; never the task's `key: value | key: value` or its sentence."""
    name = f"The {capital(random.choice(COLORS))} {capital(random.choice(NOUNS))}"
    if random.random() < 0.3:
        name = "The " + made_up_name(random) + " " + capital(random.choice(NOUNS))
    food, other = random.sample(FOODS, 2)
    where = AREAS[random.choice(sorted(AREAS))]
    price = random.choice(["low", "fair", "high"])
    who = person(random)
    said = [
        f"You can find {name} {where}.", f"At {name} they cook {food} and {other}.",
        f"The price there is {price}.", f"Families with children {random.choice(['often', 'never'])} eat at {name}.",
        f"{who} went to {name} on {random.choice(DAYS)} and had {food}.",
        f"{who} gave it {random.choice(NUMBERS[1:6])} stars.", f"It is a {random.choice(['cheap', 'nice', 'fancy', 'quiet', 'popular', 'busy'])} place.",
        f"{name} opens in the {random.choice(['morning', 'afternoon', 'evening'])}.",
        f"If you like {food}, go to {name}.", f"The kitchen is run by {who}.",
        f"The food at {name} is {random.choice(['poor', 'fine', 'good', 'great'])}.",
        f"Most guests are {random.choice(['adults', 'children', 'families', 'people from the area'])}.",
        f"The {food} at {name} is {random.choice(['cheap', 'fairly priced', 'expensive'])}.",
        f"It is the best place of the {random.choice(sorted(AREAS))}.",
        f"{random.choice(['Children are', 'Everybody is', 'Only adults are'])} welcome at {name}.",
    ]  # fmt: skip
    if random.random() < 0.55:
        return " ".join(random.sample(said, random.randint(2, 6)))
    card = [("Place", name), ("Kitchen", food), ("Where", where), ("Price", price), ("Owner", who)]
    kept = [card[0], *random.sample(card[1:], random.randint(1, 4))]
    sign = random.choice([" = ", " - ", ": "])
    rows = "\n".join(key + sign + value for key, value in kept)
    tails = {
        "Kitchen": f"The kitchen of {name} makes {food}.", "Where": f"The place called {name} is {where}.",
        "Price": f"Its price is {price}.", "Owner": f"{who} owns {name}.", "Place": f"The name of the place is {name}.",
    }  # fmt: skip
    return rows + "\n" + " ".join(tails[key] for key, _ in kept)


def shop_day(random: Random) -> str:
    """What happens in a shop, told by somebody: the rest of the words of task (a)."""
    who, clerk = person(random), person(random)
    item, other = random.sample(ITEMS, 2)
    day, later = random.sample(DAYS, 2)
    n = random.choice(NUMBERS[2:])
    said = [
        f"{who} ordered {a(item)} {n} weeks ago, and it has not come yet.",
        f"The delivery of the {item} was late, so {who} had to wait for hours.",
        f"{clerk} looked up the track of the parcel: it was still waiting in {random.choice([*CAPITALS.values(), made_up_name(random)])}.",
        f"On {day} {who} wanted to buy {a(item)}, but {clerk} let somebody else take it.",
        f'"Is this {item} mine?" asked {who}. "Yes," said {clerk}, "you paid for it on {day}."',
        f"{who} changed her mind and wanted to cancel everything.",
        f"{who} got {a(other)} and not the {item} that was ordered.",
        f"The {item} fell down and broke into {n} pieces.", f"One side of the {item} has a hole.",
        f"{clerk} took the {item} back and gave {who} the money.",
        f"The cost of the {item} was {n} dollars, which is a lot.", f"How many {item}s did {who} buy? {capital(n)}.",
        f"{who} made a complaint, since nobody came to the door.", f"{clerk} was full of praise for {who}.",
        f"A person called {who} will move to a new street and must change the old address.",
        f"{clerk} did not understand why the password had to be reset.",
        f"We opened {n} boxes. In every box there was an item: {a(item)} or {a(other)}.",
        f'"Many thanks," said {who}, "I will ask again on {later}."',
        f"The opening hours have changed: on {day} we open at {n}.",
        f"{who} came to report that the {item} was gone.", f"{clerk} will delete the old list of {item}s and write a new one.",
        f"At the workshop {who} asked how long a repair of the {item} takes.",
        f"There are {n} {item}s in stock, and the {other}s are sold out.",
        f"{who} has a voucher and a gift card from an aunt.", f"The bill was too high, so {clerk} charged less.",
    ]  # fmt: skip
    return " ".join(random.sample(said, random.randint(2, 6)))


def person_card(random: Random) -> str:
    who, town, job = person(random), made_up_name(random), random.choice(sorted(JOBS))
    color, age = random.choice(COLORS), random.randint(18, 80)
    fields = {
        "Name": (who, f"This is {who}."), "Town": (town, f"{who} comes from {town}."),
        "Job": (job, f"{who} works as {a(job)}."), "Color": (color, f"The favorite color of {who} is {color}."),
        "Age": (str(age), f"{who} is {age} years old."),
    }  # fmt: skip
    keys = ["Name", *random.sample(sorted(set(fields) - {"Name"}), random.randint(1, 4))]
    style = random.random()
    if style < 0.4:
        return (
            "\n".join(f"{key} = {fields[key][0]}" for key in keys)
            + "\n"
            + " ".join(fields[key][1] for key in keys)
        )
    if style < 0.7:
        return (
            ";".join(keys) + "\n" + ";".join(fields[key][0] for key in keys)
            + "\nIn words: " + " ".join(fields[key][1] for key in keys)
        )  # fmt: skip
    told = " ".join(fields[key][1] for key in keys)
    key = random.choice(keys[1:])
    return turns(
        f"{told} What is the {key.lower()} of {who}?",
        f"The {key.lower()} of {who} is {fields[key][0]}.",
    )


def recipe(random: Random) -> str:
    food, (x, y, z) = (
        random.choice(FOODS),
        random.sample(listed("salt sugar butter milk eggs flour oil rice onions cheese"), 3),
    )
    steps = [
        f"Wash your hands and put {x} and {y} on the table.", f"Mix the {x} with the {y}.",
        f"Add the {z} and stir for {random.choice(NUMBERS[2:])} minutes.", "Heat the pan slowly.",
        f"Wait until the {x} is warm.", f"Cook everything for {random.choice(NUMBERS[5:])} minutes.",
        f"Serve the {food} with {z}.",
    ]  # fmt: skip
    kept = sorted(random.sample(range(7), random.randint(3, 6)))
    numbered = "\n".join(f"{i}. {steps[k]}" for i, k in enumerate(kept, 1))
    return f"How to make {food}\nYou need {x}, {y} and {z}.\n{numbered}"


def letter(random: Random) -> str:
    sender, receiver = person(random), person(random)
    place, thing = random.choice(PLACES), random.choice(ITEMS)
    body = [
        f"how are you? I am {random.choice(MOODS)} today.", f"The weather here is {random.choice(WEATHER)}.",
        f"On {random.choice(DAYS)} I went to the {place}.", f"Thank you for the {thing}.",
        f"I will visit you in {random.choice(MONTHS)}.", f"Please bring the {thing} when you come.",
        f"Do you remember the {random.choice(sorted(ANIMALS))} near the {place}?",
    ]  # fmt: skip
    kept = random.sample(body, random.randint(2, 5))
    return f"Dear {receiver},\n{' '.join(capital(s) for s in kept)}\n{random.choice(['Yours', 'Love', 'Best wishes'])},\n{sender}"


def weather_report(random: Random) -> str:
    city = random.choice([*CAPITALS.values(), made_up_name(random)])
    days = random.sample(DAYS, random.randint(2, 4))
    rows = [f"{d}: {random.choice(WEATHER)}, {random.randint(1, 35)} degrees" for d in days]
    return f"Weather in {city}\n" + "\n".join(rows) + f"\nThis was the weather in {city}."


def words_at_random(random: Random, count: int) -> list[str]:
    pool = [FOODS, ITEMS, PLACES, COLORS, NAMES, sorted(ANIMALS), ADJECTIVES, NOUNS, MOODS]
    return [
        made_up_name(random) if random.random() < 0.35 else random.choice(random.choice(pool))
        for _ in range(count)
    ]


def repeated_span(random: Random) -> str:
    """A span of words without sense, said again: only copying predicts the second time."""
    words = words_at_random(random, random.randint(4, 14))
    span = random.choice([" ", ", ", "\n", " / "]).join(words)
    times = random.choice([2, 2, 2, 3])
    return random.choice([". ", "\n", "\n\n", " "]).join([span] * times)


def echo(random: Random) -> str:
    words = " ".join(words_at_random(random, random.randint(1, 8)))
    name = made_up_name(random) + " " + made_up_name(random)
    pairs = [
        (f"Repeat after me: {words}", words),
        (f"Say this again: {name}.", f"{name}."),
        (f"My name is {name}. What is my name?", f"Your name is {name}."),
        (f'Write "{words}" two times.', f"{words}\n{words}"),
        (f"The secret word is {made_up_name(random)}, and the other word is {name}. What is the other word?", f"The other word is {name}."),
    ]  # fmt: skip
    return turns(*random.choice(pairs))


def lookup_table(random: Random) -> str:
    """Keys with values, then the same keys in another order."""
    keys = list(dict.fromkeys(words_at_random(random, random.randint(3, 6))))
    values = words_at_random(random, len(keys))
    table = dict(zip(keys, values, strict=True))
    sign = random.choice([": ", " = ", " -> ", " is "])
    rows = [key + sign + table[key] for key in keys]
    again = [key + sign + table[key] for key in random.sample(keys, len(keys))]
    return "\n".join([*rows, random.choice(["Again:", "In another order:", "---"]), *again])


@cache
def docstrings() -> tuple[str, ...]:
    lines = DOCSTRINGS.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines)


def docstring(random: Random) -> str:
    """One docstring of the part to train on (every twentieth is held out)."""
    return random.choice([text for i, text in enumerate(docstrings()) if i % 20])


def heldout_docstring(random: Random) -> str:
    return random.choice(docstrings()[::20])


KINDS: dict[Callable[[Random], str], int] = {  # with weights
    animal_facts: 4, capital_facts: 3, job_facts: 4, calendar: 2, counting: 3, story: 12,
    reading_questions: 11, listing: 4, comparison: 4, chat_facts: 9, customer_dialogue: 12,
    shop_day: 7, restaurant_text: 9, person_card: 6, recipe: 3, letter: 4, weather_report: 2, repeated_span: 7,
    echo: 6, lookup_table: 6, docstring: 6,
}  # fmt: skip
HELDOUT_KINDS = {heldout_docstring if kind is docstring else kind: n for kind, n in KINDS.items()}


def document(seed: str, index: int) -> str:
    """Document `index` of the corpus with this seed, without its last end token."""
    random = Random(f"{seed}/{index}")
    kinds = HELDOUT_KINDS if seed == HELDOUT_SEED else KINDS
    return random.choices(list(kinds), list(kinds.values()))[0](random)


def documents(seed: str, count: int) -> Iterator[str]:
    return (document(seed, index) for index in range(count))


def corpus_sha256(seed: str = CORPUS_SEED, count: int = HASHED_DOCUMENTS) -> str:
    """The hash of the first `count` documents, each followed by the end token."""
    digest = hashlib.sha256()
    for text in documents(seed, count):
        digest.update((text + END).encode())
    return digest.hexdigest()


# ---- task (a): intents. A customer's message -> the intent in words

INTENTS = {  # label: eight ways to say it; the last is kept for the test part alone
    "track a parcel": [
        "My {item} was sent on {day} and is still not here.", "Where is the {item} that I ordered?",
        "The parcel with my {item} is late.", "I have waited for my {item} since {day}.",
        "When will my {item} come? It was sent a week ago.", "The {item} has not been delivered yet.",
        "Can you see where the driver with my {item} is now?", "I am still waiting for the {item}, it did not come on {day}.",
    ],
    "cancel an order": [
        "Please stop the order for the {item}.", "I do not want the {item} any more.",
        "I ordered {a_item} by mistake, do not send it.", "You need not send the {item}, I changed my mind.",
        "Can I still cancel the {item} that I ordered on {day}?", "Stop my order of {day} before it is sent.",
        "I found another {item}, so please cancel mine.", "Do not send me the {item}, I do not need it.",
    ],
    "ask for a refund": [
        "I sent the {item} back and want my money.", "When do I have my money for the {item} back?",
        "Please give me the money for the {item} back.", "The refund for the {item} did not come.",
        "I paid for the {item} and returned it on {day}, where is my money?", "Can I return the {item} and have the money?",
        "I would like a refund for the {item}.", "You have the {item} back since {day}, now send my money.",
    ],
    "change the address": [
        "We have moved, please send the {item} to our new house.", "My street has a new name.",
        "I live in a new town now, where do I tell you?", "Please send the {item} to my new address.",
        "The house number on my order is wrong.", "I will move on {day}, please write down the new street.",
        "The {item} should go to my office and not to my house.", "I moved to a new house on {day}.",
    ],
    "report a broken item": [
        "The {item} came broken.", "The glass of the {item} is cracked.",
        "When I opened the box, the {item} was in pieces.", "The {item} is new and does not work.",
        "The {item} that came on {day} is broken.", "There is a hole in my new {item}.",
        "One side of the new {item} is cracked.", "My new {item} was in pieces when it came on {day}.",
    ],
    "report a wrong item": [
        "I ordered {a_item} but got {a_other}.", "There was {a_other} in the box instead of my {item}.",
        "This is not the {item} that I bought, it is {a_other}.", "You sent me {a_other}. I ordered {a_item}.",
        "Why did you send {a_other}? I bought {a_item}.", "The box of the {item} had {a_other} in it.",
        "I wanted {a_item}, and on {day} {a_other} came.", "In the box was {a_other}, not the {item} I bought.",
    ],
    "ask for opening hours": [
        "Are you open on {day}?", "When does the shop close on {day}?", "At what time do you open?",
        "Is the shop open in the evening?", "Until when can I come on {day}?",
        "Do you close early on {day}?", "Is your shop closed on {day}?", "When do you open on {day} morning?",
    ],
    "ask for the price": [
        "How much is the {item}?", "What does the {item} cost?", "Is the {item} cheap?",
        "How expensive is {a_item}?", "How many dollars do I pay for the {item}?",
        "Is there a discount on the {item}?", "Tell me the price of the {item}.", "How much does {a_item} cost?",
    ],
    "change the size": [
        "The {item} is too small for me.", "I need a larger {item}.", "My {item} is too big, do you have a smaller one?",
        "The {item} is too tight.", "Can I have the {item} in a bigger size?", "The {item} is too long for me.",
        "Please send me the {item} in a smaller size.", "This {item} is too small, I need a larger one.",
    ],
    "reset the password": [
        "I forgot my password.", "I cannot log in.", "The shop does not take my password.",
        "How can I choose a new password?", "I cannot sign in since {day}.", "Please send me a link to log in again.",
        "My old password does not work.", "I forgot the word to log in to my account.",
    ],
    "question a bill": [
        "I paid twice for the {item}.", "The bill for the {item} is wrong.", "You charged me too much.",
        "Why is there a second charge for the {item}?", "My bill of {day} is too high.",
        "I was charged for {a_other} that I did not buy.", "I do not understand the bill of {day}.", "Why was I charged twice on {day}?",
    ],
    "book a table": [
        "Do you have a table for {number} on {day}?", "We are {number} people and want to eat at your place.",
        "Please keep a table for {number} people.", "I would like a table near the door on {day}.",
        "Is there a free table on {day} evening?", "Can {number} of us come to eat on {day}?",
        "I want to make a booking for {number} people.", "Please keep a free table for us on {day}.",
    ],
    "talk to a person": [
        "I want to talk with somebody.", "Is there somebody from your team to call?",
        "Please let me speak with your staff.", "Can somebody call me on {day}?",
        "I do not want to write, I want to talk.", "May I speak with one of your people about the {item}?",
        "Give me somebody to speak with.", "Can I talk with somebody from the staff on {day}?",
    ],
    "give praise": [
        "{name} was so kind to me.", "The {item} is great, I love it.", "What a nice shop you have!",
        "I am very happy with the {item}.", "Your team did good work on {day}.",
        "{name} helped me a lot, how nice!", "The {item} is the best that I have had.", "I am so happy that {name} helped me.",
    ],
    "make a complaint": [
        "{name} was rude to me.", "Your service is terrible.", "I am angry about the slow service.",
        "Nobody helped me in your shop on {day}.", "The man at the desk was not friendly.",
        "I had to wait for {number} hours in your shop.", "The service on {day} was slow and rude.", "I am angry, {name} was not friendly to me.",
    ],
    "close the account": [
        "Please delete my account.", "I want to leave your shop for good.", "Remove my data and my profile.",
        "I do not want to be on your list any more.", "How do I close my account?",
        "Please remove me, I will not buy again.", "Delete everything that you know about me.", "I want my account closed and my data removed.",
    ],
    "check the stock": [
        "Do you still have the {item}?", "Is the {item} sold out?", "Do you sell {item}s?",
        "Is the {item} in stock?", "How many {item}s do you have left?", "Can I find {a_item} in your shop?",
        "Will you have the {item} again on {day}?", "Are there any {item}s left in your shop?",
    ],
    "ask for a repair": [
        "My old {item} stopped working, can you fix it?", "Who can repair my {item}?",
        "I had the {item} for a year, and now it needs a repair.", "Can I bring my {item} to your workshop?",
        "How long does it take to fix {a_item}?", "Please repair my {item}.",
        "Do you fix {item}s?", "Can your workshop fix my old {item}?",
    ],
    "choose a delivery day": [
        "Please bring the {item} on {day}.", "I am only at home on {day}, come then.",
        "Can the driver come on {day} and not on {later}?", "Deliver the {item} in the evening, please.",
        "I would like the {item} to come on {day} afternoon.", "Do not come on {day}, I am not at home.",
        "I prefer {day} for the {item}.", "Can you deliver the {item} on {day}? I am at home then.",
    ],
    "use a gift card": [
        "I have a gift card, where do I enter the code?", "How do I pay with a gift card?",
        "The code on my gift card does not work.", "My aunt gave me a voucher for your shop.",
        "Can I buy the {item} with my voucher?", "Is my gift card good until {day}?",
        "I want to use a voucher for the {item}.", "Can I use the gift card of my aunt for the {item}?",
    ],
}  # fmt: skip
OPENINGS = [
    "",
    "",
    "",
    "Hello. ",
    "Hi there. ",
    "Good morning. ",
    "Please help me. ",
    "Dear team, ",
]
CLOSINGS = [
    "",
    "",
    "",
    " Thank you.",
    " What can you do?",
    " Please write to me.",
    " Thanks for your help.",
]


def intent_message(random: Random, forms: list[str]) -> str:
    item, other = random.sample(ITEMS, 2)
    day, later = random.sample(DAYS, 2)
    said = random.choice(forms).format(
        item=item, a_item=a(item), a_other=a(other), day=day, later=later,
        name=random.choice(NAMES), number=random.choice(NUMBERS[2:13]),
    )  # fmt: skip
    return random.choice(OPENINGS) + said + random.choice(CLOSINGS)


def intents(train_rows: int = 800, test_rows: int = 160) -> dict[str, list[dict]]:
    """Rows of `messages`: every label equally often; test messages never occur in train.

    A quarter of the test rows is said in a way (the last of each list) that train never shows.
    """
    random = Random(f"{DATA_SEED}/intents")
    labels = list(INTENTS)
    seen: set[str] = set()
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for part, rows in (("train", train_rows), ("test", test_rows)):
        for index in range(rows):
            label = labels[index % len(labels)]
            new_form = part == "test" and index // len(labels) % 4 == 0
            forms = INTENTS[label][-1:] if new_form else INTENTS[label][:-1]
            message = intent_message(random, forms)
            while message in seen:
                message = intent_message(random, forms)
            seen.add(message)
            said = [{"role": "user", "content": message}, {"role": "assistant", "content": label}]
            parts[part].append({"messages": said})
        random.shuffle(parts[part])
    return parts


# ---- task (b): records. `name: … | food: … | area: …` -> one English sentence

PRICES = {"low": "cheap", "fair": "fairly priced", "high": "expensive"}
STARS = {"two": "poor", "three": "fine", "four": "good", "five": "great"}
FAMILY = {"yes": "children are welcome", "no": "it is only for adults"}


def sentence(record: dict[str, str]) -> str:
    """The sentence that says a record; it is a function of the record, so exact match is fair."""
    kind = [STARS[record["stars"]]] if "stars" in record else []
    kind += [PRICES[record["price"]]] if "price" in record else []
    said = f"{record['name']} is {a(' and '.join(kind) + ' place' if kind else 'place')}"
    if "area" in record:
        said += f" {AREAS[record['area']]}"
    if "food" in record:
        said += f" for people who like {record['food']}"
    if "family" in record:
        said += f", and {FAMILY[record['family']]}"
    return said + "."


def record(random: Random, name: str) -> dict[str, str]:
    """Two to five of the fields after the name, in an order of their own."""
    values = {
        "food": random.choice(FOODS), "area": random.choice(list(AREAS)),
        "price": random.choice(list(PRICES)), "stars": random.choice(list(STARS)),
        "family": random.choice(list(FAMILY)),
    }  # fmt: skip
    return {"name": name} | {
        k: values[k] for k in random.sample(list(values), random.randint(2, 5))
    }


def records(train_rows: int = 800, test_rows: int = 160) -> dict[str, list[dict]]:
    """Rows of `prompt` and `completion`. The test part's names occur in no train row."""
    random = Random(f"{DATA_SEED}/records")
    names = [f"The {capital(color)} {capital(noun)}" for color in COLORS for noun in NOUNS]
    random.shuffle(names)
    held = len(names) // 5
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for part, rows, allowed in (
        ("train", train_rows, names[held:]),
        ("test", test_rows, names[:held]),
    ):
        seen: set[str] = set()
        while len(parts[part]) < rows:
            fields = record(random, random.choice(allowed))
            prompt = " | ".join(f"{key}: {value}" for key, value in fields.items()) + "\n"
            if prompt not in seen:
                seen.add(prompt)
                parts[part].append({"prompt": prompt, "completion": sentence(fields)})
    return parts


DATASETS: dict[str, Callable[[], dict[str, list[dict]]]] = {"intents": intents, "records": records}


# long held-out documents that the 380,000 documents of pretraining happen to contain (a slow test looks)
SEEN_IN_TRAINING = {17, 44, 88, 169, 238, 246, 270, 316, 320, 329, 337, 343, 344, 386, 398, 400, 431, 438}  # fmt: skip


def base_skill(count: int = 200) -> list[dict]:
    """Held-out text of the corpus: another seed, and docstrings that pretraining never sees.

    Short documents are left out: a capital or a sum from the closed lists comes up under every seed.
    So are the longer ones that came up in pretraining all the same.
    """
    numbered = enumerate(documents(HELDOUT_SEED, 500))
    new = (text for i, text in numbered if len(text) > 120 and i not in SEEN_IN_TRAINING)
    return [{"text": text} for text in islice(new, count)]


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def dataset_files() -> dict[str, str]:
    """Every data file of the package: its path under `data/` -> its text."""
    files = {
        f"{n}/{part}.jsonl": jsonl(rows) for n, f in DATASETS.items() for part, rows in f().items()
    }
    return files | {"base_skill.jsonl": jsonl(base_skill())}


def collect_docstrings() -> str:
    """Docstrings of the top-level modules of this Python's standard library, as JSONL."""
    rows, seen = [], set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if 100 < len(text) < 640 and text.isascii() and text not in seen:
                seen.add(text)
                rows.append({"module": path.stem, "text": text})
    return jsonl(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", action="store_true", help="write the package's data files")
    parser.add_argument(
        "--hash", action="store_true", help=f"hash the first {HASHED_DOCUMENTS} documents"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N documents")
    parser.add_argument("--docstrings", action="store_true", help="collect the docstrings anew")
    options = parser.parse_args()
    if options.docstrings:
        DOCSTRINGS.write_text(collect_docstrings(), encoding="utf-8")
        print(
            f"{DOCSTRINGS.name}: {len(docstrings())} docstrings of Python {sys.version.split()[0]}"
        )
    if options.datasets:
        for name, text in dataset_files().items():
            path = PACKAGE / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(
                f"{name}: {text.count(chr(10))} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()}"
            )
    if options.hash:
        print(f"{CORPUS_SEED}, documents 0 to {HASHED_DOCUMENTS - 1}: sha256 {corpus_sha256()}")
    for text in documents(CORPUS_SEED, options.show):
        print(text, end="\n\n")


if __name__ == "__main__":
    main()
