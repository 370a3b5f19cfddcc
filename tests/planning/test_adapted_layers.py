"""The layers that a trial adapts are named in few words."""

from pathlib import Path

import pytest

from loragrid.planning.adapted_layers import AdaptedLayers, adapted_sentences, compressed
from tests.support.small_packs import make_setup


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["m.layers.0.a.q", "m.layers.0.a.v", "m.layers.1.a.q", "m.layers.1.a.v"], "m.layers.{0-1}.a.{q,v}"),
        (["m.layers.0.q", "m.layers.2.q", "m.layers.3.q", "m.layers.0.v"], "m.layers.{0,2-3}.q, m.layers.0.v"),
        (["projector.fc"], "projector.fc"),
        (["fc"], "fc"),
        (["h.0.experts.1.w"], "h.0.experts.1.w"),
    ],
)
def test_names_that_differ_in_a_number_are_one(names: list[str], text: str) -> None:
    assert compressed(names) == text


def test_methods_that_adapt_the_same_layers_share_a_sentence(tiny_llama_dir: Path, chat_jsonl: Path) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    first = {"layers_to_transform": 1, "target_modules": ("q_proj",)}
    trials = [setup.trial("lora", first), setup.trial("vera", first), setup.trial("dora"), setup.trial("full")]
    assert adapted_sentences(trials) == [
        "adapted by lora, vera: 1 layer: model.layers.1.self_attn.q_proj",
        "adapted by dora: 14 layers: model.layers.{0-1}.self_attn.{q_proj,k_proj,v_proj,o_proj}, "
        "model.layers.{0-1}.mlp.{gate_proj,up_proj,down_proj}",
    ]
    assert AdaptedLayers.of(trials[3]).names == ()
