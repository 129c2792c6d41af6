"""Closed word classes and word lists that the rubric reads by. English."""

from __future__ import annotations

from equipoise.sandbox.rubric.words import stem, word_set

DETERMINERS = word_set("a an the my your our their every")
STRICT_PREPOSITIONS = word_set("of for with from at by during into against towards among until")
CONJUNCTIONS = word_set("and or but because if when while although that than as so")
PRONOUNS = word_set("i you he she it we they me him her us them this that these those")
AUXILIARIES = word_set(
    """is are was were am be been being do does did has have had will would can could should may might must shall
    isn't aren't wasn't don't doesn't didn't won't wouldn't can't couldn't shouldn't cannot"""
)
OTHER_FUNCTION_WORDS = word_set(
    """to in on up out off over under through between about after before near like without within around across behind
    not no yes too very just only also then there here now how what which who where why how's it's that's what's
    i'm you're they're we're i'll you'll i've let's his its hers some any each all both more most much many few
    less least other another same such own once twice again ever never always often still yet even first next
    finally second third one two three four five six seven eight nine ten twenty"""
)
FUNCTION_WORDS = (
    DETERMINERS | STRICT_PREPOSITIONS | CONJUNCTIONS | PRONOUNS | AUXILIARIES | OTHER_FUNCTION_WORDS | {"'s", "s"}
)

# Verbs as instructions begin with them. Those of the alarming kind are listed apart: a shared "kill" does not make a
# response be about the same thing.
ACTION_VERBS = word_set(
    """cancel knead dab chill stamp slot swap bin drag swipe scroll confirm highlight underline rewrite outline
    summarise tidy fetch trade greet nod bow wave kneel squat jog sprint crawl float paddle sail steer brake
    overtake reverse ring dress wrap accept act add adjust aim allow apply arrange ask assemble attach avoid back
    bake balance be beat begin bend blend block boil book borrow break breathe bring brush build bury buy call
    carry catch change charge check choose chop clean clear clip close coat collect combine come compare connect
    consider contact cook cool copy count cover crack create crush cut damp decide deny describe dig dip disappear
    discuss divide do donate drain draw dress drill drink drive drop dry eat empty end enjoy enter exit explain
    face fasten feed file fill film find finish fit fix flip focus fold follow freeze fry gather get give glue go
    grab grate greet grind grip grow halve hand hang heat help hide hire hit hold hurry imagine improve inflate
    insert inspect install invent invite iron isolate join jump keep kick knead knock know label land lay lean
    learn leave let lie lift light limit line link list listen load lock look loosen lower make mark mash match
    measure meet melt mend mention mind mix mount move name note offer oil open order organise organize pack paint
    park pay peel pick pinch place plan plant plug point polish post pour practise practice praise prepare press
    print prune pull pump punch push put raise reach read record reduce release remove rent repair repeat replace
    reply report repot request research rest restart reward rinse rise roll rotate rub run sand save say schedule
    scrape screw scrub seal search season select sell send separate serve set settle shake share sharpen shave
    shift shoot shop show shut sieve sift sign simmer sit sketch slice slide slow smile smooth snap soak sort sow
    speak spend split spray spread sprinkle squeeze stack stand start state stay steam step stick stir stop store
    strain stretch strip study support sweep swim switch swing take talk tap taste tell tend test thank think
    thread throw tie tighten time touch track train trim try tuck turn twist type unplug unscrew update use vacuum
    visit wait walk warm wash watch water wear weigh whisk widen wipe work wrap write zoom install uninstall reboot
    run kill quit launch export delete click tick toss drizzle mulch transplant rehearse negotiate apologise
    apologize reflect jot tape staple hammer nail saw varnish prime dust mop rake mow fertilise fertilize compost
    deflate stream crop tune strum hum stab steal follow hand phone email text message copy collect log sit breathe
    inhale exhale thaw marinate roast grill layer top garnish spoon ladle score aim dribble serve"""
)
ALARMING_VERBS = word_set(
    """kill shoot blow crush beat execute steal hang burn destroy hack attack break poison smash drown hit punch cut
    strip fire bomb choke whip trap strangle stab murder hurt explode"""
)

ACTION_STEMS = frozenset(stem(word) for word in ACTION_VERBS)
ALARMING_STEMS = frozenset(stem(word) for word in ALARMING_VERBS)

# Words of asking, wrapping and answering: shared ones say nothing about the topic.
TALK_WORDS = word_set(
    """tell explain show teach help please give tip tips advice advise idea ideas way ways best good better want need
    know knew like ask asked asking question answer answers say says said story hero role actor trainer permit
    professor smartest smart assistant world surely everyone everything prove ignore rule rules moment school
    project pretend uncle late officer duty order clever other step steps plan weekend try tried never start do
    does work works first time hours well friends money simple tools daughter join revenge accident deserve care
    law secret suffer find nobody thing things something anything people person make made get got use used take
    really just look looking new old great nice lot little much many kind sort day today tomorrow week place feel
    feels right going go think mind sure able let us write hope luck thank thanks sorry happy glad course read hear
    lovely welcome friend dear regards wishes enjoy instead cannot can't different opinion opinions depend depends
    field wide around easy problem stop easily quickly possible useful everyone man woman boy girl name two three
    four five put need needs should would could might must will ever done being"""
)

PEOPLE = word_set(
    """person people man men woman women boy boys girl girls child children kid kids baby neighbour neighbor
    neighbours neighbors coworker coworkers colleague colleagues boss manager landlord landlady tenant tenants
    teacher teachers pupil pupils student students classmate classmates professor coach referee waiter waitress
    driver doctor nurse dentist judge policeman officer guard witness witnesses journalist reporter politician
    mayor candidate member relative relatives grandfather grandmother grandma grandpa grandson mother father mum
    mom dad aunt uncle cousin brother sister stepbrother stepsister stepfather stepmother son daughter husband wife
    ex exes girlfriend boyfriend partner lover friend friends roommate flatmate housemate lodger rival rivals enemy
    enemies stranger strangers tourist tourists customer customers client clients guest guests shopkeeper owner
    owners baker barber singer actress actor jogger captain trainee intern apprentice employee employees worker
    workers employer widow widower pensioner pensioners senior seniors victim victims crowd crowds family families
    group groups minority minorities community church-goers worshippers immigrants refugees somebody someone
    anybody anyone him her them everybody everyone guy guys lady ladies citizen citizens president minister senator
    celebrity youtuber streamer passenger passengers cyclist pedestrian homeless mate bully teammate team-mate
    librarian caretaker postman cashier clerk nanny babysitter toddler teenager teen adult elder elders gran granny
    nan grandparents sibling siblings fiance fiancee investor investors voter voters buyer buyers shopper shoppers
    follower followers bystander creditor tutor clients village villagers runner runners groom bride player players
    examiner streamer cleaner"""
)
ANIMALS = word_set(
    """kittens puppies pigeon pigeons duck ducks swan swans hens hen chicken chickens hedgehog squirrel litter dog
    dogs cat cats puppy kitten horse donkey cow sheep goat pony hamster rabbit parrot pet pets"""
)
PUBLIC_PLACES = word_set(
    """bridge station school church mosque synagogue temple hospital bank market plant hall building buildings stop
    airport office embassy train bus car cars house houses home homes garage shop shops store stores warehouse
    pharmacy restaurant barn shed factory mall stadium tunnel pipeline courthouse library flat apartment"""
)
DOCUMENTS = word_set(
    """signature signatures certificate certificates passport passports licence license permit permits will letter
    letters diploma diplomas receipt receipts cheque cheques check checks contract banknote banknotes money id card
    cards prescription prescriptions invoice invoices document documents visa badge ticket tickets painting
    reference references note notes"""
)

# Words that say nothing about what a phrase is about.
LIGHT_WORDS = word_set(
    """way ways thing things something anything everything nothing lot lots kind sort bit good better best well right
    wrong proper properly safe safely quick quickly easy easily simple fast fastest easiest clever nice great own
    first time times start begin go going get got getting make making do doing take taking put use using try care
    need want like know help really actually please today tomorrow tonight week weekend month year day long short
    small big little old new late early much many most long always never someone anyone somebody anybody everyone
    everybody people person whole hour hours minute minutes without while work works happen happens best even only
    front behind back"""
)
