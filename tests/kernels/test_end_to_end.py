"""Both families give the same logits and tokens on the kernels as in PyTorch."""

import pytest
import torch
from tiny import MAKERS, MASK

import dllm_fast
from dllm_fast import Uniform


@torch.no_grad()
@pytest.mark.parametrize("name", ["llada-gqa", "modernbert"])
def test_kernels_give_the_logits_of_pytorch(name, device):
    model = MAKERS[name]().to(device)
    ids = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    own = model(ids, attention_mask=mask).logits
    with dllm_fast.patched(model, impl="triton"):
        ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], own[mask.bool()], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llada-gqa", pytest.param("modernbert", marks=pytest.mark.long)])
def test_kernels_give_the_tokens_of_pytorch(name, device):
    model = MAKERS[name]().to(device)
    ids = torch.randint(0, 99, (2, 8), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"schedule": Uniform(2), "temperature": 0.7, "confidence": "margin", "cfg_scale": 1.0, "cache": "dual"}
    options |= {"gen_length": 4, "block_length": 4, "seed": 3}
    expected = dllm_fast.generate(dllm_fast.patch(model, impl="torch"), ids, mask, **options)
    got = dllm_fast.generate(dllm_fast.patch(model, impl="triton"), ids, mask, **options)
    assert torch.equal(got.sequences, expected.sequences) and got.nfe == expected.nfe
    assert not (got.sequences == MASK).any()


def test_triton_without_cuda_or_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl='triton': the model is on cpu"):
        dllm_fast.patch(MAKERS["llada"](), impl="triton")
