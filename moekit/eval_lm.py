"""``python -m moekit.eval_lm``: the command line of the branch's ``fairseq_cli.eval_lm``, its log and its figures.

    python -m moekit.eval_lm $DATA --path $MODEL --gen-subset valid --sample-break-mode none --tokens-per-sample 2048 \\
        --batch-size 1 --fp16 --output-word-probs --is-moe --distributed-world-size 4 \\
        --model-overrides "{'world_size': 4, 'moe_eval_capacity_token_fraction': 0.05}"

Under a launcher that sets ``RANK``, ``WORLD_SIZE`` and ``MASTER_ADDR``, such as torchrun, its processes are the ranks.
The parser is the released fairseq's, with what the branch adds. Unlike the branch, it logs the words of all ranks, and
the capacity is the checkpoint's own only if ``--model-overrides`` gives none; None there drops nothing.
"""

from __future__ import annotations

import ast
import itertools
import json
import logging
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import moekit
from moekit import checkpoint, results
from moekit import fairseq_data as data_order
from moekit.arguments import shown
from moekit.batches import Batch, count_scored
from moekit.checkpoint.options import eval_capacity, from_fairseq, options_of
from moekit.handle import check_size, find_dictionary
from moekit.headlines import first_line, headline
from moekit.nn.changes import CHANGEABLE, differences
from moekit.nn.config import ModelConfig
from moekit.ranks import Ranks
from moekit.ranks.joined import Launch
from moekit.scoring import perplexity_of, score_batches

# The logger has fairseq's name, since scripts look for it.
logger = logging.getLogger("fairseq_cli.eval_lm")

HONOURED = """data path gen_subset sample_break_mode tokens_per_sample add_bos_token batch_size max_tokens seed cpu fp16
    is_moe distributed_world_size model_overrides context_window max_valid_steps post_process output_word_probs
    output_word_stats stats_path no_progress_bar task""".split()
# What the branch's eval_lm does not heed either, what is always on, and what only says how the same is computed.
WITHOUT_EFFECT = """all_gather_list_size batch_size_valid bpe broadcast_buffers bucket_cap_mb criterion curriculum
    data_buffer_size dataset_impl ddp_backend ddp_comm_hook device_id disable_validation distributed_backend distributed_num_procs
    distributed_port empty_cache_freq fast_stat_sync find_unused_parameters fix_batches_to_gpus fixed_validation_seed
    fp16_init_scale fp16_no_flatten_grads fp16_scale_tolerance fp16_scale_window heartbeat_timeout log_format
    log_interval log_nvidia_smi lr lr_scheduler max_source_positions max_target_positions max_tokens_valid
    memory_efficient_fp16 min_loss_scale no_seed_provided nprocs_per_node num_workers num_workers_valid optimizer
    pad_to_fixed_length plasma_path quiet required_batch_size_multiple required_seq_len_multiple results_path scoring
    skip_invalid_size_inputs_valid_test softmax_batch threshold_loss_scale tokenizer train_subset use_plasma_view
    user_dir valid_subset validate_after_updates validate_interval validate_interval_updates""".split()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: the process's own). Returns the exit status: 0, or 1 with one sentence."""
    level = os.environ.get("LOGLEVEL", "INFO").upper()
    form = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
    logging.basicConfig(format=form, datefmt="%Y-%m-%d %H:%M:%S", level=level, stream=sys.stdout)
    try:
        launched, args = Launch.of(), parse(argv)
        if launched is None:
            run(args)
        else:
            launched.check("--distributed-world-size", args.distributed_world_size)
            with launched.ranks(_device(args)) as pool:
                run(args, pool)
    except (Exception, KeyboardInterrupt) as error:
        logger.debug("the error in full", exc_info=True)
        plain = isinstance(error, ValueError | RuntimeError | OSError | KeyboardInterrupt)
        why = first_line(error) if plain else headline(error)
        print(f"python -m moekit.eval_lm: error: {why}", file=sys.stderr)
        return 1
    return 0


def _device(args: Namespace) -> str:
    return "cpu" if args.cpu else "auto"


# --------------------------------------------------------------------------------------------- the command line


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The arguments, by fairseq's own parser.

    Raises:
        ValueError: an option is unknown, malformed, or has no meaning here.
    """
    with data_order.importing_fairseq():
        from fairseq import options

    parser = options.get_eval_lm_parser()
    group = parser.add_argument_group("fairseq's moe branch")
    group.add_argument("--is-moe", action="store_true", help="the model has experts")
    group.add_argument("--stats-path", "--sp", help="write the figures to STATS_PATH.json")
    group.add_argument("--log-nvidia-smi", action="store_true", help="no effect")
    group.add_argument("--num-workers-valid", type=int, default=0, help="no effect")
    group.add_argument("--max-source-positions", type=int, help="no effect")

    def fail(message: str) -> None:
        raise ValueError(message)

    parser.error = fail
    args = options.parse_args_and_arch(parser, None if argv is None else list(argv))
    known = {*HONOURED, *WITHOUT_EFFECT, *_own_options(args)}
    for name, value in sorted(vars(args).items()):
        # --bf16 also sets tpu, which the user did not ask for.
        if name not in known and value not in (parser.get_default(name), None, False):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag if value is True else f'{flag} {shown(value)}'} has no meaning here, where one model of fairseq's "
                "transformer_lm scores one data set whole"
            )
    if args.task != "language_modeling":
        raise ValueError(f"--task {args.task} is not implemented: expected language_modeling")
    if args.path is None:
        raise ValueError("--path is missing: it names the checkpoint")
    if "://" in args.path:
        raise ValueError(
            f"--path {args.path} is an address; expected the path of a checkpoint on this machine"
        )
    if os.pathsep in args.path:
        raise ValueError(
            f"--path {args.path} names several models: expected one, since ensembles are not implemented"
        )
    if args.post_process not in (None, "subword_nmt", "@@ "):
        raise ValueError(
            f"--post-process {args.post_process} is not implemented, as in fairseq: expected subword_nmt"
        )
    for name in ("tokens_per_sample", "batch_size", "max_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 0 <= args.context_window < args.tokens_per_sample:
        raise ValueError(
            f"--context-window {args.context_window}: expected less than --tokens-per-sample {args.tokens_per_sample}"
        )
    args.model_overrides = read_overrides(args.model_overrides)
    return args


def _own_options(args: Namespace) -> list[str]:
    """Names of the options that the chosen ``--bpe`` and ``--tokenizer`` bring, which are without effect as these are."""
    from fairseq.registry import REGISTRIES

    names = []
    for registry in ("bpe", "tokenizer"):
        chosen = REGISTRIES[registry]["registry"].get(getattr(args, registry, None))
        of = getattr(chosen, "__dataclass", None)
        names += of.__dataclass_fields__ if of is not None else []
    return names


def read_overrides(text: str) -> dict[str, Any]:
    """``--model-overrides``: a Python literal, never evaluated."""
    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError):
        overrides = None
    if not isinstance(overrides, dict) or not all(isinstance(name, str) for name in overrides):
        raise ValueError(
            f"--model-overrides {shown(text)} is no literal of a dict of options, such as \"{{'world_size': 4}}\""
        )
    return overrides


def applied(
    files: checkpoint.Files, overrides: dict[str, Any]
) -> tuple[ModelConfig, float | None, dict[str, Any]]:
    """The model's config, the capacity fraction that holds, and the fields of the config that ``overrides`` change.

    Raises:
        ValueError: an override would change what the weights were made for, or makes no sense.
    """
    model, task = options_of(checkpoint.read(files.first), str(files.first))
    unknown = [name for name in overrides if name not in {*model, *task, "world_size", "bpe"}]
    if unknown:
        logger.warning("--model-overrides names what the checkpoint does not have: %s", ", ".join(unknown))
    before, after = (
        from_fairseq(model | change, task | change, vocab_rows=0, before_final_norm=False)
        for change in ({}, overrides)
    )
    changed = differences(before, after)
    if fixed := sorted(set(changed) - set(CHANGEABLE)):
        made = ", ".join(f"{name}={getattr(before, name)}" for name in fixed)
        raise ValueError(
            f"--model-overrides: the weights are of a model with {made}; leave out what changes that"
        )
    return before, eval_capacity(model | overrides), changed


# --------------------------------------------------------------------------------------------------- evaluating


def run(args: Namespace, ranks: Ranks | None = None) -> dict[str, Any]:
    """Score what ``args`` ask for on ``ranks``, and log it as the branch does. Returns its figures."""
    start = time.perf_counter()
    stats = None if args.stats_path is None else f"{args.stats_path}.json"
    if stats is not None:
        # The error comes before the scoring, and not after.
        results.check_file(stats)
    log_config(args)
    logger.info("loading model(s) from %s", args.path)
    files = checkpoint.find(args.path)
    config, fraction, changed = applied(files, args.model_overrides)
    # Of experts that lie in one file with all else, the branch without --is-moe fills other buffers.
    if (files.ranks or not config.dense) and not args.is_moe:
        raise ValueError(f"{args.path} has experts: add --is-moe")
    own = find_dictionary(files, None)
    data_order.check_files(args.data, args.gen_subset, own)
    model = moekit.load(
        args.path,
        args.distributed_world_size if ranks is None else None,
        device=_device(args),
        dtype="float16" if args.fp16 else "float32",
        dictionary=None if own else data_order.data_folder(args.data),
        config=changed,
        progress=not args.no_progress_bar,
        ranks=ranks,
    )
    with model:
        parameters = model.parts[0]["parameters"]
        logger.info("num. model params: %s", f"{parameters:,}")
        batches = open_data(args, model)
        logger.info("%s %s %s examples", args.data, args.gen_subset, f"{len(batches.dataset):,}")
        load_time = time.perf_counter() - start
        logger.info("load time: %.2f seconds", load_time)

        # Each rank of the branch stops behind the batch number max_valid_steps, and counts from 0.
        steps = None if args.max_valid_steps is None else max(0, args.max_valid_steps + 1)
        chosen = list(itertools.islice(batches, steps and steps * model.world_size))
        begun = time.perf_counter()
        scores = score_batches(
            model,
            chosen,
            fraction=fraction,
            vocab=len(batches.dictionary),
            seed=args.seed,
            progress=not args.no_progress_bar,
        )
        seconds, world_size = time.perf_counter() - begun, model.world_size

    found = Words(batches.dictionary, args.post_process)
    bos = batches.dictionary.bos() if args.add_bos_token else None
    for sample, tokens, logprobs in samples(chosen, scores, bos):
        words = found.add(tokens, logprobs)
        if args.output_word_probs:
            logger.info("%d %s", sample, "\t".join(f"{word} [{logprob:2f}]" for word, logprob in words))
    tokens = count_scored(chosen)
    spent = time.perf_counter() - begun
    logger.info("Evaluated %s tokens in %.1fs (%.2f tokens/s)", f"{tokens:,}", spent, tokens / spent)
    if args.output_word_stats:
        for line in found.statistics():
            logger.info(line)
    figures = {
        "loss": found.loss_base2,
        "perplexity": perplexity_of(found.loss_base2),
        "r0_tps_step": tokens / seconds / world_size,
        "ntok_total": tokens,
        "gpu_step_seconds": seconds * world_size,
    }
    logger.info(
        "%s Loss (base 2): %.4f, Perplexity: %.2f", args.gen_subset, figures["loss"], figures["perplexity"]
    )
    if stats is not None:
        total = time.perf_counter() - start
        times = {"wall_time": total, "wall_time_load": load_time, "wall_time_model": total - load_time}
        rounded = {name: round(value, 4) for name, value in (figures | times).items()}
        with results.whole(stats) as part:
            part.write_text(json.dumps({args.gen_subset: rounded}, indent=4))
        logger.info("Evaluation results saved to %s", stats)
    return figures


def log_config(args: Namespace) -> None:
    logger.info("---------------------------")
    logger.info("cfg:")
    for option, value in sorted(vars(args).items()):
        logger.info("%s\t%s", option, value)
    logger.info("---------------------------")


def open_data(args: Namespace, model: moekit.Model) -> data_order.Batches:
    data = data_order.Data(
        args.data,
        args.gen_subset,
        args.tokens_per_sample,
        args.batch_size or data_order.INT32,
        args.sample_break_mode or "none",
        args.context_window,
        args.max_tokens or data_order.MAX_TOKENS,
    )
    positions = model.config.max_positions
    batches = data_order.open_data(
        data, max_positions=positions, add_bos=args.add_bos_token, dictionary=model.dictionary
    )
    if batches.skipped:
        logger.warning(skipped(batches, positions, args))
    check_size(len(batches.dictionary), f"{args.data}: its dict.txt", model.config)
    return batches


def skipped(batches: data_order.Batches, max_positions: int, args: Namespace) -> str:
    """What fairseq's own warning does not say of the samples that are left out."""
    samples = len(batches.dataset)
    told = f"skipped {batches.skipped:,} of {samples:,} samples, longer than the model's {max_positions} positions"
    if (args.sample_break_mode or "none") == "none":
        told += f" (--tokens-per-sample {max_positions} would cut the text to these)"
    return told if len(batches) else f"{told}: none is left, so the loss of 0 means nothing"


def samples(
    batches: Sequence[Batch], scores: dict[int, np.ndarray], bos: int | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(id, tokens [n], log-probabilities [n]) of every sample in the order of the batches, without a leading ``bos``."""
    for batch in batches:
        for row, sample in enumerate(batch.ids):
            scored = batch.scored(row)
            tokens, logprobs = batch.targets[row][scored], scores[batch.index][row][scored]
            if bos is not None:
                assert tokens[0] == bos, f"sample {sample} does not begin with <s>"
                tokens, logprobs = tokens[1:], logprobs[1:]
            yield int(sample), tokens, logprobs


@dataclass
class Statistic:
    """What ``--output-word-stats`` tells of a word: natural logs, summed over its occurrences."""

    joined: bool
    count: int = 0
    logprob: float = 0.0
    next_logprob: float = 0
    followed: int = 0


class Words:
    """Sums over words: pieces that ``post_process`` joins are one word, whose log-probability is their sum.

    Tokens of infinite log-probability are left out of the sums, as fairseq does.
    """

    def __init__(self, dictionary: Any, post_process: str | None):
        self.dictionary, self.total, self.count = dictionary, 0.0, 0
        self.words: dict[str, Statistic] = {}
        # "subword_nmt" itself is the mark that fairseq then looks for, and finds nowhere
        self.mark = post_process.rstrip() if post_process else ""

    def add(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[tuple[str, float]]:
        """Count a sample in: tokens [n], float32 log-probabilities [n]. Returns its words and theirs."""
        symbols = [self.dictionary[token] for token in tokens]
        joins = [bool(self.mark) and symbol.endswith(self.mark) for symbol in symbols]
        logprobs = logprobs.copy()
        for place in range(len(tokens) - 1):
            if joins[place]:
                logprobs[place + 1] += logprobs[place]
                logprobs[place] = 0
        counted = ~np.isinf(logprobs)
        if not counted.all():
            left_out = [symbol for symbol, good in zip(symbols, counted, strict=True) if not good]
            logger.info("skipping tokens with inf scores: %s", " ".join(left_out))
        self.total += logprobs[counted].sum(dtype=np.float64)
        self.count += int(counted.sum()) - sum(joins[:-1])

        words, word, joined = [], "", False
        for place, symbol in enumerate(symbols):
            if joins[place]:
                word, joined = word + symbol.removesuffix(self.mark), True
                continue
            word += symbol
            words.append((word, float(logprobs[place])))
            statistic = self.words.setdefault(word, Statistic(joined))
            statistic.count += 1
            statistic.logprob += float(logprobs[place])
            following = logprobs[place + 1 :][logprobs[place + 1 :] != 0]
            if len(following):
                statistic.next_logprob += float(following[0])
                statistic.followed += 1
            word, joined = "", False
        return words

    @property
    def loss_base2(self) -> float:
        return -self.total / self.count / math.log(2) if self.count else 0.0

    def statistics(self) -> list[str]:
        """A line a word, the most frequent first: word, occurrences, log-probability, whether it was joined,
        log-probability of the words that followed, and how many did."""
        ordered = sorted(self.words.items(), key=lambda item: -item[1].count)
        return [
            f"{word}\t{s.count}\t{s.logprob}\t{s.joined}\t{s.next_logprob}\t{s.followed}"
            for word, s in ordered
        ]


if __name__ == "__main__":
    sys.exit(main())
