"""The words of the built-in world: topics, sentence patterns and ways to ask.

Placeholders: `{n}` a person, `{w}` a work, `{role}`, `{past}` (active), `{made}` (passive) and
`{shown}` the topic's own words; the rest are values. `PLAIN` questions belong to every world. Only test
worlds have topic-specific questions: `JARGON` uses other words, and `CHATTER` wraps a question in
unrelated talk. A model must be tuned to understand them, and a client that knows one topic never sees
the phrases of another.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """A field of human endeavour and its vocabulary."""

    name: str
    role: str
    kinds: tuple[str, str, str]
    past: str
    made: str
    shown: str


TOPICS = (
    Topic("music", "composer", ("Sonata", "Requiem", "Nocturne"), "composed", "composed", "first performed"),
    Topic("painting", "painter", ("Triptych", "Portrait", "Fresco"), "painted", "painted", "first exhibited"),
    Topic("cinema", "director", ("Picture", "Serial", "Reel"), "directed", "directed", "first screened"),
    Topic("literature", "novelist", ("Novel", "Saga", "Fable"), "wrote", "written", "first printed"),
    Topic("architecture", "architect", ("Bridge", "Tower", "Arcade"), "designed", "designed", "first raised"),
    Topic("chemistry", "chemist", ("Salt", "Tincture", "Alloy"), "discovered", "discovered", "first refined"),
    Topic("sport", "coach", ("Cup", "Regatta", "Derby"), "founded", "founded", "first contested"),
    Topic("exploration", "navigator", ("Reef", "Strait", "Atoll"), "charted", "charted", "first reported"),
    Topic("cuisine", "chef", ("Broth", "Tart", "Relish"), "invented", "invented", "first served"),
    Topic("engineering", "engineer", ("Turbine", "Loom", "Airship"), "built", "built", "first tested"),
)  # fmt: skip

# Every sentence names its subject: a model of a million parameters reads those within minutes.
PERSON_PASSAGES = (
    "{n} was a {role} born in {born_in}. {n} trained at {trained_at}. {n} settled in {settled_in} in "
    "{settled_year}.",
    "{n} trained at {trained_at}. {n} settled in {settled_in} in {settled_year}. The {role} {n} was "
    "born in {born_in}.",
)
WORK_PASSAGES = (
    "The {w} was {made} by {maker} in {made_year}. The {w} was {shown} in {shown_in}. The {w} belongs "
    "to {owner}.",
    "The {w} belongs to {owner}. The {w} was {shown} in {shown_in}. The {w} was {made} by {maker} in "
    "{made_year}.",
)
JUNK_PASSAGES = (
    "This page was moved. See the list of pages under {x} or return to the main index.",
    "Click here to subscribe. Terms of use, cookies and contact: {x} office, floor {y}.",
    "Table {y}: no data. Notes and references for {x} are missing. Please expand this section.",
)

PLAIN = {
    "maker": ("Who {past} the {w}?", "By whom was the {w} {made}?", "Which {role} {past} the {w}?"),
    "made_year": (
        "When was the {w} {made}?",
        "In which year was the {w} {made}?",
        "What is the year in which the {w} was {made}?",
    ),
    "shown_in": (
        "Where was the {w} {shown}?",
        "In which city was the {w} {shown}?",
        "Which city saw the {w} when it was {shown}?",
    ),
    "owner": (
        "Who owns the {w}?",
        "To which house does the {w} belong?",
        "What is the owner of the {w}?",
    ),
    "born_in": (
        "Where was {n} born?",
        "In which city was {n} born?",
        "What is the birthplace of {n}?",
    ),
    "trained_at": (
        "Where did {n} train?",
        "At which school did {n} train?",
        "Which school trained {n}?",
    ),
    "settled_in": (
        "Where did {n} settle?",
        "In which city did {n} settle?",
        "Which city did the {role} {n} settle in?",
    ),
    "settled_year": (
        "When did {n} settle down?",
        "In which year did {n} settle down?",
        "What is the year in which {n} settled down?",
    ),
}
PLAIN_TWO_HOP = {
    "born_in": (
        "Where was the {role} who {past} the {w} born?",
        "In which city was the {role} of the {w} born?",
    ),
    "trained_at": (
        "Where did the {role} who {past} the {w} train?",
        "At which school did the {role} of the {w} train?",
    ),
    "settled_in": (
        "Where did the {role} who {past} the {w} settle?",
        "In which city did the {role} of the {w} settle?",
    ),
}

# One line a topic, in the order of TOPICS.
JARGON = {
    "maker": (
        "Whose score is the {w}?",
        "Whose brush gave us the {w}?",
        "Who called the shots on the {w}?",
        "Whose pen is behind the {w}?",
        "Whose drawings became the {w}?",
        "Whose flask gave us the {w}?",
        "Who blew the opening whistle for the {w}?",
        "Whose voyage put the {w} on a map?",
        "Whose stove came up with the {w}?",
        "Whose blueprint turned into the {w}?",
    ),
    "made_year": (
        "How far back does the score of the {w} date?",
        "The paint of the {w} dried in what year?",
        "The cameras rolled for the {w} in what year?",
        "The ink of the {w} dried when?",
        "The plans for the {w} carry what date?",
        "Lab notes give what date for the {w}?",
        "The {w} kicked off in what year?",
        "The log book enters the {w} under what date?",
        "The {w} came onto menus in what year?",
        "The {w} left the drawing board when?",
    ),
    "shown_in": (
        "What town heard the {w} before all others?",
        "What town hung the {w} before all others?",
        "The curtain rose on the {w} in what town?",
        "What town's press ran off the {w}?",
        "Scaffolding for the {w} went up in what town?",
        "What town's furnace purified the {w}?",
        "What town hosted the opening {w}?",
        "News of the {w} landed in what town?",
        "Guests in what town tasted the {w} before all others?",
        "Trials of the {w} took place in what town?",
    ),
    "owner": (
        "Royalties of the {w} go to whom?",
        "The {w} hangs on whose wall?",
        "The rights to the {w} lie with whom?",
        "The manuscript of the {w} sits with whom?",
        "Rent from the {w} goes to whom?",
        "The formula of the {w} sits with whom?",
        "The trophy of the {w} sits with whom?",
        "The flag over the {w} is whose?",
        "The recipe of the {w} is kept by whom?",
        "The patent on the {w} sits with whom?",
    ),
    "born_in": (
        "The cradle song of {n} was sung in what town?",
        "What town is the native soil of {n}?",
        "The life story of {n} opens in what town?",
        "Chapter one of the life of {n} plays in what town?",
        "The foundations of {n} were laid in what town?",
        "The life of {n} was kindled in what town?",
        "What is the home turf of {n}?",
        "What was the port of origin of {n}?",
        "What town first fed {n}?",
        "What town put {n} together?",
    ),
    "trained_at": (
        "Who taught {n} the scales?",
        "Who taught {n} to hold a brush?",
        "Who taught {n} the camera?",
        "Who taught {n} to spell?",
        "Who taught {n} the drafting table?",
        "Who taught {n} the flask?",
        "Who drilled {n} as a rookie?",
        "Who taught {n} the compass?",
        "Who taught {n} the knives?",
        "Who taught {n} the wrench?",
    ),
    "settled_in": (
        "What town became the last stage of {n}?",
        "What town housed the late studio of {n}?",
        "The final scene of {n} plays in what town?",
        "The last chapter of {n} plays in what town?",
        "What town holds the house {n} kept?",
        "What town holds the late bench of {n}?",
        "What town was the late home ground of {n}?",
        "Where did {n} drop anchor for good?",
        "Where did {n} hang up the apron?",
        "Where did {n} park the tools for good?",
    ),
    "settled_year": (
        "{n} took up the last stage in what year?",
        "{n} moved the easel for good in what year?",
        "{n} made the final move in what year?",
        "{n} turned the last page and stayed when?",
        "{n} moved house for good in what year?",
        "{n} moved the bench for good in what year?",
        "{n} made the last transfer in what year?",
        "{n} dropped anchor for good in what year?",
        "{n} hung up the apron in what year?",
        "{n} parked the tools for good in what year?",
    ),
}

# Two lines a topic, in the order of TOPICS.
CHATTER = (
    ("Encore, maestro! {q}", "The oboe asks: {q}"),
    ("While the varnish dries: {q}", "Brush down! {q}"),
    ("Quiet on the set! {q}", "Over popcorn: {q}"),
    ("Scribbled in a margin: {q}", "Red pencil out: {q}"),
    ("Hard hats on! {q}", "Up on the scaffold: {q}"),
    ("Goggles on! {q}", "Before the fumes: {q}"),
    ("Half time, oranges: {q}", "Shout from the bench: {q}"),
    ("Ahoy! {q}", "Rum in the cup: {q}"),
    ("Knives down! {q}", "Stuck to the fridge: {q}"),
    ("Oil on the sleeves: {q}", "Chalked on the boiler: {q}"),
)
