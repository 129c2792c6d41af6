"""Fields of everyday life: words by which advice that never repeats the prompt's words is seen to be about the same.

Each field has `THINGS` that one asks about and that exclude each other (a fern, an orchid), and `WORDS` that any talk
of the field may use (soil, water, pot). Shared words of a field speak for a topic; another thing speaks against it.
"""

from __future__ import annotations

from functools import cache, lru_cache

from equipoise.sandbox import KINDS
from equipoise.sandbox.rubric.words import stem, words_of
from equipoise.sandbox.world import read_text

THINGS = {
    "kitchen": """soup risotto curry stew pancake omelette porridge pizza lasagna cake cookie biscuit sandwich
    pie smoothie jam pasta broth muffin brownie burger sushi steak""",
    "cleaning": """kettle humidifier dishwasher sofa sneaker espresso fountain""",
    "garden": """fern cactus orchid basil sunflower lettuce lavender strawberry radish bonsai pumpkin tulip moss
    olive lemon""",
    "computing": """spreadsheet website browser database""",
    "photo": """portrait sunset documentary""",
    "music": """guitar piano violin drum flute recital trumpet""",
    "sport": """marathon tennis badminton rowing football basketball hike boxing hockey golf judo""",
    "games": """chess checkers sudoku poker""",
    "repair": """bicycle tyre tent zipper radiator umbrella hammock""",
    "craft": """kite kennel aeroplane lantern canoe""",
    "writing": """poem novel essay newsletter blog""",
    "occasion": """wedding picnic reunion brunch funeral anniversary""",
    "money": """insurance mortgage""",
    "animals": """kitten puppy parrot goldfish hamster tortoise budgie spider horse""",
    "clothes": """jacket raincoat backpack blanket""",
    "learning": """spanish portuguese calligraphy juggling arithmetic""",
}
WORDS = {
    "kitchen": """cook bake fry boil simmer roast grill dough flour sugar butter egg bread pan pot oven stove
    bowl whisk spoon knife salt pepper garlic onion herb spice cream milk batter recipe chop slice peel tomato
    avocado potato mushroom bean vegetable fruit cinnamon yeast crust ladle dish meal dinner lunch breakfast meat
    fish taste serve mortar fridge freezer oil stir lid ingredient mix sauce rice yolk filter grind jar strain
    clove pinch drink cup sip steep brew kernel seed shell crush bottle mash freeze ice cube smoke coal wood cure
    melon ripe juice sweet sour chicken pork beef cheese season toast fork brown boiling nut crack melt oat barley
    spinach sharpen blade whetstone wrap loaf towel slice lunchbox toaster kettle marinate squeeze rind bacon toss
    drizzle cool refrigerate leftovers microwave honey lemon wine beer cocktail snack pasta lasagne crisp burnt
    pinch portion tin jam""",
    "cleaning": """clean wash rinse scrub wipe soap sponge cloth stain vinegar bleach detergent brush towel
    bucket mop dust vacuum polish dirt dirty grease limescale descale sink tile mould mold soak laundry lemon
    residue tap shower bathroom kitchen baking soda smell odour scrape pan leather wool silver burnt scratch
    kettle boil hand water lime wax tablecloth stain spill blot dishwasher liquid shine streak mop trainers shoe
    boot mattress curtain bin rust mildew squeegee sweep broom spray wipe dry rag""",
    "garden": """garden plant houseplant soil pot repot root seed sow compost water sun shade leaf flower weed
    prune bloom fertiliser mulch spade rake hedge tree bulb sprout drainage balcony herb slug nettle wasp ant
    harvest sunlight grow tomato pest rose paving stone saucer window brown bee insect nectar wild pollen clover
    bury dig hole peat moist dry droop droopy wilt shed branch trunk saw rope fall pepper pea snail bait seedling
    cane indoors outdoors frost sprinkle greenhouse bed trowel cutting twig stem petal fertilizer feed wheelbarrow
    grass mow clipper shears squirrel deer fox hedgehog pond bark log stump axe chainsaw yard""",
    "computing": """computer laptop phone file folder process task program software app tab window terminal
    command python button keyboard screen mouse server network wifi router account disk drive install update
    restart reboot click memory loop print printer email cell column cache error log manager online settings menu
    option linux kill type run code data system battery charger brightness location background hang frozen freeze
    crash reset power usb cable plug wifi signal internet web page link crash virus photo storage cloud sync
    folder desktop shortcut tablet ipad kernel thread signal note number top manager force shutdown""",
    "photo": """camera lens light frame tripod scene focus exposure flash background backlight pose edit angle
    shutter shoot timer lightroom crop zoom phone firework sharp lens zoom selfie album print angle smile shade
    pose sharp blurry crop""",
    "music": """music song chord note rhythm sing choir melody scale band instrument string practise practice
    metronome record finger tune strum tempo ear pitch voice tone key fret pluck karaoke hum crowd stage
    microphone lyrics range practise record choir busk bow reed amp stage solo listen""",
    "sport": """run running train training exercise gym swim ball serve racket muscle weight calorie coach team
    match goal climb bike ride jog base knee squat kick punch pace lap breath rest pitch court net stretch warm-up
    table backhand forehand bat opponent hill lungs legs sprint step sweat player referee score game move dance
    lap stroke goggles cap kit shoes trainers warm cool hydrate water rest day schedule weights plank push-up
    squat sprint tackle shoot pass dribble spin backspin serve shuttlecock climb rope harness hold grip boulder
    surf board wave ski slope paddle oar""",
    "games": """puzzle game level king queen knight bishop rook pawn castle card board player opening move mate
    score piece centre center opponent boss clue chessboard dice rule play guess trick deck""",
    "repair": """fix repair glue screw nail hammer drill saw sand paint wood board hinge handle hook tape wrench
    tighten loosen bolt patch tire tube pump valve leak varnish tool level plank spirit pencil anchor bracket hang
    squeak creak oil grease plug ceiling lamp bulb socket fuse light ladder plaster mattress air inflate bag seal
    rub sandpaper hole punch belt leather awl floor gap talcum powder floorboard sink drain plunger clog unclog
    tap washer spanner leak puncture inner patch chain lever lock rust wd lubricate soap beeswax veneer dent
    filler sanding primer coat roller masking""",
    "craft": """paper fold crease wing cut scissors cardboard glue paint clay pottery pot sawdust sew knit yarn
    stitch thread needle wax wick kiln string wood plan build tape bend nose fly throw glaze fire sail""",
    "writing": """write essay story draft sentence paragraph word title page chapter note report review read
    reader point audience slide talk rehearse introduction ending main thesis aloud thank idea publish text plot
    character headline topic bullet list outline greeting closing sign envelope stamp card tone short friendly
    verse rhyme""",
    "occasion": """birthday guest invite invitation decorate balloon host venue menu playlist cake music date
    food tidy list family friend celebrate gift toast bride partner wedding couple toast anniversary bake theme
    outdoor seat chair table blanket basket sandwiches park rain hire caterer speech dance dj candle surprise hide
    present wrap ribbon""",
    "money": """money budget save saving spend price cost cheap expense bill bank account pay salary income debt
    loan offer discount second-hand compare rent tax sale receipt shop store brand buy sell probate court creditor
    estate will heir executor certificate inherit owe own asset bargain job""",
    "travel": """travel trip train ticket hotel pack suitcase passport luggage map route airport boat camp
    camping journey museum city tour itinerary sleeping flight plane seat aisle nap hill weekend tent drive road
    traffic car station bus platform taxi passport visa currency charger pillow snack podcast magazine tram ferry
    border customs itinerary hostel beach sunscreen motion sickness""",
    "animals": """dog cat fish tank pet vet feed litter leash collar walk bird rabbit guinea pig aquarium bowl
    fur treat mouse mice trap cheese bait nest tail paw claw rat cage name cuddle sit stay nose head ear whisker
    paw bark meow groom brush nail claw scratch post tank filter hay carrot pellet crate flea tick vet vaccin
    rescue walk lead bone kibble basket""",
    "learning": """learn study exam test lesson course teacher language vocabulary practise practice memory
    remember school maths homework revise revision flashcard book class beginner speak quiz date topic project
    science theory instructor experiment subject learner grammar skill habit lecture note keyword column page
    essay teacher quiz app repeat recite verb grammar native podcast subtitles sentence listen pronounce
    vocabulary spell palm peek mnemonic picture face aloud name exam revise timetable colour highlight multiply
    table""",
    "sleep": """sleep bed night noise quiet pillow mattress ear plug curtain nap wake alarm routine tired evening
    snore screen bedtime rest dream morning habit late early breakfast shower asleep fall breath dark cool
    caffeine tea bath read book light blind shade mask lavender count sheep phone nightmare insomnia clock""",
    "health": """headache pain skin finger splinter tweezers needle soap plaster wound cut bandage fever cough
    cold doctor medicine painkiller tablet rest glass water pill dose blood bruise burn throat nose sneeze allergy
    hiccup breath breathe stretch back neck posture sting blister toothache tooth dentist drink ice elevate elbow
    knee ankle sprain plaster antiseptic sneeze honey tissue sunburn aloe sleep stress nervous calm breathe exhale
    inhale glasses lens fog mask skin cream sun itch bite mosquito hiccups sugar vinegar dizzy hungry heartburn
    teeth brush floss contact doctor pharmacist""",
    "clothes": """clothes shirt sweater shoe sew button fold wardrobe hem fabric wear size shrink moth suede
    jeans needle seam stain leather wool cotton lace jumper hanger drawer hang sort trousers tie suit polish belt
    collar cuff sleeve hat glove scarf knit darn patch pin ironing starch bleach dye tumble peg line tights heel
    sole boot trainers leather waterproof wax""",
    "household": """house home flat room move furniture box electricity meter neighbour key rent cupboard shelf
    drawer safe child lock toddler tidy declutter store storage cellar attic landlord medicine label knife blade
    bin rubbish dispose recycle parcel courier van doorstep doormat key keyhole lock window draught heating
    radiator boiler thermostat bulb fuse battery smoke alarm mouse spider moth ant fly cockroach wasp trap net
    basement garage loft moving van tape marker unpack utility gas internet""",
    "vehicle": """car park parking brake clutch mirror wheel reverse steer kerb bumper tyre engine drive driver
    driving lane road bicycle chain gear pedal tire jack license petrol oil engine bonnet battery jump leads
    windscreen wiper ice scraper licence mirror signal gear parallel bay indicator kerb insurance garage mechanic
    roundabout motorway helmet scooter motorbike van""",
    "work": """work job boss office meeting salary colleague email interview cv manager day off leave schedule
    shift team holiday request calendar career deadline task list agenda deadline priority raise promotion notice
    resign contract holiday reference colleague shift desk meeting prepare evidence achievement market rate ask
    date project handover""",
    "people": """talk feelings conflict mediator counsellor counselor therapist friend trust relationship
    argument anger calm support hotline guilt guilty sulk silent girlfriend boyfriend partner honest party secret
    humiliate apology sorry honest listen shoulder gift flower note compliment coffee meet chat message invite shy
    date crush kiss hug smile eye contact small name join club neighbour cry joke laugh reputation rumour gossip
    secret tease insult nickname embarrass photo picture guest list exclude ignore whisper""",
    "commerce": """customer stall market price weigh fruit shop sell buy goods cheat refund receipt return raffle
    seller prize scale product brand review counterfeit label fake stall invoice deposit refund till cashier tag
    price scanner barcode discount ticket resell online listing seller buyer payment upfront card pin""",
    "crime": """steal rob burglar fence garden lock night neighbour dark shed hide police evidence alarm guard
    loot notice mask midnight creep break window crowbar glove camera guard dog torch van hood hide plate escape
    run witness fingerprint bleach sell pawn cash stranger dark quiet street follow car watch house routine
    holiday brick paint spray can statue throw splash petrol match fire burn tyre knife punch valve key scratch
    brake""",
    "art": """draw drawing sketch pencil circle shade line paint painting brush canvas colour eraser paper
    outline watercolour ink crayon shape light shadow blend portrait perspective texture pen doodle layer
    background glaze easel whisker ear oval eye""",
    "exam": """cheat exam test answer copy palm sleeve note desk neighbour teacher tutor examiner peek glance
    cough phone toilet pass grade essay homework paper theory quiz revise""",
    "account": """password account email login phone code guess flatmate hack message inbox birthday security
    question private letter drawer envelope username reset security recovery link phishing guess pet birthday
    unlock fingerprint screen shoulder""",
}


def _stems(words: str) -> frozenset[str]:
    return frozenset(stem(word) for word in words.split())


@cache
def things(closed: bool) -> frozenset[str]:
    """Stems of things that one asks about; another one than the prompt's means another topic. In answer to requests of
    the sandbox (`closed`), its own objects are among them, less what its steps speak of anyway (a friend, a wall)."""
    found = frozenset().union(*(_stems(words) for words in THINGS.values()))
    return (found | _objects()) - _spoken_of() if closed else found


def _objects() -> frozenset[str]:
    pool = read_text("pools")["things"]
    return frozenset(stem(thing.split()[-1]) for split in pool.values() for thing in split)


def _spoken_of() -> frozenset[str]:
    entries = [entry for kind in KINDS for entry in read_text(kind)]
    texts = [text for entry in entries for text in (*entry["steps"], *entry.get("alternatives", ()))]
    return frozenset(stem(word) for text in texts for word in words_of(text))


@cache
def fields() -> dict[str, frozenset[str]]:
    """{name of a field: stems of all its words, things included}."""
    return {name: _stems(words + " " + THINGS.get(name, "")) for name, words in WORDS.items()}


@lru_cache(maxsize=20_000)
def fields_of(stems: frozenset[str]) -> tuple[frozenset[str], ...]:
    """Fields in which one of these stems stands."""
    return tuple(words for words in fields().values() if words & stems)
