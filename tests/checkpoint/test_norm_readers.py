"""Which layers read a norm, of decoder layers as families build them."""

from __future__ import annotations

import pytest

from quantkit.checkpoint.network.norm_readers import norm_readers, smoothable

BLOCK = "model.layers.0"
WIDTH = 64
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
OUT = ("self_attn.o_proj", "mlp.down_proj")
LLAMA = ("input_layernorm", "post_attention_layernorm", *ATTENTION, *MLP, *OUT)


def of(*names: str) -> dict[str, int]:
    """A block, and a tower with a layer of the same names."""
    inside = ("", "self_attn", "mlp", *names)
    linear = ("_proj", "gate", "router", "w1", "w2", "w3")
    found = {
        f"{BLOCK}.{name}".rstrip("."): WIDTH if name.endswith(linear) else 0 for name in inside
    }
    return found | {"vision.layers.0.self_attn.q_proj": WIDTH, "vision.layers.0.layer_norm1": 0}


def planned(names: tuple[str, ...]) -> set[str]:
    return {f"{BLOCK}.{name}" for name in names if name.endswith("_proj")}


@pytest.mark.parametrize(
    ("names", "kept", "found"),
    [
        (LLAMA, (), {"input_layernorm": ATTENTION, "post_attention_layernorm": MLP}),
        (
            (*LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm"),  # Gemma 2
            (),
            {"input_layernorm": ATTENTION, "pre_feedforward_layernorm": MLP},
        ),
        (("post_attention_layernorm", "post_feedforward_layernorm", *ATTENTION, *MLP), (), {}),
        (
            ("input_layernorm", "pre_ff_layernorm", *ATTENTION, *MLP, *OUT),  # Jamba
            (),
            {"input_layernorm": ATTENTION, "pre_ff_layernorm": MLP},
        ),
        (("input_layernorm", *ATTENTION, *MLP, *OUT), (), {"input_layernorm": (*ATTENTION, *MLP)}),
        ((*LLAMA, "mlp.gate"), (), {"input_layernorm": ATTENTION}),  # a router reads it
        (LLAMA, ("mlp.up_proj",), {"input_layernorm": ATTENTION}),  # one stays in 16 bit
        ((*LLAMA, "self_attn.output_gate_proj"), (), {"post_attention_layernorm": MLP}),
        ((*LLAMA, "self_attn.gate_proj"), (), {}),  # AFMoE: it reads the norm before attention
        (("operator_norm", "ffn_norm", *ATTENTION, *MLP), (), {"ffn_norm": MLP}),
    ],
)
def test_scales_move_only_into_what_reads_the_norm(
    names: tuple[str, ...], kept: tuple[str, ...], found: dict[str, tuple[str, ...]]
) -> None:
    layers = planned(names) - {f"{BLOCK}.{name}" for name in kept}
    assert smoothable(of(*names), layers) == {
        f"{BLOCK}.{norm}": tuple(f"{BLOCK}.{name}" for name in readers)
        for norm, readers in found.items()
    }


def test_a_norm_that_nobody_knows_has_no_readers() -> None:
    assert norm_readers(f"{BLOCK}.some_norm", of("some_norm", *ATTENTION)) == ()
