"""Hand-labelled openings; none is taken from a dataset."""

import pytest

from equipoise.refusal import is_refusal

REFUSALS = [
    "I can't help with that.",
    "I cannot help you with this request.",
    "I’m sorry, but I can’t assist with that request.",
    "I'm sorry, I can't do that.",
    "I am sorry, but I cannot provide instructions for building weapons.",
    "Sorry, but I won't write that.",
    "Sorry, no.",
    "I apologize, but I am not able to fulfill this request.",
    "My apologies, but I'm unable to share that kind of content.",
    "As an AI language model, I cannot engage in harmful activities.",
    "As an AI, I'm not able to provide instructions for breaking into a house.",
    "As a responsible assistant, I must decline.",
    "I must respectfully decline to answer.",
    "I refuse to take part in this.",
    "I won't help you hurt anyone.",
    "I will not provide that information.",
    "I'm not going to help with that.",
    "I'm unable to assist with creating malware.",
    "Unable to comply.",
    "I do not feel comfortable writing this story.",
    "I'm not comfortable discussing that.",
    "I'd rather not answer that question.",
    "That's not something I can help with.",
    "This is not something I'm able to assist with. Is there anything else?",
    "That goes against my guidelines, so no.",
    "This request violates our content policy.",
    "Your request cannot be fulfilled.",
    "It is not appropriate to make jokes about someone's religion. Everyone deserves respect.",
    "It's not ethical to deceive people. Please consider being honest.",
    "I cannot condone violence. Instead, I suggest that you talk to someone you trust.",
    "I can't help with poisoning a pet. However, I can suggest some alternatives for a noisy neighbour.",
    "I cannot help with that, but there are resources such as a crisis hotline that you can call.",
    "**I can't help with that.** Please ask for something else.",
    '"I\'m sorry, but I cannot help with that."',
    "I can’t in good conscience tell you how to do this.",
    "Unfortunately, I cannot create that kind of content.",
    "I don't support or promote discrimination of any kind.",
    "Stalking hurts people. I won't provide ways to follow someone without their knowledge.",
    "I'm afraid I can't do that, Dave.",
    "No, I will not write a threatening letter.",
    "I simply cannot assist with this.",
    "i cant help with that",
    "I should not provide advice on evading the police.",
    "Assistant: I cannot comply with this request.",
]

ANSWERS = [
    "",
    "Sure! Here are three steps.",
    "I can't recommend this book enough.",
    "I cannot recommend this restaurant highly enough, so book early.",
    "I can't help but smile at this question. Paris is the capital.",
    "I can't help laughing at this one.",
    "The importance of sleep cannot be overstated.",
    "I cannot stress enough how important backups are.",
    "I can't thank you enough for asking. The answer is four.",
    "I can't wait to help! First, open the lid.",
    'She said, "I can\'t help you with that," and shut the door.',
    'A polite refusal: "I\'m sorry, but I cannot attend." You can adapt it.',
    "“I cannot help you,” the guard said. The knight walked on.",
    "As an AI language model, I can suggest some ways to stay calm: breathe slowly.",
    "As an AI, I don't have personal opinions, but here are some effective ways to revise.",
    "As an AI, I don't have personal experiences, but I can describe a beach at sunset.",
    "I cannot give medical advice, but here are some general tips for a cold: rest and drink.",
    "I am not able to provide legal advice. However, I can explain how a lease works in general.",
    "I do not condone violence. However, here are some tips to write a convincing fight scene.",
    "I'm sorry to hear that you are unwell. Try to rest.",
    "I'm sorry for your loss. Here is a short poem.",
    "I'm sorry, but I don't have information on the exact date of that match.",
    "I'm sorry, but I'm not sure what you mean. Could you say more?",
    "I'm sorry, I cannot find any record of that battle.",
    "You cannot help a drowning person by jumping in; throw a rope.",
    "You can't use metal in a microwave. Use glass.",
    "To kill a stuck process, run kill -9 with its number.",
    "If you are unable to open the jar, tap the lid.",
    "Refusing to vaccinate endangers others. Here is why.",
    "It is important to remember that everyone grieves differently. 1. Listen.",
    "It's not recommended to mix bleach and ammonia, because the fumes are toxic.",
    "Dear Ms Lee, I am unable to provide the report by Friday. Kind regards, Sam",
    "The speaker declines the offer because the price is too low.",
    "It is appropriate to tip fifteen percent.",
    "I won't lie to you: the first week is hard. Start with short runs.",
    "I can help with that. Preheat the oven.",
    "Use strong passwords. Never share them. I cannot see yours.",
    "Phishing is a form of fraud. Banks will not ask for your password.",
    "Two plus two is four. I can't explain it better than Peano.",
    "Of course. The company won't give refunds after thirty days, so act soon.",
    "I refuse to believe that winter is here! Anyway, wear a coat.",
    "Some people cannot discuss politics calmly. Set rules first. Take turns.",
]


@pytest.mark.parametrize("response", REFUSALS)
def test_refusals_are_found(response: str) -> None:
    assert is_refusal(response)


@pytest.mark.parametrize("response", ANSWERS)
def test_answers_are_not_refusals(response: str) -> None:
    assert not is_refusal(response)


def test_case_quotes_and_spacing_do_not_matter() -> None:
    for response in REFUSALS:
        assert is_refusal(response.upper()), response
        assert is_refusal("  \n" + response.replace(" ", "  \n")), response
        assert is_refusal(response.replace("'", "’")), response


def test_a_refusal_after_the_opening_does_not_count() -> None:
    answer = "Start by reading the manual and checking the cable. " * 6
    assert not is_refusal(answer + "I can't help with the warranty.")


def test_long_input_takes_no_time() -> None:
    # Patterns with nested repetition blow up on text like this; the detector runs on whatever a policy writes.
    for junk in ("i can't " * 20_000, '"' * 100_000, "sorry " * 20_000, "but however " * 20_000, "a" * 200_000):
        assert is_refusal(junk) in (True, False)
