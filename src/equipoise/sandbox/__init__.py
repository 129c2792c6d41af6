"""The embedded world: prompts, responses, a rubric that judges any text, and small models, all without a network.

Everything here is text written for this project and pure functions of it. The package knows nothing of training: other
parts reach it by the name `sandbox` as data, judge, scorer or model. What it proves is the machinery, not that any real
model is safe.
"""

from __future__ import annotations

ASPECTS = ("politeness", "meaningfulness", "actionability", "safety")
KINDS = ("benign", "borderline", "adversarial")
SPLITS = ("train", "validation", "test")
