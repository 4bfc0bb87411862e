"""Every kernel of gumbel, select, predict, commit and masked_loss in each shipped configuration."""

from resources import Case

from dllm_fast.kernels import checks, commit, gumbel, masked_loss, predict, predict_share, select

KEYS = {"seed_ptr": "*i64", "step_ptr": "*i64", "row_ptr": "*i64", "position_ptr": "*i64"}
NO_KEYS = {name: None for name in KEYS}
PARTS = {"part_ptr": "*fp32", "best_ptr": "*i32"}
SCALE = {"guidance": "fp32", "temperature": "fp32"}
IDS = {"BANNED": (126081, 126082), "DEFERRED": (126348, 126349), "MASK": 126336}


def _case(name, fn, signature, constexprs, config=None, matrix=False):
    config = dict(config or {})
    launch = {key: config.pop(key) for key in ("num_warps", "num_stages") if key in config}
    return Case(name, fn, signature, {**constexprs, **config}, matrix=matrix, **launch)


def _keys(noise):
    """Signature and constants of the noise's pointers; they are None without noise."""
    return (KEYS, {}) if noise else ({}, NO_KEYS)


def _predict(dtype, config, confidence, noise, guided, gather, scaled=False, softcap=0.0):
    keys, none = _keys(noise)
    signature = {"hidden_ptr": f"*{dtype}", "weight_ptr": "*i32" if scaled else f"*{dtype}", **PARTS, **keys, **SCALE}
    signature |= {"N": "i32", "V": "i32", "D": "i32:16", "S": "i32"}
    for present, names in (
        (guided, {"uncond_ptr": f"*{dtype}"}),
        (gather, {"index_ptr": "*i32", "count_ptr": "*i32"}),
        (scaled, {"scale_ptr": "*fp32"}),
    ):
        if present:
            signature |= names
        else:
            none = none | dict.fromkeys(names)
    constexprs = {**IDS, "CONFIDENCE": confidence, "NOISE": noise, "GATHER": gather, "GUIDED": guided}
    constexprs |= {"BIAS": False, "bias_ptr": None, "SCALED": scaled, "SOFTCAP": softcap, **none}
    options = "-noise" * noise + "-guided" * guided + "-gather" * gather + "-e4m3" * scaled + "-softcap" * (softcap > 0)
    name = f"predict-{dtype}-{config['BN']}-{confidence}{options}"
    return _case(name, predict._predict_kernel, signature, constexprs, config, matrix=dtype != "fp32")


def _select(confidence, noise, guided, softcap=0.0, config=select.SELECT):
    keys, none = _keys(noise)
    signature = {"logits_ptr": "*fp32", "bias_ptr": "*bf16", "candidate_ptr": "*i1", **PARTS, **keys, **SCALE}
    signature |= {"first": "i32", "N": "i32", "V": "i32:16", "C": "i32:16", "S": "i32"}
    if guided:
        signature["base_ptr"] = "*fp32"
    else:
        none = none | {"base_ptr": None}
    constexprs = {**IDS, "CONFIDENCE": confidence, "NOISE": noise, "GATHER": True, "GUIDED": guided, "SOFTCAP": softcap}
    name = f"select-{confidence}-{config['BV']}" + "-noise" * noise + "-guided" * guided + "-softcap" * (softcap > 0)
    return _case(name, select._select_kernel, signature, {**constexprs, "BIAS": True, **none}, config)


def _combine(confidence):
    keys, none = _keys(confidence == "random")
    signature = {"token_ptr": "*i64", "confidence_ptr": "*fp32", "lse_ptr": "*fp32", **PARTS, "candidate_ptr": "*i1"}
    signature |= {**keys, "mask_id": "i32", "V": "i32", "S": "i32"}
    constexprs = {"DEFERRED": IDS["DEFERRED"], "CONFIDENCE": confidence, "GATHER": True, "BS": 1024, **none}
    return _case(f"combine-{confidence}", select._combine_kernel, signature, constexprs)


def _commit(rule, positions, comparisons, warps):
    signature = {"chosen_ptr": "*i1", "sequence_ptr": "*i64", "token_ptr": "*i64", "confidence_ptr": "*fp32"}
    signature |= {"candidate_ptr": "*i1", "slot_ptr": "*i64", "limit": "fp32", "least": "i32"}
    signature |= {"T": "i32:16", "S": "i32", "sequence_stride": "i32"}
    constexprs = {"RULE": rule, "BT": positions, "BJ": comparisons, "num_warps": warps}
    if rule == "count":
        signature["count_ptr"] = "*i64"
    else:
        constexprs["count_ptr"] = None
    return _case(f"commit-{rule}-{positions}", commit._commit_kernel, signature, {}, constexprs)


def _masked_loss(dtype, size):
    config = masked_loss.CONFIGS[size]
    signature = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "target_ptr": "*i64"}
    signature |= {"peak_ptr": "*fp32", "mass_ptr": "*fp32", "logit_ptr": "*fp32"}
    signature |= {"N": "i32", "V": "i32:16", "D": "i32:16", "S": "i32"}
    constexprs = {"BIAS": True, "GROUP": masked_loss.GROUP}
    return _case(
        f"masked_loss-{dtype}", masked_loss._masked_loss_kernel, signature, constexprs, config, matrix=size == 2
    )


CASES = [
    _case(
        "gumbel", gumbel._gumbel_kernel, {"out_ptr": "*fp32", **KEYS, "column_ptr": "*i64", "V": "i32"}, {"BV": 1024}
    ),
    _case("uniform", gumbel._uniform_kernel, {"out_ptr": "*fp32", **KEYS, "N": "i32"}, {"BN": 1024}),
    _case(
        "compact",
        predict._compact_kernel,
        {"index_ptr": "*i32", "count_ptr": "*i32", "candidate_ptr": "*i1", "N": "i32"},
        {"BN": 1024},
    ),
    *(_combine(confidence) for confidence in checks.CONFIDENCES),
    *(
        _select(confidence, noise, guided)
        for confidence, noise, guided in (
            ("probability", False, False),
            ("margin", True, True),
            ("entropy", True, False),
        )
    ),
    *(
        _predict("bf16", config, confidence, noise, False, gather)
        for size, config in predict.FUSED.items()
        for confidence, noise, gather in (
            ("probability", False, False),
            ("probability", False, True),
            ("probability", True, True),
            ("margin", True, True),
            ("entropy", True, True),
        )
        if size <= predict.PLAIN_ROWS or (confidence == "probability" and not noise)
    ),
    *(
        _predict("bf16", config, confidence, noise, True, True)
        for config in predict.GUIDED.values()
        for confidence, noise in (("probability", False), ("margin", True))
    ),
    *(
        _predict("bf16", config, confidence, noise, guided, True, scaled=True)
        for guided, table in ((False, predict.BYTE), (True, predict.BYTE_GUIDED))
        for config in table.values()
        for confidence, noise in (("probability", False), ("margin", True))
    ),
    *(
        _predict("bf16", config, confidence, noise, guided, True, scaled=scaled, softcap=30.0)
        for guided, scaled, table in (
            (False, False, predict.FUSED),
            (True, False, predict.GUIDED),
            (False, True, predict.BYTE),
            (True, True, predict.BYTE_GUIDED),
        )
        for size, config in table.items()
        for confidence, noise in (("probability", False), ("margin", True))
        if size <= predict.PLAIN_ROWS or confidence == "probability"
    ),
    *(_predict("fp32", predict.FLOAT32[16], "margin", True, guided, True, softcap=30.0) for guided in (False, True)),
    _select("margin", True, True, softcap=30.0),
    # LLaDA-8B's ids, shared by two processes and by eight.
    *(_select("entropy", True, True, config=predict_share.config(126464 // size)) for size in (2, 8)),
    _predict("fp16", predict.FUSED[32], "probability", True, False, True),
    *(_predict("fp32", predict.FLOAT32[16], "margin", True, guided, True) for guided in (False, True)),
    *(_commit(rule, *shape) for rule in commit.RULES for shape in ((32, 32, 4), (1024, 4, 8))),
    *(_masked_loss(dtype, size) for dtype, size in (("bf16", 2), ("fp32", 4))),
    _case(
        "masked_loss-merge",
        masked_loss._masked_loss_merge_kernel,
        {"nll_ptr": "*fp32", "lse_ptr": "*fp32", "peak_ptr": "*fp32", "mass_ptr": "*fp32", "logit_ptr": "*fp32"}
        | {"target_ptr": "*i64", "V": "i32", "S": "i32"},
        {"BS": 1024},
    ),
    _case(
        "masked_loss-gradient",
        masked_loss._masked_loss_gradient_kernel,
        {"out_ptr": "*bf16", "logits_ptr": "*fp32", "bias_ptr": "*bf16", "grad_ptr": "*fp32", "lse_ptr": "*fp32"}
        | {"target_ptr": "*i64", "first": "i32", "C": "i32:16"},
        {"BIAS": True},
        masked_loss.GRADIENT,
    ),
]
