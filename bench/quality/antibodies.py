"""A real BERT, un-masking antibodies: ``python -m bench.quality.antibodies FOLDER``

FOLDER is AntiBERTy's (25.8 million parameters; PyPI's antiberty 0.1.3 has it under antiberty/trained_models, with
vocab.txt one level up; arXiv:2112.07782). It is loaded by `dllm_fast.from_pretrained`, whose generic family runs
transformers' own forward. Half of the residues of three antibodies' heavy chains are masked, three times each. Shows
how far logits are from the unpatched model's, how many tokens are those of a plain loop over it, and how many residues
are right.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers

import dllm_fast
from bench.common import machine

CHAINS = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDG"
    "FYAMDYWGQGTLVTVSS",  # trastuzumab
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLS"
    "TASSLDYWGQGTLVTVSS",  # adalimumab
    "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSLRAEDTAVYYCAKYPHYY"
    "GSSHWYFDVWGQGTLVTVSS",  # bevacizumab
)
SCHEDULES = {"uniform=16": dllm_fast.Uniform(16), "threshold=0.9": dllm_fast.Threshold(0.9)}
TIMES = 3  # masked, each


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    vocabulary = {word: i for i, word in enumerate((folder.parent / "vocab.txt").read_text().split())}
    mask_id = vocabulary["[MASK]"]
    patched = dllm_fast.from_pretrained(folder, dtype=torch.float32)
    plain = transformers.BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    truths, masked = [], []
    for chain in CHAINS:
        ids = torch.tensor([vocabulary[letter] for letter in ("[CLS]", *chain, "[SEP]")], device="cpu")
        for _ in range(TIMES):
            where = 1 + torch.randperm(len(chain), generator=draw)[: len(chain) // 2]
            truths.append(ids)
            masked.append(ids.scatter(0, where, mask_id))
    print(machine(torch.device("cpu"), torch.float32))
    apart = 0.0
    for x in masked:
        expected = plain(x[None]).logits
        apart = max(apart, ((patched(x[None]).logits - expected).abs().max() / expected.abs().max()).item())
    print(f"logits differ by at most {apart:.1e} of the largest")
    for name, schedule in SCHEDULES.items():
        for cache in ("none", "dual"):
            options = {"gen_length": 0, "block_length": 32, "schedule": schedule, "mask_id": mask_id}
            same = right = of = forwards = 0
            for truth, x in zip(truths, masked, strict=True):
                out = dllm_fast.generate(patched, x[None], **options, cache=cache)
                other = dllm_fast.generate_plain(plain, x[None], **options).sequences
                open_ = x == mask_id
                same += int((out.sequences == other)[0][open_].sum())
                right += int((out.sequences[0] == truth)[open_].sum())
                of += int(open_.sum())
                forwards += out.nfe
            print(
                f"{name}, cache {cache}: {right / of:.1%} of {of} residues right, {same / of:.1%} as the plain loop's, "
                f"{of / forwards:.1f} a forward"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
