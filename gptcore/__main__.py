"""python -m gptcore: what to do with a trained run."""

import sys
from collections.abc import Sequence

from gptcore.config import ConfigError, Parser, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 good, 1 it broke, 2 bad input."""
    return run_command(lambda: _main(argv))


def _main(argv) -> int:
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


def _add_sample(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument("--start", default=None, help="the text to continue [a new line]")
    parser.add_argument("--max_new_tokens", type=int, default=500, help="length [500]")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest token [0.8]"
    )
    parser.add_argument("--top_k", type=int, default=None, help="only the k likeliest tokens")
    parser.add_argument("--top_p", type=float, default=None, help="only the likeliest, up to p")
    parser.add_argument("--seed", type=int, default=None, help="the same seed, the same text")


def sample(arguments) -> int:
    """write text with a trained model"""
    import torch

    from gptcore.generation import stream

    checkpoint, model = _load(arguments)
    tokenizer = checkpoint.tokenizer
    start = tokenizer.decode([0]) if arguments.start is None else arguments.start
    tokens = tokenizer.encode(start).astype("int64")
    if len(tokens) == 0:
        raise ConfigError("--start must hold at least one character")
    idx = torch.tensor(tokens, device=next(model.parameters()).device)[None]
    try:
        drawn = stream(
            model,
            idx,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            vocab_size=tokenizer.vocab_size,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(start, end="", flush=True)
    for piece in tokenizer.decode_stream(token.item() for token in drawn):
        print(piece, end="", flush=True)
    print()
    return 0


def _add_eval(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument("--data", default=None, help="default: what it was trained on")


def evaluate(arguments) -> int:
    """exact loss and accuracy on the validation split"""
    import math

    from gptcore import trainer
    from gptcore.data import Corpus, load_text

    checkpoint, model = _load(arguments)
    text = load_text(arguments.data or checkpoint.train.data)
    device = next(model.parameters()).device
    corpus = Corpus.build(
        text, checkpoint.tokenizer, val_fraction=checkpoint.train.val_fraction, device=device
    )
    block_size = checkpoint.model.block_size
    corpus.check_block(block_size)
    size = max(1, trainer.EVALUATION_TOKENS // block_size)
    result = trainer.evaluate(model, corpus.validation(size, block_size))
    bits = result.loss / math.log(2) * len(corpus.val) / corpus.val_characters
    print(
        f"{checkpoint.folder} on {text.source}: loss {result.loss:.4f}, "
        f"{bits:.3f} bits per character, accuracy {result.accuracy:.1%}, "
        f"{len(corpus.val) - 1:,} tokens"
    )
    return 0


def _load(arguments):
    """The checkpoint and its model, ready to use."""
    from gptcore import machine
    from gptcore.checkpoint import open_checkpoint
    from gptcore.model import build_model

    device = machine.pick_device(arguments.device)
    checkpoint = open_checkpoint(arguments.run, arguments.checkpoint)
    model = build_model(checkpoint.train.model, checkpoint.model)
    checkpoint.load_weights(model)
    return checkpoint, model.to(device).eval()


COMMANDS = (
    ("sample", sample, _add_sample),
    ("eval", evaluate, _add_eval),
)

if __name__ == "__main__":
    sys.exit(main())
