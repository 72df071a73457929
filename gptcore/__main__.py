"""python -m gptcore: what to do with a trained run."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from gptcore import lr_range, prepare, sweep
from gptcore.config import ConfigError, check_model
from gptcore.flags import Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 good, 1 it broke, 2 bad input."""
    return run_command(lambda: _main(argv))


def _main(argv) -> int:
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("python -m gptcore is one process; leave torchrun out")
    parser = Parser(prog="python -m gptcore", description="Use what train.py trained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command, add_arguments in COMMANDS:
        child = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        child.set_defaults(run_command=command)
        add_arguments(child)
    arguments = parser.parse_args(argv)
    return arguments.run_command(arguments)


def _add_run(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, or a checkpoint in one")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default best, else last")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--backend",
        choices=("auto", "triton", "eager"),
        help="of the fused ops; default: the run's",
    )


SAMPLING = {  # how `sample` writes a text, unless told otherwise
    "max_new_tokens": 500,
    "temperature": 0.8,
    "top_k": None,
    "top_p": None,
    "repetition_penalty": 1.0,
    "stop": None,
    "num_samples": 1,
    "seed": None,
}


def _add_sample(parser: Parser) -> None:
    _add_run(parser)
    parser.set_defaults(**SAMPLING)
    add = parser.add_argument
    add("--start", default=None, help="the text to continue [a new line]")
    add("--max_new_tokens", type=int, help="length [500]")
    add("--temperature", type=float, help="0: always the likeliest token [0.8]")
    add("--top_k", type=int, help="only the k likeliest tokens")
    add(
        "--top_p",
        type=float,
        help="draw from the fewest likeliest tokens whose probabilities sum to p",
    )
    add(
        "--repetition_penalty",
        type=float,
        help="above 1: tokens already written become less likely",
    )
    add("--stop", metavar="TEXT", help="end where this is written")
    add("--num_samples", type=int, help="texts, in one batch")
    add("--seed", type=int, help="fixes the draws: the same seed, the same text")


def sample(arguments) -> int:
    """write text with a trained model"""
    import torch

    from gptcore import memory
    from gptcore.generation import stream
    from gptcore.tasks import task_of

    checkpoint, model = _load(arguments)
    tokenizer = checkpoint.tokenizer
    if (task := task_of(checkpoint.train)) is not None:
        for name, default in SAMPLING.items():
            if getattr(arguments, name) != default:
                raise ConfigError(
                    f"{arguments.run} answers problems, each as is likeliest; leave --{name} out"
                )
        print(task.answer(model, arguments.start or task.example()))
        return 0
    start = tokenizer.newline() if arguments.start is None else arguments.start
    tokens = tokenizer.encode(start).astype("int64")
    if arguments.num_samples < 1:
        raise ConfigError(f"--num_samples must be at least 1; got {arguments.num_samples}")
    device, length = next(model.parameters()).device, len(tokens) + arguments.max_new_tokens
    flags = "--max_new_tokens or --num_samples"
    memory.check_sampling(checkpoint.model, device, arguments.num_samples, length, flags)
    idx = torch.tensor(tokens, device=device)
    idx = idx.expand(arguments.num_samples, -1)
    try:
        drawn = stream(
            model,
            idx,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
            vocab_size=tokenizer.vocab_size,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if arguments.num_samples == 1:
        texts = [(token.item() for token in drawn)]  # shown as it is drawn
    else:
        texts = torch.stack([idx[:, -1], *drawn], dim=1)[:, 1:].tolist()
    for number, text in enumerate(texts):
        print("---------------\n" * (number > 0) + start, end="", flush=True)
        for piece in _until(arguments.stop, tokenizer.decode_stream(text)):
            print(piece, end="", flush=True)
        print()
    return 0


def _until(stop: str | None, pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text, up to and including the first `stop` in it."""
    tail = ""
    for piece in pieces:
        tail += piece
        if stop and stop in tail:
            end = tail.index(stop) + len(stop)
            yield piece[: len(piece) - (len(tail) - end)]
            return
        yield piece
        tail = tail[-len(stop) :] if stop else ""


def _add_eval(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--data",
        default=None,
        help="another text, all of it (of a folder prepared with --val, what was held out); "
        "default: what was held out of its own",
    )


def evaluate(arguments) -> int:
    """loss and accuracy on the validation split, or on another text"""
    import math

    import torch

    from gptcore import evaluation
    from gptcore.data import Corpus, load_data
    from gptcore.log import extent_of
    from gptcore.tasks import task_of

    checkpoint, model = _load(arguments)
    device, block_size = next(model.parameters()).device, checkpoint.model.block_size
    train = checkpoint.train.replace(data=arguments.data or checkpoint.train.data)
    task = task_of(train, device)
    if task is not None and task.tokenizer.state() != checkpoint.tokenizer.state():
        raise ConfigError(
            f"{checkpoint.folder} was not trained on {task.text.source}; leave --data out"
        )
    text = task.text if task else load_data(train.data)
    trained_on = checkpoint.config.get("data", {})  # nothing of an imported one
    other = text.sha256 != trained_on.get("sha256")
    if other and trained_on and arguments.data is None:
        raise ConfigError(
            f"{checkpoint.folder}: the text has changed since: trained on {trained_on['source']}, "
            f"now there is {text.source}; give --data FILE with the text as it was, or with any "
            "other to evaluate on all of it"
        )
    other = other and arguments.data is not None
    corpus = task or Corpus.build(
        text,
        checkpoint.tokenizer,
        val_fraction=1.0 if other else train.val_fraction,
        device=device,
        eval_tokens=None if other else train.eval_tokens,
    )
    if not task and len(corpus.val) < 2:
        raise ConfigError(f"--data {train.data}: at least two tokens are needed; got one")
    if train.dtype == "bfloat16":  # as the run did
        model.to(torch.bfloat16)
    size = max(1, evaluation.EVALUATION_TOKENS // block_size)
    batches = evaluation.in_pieces(checkpoint.model, corpus.validation(size, block_size))
    result = evaluation.evaluate(model, batches)
    bits = result.loss / math.log(2) * corpus.tokens_per_character
    print(
        f"{checkpoint.folder} on {corpus.text.source}: loss {result.loss:.4f}, "
        f"{bits:.3f} bits per character, accuracy {result.accuracy:.1%}, "
        + (f"{result.exact_match:.2%} solved, " if task else "")
        + extent_of(result, corpus)[1]
    )
    return 0


def _add_import(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="state dict, ckpt.pt, or transformers' folder")
    parser.add_argument("run", metavar="RUN", help="new run folder")
    parser.add_argument("--format", required=True, help="notebook, nanogpt or transformers")
    parser.add_argument("--data", default=None, help="the text it was trained on")
    parser.add_argument(
        "--tokenizer", choices=("char", "bytes", "gpt2"), help="default char with --data, else gpt2"
    )
    parser.add_argument(
        "--vocab_multiple", type=int, default=1, help="what its vocabulary was rounded up to [1]"
    )


def import_(arguments) -> int:
    """make a run folder of a model from elsewhere"""
    from gptcore.data import load_text
    from gptcore.interop import import_model
    from gptcore.tokenizer import tokenizer_for

    kind = arguments.tokenizer or ("gpt2" if arguments.data is None else "char")
    if kind == "char" and arguments.data is None:
        raise ConfigError("--tokenizer char needs --data, whose characters are the vocabulary")
    if arguments.format == "notebook" and arguments.data is None and arguments.tokenizer is None:
        raise ConfigError("--format notebook needs --data, the text the model was trained on")
    text = "" if kind != "char" else load_text(arguments.data).content
    tokenizer = tokenizer_for(kind, text)
    gpt = import_model(
        arguments.file,
        arguments.format,
        arguments.run,
        tokenizer,
        arguments.data or "auto",
        arguments.vocab_multiple,
    )
    print(
        f"{arguments.run}: {gpt.num_parameters():,} parameters; "
        f"python -m gptcore sample {arguments.run}"
    )
    return 0


def _add_export(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder, or a checkpoint in one")
    parser.add_argument("out", metavar="OUT", help="file, or folder for transformers")
    parser.add_argument("--format", required=True, help="notebook or transformers")


def export(arguments) -> int:
    """write a run's model for the notebook or for transformers"""
    from gptcore.interop import export_model

    export_model(arguments.run, arguments.format, arguments.out)
    print(f"{arguments.out}: written")
    return 0


def _load(arguments):
    """The checkpoint and its model, ready to use."""
    from gptcore import machine
    from gptcore.checkpoint import READS, SavedAnew, open_checkpoint
    from gptcore.model import build_model

    device = machine.pick_device(arguments.device)
    given = () if arguments.backend is None else ("backend",)
    for left in reversed(range(READS)):
        checkpoint = open_checkpoint(arguments.run, arguments.checkpoint)
        config = checkpoint.model
        check_model(checkpoint.train.model, config, given)
        if given:
            config = config.replace(backend=arguments.backend)
        machine.check_backend(config.backend, device)
        model = build_model(checkpoint.train.model, config)
        try:
            checkpoint.load_weights(model)
            break
        except SavedAnew:
            if not left:
                raise
    return checkpoint, model.to(device).eval()


COMMANDS = (
    ("sample", sample, _add_sample),
    ("eval", evaluate, _add_eval),
    ("import", import_, _add_import),
    ("export", export, _add_export),
    ("sweep", sweep.sweep, sweep.add_arguments),
    ("lr_range", lr_range.lr_range, lr_range.add_arguments),
    ("prepare", prepare.prepare, prepare.add_arguments),
)

if __name__ == "__main__":
    sys.exit(main())
