"""xPos compiled, exported, traced and transformed: one graph for all lengths, with the answers of eager mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import strategies
import torch
from pristine import build_both
from strategies import build, softmax, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import stack_module_state
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from ways import assert_equal_to_rounding, continue_with, keys_values, prefill_with_cache, randn, rounding

from x_transformers import Attention
from x_transformers.x_transformers import Intermediates, LayerIntermediates

OPTIONS: dict[str, Any] = {**strategies.OPTIONS, "depth": 1, "rotary_xpos_scale_base": 16}
FLASH: dict[str, Any] = dict(attn_flash=True)
NO_FLASH: dict[str, Any] = dict(attn_custom_attn_fn=softmax)
MEMORY: dict[str, Any] = dict(attn_num_mem_kv=2)

# the first is compiled for. A length of 1 has a graph of its own in torch, which takes 0 and 1 for constants
LENGTHS = (3, 7, 2, 33, 100)


def model_of(**options: Any) -> Any:
    return build({**OPTIONS, **options}, 0, max_mem_len=1024)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def answer(model: Any, x: Tensor, cache: LayerIntermediates | None = None, **kwargs: Any) -> Any:
    """Going on from a cache, what is cached then too."""
    if cache is None:
        return model(x, **kwargs)
    logits, cache = continue_with(model, x, cache, **kwargs)
    return logits, keys_values(cache)


def graphs_compiled(model: Any, calls: Sequence[dict[str, Any]], backend: str = "eager") -> int:
    """How many graphs are compiled for the calls, each of which must give what eager mode gives, gradients included."""
    params = [p for p in model.parameters() if p.requires_grad]

    def tensors(run: Callable[..., Any], call: dict[str, Any]) -> list[Tensor]:
        out = tree_leaves(run(model, **call))
        return [*out, *torch.autograd.grad(out[0].square().sum(), params)] if params else out

    answer(model, **calls[0])  # einops registers torch with its first call, which must not be within the graph
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(answer, fullgraph=True, dynamic=True, backend=counter)
    for call in calls:
        for actual, expected in zip(tensors(compiled, call), tensors(answer, call), strict=True):
            assert_equal_to_rounding(actual, expected)
    # the functionalized one is counted beside an empty one
    return sum(len(graph.graph.nodes) > 0 for graph in counter.graphs)


def after_a_prompt(model: Any, n: int, num_new: int = 1) -> dict[str, Any]:
    cache = model(tokens(n, 2, n), return_intermediates=True)[1]
    return dict(x=tokens(n + 1, 2, num_new), cache=cache, cache_age=num_new)


# what a model is made with, and called with for a length; tokens (2, n) if nothing else is said
CALLS: dict[str, tuple[dict[str, Any], Callable[[Any, int], dict[str, Any]]]] = {
    "training step": ({**NO_FLASH, **MEMORY}, lambda model, n: {}),
    "all dims rotated": ({**NO_FLASH, "rotary_emb_dim": 8}, lambda model, n: {}),
    "pos of each row": (FLASH, lambda model, n: dict(pos=torch.arange(n) + torch.tensor([[5], [900]]))),
    "masked keys": (
        FLASH,
        lambda model, n: dict(self_attn_kv_mask=torch.arange(n) < torch.tensor([[n], [(n + 1) // 2]])),
    ),
    "rotary_window": (FLASH, lambda model, n: dict(pos=torch.arange(n) + n, rotary_window=(0, 3 * n))),
    "mems": (FLASH, lambda model, n: dict(mems=model(tokens(1, 2, 2 * n + 2), return_mems=True)[1], return_mems=True)),
    "context with positions": (
        {**FLASH, "cross_attend": True},
        lambda model, n: dict(context=randn(n, 2, n + 4, 16), context_pos=torch.arange(n + 4)),
    ),
    "decode step": ({**FLASH, **MEMORY}, after_a_prompt),
    "decode step, no flash": ({**NO_FLASH, **MEMORY}, after_a_prompt),
    "decode step, whole sequence passed": (
        FLASH,
        lambda model, n: dict(after_a_prompt(model, n), x=tokens(n, 2, n + 1), input_not_include_cache=False),
    ),
    "chunk": (FLASH, lambda model, n: after_a_prompt(model, n, 5 + n // 3)),
}
# functionalized too, and compiled in earnest
IN_EARNEST = [pytest.param(name, "inductor", marks=pytest.mark.slow) for name in ("training step", "decode step")]


@pytest.mark.parametrize(("name", "backend"), [*((name, "eager") for name in CALLS), *IN_EARNEST])
def test_one_graph_for_all_lengths_gives_the_answers_of_eager_mode(name, backend):
    (made_with, arguments), is_training = CALLS[name], name == "training step"
    model = model_of(**made_with).requires_grad_(is_training)

    with torch.set_grad_enabled(is_training):
        calls = [{"x": tokens(n, 2, n), **arguments(model, n)} for n in LENGTHS]
        assert graphs_compiled(model, calls, backend) == 1


@pytest.mark.parametrize("compiled", ["layers", pytest.param("around", marks=pytest.mark.slow), "some steps"])
@torch.no_grad()
def test_what_is_made_in_one_mode_and_used_in_another_gives_the_answers_of_eager_mode(compiled):
    model, x = model_of(**FLASH, **MEMORY), tokens(0, 2, 12)
    expected, whole = model(x), torch.compile(model, dynamic=True, backend="eager")
    for layer in (module for module in model.modules() if isinstance(module, Attention)):
        if compiled == "layers":
            layer.compile(fullgraph=True, dynamic=True, backend="eager")
        elif compiled == "around":
            layer.forward = torch.compiler.disable(layer.forward)

    chunks, cache = [], None
    # once with the prompt, and once where the cache has room for more
    for part, chunk in zip((whole, model, model, whole, model), x.split([5, 1, 1, 2, 3], dim=1)):
        logits, cache = continue_with(part, chunk, cache)
        chunks.append(logits)
    assert_equal_to_rounding(torch.cat(chunks, dim=1), expected)


@torch.no_grad()
def test_one_more_graph_for_a_length_of_1_and_an_error_past_the_limit():
    model = model_of(**FLASH)
    longest = model.attn_layers.rotary_pos_emb.max_xpos_queries(torch.float16)
    lengths = (3, longest, 1, longest + 1, longest + 9, 1, 2)

    assert graphs_compiled(model, [dict(x=tokens(0, 1, n)) for n in lengths]) == 2

    compiled = torch.compile(model, dynamic=True, backend="eager")
    too_long = model.attn_layers.rotary_pos_emb.max_xpos_queries(torch.float64) + 1
    with pytest.raises(ValueError, match=f"{too_long} queries in one call exceed the limit of {too_long - 1}"):
        compiled(tokens(0, 1, too_long))


@pytest.mark.slow
@torch.no_grad()
def test_a_mask_costs_as_many_graphs_as_with_plain_rotary():
    # what follows attention fills in the masked rows with einx, for which a length is a constant
    def graphs(**options: Any) -> int:
        model = model_of(**FLASH, **options)
        masks = [torch.arange(n) < torch.tensor([[n], [n // 2 + 1]]) for n in LENGTHS[:2]]
        return graphs_compiled(model, [dict(x=tokens(mask.shape[1], *mask.shape), mask=mask) for mask in masks])

    assert graphs() == graphs(rotary_xpos=False, rotary_pos_emb=True)


# exported

Program = Callable[[Tensor], Tensor]
DYNAMIC: Any = ({1: torch.export.Dim("n")},)


def exported(model: Any, x: Tensor, path: Path, **how: Any) -> Program:
    return torch.export.export(model, (x,), dynamic_shapes=DYNAMIC, **how).module()


def in_onnx(model: Any, x: Tensor, path: Path, **how: Any) -> Program:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(model, (x,), path, input_names=["x"], **how)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


# with what attention, how, and with what arguments
EXPORTS: dict[str, tuple[dict[str, Any], Callable[..., Program], dict[str, Any]]] = {
    "no flash": (NO_FLASH, exported, dict(strict=False)),
    "flash": (FLASH, exported, dict(strict=False)),
    "strict": (FLASH, exported, dict(strict=True)),
    "onnx": (FLASH, in_onnx, dict(dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)),
    # it cannot express that flash attention is causal from some length on
    "onnx, older": (NO_FLASH, in_onnx, dict(dynamo=False, dynamic_axes=dict(x={1: "n"}), opset_version=17)),
}


@pytest.mark.parametrize(("attention", "export", "how"), EXPORTS.values(), ids=EXPORTS)
@pytest.mark.filterwarnings("ignore")  # of the older exporter, that it is old
@torch.no_grad()
def test_one_exported_program_gives_the_answers_of_eager_mode_at_all_lengths(attention, export, how, tmp_path):
    is_onnx, x = export is in_onnx, tokens(0, 2, 7)
    model = model_of(**attention, **MEMORY).to(torch.float32 if is_onnx else torch.float64)
    forward = model.forward
    if how.get("dynamo") is False:  # the older exporter has no logits of upstream's
        model.forward = lambda x: forward(x, return_embeddings=True)
    model(x)

    program = export(model, x, tmp_path / "model.onnx", **how)

    for n in (1, 2, 7, 31, 300):  # there is none that it is exported for
        actual, expected = (run(tokens(n, 2, n)) for run in (program, model))
        # as there, of a single layer: 2 ** 8 roundings of float32, and 2 ** 3 from softmax
        in_float32 = 2**11 * torch.finfo(torch.float32).eps / 2 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=in_float32 if is_onnx else rounding(expected))


# traced and transformed


def steps(model: Any, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two tokens decoded, one after another, from a cache of `k` and `v`."""
    layers = [Intermediates(cached_kv=(k, v), layer_type="a") for _ in range(OPTIONS["depth"])]
    cache = LayerIntermediates(attn_intermediates=layers, cache_length=k.shape[-2])
    first, cache = continue_with(model, x[:, :1], cache)
    return torch.cat((first, continue_with(model, x[:, 1:], cache)[0]), dim=1)


def key_values(seed: int) -> tuple[Tensor, Tensor]:
    return randn(seed, 2, 2, 7, 8), randn(seed + 1, 2, 2, 7, 8)


TRACERS = {
    "jit": lambda function: lambda *args: torch.jit.trace(function, args, check_trace=False),
    "real": partial(make_fx, tracing_mode="real", _allow_non_fake_inputs=True),
    "symbolic": partial(make_fx, tracing_mode="symbolic", _allow_non_fake_inputs=True),
}


@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
@pytest.mark.filterwarnings("ignore")  # of what a trace takes for constant
@torch.no_grad()
def test_what_is_traced_keeps_nothing_of_the_inputs_that_it_was_traced_with(trace):
    model = model_of(**NO_FLASH, **MEMORY)
    of_steps = lambda *args: steps(model, *args), lambda seed: (tokens(seed, 2, 2), *key_values(seed))
    for function, inputs in ((model, lambda seed: (tokens(seed, 2, 9),)), of_steps):
        traced = trace(function)(*inputs(0))
        for seed in (1, 2):
            assert_equal_to_rounding(traced(*inputs(seed)), function(*inputs(seed)))


@pytest.mark.parametrize("attention", [FLASH, NO_FLASH])
@pytest.mark.parametrize("window", [{}, dict(rotary_window=(0, 39))])
@torch.no_grad()
def test_models_tokens_and_positions_may_be_mapped_over(attention, window):
    models = [build({**OPTIONS, **MEMORY, **attention}, seed) for seed in range(3)]
    x, pos = tokens(0, 3, 9)[:, None], torch.arange(9) + torch.tensor([[0], [7], [30]])

    def decode(params: Any, buffers: Any, x: Tensor, pos: Tensor) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(models[0], (params, buffers), args, {**kwargs, **window})

        first, cache = call(x[:, :7], pos=pos[:7], return_intermediates=True)
        return torch.cat((first, continue_with(call, x[:, 7:], cache, pos=pos)[0]), dim=1)

    mapped = torch.vmap(decode)(*stack_module_state(models), x, pos)
    for i, model in enumerate(models):
        assert_equal_to_rounding(mapped[i], model(x[i], pos=pos[i]))


def simulated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, once it was called with tensors that have no values."""

    def simulate(*args: Tensor) -> Callable[..., Any]:
        function(*map(FakeTensorMode(allow_non_fake_inputs=True).from_tensor, args))
        return function

    return simulate


def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_: lambda x: [t[0] for t in torch.vmap(function)(x[None])]


@pytest.mark.parametrize("trace", [mapped, simulated, *TRACERS.values()], ids=["vmap", "fake", *TRACERS])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_cache_that_has_room_is_left_as_it_is(trace):
    model = model_of(**NO_FLASH, **MEMORY)
    # each of its own, as to copy one would take its room
    shared, *caches = (prefill_with_cache(model, tokens(0, 2, 9), [7, 1, 1])[1] for _ in range(4))

    def step(cache: Any, x: Tensor) -> list[Tensor]:
        logits, after = continue_with(model, x, cache)
        return [logits, *keys_values(after)]

    inputs = [tokens(seed, 2, 1) for seed in range(3)]
    expected = [*map(step, caches, inputs)]
    of_shared: Any = partial(step, shared)
    traced = trace(lambda x: of_shared(x))(inputs[0])
    found = [*map(traced, inputs), of_shared(inputs[2])]
    for actual, each in zip(found, [*expected, expected[2]]):
        for pair in zip(actual, each, strict=True):
            assert_equal_to_rounding(*pair)


def derivatives(model: Any) -> list[Tensor]:
    """Of decoding: forward mode by torch.func and by dual numbers, gradients, and those of each sample."""
    x, kv, tangents = tokens(0, 2, 2), key_values(0), key_values(5)
    decode = partial(steps, model, x)

    def loss_of_one(kv: Any, x: Tensor) -> Tensor:
        return steps(model, x[None], *(t[None] for t in kv)).square().sum()

    with torch.no_grad():
        found = [*torch.func.jvp(decode, kv, tangents)]
        with forward_ad.dual_level():
            found += forward_ad.unpack_dual(decode(*map(forward_ad.make_dual, kv, tangents)))
    found += torch.func.grad(lambda kv: decode(*kv).square().sum())(kv)
    return [*found, *torch.vmap(torch.func.grad(loss_of_one))(kv, x)]


def test_derivatives_through_decoding_are_those_of_upstream():
    for actual, expected in zip(*map(derivatives, build_both({**OPTIONS, **NO_FLASH}, 0)), strict=True):
        assert expected.abs().max() > 0
        assert_equal_to_rounding(actual, expected)
