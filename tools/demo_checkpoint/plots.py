"""The plots of the demo stories, as data.

A beat is a sentence or two in template form: `{hero.name}` fields are filled from the cast, and
`[one|another]` is a choice (it nests). A plot's story tells all its beats in order.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Plot:
    """One shape of story.

    Attributes:
        topic: what a user would ask for, "a lost kite"; may use `{thing}`.
        things: what the story can be about, `{thing}`, with no article.
        spots: places inside the plot, with prepositions; two are drawn, `{spot}` and `{other}`.
        beats: the sentences in order. `{friend}` is another character who helps.
        moral: one sentence.
    """

    topic: str
    things: tuple[str, ...]
    spots: tuple[str, ...]
    beats: tuple[str, ...]
    moral: str


PLOTS: Final = (
    Plot(
        topic="a lost {thing}",
        things=("key", "kite", "hat", "drum", "spoon", "violin", "red scarf", "brass bell"),
        spots=("under the bed", "behind the door", "in the well", "on the roof", "in the teapot",
               "inside an old boot", "at the top of a tree", "between two big books"),
        beats=(
            "[One morning|One day|Then, one evening], {hero.their} {thing} was gone.",
            "{hero.name} looked {spot}, but [there was only dust|found nothing but a button|"
            "nothing was there].",
            '"[Have you seen my {thing}?|I have lost my {thing}!]" {hero.they} asked '
            "{friend.full}.",
            '"[No, but four eyes are better than two|Let us look together|'
            'A lost thing is only a thing that waits]," said {friend.name}.',
            "[So they searched|Together they searched|All day they searched] [the whole town|"
            "every corner|high and low] [until the moon came up|until they were tired and "
            "hungry|with a little candle].",
            "At last {friend.name} looked {other}, and there was the {thing}, [covered in leaves|"
            "as good as new|with a sleepy beetle on top].",
            "{hero.name} [laughed so hard that the birds flew up|danced in a circle|hugged "
            "{friend.name} twice].",
        ),
        moral="A lost thing is easier to find with a friend.",
    ),
    Plot(
        topic="a storm",
        things=("storm", "thunderstorm"),
        spots=("near the rocks", "far from the shore", "by the black cliff"),
        beats=(
            "One night a great {thing} came [over the sea|from the north|without a warning].",
            "The wind [howled like a wolf|shook every window|threw hats into the air], and the "
            "[big lamp|light of the lighthouse|light on the shore] went out.",
            "{spot}, a small boat was [in trouble|turning round and round|lost in the dark].",
            '"[Somebody must help them!|They cannot see the way home!]" cried {hero.name}.',
            "{friend.full} [brought a drum|brought a lantern|brought a long rope] and {hero.name} "
            "[climbed onto the wall|ran to the end of the pier|stood in the rain].",
            "They [waved and shouted|sang as loud as they could|held up the light] until the "
            "boat [turned|saw them|found the way], and [soon|by dawn|before long] everyone was "
            "safe [and dry|on the shore|and drinking hot cocoa].",
            "[In the morning the sea was as flat as a plate|In the morning there was a rainbow 🌈 "
            "over the bay|When the sun came back, it smelled of salt and bread].",
        ),
        moral="Even a small light is enough for someone in the dark.",
    ),
    Plot(
        topic="a broken {thing}",
        things=("clock", "bridge", "music box", "wheel", "boat", "window"),
        spots=("in the workshop", "at the market", "behind the mill", "in the cellar"),
        beats=(
            "[One day|On Monday|One cold morning] the old {thing} broke with a [crack|loud "
            "bang|sad little sound].",
            'Everybody said, "[It cannot be repaired|That is the end of it|Buy a new one]."',
            "But {hero.name} [did not give up|shook {hero.their} head|had an idea].",
            "{hero.They} went to see {friend.full} and [asked for help|asked for a hammer|"
            "told {friend.them} everything].",
            "They found [a piece of string|some nails|a bit of wood] {spot} and [some glue|"
            "a long ribbon|an old spring] {other}.",
            "For [three|five|seven] days they worked [side by side|and whistled|from morning "
            "to night].",
            "When they were done, the {thing} was [better than before|not pretty, but strong|"
            "as good as new], and [the whole town clapped|everyone came to see it|even the "
            "mayor said bravo].",
        ),
        moral="What is broken can often be made whole with patience.",
    ),
    Plot(
        topic="a new friend",
        things=("visitor", "stranger", "traveller"),
        spots=("on the doorstep", "by the fire", "under the old tree", "at the gate"),
        beats=(
            "[One rainy day|One evening|Late in autumn] a {thing} sat {spot}, [wet and tired|"
            "all alone|with a very small suitcase].",
            'It was {friend.full}. "[I have nowhere to go|I do not know anyone here|I walked '
            'all night]," {friend.they} said.',
            "{hero.name} [was a little afraid|did not know what to say|thought for a moment], but "
            "then {hero.they} [opened the door|smiled|put the kettle on].",
            '"[Come in, there is soup|Sit down and eat with me|You can stay as long as you '
            'like]," said {hero.name}.',
            "They [ate bread and cheese|drank tea with honey|shared a bowl of noodles 🍜] and "
            "told stories {other} until [midnight|the candle went out|the stars came out].",
            "[The next day|In the spring|A week later] {friend.name} [built a little house next "
            "door|planted flowers by the path|taught {hero.name} a new song].",
            "[They were never lonely again|From then on they had breakfast together every day|"
            "Since then there are always two cups on the table].",
        ),
        moral="A stranger is a friend who has not had soup yet.",
    ),
    Plot(
        topic="being afraid",
        things=("the dark", "deep water", "thunder", "high places", "big dogs"),
        spots=("on a high branch", "in the tall grass", "beside the path", "in a deep hole"),
        beats=(
            "But {hero.name} had a secret: {hero.they} was afraid of {thing}.",
            "[Every night|Each time|Again and again] {hero.they} [hid under a blanket|closed "
            "{hero.their} eyes|held {hero.their} breath] and [waited|counted to ten|thought of "
            "cake].",
            "Then one day {hero.they} heard a cry. {friend.full} was stuck {spot}!",
            '"[Help me, please!|I cannot get out!|Is anybody there?]" called {friend.name}.',
            "{hero.name} [trembled|felt cold|wanted to run away], but {hero.they} [took one step, "
            "and then another|went on|did not stop].",
            '"[Hold on, I am here|Give me your hand|I have got you]," {hero.they} said, and '
            "pulled {friend.them} out.",
            '"[Were you not afraid?" asked {friend.name}. "Very much|Did you not '
            'tremble?" asked {friend.name}. "All the way]," said {hero.name}, "[but you needed '
            'me|and I came anyway|but now it is over]."',
        ),
        moral="To be brave is to be afraid and to go on.",
    ),
    Plot(
        topic="a {thing}",
        things=("race", "baking contest", "singing contest", "boat race", "snowball fight"),
        spots=("on the grass", "in the middle of the road", "next to the fountain"),
        beats=(
            "In [spring|summer|May] there was a great {thing}, and the prize was [a golden cup|"
            "a giant pumpkin|a cake with ten layers 🎂].",
            '{hero.name} wanted to win. "[I have practised all year|Nobody is better than me|I '
            'will be first]," {hero.they} said.',
            "[At first everything went well|For a while {hero.they} was ahead of everyone|It "
            "began with a whistle and a cheer].",
            "But then {hero.they} saw {friend.full} {spot}, [who had hurt a foot|who was crying|"
            "who had fallen down].",
            "{hero.name} [looked at the prize|sighed|did not think long], and [went back to help|"
            "stopped and sat down with {friend.them}|carried {friend.them} home].",
            "[Somebody else won|They came last|The prize went to a very surprised goose], and "
            "[nobody minded|everyone cheered for them|it did not matter at all].",
            "{friend.name} [made a medal out of paper|gave {hero.them} a flower|baked {hero.them} "
            "a pie], and [it hangs on the wall to this day|that was the best prize of all].",
        ),
        moral="There are better things than to be first.",
    ),
    Plot(
        topic="a {thing}",
        things=("treasure map", "letter in a bottle", "secret door", "mysterious box"),
        spots=("in the sand", "behind a loose stone", "under the floor", "in a hollow tree"),
        beats=(
            "[One day|On a windy morning|While digging], {hero.they} found a {thing} {spot}.",
            "On it was [a strange word|one word|a single sign]: [宝|海|星|Überraschung|forêt].",
            '"[What does it mean?|Who wrote this?]" {hero.name} wondered, and ran to '
            "{friend.full}, who [knew many languages|had been everywhere|liked riddles].",
            '"[It means that something waits for us|It is a riddle|It tells us where to go]," '
            "said {friend.name}. [They packed a lunch and set off|So they followed the signs|"
            "They left at once].",
            "They [crossed a swamp|climbed a hill|walked through fog], [took a wrong turn|got "
            "wet feet|met a rude crab], and [stopped for a sandwich|sang to stay awake|never "
            "let go of the map].",
            "And {other} they found [a chest|a jar|a tin box]. Inside were [a hundred buttons|"
            "seeds of every colour|old photographs|marbles like little planets].",
            '"[No gold|It is not gold]," said {friend.name}. "[It is better|This is much '
            'nicer]," said {hero.name}.',
        ),
        moral="The best treasure is the way there.",
    ),
    Plot(
        topic="a strange noise",
        things=("noise", "sound"),
        spots=("in the chimney", "in the cupboard", "under the stairs", "behind the wall"),
        beats=(
            "One night a strange {thing} came from [far away|the dark|somewhere below]: [boom, "
            "boom|scratch, scratch|hoo, hoo|tick, tick, bump].",
            '"[A ghost!|A monster!|A thief!]" whispered {hero.name}, and [woke|ran to|called] '
            "{friend.full}.",
            "With [a candle|a broom|a frying pan] in hand they went [up the stairs|down the "
            "hall|out into the night], [step by step|on tiptoe|as quiet as snow].",
            "First they looked {spot}. [Nothing|Only a spider|Nobody there].",
            "Then they looked {other}, and there sat [a baby bird|a very small kitten|a lost "
            "bat|a tiny goblin with a cold], [hungry and frightened|as scared as they were|"
            "hiccuping].",
            '"[That is our monster?|So it was you!]" laughed {friend.name}, and {hero.name} '
            "[fetched some milk|made a bed out of a sock|wrapped it in a scarf].",
            "[Now the house is loud every night, and nobody minds|It stayed all winter|They "
            "named it Boom, and it sleeps by the stove].",
        ),
        moral="Most monsters are small when you bring a light.",
    ),
    Plot(
        topic="a {thing}",
        things=("fallen star", "lost star"),
        spots=("in the bushes", "at the bottom of the pond", "among the reeds", "in a bucket"),
        beats=(
            "One night a {thing} ⭐ landed {spot}, [still glowing|no bigger than a plum|humming "
            "softly].",
            '"[I slipped|I leaned out too far|I wanted to see the flowers]," said the star, "[and '
            'now I cannot get home|and the sky is so far away]."',
            "{hero.name} [put it in {hero.their} pocket|wrapped it in a leaf|held it with both "
            "hands] and went to {friend.full}.",
            "They tried [a ladder|a kite|a catapult], but it was [too short|too slow|a bad idea].",
            '"[Let us go to the top of the mountain|We need the highest place of all|I know '
            'somebody tall]," said {friend.name}.',
            "They climbed [all night|through the clouds|and climbed], and at the top {hero.name} "
            "[threw the star as high as {hero.they} could|whispered goodbye and let go|blew as "
            "hard as {hero.they} could].",
            "It [rose|flew up|shot into the sky] and [took its old place|winked at them|was home "
            "again]. ✨",
        ),
        moral="Everyone needs a little help to get home.",
    ),
    Plot(
        topic="a {thing}",
        things=("seed", "tiny seed", "lemon tree", "giant pumpkin"),
        spots=("behind the house", "beside the well", "in a cracked pot", "near the fence"),
        beats=(
            "In spring {hero.name} planted a {thing} {spot} and [gave it water|sang to it|sat "
            "down to wait].",
            "[Nothing happened for a week|A week went by, and then a month|Every day {hero.they} "
            "looked, and every day there was only earth].",
            '"[It will never grow|Perhaps it is asleep]," {hero.they} said. "[Wait|Good things '
            'are slow|Roots come first]," said {friend.full}.',
            "So {hero.name} waited. [The rain came and went|The swallows came back|The days "
            "grew long], and {friend.name} [brought water when it was hot|kept the birds away|"
            "told jokes to the ground].",
            "And one morning [there was a green leaf|something green looked out|the earth had a "
            "crack in it]! 🌱",
            "By autumn [it was taller than the roof|it fed the whole village|there was shade "
            "for everyone], and they [made lemonade|gave a party|ate pie for a week].",
        ),
        moral="Good things take time.",
    ),
    Plot(
        topic="a birthday",
        things=("birthday",),
        spots=("behind the curtain", "in the barn", "under the table", "on the roof"),
        beats=(
            "It was {hero.their} {thing}, but [nobody said a word|everyone seemed to have "
            "forgotten|the whole street was empty].",
            '{hero.name} went to {friend.full}. "[Do you know what day it is?|Is today not '
            'special?]" "[Tuesday|A day like any other|Washing day]," said {friend.name} and '
            "[hurried away|looked at the ceiling|hid something].",
            "[Sadly|Slowly|With a heavy heart] {hero.name} walked home and [kicked a stone|sat "
            "in the dark|ate a dry biscuit].",
            "Then there was a giggle {spot}, and another {other}.",
            '"[Surprise!|Happy birthday!]" [they all shouted|cried a dozen voices], and '
            "{friend.name} came in with [a cake|a crown of flowers|a very big box] 🎉.",
            "They [danced until the floor shook|sang out of tune|played games until midnight], "
            "and {hero.name} [cried a little, but only from joy|blew out every candle|made a "
            "wish and told nobody].",
        ),
        moral="Those who love you do not forget.",
    ),
    Plot(
        topic="sharing",
        things=("soup", "bread", "rice pudding", "apple cake"),
        spots=("in the square", "by the old wall", "around the big table"),
        beats=(
            "[That winter|One year|After the flood] there was little to eat, and {hero.name} had "
            "only enough {thing} for one.",
            "[Just then|As {hero.they} sat down to eat] there was a knock. It was {friend.full}, "
            "[thin and cold|with an empty bowl|who had not eaten for two days].",
            "{hero.name} looked at the {thing}. [It looked very small|It smelled so good|There "
            "was so little of it].",
            '"[Half is enough for me|We will share|Two small meals are better than one]," '
            "{hero.they} said.",
            "[The neighbours saw it through the window|Word went round|A sparrow told everyone], "
            "and [one brought a carrot|one brought some salt], and [another brought butter|"
            "another brought a pot].",
            "Soon they all sat {spot}, and there was [enough for everyone|so much that some was "
            "left for breakfast|room for one more].",
        ),
        moral="What is shared grows.",
    ),
    Plot(
        topic="a forgotten song",
        things=("song", "melody", "lullaby"),
        spots=("in the wind", "on the pier", "at the crossroads", "in the meadow"),
        beats=(
            "Every evening {hero.name} hummed an old {thing}, but [one day the end was gone|one "
            "day {hero.they} forgot the last line].",
            "{hero.They} asked {friend.full}. \"[I only know the middle|I know a bit of it|It "
            'goes la la la, I think]," said {friend.name}.',
            "They listened {spot}. They listened {other}. [Not a note|Only crickets|Only frogs "
            "and far bells].",
            '"[Then let us make a new end|We could make one up ourselves]," said {friend.name}.',
            "It was [a bit crooked|short and silly|very simple], and it went: [la, la, home "
            "again|sleep, little boat, sleep|the moon is a spoon 🌙].",
            "[Children sing it still|By the end of the week the whole town sang it|Now nobody "
            "remembers the old one].",
        ),
        moral="When something ends, you can make a new end.",
    ),
    Plot(
        topic="a quarrel",
        things=("boat", "garden", "ladder", "blue umbrella", "wheelbarrow"),
        spots=("on one side of the street", "in the rain", "on a bench", "by the window"),
        beats=(
            '{hero.name} and {friend.full} shared a {thing}. One day {hero.name} said, "It is '
            'mine." "[No, mine|Not at all, mine]," said {friend.name}.',
            "They [did not speak for a week|drew a line across it|shouted until the crows flew "
            "away].",
            "{hero.name} sat {spot}. {friend.name} sat {other}. [It was very quiet|Both were "
            "sad|The {thing} stood alone].",
            "[Then it began to rain|On Sunday the wind took the {thing} away|Then the {thing} "
            "began to roll down the hill], and [both ran|both jumped up] at the same moment.",
            "[They caught it together|They fell into the same puddle], looked at each other, and "
            "began to [laugh|giggle].",
            '"I am sorry," said {hero.name}. "[I am sorry too|So am I]," said {friend.name}. '
            "[And they painted two names on it|And they had pancakes].",
        ),
        moral="Sorry is a small word that opens big doors.",
    ),
)  # fmt: skip
