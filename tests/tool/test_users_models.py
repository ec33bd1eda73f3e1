"""`check --model` on models as public code with `rotary_xpos` builds them, smaller; the parameters are random."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import randomize_
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.xpos.__main__ import main

Factory = Callable[[], nn.Module]
# what the check leaves out, and a word of the reason
LEFT_OUT: dict[str, dict[str, str]] = {}
NO_MEMS = {"mems": "its max_mem_len is 0"}


def leaves_out(reasons: dict[str, str]) -> Callable[[Factory], Factory]:
    def register(factory: Factory) -> Factory:
        LEFT_OUT[factory.__name__] = reasons
        return factory

    return register


def decoder(**options: Any) -> Decoder:
    sizes: dict[str, Any] = dict(dim=32, depth=2, heads=2, attn_dim_head=16)
    torch.manual_seed(0)
    return randomize_(Decoder(**{**sizes, **options}, rotary_xpos=True, verbose=False), 0)


def language_model(max_seq_len: int = 1024, use_abs_pos_emb: bool = False, **options: Any) -> TransformerWrapper:
    layers = decoder(**options)
    return TransformerWrapper(
        num_tokens=64, max_seq_len=max_seq_len, use_abs_pos_emb=use_abs_pos_emb, attn_layers=layers
    )


CACHE = ("cached-whole", "cached-new", "chunked")


@leaves_out({**NO_MEMS, **dict.fromkeys(CACHE, "plain rotary")})
def alibi() -> nn.Module:
    return language_model(8192, alibi_pos_bias=True, attn_flash=True, attn_one_kv_head=True, attn_qk_norm=True)


class Autocast(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@leaves_out(NO_MEMS)
def residual_attention() -> nn.Module:
    options: dict[str, Any] = dict(residual_attn=True, attn_add_zero_kv=True, pre_norm=False)
    model = language_model(**options, attn_qk_norm=True, attn_qk_norm_dim_scale=True, rotary_xpos_scale_base=32768)
    return Autocast(torch.compile(AutoregressiveWrapper(model)))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = language_model(attn_num_mem_kv=16, use_scalenorm=True, attn_flash=True, layer_dropout=0.1)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.net(x, self_attn_kv_mask=seen)


@leaves_out({**NO_MEMS, "shift": "plain rotary"})
def memory_keys() -> nn.Module:
    return Masked()


@leaves_out({**NO_MEMS, **dict.fromkeys(CACHE, "shift_tokens")})
def laser() -> nn.Module:
    options: dict[str, Any] = dict(attn_laser=True, add_value_residual=True, shift_tokens=1, attn_qk_norm=True)
    model = language_model(4096, **options)
    model.compile(dynamic=False)
    return model


@leaves_out(NO_MEMS)
def cross_attention() -> nn.Module:
    return language_model(cross_attend=True, attn_sparse_topk=8)


@leaves_out(NO_MEMS)
def condition() -> nn.Module:
    return language_model(use_adaptive_layernorm=True, use_adaptive_layerscale=True, dim_condition=16)


class Wrapper(nn.Module):
    """Memory tokens at 0, the text from 10,000 on."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(4, 32))
        self.embed = nn.Linear(8, 32)
        self.net = decoder(attn_dim_head=256)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory.expand(x.shape[0], -1, -1)
        pos = torch.cat((torch.arange(4), 10_000 + torch.arange(x.shape[1])))
        return self.net(torch.cat((memory, self.embed(x)), dim=1), pos=pos)[:, 4:]


@leaves_out({})
def own_wrapper() -> nn.Module:
    return Wrapper()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["check", "--json", "--max-len", "96", "--model", f"{__name__}:{name}"])
    fields = json.loads(capsys.readouterr().out)
    failed = [(result["key"], result["detail"]) for result in fields["results"] if not result["passed"]]
    assert (status, failed) == (0, [])

    reasons = {each["key"]: each["reason"] for each in fields["left_out"]}
    assert reasons.keys() == LEFT_OUT[name].keys(), reasons
    assert all(word in reasons[key] for key, word in LEFT_OUT[name].items()), reasons
