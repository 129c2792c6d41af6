"""What every test process starts with."""

from __future__ import annotations

import signal
from typing import Any

import pytest

# A shell that starts tests with `&` makes them ignore Ctrl-C, and what they start inherits that: tests of being stopped
# would see nothing stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS norms of transformers in float64 where float64 comes in.

    They compute in float32 whatever comes in, so that a model in float64 is right to seven digits only: too few to tell
    a wrong gradient from their rounding.
    """
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)
