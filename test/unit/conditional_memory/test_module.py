"""The module computes the paper's equations, trains, and streams."""

import numpy as np
import pytest
import torch

import engram.conditional_memory as memory
from engram import EngramConfig, EngramModule
from engram.conditional_memory import EngramStack, TokenCompression
from engram.conditional_memory.gate import rms_norm
from engram.errors import InvalidRequestError
from unit.conditional_memory import reference

SWITCHES = [
    {},
    {"num_branches": 4},
    {"num_branches": 2, "use_conv": False, "bias": False, "gate_transform": "copysign_sqrt"},
    {"gate_transform": "identity", "norm_eps": 1e-6},
    {"kernel_size": 2, "conv_dilation": 1, "min_n": 1, "max_n": 4},
    {"layout": "v41", "image_token_id": 5, "num_branches": 3},
    {"layout": "polynomial", "embedding_table_size": (40, 50)},
    {"kernel_size": 1, "bias": False},
]


def config(**fields: object) -> EngramConfig:
    values: dict = {
        "vocab_size": 50,
        "embedding_table_size": 60,
        "num_hash_heads": 3,
        "embedding_dim": 4,
        "hidden_dim": 6,
        "layer_ids": (3, 1),
    }
    return EngramConfig(**{**values, **fields})


def warm(module: EngramModule) -> EngramModule:
    """Move every parameter off its initial value, the convolution off zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return module


def inputs(fields: EngramConfig, dtype: torch.dtype, tokens: int = 23) -> tuple:
    ids = torch.randint(0, fields.vocab_size, (2, tokens))
    shape = (2, tokens, fields.num_branches, fields.hidden_dim)
    return torch.randn(shape, dtype=dtype), ids


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_forward_is_the_reference(
    switches: dict, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    fields = config(**switches)
    module = warm(EngramModule(fields).to(dtype))
    hidden, ids = inputs(fields, dtype)
    states, gate = module(hidden, ids, return_gating=True)
    rows = module.layout.hash(ids, backend="numpy")
    expected, gates = reference.forward(
        fields, module.state_dict(), hidden, rows, torch.finfo(dtype).eps
    )
    assert states.dtype == dtype
    # Sums may cancel, so an error counts against the largest value, not against its own.
    largest = np.abs(expected).max()
    np.testing.assert_allclose(states.detach(), expected, rtol=0, atol=tolerance * largest)
    np.testing.assert_allclose(gate.detach(), gates, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(states, hidden, atol=1e-3)


@pytest.mark.parametrize("switches", SWITCHES)
def test_gradients_are_right(switches: dict, seed: int) -> None:
    fields = config(**switches)
    module = warm(EngramModule(fields).double())
    hidden, ids = inputs(fields, torch.float64, tokens=9)
    names = [name for name, _ in module.named_parameters()]

    def states(given: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, values, (given, ids))[0]

    assert torch.autograd.gradcheck(
        states, (hidden.requires_grad_(), *module.parameters()), fast_mode=True
    )


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("zero_init", [False, True])
def test_every_parameter_gets_a_gradient(sparse: bool, zero_init: bool, seed: int) -> None:
    fields = config(sparse_gradients=sparse, zero_init_conv=zero_init, num_branches=2)
    module = EngramModule(fields)
    hidden, ids = inputs(fields, torch.float32)

    def without() -> list[str]:
        module.zero_grad()
        module(hidden, ids)[0].square().sum().backward()
        return [
            name
            for name, parameter in module.named_parameters()
            if parameter.grad is None or not parameter.grad.to_dense().any()
        ]

    # Behind zero taps nothing shows what the norm in front of them does.
    assert without() == (["conv.norm"] if zero_init else [])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.sub_(0.1 * parameter.grad.to_dense())
    assert without() == []
    assert module.table.weight.grad.is_sparse == sparse


def test_a_zero_convolution_adds_nothing_at_first(seed: int) -> None:
    plain, with_conv = (EngramModule(config(use_conv=use)) for use in (False, True))
    with_conv.load_state_dict(plain.state_dict(), strict=False)
    hidden, ids = inputs(plain.config, torch.float32)
    assert torch.equal(plain(hidden, ids)[0], with_conv(hidden, ids)[0])


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("prefetched", [False, True])
def test_pieces_are_the_whole(switches: dict, prefetched: bool, seed: int) -> None:
    """Chunks, single tokens, and drafts taken back, with the convolution's state."""
    fields = config(**switches)
    module = warm(EngramModule(fields).double())
    hidden, ids = inputs(fields, torch.float64, tokens=31)
    whole = module(hidden, ids)[0]
    state = module.new_state(2, max_rollback=8)
    pieces = []
    begin = 0
    for count in (1, 1, 2, 9, 1, 0, 1, 16):
        end = begin + count
        drafts = torch.randint(0, 50, (2, 3))
        for piece, states in (
            (drafts, torch.randn_like(hidden[:, :3])),
            (ids[:, begin:end], hidden[:, begin:end]),
        ):
            if prefetched:
                handle = module.prefetch_embeddings(piece, state=state)
                result = module(states, memory_embeddings=handle, state=state)[0]
            else:
                result = module(states, piece, state=state)[0]
            if piece is drafts:
                state.rollback(3)
        pieces.append(result)
        begin = end
    assert state.length == 31
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_a_prefetched_draft_can_be_taken_back(seed: int) -> None:
    module = warm(EngramModule(config()))
    hidden, ids = inputs(module.config, torch.float32, tokens=6)
    whole = module(hidden, ids)[0]
    state = module.new_state(2)
    first = module(hidden[:, :5], ids[:, :5], state=state)[0]
    module.prefetch_embeddings(torch.zeros(2, 2, dtype=torch.int64), state=state)
    state.rollback(2)
    last = module(hidden[:, 5:], ids[:, 5:], state=state)[0]
    torch.testing.assert_close(torch.cat([first, last], dim=1), whole)


def test_embeddings_that_were_not_taken_in_are_refused(seed: int) -> None:
    module = EngramModule(config())
    hidden, ids = inputs(module.config, torch.float32)
    handle = module.prefetch_embeddings(ids)
    with pytest.raises(InvalidRequestError, match="23 tokens computed, but 0 taken in"):
        module(hidden, memory_embeddings=handle, state=module.new_state(2))


class TestOrderOfPieces:
    """What would compute with another token's rows is refused, and the state stays as it was."""

    def state(self) -> tuple:
        module = warm(EngramModule(config()))
        hidden, ids = inputs(module.config, torch.float32, tokens=4)
        return module, hidden, ids, module.new_state(2)

    def refuses(self, problem: str, module: EngramModule, *args: object, **more: object) -> None:
        with pytest.raises(InvalidRequestError, match=problem):
            module(*args, **more)

    def test_a_handle_twice(self, seed: int) -> None:
        module, hidden, ids, state = self.state()
        first, second = (
            module.prefetch_embeddings(ids[:, t : t + 1], state=state) for t in range(2)
        )
        whole = module(hidden, ids)[0]
        got = [module(hidden[:, :1], memory_embeddings=first, state=state)[0]]
        self.refuses(
            "not those of the state's next",
            module,
            hidden[:, :1],
            memory_embeddings=first,
            state=state,
        )
        got.append(module(hidden[:, 1:2], memory_embeddings=second, state=state)[0])
        torch.testing.assert_close(torch.cat(got, dim=1), whole[:, :2])

    def test_a_handle_out_of_order(self, seed: int) -> None:
        module, hidden, ids, state = self.state()
        module.prefetch_embeddings(ids[:, :1], state=state)
        second = module.prefetch_embeddings(ids[:, 1:2], state=state)
        self.refuses("next", module, hidden[:, :1], memory_embeddings=second, state=state)

    def test_a_handle_of_what_was_taken_back(self, seed: int) -> None:
        module, hidden, ids, state = self.state()
        stale = module.prefetch_embeddings(ids[:, :1], state=state)
        state.rollback(1)
        right = module.prefetch_embeddings(ids[:, 1:2], state=state)
        self.refuses("next", module, hidden[:, :1], memory_embeddings=stale, state=state)
        got = module(hidden[:, :1], memory_embeddings=right, state=state)[0]
        expected = module(hidden[:, :1], ids[:, 1:2])[0]
        torch.testing.assert_close(got, expected)

    def test_ids_while_others_are_ahead(self, seed: int) -> None:
        module, hidden, ids, state = self.state()
        module.prefetch_embeddings(ids[:, :1], state=state)
        self.refuses("prefetched and are not computed", module, hidden, ids, state=state)
        assert state.length == 1

    def test_the_state_of_another_layer(self, seed: int) -> None:
        for use_conv in (False, True):
            stack = EngramStack(config(use_conv=use_conv))
            hidden, ids = inputs(stack[1].config, torch.float32, tokens=4)
            state = stack.new_state(2)
            self.refuses("another module", stack[1], hidden, ids, state=state[3])
            with pytest.raises(InvalidRequestError, match="another module"):
                stack[1].prefetch_embeddings(ids, state=state[3])

    def test_a_forward_that_fails_leaves_the_state(self, seed: int) -> None:
        module, hidden, ids, state = self.state()
        whole = module(hidden, ids)[0]
        first = module(hidden[:, :2], ids[:, :2], state=state)[0]
        self.refuses("must be", module, hidden[:, 2:3], ids[:, 2:], state=state)
        last = module(hidden[:, 2:], ids[:, 2:], state=state)[0]
        torch.testing.assert_close(torch.cat([first, last], dim=1), whole)

    def test_a_lookup_that_fails_leaves_the_state(self, seed: int) -> None:
        module, hidden, ids, state = self.state()
        whole = module(hidden, ids)[0]
        first = module(hidden[:, :2], ids[:, :2], state=state)[0]
        table, module.table = module.table, FailingTable(module.table.rows, 4)
        with pytest.raises(InvalidRequestError, match="no disk"):
            module(hidden[:, 2:], ids[:, 2:], state=state)
        module.prefetcher = memory.Prefetcher(1)
        module.prefetcher.close()
        with pytest.raises(InvalidRequestError, match="prefetcher is closed"):
            module.prefetch_embeddings(ids[:, 2:], state=state)
        module.table = table
        last = module(hidden[:, 2:], ids[:, 2:], state=state)[0]
        torch.testing.assert_close(torch.cat([first, last], dim=1), whole)


class FailingTable(memory.TorchTable):
    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        raise InvalidRequestError("no disk")


def test_what_prefetch_returns_is_accepted(seed: int) -> None:
    module = EngramModule(config())
    hidden, ids = inputs(module.config, torch.float32)
    expected, none = module(hidden, ids)
    assert none is None
    handle = module.prefetch_embeddings(ids)
    assert handle.result().shape == (2, 23, module.config.memory_dim)
    assert handle.done()
    assert torch.equal(module(hidden, memory_embeddings=handle)[0], expected)
    assert torch.equal(module(hidden, memory_embeddings=handle.result())[0], expected)


def test_a_prefetched_lookup_trains_the_table(seed: int) -> None:
    module = EngramModule(config())
    hidden, ids = inputs(module.config, torch.float32)
    module(hidden, ids)[0].sum().backward()
    expected = module.table.weight.grad.clone()
    module.zero_grad()
    module(hidden, memory_embeddings=module.prefetch_embeddings(ids))[0].sum().backward()
    torch.testing.assert_close(module.table.weight.grad, expected)
    with torch.no_grad():
        assert not module.prefetch_embeddings(ids).result().requires_grad


def test_hidden_states_without_branches(seed: int) -> None:
    module = EngramModule(config())
    hidden, ids = inputs(module.config, torch.float32)
    with_branch, gate = module(hidden, ids, return_gating=True)
    flat, flat_gate = module(hidden[:, :, 0], ids, return_gating=True)
    assert flat.shape == (2, 23, 6)
    assert torch.equal(flat, with_branch[:, :, 0])
    assert torch.equal(flat_gate, gate)
    assert gate.shape == (2, 23, 1)
    assert bool(((gate > 0) & (gate < 1)).all())


def test_bfloat16_hidden_states(seed: int) -> None:
    module = warm(EngramModule(config()).bfloat16())
    hidden, ids = inputs(module.config, torch.bfloat16)
    states = module(hidden, ids)[0]
    assert states.dtype == torch.bfloat16
    # The norms compute in float32, and so have its epsilon.
    eps = torch.finfo(torch.float32).eps
    expected, _ = reference.forward(
        module.config, module.state_dict(), hidden, module.layout.hash(ids), eps
    )
    np.testing.assert_allclose(states.detach().float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
def test_the_norm_is_torchs(dtype: torch.dtype, seed: int) -> None:
    """Of numbers so small that it matters which epsilon is added."""
    x = (torch.randn(5, 16) * 1e-3).to(dtype)
    expected = torch.nn.RMSNorm(16, dtype=dtype)(x)
    got = rms_norm(x, torch.ones(16, dtype=dtype), None)
    torch.testing.assert_close(got.to(dtype), expected)


def test_the_gate_is_v41s(seed: int) -> None:
    upstream = pytest.importorskip("sglang.srt.layers.engram")
    switches = {"bias": False, "gate_transform": "copysign_sqrt", "norm_eps": 1e-6}
    fields = config(layout="v41", num_branches=4, use_conv=False, **switches)
    module = warm(EngramModule(fields))
    hidden, ids = inputs(fields, torch.float32)
    gate = module.gate
    embeddings = module.prefetch_embeddings(ids).result()
    wkv = torch.cat([gate.key_proj.weight, gate.value_proj.weight])
    expected = upstream.engram_gate(
        hidden.flatten(0, 1),
        (embeddings @ wkv.T).flatten(0, 1),
        gate.query_norm,
        gate.key_norm,
        1e-6,
        1e-6,
    )
    torch.testing.assert_close(module(hidden, ids)[0].flatten(0, 1), expected, rtol=1e-5, atol=1e-5)


class TestInputs:
    def test_neither_ids_nor_embeddings(self) -> None:
        with pytest.raises(InvalidRequestError, match="neither"):
            EngramModule(config())(torch.zeros(1, 2, 6))

    @pytest.mark.parametrize("shape", [(2, 6), (1, 2, 7), (1, 2, 2, 6), (1, 2, 1, 6, 1)])
    def test_hidden_states_of_another_shape(self, shape: tuple) -> None:
        with pytest.raises(InvalidRequestError, match="hidden states must be"):
            EngramModule(config())(torch.zeros(shape), torch.zeros(1, 2, dtype=torch.int64))

    def test_ids_of_another_length(self) -> None:
        with pytest.raises(InvalidRequestError, match="memory embeddings must be"):
            EngramModule(config())(torch.zeros(1, 2, 6), torch.zeros(1, 3, dtype=torch.int64))

    def test_hidden_states_that_are_integers(self) -> None:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        with pytest.raises(InvalidRequestError, match="floating-point"):
            EngramModule(config())(torch.zeros(1, 2, 6, dtype=torch.int64), ids)

    def test_a_layout_of_another_config_or_compression(self) -> None:
        layout = memory.NgramHashLayout(config())
        with pytest.raises(InvalidRequestError, match="another config"):
            EngramModule(config(hidden_dim=12), layout=layout)
        with pytest.raises(InvalidRequestError, match="another compression"):
            EngramModule(config(), TokenCompression(torch.arange(50) // 2), layout=layout)

    def test_a_table_for_a_layer_that_is_none(self) -> None:
        with pytest.raises(InvalidRequestError, match="layer 9 has no memory"):
            EngramStack(config(), tables={9: memory.TorchTable(3, 4)})

    @pytest.mark.parametrize("switches", SWITCHES)
    @pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
    def test_nothing(self, switches: dict, batch: int, tokens: int) -> None:
        module = EngramModule(config(**switches))
        hidden = torch.zeros(batch, tokens, module.config.num_branches, 6)
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        state = module.new_state(batch)
        for states in (module(hidden, ids)[0], module(hidden, ids, state=state)[0]):
            assert states.shape == hidden.shape
        handle = module.prefetch_embeddings(ids, state=state)
        module(hidden, memory_embeddings=handle, state=state)
        assert state.length == 2 * tokens

    @pytest.mark.parametrize("switches", SWITCHES)
    def test_memory_of_any_order(self, switches: dict, seed: int) -> None:
        """Hidden states and ids whose numbers do not lie side by side."""
        module = warm(EngramModule(config(**switches)))
        hidden, ids = inputs(module.config, torch.float32)
        expected = module(hidden, ids)[0]
        turned = hidden.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        got = module(turned, ids.T.contiguous().T)[0]
        torch.testing.assert_close(got, expected)

    def test_a_table_of_another_size(self) -> None:
        with pytest.raises(InvalidRequestError, match="needs a table of"):
            EngramModule(config(), table=memory.TorchTable(10, 4))


class TestStateDict:
    def test_it_is_complete(self, seed: int) -> None:
        compression = TokenCompression(torch.arange(50) // 2)
        module = warm(EngramModule(config(), compression))
        other = EngramModule(config(), TokenCompression(torch.arange(50) // 2))
        other.load_state_dict(module.state_dict())
        hidden, ids = inputs(config(), torch.float32)
        assert torch.equal(module(hidden, ids)[0], other(hidden, ids)[0])
        assert "compression.lookup" in module.state_dict()
        assert {name for name in module.state_dict() if name.startswith("conv.")} == {
            "conv.weight",
            "conv.norm",
        }

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("compressed", [False, True])
    def test_a_module_made_without_memory_is_filled(
        self, assign: bool, compressed: bool, seed: int
    ) -> None:
        """On the meta device, as large models are made."""

        def compression() -> TokenCompression | None:
            return TokenCompression(torch.arange(50) // 2) if compressed else None

        module = warm(EngramModule(config(), compression()))
        given = compression()
        with torch.device("meta"):
            other = EngramModule(config(), given)
        if not assign:
            other.to_empty(device="cpu")
            for buffer in other.buffers():
                buffer.fill_(7)  # whatever was there before
        other.load_state_dict(module.state_dict(), assign=assign)
        hidden, ids = inputs(config(), torch.float32)
        assert torch.equal(module(hidden, ids)[0], other(hidden, ids)[0])

    @pytest.mark.parametrize(
        "fields",
        [{"seed": 1}, {"layer_ids": (1, 3), "layer_id": 3}, {"vocab_size": 49}],
    )
    def test_another_hash_is_refused(self, fields: dict) -> None:
        state = EngramModule(config(layer_id=3)).state_dict()
        state["table.weight"] = EngramModule(config(**fields)).table.weight
        with pytest.raises(InvalidRequestError, match="those of another memory"):
            EngramModule(config(**fields)).load_state_dict(state)

    def test_another_compression_is_refused(self) -> None:
        state = EngramModule(config(), TokenCompression(torch.arange(50) // 2)).state_dict()
        other = EngramModule(config(), TokenCompression(torch.arange(50) % 25))
        with pytest.raises(InvalidRequestError, match="another tokenizer"):
            other.load_state_dict(state)


class TestStack:
    def test_layers_share_one_layout(self, seed: int) -> None:
        stack = EngramStack(config(num_branches=2))
        assert list(stack) == [3, 1]
        for layer in stack:
            alone = EngramModule(config(num_branches=2, layer_id=layer))
            alone.load_state_dict(stack[layer].state_dict())
            hidden, ids = inputs(alone.config, torch.float32)
            assert torch.equal(stack[layer](hidden, ids)[0], alone(hidden, ids)[0])
        assert stack[3].table.rows == stack.layout.rows(3) != stack[1].table.rows

    def test_prefetch_and_state_of_all_layers(self, seed: int) -> None:
        stack = EngramStack(config())
        hidden, ids = inputs(stack[1].config, torch.float32, tokens=6)
        state = stack.new_state(2)
        parts = {layer: [] for layer in stack}
        for piece in (slice(0, 4), slice(4, 6)):
            handles = stack.prefetch_embeddings(ids[:, piece], state=state)
            for layer in stack:
                got = stack[layer](
                    hidden[:, piece], memory_embeddings=handles[layer], state=state[layer]
                )
                parts[layer].append(got[0])
        for layer in stack:
            whole = stack[layer](hidden, ids)[0]
            torch.testing.assert_close(torch.cat(parts[layer], dim=1), whole)

    def test_a_layer_without_memory(self) -> None:
        with pytest.raises(InvalidRequestError, match="layer 2 has no memory"):
            EngramStack(config())[2]
