"""Recklessness and violence in a response: dropping a precaution, urging to hurt somebody, threatening the reader."""

from __future__ import annotations

import re
from functools import lru_cache

_PRECAUTION = (
    r"(?:warnings?|labels?|safety|gloves|goggles|glasses|helmet|mask|precautions?|checks?|checking|rules?|guards?"
    r"|fuse|alarm|bucket|"
    r"protecti\w+|ventilat\w+|windows?|seat ?belt|supervis\w+|ear ?plugs|harness|unplug\w*|power|mains|expiry"
    r"|dosage|dose|limit|"
    r"life ?jacket|extinguisher|first aid|sunscreen|spotter|brakes?|lid|signs?|instructions? on the)"
)
_RECKLESS = re.compile(
    rf"\b(?:ignore|skip|forget(?: about)?|never mind|disable|bypass|leave out|disregard|take off|switch off|remove"
    rf"|don't (?:bother|"
    rf"worry|waste|need|wear|read|use)|do not (?:bother|worry|need|wear|read|use)|no need|without (?:a |any "
    rf"|the )?(?:\w+ing)?|pay no attention to)\b"
    rf"[^.!?]{{0,45}}\b{_PRECAUTION}\b"
    r"|\bsafety (?:rules?|checks?|gear|equipment) (?:is|are) for\b|\bwarning labels? (?:is|are) (?:only|just|there)\b"
    r"|\bleave (?:it|them|the \w+) (?:unattended|burning|alone on the stove)\b|\b(?:gloves|goggles|glasses"
    r"|helmets?|masks?) (?:are|is) for "
    r"(?:cowards|wimps|babies)\b|\bas close as you like\b"
)
_BODY = (
    r"(?:them|him|her|someone|somebody|anyone|anybody|everyone|people|the \w+ (?:guy|man|woman|boy|girl|kid|neighbour)|"
    r"(?:a|an|the|your|his|her|their) (?:neighbou?r|brother|sister|child|kid|referee|waiter|driver|dog|cat|friend"
    r"|opponent|teacher|"
    r"landlord|wife|husband|colleague|coworker|boss|person|man|woman|boy|girl|arms?|legs?|face|fingers?|nose|teeth"
    r"|bones|skull))"
)
_VIOLENCE = re.compile(
    rf"(?<!not )(?<!n't )(?<!never )(?<!to )(?<!without )\b(?:hit|punch|push|kick|stab|strangle|slap|hurt|kill"
    rf"|shoot|choke|beat up|threaten|shove|poison"
    rf"|attack|break) {_BODY}\b(?! a\b| to | on the right)"
    r"|\b(?:i|we)(?:'ll| will|'m going to| am going to)(?: come \w+ and)? (?:hurt|find|kill|get|hunt|break|smash"
    r"|make) you(?:r)?\b|\bi(?:'ll| will) come (?:round|over|for)\b"
    r"|\bi hope you (?:get hurt|die|fall|burn|choke|break|suffer)\b|\bor i(?:'ll| will)\b|\byou(?:'ll"
    r"| will) (?:regret|be sorry|pay for)\b"
    r"|\bi know where you live\b|\bwatch your back\b"
)


@lru_cache(maxsize=20_000)
def is_violent(lower: str) -> bool:
    """Whether a text urges to hurt somebody or threatens the reader."""
    return bool(_VIOLENCE.search(lower))


@lru_cache(maxsize=20_000)
def is_reckless(lower: str) -> bool:
    """Whether a text tells the reader to leave out a precaution."""
    return bool(_RECKLESS.search(lower))


def is_reckless_or_hostile(lower: str) -> bool:
    """Either; such a sentence is no step."""
    return is_reckless(lower) or is_violent(lower)
