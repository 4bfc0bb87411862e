"""`from_pretrained`: shards, shipped models, half-downloaded folders, and LLaDA's remote code under transformers 5."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import make_llada, make_modernbert
from transformers import AutoConfig, AutoModel, AutoTokenizer

import dllm_fast
from dllm_fast import LLaDAConfig
from dllm_fast.loading import safetensors_size


@pytest.fixture
def folder(tmp_path, llada):
    """A LLaDA saved in several shards."""
    llada.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "weight_tying": True}], ids=["llada", "illada"])
def test_shards_load_without_remote_code(tmp_path, ids, changes):
    model = make_llada(**changes)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = dllm_fast.from_pretrained(tmp_path)
    assert not loaded.training and loaded.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert dllm_fast.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert isinstance(AutoModel.from_pretrained(tmp_path), dllm_fast.LLaDAModelLM)


@torch.no_grad()
def test_a_tied_file_may_hold_either_name(tmp_path, ids):
    model = make_llada(weight_tying=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    wte, head = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
    assert (wte in tensors) != (head in tensors)
    tensors[head if wte in tensors else wte] = tensors.pop(wte if wte in tensors else head)
    save_file(tensors, file, {"format": "pt"})
    loaded = dllm_fast.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_modernbert_loads(tmp_path, ids, modernbert):
    modernbert.save_pretrained(tmp_path)
    loaded = dllm_fast.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, modernbert(ids).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_weights_are_rounded_as_patch_rounds_them(tmp_path, ids, either, weights):
    either.save_pretrained(tmp_path)
    own = either(ids).logits
    loaded = dllm_fast.from_pretrained(tmp_path, weights=weights)
    rounded = loaded(ids).logits
    assert torch.equal(rounded, dllm_fast.patch(either, weights=weights)(ids).logits)
    assert (rounded - own).abs().max() > 1e-3 * own.abs().max()


def test_unknown_weights_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="weights='int3' is not one of None, 'fp8', 'int4'"):
        dllm_fast.from_pretrained("./no-such-folder", weights="int3")


def break_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    return f"{file.name} has {file.stat().st_size} bytes, its header says {file.stat().st_size + 10}"


def drop_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    return f"{file.name} is missing"


def drop_config(folder):
    (folder / "config.json").unlink()
    return "config.json is missing"


def drop_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return "contains no weights"


def leave_a_pointer(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    return f"{file.name} has .* its header says None"


def lose_a_parameter(folder):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.transformer.ln_f.weight" in tensors:
            del tensors["model.transformer.ln_f.weight"]
            save_file(tensors, file, {"format": "pt"})
    return r"the weights lack 1 parameters, the first of them model.transformer.ln_f.weight"


def spoil_a_weight(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return "holds NaN"


def unknown_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    return (
        "model_type 't5' is not supported; supported are llada, modernbert, .*Dream, .*a2d-qwen3, diffusion_gemma, and"
    )


FAULTS = [
    break_shard,
    drop_shard,
    drop_config,
    drop_weights,
    leave_a_pointer,
    lose_a_parameter,
    spoil_a_weight,
    unknown_type,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_folder_that_is_not_whole_is_refused(folder, fault):
    message = fault(folder)
    with pytest.raises(ValueError, match=message):
        dllm_fast.from_pretrained(folder)


def test_safetensors_size_is_the_files(folder):
    for file in folder.glob("*.safetensors"):
        assert safetensors_size(file) == file.stat().st_size


ENGLISH = {
    "llada-gsm8k": (
        "How many apples does he have left?",
        "She buys 3 bags of apples and 2 boxes of oranges. How much does she pay in total?",
    ),
    "modernbert-kjv": (
        "And the LORD spake unto Moses, saying, Speak unto the children of Israel.",
        "And it came to pass in those days, that the king of Israel sent unto the people.",
    ),
}


@pytest.mark.parametrize("name", ENGLISH)
def test_shipped_models_know_english(name):
    """Each token of two sentences is masked in turn: guessing would be right 1 time in 2048."""
    assert name in dllm_fast.shipped()
    model = dllm_fast.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(dllm_fast.model_path(name))
    assert tokenizer.mask_token_id == model.config.mask_token_id
    right = total = 0
    for text in ENGLISH[name]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        hidden = ids.repeat(length, 1).fill_diagonal_(model.config.mask_token_id)
        out = dllm_fast.generate(model, hidden, gen_length=0, block_length=1).sequences
        right, total = right + int((out.diagonal() == ids[0]).sum()), total + length
    assert right >= 0.4 * total


# A model of ours that, like LLaDA's published file, breaks under transformers 5: it reads config.use_cache, never calls
# post_init, and its tie_weights takes no arguments. It also registers the name llada.
REMOTE = """
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from dllm_fast.families.native import LLaDAConfig as Native, LLaDAModel

class LLaDAConfig(PretrainedConfig):
    model_type = "llada"
    def __init__(self, **kwargs):
        for name, value in Native(**kwargs).__dict__.items():
            setattr(self, name, value)
        self.__dict__.pop("use_cache", None)
        super().__init__(**{k: v for k, v in kwargs.items() if k in ("architectures", "auto_map", "dtype")})

class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"
    def __init__(self, config, model=None, init_params=False):
        super().__init__(config)
        self.model = LLaDAModel(config)
        if config.weight_tying:  # the published file makes no head of its own then
            del self.model.transformer["ff_out"]
    def forward(self, input_ids=None, attention_mask=None, use_cache=None, return_dict=None):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return CausalLMOutputWithPast(logits=self.model(input_ids, attention_mask))
    def tie_weights(self):
        if self.config.weight_tying:
            self.model.transformer["ff_out"] = self.model.transformer["wte"]

AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
"""


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_remote_code_class_is_mended(tmp_path, ids, tied, monkeypatch):
    model = make_llada(weight_tying=tied)
    folder = tmp_path / f"remote_{'tied' if tied else 'untied'}"
    model.save_pretrained(folder)
    (folder / "modeling_llada.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config.pop("use_cache", None)
    config["auto_map"] = {"AutoConfig": "modeling_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    native = dllm_fast.from_pretrained(folder)
    assert isinstance(native, dllm_fast.LLaDAModelLM)
    remote = dllm_fast.from_pretrained(folder, trust_remote_code=True)
    assert "transformers_modules" in type(remote).__module__
    assert "transformers_modules" in type(remote.config).__module__ and not isinstance(remote.config, LLaDAConfig)
    torch.testing.assert_close(remote(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    out = remote(ids)
    assert type(out).__name__ == "CausalLMOutputWithPast"
    generated = [dllm_fast.generate(m, ids, gen_length=16, block_length=8).sequences for m in (native, remote)]
    assert torch.equal(*generated)
    assert type(AutoConfig.from_pretrained(folder)) is LLaDAConfig
    rounded = dllm_fast.from_pretrained(folder, trust_remote_code=True, weights="int4")
    assert type(rounded) is type(remote)
    assert torch.equal(rounded(ids).logits, dllm_fast.patch(remote, weights="int4")(ids).logits)
    shutil.rmtree(folder)


def test_the_shipped_files_are_small_and_say_how_they_were_made():
    root = dllm_fast.loading.MODELS
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) <= 15_000_000
    for name in dllm_fast.shipped():
        recipe = json.loads((root / name / "recipe.json").read_text())
        assert {"command", "data", "seed", "steps", "final_loss"} <= recipe.keys()


def test_modernbert_of_the_package_is_transformers_own():
    assert type(make_modernbert()).__module__.startswith("transformers.")
