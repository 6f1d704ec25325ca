"""`chunkft doctor`: the machine, and whether a model can be trained in chunks."""

import json
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from chunkft_compile import backwards
from chunkft_compile.cli import main
from chunkft_compile.examining import DenseGradient, examine
from chunkft_compile.slicing import rule_of
from chunkft_compile.slicing.slicer import Rule

aten = torch.ops.aten

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 40}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config of a tiny Llama."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SIZES}))
    return path


def test_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert torch.__version__ in lines["torch"]
    assert "GB free" in lines["store"]
    assert "/s to the device" in lines["disk speed"]
    assert "on, by an allocator hook" in lines["memory guard"] or "install a C++ compiler" in lines["memory guard"]


def test_what_is_missing_comes_with_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("chunkft_compile.cli.doctor._EXTRAS", {"no-such-thing": ("wonders", "pip install wonders")})
    assert main(["doctor", "--device", "cpu"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no-such-thing")]
    assert "not installed: no wonders" in line
    assert "pip install wonders" in line


def test_a_model_without_its_weights(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (config, config.parent):
        assert main(["doctor", str(path), "--seq", "8", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert "4 segments of 3 kinds: prelude, block 0, block 1, head" in out
        assert "every gradient can be cut into rows" in out


def test_dense_gradients_are_listed_with_their_bytes(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_embeddings(node: fx.Node) -> Rule | None:
        return None if node.target is aten.embedding_dense_backward.default else rule_of(node)

    monkeypatch.setattr(backwards, "rule_of", without_embeddings)
    assert main(["doctor", str(config), "--seq", "8", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "no slicing rule for the gradient of 1 parameter, 1.3 kB; " in out
    assert "model.embed_tokens.weight  1.3 kB" in out


def test_a_missing_model_is_an_error_before_anything_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "/no/such/model"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("chunkft: error: model /no/such/model does not exist")


class _Partly(nn.Module):
    """One weight goes through an operator without a rule, one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.summed, self.plain, self.idle = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Through both."""
        result: torch.Tensor = nn.functional.linear(x, self.summed.weight.cumsum(0)) + self.plain(x)
        return result.sum()


def test_examining_a_module() -> None:
    found = examine(_Partly(), (torch.randn(3, 6),))
    assert found.dense == (DenseGradient("summed.weight", 4 * 6 * 4),)
    assert found.untrained == ("idle.bias", "idle.weight", "summed.bias")
    assert found.parameters == found.trainable == 62
    assert found.kinds == len(found.segments) == 1
