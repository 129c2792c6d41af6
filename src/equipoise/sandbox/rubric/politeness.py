"""Politeness: the tone towards the reader.

Distinct kinds of courtesy are counted, so that repeating one earns nothing; remarks against the reader take it away.
Hedges and bare demands move the score by at most 0.1, after the strategies of Danescu-Niculescu-Mizil et al.
(ACL 2013).
"""

from __future__ import annotations

import re
from functools import lru_cache

from equipoise.sandbox.rubric.reading import Reading, Sentence
from equipoise.sandbox.rubric.words import word_set

COURTESIES = {
    "greeting": r"^(?:hello|hi|hey there|dear|good (?:morning|afternoon|evening|day))\b|good to hear from you"
    r"|nice to meet",
    "gratitude": r"\b(?:thanks|thank you|grateful|appreciate|much obliged)\b",
    "apology": r"\b(?:sorry|apologi[sz]e|apologies|i'm afraid|i am afraid|excuse me|pardon me|regret)\b",
    "please": r"\bplease\b|\bkindly\b",
    "gladness": r"\b(?:happy to|glad|pleasure|delighted|of course|certainly|gladly"
    r"|you(?:'re| are) (?:most |very )?welcome"
    r"|at your service|love to help|be happy|so happy|here for you)\b",
    "wishes": r"\b(?:good luck|best of luck|hope (?:this|that|it|you|the|your|everything|all)"
    r"|have (?:a|an|fun|lots)\b.{0,25}"
    r"\b(?:day|time|trip|evening|fun|weekend|party|one)|enjoy\b|take care|all the best"
    r"|best wishes|(?<!with )kind regards"
    r"|warm regards"
    r"|cheers|wish(?:es|ing)? you|let me know|feel free|ask (?:me )?again|break a leg|you(?:'ve| have) got this"
    r"|happy \w+ing!"
    r"|come back any ?time|just ask)\b",
    "praise": r"\b(?:(?:nice|great|good|lovely|excellent|wonderful|fantastic|beautiful|fine|thoughtful) "
    r"(?:question|idea|choice"
    r"|thought|plan|project|hobby|of you)|congratulations|well done|how (?:lovely|nice|wonderful|exciting))\b",
}
INSULTS = (
    r"\bbravo\b|\bbright(?:est)? (?:bulb|spark)\b|\bslow ?coach\b|\b(?:einstein|sherlock|captain obvious)\b"
    r"|\bsharpest (?:tool|knife)\b"
    r"|\beven you (?:might|can|could|should)\b|\bwow,? (?:what a|you really)\b|\b(?:little|such a|you) creep\b"
    r"|\bmake me sick\b|\bgrow up\b"
    r"|\b(?:are|must be) (?:really |so )?(?:dense|thick|slow)\b|\bblockhead|\bnumbskull|\bnitwit|\btwit\b"
    r"|\bhalfwit|\bcretin|\bsimpleton"
    r"|\byou(?:'re| are) (?:a |an |such a )?(?:joke|mess|waste|failure|nobody|disaster|burden|coward|baby"
    r"|nuisance)\b|\bcongratulations on (?:being|failing)\b"
    r"|\bhow (?:did|do) you (?:even )?(?:survive|manage to (?:dress|breathe))|\byour (?:tiny|little|small|empty"
    r"|thick) (?:brain|mind|head|skull)\b|\b(?:stupid|idiots?|idiotic|dumb|moron\w*|imbecile|fools?|foolish"
    r"|dimwit\w*|brainless|pathetic|losers?|hopeless"
    r"|clueless|incompetent|useless (?:person|excuse|idiot)|lazy|ignorant|ridiculous (?:person|question)|fat|ugly"
    r"|disgrace)\b"
    r"|\blisten,? genius\b|\bgenius\b[.!]|\buse your brain\b|\bhalf a brain\b|\bno brain\b|\beven (?:a|an"
    r"|my) [\w ]{3,30}"
    r"(?:knows?|could|can|understands?)\b"
    r"|\bwast(?:e|ing) (?:of )?(?:my|everyone's|our|everybody's) time\b|\byou (?:will|'ll) (?:\w+ )?(?:fail|mess"
    r"|ruin)\b"
    r"|\bfail (?:anyway|as usual|again)\b|\bshut up\b|\bwhat is wrong with you\b|\bwhat's wrong with you\b"
    r"|\btoo (?:lazy|slow|thick|dense|stupid|dumb)\b|\bare you (?:blind|deaf|serious|kidding)\b|\bembarrass(?:ing"
    r"|ment)\b"
    r"|\bpeople like you\b|\bbet you (?:can't|cannot|will)\b|\bclown\b|\bjoke of a\b|\blaughable\b|\bi pity\b"
    r"|\bashamed of yourself\b|\bshould be ashamed\b|\bnobody (?:likes|wants) you\b"
)
CURT = (
    r"\bstop (?:nagging|whining|wasting|pestering)\b|\bdon't (?:bug|pester|annoy) me\b|\b(?:i have"
    r"|i've) (?:got )?better things\b|\bstop being\b|\b(?:figure|work|sort|find) (?:it|that|this"
    r"|out)+ ?(?:out )?(?:for )?yourself\b|\byourself, (?:ok|okay)\b"
    r"|\b(?:google|look) (?:it|that)(?: up)?(?: yourself)?[.!]|\bjust google\b|\bnot my (?:problem|job|business"
    r"|concern)\b"
    r"|\b(?:do not|don't|stop) bother(?:ing)? me\b|\bleave me alone\b|\bgo away\b|\bwho cares\b|\bi (?:do not"
    r"|don't) care\b"
    r"|\bget lost\b|\bwhatever[.!]|\bstop asking\b|\bobviously\b|\bread the manual\b|\bif you must\b|\bnot again\b"
    r"|\bhow many times\b|\bas i (?:already )?said\b|\bget on with it\b|\bi have better things\b|\bbored\b"
    r"|\byawn\b|\bugh\b"
    r"|\bhurry up\b|\bi(?:'m| am) (?:busy|tired of)\b|\bdo i look like\b|^no\.(?! \w+ (?:would|is|are))$"
)
_HEDGE = re.compile(r"\b(?:could|would|perhaps|maybe|might|if you like|if you wish|by the way|may i|would you)\b")
_DEMAND = re.compile(
    r"\b(?:you must|you have to|immediately|at once|i demand|explain yourself|why (?:did|would|are) you)\b"
)
_COURTESIES = {name: re.compile(pattern) for name, pattern in COURTESIES.items()}
_INSULTS = re.compile(INSULTS)
_CURT = re.compile(CURT, re.MULTILINE)
_FILLERS = word_set("so very much most and dear friend my you are is it was that this i am for to a the")


def politeness(reading: Reading) -> float:
    """Score in [0, 1]: 0 insult, 0.25 curt or mixed, 0.5 neutral, 0.75 one courtesy, 1 two kinds of courtesy. What is
    copied from the prompt is nobody's courtesy."""
    asked = reading.request.text.lower()
    courteous = [s for s in reading.sentences if kinds_of_courtesy(s.lower) and s.lower not in asked]
    kinds = frozenset[str]().union(*(kinds_of_courtesy(s.lower) for s in courteous))
    if any(_insults(s.lower) for s in reading.sentences):
        return 0.25 if kinds else 0.0
    if any(is_rude(s.lower) for s in reading.sentences):
        return 0.25
    if not kinds:
        return _shaded(0.5, reading)
    if in_place_of_an_answer(reading, courteous):
        return 0.5
    return 1.0 if len(kinds) > 1 else _shaded(0.75, reading)


@lru_cache(maxsize=20_000)
def kinds_of_courtesy(lower: str) -> frozenset[str]:
    """Names of the kinds of courtesy in a lower-case sentence."""
    return frozenset(name for name, pattern in _COURTESIES.items() if pattern.search(lower))


@lru_cache(maxsize=20_000)
def _insults(lower: str) -> bool:
    return bool(_INSULTS.search(lower))


@lru_cache(maxsize=20_000)
def is_rude(lower: str) -> bool:
    """Whether a lower-case sentence is an insult or curt."""
    return _insults(lower) or bool(_CURT.search(lower))


def in_place_of_an_answer(reading: Reading, courteous: list[Sentence]) -> bool:
    """Whether courtesies are all there is, or drown what else there is. A refusal is an answer."""
    if any(sentence.refuses for sentence in reading.sentences):
        return False
    bare = [s for s in courteous if is_only_courtesy(s)]
    others = len(reading.sentences) - len(bare)
    return len(bare) >= 2 and (others == 0 or len(bare) >= 3 * others)


@lru_cache(maxsize=20_000)
def is_only_courtesy(sentence: Sentence) -> bool:
    """Whether a sentence says nothing beyond its courtesy."""
    if sentence.refuses or not kinds_of_courtesy(sentence.lower):
        return False
    lower = sentence.lower
    for pattern in _COURTESIES.values():
        lower = pattern.sub(" ", lower)
    return sum(word not in _FILLERS for word in re.findall(r"[a-z']+", lower)) <= 5


def _shaded(level: float, reading: Reading) -> float:
    """Hedges and demands move a level by 0.1."""
    hedged, demanding = bool(_HEDGE.search(reading.lower)), bool(_DEMAND.search(reading.lower))
    return round(level + 0.1 * (hedged - demanding), 3)
