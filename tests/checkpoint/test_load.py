"""Loading is strict both ways, and goes straight onto a mesh."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint import huggingface
from checkpoint.config_reader import Settings
from checkpoint.public import export_family, find_family, lost_settings, write_model
from checkpoint.weight_map import Row, expand, flatten, interleaved
from configs.attention import LatentAttentionConfig
from configs.checks import UserError
from configs.models import (
    deepseek_v2_lite,
    deepseek_v3,
    deepseek_v3_nano,
    mixtral_8x7b,
    smollm2_135m,
    v31_dynamic_nano,
)
from infer.logits import full_logits
from infer.sources import open_source
from model.transformer import Transformer, abstract_variables
from parallel.mesh import make_mesh
from tests.checkpoint.cases import CASES, write_case


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_loading_onto_a_mesh_gives_the_same_arrays(case, tmp_path):
    write_case(case, tmp_path)
    source = open_source(str(tmp_path))
    _, alone = source.load()
    mesh = make_mesh(2, 2, 2)
    _, spread = source.load(mesh=mesh)
    sharded = 0
    for (path, one), many in zip(
        jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(spread), strict=True
    ):
        np.testing.assert_array_equal(one, many, err_msg=jax.tree_util.keystr(path))
        assert len(many.sharding.device_set) == 8
        sharded += not many.sharding.is_fully_replicated
    assert sharded > 5


def test_loading_in_bfloat16_rounds_parameters_and_leaves_router_state(tmp_path):
    write_case("deepseek_v3", tmp_path)
    source = open_source(str(tmp_path))
    _, exact = source.load()
    _, rounded = source.load(dtype="bfloat16")
    for path, x in jax.tree_util.tree_leaves_with_path(rounded["params"]):
        wanted = flatten(exact["params"])[jax.tree_util.keystr(path, simple=True, separator=".")]
        np.testing.assert_array_equal(x, np.asarray(wanted).astype(jax.numpy.bfloat16))
    state = rounded["router_state"]["periods"]["layer_0"]["moe"]["state"]
    assert state.bias_E.dtype == np.float32


def damage_missing(tensors):
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def damage_unknown(tensors):
    tensors["model.layers.0.self_attn.extra.weight"] = np.ones(3, np.float32)


def damage_shape(tensors):
    tensors["model.norm.weight"] = np.ones(65, np.float32)


def damage_transposed(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def damage_nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


REFUSALS = [
    (damage_missing, r"1 tensors are missing \(model\.layers\.1\.self_attn\.k_proj\.weight\)"),
    (
        damage_unknown,
        r"1 tensors in model\.safetensors belong to nothing .*self_attn\.extra\.weight",
    ),
    (damage_shape, r"model\.norm\.weight has the shape \[65\], its config asks for \[64\]"),
    (damage_transposed, r"layers\.0\.mlp\.up_proj\.weight has the shape \[64, 96\]"),
    (damage_nan, r"layers\.1\.mlp\.up_proj\.weight"),
]


@pytest.mark.parametrize(("damage", "sentence"), REFUSALS)
def test_what_does_not_fit_is_named(damage, sentence, tmp_path):
    write_case("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        open_source(str(tmp_path)).load()


def test_values_that_follow_from_the_config_are_passed_over(tmp_path):
    tokens, expected = write_case("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    model, variables = open_source(str(tmp_path)).load()
    np.testing.assert_allclose(full_logits(model, variables, tokens.tolist()), expected, atol=1e-4)


WRONG_CONFIGS = [
    ({"hidden_size": "64"}, r"hidden_size='64', expected a whole number"),
    ({"hidden_size": -64}, r"hidden_size=-64"),
    ({"hidden_size": True}, r"hidden_size=True"),
    ({"num_hidden_layers": 1e400}, r"num_hidden_layers=inf"),
    ({"num_hidden_layers": 10**12}, r"num_hidden_layers=1000000000000"),
    ({"vocab_size": None}, r"lacks vocab_size"),
    ({"hidden_act": "gelu"}, r"hidden_act='gelu', expected 'silu'"),
    ({"mlp_bias": 1}, r"mlp_bias=1, expected true or false"),
    ({"num_attention_heads": 3}, r"describes no model that can be built: .*divisible"),
    ({"rope_parameters": [1]}, r"rope_parameters=\[1\], expected an object"),
    ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_type='longrope'"),
    ({"model_type": "mamba2"}, r"model_type='mamba2'.*families that can be read are llama"),
    ({"model_type": ["llama"]}, r"model_type=\['llama'\], expected a string"),
    ({"quantization_config": {"quant_method": "gptq"}}, r"gptq"),
    ({"rms_norm_eps": "tiny"}, r"rms_norm_eps='tiny', expected a number"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG_CONFIGS)
def test_a_config_that_can_not_be_meant_is_refused(changes, sentence, tmp_path):
    write_case("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=sentence):
        open_source(str(tmp_path))


@pytest.mark.parametrize("case", ["deepseek_v2", "mixtral"])
def test_only_llamas_dense_layers_have_biases(case, tmp_path):
    write_case(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"mlp_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="mlp_bias=True, expected False"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": 1} x', "\xff"])
def test_a_config_that_is_no_json_is_refused(text, tmp_path):
    write_case("llama", tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        open_source(str(tmp_path))


def test_the_published_sizes_have_a_tensor_for_every_parameter():
    """As many as the names in the released index files: 7 of latent attention, 2 norms, a router,
    its bias, 3 for each expert and for the shared one; 4 more around the multi-token layer.
    """
    moe_layer = 7 + 2 + 2 + 3 * 256 + 3
    deepseek = 3 + 3 * (7 + 2 + 3) + 58 * moe_layer + (moe_layer + 4)
    mixtral = 3 + 32 * (4 + 2 + 1 + 3 * 8)
    for config, count in ((deepseek_v3(), deepseek), (mixtral_8x7b(), mixtral)):
        entries = expand(
            export_family(config).rows, config, flatten(abstract_variables(Transformer(config))[0])
        )
        assert len(entries) == count


def test_a_model_that_no_family_can_say_is_not_exported():
    with pytest.raises(UserError, match="no public family holds this model"):
        export_family(v31_dynamic_nano())
    with pytest.raises(UserError, match=r"family 'gpt5' is unknown"):
        export_family(deepseek_v3_nano(), "gpt5")
    own = export_family(mixtral_8x7b())
    with pytest.raises(UserError, match=r"holds this model \(the nearest is mixtral: "):
        export_family(v31_dynamic_nano(), own=own)


def test_an_export_names_what_its_family_can_not_say():
    config = mixtral_8x7b()
    layer = config.pattern[0]
    sinks = replace(layer, attention=replace(layer.attention, sink_logits=True))
    with pytest.raises(UserError, match=r"can't say all .*sink_logits was True, now False"):
        write_model(export_family(mixtral_8x7b()), replace(config, pattern=(sinks,)))


def test_interleaved_order_turns_the_same_pairs():
    """Pairs side by side, reordered, are the pairs (d, d + C/2) that model/layers.py turns."""
    layer = deepseek_v3_nano().pattern[0]
    assert isinstance(layer.attention, LatentAttentionConfig)
    order = interleaved("rope_head_dim")(20, layer)
    assert order[:4].tolist() == [0, 1, 2, 3]
    assert order[4:].tolist() == [4, 6, 8, 10, 12, 14, 16, 18, 5, 7, 9, 11, 13, 15, 17, 19]


def test_a_row_is_its_own_inverse():
    shapes = {"params.x": np.zeros((3, 2, 4, 5))}
    config = deepseek_v3_nano()
    (first, second, *_) = expand([Row("x", "x.{e}", "(g c) d -> e d g c")], config, shapes)
    assert (first.name, first.shape, second.place) == ("x.0", (20, 2), (1, None, None, None))
    tensor = np.arange(40.0).reshape(20, 2)
    part = second.to_parameter(tensor)
    assert part.shape == (2, 4, 5)
    assert part[1, 2, 3] == tensor[2 * 5 + 3, 1]
    np.testing.assert_array_equal(second.to_public(part), tensor)


@pytest.mark.parametrize("case", CASES)
def test_settings_read_what_transformers_wrote_without_surprises(case, tmp_path):
    write_case(case, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    config = huggingface.open_checkpoint(Path(tmp_path)).config
    assert config.vocab_size == written["vocab_size"]
    kinds = written.get("layers_block_type", ())  # Nemotron-H, which has no count beside them
    assert config.num_layers == written.get("num_hidden_layers", len(kinds))


YARN_40 = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
LATENT = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
PUBLISHED = [
    (
        deepseek_v3,
        LATENT
        | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "aux_loss_alpha": 0.001,
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "rope_scaling": YARN_40 | {"mscale": 1.0, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "vocab_size": 129280,
        },
    ),
    (
        deepseek_v2_lite,
        LATENT
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "aux_loss_alpha": 0.001,
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "model_type": "deepseek_v2",
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "rope_scaling": YARN_40 | {"mscale": 0.707, "mscale_all_dim": 0.707},
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_group": 1,
            "topk_method": "greedy",
            "vocab_size": 102400,
        },
    ),
    (
        mixtral_8x7b,
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
    ),
    (
        smollm2_135m,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "vocab_size": 49152,
        },
    ),
]


@pytest.mark.parametrize(("ours", "published"), PUBLISHED, ids=lambda x: getattr(x, "__name__", ""))
def test_a_published_config_is_the_model_of_that_name(ours, published):
    """Our named sizes and the config.json that those models were released with say the same."""
    settings = Settings(published, "config.json")
    assert lost_settings(ours(), find_family(settings).read_config(settings)) == []
