"""The demo's weights mean the same here, and tables come out of checkpoints in small pieces."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engram import EngramConfig, EngramModule
from engram.conditional_memory import DiskTable, EngramStack, NgramHashLayout, TorchTable
from engram.conditional_memory.safetensors_table import SafetensorsRows, table_from_safetensors
from engram.conditional_memory.tables.rows import decode_fp8, encode_fp8
from engram.conditional_memory.training import optimizers, parameter_groups
from engram.conditional_memory.weights import load_demo, load_v41, to_demo
from engram.errors import InvalidRequestError

CONFIG = EngramConfig.preset(
    "deepseek-demo",
    vocab_size=70,
    embedding_table_size=(50, 80),
    num_hash_heads=2,
    embedding_dim=5,
    hidden_dim=6,
    num_branches=3,
)


class DemoLayer(nn.Module):
    """A layer with the demo's submodules, and so its names, put together from its facts."""

    def __init__(self, config: EngramConfig, offsets: torch.Tensor, rows: int) -> None:
        super().__init__()
        d, m, g = config.hidden_dim, config.memory_dim, config.num_branches
        self.multi_head_embedding = nn.Module()
        self.multi_head_embedding.register_buffer("offsets", offsets)
        self.multi_head_embedding.embedding = nn.Embedding(rows, config.embedding_dim)
        self.short_conv = nn.Module()
        self.short_conv.conv = nn.Conv1d(
            g * d,
            g * d,
            4,
            groups=g * d,
            bias=False,
            padding=3 * config.max_n,
            dilation=config.max_n,
        )
        self.short_conv.norms = nn.ModuleList(nn.RMSNorm(d, eps=1e-5) for _ in range(g))
        self.value_proj = nn.Linear(m, d)
        self.key_projs = nn.ModuleList(nn.Linear(m, d) for _ in range(g))
        self.norm1 = nn.ModuleList(nn.RMSNorm(d) for _ in range(g))
        self.norm2 = nn.ModuleList(nn.RMSNorm(d) for _ in range(g))

    def forward(self, hidden: torch.Tensor, hashes: torch.Tensor) -> torch.Tensor:
        rows = hashes + self.multi_head_embedding.offsets
        memory = self.multi_head_embedding.embedding(rows).flatten(-2)
        values = []
        for g, key_proj in enumerate(self.key_projs):
            key = self.norm1[g](key_proj(memory))
            score = (key * self.norm2[g](hidden[:, :, g])).sum(-1) / hidden.shape[-1] ** 0.5
            root = score.abs().clamp_min(1e-6).sqrt() * score.sign()
            values.append(root.sigmoid().unsqueeze(-1) * self.value_proj(memory))
        normed = [norm(v) for norm, v in zip(self.short_conv.norms, values, strict=True)]
        mixed = self.short_conv.conv(torch.cat(normed, dim=-1).transpose(1, 2))
        mixed = nn.functional.silu(mixed[..., : hidden.shape[1]]).transpose(1, 2)
        value = torch.stack(values, dim=2)
        return value + mixed.reshape(value.shape)


def demo(module: EngramModule) -> DemoLayer:
    layer = DemoLayer(CONFIG, torch.tensor(module.layout.offsets()), module.layout.rows())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def test_the_demos_weights_compute_the_same(seed: int) -> None:
    module = EngramModule(CONFIG).double()
    layer = demo(module).double()
    load_demo(module, layer.state_dict())
    ids = torch.randint(0, 70, (2, 30))
    hidden = torch.randn(2, 30, 3, 6, dtype=torch.float64)
    expected = hidden + layer(hidden, module.layout.hash(ids, with_offsets=False))
    torch.testing.assert_close(module(hidden, ids)[0], expected, rtol=1e-10, atol=1e-10)


def test_there_and_back(seed: int) -> None:
    module = EngramModule(CONFIG)
    state = demo(module).state_dict()
    load_demo(module, state)
    back = to_demo(module)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


class TestUnfitWeights:
    def test_missing(self) -> None:
        module = EngramModule(CONFIG)
        state = to_demo(module)
        del state["norm2.1.weight"]
        with pytest.raises(InvalidRequestError, match=r"has no norm2\.1\.weight"):
            load_demo(module, state)

    def test_superfluous_and_of_another_shape(self) -> None:
        module = EngramModule(CONFIG)
        state = to_demo(module)
        state["more"] = torch.zeros(1)
        state["value_proj.bias"] = torch.zeros(7)
        with pytest.raises(InvalidRequestError, match=r"more is superfluous; .*bias is \(7,\)"):
            load_demo(module, state)

    def test_another_layer(self) -> None:
        stack = EngramStack(CONFIG)
        with pytest.raises(InvalidRequestError, match="offsets are not those of layer 15"):
            load_demo(stack[15], to_demo(stack[1]))

    def test_branches_of_different_shapes(self) -> None:
        module = EngramModule(CONFIG)
        state = to_demo(module) | {"key_projs.1.weight": torch.zeros(2, 2)}
        with pytest.raises(InvalidRequestError, match=r"key_projs\.\*\.weight have different"):
            load_demo(module, state)

    @pytest.mark.parametrize(
        "fields",
        [{"gate_transform": "identity"}, {"conv_dilation": 1}, {"norm_eps": 1.0}, {"min_n": 1}],
    )
    def test_what_the_demo_would_compute_otherwise(self, fields: dict) -> None:
        config = replace(CONFIG, embedding_table_size=50, **fields)
        with pytest.raises(InvalidRequestError, match="would compute something else"):
            to_demo(EngramModule(config))

    def test_no_demo(self) -> None:
        config = EngramConfig.preset("deepseek-demo", bias=False, embedding_table_size=10)
        with pytest.raises(InvalidRequestError, match="the demo has a convolution"):
            to_demo(EngramModule(config))


@pytest.mark.parametrize("fp8", [False, True])
def test_v41s_projection_is_split(fp8: bool, seed: int) -> None:
    config = EngramConfig.preset(
        "deepseek-v4.1-flash", embedding_table_size=20, embedding_dim=4, hidden_dim=6
    )
    rows = NgramHashLayout(config).rows()
    table = TorchTable(rows, 4, "fp8") if fp8 else None
    module = EngramModule(config, table=table)
    wkv = torch.randn(5 * 6, config.memory_dim)
    norms = {"q_weight": torch.randn(4, 6), "k_weight": torch.randn(4, 6)}
    load_v41(module, {"wkv.weight": wkv, **norms})
    memory = torch.randn(1, 3, config.memory_dim)
    keys = torch.stack([memory @ wkv[i * 6 : (i + 1) * 6].T for i in range(4)], dim=2)
    got = module.gate.key_proj(memory).unflatten(-1, (4, 6))
    torch.testing.assert_close(got, keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.gate.value_proj(memory), memory @ wkv[24:].T)
    assert torch.equal(module.gate.query_norm, norms["q_weight"])


class TestSafetensors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_table_in_parts(self, dtype: torch.dtype, tmp_path: Path, seed: int) -> None:
        values = torch.randn(1000, 12).to(dtype)
        files = []
        for index, part in enumerate(values.split([300, 1, 699])):
            files.append(tmp_path / f"part-{index}.safetensors")
            save_file({"other": torch.zeros(3), "embed": part.contiguous()}, files[-1])
        save_file({"other": torch.zeros(3)}, tmp_path / "more.safetensors")
        files.insert(1, tmp_path / "more.safetensors")
        table = table_from_safetensors(tmp_path / "t", files, "embed", shard_rows=450)
        assert torch.equal(table.gather(torch.arange(1000)), values)
        table.verify()

    def test_v41s_fp8_rows(self, tmp_path: Path, seed: int) -> None:
        numbers, exponents = encode_fp8(torch.randn(200, 256))
        path = tmp_path / "model.safetensors"
        save_file({"w": numbers, "s": exponents.view(torch.float8_e8m0fnu)}, path)
        table = table_from_safetensors(tmp_path / "t", [path], "w", "s")
        assert table.row_bytes == 264
        assert torch.equal(table.gather(torch.arange(200)), decode_fp8(numbers, exponents))

    def test_the_whole_is_never_in_memory(self, tmp_path: Path) -> None:
        """A table of 400 MB; the process that converts it grows by far less."""
        path = tmp_path / "model.safetensors"
        with path.open("wb") as file:
            header = b'{"w":{"dtype":"F32","shape":[1600000,64],"data_offsets":[0,409600000]}}'
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + 409600000)
        source = """
import resource, sys
from pathlib import Path
from engram.conditional_memory.safetensors_table import table_from_safetensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = Path(sys.argv[1])
table = table_from_safetensors(folder / "t", [folder / "model.safetensors"], "w")
assert table.rows == 1600000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        result = subprocess.run(
            [sys.executable, "-c", source, str(tmp_path)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert int(result.stdout) < 100_000, "kilobytes"

    @pytest.mark.parametrize(
        ("tensors", "arguments", "problem"),
        [
            ({"w": torch.zeros(3, 4)}, ["v"], "none of the files has a tensor 'v'"),
            ({"w": torch.zeros(3, 4, dtype=torch.float16)}, ["w"], "cannot have dtype F16"),
            ({"w": torch.zeros(3, 2, 2)}, ["w"], "has shape"),
            ({"w": torch.zeros(3, 4).to(torch.float8_e4m3fn)}, ["w"], "needs its exponents"),
            (
                {
                    "w": torch.zeros(3, 40).to(torch.float8_e4m3fn),
                    "s": torch.zeros(3, 1, dtype=torch.uint8),
                },
                ["w", "s"],
                r"'s' is U8 \[3, 1\]",
            ),
        ],
    )
    def test_what_is_no_table(
        self, tensors: dict, arguments: list, problem: str, tmp_path: Path
    ) -> None:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(InvalidRequestError, match=problem):
            table_from_safetensors(tmp_path / "t", [tmp_path / "x.safetensors"], *arguments)

    @pytest.mark.parametrize(
        "content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}x", b"\x05" + b"\0" * 7 + b"{bad}"]
    )
    def test_damaged_files(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(InvalidRequestError, match=r"cannot be read|none of the files"):
            SafetensorsRows([tmp_path / "x"], "w")

    @pytest.mark.parametrize(
        ("shape", "offsets"),
        [
            ("[-3, 4]", "[48, 0]"),
            ("[3.0, 4]", "[0, 48]"),
            ("[-3, -4]", "[0, 48]"),
            ("[3, 4]", "[-48, 0]"),
            ("[true, 4]", "[0, 16]"),
            ("[3, 4]", "[0, 64]"),
            ("[12]", "[0, 48]"),
            ("3", "[0, 48]"),
        ],
    )
    def test_headers_that_lie(self, shape: str, offsets: str, tmp_path: Path) -> None:
        """Negative rows would have shifted those of the files after this one."""
        header = f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
        (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
        save_file({"w": torch.ones(5, 4)}, tmp_path / "y")
        with pytest.raises(InvalidRequestError, match="cannot be read as a safetensors"):
            SafetensorsRows([tmp_path / "x", tmp_path / "y"], "w")

    @pytest.mark.parametrize("header", [b"[" * 100_000, b'["w"]', b'"w"', b'{"w": 3}'])
    def test_headers_of_another_kind(self, header: bytes, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(InvalidRequestError, match="cannot be read as a safetensors"):
            SafetensorsRows([tmp_path / "x"], "w")

    def test_a_file_that_ends_early(self, tmp_path: Path) -> None:
        save_file({"w": torch.zeros(300, 4)}, tmp_path / "x")
        with (tmp_path / "x").open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(InvalidRequestError, match="ends early"):
            table_from_safetensors(tmp_path / "t", [tmp_path / "x"], "w")
        assert not list((tmp_path / "t").glob("table.json"))
        with pytest.raises(InvalidRequestError, match="no finished table"):
            DiskTable(tmp_path / "t")


class TestTraining:
    def test_rows_learn_faster_and_do_not_decay(self) -> None:
        stack = EngramStack(CONFIG)
        rows, others = parameter_groups(stack, 0.01, weight_decay=0.1)
        assert (rows["lr"], rows["weight_decay"]) == (0.05, 0.0)
        assert (others["lr"], others["weight_decay"]) == (0.01, 0.1)
        tables = [stack[1].table.weight, stack[15].table.weight]
        assert {id(p) for p in rows["params"]} == {id(p) for p in tables}
        assert len(rows["params"]) + len(others["params"]) == len(list(stack.parameters()))

    @pytest.mark.parametrize("sparse", [False, True])
    def test_a_memory_learns_what_follows_a_bigram(self, sparse: bool, seed: int) -> None:
        """Targets that depend on two tokens, which the hidden state says nothing of."""
        config = EngramConfig(
            vocab_size=12,
            embedding_table_size=500,
            num_hash_heads=2,
            embedding_dim=8,
            hidden_dim=8,
            layer_ids=[0],
            sparse_gradients=sparse,
        )
        module = EngramModule(config)
        targets = torch.randn(12, 12, 8)
        steppers = list(optimizers(module, 0.02))
        assert isinstance(steppers[0], torch.optim.SparseAdam) == sparse
        losses = []
        for _ in range(150):
            ids = torch.randint(0, 12, (16, 8))
            hidden = torch.ones(16, 8, 8)
            states = module(hidden, ids)[0] - hidden
            loss = (states[:, 1:] - targets[ids[:, :-1], ids[:, 1:]]).square().mean()
            for optimizer in steppers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in steppers:
                optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.25 * losses[0], losses[::30]
