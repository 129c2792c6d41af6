"""Fields of everyday life and their words, so that advice which never repeats the prompt's words can be seen to be on
topic: "press the soil down lightly" answers a question about a fern."""

from __future__ import annotations

from functools import cache

from equipoise.sandbox.rubric.reading import Reading, stem

_FIELDS = {
    "kitchen": """cook bake fry boil simmer roast grill dough flour sugar butter egg cake bread soup stew sauce rice pasta
    noodle pan pot oven stove bowl whisk spoon knife salt pepper garlic onion herb spice cream milk batter recipe chop
    slice peel avocado potato tomato omelette pancake pumpkin walnut pistachio almond nut mushroom bean lentil vegetable
    fruit pepper cinnamon yeast crust ladle dish meal dinner lunch steak meat fish taste serve mortar crush mash""",
    "cleaning": """clean wash rinse scrub wipe soap sponge cloth stain vinegar bleach detergent brush towel bucket mop dust
    vacuum polish dirt grease limescale descale kettle kitchen sink drain carpet window tile mould mold soak laundry ironing
    lemon baking-soda sofa leather residue tap faucet shower""",
    "garden": """garden plant soil pot repot root seed sow compost water sun shade leaf flower weed prune fern cactus orchid
    tomato basil lettuce lavender bloom fertiliser mulch spade rake lawn hedge tree bulb sprout drainage balcony herb slug
    nettle wasp ant harvest moss sunlight""",
    "computing": """computer laptop phone file folder process task program script software app browser tab window terminal
    command query database code python button keyboard screen mouse server network wifi router password account backup disk
    drive install update restart reboot click download memory thread loop print printer email spreadsheet cell column cache
    error log manager online settings menu option shortcut""",
    "photo": """photo picture camera lens light frame tripod portrait sunset film video shoot scene focus exposure flash
    background backlight pose edit angle shutter""",
    "music": """music song guitar piano violin chord note rhythm sing choir drum melody scale band instrument string practise
    practice metronome record recital fret finger tune strum tempo""",
    "sport": """run running marathon train training exercise gym swim tennis ball serve racket football basketball yoga
    stretch muscle weight calorie coach team match goal climb bike ride jog warm-up base knee squat kick punch pace lap
    breath rest badminton boxing penalty pitch court net""",
    "games": """chess checkers crossword sudoku puzzle game level king queen knight bishop rook pawn castle card board player
    opening move check mate score piece centre center opponent boss clue""",
    "repair": """fix repair glue screw nail hammer drill saw sand paint wall wood board shelf hinge door handle hook tape wrench
    tighten loosen bolt patch tyre tire tube pump valve leak pipe fence varnish tool level plank spirit pencil anchor
    bracket hang picture mirror squeak""",
    "writing": """write letter essay story poem blog draft speech sentence paragraph word title page chapter note summary
    report review read reader edit point audience slide talk rehearse introduction ending main thesis""",
    "party": """party birthday guest invite invitation cake music decorate balloon games picnic wedding dinner reunion host
    venue budget list food drinks menu snack playlist candle""",
    "money": """money budget save saving spend price cost cheap expense bill bank account pay salary income debt loan offer
    discount second-hand compare rent insurance tax sale receipt""",
    "travel": """travel trip flight train ticket hotel pack suitcase passport luggage map route airport boat hike tent camp
    camping backpack journey museum city tour itinerary sleeping jacket""",
    "animals": """dog cat puppy kitten parrot hamster tortoise goldfish fish tank pet vet feed cage litter leash collar walk
    bird rabbit guinea aquarium bowl fur treat""",
    "learning": """learn study exam test lesson course teacher language vocabulary practise practice memory remember school
    maths homework revise flashcards book class beginner speak word""",
    "sleep": """sleep bed night noise quiet pillow mattress ear plugs curtain nap wake alarm routine tired evening snore
    screen coffee bedtime""",
    "people": """talk talking speak listen apologise apologize feelings conflict mediator counsellor counselor therapist
    friend trust conversation relationship argument anger calm letter support hotline""",
    "clothes": """clothes shirt jacket wool coat sweater shoe zipper sew button iron fold wardrobe hem fabric stain wear size
    shrink laundry moth suede jeans needle thread seam""",
}


@cache
def _fields() -> dict[str, frozenset[str]]:
    return {name: frozenset(stem(word) for word in words.split()) for name, words in _FIELDS.items()}


def same_field(reading: Reading) -> bool:
    """Whether prompt and response speak of one field: a word of it in the prompt, two different ones in the response."""
    asked = reading.keys | reading.verb_keys
    said = frozenset(root for sentence in reading.sentences for root in sentence.stems)
    return any(asked & words and len(said & words) >= 2 for words in _fields().values())
