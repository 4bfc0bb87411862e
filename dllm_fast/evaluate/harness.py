"""lm-eval's model ``dllm_fast``: ``python -m dllm_fast.evaluate --model dllm_fast --model_args pretrained=...``

lm-eval finds the models of its own table and those that are registered before it starts; this module registers one and
then is lm-eval's command line, with all its options. Under ``accelerate launch -m dllm_fast.evaluate`` (GPUs) or
``torchrun -m dllm_fast.evaluate`` (CPUs too) each process has a copy of the model and its share of the documents.
"""

from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dllm_fast.decoding.request import require
from dllm_fast.decoding.text import answer_text, encode, held_back
from dllm_fast.errors import exit_code
from dllm_fast.evaluate.answers import last_of, request_options, spelled_options, whole_blocks
from dllm_fast.evaluate.likelihood import are_greedy, log_likelihoods
from dllm_fast.generate import generate_many
from dllm_fast.loading import end_of_text, from_pretrained, load_tokenizer
from dllm_fast.patch import bound_family

DTYPES = ("auto", "float32", "bfloat16", "float16")


@register_model("dllm_fast")
class MaskedDiffusionLM(TemplateLM):
    """A patched LLaDA or ModernBERT under lm-eval.

    Args:
        pretrained, dtype, device, impl, trust_remote_code: as `dllm_fast.from_pretrained`; ``dtype`` by name. Of
            several processes each takes the device that Accelerate gives it.
        batch_size: sequences evaluated together; lm-eval's ``--batch_size``.
        gen_length: most tokens of an answer, where a task does not say.
        block_length, confidence, temperature, cfg_scale, cache: as `dllm_fast.generate`. A task's own ``temperature``
            or ``do_sample: false`` comes first.
        schedule, refresh, remask: as on the command line: ``uniform=64``, ``threshold=0.9``, ...
        mc_num: samples of the likelihood bound, see `evaluate.likelihood.log_likelihoods`.
        seed: of both. Likelihoods and greedy answers do not depend on the number of processes; sampled answers do.
        suppress_tokens, defer_tokens: of answers, as `dllm_fast.generate`: ids or tokens, joined by ``+``, as
            lm-eval's ``--model_args`` ends a value at a comma.
        logits_eos_inf, confidence_eos_eot_inf: LLaDA's names: the end of text suppressed; that and a chat's end of turn
            deferred.
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
        confidence: str = "probability",
        temperature: float = 0.0,
        cfg_scale: float = 0.0,
        cache: str = "dual",
        mc_num: int = 128,
        seed: int = 0,
        suppress_tokens: str | int | None = None,
        defer_tokens: str | int | None = None,
        logits_eos_inf: bool = False,
        confidence_eos_eot_inf: bool = False,
    ):
        super().__init__()
        require(str(batch_size).isdecimal(), f"batch_size={batch_size!r} is not a number")
        require(dtype in DTYPES, f"dtype={dtype!r} is not one of {', '.join(map(repr, DTYPES))}")
        # A rank that is done waits for the slowest, which may take longer than the ten minutes of the default.
        patient = InitProcessGroupKwargs(timeout=timedelta(days=30))
        # Not told that it is on CPUs, Accelerate takes each process for the only one, and each would do all the work.
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        # "cuda:0" is also what lm-eval says where nobody chose, GPU or not.
        chosen = device is not None and (torch.cuda.is_available() or not device.startswith("cuda"))
        self._device = torch.device(device) if chosen and self._world_size == 1 else self.accelerator.device
        weights = dtype if dtype == "auto" else getattr(torch, dtype)
        self.model = from_pretrained(pretrained, weights, self._device, impl, trust_remote_code)
        self.tokenizer = load_tokenizer(pretrained, trust_remote_code)
        self.positions = bound_family(self.model).positions
        self.batch_size, self.gen_length, self.temperature = int(batch_size), gen_length, temperature
        self.mc_num, self.seed, self.cfg_scale = mc_num, seed, float(cfg_scale)
        self.options = {
            "block_length": block_length, "confidence": confidence, "cfg_scale": self.cfg_scale, "cache": cache,
            "eos_id": end_of_text(self.model, self.tokenizer),
            **spelled_options(schedule=schedule, refresh=refresh, remask=remask),
            **held_back(self.tokenizer, suppress_tokens, defer_tokens, logits_eos_inf, confidence_eos_eot_inf),
        }  # fmt: skip

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        answers, alike = [""] * len(requests), {}
        for i, request in enumerate(requests):
            until, tokens, temperature = request_options(request.args[1], self.gen_length, self.temperature)
            length = whole_blocks(tokens, self.options["block_length"])
            alike.setdefault((length, temperature), []).append((i, until, tokens))
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or self.rank != 0)
        for (length, temperature), members in alike.items():
            prompts = []
            for i, _, _ in members:
                prompt = self.tok_encode(requests[i].args[0]) or [self.prefix_token_id]
                prompts.append(last_of(prompt, self.positions - length, f"max_gen_toks={length}"))
            done = generate_many(
                self.model, prompts, self.batch_size, ordered=False, gen_length=length, temperature=temperature,
                seed=self.seed + self.rank, **self.options,
            )  # fmt: skip
            for completion in done:
                (i, until, tokens), prompt = members[completion.index], prompts[completion.index]
                ids = completion.sequence[len(prompt) :].tolist()
                answers[i] = answer_text(self.tokenizer, ids[:tokens], self.options["eos_id"], until)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update()
        bar.close()
        return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Each (request, context ids, continuation ids): the bound of ln p(continuation), and whether it is greedy."""
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
        """The bound of ln p(document), in windows of the model's positions, each after the ids that fit before it."""
        windows, document = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            # lm-eval's windows hold one id more than it says: a causal model does not read the last.
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
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids without special tokens, whatever is asked: a chat template brings its own, and an answer follows.

        A document's [MASK] is text.
        """
        return encode(self.tokenizer, [string], self.model.config.mask_token_id)[0]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(tensor)

    def gather_object(self, obj, dst: int = 0) -> list | None:
        if self.world_size == 1:
            return [obj]
        found = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()


def main() -> int:
    """lm-eval's command line, which now knows the model."""
    from lm_eval.__main__ import cli_evaluate

    return exit_code(cli_evaluate)
