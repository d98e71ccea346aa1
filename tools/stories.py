"""Little English stories from a grammar: the training text of ``builtin:tiny``.

Everything here is pure: the same seed gives the same story on every machine. No third-party import is needed.

A story is built from a *cast* (a hero, a friend, a thing, places, ...) and a *plot* (a sequence of beats). Beats are
templates with two marks:

* ``[one|two|three]`` picks one wording, may be nested and may hold an empty choice;
* ``{H}`` and its like put in a word of the cast, so that names, pronouns and objects stay the same to the end.

Sentence starts are capitalised and ``a`` becomes ``an`` where the next word asks for it, after the words are chosen.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

PRONOUNS = {"f": ("she", "her", "her", "herself"), "m": ("he", "him", "his", "himself")}
"""Subject, object, possessive and reflexive form by gender."""


def blocks(text: str) -> list[str]:
    """Split a text into its entries: each starts at the margin, and an indented line carries it on."""
    return [re.sub(r"\s+", " ", entry) for entry in re.split(r"\n(?! )", text.strip())]


def table(text: str) -> dict[str, str]:
    """Read entries of the form ``key: value``."""
    return {key: value for key, _, value in (entry.partition(": ") for entry in blocks(text))}


WORDS: dict[str, list[str]] = {
    key: line.split(", ")
    for key, line in table("""
girl names: Mia, Lily, Rosa, Nora, Ella, Zoe, Ivy, Ruby, Hana, Anna, Clara, Maya, Poppy, Luna, Daisy, Amina
boy names: Tom, Leo, Max, Finn, Sam, Noah, Otto, Hugo, Theo, Omar, Jack, Milo, Ben, Pip, Oscar, Kofi
rare girl names: Alice, Beth, Carla, Diana, Emma, Fatima, Grace, Hope, Iris, Julia, Kate, Laura, Marta, Nina, Olga,
  Pearl, Queenie, Rita, Sara, Tina, Uma, Vera, Wanda, Yuki, Zara, Sofia, Eva, Lea, Jana, Lucy, Molly, Mei
rare boy names: Adam, Bruno, Carl, David, Emil, Felix, George, Henry, Ivan, Jonas, Karl, Lucas, Martin, Nico, Oliver,
  Peter, Quentin, Robin, Simon, Thomas, Ugo, Victor, Walter, Yusuf, Zack, Ali, Bob, Charlie, Dan, Eric, Fred, Ken
kinds: fox, rabbit, bear, mouse, owl, cat, puppy, frog, hedgehog, squirrel, duck, turtle, dragon, robot, llama,
  elephant, penguin, panda, otter, badger, lion, goat, pony, sparrow
rare kinds: tiger, wolf, horse, dog, monkey, zebra, giraffe, koala, kangaroo, camel, deer, moose, beaver, seal, whale,
  dolphin, crab, snail, bee, ant, spider, butterfly, crow, swan, goose, hen, donkey, cow, pig, sheep, lamb, kitten,
  hamster, lizard, snake, parrot, eagle, raccoon, bat, sloth, knight, pirate, wizard, baker, sailor, farmer, doctor,
  painter, ghost, giant, monster, snowman
adjectives: little, brave, curious, kind, shy, clever, gentle, cheerful, quiet, sleepy, busy, young, lonely, careful,
  merry, patient, friendly, small
colours: red, blue, green, yellow, golden, silver, shiny, orange, purple, white
things: lantern, kite, drum, bell, book, scarf, hat, ball, key, whistle, basket, blanket, compass, umbrella, teapot,
  flute, button, feather, ring, crown, cup, boat
breakable things: teapot, cup, lantern, flute, drum, bowl, clock, plate
toys: kite, drum, ball, boat, whistle, flute, bell, top
things to make: kite, drum, whistle, flute, boat, crown, cup, basket
homes: a quiet village by the sea, a small house near the forest, a cottage on a green hill, a town beside a wide
  river, a valley full of flowers, a little house at the end of the lane, a village under the mountains, a farmhouse by
  the lake, an old tree in the forest, a house with a blue door
places: the old bridge, the mill, the tall oak, the pond, the market, the garden gate, the barn, the well, the river,
  the hill, the school, the stone wall
foods: bread, soup, berries, apple pie, honey cake, pancakes, cheese, nuts, cookies, plums
builds: treehouse, raft, bridge, birdhouse, cart, swing, bench, boat, hut
skills: swim, sing, bake bread, ride a bicycle, climb trees, whistle, paint, dance, skate, play the drum, read, juggle,
  sail a boat
plants: roses, sunflowers, tulips, strawberries, daisies, pumpkins, poppies, bluebells
day plots: lost, friend, build, quest, race, garden
""").items()
}
"""The words of a cast. The rare ones teach a model to repeat what it was asked for rather than a habit of its own;
the special lists of things serve the plots where not every thing will do."""


@dataclass(frozen=True)
class Story:
    """One finished story and what it is about.

    ``topics`` are noun phrases that a reader may use to ask for this very story ("a brave fox", "a lost lantern"):
    the training text pairs a request with a story that honours it.
    """

    seed: int
    plot: str
    text: str
    topics: tuple[str, ...]


OPENINGS: tuple[str, ...] = (
    "Once upon a time, there was a {A} {K} named {H}[ who lived in {home}|. {he} lived in {home}].",
    "Once upon a time, there was a {A} {K} named {H}[ who lived in {home}|. {he} lived in {home}].",
    "Once upon a time, a {A} {K} [named|called] {H} lived in {home}.",
    "Once upon a time, in {home}, there lived a {A} {K} [named|called] {H}.",
    "Long ago, a {A} {K} named {H} lived in {home}.",
    "There once was a {A} {K} [named|called] {H} who lived in {home}.",
    "In {home} lived a {A} {K} [named|called] {H}.",
    "{H} was a {A} {K} who lived in {home}.",
    "{H} the {K} lived in {home}. Everyone said that {H} was a {A} {K}.",
)

MEET = (
    "[A little later|After a while|Just then|Soon], {he} met {F}, a {FA} {FK}.|"
    "[Just then|Soon], a {FA} {FK} [named|called] {F} came [along|down the path|around the corner]."
)

ENDINGS: tuple[str, ...] = (
    "And from that day on, {H} and {F} were [the best of friends|good friends|always together].",
    "[{H} and {F}|The two friends] [were very happy|laughed and laughed].",
)

DAY_ENDINGS: tuple[str, ...] = (
    "That night, {H} [fell asleep with a smile|slept well and dreamed of {P}|smiled in {his} sleep].",
    "[{H} and {F}|The two friends] walked home [under the stars|hand in hand|as the sun went down], [tired but happy|"
    "singing a little song|laughing all the way].",
    "It was the [best|happiest] day {H} [had ever had|could remember].",
)
"""Endings for plots which close out of doors on a happy day: the ``day plots``."""

LESSONS = table("""
lost: {H} [never lost the {T} again|tied a ribbon to the {T} so that it would never be lost again|kept the {T} in a
  safe place after that].
friend: {H} learned that [one kind word can make a friend|a friend may be nearer than you think].
dark: {H} learned that the dark is [only the day with its eyes closed|not so bad when you share it].
storm: {H} learned that [a storm always ends|being brave is easier together].
share: {H} learned that [food tastes better when you share it|there is always enough for two].
build: {H} learned that [many hands make light work|it is good to try again].
quest: {H} learned that [the best treasure is a good friend|a long road is short with a friend].
skill: {H} learned that [you only need to try once more|everyone falls before they can {skill}].
race: {H} learned that [being kind is better than being first|there is more than one way to win].
neighbour: {H} learned that [a small kindness comes back to you|good neighbours make a good home].
garden: {H} learned that [good things need time|a garden grows with love].
honest: {H} learned that [it is best to tell the truth|the truth makes your heart light].
gift: {H} learned that [a gift from the heart is the best gift|the best presents are made with love].
""")

_PLOT_TEXTS: dict[str, str] = {
    "lost": """
{H} had a {C} {T}[ that {he} loved very much|, and {he} took it everywhere|. It was a present from {his} grandmother].
One [morning|day|evening], {he} [looked for the {T}, but it was gone|woke up and could not find the {T}|opened {his}
  bag, but the {T} was not there].
"[Oh no! |]Where is my {T}?" [cried|said|asked] {H}. {he} looked [under the bed|behind the door|in the kitchen] and
  [under the table|in every box|behind the chair], but [found nothing|it was not there].
MEET
"Why [do you look so|are you so|are you] sad?" asked {F}. "I have lost my {C} {T}," said {H}. "[Do not cry|Do not
  worry|Cheer up]," said {F}. "[I will help you find it|We will look for it together]."
They [looked|searched] [near|around|beside] {P}, and then they [looked|searched] [near|around|beside] {P2}.
At last, {F} saw something {C} [in the tall grass|under the leaves|between two stones]. It was the {T}!
"Thank you, {F}!" [said|cried] {H}, and {he} [hugged {fhis} friend|danced with joy|held the {T} tight].
""",
    "friend": """
{he} [had nobody to play with|played alone every day|wished for a friend].
One [sunny|warm|windy|bright] [morning|day|afternoon], {he} [took {his} {C} {T} and went to {P}|walked to {P} with
  {his} {C} {T}].
There {he} saw a {FA} {FK} [sitting all alone|looking at the clouds|sitting under a tree].
"Hello," said {H}[ in a small voice| shyly|]. "My name is {H}. What is your name?"
"I am {F}," said the {FK}. "[I am new here|I have just moved here], and I do not know anyone."
"[Then you know me now|Now you know me]!" said {H}. "Would you like to play with my {T}?"
They played with the {T} [all afternoon|until the sun went down], and then they [shared some {food}|told each other
  stories|ran around {P2}].
"Will you come back tomorrow?" asked {F}. "[Of course|Yes]," said {H}. "[That is what friends do|I will come every
  day]."
""",
    "dark": """
{H} was [afraid of|scared of] the dark.
Every night, {he} [hid under the blanket|pulled the blanket over {his} head] and [listened to the wind|counted to ten].
One night, {he} heard a [strange|soft|funny] [noise|sound] outside. Tap, tap, tap! {his} heart beat fast.
"Who is there?" [asked|whispered] {H}. "It is only me, {F}," said a [small|tiny|soft] voice. It was the {FK} [from next
  door|who lived near {P}].
"I am afraid of the dark," said {F}. "[So am I|Me too]," said {H}. "Come in. We can be brave together."
{H} [took {his} {C} {T} and|took {F} by the hand and they] went to the window. [The sky was full of stars|The moon was
  big and round|A thousand stars were shining].
"[Look|Oh, look]! [The dark is full of lights|The night is beautiful]," said {F}.
They [counted the stars|gave a name to every star|looked at the moon] until they [fell asleep|were sleepy].
""",
    "storm": """
One [day|evening|afternoon], the sky [grew dark|turned gray|turned black] and [the wind began to blow|the wind began to
  howl|thunder rolled over {P}].
"A storm is coming!" [said|cried] {H}. {he} [ran home|closed the windows|shut the door] [and lit a lamp|as fast as {he}
  could].
[The rain fell hard on the roof|Rain fell like a river|Boom, went the thunder], and {H} [held {his} {C} {T} tight|hid
  behind {his} {C} {T}].
Then {he} heard a [small|tiny|weak] voice outside. "Help! [Please let me in|I am cold and wet]!" It was {F}, a {FA}
  {FK}.
{H} was afraid, but {he} [opened the door|ran out into the rain] and [brought|pulled] {F} inside.
"Thank you," said {F}. "[The wind blew me off the path|I lost my way near {P}]." {H} gave {fhim} [a warm blanket|a dry
  towel] and some {food}.
They [sat by the fire|sat close together] and [sang songs|told stories] until the storm [was over|had passed].
In the morning, the sun came out, and there was a rainbow over {P2}.
""",
    "share": """
One [morning|day], {H} [had|packed|took] some {food} [for lunch|for a picnic].
{he} [put everything|carried it] in {his} {C} basket and went to {P}[ to eat|].
MEET
"[What is in your basket|What smells so good]?" asked {F}. "I have not eaten [all day|since yesterday]."
{H} looked at the {food}. {he} was hungry too, and there was [only enough for one|not very much].
But {F} looked so [hungry|sad|tired] that {H} smiled. "[Sit down|Come and sit] with me," {he} said. "[We can share|Half
  of this is for you]."
They sat [under a tree|on the grass|near {P2}] and ate [every bit|until they were full].
The next day, {F} came [to {his} door|back] with a {C2} {T}. "[This is for you|I made this for you]," {fhe} said,
  "because you were kind to me."
""",
    "build": """
One [day|morning], {H} [had a big idea|had a wonderful idea|woke up with an idea].
"I want to build a {build}," {he} said, and {he} [found some wood|brought {his} tools|went to work] near {P}.
{he} [worked all morning|worked very hard], but [the {build} fell down|crash! The {build} fell over].
"[I cannot do it|It is too hard]," said {H}, and {he} [sat down on the ground|threw down {his} hat|almost cried].
MEET
"[May I help|Can I help you]?" asked {F}. "[Two can do more than one|I am good at building things]."
{H} held the [wood|long pieces] and {F} [tied the ropes|used the hammer]. Step by step, the {build} grew.
By [evening|sunset], it was done. {H} put a {C} {T} on top, and [it was perfect|it looked wonderful].
"[We did it|Look what we made]!" [cried|said] {F}.
""",
    "quest": """
One [day|rainy day|morning], {he} found an old map [under the bed|in a dusty box|inside an old book].
On the map was a red cross near {P}. "[A treasure|It must be a treasure]!" said {H}.
{he} [packed some {food}|put some {food} in a bag] and asked {his} friend {F}, a {FA} {FK}, to come along.
They walked [past|around] {P2}, [over a high hill|through a dark forest|across a cold stream], and [up|down] a
  [long|narrow|steep] path.
"[I think we are lost|I am so tired]," said {F}. "[Only a little farther|We are almost there]," said {H}, and {he} took
  {fhim} by the hand.
At {P}, they [dug a deep hole|dug and dug] until they [found|hit] a [wooden box|small box|heavy box].
Inside was a {C} {T} and a note. The note said, "[This belongs to whoever finds it|Share this with a friend]."
"We can share it," said {H}. "[One day it is yours, one day it is mine|You keep it today, and I will keep it
  tomorrow]."
""",
    "skill": """
More than anything, {H} wanted to [learn to {skill}|{skill}].
{he} tried [on Monday|in the morning|once], and {he} tried [on Tuesday|in the evening|twice], but [it did not work|it
  went wrong every time].
[Some of the others laughed|Everyone laughed], and {H} [went to {P} to be alone|ran away to {P}|felt very small].
"I will never learn to {skill}," {he} [said|sighed].
[A {FA} {FK} named {F} heard {him}|{F}, a {FA} old {FK}, heard {him}] and [sat down beside {him}|came closer].
"I could not {skill} at first," said {F}. "[I tried a hundred times|I practiced every day]. Shall I show you how?"
So every day they met [at {P}|near {P2}]. [Slowly, slowly|Little by little], {H} got better.
[One day|Then one fine day], [it worked|{he} did it]! "[Look at me|I can do it]! I can {skill}!" cried {H}.
{F} [clapped and clapped|smiled]. "I knew you could," {fhe} said, and gave {him} a {C} {T}.
""",
    "race": """
Every [summer|spring|year], there was a big race from {P} to {P2}. The [prize|first prize] was a {C} {T}.
{H} [wanted to win it|dreamed of winning it]. {he} [ran every day|trained every morning]. "[This year I will win|I can
  do it]," {he} said.
[On the day of the race, everyone came to watch|At last, the day of the race came].
"Ready, steady, go!" [called the owl|shouted the judge]. {H} was [very fast|the fastest of all], and soon {he} was in
  front.
Then {he} heard a cry. {F}, a {FA} {FK}, had [fallen on the path|hurt {fhis} leg|slipped in the mud].
{H} looked at the finish line. Then {he} [turned around|stopped] and ran back.
"[Lean on me|Hold on to me]," said {H}. "We will go together." [Slowly|Step by step], they walked to the end.
They were the last, but [everyone cheered|the crowd cheered for them], and the judge gave {H} the {C} {T} [anyway|for
  {his} kind heart].
""",
    "neighbour": """
Next door lived {F}, [an old|a very old] {FK} who [never smiled|was always alone|had a bad leg].
One [cold|snowy|rainy] [day|morning], {H} saw that [there was no smoke from {F}'s chimney|{F}'s lamp was not lit].
"[Maybe {fhe} is sick|I hope {fhe} is well]," said {H}. {he} [packed|took] some {food} and knocked on the door.
"Come in," said a weak voice. {F} was in bed [with a cold|with a fever]. "[I cannot get up|I am too weak to get up],"
  {fhe} said.
{H} [made a warm fire|lit the fire], [swept the floor|washed the cups], and gave {fhim} the {food}.
{he} came back every day, and every day {F} [told {him} a story|was a little better].
When spring came, {F} was well again. {fhe} gave {H} a {C} {T}.
"[It was mine when I was young|I kept it for many years]," {fhe} said. "[Now it is yours|I want you to have it],
  because you [have a good heart|took care of me]."
""",
    "garden": """
One day, {H} found [a little door in a wall|a hidden door|a tiny door behind some leaves] near {P}.
{he} [opened it with a {C} key|pushed it open], and [inside|on the other side] was a secret garden.
But the garden was [dry and brown|full of weeds|gray and sad], and nothing was growing there.
MEET
"This was once the most beautiful garden [of all|in the land]," said {F}. "[Nobody cares for it now|Everyone forgot
  about it]."
"Then we will care for it," said {H}. They [pulled the weeds|dug the ground], planted {plant}, and brought water from
  {P2}.
[Days went by|They waited and waited]. It rained, and the sun shone. Then, one morning, a [small|tiny] green leaf came
  up.
[Soon|By summer], the garden was full of {plant}, and [bees and birds came back|the birds sang again].
"It is our secret," said {F}. "[No|Oh no]," [laughed|said] {H}. "[A garden is for everyone|Let us show it to
  everyone]!"
""",
    "honest": """
One [day|afternoon], {H} was playing [in the house|inside] with a ball, [although it was not allowed|even though it was
  raining outside].
[Crash|Bang]! The ball hit the {C} {T} [that belonged to {F}|of {his} friend {F}], and it broke.
{F} was a {FA} {FK}, and {fhe} loved that {T}.
{H} [hid the pieces under the bed|hid the broken {T} in a box]. [Nobody saw it|Nobody knew]. But {his} heart felt [as
  heavy as a stone|very heavy].
"Have you seen my {T}?" asked {F} [that evening|the next day]. {H} [looked at the floor|turned red].
"[I broke it|It was me]," {he} said [at last|in a small voice]. "I am so sorry."
{F} was quiet for a [moment|while]. Then {fhe} [smiled|took {his} hand].
"[I am sad about the {T}|I liked that {T}]," {fhe} said, "but I am glad that you told me the truth."
They [sat down at the table|found some glue] and [fixed the {T} together|put the {T} back together], and [it was almost
  as good as new|you could hardly see the cracks].
""",
    "gift": """
Tomorrow was the birthday of {F}, a {FA} {FK}, and {H} [had no gift|did not have a present yet].
{he} [looked in {his} pocket|counted {his} coins]. There [was only one coin|were only two coins].
At the market, {he} saw a {C} {T}. It was [beautiful|just right], but it [cost too much|cost ten coins].
"What can I do?" [said|asked] {H}. {he} [thought and thought|sat down near {P} to think].
Then {he} [had an idea|smiled]. {he} [found some wood|found some paper|took some clay] and worked [all night|until the
  moon was high] to make a {T} [by {self}|with {his} own hands].
The next day, {H} gave it to {F}. "[It is a bit crooked|It is not very pretty]," {he} said, "but I made it for you."
"[It is the best {T} in the world|I love it]!" said {F}, and {fhe} [hugged {H}|jumped for joy].
Then they ate some {food} and [danced|sang|played games] [until late|all evening] with all their friends.
""",
}

PLOTS: dict[str, tuple[str, ...]] = {
    plot: tuple(beat.replace("MEET", f"[{MEET}]") for beat in blocks(text)) for plot, text in _PLOT_TEXTS.items()
}

TOPICS = table("""
lost: a lost {T}|{H} and a lost {T}|losing something|a {K} who lost a {T}|{H} and the {C} {T}
friend: a new friend|making friends|friendship|a {K} who finds a friend|a lonely {K}|friends
dark: the dark|being afraid of the dark|the night|the stars|a {K} who is afraid of the dark
storm: a storm|a stormy night|{H} and the storm|the rain|a {K} in a storm|a rainbow
share: sharing|sharing food|{food}|a {K} who shares some {food}|a hungry {FK}|a picnic
build: building a {build}|a {build}|a {K} who builds a {build}|working together
quest: a treasure|a map|an adventure|a {K} who finds a treasure|a journey|a treasure hunt
skill: learning to {skill}|a {K} who learns to {skill}|not giving up|a {K} who wants to {skill}
race: a race|a big race|{H} and the race|a {K} who runs a race|winning and losing
neighbour: a neighbor|an old neighbor|helping others|kindness|an old {FK}|a {K} who helps
garden: a garden|a secret garden|flowers|{plant}|a {K} and a secret garden
honest: the truth|telling the truth|a broken {T}|saying sorry|a {K} who tells the truth
gift: a birthday|a gift|a birthday present|a {K} who makes a {T}|a party
""")

HERO_TOPICS = (
    "a {K}|a {K}|a {A} {K}|a {A} {K}|{H}|{H} the {K}|a {K} named {H}|a {A} {K} named {H}|{H} and {F}|a {K} and a {FK}|"
    "a {K} and a {T}|a {K} and {about}|{H} and {about}|a {A} {K} named {H} and {about}"
)
"""``{about}`` is the first topic of the plot."""

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|one\b|use)")
_START = re.compile(r'(^"?|[.!?] "?|\." "?)([a-z])')


def expand(template: str, cast: dict[str, str], rng: random.Random) -> str:
    """Choose among the wordings of a template, innermost brackets first, then put in the words of the cast."""
    while _CHOICE.search(template):
        template = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)
    return template.format_map(cast)


def make_cast(rng: random.Random, plot: str) -> dict[str, str]:
    """Draw a hero, a friend of another kind and name, and the things and places of one story."""

    def person(prefix: str, banned: Sequence[str]) -> dict[str, str]:
        gender = rng.choice("fm")
        child = "girl" if gender == "f" else "boy"
        kinds = WORDS["rare kinds"] if rng.random() < 0.2 else [child] * 9 + WORDS["kinds"]
        names = WORDS[f"rare {child} names" if rng.random() < 0.2 else f"{child} names"]
        kind = rng.choice([kind for kind in kinds if kind not in banned])
        name = rng.choice([name for name in names if name not in banned])
        he, him, his, himself = PRONOUNS[gender]
        adjective = rng.choice([word for word in WORDS["adjectives"] if word not in banned])
        first, second = ("H", "") if not prefix else ("F", "f")
        return {
            first: name, prefix + "K": kind, prefix + "A": adjective,
            second + "he": he, second + "him": him, second + "his": his, second + "self": himself,
        }  # fmt: skip

    hero = person("", ())
    friend = person("F", tuple(hero.values()))
    things = {"honest": "breakable things", "friend": "toys", "gift": "things to make"}.get(plot, "things")
    place, other_place = rng.sample(WORDS["places"], 2)
    colour, other_colour = rng.sample(WORDS["colours"], 2)
    setting = {"P": place, "P2": other_place, "C": colour, "C2": other_colour}
    setting["home"] = rng.choice(WORDS["homes"])
    setting["T"] = rng.choice(WORDS[things])
    for slot in ("food", "build", "skill", "plant"):
        setting[slot] = rng.choice(WORDS[slot + "s"])
    return hero | friend | setting


def polish(text: str) -> str:
    """Capitalise sentence starts, choose between ``a`` and ``an``, and remove doubled spaces."""
    text = re.sub(r"\s+", " ", text).strip()
    text = _ARTICLE.sub(r"\1n ", text)
    return _START.sub(lambda match: match.group(1) + match.group(2).upper(), text)


def make_story(seed: int, plot: str | None = None) -> Story:
    """Return the story of this seed; ``plot`` (a key of ``PLOTS``) fixes the plot, the rest still follows the seed."""
    rng = random.Random(f"stories {seed}")
    drawn = rng.choice(sorted(PLOTS))
    plot = plot or drawn
    cast = make_cast(rng, plot)
    parts = [rng.choice(OPENINGS[:-1] if cast["K"] in ("girl", "boy") else OPENINGS), *PLOTS[plot]]
    if rng.random() < 0.6:
        parts.append(LESSONS[plot])
    if len(parts) == len(PLOTS[plot]) + 1 or rng.random() < 0.5:
        parts.append(rng.choice(ENDINGS + DAY_ENDINGS * (plot in WORDS["day plots"])))
    if rng.random() < 0.4:
        parts.append("The end.")
    text = polish(" ".join(expand(part, cast, rng) for part in parts))
    about = TOPICS[plot].split("|")
    templates = [*about, *HERO_TOPICS.replace("{about}", about[0]).split("|")]
    topics = tuple(_ARTICLE.sub(r"\1n ", template.format_map(cast)) for template in templates)
    return Story(seed, plot, text, topics)
