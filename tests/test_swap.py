"""That the fork can take the place of upstream's package and give it back: what is not xPos is the same, bit for bit.

The unpatched release is imported beside the fork, in the same process; what is saved by one is loaded by the other in
a process of its own.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pristine
import pytest
import strategies
import survey
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pristine import build_both, pristine_imports, pristine_strategies
from strategies import decoder_options, seeds, splits, tokens
from survey import ENTRIES, MEASURES, PLAIN, Entry, Scene
from test_properties import assert_equal_to_rounding
from torch import Tensor
from torch.nn import Module

import x_transformers
from x_transformers.x_transformers import AttentionLayers, RotaryEmbedding

HERE = Path(__file__).parent
FORK = Path(x_transformers.__file__).parent.parent

with pristine_imports():
    import survey as pristine_survey


def test_they_are_two_packages() -> None:
    assert pristine_strategies.Decoder is not strategies.Decoder
    assert pristine_strategies.Decoder.forward.__code__.co_filename.startswith(str(pristine.PRISTINE))
    assert strategies.Decoder.forward.__code__.co_filename.startswith(str(FORK))
    assert "rotary_window" not in inspect.signature(pristine_strategies.Decoder.forward).parameters


# without xPos, not a bit differs


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert torch.equal(actual.isnan(), expected.isnan())


def gradients(run: Any) -> dict[str, Tensor]:
    run.model.requires_grad_(True)
    out, _ = run.forward(Scene())
    if out.requires_grad:
        out.square().sum().backward()
    run.model.requires_grad_(False)
    return {name: param.grad for name, param in run.model.named_parameters() if param.grad is not None}


# upstream fails with them: an empty context with positions, and one whose einx pattern has a dimension too few
NO_ANSWER = {"forward.context", "attn_cope_soft_onehot_pos"}


def comparable(entry: Entry) -> list[int]:
    return [i for i, setting in enumerate(entry.settings) if not setting.fails]


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=e.option) for e in ENTRIES.values() if comparable(e) and not e.added]
)
def test_every_option_without_xpos_is_bit_identical(entry: Entry) -> None:
    theirs = pristine_survey.ENTRIES[entry.option]
    for index in comparable(entry):
        try:
            with pristine_imports():
                expected = pristine_survey.Run(theirs.settings[index], PLAIN)
        except Exception:
            assert entry.option in NO_ANSWER
            continue
        actual = survey.Run(entry.settings[index], PLAIN)

        assert_same_bits(actual.full, expected.full)
        grads, expected_grads = gradients(actual), gradients(expected)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            assert_same_bits(grad, expected_grads[name])

        for name in ("decode", "chunks", "mems", "shift", "rowpos", "pad"):
            assert_same_calls(MEASURES[name](actual), pristine_survey.MEASURES[name](expected))


def assert_same_calls(ours: Iterator[Any], theirs: Iterator[Any]) -> None:
    """Outputs of one call after another, as far as upstream gets."""
    while True:
        try:
            expected, _ = next(theirs)
        except Exception:  # it is through, or cannot do this with the option
            return
        assert_same_bits(next(ours)[0], expected)


positions = st.sampled_from(
    [
        {},
        dict(rotary_pos_emb=True),
        dict(rotary_pos_emb=True, rotary_interpolation_factor=2.5),
        dict(rotary_pos_emb=True, rotary_base_rescale_factor=4.0),
        dict(rotary_pos_emb=True, attn_num_mem_kv=2),
        dict(rotary_pos_emb=True, attn_l2_distance=True),
        dict(rotary_pos_emb=True, attn_use_cope=True, attn_flash=False),
        dict(alibi_pos_bias=True),
        dict(polar_pos_emb=True),
        dict(rel_pos_bias=True, attn_flash=False),
    ]
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@st.composite
def options_without_xpos(draw: st.DrawFn) -> dict[str, Any]:
    options = draw(decoder_options())
    for name in [name for name in options if name.startswith("rotary_") and name != "rotary_emb_dim"]:
        del options[name]
    options.update(draw(positions))
    if options.get("attn_l2_distance") or options.get("polar_pos_emb"):
        options.update(attn_kv_heads=options["heads"])
    return options


@given(options_without_xpos(), seeds, dtypes, splits())
def test_models_without_xpos_are_bit_identical(options, seed, dtype, lens) -> None:
    assume(not (options.get("attn_l2_distance") and dtype is torch.bfloat16))  # torch.cdist has none
    x = tokens(seed, 2, sum(lens))
    outcomes = []

    for model, module in zip(
        build_both(options, seed, dtype, max_mem_len=64), (x_transformers, pristine.MODULES["x_transformers"])
    ):
        wrapper = module.AutoregressiveWrapper(model)
        model.requires_grad_(True)
        loss = wrapper(x)
        loss.backward()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        model.requires_grad_(False)
        out = [loss.detach(), *grads, model(x)]
        if not options.get("polar_pos_emb"):  # which knows no mems
            out += [model(x[:, lens[0] :], mems=model(x[:, : lens[0]], return_mems=True)[1])]
        if model.can_cache_kv:
            _, cache = model(x[:, : lens[0]], return_intermediates=True)
            out += [model(x, cache=cache, cache_age=sum(lens[1:]))]
            out += [t for inter in cache.attn_intermediates for t in inter.cached_kv]
        out += [wrapper.generate(x, 3, temperature=0.0, cache_kv=cache_kv) for cache_kv in (True, False)]
        outcomes.append(out)

    for actual, expected in zip(*outcomes, strict=True):
        assert_same_bits(actual, expected)


# state dicts and whole models go both ways


@given(st.one_of(decoder_options(), options_without_xpos()), seeds, dtypes)
def test_state_dicts_are_the_same_and_load_both_ways(options, seed, dtype) -> None:
    assume(not (options.get("attn_l2_distance") and dtype is torch.bfloat16))  # torch.cdist has none
    ours, theirs = build_both(options, seed, dtype, exact=False)
    state, expected = ours.state_dict(), theirs.state_dict()

    assert list(state) == list(expected)
    for name, value in state.items():
        assert_same_bits(value, expected[name])
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]

    other, other_theirs = build_both(options, seed + 1, dtype, exact=False)
    other.load_state_dict(expected, strict=True)
    other_theirs.load_state_dict(state, strict=True)
    x = tokens(seed, 1, 9)
    assert_same_bits(other(x), ours(x))
    assert_same_bits(other_theirs(x), theirs(x))


SAVE = """
for name, options in OPTIONS.items():
    model = build(options, 7, torch.float32)
    torch.save(model, f"{name}.pt")
    Path(f"{name}.pickle").write_bytes(pickle.dumps(model))
    torch.save(model(tokens(7, 2, 33)), f"{name}.out")
"""

LOAD = """
print(x_transformers.__file__)
for name in OPTIONS:
    expected = torch.load(f"{name}.out")
    for model in torch.load(f"{name}.pt", weights_only=False), pickle.loads(Path(f"{name}.pickle").read_bytes()):
        actual = model(tokens(7, 2, 33))
        print(name, torch.equal(actual, expected), ((actual - expected).abs().max() / expected.abs().max()).item())
        model.load_state_dict(model.state_dict())
"""

SMALL = dict(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_emb_dim=8, verbose=False)
SAVED = {
    "none": SMALL,
    "rotary": dict(SMALL, rotary_pos_emb=True),
    "mem_kv": dict(SMALL, rotary_pos_emb=True, attn_num_mem_kv=2, attn_qk_norm=True),
    "xpos": dict(SMALL, rotary_xpos=True, rotary_xpos_scale_base=32),
}


def in_tree(tree: Path, script: str, directory: Path) -> str:
    """The script in a process that imports `x_transformers` from the tree."""
    imports = "import pickle, torch, x_transformers\nfrom pathlib import Path\nfrom strategies import build, tokens"
    command = [sys.executable, "-c", f"{imports}\nOPTIONS = {SAVED!r}\n{script}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(HERE)])}
    result = subprocess.run(command, cwd=directory, env=environment, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"), [(FORK, pristine.PRISTINE), (pristine.PRISTINE, FORK)], ids=["fork", "upstream"]
)
def test_saved_models_load_in_the_other(saved_by: Path, loaded_by: Path, tmp_path: Path) -> None:
    in_tree(saved_by, SAVE, tmp_path)
    where, *rows = in_tree(loaded_by, LOAD, tmp_path).splitlines()

    assert where.startswith(str(loaded_by))
    assert [row.split()[0] for row in rows] == [name for name in SAVED for _ in range(2)]
    for row in rows:
        name, same_bits, apart = row.split()
        # with xPos upstream takes its angles from buffers in float32 and from absolute positions, up to 33: each is off
        # by 33 half ulps, the scores by 2 ** 6 times that, and there are two layers
        assert same_bits == "True" if name != "xpos" else float(apart) <= 33 * 2**7 * torch.finfo(torch.float32).eps


# with xPos, what upstream gets right is the same to rounding


def answers(model: Any, x: Tensor, num_new: int) -> list[Tensor]:
    """Of the whole, and of the last tokens with a cache of the others."""
    _, cache = model(x[:, :-num_new], return_intermediates=True)
    return [model(x), model(x, cache=cache, cache_age=num_new)]


def assert_agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert_equal_to_rounding(ours, theirs)


@given(decoder_options(), seeds, splits())
def test_with_xpos_plain_self_attention_agrees_to_rounding(options, seed, lens) -> None:
    x, found = tokens(seed, 2, sum(lens)), []

    for model in build_both(options, seed, max_mem_len=64):
        _, mems = model(x[:, : lens[0]], return_mems=True)
        outputs = [*answers(model, x, sum(lens[1:])), model(x[:, lens[0] :], mems=mems)]
        model.requires_grad_(True)
        model(x).square().sum().backward()
        found.append([*outputs, *(param.grad for param in model.parameters() if param.grad is not None)])

    assert_agree(*found)


@given(
    decoder_options(), seeds, st.integers(2, 30), st.sampled_from([2.0, 0.5]), st.sampled_from([1.0, 3.0]), st.data()
)
def test_what_is_set_on_a_built_model_is_what_it_answers_by(options, seed, seq_len, factor, interpolation, data):
    x, found = tokens(seed, 2, seq_len), []
    names = data.draw(st.sets(st.sampled_from(["scale_base", "inv_freq", "scale", "interpolation_factor"]), min_size=1))

    models = build_both(options, seed)
    exact = models[1].attn_layers.rotary_pos_emb
    frequencies, decays = exact.inv_freq.clone(), exact.scale.clone()

    for model in models:
        rotary = model.attn_layers.rotary_pos_emb
        answers(model, x, 1)
        if "scale_base" in names:
            rotary.scale_base *= factor
        if "inv_freq" in names:
            rotary.inv_freq.copy_(factor * frequencies)
        if "scale" in names:
            rotary.scale = 0.75 * decays
        if "interpolation_factor" in names:
            rotary.interpolation_factor = interpolation
        found.append(answers(model, x, 1))

    assert_agree(*found)
    assert_equal_to_rounding(found[0][1], found[0][0][:, -1:])


class OtherRotary(Module):
    """Positional embeddings of one's own, in place of upstream's: it takes what upstream passes, and no more."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.dim = 0.25, dim

    def forward(self, t: Tensor) -> tuple[Tensor, float]:
        return t[None, :, None] * torch.linspace(0, 1, self.dim // 2).repeat_interleave(2).double(), 1.0


@given(decoder_options(), seeds, splits(), st.booleans())
def test_a_rotary_embedding_of_ones_own_is_called_as_upstream_calls_it(options, seed, lens, xpos):
    x, found = tokens(seed, 2, sum(lens)), []
    if not xpos:
        options = {**options, "rotary_xpos": False, "rotary_pos_emb": True}

    for model in build_both(options, seed):
        model.attn_layers.rotary_pos_emb = OtherRotary(options["rotary_emb_dim"])
        found.append(answers(model, x, sum(lens[1:])))

    assert_agree(*found)


class OtherAttention(Module):
    """An attention of one's own around upstream's, with the tables that it is given in plain operations."""

    def __init__(self, attention: Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, *, rotary_pos_emb: Any, **kwargs: Any) -> Any:
        freqs, scale = rotary_pos_emb
        assert freqs.is_floating_point()
        assert scale.is_floating_point()
        return self.attention(x, rotary_pos_emb=(freqs.clone(), scale.clone()), **kwargs)


@given(decoder_options(), st.integers(0, 2), seeds, splits())
def test_a_layer_of_ones_own_is_given_angles_and_scales(options, num_mem_kv, seed, lens):
    model, x = strategies.build({**options, "attn_num_mem_kv": num_mem_kv}, seed), tokens(seed, 2, sum(lens))
    expected = model(x)

    for layer in model.attn_layers.layers:
        if isinstance(layer[1], x_transformers.Attention):
            layer[1] = OtherAttention(layer[1])
    assert_agree(answers(model, x, sum(lens[1:])), [expected, expected[:, lens[0] :]])


@given(st.sampled_from([3, 8, 33, 64]), seeds, st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_rotary_embedding_on_its_own_means_what_it_means_upstream(dim, seed, num_queries, num_keys, one_table):
    """One table for the queries and one for the keys, or one for both."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, 1, n, 66, generator=generator, dtype=torch.float64) for n in (num_queries, num_keys))
    scores = []

    for module in (x_transformers.x_transformers, pristine.MODULES["x_transformers.x_transformers"]):
        rotary = module.RotaryEmbedding(dim, use_xpos=True).double()
        ratio = torch.arange(0, dim, 2).double() / dim
        rotary.inv_freq, rotary.scale = 10_000.0**-ratio, (ratio + 0.4) / 1.4
        (q_freqs, q_scale), (k_freqs, k_scale) = (
            rotary.forward_from_seq_len(max(num_queries, num_keys) if one_table else n) for n in (num_queries, num_keys)
        )
        rotate = module.apply_rotary_pos_emb
        scores.append(rotate(q, q_freqs, q_scale) @ rotate(k, k_freqs, k_scale**-1).mT)

    assert_equal_to_rounding(*scores)


@given(st.sampled_from([5, 8]), seeds, st.integers(1, 20), st.integers(1, 3), st.booleans())
def test_an_attention_on_its_own_takes_a_table(dim_head, seed, seq_len, num_mem_kv, per_head):
    # the first position is 0, so that is where upstream's own memory keys would be, were they scaled
    torch.manual_seed(seed)
    options = dict(dim_head=dim_head, num_mem_kv=num_mem_kv, custom_attn_fn=strategies.softmax)
    attention = x_transformers.Attention(16, heads=2, causal=True, **options).double()
    rotary = RotaryEmbedding(4, use_xpos=True, scale_base=8).double()
    x = torch.randn(2, seq_len, 16, dtype=torch.float64)

    full = attention(x, rotary_pos_emb=rotary.forward_from_seq_len(seq_len))
    freqs, scale = rotary.forward_from_seq_len(seq_len)
    longer = torch.cat((x, x), dim=1)

    prefix = attention(longer, rotary_pos_emb=rotary.forward_from_seq_len(2 * seq_len))[:, :seq_len]
    assert_equal_to_rounding(prefix, full)
    if per_head:
        assert_equal_to_rounding(attention(x, rotary_pos_emb=(freqs[:, None], scale[:, None])), full)


@pytest.mark.parametrize(("dim_head", "rotary_emb_dim"), [(9, 8), (70, None), (35, 32), (16, 7), (66, None)])
@torch.no_grad()
def test_odd_dims_agree_with_upstream_to_rounding(dim_head, rotary_emb_dim):
    options = dict(dim=16, depth=2, heads=2, attn_dim_head=dim_head, rotary_xpos=True, rotary_xpos_scale_base=32)
    options.update(verbose=False, **({} if rotary_emb_dim is None else dict(rotary_emb_dim=rotary_emb_dim)))
    x = tokens(0, 2, 30)

    assert_agree(*(answers(model, x, 10) for model in build_both(options, 0)))


# signatures


def public_callables(package: str) -> dict[str, Any]:
    """Every public function, class and method of every module of the package, by its path."""
    found: dict[str, Any] = {}
    root = importlib.import_module(package)
    names = [
        package,
        *(f"{package}.{module.name}" for module in pkgutil.iter_modules(root.__path__) if module.name != "xpos"),
    ]
    for name in names:
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            belongs = (getattr(value, "__module__", None) or "").partition(".")[0] == package
            if attribute.startswith("_") or not belongs or not callable(value):
                continue
            found[f"{name}.{attribute}"] = value
            if inspect.isclass(value):
                methods = inspect.getmembers(value, inspect.isroutine)
                own = [m for m in methods if m[0] == "__init__" or not m[0].startswith("_")]
                found.update({f"{name}.{attribute}.{method}": body for method, body in own})
    return found


def parameters(function: Any) -> list[tuple[str, Any, str]]:
    """Name, kind and default of each."""
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:  # of a builtin, which Module inherits
        return []
    return [(p.name, p.kind, getattr(p.default, "__qualname__", repr(p.default))) for p in found]


def test_every_public_callable_accepts_what_upstreams_accepts() -> None:
    ours = public_callables("x_transformers")
    with pristine_imports():
        theirs = public_callables("x_transformers")

    assert len(theirs) > 500
    assert theirs.keys() - ours.keys() == set()
    changed: dict[str, list[Any]] = {}
    for name, function in theirs.items():
        expected, actual = parameters(function), parameters(ours[name])
        # a parameter that was added comes last, and may be left out
        kept, added = actual[: len(expected)], actual[len(expected) :]
        assert kept == expected, name
        if added:
            changed[name] = added

    for name, added in changed.items():
        owner, _, method = name.rpartition(".")
        assert method == "forward"
        names = {"seq_len": RotaryEmbedding, "rotary_window": AttentionLayers}
        assert [issubclass(ours[owner], names[parameter]) for parameter, _, _ in added] == [True]
        assert [default for _, _, default in added] == ["None"]
    assert any(name.endswith("x_transformers.RotaryEmbedding.forward") for name in changed)
    assert any(name.endswith("x_transformers.Decoder.forward") for name in changed)
