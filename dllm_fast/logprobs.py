"""What a model gives to a token, from what `ops.predict` returned, without logits of the vocabulary."""

import torch

from dllm_fast.kernels import reference
from dllm_fast.kernels.reference_rounded import as_bytes


def token_logprob(
    hidden, weight, bias=None, scale=None, *, token, lse, uncond=None, cfg_scale=0.0, deferred=(), softcap=None,
    ranks=None, impl="torch",
):  # fmt: skip
    """Log-probability [N] fp32 of ``token`` [N] given hidden [N, d], from the log-sum-exp [N] of `predict`.

    `predict` leaves the ``deferred`` ids out of it. Here they count, because the token may be one of them.
    """
    # Where PyTorch multiplies by the head, the log-sum-exp is of logits in the model's dtype: a token of probability 1
    # would not get 0 from a logit that is not rounded like them.
    rounds = impl == "torch" or (impl == "cpp" and scale is not None)

    def logit_of(ids):  # [N], or one for all -> [N]
        if ranks is not None:
            ids, own = ranks.located(ids)
        if scale is None:
            row = weight[ids].float()  # [N, d], or [d]
        else:
            row = as_bytes(weight)[ids].view(weight.dtype).float() * scale[ids, None]
            row = row.to(hidden.dtype).float() if rounds else row
        added = 0.0 if bias is None else bias[ids].float()
        passes = [(x.float() * row).sum(-1) + added for x in (hidden, uncond) if x is not None]
        if rounds:
            passes = [z.to(hidden.dtype).float() for z in passes]
        passes = [reference.capped(z, softcap) for z in passes]
        z = passes[0] if uncond is None else reference.guided(passes[0], passes[1], cfg_scale)
        return z if ranks is None else ranks.add_up(z * own)

    for i in deferred:
        lse = torch.logaddexp(lse, logit_of(i))
    return logit_of(token) - lse
