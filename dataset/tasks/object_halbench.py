"""Object HalBench (arXiv 2312.00849): which of COCO's 80 objects do detailed descriptions invent?

    python 4-eval_chat.py --bench object_halbench:path=obj_halbench_300_with_image.jsonl,annotations=coco/annotations

path          the questions: obj_halbench_300_with_image.jsonl of github.com/RLHF-V/RLAIF-V (eval/data), with pictures
annotations   a folder with COCO 2014's instances_*.json and captions_*.json, of train and val (cocodataset.org)
images        COCO's pictures, if the question file does not contain them
judge, model, key    a judge that extracts the objects of an answer, as in the paper; default: a rule extracts them

rsp = answers that name an absent object / answers that name any of the 80.  men = absent objects / objects, each counted once
per answer; an answer of three words or fewer names none. An object is present if it has a mask in the picture or is named in
one of its human captions. The paper's extractor is GPT-3.5. With the rule (`by_rule` 1) scores do not compare with its scores:
the synonyms are the same, and which words of an answer are objects is decided by rules (dataset/README.md says how far they
are from the official rules for captions).
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from dataset.formats.official import checked, existing, picture, rows
from dataset.judge import Failure, failures, judge_or_none, message
from dataset.tasks import Example, Task, dialogue
from dataset.tasks.chair import share
from dataset.world.openmoji import plural
from model.registry import TASKS, UserError

SOURCE = "the question file of Object HalBench, obj_halbench_300_with_image.jsonl of github.com/RLHF-V/RLAIF-V (eval/data)"
COCO = "the folder with instances_*2014.json and captions_*2014.json of COCO 2014 (cocodataset.org, trainval annotations)"

# The 80 classes with their synonyms, in the singular: all that RLAIF-V's synonyms_refine.txt has, misspelt ones too, and more.
# After "-": phrases that contain such a name but mean no object.
SYNONYMS = """
person: man, woman, child, boy, girl, kid, baby, toddler, infant, guy, lady, gentleman, adult, teenager, individual, human,
 player, batter, catcher, pitcher, umpire, referee, skier, snowboarder, surfer, skateboarder, skater, rider, cyclist, biker,
 bicyclist, motorcyclist, pedestrian, passenger, spectator, driver, worker, chef, waiter, waitress, officer, policeman,
 firefighter, fireman, soldier, farmer, tourist, student, bride, groom, mother, father, son, daughter, athlete, swimmer,
 jockey, cowboy, runner, golfer, fisherman, vendor, shopper, baker, sister, brother, cop, male, female, traveler, foreigner,
 caller, offender, coworker, trespasser, patient, politician, grandchild, serviceman, walker, drinker, doctor, thief, buyer,
 camper, solider, hunter, villager
bicycle: bike, mountain bike, tricycle, unicycle, minibike, trike
car: automobile, sedan, suv, taxi, cab, van, minivan, hatchback, jeep, limousine, convertible, police car, coupe, taxicab,
 limo
motorcycle: motorbike, scooter, moped, dirt bike, motor bike, motor scooter, motor cycle
airplane: plane, aeroplane, aircraft, jet, airliner, jetliner, biplane, seaplane, passenger jet, monoplane, airbus
bus: minibus, school bus, double decker, trolleybus, trolley
train: locomotive, tram, streetcar, subway train, passenger train, freight train, train car, tramway, caboose
truck: pickup, pickup truck, lorry, fire truck, firetruck, fire engine, tow truck, dump truck, garbage truck, semi truck,
 hauler
boat: ship, sailboat, canoe, kayak, yacht, ferry, rowboat, gondola, speedboat, dinghy, motorboat, barge, fishing boat, liner,
 powerboat, skiff, catamaran, pontoon, houseboat, vessel, trawler, ferryboat, watercraft, tugboat, schooner, sailboard,
 paddleboat, lifeboat, freighter, steamboat, riverboat, battleship, steamship
traffic light: stoplight, stop light, traffic signal, street light, streetlight
fire hydrant: hydrant
stop sign:
parking meter:
bench: park bench, pew
bird: duck, goose, seagull, gull, pigeon, parrot, owl, eagle, hawk, swan, penguin, ostrich, flamingo, sparrow, crow, peacock,
 pelican, robin, heron, cockatoo, dove, stork, parakeet, finch, falcon, woodpecker, hummingbird, hen, rooster, waterfowl,
 mallard, seabird, osprey, blackbird, fowl, shorebird, egret, chickadee, quail, bluebird, kingfisher, buzzard, willet,
 bluejay, cormorant, loon, gosling, waterbird, pheasant, sandpiper, raven, turkey, oriole, cowbird, warbler, magpie,
 cockatiel, lorikeet, puffin, vulture, condor, macaw, peafowl, songbird
cat: kitten, kitty, tabby, feline
dog: puppy, pup, poodle, dachshund, bulldog, terrier, collie, labrador, retriever, german shepherd, sheepdog, corgi, pug,
 beagle, husky, hound, chihuahua, spaniel, dalmatian, canine, schnauzer, rottweiler, pitbull, doggie, doberman, mutt, doggy,
 weimaraner, cocker, greyhound, brindle, whippet
horse: pony, foal, mare, stallion, colt, racehorse, equine, palomino, mustang, clydesdale, bronc, bronco
sheep: lamb, ewe, ram, goat
cow: cattle, bull, calf, ox, heifer, holstein, buffalo, zebu, bison
elephant:
bear: polar bear, grizzly, grizzly bear, brown bear, black bear, bear cub, panda, panda bear
zebra:
giraffe:
backpack: rucksack, knapsack, back pack, book bag
umbrella: parasol
handbag: purse, hand bag, pocketbook, tote bag, wallet, briefcase
tie: necktie, bow tie, bowtie, neck tie, bow
suitcase: luggage, suit case, baggage
frisbee: flying disc
skis: ski, pair of skis
snowboard: snow board
sports ball: ball, baseball, basketball, football, volleyball, softball, soccer ball, tennis ball, golf ball, beach ball
kite:
baseball bat: bat
baseball glove: mitt, baseball mitt, catcher's mitt
skateboard: skate board
surfboard: surf board, longboard, skimboard, shortboard, wakeboard
tennis racket: racket, racquet, tennis racquet
bottle: wine bottle, beer bottle, water bottle, bottle of wine, bottle of water
wine glass: wineglass, glass of wine
cup: mug, teacup, coffee cup, coffee mug, cup of coffee
fork:
knife: pocketknife, knive
spoon: teaspoon, tablespoon
bowl: container
banana:
apple:
sandwich: burger, hamburger, cheeseburger, panini, sub
orange: tangerine, clementine, mandarin
broccoli:
carrot:
hot dog: hotdog, frankfurter, corn dog
pizza:
donut: doughnut, bagel
cake: cupcake, cheesecake, birthday cake, wedding cake, shortcake, coffeecake, pancake
chair: armchair, stool, barstool, bar stool, rocking chair, lounge chair, seat
couch: sofa, loveseat, futon, settee, recliner, chesterfield
potted plant: houseplant, house plant, flower pot, flowerpot
bed: bunk bed
dining table: table, desk, coffee table, kitchen table, picnic table, side table
toilet: toilet seat, toilet bowl, toilet tank, urinal, commode, lavatory, potty
tv: television, television set, tv set, monitor, computer monitor, flat screen tv, televison
laptop: laptop computer, notebook computer, computer, notebook, netbook, lenovo, macbook
mouse: computer mouse
remote: remote control, tv remote, wii remote
keyboard: computer keyboard
cell phone: phone, cellphone, mobile phone, smartphone, iphone, smart phone, telephone, phon
microwave: microwave oven
oven: stove, stovetop
toaster:
sink: washbasin
refrigerator: fridge, freezer
book: novel, textbook
clock: alarm clock, wall clock, clock tower
vase:
scissors: scissor, pair of scissors
teddy bear: teddy, stuffed bear, stuffed animal, teddybear
hair drier: hair dryer, hairdryer, blow dryer
toothbrush: tooth brush
-: train station, train track, train platform, bus stop, bus station, boat dock, boat house, ski slope, ski lift, ski resort,
 ski pole, ski boot, ski suit, ski jump, ski goggles, car park, car seat, bird house, bird feeder, dog house, horse trailer,
 bed sheet, toilet paper, toilet brush, home plate, book shelf, table cloth, table tennis, pizza box, computer keyboard tray,
 cup holder, chair lift, ball game, ball field, bike rack, bike lane, bike helmet, cat food, dog food, bear market, phone
 booth
"""
IRREGULAR = {"person": "people", "child": "children", "mouse": "mice", "knife": "knives", "calf": "calves", "thief": "thieves",
             "goose": "geese", "ox": "oxen", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}  # fmt: skip
# Names that mean no object before another noun: an orange cat, a baseball game. They count at the end of a sentence, before
# one of the words in AFTER_A_NOUN, and before a word with -ing ("a football flying").
ATTRIBUTIVE = {"orange", "baseball", "basketball", "football", "volleyball", "softball", "ski", "male", "female", "patient",
               "computer", "container", "notebook", "bow", "brindle"}  # fmt: skip
AFTER_A_NOUN = set("""and or but in on at is are was were has have with without near to from by of off next beside behind
under over above below between into onto that which who while as for up down around against inside outside can lie lies sit
sits""".split())  # fmt: skip


def plural_of(phrase: str) -> str:
    """The plural of a name, by its last word; ...man becomes ...men."""
    first_words, _, last = phrase.rpartition(" ")
    if last.endswith("man") and last not in ("human", "german"):
        last = last[:-2] + "en"
    else:
        last = IRREGULAR.get(last) or plural(last)
    return f"{first_words} {last}".strip()


@functools.cache
def names() -> tuple[dict[str, tuple[str, str]], re.Pattern]:
    """(form of a name -> (its singular, its class or "-"), a pattern that matches the longest forms first)."""
    forms: dict[str, tuple[str, str]] = {}
    for entry in SYNONYMS.strip().replace("\n ", " ").split("\n"):
        coco_class, _, others = entry.partition(":")
        for name in [coco_class, *(other.strip() for other in others.split(",") if other.strip())]:
            for form in (name, plural_of(name)):
                forms.setdefault(form, (name, coco_class))
    longest_first = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return forms, re.compile(rf"\b({longest_first})\b(?=\s*(\w*))")


@functools.cache
def classes() -> frozenset[str]:
    return frozenset(coco_class for _, coco_class in names()[0].values()) - {"-"}


def objects(text: str) -> dict[str, str]:
    """The COCO objects that a text names: each name once, in the singular, with its class ("man": "person")."""
    forms, pattern = names()
    result: dict[str, str] = {}
    for match in pattern.finditer(text.lower().replace("-", " ").replace("’", "'")):
        name, coco_class = forms[match[1]]
        following = match[2]
        if match[1] in ATTRIBUTIVE and following and following not in AFTER_A_NOUN and not following.endswith("ing"):
            continue
        if coco_class != "-":
            result.setdefault(name, coco_class)
    if "toilet" in result:
        result.pop("seat", None)  # "the seat of the toilet" is no chair
    return result


def truths(folder: Path, images: Collection[int]) -> dict[int, set[str]]:
    """Image id -> the classes present: those that have a mask or are named in a caption.

    FileNotFoundError if there are no instances_*.json or no captions_*.json; UserError for an image in none of them.
    """
    present: dict[int, set[str]] = defaultdict(set)
    known_images: set[int] = set()
    for kind in ("instances", "captions"):
        files = sorted(folder.glob(f"{kind}_*.json"))
        if not files:
            raise FileNotFoundError(f"annotations={folder} holds no {kind}_*.json: it needs {COCO}")
        for file in files:
            content = json.loads(file.read_text(encoding="utf-8"))
            known_images |= {image["id"] for image in content["images"]}
            category = {row["id"]: row["name"] for row in content.get("categories", [])}
            for row in content["annotations"]:
                if row["image_id"] in images:
                    named = {category[row["category_id"]]} if kind == "instances" else set(objects(row["caption"]).values())
                    present[row["image_id"]] |= named
    if unknown := sorted(set(images) - known_images):
        raise UserError(f"{len(unknown)} images, {unknown[0]} the first, are in no file of {folder}: it needs {COCO}")
    return {image: present[image] for image in images}


EXTRACT = """Below are a question about a picture and somebody's answer to it.

Question: {question}
Answer: {answer}

Which physical objects does the answer say are visible in the picture? Take the answer's word for it. Name each object with a
bare noun, without colour, material, size or number. Leave out what the answer only supposes, denies or compares with.
Reply with one JSON list of strings and nothing else, and with [] if there are none."""


def listed(reply: str | Failure) -> dict[str, str] | Failure:
    """The COCO objects in the list of a judge's reply; a `Failure` where the reply has no such list."""
    if isinstance(reply, Failure):
        return reply
    match = re.search(r"\[.*\]", reply, re.DOTALL)
    try:
        named = json.loads(match[0]) if match else None
    except json.JSONDecodeError:
        named = None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return Failure(f"no list of objects in {reply[:80]!r}")
    return objects(". ".join(named))


def summary(named: Sequence[dict[str, str]], present: Sequence[Collection[str]]) -> dict[str, float]:
    """rsp and men as in RLAIF-V's evaluation; cover = present classes that were named / present classes, over all answers."""
    wrong = [sum(coco_class not in truth for coco_class in objects.values())
             for objects, truth in zip(named, present, strict=True)]
    covered = sum(len(set(objects.values()) & set(truth)) for objects, truth in zip(named, present))
    return {
        "rsp": share(sum(count > 0 for count in wrong), sum(bool(objects) for objects in named)),
        "men": share(sum(wrong), sum(map(len, named))),
        "cover": share(covered, sum(len(set(truth)) for truth in present)),
        "answers_with_objects": sum(bool(objects) for objects in named),
    }


@TASKS.register("object_halbench")
class ObjectHalBench(Task):
    """Object HalBench from its official file: detailed descriptions of 300 COCO pictures, Rsp and Men."""

    size = 300

    def __init__(self, path: str = "", annotations: str = "", images: str = "", judge: str = "", model: str = "",
                 key: str = "OPENAI_API_KEY"):  # fmt: skip
        self.path, self.annotations, self.images = path, annotations, images
        self.judge = judge_or_none("object_halbench", judge, model, key) if judge or model else None

    def examples(self, split: str, n: int) -> list[Example]:
        file = existing(self.path, "path", SOURCE)
        questions = checked(rows(file), {"image_id": (int, str), "question": str}, file, SOURCE)[:n]
        present = truths(existing(self.annotations, "annotations", COCO), {int(row["image_id"]) for row in questions})
        examples = []
        for k, row in enumerate(questions):
            image_id = int(row["image_id"])
            image = picture(row, [f"COCO_{part}2014_{image_id:012d}.jpg" for part in ("val", "train")], self.images, COCO)
            prompt = dialogue(f"object_halbench/{k}/{image_id}", [image], [(row["question"], "")])
            examples.append(Example(prompt, ", ".join(sorted(present[image_id])), "description"))
        return examples

    def extracted(self, examples: Sequence[Example], answers: Sequence[str]) -> list[dict[str, str] | Failure]:
        """The objects of each answer, by the rule or the judge; none in an answer of three words or fewer, as officially."""
        long = [k for k, answer in enumerate(answers) if len(answer.split()) > 3]
        found: list[dict[str, str] | Failure] = [{} for _ in answers]
        if self.judge is None:
            extracted: list = [objects(answers[k]) for k in long]
        else:
            prompts = [EXTRACT.format(question=examples[k].prompt.messages[-1].text, answer=answers[k]) for k in long]
            extracted = [listed(reply) for reply in self.judge.ask([[message(text)] for text in prompts], listed)]
        for k, named in zip(long, extracted, strict=True):
            found[k] = named
        return found

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float | None], dict[str, float]]:
        """rsp, men, cover; length in words; by_rule: 1 if the rule extracted the objects, 0 if the judge did.

        An answer scores 0 if it names an absent object, None if it names no object, else 1.
        """
        named = self.extracted(examples, answers)
        print(f"object_halbench: objects read by {'the rule' if self.judge is None else self.judge.model}")
        failed = failures("object_halbench", named, [example.prompt.id for example in examples])
        present = [set(example.answer.split(", ")) - {""} for example in examples]
        judged = [(objects, truth) for objects, truth in zip(named, present) if not isinstance(objects, Failure)]
        scores = [None if isinstance(objects, Failure) or not objects else float(set(objects.values()) <= truth)
                  for objects, truth in zip(named, present)]  # fmt: skip
        return scores, {
            **(summary(*zip(*judged)) if judged else {}),
            "length": sum(len(answer.split()) for answer in answers) / len(answers),
            "by_rule": int(self.judge is None),
            "judge_failures": failed,
        }
