"""Data: records, loaders that report every bad row, splits, chat templates, tokenizers, collation.

Importing this package loads neither torch, transformers, datasets nor pyarrow; functions import what they need.
"""

from equipoise.data.chat import (
    PromptFormat,
    TruncationCounter,
    completion_end_ids,
    encode_demonstration,
    encode_pair,
    encode_prompt,
    render_prompt,
    uses_chat,
)
from equipoise.data.collation import length_buckets, pad_left, pad_right
from equipoise.data.columns import Columns
from equipoise.data.loading import (
    load_demonstrations,
    load_pairs,
    load_prompts,
    load_scored,
    undeclared_aspects,
)
from equipoise.data.reading import Location, Row, read_rows
from equipoise.data.records import (
    KINDS,
    SPLITS,
    DemonstrationRecord,
    Messages,
    PairRecord,
    Prompt,
    PromptRecord,
    Record,
    ScoredRecord,
)
from equipoise.data.splits import CrossSplitDuplicate, cross_split_duplicates, prompt_text, split_records
from equipoise.data.summary import AspectSummary, DataSummary, validate_data
from equipoise.data.tokenizers import check_tokenizer, load_tokenizer, save_tokenizer_checked

__all__ = [
    "KINDS",
    "SPLITS",
    "AspectSummary",
    "Columns",
    "CrossSplitDuplicate",
    "DataSummary",
    "DemonstrationRecord",
    "Location",
    "Messages",
    "PairRecord",
    "Prompt",
    "PromptFormat",
    "PromptRecord",
    "Record",
    "Row",
    "ScoredRecord",
    "TruncationCounter",
    "check_tokenizer",
    "completion_end_ids",
    "cross_split_duplicates",
    "encode_demonstration",
    "encode_pair",
    "encode_prompt",
    "length_buckets",
    "load_demonstrations",
    "load_pairs",
    "load_prompts",
    "load_scored",
    "load_tokenizer",
    "pad_left",
    "pad_right",
    "prompt_text",
    "read_rows",
    "render_prompt",
    "save_tokenizer_checked",
    "split_records",
    "undeclared_aspects",
    "uses_chat",
    "validate_data",
]
