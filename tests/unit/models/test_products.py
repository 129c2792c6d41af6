"""Joined products against the layers called one by one."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from equipoise.models.products import LinearParts, NotPlain, Product

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Layers(nn.Module):
    """Three layers with the same input, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 20), nn.Linear(12, 5, bias=False), nn.Linear(12, 8)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([self.first(rows), self.second(rows), self.third(rows)], dim=-1)


def adapted(*names: str, **settings: Any) -> Layers:
    """With an adapter whose B is not 0 on the layers named."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": list(names), **settings})
    model = peft.inject_adapter_in_model(config, Layers())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model.eval()  # type: ignore[return-value]


def layers_of(model: Layers) -> list[nn.Module]:
    return [model.first, model.second, model.third]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("names", [(), ("second",), ("first", "third"), ("first", "second", "third")])
@pytest.mark.parametrize("rows", [1, 17])
def test_equals_the_layers(names: tuple[str, ...], rows: int, dtype: torch.dtype) -> None:
    model = (adapted(*names) if names else Layers().eval()).double()
    inputs = torch.randn(rows, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(inputs)
        found = Product(layers_of(model), dtype)(inputs.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


def test_several_adapters_add_up_and_an_adapter_that_is_off_adds_nothing() -> None:
    model = adapted("first", "second").double()
    torch.manual_seed(4)
    for layer in (model.first, model.second):
        layer.update_layer(  # type: ignore[operator]
            "other", r=2, lora_alpha=3, config=peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False)
        )
        layer.set_adapter(["default", "other"])  # type: ignore[operator]
    model.double()
    inputs = torch.randn(6, 12, dtype=torch.float64)
    with torch.no_grad():
        both = model(inputs)
        torch.testing.assert_close(Product(layers_of(model), torch.float64)(inputs), both)
        for layer in (model.first, model.second):
            layer.enable_adapters(False)  # type: ignore[operator]
        off = model(inputs)
        torch.testing.assert_close(Product(layers_of(model), torch.float64)(inputs), off)
    assert float((both - off).abs().max()) > 0.1


def test_weights_are_those_of_when_it_was_built() -> None:
    model, inputs = Layers().eval(), torch.randn(4, 12)
    with torch.no_grad():
        product, before = Product(layers_of(model), torch.float32), model(inputs)
        for parameter in model.parameters():
            parameter.add_(1.0)
        torch.testing.assert_close(product(inputs), before)


class Louder(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_what_does_more_is_refused() -> None:
    with pytest.raises(NotPlain, match="a Louder for a linear layer"):
        LinearParts.of(Louder(3, 3))
    with pytest.raises(NotPlain, match="not a plain LoRA"):
        LinearParts.of(adapted("first", use_dora=True).first)
    with pytest.raises(NotPlain, match="not a plain LoRA"):
        LinearParts.of(adapted("first", lora_bias=True).first)
    dropping = adapted("first", lora_dropout=0.5)
    assert len(LinearParts.of(dropping.first).updates) == 1
    with pytest.raises(NotPlain, match="drops inputs"):
        LinearParts.of(dropping.train().first)
    merged = adapted("first")
    merged.first.merge()  # type: ignore[operator]
    for enabled in (True, False):  # peft takes a merged adapter out when one that is off is called: weights change
        merged.first.enable_adapters(enabled)  # type: ignore[operator]
        with pytest.raises(NotPlain, match="merged"):
            LinearParts.of(merged.first)
    with pytest.raises(NotPlain, match="of peft"):
        config = peft.IA3Config(target_modules=["first"], feedforward_modules=[])
        LinearParts.of(peft.inject_adapter_in_model(config, Layers()).first)  # type: ignore[arg-type]
