"""Attention, rotation, norms and gates, with their launchers' configurations, for `resources.measured`."""

import triton
from resources import BIG, SHARED_LIMIT, SMALL, Case

from dllm_fast.kernels import attention, attention_kernel, glu, grouped, linear, linear_int4, norm, rope

TYPES = {2: "*bf16", 4: "*fp32"}
E4M3 = "*fp8e4nv"
HAVE_E4M3 = tuple(arch for arch in SHARED_LIMIT if arch >= 89)


def _strides(**axes):
    """Strides, as multiples of 16 like those of real tensors."""
    return {f"{name}_stride_{axis}": "i32:16" for name, letters in axes.items() for axis in letters}


def attention_case(
    config,
    itemsize,
    dim,
    group=1,
    window=False,
    split=False,
    packed=False,
    states=False,
    blocks=False,
    archs=tuple(SHARED_LIMIT),
    kept=None,
) -> Case:
    bm, bn, warps, stages, masked = config
    bd = max(16, triton.next_power_of_2(dim))
    kind = TYPES[itemsize]
    signature = {"q_ptr": kind, "out_ptr": "*fp32" if split else kind} | dict.fromkeys(("k_ptr", "v_ptr"), kept or kind)
    signature |= dict.fromkeys(("start_ptr", "end_ptr", "slot_ptr", "origin_ptr"), "*i64")
    signature |= {"lse_ptr": "*fp32"} if split else {}
    signature |= _strides(q="bth", k="bsg", v="bsg", own="bsg")
    signature |= dict.fromkeys(("queries", "slots", "kv_heads", "splits", "rows", "window", "length", "block"), "i32")
    constexprs = {"D": dim, "GROUP": group, "WINDOW": window, "BLOCK": blocks, "SPLIT": split}
    constexprs["MASKED"] = masked
    constexprs |= {} if split else {"lse_ptr": None}
    packed = packed or states
    constexprs |= {"PACKED": packed, "STATES": states}
    own = dict.fromkeys(("own_k_ptr", "own_v_ptr"), kept or kind)
    optional = ({"first_ptr": "*i64"}, packed), ({"hole_ptr": "*i64", **own}, states)
    for pointers, there in optional:
        signature |= pointers if there else {}
        constexprs |= {} if there else dict.fromkeys(pointers)
    ways = " window" * window + " blocks" * blocks + " split" * split
    ways += (" states" if states else " packed" * packed) + " e4m3" * (kept == E4M3)
    return Case(
        f"attention {kind[1:]} D={dim} {bm}x{bn}{ways} group={group}",
        attention_kernel._attention_kernel,
        signature | {"scale": "fp32"},
        constexprs | {"BM": bm, "BN": bn, "BD": bd},
        warps,
        stages,
        matrix=itemsize == 2,
        archs=archs,
    )


def _attention():
    for big, archs in ((True, BIG), (False, SMALL)):
        few, many = attention.CONFIGS[2, 64, big]
        yield attention_case(few, 2, 64, window=True, archs=archs)
        yield attention_case(few, 2, 64, split=True, archs=archs)
        yield attention_case(many, 2, 64, archs=archs)
        yield attention_case(few, 2, 64, window=True, packed=True, archs=archs)
        yield attention_case(many, 2, 64, packed=True, archs=archs)
        few, many = attention.CONFIGS[2, 128, big]
        yield attention_case(few, 2, 128, split=True, archs=archs)
        yield attention_case(few, 2, 128, group=4, archs=archs)
        yield attention_case(few, 2, 128, split=True, packed=True, archs=archs)
        yield attention_case(attention.for_states(few), 2, 128, split=True, states=True, archs=archs)
        yield attention_case(attention.for_states(few), 2, 128, states=True, archs=archs)
        yield attention_case(attention.for_states(few), 2, 64, window=True, states=True, archs=archs)
        yield attention_case(few, 2, 96, window=True, archs=archs)
        yield attention_case(many, 2, 128, archs=archs)
        for config in map(attention.for_blocks, (few, many)):
            yield attention_case(config, 2, 128, group=4, blocks=True, archs=archs)
            yield attention_case(config, 2, 128, blocks=True, split=True, packed=True, archs=archs)
        yield attention_case(many, 2, 128, packed=True, archs=archs)
        yield attention_case(many, 2, 96, split=True, archs=archs)
        yield attention_case(attention.CONFIGS[2, 256, big][0], 2, 256, window=True, archs=archs)
        yield attention_case(attention.CONFIGS[2, 256, big][0], 2, 256, split=True, archs=archs)
        for dim in (64, 128, 256):
            yield attention_case(attention.CONFIGS[4, dim, big][0], 4, dim, split=True, archs=archs)
        rounded = {"archs": tuple(arch for arch in archs if arch in HAVE_E4M3), "kept": E4M3}
        for dim in (64, 128):
            few, many = attention.CONFIGS[2, dim, big]
            few, many = attention.WIDENED.get((dim, big), (few, many))
            yield attention_case(few, 2, dim, split=True, **rounded)
            yield attention_case(few, 2, dim, split=True, packed=True, **rounded)
            yield attention_case(few, 2, dim, window=True, **rounded)
            yield attention_case(many, 2, dim, **rounded)
        yield attention_case(few, 2, 128, group=4, **rounded)
        yield attention_case(attention.for_states(few), 2, 128, split=True, states=True, **rounded)
        yield attention_case(attention.for_blocks(many), 2, 128, blocks=True, **rounded)
        yield attention_case(many, 2, 96, split=True, **rounded)
        yield attention_case(attention.CONFIGS[2, 256, big][0], 2, 256, split=True, **rounded)
        for dim in (64, 128, 256):
            yield attention_case(attention.CONFIGS[4, dim, big][0], 4, dim, split=True, **rounded)

    signature = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "splits": "i32", "rows": "i32"}
    constexprs = {"D": 128, "BS": 8, "BD": 128}
    yield Case("merge", attention_kernel._merge_kernel, signature, constexprs, attention.MERGE_WARPS)


def _rope():
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "keys_ptr", "values_ptr"), "*bf16")
    signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i64", "slot_ptr": "*i64"}
    signature |= _strides(q="bth", k="btg", v="btg", keys="bsg", values="bsg")
    signature |= dict.fromkeys(("queries", "slots", "positions", "heads", "kv_heads"), "i32")
    for half in (32, 64):
        constexprs = {"HALF": half, "BH": rope.PAIRS // half, "BHALF": half}
        yield Case(f"rope D={2 * half}", rope._rope_kernel, signature, constexprs | {"row_ptr": None}, rope.WARPS)
        packed = signature | {"row_ptr": "*i64"}
        yield Case(f"rope D={2 * half} packed", rope._rope_kernel, packed, constexprs, rope.WARPS)
        name, kept = f"rope D={2 * half} packed e4m3", dict.fromkeys(("keys_ptr", "values_ptr"), E4M3)
        yield Case(name, rope._rope_kernel, packed | kept, constexprs, rope.WARPS, archs=HAVE_E4M3)


def _norm():
    signature = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "h_ptr"), "*bf16")
    signature |= dict.fromkeys(("x_stride", "residual_stride", "d"), "i32:16") | {"rows": "i32", "eps": "fp32"}
    for longest, warps in norm.WARPS.items():
        constexprs = {"RESIDUAL": True, "BR": 1, "BD": longest}
        plain, biased = {"CENTRED": False, "BIAS": False, "bias_ptr": None}, {"CENTRED": True, "BIAS": True}
        yield Case(f"rms_norm {longest}", norm._norm_kernel, signature, constexprs | plain, warps)
        both = (signature | {"bias_ptr": "*bf16"}, constexprs | biased)
        yield Case(f"layer_norm {longest}", norm._norm_kernel, *both, warps)


def _glu():
    signature = dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), "*bf16")
    signature |= dict.fromkeys(("gate_stride", "up_stride", "f"), "i32:16")
    for name, gelu in (("swiglu", False), ("geglu", True)):
        yield Case(name, glu._glu_kernel, signature, {"GELU": gelu, "BLOCK": glu.BLOCK}, glu.WARPS)


ROPE = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "position_ptr": "*i64", "slot_ptr": "*i64"}
ROPE |= {"keys_ptr": "*bf16", "values_ptr": "*bf16"} | dict.fromkeys(("queries", "slots", "positions", "heads"), "i32")


def _epilogues():
    """What a matmul of few rows ends with: name, signature and constants."""
    none = dict.fromkeys(ROPE) | {"HALF": 0, "row_ptr": None}
    yield "", {}, none | {"GATED": False}
    yield " gated", {}, none | {"GATED": True}
    for half in (32, 64):
        yield f" rope D={2 * half}", ROPE, {"HALF": half, "GATED": False, "row_ptr": None}
    packed, kept = ROPE | {"row_ptr": "*i64"}, dict.fromkeys(("keys_ptr", "values_ptr"), E4M3)
    yield " rope D=128 packed", packed, {"HALF": 64, "GATED": False}
    yield " rope D=128 packed e4m3", packed | kept, {"HALF": 64, "GATED": False}


def _linear():
    signature = {"x_ptr": "*bf16", "out_ptr": "*bf16", "part_ptr": "*fp32", "count_ptr": "*i32", "x_stride": "i32:16"}
    signature |= {"rows": "i32", "N": "i32:16", "K": "i32:16"}
    scaled = {"scale_ptr": "*fp32"}
    kinds = {  # name: bytes of a weight, what else is in the signature, constants
        "bf16": (2, {"weight_ptr": "*bf16"}, {"PACKED": False, "scale_ptr": None}),
        "e4m3": (1, scaled | {"weight_ptr": "*i32"}, {"PACKED": True}),
    }
    for kind, (size, types, constexprs) in kinds.items():
        for rows, config in linear.CONFIGS[size].items():
            tiles = dict(config)
            launch = tiles.pop("num_warps"), tiles.pop("num_stages")
            for name, more, constants in _epilogues():
                arguments = signature | types | more, {**constexprs, **constants, **tiles}
                yield Case(
                    f"linear {kind} {rows}{name}", linear._linear_kernel, *arguments, *launch, matrix=True, archs=(90,)
                )


def _linear_int4():
    weight = {"weight_ptr": "*i32", "scale_ptr": "*bf16", "zero_ptr": "*u8"}
    signature = {"x_ptr": "*bf16", **weight, "out_ptr": "*bf16", "part_ptr": "*fp32", "count_ptr": "*i32"}
    signature |= {"x_stride": "i32:16", "rows": "i32", "N": "i32:16", "K": "i32:16"}
    for rows, config in linear_int4.CONFIGS.items():
        tiles = dict(config)
        launch = tiles.pop("num_warps"), tiles.pop("num_stages"), tiles.pop("maxnreg", None)
        for name, more, constants in _epilogues():
            if tiles["BN"] % (2 * constants["HALF"] or 1) == 0:  # a tile holds whole heads
                arguments = signature | more, {"PACKED": True, **constants, **tiles}, *launch
                archs = HAVE_E4M3 if E4M3 in more.values() else tuple(SHARED_LIMIT)
                kernel = linear_int4._linear_int4_kernel
                yield Case(f"linear int4 {rows}{name}", kernel, *arguments, matrix=True, archs=archs)
    signature = weight | {"out_ptr": "*bf16", "N": "i32:16", "width": "i32:16"}
    constexprs = {"BN": linear_int4.WIDEN["BN"]}
    yield Case("widen int4", linear_int4._widen_int4_kernel, signature, constexprs, linear_int4.WIDEN["num_warps"])


def _grouped():
    for size, configs in grouped.CONFIGS.items():
        signature = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), TYPES[size]) | {"ends_ptr": "*i64"}
        signature |= dict.fromkeys(("x_stride", "group_stride", "N", "K"), "i32:16")
        signature |= dict.fromkeys(("rows", "groups"), "i32")
        for bm, bn, bk, warps, stages in dict.fromkeys(configs):
            tiles = {"BM": bm, "BN": bn, "BK": bk, "BE": 256}
            name = f"grouped {TYPES[size][1:]} {bm}x{bn}x{bk}"
            yield Case(name, grouped._grouped_kernel, signature, tiles, warps, stages, matrix=size == 2)


CASES = [*_grouped(), *_linear(), *_linear_int4(), *_attention(), *_rope(), *_norm(), *_glu()]
