"""Online self-preferring (OSP): a policy samples answers, judges how much better each is, and trains on the pairs.

A round is an epoch of `SPCETrainer`'s own loop, so there is one run with one optimizer, schedule, and checkpoints:

    sample   K answers a prompt from the policy                                          num_generations, temperature
    judge    p_i = p(y_i, baseline), both orders averaged                                 judge, baseline
    pair     ranks of p_i; p_ij = sigma(logit p_i - logit p_j)                            pairs, strength_eps
    train    SPCE on (chosen, rejected, p_ij), `round_epochs` epochs                      SPCEConfig

See `hf_xent.generation.judging` for judges and strengths, `SPCETrainer` for the loss. The reference of the loss is the
policy as it was before the first round. The tokens trained on are the tokens sampled: an answer that was cut at
`max_new_tokens` has no end token. Equal answers have p = 1/2 and margin 0, so no gradient; every round has the same
number of pairs.

A round's pairs are kept in `output_dir/_pairs/` (which `push_to_hub` leaves out: they quote the prompts) and are read
again by a run that resumes within the round; `trainer.pairs(r)` returns them, as a data set with the columns of TRL's
DPO, `preference_prob`, the judge's `chosen_score` and `rejected_score`, token ids, and the prompt's other columns.

Sampling goes through `generate`; for an engine such as vLLM pass `generate=`, a function like
`hf_xent.generation.sampling.responses` (none is built in: the engine's weights have to follow the policy's, which this
project could not test). With several processes the main one samples and judges while the others wait; they read the
pairs from a shared folder. A run that is stopped while it samples makes that round's pairs again. There is no online
mode on top of TRL's GRPO: it shuffles single samples and splits them into micro-batches, which separates the two
answers of a pair. Every sample would have to carry its partner along, and the loss, which takes one advantage for each
sample, would have to be replaced.

The paper's K, temperature, judge prompt, beta and pairing scheme are not published: all defaults are ours.

Source: Zhai et al. 2024, Online Self-Preferring Language Models, arXiv:2405.14103; a re-implementation from the
description, no code is published.
Data: `prompt` (text, or messages for a chat template) and any other columns, which judges see; for evaluation, the data
of SPCE.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from transformers.utils.logging import tqdm
from trl.trainer.utils import use_adapter

from ..generation import sampling as generation
from ..generation.judging import SCHEMES, Judge, ModelJudge, both_orders, ranked_pairs
from ..models.contexts import eval_mode
from ..system.files import write_atomically
from .epochs import EpochCallback
from .osp_data import Round, answer_like, check_prompts, encode_prompts
from .refusals import refuse_options
from .spce import SPCEConfig, SPCETrainer

Generate = Callable[..., list[list[int]]]
"""`(model, prompts, *, tokens, seed, temperature) -> token ids`, the end token included; temperature 0 is greedy."""


@dataclass
class OSPConfig(SPCEConfig):
    """`SPCEConfig` and the rounds: there are `num_train_epochs / round_epochs` of them.

    Raises:
        ValueError: A field has a value out of its range or of another type, or needs the pairs before they are made.
    """

    ranges: ClassVar[dict[str, str]] = {
        "num_generations": "[2, inf)",
        **dict.fromkeys(("max_new_tokens", "generation_batch_size", "round_epochs"), "[1, inf)"),
        "temperature": "(0, inf)",
        "strength_eps": "(0, 0.5)",
    }
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "judge": ("policy", "reference"),
        "baseline": ("sample", "greedy", "given"),
        "pairs": (*SCHEMES,),
    }

    num_generations: int = field(default=4, metadata={"help": "K, the number of answers sampled for each prompt."})
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum length of an answer, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; there is no top-k or top-p."})
    generation_batch_size: int = field(default=32, metadata={"help": "Number of answers sampled at a time."})
    judge: str = field(
        default="policy", metadata={"help": "'policy', as it is in each round, or 'reference', as it was before."}
    )
    baseline: str = field(
        default="sample",
        metadata={
            "help": "The answer that others are compared with: 'sample', the first sample; 'greedy', one more answer,"
            " decoded greedily; 'given', the column 'baseline'."
        },
    )
    pairs: str = field(default="best_worst", metadata={"help": "Ranks to pair: 'best_worst', 'adjacent' or 'all'."})
    strength_eps: float = field(default=0.01, metadata={"help": "Judgments are kept this far from 0 and 1."})
    round_epochs: int = field(default=1, metadata={"help": "Epochs over the pairs of a round."})

    def __post_init__(self) -> None:
        super().__post_init__()
        reason = "the pairs are made during training: set it to"
        refuse_options(
            self,
            {
                "precompute_ref_log_probs": f"{reason} False",
                "dataloader_persistent_workers": f"{reason} False, or workers keep the first round's",
                "train_sampling_strategy": f"{reason} 'random'",
            },
        )


class OSPTrainer(SPCETrainer):
    """Improves a policy by its own judgment, in rounds; see the module's docstring.

        p_ij = sigmoid(logit p_i - logit p_j)          loss: SPCE on (chosen, rejected, p_ij)

    Logged once a round: `judge/steady`, the share of comparisons of different answers in which both orders prefer the
    same one; `judge/strength`, the mean of preference_prob; `answers/tokens`, their mean length, and `answers/ended`,
    the share with an end token.

    Args:
        model: A causal LM, or its Hub id or path.
        ref_model: The reference of the loss; without it, a copy of the model as passed (or the one without adapter).
        args: The configuration; `OSPConfig(output_dir="out")` if it is left out.
        judge: Any `hf_xent.generation.judging.Judge`; it takes precedence over `args.judge`. A `ModelJudge` without a
            model asks the model that `args.judge` names, with options of its own.
        generate: The function that samples the answers, such as `hf_xent.generation.sampling.responses`.
        **kwargs: As for `trl.DPOTrainer`. Rows of `train_dataset` have the column `prompt`, `baseline` under
            `baseline="given"`, and any others, which judges see; those of `eval_dataset` are as for `SPCETrainer`.

    Raises:
        ValueError: Options that do not fit, a data set without its columns, prompts that leave no room for an answer,
            or sharded parameters.

    Source: Zhai et al. 2024, arXiv:2405.14103.
    """

    config_class = OSPConfig
    args: OSPConfig
    train_dataset: Any
    _name = "OSP"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: OSPConfig | None = None,
        *,
        judge: Judge | None = None,
        generate: Generate = generation.responses,
        **kwargs: Any,
    ):
        args = self.configured(args, kwargs)
        super().__init__(model, ref_model, args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("OSP samples from the whole policy on one process: train without FSDP and DeepSpeed")
        self.judge = ModelJudge() if judge is None else judge
        self.generate = generate
        self.prompts = self.train_dataset
        self.train_dataset = Round(len(self.prompts) * len(SCHEMES[args.pairs](args.num_generations)))
        self.add_callback(EpochCallback(self.begin_epoch))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if dataset_name != "train":
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        check_prompts(dataset, ("prompt", *(("baseline",) if args.baseline == "given" else ())))
        return encode_prompts(dataset, processing_class, args.max_length, args.max_new_tokens)

    def pairs(self, number: int) -> Dataset:
        """The pairs of a round, from `output_dir`.

        Args:
            number: The round, counted from 0.

        Raises:
            ValueError: `output_dir` does not have the pairs of this round.
        """
        if not self._folder(number).is_dir():
            raise ValueError(f"no pairs of round {number} in {self._folder(number)}: start the run from its beginning")
        return load_from_disk(str(self._folder(number)))

    def _folder(self, number: int) -> Path:
        return Path(self.args.output_dir) / "_pairs" / f"round-{number}"

    def begin_epoch(self, epoch: int, resumed: bool) -> None:
        """Makes the pairs of the round that begins with an epoch; an epoch within its round, or resumed, reads them."""
        number, earlier_epochs = divmod(epoch, self.args.round_epochs)
        round_has_begun = earlier_epochs > 0 or resumed
        if round_has_begun and self.train_dataset.number == number:
            return
        if not round_has_begun:
            with self.accelerator.main_process_first():
                if self.accelerator.is_main_process:
                    pairs = self._make_pairs(number)
                    shutil.rmtree(self._folder(number), ignore_errors=True)  # left by an earlier run
                    write_atomically(self._folder(number), pairs.save_to_disk)
        self.train_dataset.number, self.train_dataset.rows = number, self.pairs(number)

    def _make_pairs(self, number: int) -> Dataset:
        args, count = self.args, self.args.num_generations
        prompts = [ids for ids in self.prompts["prompt_ids"] for _ in range(count)]
        rows = [row for row in self.prompts.remove_columns("prompt_ids") for _ in range(count)]
        answers = self._sample(prompts, number, args.temperature)
        texts = self._decode(answers)
        scores = self._scores(rows, texts, number)
        pairs = []
        for start in range(0, len(rows), count):
            for chosen, rejected, p in ranked_pairs(scores[start : start + count], args.pairs, args.strength_eps):
                pair = {"preference_prob": p, "round": number, "prompt_ids": prompts[start]}
                for side, i in (("chosen", start + chosen), ("rejected", start + rejected)):
                    pair |= {side: answer_like(rows[i]["prompt"], texts[i]), f"{side}_ids": answers[i]}
                    pair[f"{side}_score"] = scores[i]
                pairs.append({**rows[start], **pair})
        self._report("judge/strength", np.mean([pair["preference_prob"] for pair in pairs]))
        self._report("answers/tokens", np.mean([len(answer) for answer in answers]))
        ends = generation.ends(self.model)
        self._report("answers/ended", np.mean([bool(ends.intersection(answer[-1:])) for answer in answers]))
        return Dataset.from_list(pairs)

    def _sample(self, prompts: list[list[int]], number: int, temperature: float) -> list[list[int]]:
        """Samples answers; each batch is seeded by the run's seed, the round and the index of its first prompt."""
        args, size = self.args, self.args.generation_batch_size
        answers: list[list[int]] = []
        with torch.no_grad(), eval_mode(self.model):
            starts = range(0, len(prompts), size)
            for start in tqdm(starts, f"Sampling, round {number}", leave=False, disable=args.disable_tqdm or None):
                [seed] = np.random.SeedSequence((args.seed, number, start)).generate_state(1).tolist()
                batch = prompts[start : start + size]
                options = {"tokens": args.max_new_tokens, "seed": seed, "temperature": temperature}
                answers += self.generate(self.model, batch, **options)
        return answers

    def _decode(self, answers: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _scores(self, rows: list[dict[str, Any]], texts: list[str], number: int) -> list[float]:
        """p_i of every answer, from one comparison with its prompt's baseline; 1/2 if it is the baseline itself."""
        count, baseline = self.args.num_generations, self.args.baseline
        if baseline == "given":
            baselines = [row["baseline"] for row in rows]
        else:
            by_prompt = texts[::count]
            if baseline == "greedy":
                by_prompt = self._decode(self._sample(self.prompts["prompt_ids"], number, 0.0))
            baselines = [text for text in by_prompt for _ in range(count)]
        compared = [i for i in range(len(texts)) if baseline != "sample" or i % count]
        answers, others = ([column[i] for i in compared] for column in (texts, baselines))
        with self._judging() as judge:
            verdicts = both_orders(judge, [rows[i] for i in compared], answers, others)
        differ = torch.tensor([texts[i] != baselines[i] for i in compared])
        if differ.any():
            self._report("judge/steady", verdicts.steady[differ].double().mean())
        scores = [0.5] * len(texts)
        for i, p in zip(compared, verdicts.p.tolist(), strict=True):
            scores[i] = p
        return scores

    @contextmanager
    def _judging(self) -> Iterator[Judge]:
        """Yields the judge; its model is the policy or the reference, as configured, until the context ends."""
        judge, policy = self.judge, self.args.judge == "policy"
        if not isinstance(judge, ModelJudge):
            yield judge
            return
        model = self.model if policy or self.ref_model is None else self.ref_model
        judge = replace(judge, tokenizer=judge.tokenizer or self._tokenizer, model=judge.model or model)
        adapter: Any = nullcontext()
        if judge.model is self.model and not policy:  # the reference of a PEFT policy is the policy without its adapter
            adapter = use_adapter(self.model, "ref" if "ref" in self.model.peft_config else None)
        with adapter:
            yield judge

    def _report(self, name: str, value: Any) -> None:
        self._metrics["train"][name].append(float(value))  # TRL puts these in the next log
