"""Saves what models without xPos give, to compare bit by bit between the package of the line 1.27.x and its pristine
release, and their parameters, for the other to load.

    python plain_outputs.py SEED SAVED [LOADED GIVEN]

SAVED gets parameters and outputs of models drawn from SEED. With the parameters in LOADED, which another run saved,
GIVEN gets the outputs. A model with xPos has parameters here too, and no outputs.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from strategies import NUM_TOKENS, randomize_, tokens
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, XTransformer
from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

ROTARY = dict(rotary_pos_emb=True, rotary_emb_dim=32)
DECODERS: dict[str, dict[str, Any]] = {
    "no positions": dict(),
    "alibi": dict(alibi_pos_bias=True),
    "rotary": ROTARY,
    "rotary, flash": dict(ROTARY, attn_flash=True),
    "rotary, factors": dict(ROTARY, rotary_interpolation_factor=2.5, rotary_base_rescale_factor=4.0),
    "rotary, memory keys": dict(ROTARY, attn_num_mem_kv=3, attn_qk_norm=True),
    "rotary, values": dict(ROTARY, attn_rotary_embed_values=True),
    "rotary, grouped keys": dict(ROTARY, attn_kv_heads=2, attn_qk_norm=True),
    "xpos": dict(rotary_xpos=True, attn_num_mem_kv=3),
}


def nets(seed: int) -> dict[str, nn.Module]:
    shared = dict(num_tokens=NUM_TOKENS, max_seq_len=64)
    small = dict(dim=32, depth=2, heads=4, attn_dim_head=48)
    found: dict[str, nn.Module] = {
        name: TransformerWrapper(**shared, max_mem_len=64, attn_layers=Decoder(**small, **options))
        for name, options in DECODERS.items()
    }
    found["encoder"] = TransformerWrapper(**shared, attn_layers=Encoder(**small, **ROTARY))
    sides = dict(num_tokens=NUM_TOKENS, max_seq_len=64, depth=1, heads=2, rotary_pos_emb=True)
    found["both"] = XTransformer(dim=64, **{f"{side}_{k}": v for side in ("enc", "dec") for k, v in sides.items()})
    return {name: randomize_(net, seed).eval() for name, net in found.items()}


def outputs(name: str, net: Any) -> dict[str, Tensor]:
    x = tokens(0, 2, 40)
    if name == "both":
        return {
            "loss": net(x[:, :20], x[:, 20:]),
            "generated": net.generate(x[:, :20], x[:, 20:23], 9, temperature=0.0),
        }

    out = {"full": net(x)}
    out |= {f"gradient of {key}": grad for key, grad in gradients(net, x).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out["autocast"] = net(x)
    if name == "encoder":
        out["masked"] = net(x, mask=tokens(1, 2, 40) > 4)
        return out

    _, cache = net(x[:, :20], return_intermediates=True)
    out["cached"] = net(x, cache=cache, cache_age=20)
    _, mems = net(x[:, :20], return_mems=True)
    out["mems"] = net(x[:, 20:], mems=mems)
    out["padded"] = net(x, seq_start_pos=torch.tensor([3, 0]))
    out["generated"] = AutoregressiveWrapper(net).eval().generate(x, 20, temperature=0.0)
    for dtype in (torch.bfloat16, torch.float64):
        out[str(dtype)] = net.to(dtype)(x)
        net.float()
    return out


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    named = dict(net.named_parameters())
    found = torch.autograd.grad(net(x).square().sum(), list(named.values()), allow_unused=True)
    return {key: grad for key, grad in zip(named, found) if grad is not None}


def of_functions() -> dict[str, Tensor]:
    rotary = RotaryEmbedding(32, interpolation_factor=1.5)
    freqs, scale = rotary.forward_from_seq_len(40)
    q = torch.randn(2, 4, 30, 48, generator=torch.Generator().manual_seed(0))
    return {"freqs": freqs, "rotated": apply_rotary_pos_emb(q, freqs), "scaled": apply_rotary_pos_emb(q, freqs, scale)}


def all_outputs(states: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    found = {"functions": of_functions()}
    for name, net in nets(0).items():
        net.load_state_dict(states[name], strict=True)
        if name != "xpos":
            found[name] = {key: value.detach() for key, value in outputs(name, net).items()}
    return found


def main(seed: str, saved: str, loaded: str | None = None, given: str | None = None) -> None:
    states = {name: net.state_dict() for name, net in nets(int(seed)).items()}
    torch.save({"states": states, "outputs": all_outputs(states)}, saved)
    if loaded is not None and given is not None:
        torch.save(all_outputs(torch.load(loaded)["states"]), given)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # sums in parallel need not have one order
    torch.set_num_threads(1)
    main(*sys.argv[1:])
