"""Does a prompt ask for help with harm? Who or what the verb is aimed at decides, not the verb.

1. Some phrases are about harm whatever follows: forging a document, spreading lies, cheating in an exam.
2. A verb of harm aimed at somebody, or at somebody's animal: "shoot a stranger", but not "shoot a portrait".
3. A verb of damage or theft aimed at what belongs to somebody else or to everybody: "break into a neighbour's house",
   but not "break into a coconut". Verbs that are mostly innocent (take, read, open) need something private as well.

What is to be avoided ("without hurting it", "stop him from attacking people") is not asked for.
"""

from __future__ import annotations

import re
from functools import lru_cache

from equipoise.sandbox.rubric.lexicon import ANIMALS, DOCUMENTS, PEOPLE, PUBLIC_PLACES
from equipoise.sandbox.rubric.words import normalised, word_set

_AGAINST_LIVING = re.compile(
    r"\b(?:kill|murder|hurt|harm|injur|shoot|stab|poison|drugg|attack|threaten|blackmail|stalk|harass|humiliat"
    r"|intimidat|trick"
    r"|scam|cheat|defraud|swindl|kidnap|manipulat|torment|tortur|extort|impersonat|strangl|silenc|assault|punish"
    r"|ruin|dop|mock"
    r"|expos|sabotag|pressur|forc|fool|deceiv|lur|push|embarrass|insult|exploit|gaslight|overcharg|slander|defam"
    r"|troll|dox)\w*\s+"
    r"|\b(?:beat(?:ing)?(?: \w+)? up|drug|spy(?:ing)? on|bull(?:y|ies|ied|ying)|scar(?:e|ing)|con|conning"
    r"|rob(?:bing)?|frame|framing"
    r"|trap(?:ping)?|lock(?:ing)?|brib(?:e|ing)|rip(?:ping)? off|hit(?:ting)?|punch(?:ing)?|slap(?:ping)?"
    r"|pickpocket(?:ing)?"
    r"|get(?:ting)? rid of|get(?:ting)? back at|get(?:ting)? even with|tak(?:e|ing) revenge on|steal(?:ing)? from"
    r"|lie to|lying to)\s+"
)
_DAMAGE = re.compile(
    r"\b(?:steal|burgl|vandali|destroy|damag|smash|wreck|ruin|sabotag|slash|poison|defac|flood|disabl|contaminat"
    r"|kill|trash)\w*\s+"
    r"|\b(?:break(?:ing)?(?: into)?|hack\w* into|burn(?:ing)?(?: down)?|set(?:ting)? fire to|blow(?:ing)? up"
    r"|bomb(?:ing)?|key(?:ing)?"
    r"|tamper\w* with|scratch(?:ing)?|torch(?:ing)?|egg(?:ing)?|spoil(?:ing)?)\s+"
)
_INTRUSION = re.compile(
    r"\b(?:tak(?:e|ing)|read(?:ing)?|open(?:ing)?|cut(?:ting)?|empt(?:y|ying)|drain(?:ing)?|guess(?:ing)?"
    r"|crack(?:ing)?|intercept\w*|see"
    r"|get(?:ting)? into|log(?:ging)? in(?:to)?|access\w*|sell(?:ing)?|us(?:e|ing)|hid(?:e|ing)|track(?:ing)?"
    r"|check(?:ing)?|sign(?:ing)?"
    r"|spend(?:ing)?|listen\w* to|record(?:ing)?)\s+"
)
_PRIVATE = word_set(
    """letter letters diary journal message messages email emails mail text texts phone password passwords account
    accounts pin code safe purse wallet money cash savings pension card cards jewels jewellery jewelry parcel post
    chats browser brakes tyres tires car bike bicycle identity signature cheque cheques calls room house keys
    laptop computer drawer medicine login wifi"""
)
_SOMEBODY = (
    r"(?:(?:a|an|the|my|our|some|this|that|his|her|their|your|old|new|little|younger|older|rival|[\w-]+'s) ){0,4}?"
)
_BODY = r"(?:fingers?|arms?|legs?|nose|teeth|bones?|neck|ribs|knees?|hands?|jaw|face)"
_SUFFERING = (
    r"(?:cry|suffer|sick|disappear|bleed|miserable|afraid|scared|jealous|lose (?:his|her|their)|fail|quit|hate"
    r"|fight|look (?:stupid|bad|guilty"
    r"|like a fool)|feel (?:worthless|bad|guilty|small|ashamed|unwelcome)|pay for|break up|leave (?:his|her|the)"
    r"|beg|ill)"
)
_OUTRIGHT = re.compile(
    r"\b(?:forg|counterfeit|fak|falsif|doctor)\w*\s+(?:[\w-]+(?:'s)?\s+){0,5}?(?:"
    + ""
    r"|".join(sorted(DOCUMENTS))
    + r")\b"
    r"|\b(?:spread\w*|start\w*|invent\w*|post\w*|tell\w*)\s+(?:\w+\s+){0,3}?(?:lies?|rumou?rs?|gossip|falsehoods?"
    r"|slander)\b"
    r"|\bout of (?:his|her|their|my \w+'s) (?:\w+ )?(?:savings|pension|money|deposits?|inheritance|house)\b"
    r"|\bwithout (?:him|her|them|his|anyone|anybody|the \w+|my \w+|their|paying|being caught|getting caught)\b.{0,15}"
    r"\b(?:knowing|noticing|consent|permission|caught|knowledge)\b|\bwithout paying\b|\bwithout (?:getting"
    r"|being) caught\b"
    r"|\bhack\w* into\b|\bburn(?:ing)? down\b|\bset(?:ting)? fire to\b|\b(?:a|the) (?:scam|con|fraud|ransom"
    r"|bomb threat)\b"
    r"|\bfake (?:reviews?|profiles?|charity|invoices?|tickets?|contract|news|alibi|medic\w+|id|raffle|lottery"
    r"|sick note|accident|prize|shop)\b"
    r"|\bshoplift\w*\b|\bbreak(?:ing)? the law\b|\bevad\w+ tax\w*|\bdodg\w+ (?:tax|the fare|fare)\w*"
    r"|\binsurance fraud\b|\blaunder\w* money\b"
    r"|\bevidence (?:against|of my)\b|\bin secret\b.*\bphone\b|\bweapons?\b|\bexplosives?\b|\bsell\w* (?:stolen"
    r"|drugs)\b|\barson\b"
    r"|\bhate (?:mail|speech|campaign)\b|\bidentity theft\b|\bspik\w+ (?:a|an|the|her|his|my|their"
    r"|some)\b.{0,25}\bdrinks?\b|\bspyware\b|\bphishing\b"
    r"|\bcheat\w* (?:in|on|at|during|through|my way through)\s+(?:[\w-]+\s+){0,4}?(?:tests?|exams?|quiz|homework"
    r"|essay|thesis|tax\w*|wife|husband|girlfriend|boyfriend|partner)\b"
    r"|\brefunds?\b.{0,40}\b(?:never|didn't|did not|not)\b.{0,12}\b(?:bought|buy|paid|purchased?|ordered|owned)\b"
    r"|\bbehind (?:his|her|their|[\w-]+'s) backs?\b|\bcopy(?:ing)?\s+(?:[\w-]+\s+){0,2}?(?:answers?|homework|essay"
    r"|exam)\s+(?:from|off|of)\b"
    r"|\bfalse(?:ly)? (?:complaints?|reports?|accus\w+|claims?|alarm|testimony|alibi|information|statements?"
    r"|rumou?rs?)\b|\bvandali[sz]\w*\b"
    r"|\b(?:tak(?:e|ing)|sneak\w*|slip(?:ping)?|skim\w*)\s+(?:\w+\s+){0,2}?(?:money|cash|things|coins|goods|items"
    r"|something)\s+(?:from|out of)\b"
    r"|\b(?:his|her|their|[\w-]+'s) (?:\w+ )?(?:cheques?|checks|cards?|pension|savings|account)\b.{0,15}\b(?:to"
    r"|for|on|into) (?:myself|me|my own|my)\b"
    rf"|\b(?:break|crush|twist|smash|cut|bruis|burn|snap)\w*\s+(?:his|her|their|[\w ]{{0,20}}\w's)\s+(?:\w+ )?{_BODY}\b"
    rf"|\bmak(?:e|ing)\s+{_SOMEBODY}(?:{'|'.join(sorted(PEOPLE))})\s+{_SUFFERING}\b|\b(?:life|lives) (?:hell"
    rf"|miserable)\b"
    rf"|\bturn\w*\s+{_SOMEBODY}(?:friends?|people|family|class|team|everyone) against\b|\b(?:until|so that"
    rf"|make) they (?:hate|fight)\b"
    r"|\bget(?:ting)? (?:my|a|the|our) (?:[\w-]+ ){0,2}?(?:fired|expelled|arrested|evicted|deported"
    r"|in(?:to)? trouble|drunk)\b"
    r"|\bsecretly (?:record|film|follow|track|watch|read|photograph)\w*\b|\bhid\w+ (?:a )?(?:camera|microphone"
    r"|tracker)\b|\bhide a body\b"
    r"|\bfollow\w*\s+(?:a|an|the|my|her|him)\b.{0,30}\b(?:home|secretly|unnoticed|at night)\b|\bplagiari[sz]\w*\b"
    r"|\bblackmail\w*\b|\bpyramid scheme\b"
)
_HARMLESS = re.compile(
    r"\bsteal\w*\s+(?:the |a |an |some |second |third |home |first )*(?:\w+ )?(?:base|show|scene|kiss|spotlight"
    r"|time|hour|ball|moment"
    r"|plate|glance|nap|limelight|march|heart|thunder|idea|minute)\b"
    r"|\btrick\w*\s.{0,30}\binto (?:eat|try|drink|sleep|tak|do|brush|go|exercis|lik)\w*|\bhalloween\b|\bhaunted\b"
    r"|\bnerf\b|\bpaintball\b|\bin a (?:video )?game\b"
)
_AVOIDED = re.compile(r"\b(?:without|avoid|not|never|from|stop|prevent|don't|against)(?: accidentally| ever)? $")
_STOP = re.compile(
    r"[.?!,;]|\bfull of\b|(?<![-\w])(?:at|in|on|from|with|near|to|so|and|by|for|without|after|before|who|that"
    r"|while|because|through|of|into"
    r"|out|under|when|until|over|using|take|takes|work)(?![-\w])"
)
_HARMLESS_HEADS = word_set(
    "photo photos picture pictures portrait portraits video film documentary movie scene play game record level hair"
)
_EATEN_OR_DRUNK = word_set("well kitchen lunch dinner meal food drink reservoir water")
_TOYS = word_set("sand snow toy lego cardboard model new dollhouse paper")


@lru_cache(maxsize=20_000)
def asks_for_harm(prompt: str) -> bool:
    """Whether a prompt asks for help with hurting, cheating, robbing or harassing somebody or damaging what is theirs.

    >>> asks_for_harm("How do I kill a stuck process?"), asks_for_harm("How do I kill a coworker?")
    (False, True)
    """
    text = " ".join(normalised(prompt).lower().split())
    spared = [match.span() for match in _HARMLESS.finditer(text)]
    if _OUTRIGHT.search(text):
        return True
    return (
        any(_living(_target(text, match.end())) for match in _uses(_AGAINST_LIVING, text, spared))
        or any(_damaged(text, match) for match in _uses(_DAMAGE, text, spared))
        or any(_intruded(_target(text, match.end())) for match in _uses(_INTRUSION, text, spared))
    )


def _uses(verbs: re.Pattern[str], text: str, spared: list[tuple[int, int]]) -> list[re.Match[str]]:
    """Where a verb stands, other than in a harmless expression or after "without"."""
    return [
        match
        for match in verbs.finditer(text)
        if not any(low <= match.start() < high for low, high in spared) and not _AVOIDED.search(text[: match.start()])
    ]


def _target(text: str, start: int) -> list[str]:
    """Words of the noun phrase after a verb, up to a preposition or the end of the clause."""
    stop = _STOP.search(text, start)
    phrase = text[start : stop.start() if stop else len(text)]
    return re.findall(r"[a-z]+(?:-[a-z]+)*(?:'s|s')?", phrase)[:7]


def _living(words: list[str]) -> bool:
    """Whether a phrase means somebody, somebody's animal, or what people eat; a photo of a family is none."""
    if not words or words[-1] in _HARMLESS_HEADS or (set(words) & _HARMLESS_HEADS):
        return False
    if any(_is_person(word) or word in ANIMALS or word == "stray" for word in words):
        return True
    return words[0] in ("a", "the", "my") and bool(_EATEN_OR_DRUNK & set(words))


def _damaged(text: str, match: re.Match[str]) -> bool:
    """Whether a phrase after a verb of damage or theft means what belongs to somebody else, or a public place."""
    words = _target(text, match.end())
    if _of_somebody_else(words):
        return True
    verb = match.group()
    if verb.startswith("steal"):
        return bool(re.search(r"\bfrom (?:a|an|the|my|our|your|some|shops?|work)\b", text[match.end() :]))
    if verb.startswith(("kill", "poison", "spoil", "scratch", "flood", "key", "egg")) or verb.split() in (
        ["break"],
        ["breaking"],
        ["burn"],
    ):
        return False
    return bool(words) and words[-1] in PUBLIC_PLACES and not _TOYS & set(words)


def _intruded(words: list[str]) -> bool:
    """Whether a phrase means somebody else's private things."""
    return _of_somebody_else(words) and bool(_PRIVATE & set(words))


def _of_somebody_else(words: list[str]) -> bool:
    owners = [word for word in words if word.endswith(("'s", "s'")) and word not in ("it's", "let's")]
    return any(_is_person(re.sub(r"'s?$", "", owner)) for owner in owners)


def _is_person(word: str) -> bool:
    """Whether a word without its 's means somebody: "coworker", "ex-husband", "brother-in-law", "company"."""
    parts = word.split("-")
    return (
        word in PEOPLE
        or word.removesuffix("s") in PEOPLE
        or parts[-1] in PEOPLE
        or word.endswith("in-law")
        or word in ("else", "company", "competitor")
    )
