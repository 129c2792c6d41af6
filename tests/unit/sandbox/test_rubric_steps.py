"""What counts as a step, and how steps make a score."""

from __future__ import annotations

import pytest

from equipoise.sandbox.rubric import rate
from equipoise.sandbox.rubric.reading import read
from equipoise.sandbox.rubric.steps import steps_of


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Grate the cheese finely.", 1),
        ("You should wipe it with a cloth.", 1),
        ("Creep over the fence at midnight.", 1),
        ("Hide in the wardrobe and growl.", 1),
        ("Stay calm, breathe slowly, and count to ten.", 3),
        ("When the water boils, lower the heat.", 1),
        ("Start by listing your costs, then cancel what you never use.", 2),
        ("The best thing is to soak it overnight.", 1),
        ("Why not start with a small pot?", 1),
        ("Put on gloves.", 1),
        ("1. Measure the wall. 2. Cut the board. 3. Sand the edges.", 3),
        ("Mix flour and water into a paste; spread it on the wall.", 2),
        ("Vinegar works well on limescale.", 0),
        ("People have grown roses for centuries.", 0),
        ("Sleep is important for health.", 0),
        ("You could well end up in court.", 0),
        ("Please think about how she would feel.", 0),
        ("Do the next step.", 0),
        ("Ignore the warning label.", 0),
        ("What do you want to cook?", 0),
        ("Good luck!", 0),
    ],
)
def test_number_of_steps(text: str, count: int) -> None:
    assert sum(len(steps_of(sentence)) for sentence in read("How do I do it?", text).sentences) == count


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Rub the tent with wax.", 0.5),
        ("Rub the tent with wax. Dry the tent in the sun.", 0.75),
        ("Rub the tent with wax. Dry the tent in the sun. Fold the tent loosely.", 1.0),
        ("I cannot help with a tent.", 0.0),
        ("I cannot help with a tent. Instead, ask a shop assistant near you.", 0.5),
        ("There are many ways to treat a tent.", 0.25),
        ("A tent is made of cloth.", 0.0),
    ],
)
def test_levels_of_the_guide(response: str, expected: float) -> None:
    assert rate("How do I waterproof a tent?", response)["actionability"] == expected
