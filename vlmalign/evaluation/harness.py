"""Any task of lm-evaluation-harness on our models. Importing this module registers the model as "vlmalign".

    import lm_eval, vlmalign.evaluation.harness
    lm_eval.simple_evaluate("vlmalign", "path=checkpoint,dtype=bfloat16,adapter=peft-folder", tasks=["medqa_4options"])

or `vlmalign lm-eval` from the shell. Text is cut into tokens as the harness does for its own "hf" model, so that scores
can be compared; the options of a multiple-choice question are continuations of one prompt, which is computed once.
Needs the extra `pip install "vlmalign[harness]"`; nothing else in the package imports this module.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from vlmalign.data.chat.chat import read_stop_ids
from vlmalign.evaluation.answers import answer
from vlmalign.evaluation.scoring import Request, score
from vlmalign.models.lora import merge_adapter
from vlmalign.models.model import Model
from vlmalign.randomness import key_for
from vlmalign.rollout.sampling import Sampling
from vlmalign.weights.adapter import load_adapter
from vlmalign.weights.checkpoint import load_config, load_params, read_json, stored_dtype

log = logging.getLogger(__name__)

#: generation settings of tasks that change nothing at these values; at others they are refused
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "frequency_penalty": (None, 0.0),
    "presence_penalty": (None, 0.0),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True, False),
}
#: settings of sampling that mean nothing to greedy decoding, and sampling's own neutral values
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {"top_k": (None, 0, -1), "min_p": (None, 0.0), "typical_p": (None, 1.0)}


@register_model("vlmalign")
class VlmalignLM(TemplateLM):
    """A checkpoint folder, with or without a PEFT adapter, as the harness sees a model.

    `computed` counts what was asked and what it took: requests scored, prompts computed for them, contexts cut to
    the model's length.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str = "auto",
        adapter: str | Path | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        batch_tokens: int = 8192,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        device: str | None = None,
    ):
        """Load the model.

        Args:
            path: a checkpoint folder with its tokenizer.
            dtype: float32, bfloat16, or "auto": what config.json says.
            adapter: a PEFT folder, merged into the base.
            max_length: longest prompt with its continuation, tokens; None: the context of config.json.
            batch_size: prompts that run at once, at most; "auto": as many as `batch_tokens` holds.
            max_batch_size: the same limit, where `batch_size` is "auto".
            batch_tokens: tokens that run at once, padding included; memory grows with it.
            add_bos_token: whether texts begin with BOS; None: as the tokenizer does by itself.
            prefix_token_id: what stands before a text without context; None: BOS, or EOS where there is no BOS.
            seed: of sampled answers (do_sample in a task's generation settings).
            device: not for here: JAX chooses its devices (environment variable JAX_PLATFORMS).
        """
        super().__init__()
        # The harness would bootstrap some standard errors in forked processes; a fork of a process in which JAX runs
        # can hang.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        if device is not None:
            raise ValueError(f"device={device} cannot be set here: choose with JAX_PLATFORMS=cpu or JAX_PLATFORMS=cuda")
        folder = Path(str(path))  # the harness's parser turns a folder called 7 into a number
        self.path, self.adapter = folder, None if adapter is None else Path(str(adapter))
        config = load_config(folder)
        self.model = Model(config, dtype=stored_dtype(folder) if dtype == "auto" else dtype)
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        self.tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
        self.stop_ids = read_stop_ids(folder, self.tokenizer)
        self.max_length = max_length or resolve_max_length(
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), self.tokenizer
        )
        self.add_bos_token, self._prefix_token_id, self.seed = add_bos_token, prefix_token_id, seed
        self._budget = batch_tokens
        automatic = batch_size is None or str(batch_size).startswith("auto")
        self._limit = max_batch_size if automatic else int(batch_size)
        self.computed = {"scored requests": 0, "prompts": 0, "truncated contexts": 0}
        _warn_of_penalties(folder)
        self.params = load_params(folder, self.model)
        if self.adapter is not None:
            found = load_adapter(self.adapter, config)
            self.params = merge_adapter(self.params, found.params, found.spec.scale)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """Length limit of answers whose task names none, tokens."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests knows the tokenizer by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; unless told, with the tokenizer's own special tokens, and never a second BOS (chat templates)."""
        if add_special_tokens is None:
            written = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if written else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options, **kwargs)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without its system message where the template has no place for one."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.exceptions.TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            log.warning("the chat template refuses this conversation; it is tried without its system message")
            return self.tokenizer.apply_chat_template(rest, **options)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if empty := sum(not request.args[1] for request in requests):
            raise ValueError(f"{empty} of {len(requests)} requests have an empty continuation; check doc_to_choice")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        fitted = self._fit([(context, continuation) for _, context, continuation in requests])
        with (
            tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar,
            self._precision(),
        ):
            found = score(
                self.model, self.params, fitted, budget=self._budget, limit=self._limit, advance=lambda n: bar.update(n)
            )
        self.computed["scored requests"] += len(requests)
        self.computed["prompts"] += found.prompts
        answers = [(one.logp, one.greedy) for one in found.scores]
        for (texts, _, _), one in zip(requests, answers, strict=True):
            if texts is not None:  # None: a window of a longer text
                self.cache_hook.add_partial("loglikelihood", texts, one)
        return answers

    def _fit(self, pairs: list[tuple[list[int], list[int]]]) -> list[Request]:
        """Contexts cut from the left so that the model reads at most `max_length` tokens (it never reads the last)."""
        too_long = sum(len(continuation) > self.max_length for _, continuation in pairs)
        if too_long:
            raise ValueError(
                f"{too_long} continuations are longer than max_length = {self.max_length} tokens; raise it"
            )
        over = [len(context) + len(continuation) - (self.max_length + 1) for context, continuation in pairs]
        self._count_cuts(over)
        return [
            Request(tuple(context[max(0, cut) :]), tuple(continuation))
            for (context, continuation), cut in zip(pairs, over, strict=True)
        ]

    def _count_cuts(self, over: list[int]) -> None:
        cut = [tokens for tokens in over if tokens > 0]
        if cut:
            self.computed["truncated contexts"] += len(cut)
            log.warning(
                "%d of %d contexts do not fit %d tokens: up to %d tokens were cut from their left",
                len(cut), len(over), self.max_length, max(cut),
            )  # fmt: skip

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: each token predicted once, with as much context as `max_length` allows."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in found]
            windows += own
            counts.append(len(own))
        parts = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(float(sum(next(parts)[0] for _ in range(count))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each context up to its task's stop strings, greedy unless the task asks for sampling."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts: dict[int, str] = {}
        with (
            tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar,
            self._precision(),
        ):
            for part, numbers in enumerate(alike.values()):
                settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
                sampling, most = read_sampling(settings), settings["max_gen_toks"]
                contexts = [self.tok_encode(requests[n].args[0]) or [self.prefix_token_id] for n in numbers]
                found = answer(
                    self.model,
                    self.params,
                    self._leave_room(contexts, most),
                    self.tokenizer,
                    jax.random.fold_in(key_for(self.seed, 0, "rollout"), part),
                    until=settings["until"],
                    most=most,
                    stop_ids=self.stop_ids,
                    sampling=sampling,
                    budget=self._budget,
                    limit=self._limit,
                    advance=lambda n: bar.update(n),
                )
                texts.update(zip(numbers, found, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _leave_room(self, contexts: list[list[int]], most: int) -> list[tuple[int, ...]]:
        """Contexts cut from the left so that an answer of `most` tokens fits."""
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"answers of up to {most} tokens leave no room for a prompt in max_length = {self.max_length}; "
                "lower max_gen_toks"
            )
        self._count_cuts([len(context) - room for context in contexts])
        return [tuple(context[-room:]) for context in contexts]

    def _precision(self) -> AbstractContextManager:
        """Asked for float32, a GPU must not multiply in TensorFloat-32 as it does by default."""
        return jax.default_matmul_precision("highest") if self.model.dtype == "float32" else nullcontext()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about the model."""
        return {
            "model_num_parameters": sum(x.size for x in self.params.values()),
            "model_dtype": self.model.dtype,
            "model_family": self.model.config.family,
            "path": str(self.path),
            "adapter": None if self.adapter is None else str(self.adapter),
            "max_length": self.max_length,
            "computed": dict(self.computed),
        }


def read_sampling(settings: Mapping[str, Any]) -> Sampling:
    """How to draw tokens, from a task's generation settings as `normalize_gen_kwargs` leaves them.

    Raises:
        ValueError: for a setting that would change the answers and is not offered here.
    """
    greedy = not settings.get("do_sample")
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
    odd = [
        f"{name} = {value!r}"
        for name, value in settings.items()
        if name not in known
        and value not in NEUTRAL.get(name, ())
        and not (name in NEUTRAL_SAMPLING and (greedy or value in NEUTRAL_SAMPLING[name]))
    ]
    if odd:
        raise ValueError(f"generation settings not offered here: {', '.join(odd)}; override them with gen_kwargs")
    if greedy:
        return Sampling(temperature=0.0)
    if not settings.get("temperature"):
        raise ValueError("do_sample needs a temperature above 0; set it in the task or with gen_kwargs")
    return Sampling(temperature=float(settings["temperature"]), top_p=float(settings.get("top_p") or 1.0))


def _warn_of_penalties(folder: Path) -> None:
    """transformers applies a checkpoint's own repetition penalty to greedy answers too; here none is applied."""
    path = folder / "generation_config.json"
    penalty = read_json(path).get("repetition_penalty") if path.exists() else None
    if penalty not in (None, 1.0):
        log.warning(
            "%s asks for repetition_penalty %s, which is not applied: answers may differ from others'", path, penalty
        )
