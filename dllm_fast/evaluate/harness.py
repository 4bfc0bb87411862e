"""lm-eval's model ``dllm_fast``: ``python -m dllm_fast.evaluate --model dllm_fast --model_args pretrained=...``

lm-eval finds models in its own table and those registered before it starts. This module registers one, then runs
lm-eval's command line, with all its options. Under ``accelerate launch -m dllm_fast.evaluate`` (GPUs) or ``torchrun -m
dllm_fast.evaluate`` (also CPUs) each process has a copy of the model and a share of the documents.
"""

from datetime import timedelta
from typing import cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dllm_fast.decoding.text import answer_text, encode, held_back
from dllm_fast.decoding.values import one_of, require
from dllm_fast.errors import exit_code
from dllm_fast.evaluate.answers import Sampling, last_of, request_options, spelled_options, whole_blocks
from dllm_fast.evaluate.likelihood import are_greedy, log_likelihoods
from dllm_fast.generate import generate_many
from dllm_fast.loading import end_of_text, from_pretrained, load_tokenizer
from dllm_fast.patch import bound_family

DTYPES = ("auto", "float32", "bfloat16", "float16")


@register_model("dllm_fast")
class MaskedDiffusionLM(TemplateLM):
    """A model that `from_pretrained` takes, patched, as an lm-eval model.

    Args:
        pretrained, dtype, device, impl, trust_remote_code: as `dllm_fast.from_pretrained`; ``dtype`` by name. With
            several processes, each one's device is the one that Accelerate assigns.
        batch_size: sequences evaluated together; lm-eval's ``--batch_size``.
        gen_length: most tokens of an answer, unless the task says.
        block_length, confidence, temperature, top_k, top_p, cfg_scale, cache, suffix_length, suffix_sample,
            skip_committed, speculate, cache_dtype: as `dllm_fast.generate`. A task's own ``temperature``,
            ``top_k``, ``top_p`` or ``do_sample: false`` comes first.
        schedule, refresh, remask, pipeline: spelled as on the command line: ``uniform=64``, ``threshold=0.9``, ...
        mc_num: samples of the likelihood bound, see `evaluate.likelihood.log_likelihoods`.
        seed: for answers and likelihoods. Sampled answers depend on the number of processes; greedy answers and
            likelihoods do not.
        suppress_tokens, defer_tokens: as `dllm_fast.generate`, for answers: ids or tokens, joined by ``+`` because a
            comma ends a value of lm-eval's ``--model_args``.
        logits_eos_inf: LLaDA's name for suppressing the end of text.
        confidence_eos_eot_inf: LLaDA's name for deferring the end of text and a chat's end of turn.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        impl: str = "auto",
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        gen_length: int = 256,
        block_length: int = 32,
        schedule: str = "threshold=0.9",
        refresh: str = "block",
        remask: str | None = None,
        pipeline: str | None = None,
        confidence: str = "probability",
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        cfg_scale: float = 0.0,
        cache: str = "dual",
        suffix_length: int | None = None,
        suffix_sample: int = 0,
        skip_committed: bool = False,
        speculate: int | str | None = None,
        cache_dtype: str | None = None,
        mc_num: int = 128,
        seed: int = 0,
        suppress_tokens: str | int | None = None,
        defer_tokens: str | int | None = None,
        logits_eos_inf: bool = False,
        confidence_eos_eot_inf: bool = False,
    ):
        super().__init__()
        require(str(batch_size).isdecimal(), f"batch_size={batch_size!r} is not a number")
        one_of("dtype", dtype, DTYPES)
        # A rank that has finished waits for the slowest, possibly for longer than the default of ten minutes.
        patient = InitProcessGroupKwargs(timeout=timedelta(days=30))
        # Unless told that there are only CPUs, Accelerate treats each process as the only one: each would do all the
        # work.
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        # "cuda:0" is lm-eval's default, even without a GPU.
        absent = device is not None and device.startswith("cuda") and not torch.cuda.is_available()
        if device is None or absent or self._world_size > 1:
            self._device = self.accelerator.device
        else:
            self._device = torch.device(device)
        weights = dtype if dtype == "auto" else getattr(torch, dtype)
        self.model = from_pretrained(pretrained, weights, self._device, impl, trust_remote_code)
        self.tokenizer = load_tokenizer(pretrained, trust_remote_code)
        self.positions = bound_family(self.model).positions
        self.batch_size, self.gen_length = int(batch_size), gen_length
        self.sampling = Sampling(temperature, top_k, top_p)
        self.mc_num, self.seed, self.cfg_scale = mc_num, seed, float(cfg_scale)
        self.options = {
            "block_length": block_length, "confidence": confidence, "cfg_scale": self.cfg_scale, "cache": cache,
            "suffix_length": suffix_length, "suffix_sample": suffix_sample, "skip_committed": skip_committed,
            "speculate": speculate, "cache_dtype": cache_dtype,
            "eos_id": end_of_text(self.model, self.tokenizer),
            **spelled_options(schedule=schedule, refresh=refresh, remask=remask, pipeline=pipeline),
            **held_back(self.tokenizer, suppress_tokens, defer_tokens, logits_eos_inf, confidence_eos_eot_inf),
        }  # fmt: skip

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        alike: dict[tuple[int, Sampling], list[tuple[int, list[str], int]]] = {}
        for i, request in enumerate(requests):
            until, tokens, sampling = request_options(request.args[1], self.gen_length, self.sampling)
            length = whole_blocks(tokens, self.options["block_length"])
            alike.setdefault((length, sampling), []).append((i, until, tokens))
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or self.rank != 0)
        for (length, sampling), members in alike.items():
            prompts = []
            for i, _, _ in members:
                prompt = self.tok_encode(requests[i].args[0]) or [self.prefix_token_id]
                prompts.append(last_of(prompt, self.positions - length, f"max_gen_toks={length}"))
            completions = generate_many(
                self.model, prompts, self.batch_size, ordered=False, gen_length=length,
                seed=self.seed + self.rank, **sampling._asdict(), **self.options,
            )  # fmt: skip
            for completion in completions:
                i, until, tokens = members[completion.index]
                ids = completion.sequence[len(prompts[completion.index]) :].tolist()
                answers[i] = answer_text(self.tokenizer, ids[:tokens], self.options["eos_id"], until)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update()
        bar.close()
        return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """(bound of ln p(continuation), whether it is greedy) for each (request, context ids, continuation ids)."""
        pairs = [(last_of(context, self.positions - len(answer), "context"), answer) for _, context, answer in requests]
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        pairs = [pairs[i] for i in order]
        greedy = are_greedy(self.model, pairs, self.batch_size, self.cfg_scale)
        results = [(0.0, False)] * len(pairs)
        bar = tqdm(order, desc="loglikelihood", disable=disable_tqdm or self.rank != 0)
        for i, bound, is_greedy in zip(bar, self._bounds(pairs), greedy):
            results[i] = (bound, is_greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The bound of ln p(document): a sum over windows, each with as much context as the model's positions allow."""
        windows: list[tuple[list[int], list[int]]] = []
        document: list[int] = []  # of each window
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            # lm-eval's windows have one id more than asked for, because a causal model does not read the last.
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.positions - 1, context_len=1)
            windows += map(make_disjoint_window, rolling)
            document += [i] * (len(windows) - len(document))
        totals = [0.0] * len(requests)
        bar = tqdm(document, desc="loglikelihood_rolling", disable=disable_tqdm or self.rank != 0)
        for i, bound in zip(bar, self._bounds(windows)):
            totals[i] += bound
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _bounds(self, pairs):
        return log_likelihoods(self.model, pairs, self.mc_num, self.seed, self.batch_size, self.cfg_scale)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids without special tokens, whatever is asked: a chat template adds its own, and an answer follows.

        [MASK] in a document is ordinary text.
        """
        return encode(self.tokenizer, [string], self.model.config.mask_token_id)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return cast(str, text)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(tensor)

    def gather_object(self, obj, dst: int = 0) -> list | None:
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


def main() -> int:
    """lm-eval's command line; importing this module has registered the model."""
    from lm_eval.__main__ import cli_evaluate

    return exit_code(cli_evaluate)
