"""xPos compiled, exported, traced and transformed: one graph for all lengths, with the answers of eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pristine import build_both
from strategies import build, softmax, tokens
from test_properties import assert_equal_to_rounding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import stack_module_state
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from x_transformers import Attention
from x_transformers.x_transformers import Intermediates, LayerIntermediates

OPTIONS: dict[str, Any] = dict(
    dim=16,
    depth=1,
    heads=2,
    attn_dim_head=8,
    rotary_emb_dim=6,
    rotary_xpos=True,
    rotary_xpos_scale_base=16,
    verbose=False,
)
ATTENTION = {"flash": dict(attn_flash=True), "no flash": dict(attn_custom_attn_fn=softmax)}

# the first is compiled for. A length of 1 has a graph of its own in torch, which takes 0 and 1 for constants
LENGTHS = (3, 7, 2, 33, 100)


def model_of(**options: Any) -> Any:
    return build({**OPTIONS, **options}, 0, max_mem_len=1024)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_compiled(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], backend: str = "eager") -> int:
    """How many graphs are compiled for the calls, each of which must give what eager mode gives."""
    function(*calls[0])  # einops registers torch with its first call, which must not be within the graph
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for call in calls:
        actual, expected = tree_leaves(compiled(*call)), tree_leaves(function(*call))
        assert len(actual) == len(expected) > 0
        for a, e in zip(actual, expected):
            assert_equal_to_rounding(a, e)
    # the functionalized one is counted beside an empty one
    return sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)


# what a model is called with: a function of the model and a length, that gives the call


def self_attention(model: Any) -> tuple[Callable, Callable]:
    return model, lambda n: (tokens(n, 2, n),)


def given_pos(model: Any) -> tuple[Callable, Callable]:
    return lambda x, pos: model(x, pos=pos), lambda n: (tokens(n, 2, n), torch.arange(n) + 5)


def given_pos_per_row(model: Any) -> tuple[Callable, Callable]:
    offsets = torch.tensor([[5], [900]])
    return lambda x, pos: model(x, pos=pos), lambda n: (tokens(n, 2, n), torch.arange(n) + offsets)


def masked_keys(model: Any) -> tuple[Callable, Callable]:
    def call(n: int) -> tuple[Any, ...]:
        return tokens(n, 2, n), torch.arange(n) < torch.tensor([[n], [(n + 1) // 2]])

    return lambda x, mask: model(x, self_attn_kv_mask=mask), call


def window(model: Any) -> tuple[Callable, Callable]:
    def call(n: int) -> tuple[Any, ...]:
        return tokens(n, 2, n), torch.arange(n) + n, 3 * n

    return lambda x, pos, total: model(x, pos=pos, rotary_window=(0, total)), call


def mems(model: Any) -> tuple[Callable, Callable]:
    def call(n: int) -> tuple[Any, ...]:
        return tokens(n, 2, n), *model(tokens(n + 1, 2, 2 * n + 2), return_mems=True)[1]

    return lambda x, *hiddens: model(x, mems=list(hiddens), return_mems=True), call


def cached(model: Any, x: Tensor, cache: Any) -> Any:
    logits, cache = model(x, cache=cache, cache_age=x.shape[1], input_not_include_cache=True, return_intermediates=True)
    return logits, [t for inter in cache.attn_intermediates for t in inter.cached_kv]


def prompt(model: Any, n: int) -> Any:
    return model(tokens(n, 2, n), return_intermediates=True)[1]


def decode_step(model: Any) -> tuple[Callable, Callable]:
    return lambda x, cache: cached(model, x, cache), lambda n: (tokens(n + 1, 2, 1), prompt(model, n))


def decode_step_with_whole_sequence(model: Any) -> tuple[Callable, Callable]:
    def step(x: Tensor, cache: Any) -> Tensor:
        return model(x, cache=cache, return_intermediates=True)[0]

    return step, lambda n: (torch.cat((tokens(n, 2, n), tokens(n + 1, 2, 1)), dim=1), prompt(model, n))


def chunk(model: Any) -> tuple[Callable, Callable]:
    return lambda x, cache: cached(model, x, cache), lambda n: (tokens(n + 1, 2, 5 + n // 3), prompt(model, n))


CALLS = {
    "self attention": (self_attention, {}),
    "all dims rotated": (self_attention, dict(rotary_emb_dim=8)),
    "memory key / values": (self_attention, dict(attn_num_mem_kv=2)),
    "pos": (given_pos, {}),
    "pos of each row": (given_pos_per_row, {}),
    "masked keys": (masked_keys, {}),
    "rotary_window": (window, {}),
    "mems": (mems, {}),
    "decode step": (decode_step, {}),
    "decode step, whole sequence passed": (decode_step_with_whole_sequence, {}),
    "chunk": (chunk, {}),
}


# these with both, and what flash has functionalized too, as for a compiler: that takes most of the time
WITH_BOTH = ("self attention", "memory key / values", "decode step")


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "flash") for name in CALLS), *((name, "no flash") for name in WITH_BOTH)]
)
@torch.no_grad()
def test_one_graph_for_all_lengths_gives_the_answers_of_eager_mode(name, attention):
    call, options = CALLS[name]
    function, arguments = call(model_of(**options, **ATTENTION[attention]))

    backend = "aot_eager" if name in WITH_BOTH and attention == "flash" else "eager"
    assert graphs_compiled(function, [arguments(n) for n in LENGTHS], backend) == 1


@pytest.mark.parametrize("compiled", ["layers", "what is around them"])
@torch.no_grad()
def test_tables_made_and_applied_in_different_modes_give_the_answers_of_eager_mode(compiled):
    model = model_of(attn_flash=True, attn_num_mem_kv=2)
    x = tokens(0, 2, 60)
    expected = [model(tokens(n, 2, n)) for n in LENGTHS], model(x)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if compiled == "layers":
        for layer in layers:
            layer.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    else:
        for layer in layers:
            layer.forward = torch.compiler.disable(layer.forward)
        model.compile(dynamic=True, backend="aot_eager")

    for n, logits in zip(LENGTHS, expected[0]):
        assert_equal_to_rounding(model(tokens(n, 2, n)), logits)
    logits, cache = model(x[:, :7], return_intermediates=True)
    chunks = [logits]
    for new in x[:, 7:].split([1, 1, 3, 4, 1, 9, 34], dim=1):
        logits, cache = model(
            new, cache=cache, cache_age=new.shape[1], input_not_include_cache=True, return_intermediates=True
        )
        chunks.append(logits)
    assert_equal_to_rounding(torch.cat(chunks, dim=1), expected[1])


@torch.no_grad()
def test_one_graph_for_all_lengths_of_a_context_with_positions():
    model = model_of(cross_attend=True, attn_flash=True)

    def call(n: int) -> tuple[Any, ...]:
        return tokens(n, 2, n), randn(n, 2, n + 4, 16), torch.arange(n + 4)

    graphs = graphs_compiled(
        lambda x, context, pos: model(x, context=context, context_pos=pos), [call(n) for n in LENGTHS]
    )

    assert graphs == 1


@torch.no_grad()
def test_one_more_graph_for_a_length_of_1_and_an_error_past_the_limit():
    model = model_of(attn_flash=True)
    longest = model.attn_layers.rotary_pos_emb.max_seq_len(torch.float16)
    lengths = (3, longest, 1, longest + 1, longest + 9, 1, 2)

    assert graphs_compiled(model, [(tokens(0, 1, n),) for n in lengths]) == 2

    compiled = torch.compile(model, dynamic=True, backend="eager")
    too_long = model.attn_layers.rotary_pos_emb.max_seq_len(torch.float64, is_masked=False) + 1
    with pytest.raises(ValueError, match=f"{too_long} queries in one call exceed the limit of {too_long - 1}"):
        compiled(tokens(0, 1, too_long))


@torch.no_grad()
def test_a_mask_costs_as_many_graphs_as_with_plain_rotary():
    # what follows attention fills in the masked rows with einx, for which a length is a constant
    def graphs(**options: Any) -> int:
        model = model_of(attn_flash=True, **options)
        lengths = LENGTHS[:2]
        masks = [torch.arange(n) < torch.tensor([[n], [n // 2 + 1]]) for n in lengths]
        return graphs_compiled(
            lambda x, mask: model(x, mask=mask), [(tokens(n, 2, n), m) for n, m in zip(lengths, masks)]
        )

    assert graphs() == graphs(rotary_xpos=False, rotary_pos_emb=True)


def test_gradients_of_one_graph_for_all_lengths_are_those_of_eager_mode():
    model = model_of(attn_num_mem_kv=2, **ATTENTION["no flash"]).requires_grad_(True)
    params = list(model.parameters())
    model(tokens(0, 2, 3))
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)

    for n in LENGTHS:
        x = tokens(n, 2, n)
        logits, expected = compiled(x), model(x)
        assert_equal_to_rounding(logits, expected)
        actual_gradients, expected_gradients = (
            torch.autograd.grad(t.square().sum(), params) for t in (logits, expected)
        )
        for a, e in zip(actual_gradients, expected_gradients):
            assert_equal_to_rounding(a, e)

    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1


@pytest.mark.slow
@torch.no_grad()
def test_inductor_decodes_with_one_graph_for_all_lengths():
    function, arguments = decode_step(model_of(attn_flash=True, attn_num_mem_kv=2))

    assert graphs_compiled(function, [arguments(n) for n in LENGTHS], backend="inductor") == 1


# export

EXPORTED = {
    "no flash": {},
    "flash": dict(attn_flash=True),
    "memory key / values": dict(attn_num_mem_kv=2),
}
exported = pytest.mark.parametrize("options", EXPORTED.values(), ids=EXPORTED)
# to be run with; there is none that it is exported for
LONG = 300


def dynamic_shapes() -> tuple[dict[int, Any]]:
    return ({1: torch.export.Dim("n")},)


@exported
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_one_exported_program_gives_the_answers_of_eager_mode_at_all_lengths(options, strict):
    model = model_of(**{**(ATTENTION["no flash"] if not options.get("attn_flash") else {}), **options})
    x = tokens(0, 2, 7)
    model(x)

    program = torch.export.export(model, (x,), dynamic_shapes=dynamic_shapes(), strict=strict).module()

    for n in (1, 2, 7, 31, LONG):
        x = tokens(n, 2, n)
        assert_equal_to_rounding(program(x), model(x))


class Embeddings(torch.nn.Module):
    """Of a model; the older exporter has no logits of upstream's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, return_embeddings=True)


@exported
@pytest.mark.parametrize("dynamo", [False, True])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of the older exporter, that it is old
def test_one_onnx_file_gives_the_answers_of_eager_mode_at_all_lengths(options, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    # the older one cannot express that flash attention is causal from some length on
    model = build({**OPTIONS, **options, **({} if dynamo else dict(attn_flash=False))}, 0, dtype=torch.float32)
    path, x = tmp_path / "model.onnx", tokens(0, 2, 7)
    model(x)

    if dynamo:
        how: dict[str, Any] = dict(dynamic_shapes=dynamic_shapes(), dynamo=True, verbose=False)
    else:
        how = dict(dynamic_axes=dict(x={1: "n"}), dynamo=False, opset_version=17)
    torch.onnx.export(Embeddings(model), (x,), path, input_names=["x"], **how)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 2, 7, 31, LONG):
        x = tokens(n, 2, n)
        (actual,) = session.run(None, {"x": x.numpy()})
        expected = Embeddings(model)(x).numpy()
        # as in `assert_equal_to_rounding`, of a single layer: 2 ** 8 roundings of float32, and 2 ** 3 from softmax
        tolerance = 2**11 * np.finfo(np.float32).eps / 2 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# traced and transformed, beside the unpatched release


def steps(model: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two tokens decoded, one after another, from a cache of `k` and `v`."""
    layers = [Intermediates(cached_kv=(k, v), layer_type="a") for _ in range(OPTIONS["depth"])]
    cache = LayerIntermediates(attn_intermediates=layers, cache_length=k.shape[-2])
    logits, cache = cached_step(model, x[:, :1], cache)
    again, _ = cached_step(model, x[:, 1:], cache)
    return torch.cat((logits, again), dim=1)


def cached_step(model: Any, x: Tensor, cache: Any) -> Any:
    return model(x, cache=cache, cache_age=1, input_not_include_cache=True, return_intermediates=True)


def key_values(seed: int, length: int) -> tuple[Tensor, Tensor]:
    return randn(seed, 2, 2, length, 8), randn(seed + 1, 2, 2, length, 8)


@pytest.mark.parametrize("options", [{}, dict(attn_num_mem_kv=2)], ids=["plain", "mem kv"])
@pytest.mark.filterwarnings("ignore")  # of what a trace takes for constant
@torch.no_grad()
def test_a_traced_model_gives_its_answers_for_other_inputs(options):
    for model in build_both({**OPTIONS, **options}, 0):
        forward = torch.jit.trace(model, (tokens(0, 2, 9),), check_trace=False)
        decode = torch.jit.trace(
            lambda *args, model=model: steps(model, *args), (tokens(0, 2, 2), *key_values(0, 7)), check_trace=False
        )
        for seed in (1, 2):
            x = tokens(seed, 2, 2)
            assert_equal_to_rounding(forward(tokens(seed, 2, 9)), model(tokens(seed, 2, 9)))
            assert_equal_to_rounding(decode(x, *key_values(seed, 7)), steps(model, x, *key_values(seed, 7)))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@torch.no_grad()
def test_a_traced_step_keeps_nothing_of_the_inputs_that_it_was_traced_with(mode):
    model = model_of(**ATTENTION["no flash"])
    graph = make_fx(lambda *args: steps(model, *args), tracing_mode=mode, _allow_non_fake_inputs=True)(
        tokens(0, 2, 2), *key_values(0, 7)
    )

    for seed in (1, 2):
        inputs = tokens(seed, 2, 2), *key_values(seed, 7)
        assert_equal_to_rounding(graph(*inputs), steps(model, *inputs))


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_an_ensemble_decodes_through_vmap(attention):
    found = []
    both = [build_both({**OPTIONS, **ATTENTION[attention]}, seed) for seed in range(3)]
    x = tokens(0, 2, 2)

    for models in zip(*both):
        params, buffers = stack_module_state(list(models))
        base = models[0]

        def decode(params: Any, buffers: Any, base: Any = base) -> Tensor:
            call = torch.func.functional_call
            first, cache = call(base, (params, buffers), (x[:, :1],), dict(return_intermediates=True))
            kwargs = dict(cache=cache, input_not_include_cache=True, return_intermediates=True)
            second, _ = call(base, (params, buffers), (x[:, 1:],), kwargs)
            return torch.cat((first, second), dim=1)

        found.append(torch.vmap(decode)(params, buffers))

    assert_equal_to_rounding(*found)
    for out, (model, _) in zip(found[0], both):
        assert_equal_to_rounding(out, model(x))


@pytest.mark.parametrize("num_mem_kv", [0, 2])
@torch.no_grad()
def test_positions_and_inputs_may_be_mapped_over(num_mem_kv):
    model = model_of(attn_num_mem_kv=num_mem_kv).attn_layers
    x, pos = randn(0, 3, 9, 16), torch.arange(9) + torch.tensor([[0], [7], [30]])

    mapped = torch.vmap(lambda x, pos: model(x[None], pos=pos)[0])(x, pos)
    shards = torch.vmap(lambda x, pos: model(x[None], pos=pos, rotary_window=(0, 39))[0])(x, pos)

    assert_equal_to_rounding(mapped, model(x, pos=pos))
    assert_equal_to_rounding(shards, model(x, pos=pos))


@pytest.mark.parametrize("forward_mode", ["jvp", "dual numbers"])
def test_derivatives_through_decoding_are_those_of_upstream(forward_mode):
    x, kv, tangents = tokens(0, 2, 2), key_values(0, 7), key_values(5, 7)
    found: dict[str, list[Tensor]] = {}

    for model in build_both({**OPTIONS, **ATTENTION["no flash"]}, 0):

        def decode(*kv: Tensor, model: Any = model) -> Tensor:
            return steps(model, x, *kv)

        with torch.no_grad():
            if forward_mode == "jvp":
                out, tangent = torch.func.jvp(decode, kv, tangents)
            else:
                with forward_ad.dual_level():
                    out, tangent = forward_ad.unpack_dual(decode(*map(forward_ad.make_dual, kv, tangents)))
        found.setdefault("value", []).append(out)
        found.setdefault("tangent", []).append(tangent)
        gradients = torch.func.grad(lambda *kv: decode(*kv).square().sum(), argnums=(0, 1))(*kv)
        for name, gradient in zip(("keys", "values"), gradients):
            found.setdefault(name, []).append(gradient)

        def of_one_sample(kv: tuple[Tensor, Tensor], x: Tensor, model: Any = model) -> Tensor:
            return steps(model, x[None], *(t[None] for t in kv)).square().sum()

        per_sample = torch.vmap(torch.func.grad(of_one_sample))(kv, x)
        found.setdefault("per sample", []).append(torch.stack(per_sample))

    for actual, expected in found.values():
        assert expected.abs().max() > 0
        assert_equal_to_rounding(actual, expected)


@torch.no_grad()
def test_a_cache_of_eager_mode_goes_on_compiled_and_the_other_way_round():
    model, x = model_of(attn_flash=True, attn_num_mem_kv=1), tokens(0, 2, 20)
    step = torch.compile(lambda x, cache: cached_step(model, x, cache), dynamic=True, backend="eager")
    logits, cache = model(x[:, :5], return_intermediates=True)
    out = [logits]

    for position in range(5, 20):
        run = step if position % 5 == 3 else lambda x, cache: cached_step(model, x, cache)
        logits, cache = run(x[:, position, None], cache)
        out.append(logits)

    assert_equal_to_rounding(torch.cat(out, dim=1), model(x))
