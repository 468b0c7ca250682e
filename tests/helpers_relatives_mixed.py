"""Tiny models of families with experts, latents or states; see `helpers_relatives`."""
from helpers_relatives import (
    E, EXPERTS, FFN_NORM, F, H, HKV, D, L, MAMBA, THREE_HEADS, U, V, X, attention, dense, experts,
    mamba2, model, square)


def fused_experts() -> dict:
    """With gate and up in one tensor."""
    apart = experts(shared=40) | {"ffn_gate_inp_shexp.weight": (1, E)}
    del apart["ffn_gate_exps.weight"], apart["ffn_up_exps.weight"]
    return apart | {"ffn_gate_up_exps.weight": (X, 2 * F, E)}


def attention_model(ffn: dict, *, lead: dict | None = None, ffn_norm="ffn_norm.weight",
                    output=True, **given) -> dict:
    """Each layer attention and `ffn`, the first one `lead` where that is given."""
    parts = [lead or ffn] + [ffn] * (L - 1)
    return model([attention(**given) | {ffn_norm: (E,)} | part for part in parts], output=output)


def latent(*, rank=20, n_plain=12, n_rot=8, n_value=10, q_rank=0, fused=False) -> dict:
    """Attention of deepseek2; fused: as older files have it."""
    n_q = H * (n_plain + n_rot)
    shapes = {"attn_norm.weight": (E,), "attn_kv_a_mqa.weight": (rank + n_rot, E),
              "attn_kv_a_norm.weight": (rank,), "attn_output.weight": (E, H * n_value)}
    if fused:
        shapes["attn_kv_b.weight"] = (H * (n_plain + n_value), rank)
    else:
        shapes |= {"attn_k_b.weight": (H, rank, n_plain), "attn_v_b.weight": (H, n_value, rank)}
    if not q_rank:
        return shapes | {"attn_q.weight": (n_q, E)}
    return shapes | {"attn_q_a.weight": (q_rank, E), "attn_q_a_norm.weight": (q_rank,),
                     "attn_q_b.weight": (n_q, q_rank)}


def latent_model(**given) -> dict:
    layer = latent(**given) | FFN_NORM
    return model([layer | dense()] + [layer | experts(shared=F)] * (L - 1))


def latent_experts(n: int) -> dict:
    """A layer of Nemotron-H whose experts work on rows of 20."""
    return {"attn_norm.weight": (E,), "ffn_latent_down.weight": (20, E),
            "ffn_latent_up.weight": (E, 20)} | experts(
                n, 20, shared=40, gated=False, choice_bias=True)


LATENT_KEYS = EXPERTS | {
    "attention.kv_lora_rank": 20, "rope.dimension_count": 8, "expert_shared_count": 1,
    "leading_dense_block_count": 1, "expert_weights_scale": 1.5, "expert_weights_norm": True}
SPLIT_KEYS = LATENT_KEYS | {
    "attention.head_count_kv": 1, "attention.key_length": 28, "attention.value_length": 20,
    "attention.key_length_mla": 20, "attention.value_length_mla": 10}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 64, "rope.scaling.yarn_log_multiplier": 0.0707}


def delta_model(ffn: dict, ba: dict, *, old=False, ahead=False) -> dict:
    """Three layers of gated delta net, one of gated attention: 2 key and 6 value heads of 8.

    old: with its inputs in one matrix. ahead: and one that guesses at the token after the next.
    """
    n_k, n_v, d = 2, 6, 8
    net = {"attn_norm.weight": (E,), "attn_qkv.weight": (2 * n_k * d + n_v * d, E),
           "attn_gate.weight": (n_v * d, E), "ssm_conv1d.weight": (2 * n_k * d + n_v * d, 4),
           "ssm_dt.bias": (n_v,), "ssm_a": (n_v,), "ssm_norm.weight": (d,),
           "ssm_out.weight": (E, n_v * d)} | ba
    full = attention(n_q=2 * H * D) | {"attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)}
    rest = {"post_attention_norm.weight": (E,)} | ffn
    if old:
        del net["attn_qkv.weight"], net["attn_gate.weight"]
        net["ssm_in.weight"] = (2 * n_k * d + 2 * n_v * d, E)
    last = {"nextn.eh_proj.weight": (E, 2 * E), "nextn.enorm.weight": (E,),
            "nextn.hnorm.weight": (E,), "nextn.shared_head_norm.weight": (E,)}
    return model([net | rest] * 3 + [full | rest] + [full | rest | last] * ahead)


DELTA_KEYS = {"attention.layer_norm_rms_epsilon": 1e-6, "ssm.conv_kernel": 4,
              "ssm.inner_size": 48, "ssm.state_size": 8, "ssm.time_step_rank": 6,
              "ssm.group_count": 2, "rope.dimension_count": 8}
SHARED_GATE = {"ffn_gate_inp_shexp.weight": (1, E)}


def short_conv_model() -> dict:
    """Short convolutions with a kernel of 4, attention of 3 heads that share one of keys."""
    conv = {"shortconv.conv.weight": (E, 4), "shortconv.in_proj.weight": (3 * E, E),
            "shortconv.out_proj.weight": (E, E), "attn_norm.weight": (E,)}
    full = square(1) | {"attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)}
    shapes = model([mixer | FFN_NORM | dense() for mixer in (conv, full, conv, full)],
                   output=False)
    return {name.replace("output_norm", "token_embd_norm"): shape
            for name, shape in shapes.items()}


def glm_model() -> dict:
    """With a last layer that guesses at the token after the next."""
    rest = {"post_attention_norm.weight": (E,)}
    layers = [attention(bias="qkv") | rest | ffn
              for ffn in [dense()] + [experts(shared=F, choice_bias=True)] * L]
    layers[-1] |= {"nextn.eh_proj.weight": (E, 2 * E), "nextn.enorm.weight": (E,),
                   "nextn.hnorm.weight": (E,), "nextn.shared_head_norm.weight": (E,)}
    return model(layers)


def gemma4_model(*, shared=0, n_row=0, plain_values=False, with_experts=False) -> dict:
    """Six layers, every third without a window and with longer heads; the last ones store nothing.

    n_row: width of the tokens' rows for each layer. plain_values: long heads have no values.
    """
    def layer(i: int) -> dict:
        d, n_kv = (24, 1) if i % 3 == 2 else (D, HKV)
        shapes = {f"{name}.weight": (E,) for name in
                  ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")}
        shapes |= {"attn_q.weight": (H * d, E), "attn_output.weight": (E, H * d),
                   "attn_q_norm.weight": (d,), "layer_output_scale.weight": (1,)} | dense()
        if i < 6 - shared:
            shapes |= {"attn_k.weight": (n_kv * d, E), "attn_k_norm.weight": (d,)}
            if not (plain_values and d == 24):
                shapes["attn_v.weight"] = (n_kv * d, E)
        if n_row:
            shapes |= {"inp_gate.weight": (n_row, E), "proj.weight": (E, n_row),
                       "post_norm.weight": (E,)}
        if with_experts:
            shapes |= experts() | {
                f"{name}.weight": (E,) for name in
                ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")}
            shapes |= {"ffn_gate_inp.scale": (E,), "ffn_down_exps.scale": (X,)}
        return shapes
    whole = model([layer(i) for i in range(6)], output=False, **{"rope_freqs.weight": (12,)})
    if n_row:
        whole |= {"per_layer_token_embd.weight": (V, 6 * n_row),
                  "per_layer_model_proj.weight": (6 * n_row, E),
                  "per_layer_proj_norm.weight": (n_row,)}
    return whole


GEMMA4 = {"block_count": 6, "attention.sliding_window": 16, "attention.key_length": 24,
          "attention.value_length": 24, "attention.key_length_swa": D,
          "attention.value_length_swa": D, "rope.dimension_count": 24,
          "rope.dimension_count_swa": D, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
          "attention.head_count_kv": [HKV, HKV, 1] * 2, "embedding_length_per_layer_input": 0,
          "attention.sliding_window_pattern": [True, True, False] * 2}

# name: (GGUF architecture, its keys beyond BASE, its tensors)
MIXED = {
    "mixtral": ("llama", {"expert_count": X, "expert_used_count": U},
                attention_model(experts(n=64))),
    "olmoe": ("olmoe", EXPERTS | THREE_HEADS | {"feed_forward_length": F}, model(
        [square(3) | FFN_NORM | experts()
         | {"attn_q_norm.weight": (E,), "attn_k_norm.weight": (E,)}] * L)),
    "qwen2moe": ("qwen2moe", THREE_HEADS | {
        "expert_count": X, "expert_used_count": U, "attention.head_count_kv": 1},
        model([square(1) | FFN_NORM | experts(n=32, shared=64) | {
            "ffn_gate_inp_shexp.weight": (E,), "attn_q.bias": (E,), "attn_k.bias": (D,),
            "attn_v.bias": (D,)}] * L)),
    "qwen3vlmoe": ("qwen3vlmoe", EXPERTS | {"rope.dimension_sections": [3, 3, 2, 0]},
                   attention_model(experts(), norms=(D,))),
    "ernie4_5-moe": ("ernie4_5-moe", EXPERTS | {
        "interleave_moe_layer_step": 1, "leading_dense_block_count": 1,
        "expert_shared_count": 1, "expert_shared_feed_forward_length": 40},
        attention_model(experts(shared=40, choice_bias=True), lead=dense(), output=False)),
    "hunyuan-moe": ("hunyuan-moe", EXPERTS | {
        "feed_forward_length": F, "expert_shared_count": 1,
        "expert_shared_feed_forward_length": 40},
        attention_model(experts(shared=40), norms=(D,))),
    "dots1": ("dots1", EXPERTS | {
        "attention.head_count_kv": H, "leading_dense_block_count": 1, "expert_shared_count": 2,
        "expert_gating_func": 2, "expert_weights_scale": 2.5, "expert_weights_norm": True},
        attention_model(experts(shared=2 * F, choice_bias=True), lead=dense(), n_kv=H * D,
                        norms=(D,))),
    "bailingmoe": ("bailingmoe", EXPERTS | {"expert_shared_count": 2, "expert_weights_scale": 1.0,
                                            "expert_weights_norm": True},
                   attention_model(experts(shared=2 * F))),
    "bailingmoe2": ("bailingmoe2", EXPERTS | {
        "attention.head_count": 3, "attention.head_count_kv": 1, "rope.dimension_count": 8,
        "leading_dense_block_count": 1, "expert_shared_count": 1, "expert_gating_func": 2,
        "expert_group_count": 3, "expert_group_used_count": 2, "expert_weights_scale": 2.5,
        "expert_weights_norm": True},
        model([{"attn_norm.weight": (E,), "attn_output.weight": (E, E), "attn_qkv.weight": (80, E),
                "attn_q_norm.weight": (D,), "attn_k_norm.weight": (D,)} | FFN_NORM | ffn
               for ffn in [dense()] + [experts(shared=F, choice_bias=True)] * 3])),
    "phimoe": ("phimoe", THREE_HEADS | {
        "expert_count": X, "expert_used_count": U, "attention.head_count_kv": 1},
        model([square(1) | FFN_NORM | experts(n=64) | {
            "attn_norm.bias": (E,), "ffn_norm.bias": (E,), "attn_output.bias": (E,),
            "attn_q.bias": (E,), "attn_k.bias": (D,), "attn_v.bias": (D,)}] * L,
            **{"output.bias": (V,), "output_norm.bias": (E,)})),
    "deepseek": ("deepseek", EXPERTS | THREE_HEADS | {
        "expert_shared_count": 2, "leading_dense_block_count": 1, "expert_weights_scale": 1.0},
        model([square(3) | FFN_NORM | ffn for ffn in [dense()] + [experts(shared=2 * F)] * 3])),
    "deepseek2-yarn": ("deepseek2", SPLIT_KEYS | YARN | {
        "attention.q_lora_rank": 14, "expert_gating_func": 2, "expert_group_count": 3,
        "expert_group_used_count": 2}, latent_model(q_rank=14)),
    "mistral-large3": ("deepseek2", SPLIT_KEYS | YARN | {
        "attention.temperature_scale": 0.1, "attention.temperature_length": 16,
        "attention.q_lora_rank": 14}, latent_model(q_rank=14)),
    "deepseek2-old": ("deepseek2", LATENT_KEYS | YARN | {
        "attention.head_count_kv": H, "attention.key_length": 20, "attention.value_length": 10,
        "attention.q_lora_rank": 14}, latent_model(fused=True, q_rank=14)),
    "minimax-m2": ("minimax-m2", EXPERTS | {"rope.dimension_count": 8, "expert_gating_func": 2,
                                            "feed_forward_length": F},
                   model([attention() | FFN_NORM | experts(choice_bias=True)
                          | {"attn_q_norm.weight": (H * D,), "attn_k_norm.weight": (HKV * D,)}]
                         * L)),
    "exaone-moe": ("exaone-moe", EXPERTS | {
        "attention.sliding_window": 16, "attention.sliding_window_pattern": [True] * 3 + [False],
        "leading_dense_block_count": 1, "expert_shared_count": 1, "expert_gating_func": 2,
        "expert_weights_norm": True, "expert_weights_scale": 2.5,
        "expert_shared_feed_forward_length": F},
        attention_model(experts(shared=F, choice_bias=True), lead=dense(), norms=(D,))),
    "llama4": ("llama4", EXPERTS | {"expert_used_count": 1, "interleave_moe_layer_step": 2},
               model([attention() | FFN_NORM | ffn
                      for ffn in [dense(), experts(shared=F)] * 2])),
    "falcon-h1": ("falcon-h1", MAMBA, model(
        [attention() | mamba2() | dense() | {"ffn_norm": (E,)}] * L)),
    "falcon-h1-bare": ("falcon-h1", MAMBA, model(
        [attention() | mamba2(norm=False) | dense() | {"ffn_norm": (E,)}] * L, output=False)),
    "mamba2": ("mamba2", MAMBA | {"attention.head_count": 0, "feed_forward_length": 0,
                                  "attention.head_count_kv": None, "attention.key_length": None,
                                  "attention.value_length": None, "rope.dimension_count": None},
               model([mamba2()] * L, output=False)),
    "nemotron_h": ("nemotron_h", MAMBA | {
        "attention.head_count_kv": [0, 0, HKV, 0], "feed_forward_length": [0, 64, 0, 64],
        "attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-5},
        model([mamba2(), {"attn_norm.weight": (E,)} | dense(gated=False), attention(),
               {"attn_norm.weight": (E,)} | dense(gated=False)])),
    "nemotron_h_moe": ("nemotron_h_moe", MAMBA | EXPERTS | {
        "attention.head_count_kv": [0, 0, HKV, 0], "feed_forward_length": [0, F, 0, F],
        "attention.layer_norm_epsilon": 1e-5, "expert_shared_count": 1,
        "expert_shared_feed_forward_length": 40, "expert_weights_norm": True,
        "expert_weights_scale": 2.5, "expert_group_count": 1, "expert_group_used_count": 1},
        model([mamba2(), {"attn_norm.weight": (E,)}
               | experts(shared=40, gated=False, choice_bias=True), attention(),
               {"attn_norm.weight": (E,)} | experts(shared=40, gated=False, choice_bias=True)])),
    "nemotron_h_moe-latent": ("nemotron_h_moe", MAMBA | EXPERTS | {
        "attention.head_count_kv": [0, 0, HKV, 0], "feed_forward_length": [0, F, 0, F],
        "expert_feed_forward_length": [0, F, 0, 16], "expert_used_count": [0, 3, 0, 2],
        "attention.layer_norm_epsilon": 1e-5, "expert_shared_count": 1, "moe_latent_size": 20,
        "expert_shared_feed_forward_length": 40, "expert_weights_norm": True,
        "expert_weights_scale": 2.5},
        model([mamba2(), latent_experts(F), attention(), latent_experts(16)])),
    "gemma4": ("gemma4", GEMMA4 | {"final_logit_softcapping": 20.0},
               gemma4_model(plain_values=True)),
    "gemma4-rows": ("gemma4", GEMMA4 | {
        "embedding_length_per_layer_input": 12, "attention.shared_kv_layers": 3},
        gemma4_model(n_row=12, shared=3)),
    "gemma4-experts": ("gemma4", GEMMA4 | EXPERTS, gemma4_model(with_experts=True)),
    "granitehybrid": ("granitehybrid", MAMBA | EXPERTS | {
        "attention.head_count_kv": [0, HKV, 0, 0], "ssm.group_count": 1,
        "expert_shared_feed_forward_length": 40, "feed_forward_length": F,
        "rope.scaling.finetuned": True, "attention.scale": 0.2, "embedding_scale": 3.0,
        "residual_scale": 0.5, "logit_scale": 2.0},
        model([m | FFN_NORM | experts(shared=40)
               for m in [mamba2(n_group=1), attention()] + [mamba2(n_group=1)] * 2])),
    "fused-experts": ("qwen3next", DELTA_KEYS | EXPERTS | {"expert_shared_feed_forward_length": 40},
                      delta_model(fused_experts(), {"ssm_ba.weight": (12, E)})),
    "lfm2": ("lfm2", {"attention.head_count_kv": [0, 1, 0, 1], "shortconv.l_cache": 4,
                      "attention.sliding_window": 16,
                      "attention.head_count": 3, "attention.key_length": None,
                      "attention.value_length": None, "rope.dimension_count": None},
             short_conv_model()),
    "qwen3next": ("qwen3next", DELTA_KEYS | EXPERTS | {"expert_shared_feed_forward_length": 40},
                  delta_model(experts(shared=40) | SHARED_GATE, {"ssm_ba.weight": (12, E)})),
    "qwen3next-old": ("qwen3next", DELTA_KEYS | EXPERTS | {
        "expert_shared_feed_forward_length": 40,
        "attention.recurrent_layers": [True] * 3 + [False]},
        delta_model(experts(shared=40) | SHARED_GATE, {"ssm_ba.weight": (12, E)}, old=True)),
    "qwen35": ("qwen35", DELTA_KEYS | {
        "block_count": L + 1, "nextn_predict_layers": 1, "rope.dimension_sections": [2, 1, 1, 0],
        "attention.recurrent_layers": [True] * 3 + [False] * 2},
        delta_model(dense(), {"ssm_alpha.weight": (6, E), "ssm_beta.weight": (6, E)}, ahead=True)),
    "qwen35moe": ("qwen35moe", DELTA_KEYS | EXPERTS | {
        "expert_shared_feed_forward_length": 40, "rope.dimension_sections": [2, 1, 1, 0]},
        delta_model(experts(shared=40) | SHARED_GATE,
                    {"ssm_alpha.weight": (6, E), "ssm_beta.weight": (6, E)})),
    "glm4moe": ("glm4moe", EXPERTS | {
        "block_count": L + 1, "nextn_predict_layers": 1, "rope.dimension_count": 8,
        "leading_dense_block_count": 1, "expert_shared_count": 1, "expert_weights_norm": True,
        "expert_weights_scale": 1.5},
        glm_model()),
}
