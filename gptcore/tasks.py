"""Tasks: arithmetic problems drawn as they are needed, in the place of a corpus.

A problem is one row, question and answer; the loss counts the answer and its final new line:

    12+34=640       three digits, lowest first: the carry runs the way the model writes
    12-34=22-       lowest first, then the sign
    12*34=8040
    34/12=02r10     quotient and remainder, highest first: long division runs that way

and with worked steps, in front of the answer,

    12*34=840;630;=8040           a times each digit of b, lowest first
    34/12=003;210;=02r10          for each digit of a: a digit of the quotient, the remainder left

One problem in ten is never drawn in training: for each operation, a and leading digits of b, the
last digit of b that a hash picks. Row r of a step is a pure function of (seed, step, r), computed
on the key's device without waiting for it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gptcore.config import ConfigError, TrainConfig
from gptcore.data import Text
from gptcore.evaluation import Evaluation
from gptcore.generation import generate
from gptcore.tokenizer import CharTokenizer
from kernels.rng import (
    SITE_BATCH,
    SITE_EVALUATION,
    SITE_PROBLEM,
    make_key,
    philox4x32,
    random_integers,
)

TASKS = ("add", "arithmetic")
IGNORED = -100  # the target of a token that does not count
VALIDATION_PROBLEMS = 10_000  # at most, of the held-out problems
_END = ord("\n")
_PRIME = 2654435761  # near 2**32 divided by the golden ratio


class Arithmetic:
    """Problems a op b with numbers of `digits` digits, leading zeros written.

    It takes the place of `gptcore.data.Corpus`.

    Args:
        operations: some of "+-*/".
        digits: of a and of b, 1 to 8.
        worked_steps: products and quotients are preceded by how they come about.
    Attributes:
        tokenizer: of the characters that occur.
        question: characters up to and with "=".
        width: characters of the longest problem and its new line.
        text: what is drawn, in words.
    """

    unit, remark = "problems", ""  # what `sizes` counts; nothing more to say of it

    def __init__(self, operations: str, digits: int, worked_steps: bool = False, device="cpu"):
        if not operations or set(operations) - set("+-*/"):
            raise ConfigError(f"operations must be some of +-*/; got {operations!r}")
        if not 1 <= digits <= 8:
            raise ConfigError(f"digits must be in 1..8; got {digits!r}")
        self.operations = "".join(op for op in "+-*/" if op in operations)
        self.digits, self.worked_steps = digits, worked_steps
        self.device = torch.device(device)
        characters = set("\n0123456789=" + self.operations)
        characters |= {"r"} if "/" in operations else set()
        characters |= {";"} if worked_steps and set(operations) & set("*/") else set()
        self.tokenizer = CharTokenizer("".join(sorted(characters)))
        self.question = 2 * digits + 2
        one = torch.ones(1, dtype=torch.int64)
        self.width = (
            self.question + 1 + max(self._answer(op, one, one).shape[1] for op in self.operations)
        )
        # Held out: one last digit of b for every op, a and leading digits of b.
        self.held_out = len(self.operations) * 10 ** (2 * digits - 1)
        ids = torch.zeros(128, dtype=torch.int64)
        points = torch.tensor([ord(c) for c in self.tokenizer.characters])
        ids[points] = torch.arange(len(points))
        self._ids = ids.to(self.device)
        self._signs = torch.tensor([ord(op) for op in self.operations], device=self.device)
        kind = "addition" if self.operations == "+" else f"arithmetic ({self.operations})"
        steps = ", with worked steps" if worked_steps else ""
        self.text = Text(
            f"gptcore {self.operations} digits {digits} worked_steps {worked_steps} v1",
            f"{kind} of {digits}-digit numbers{steps}",
        )

    def check_block(self, block_size: int) -> None:
        """Raises: ConfigError unless the longest problem fits a block."""
        if block_size < self.width - 1:
            raise ConfigError(
                f"block_size must hold a problem: {self.text.source} needs {self.width - 1}; got "
                f"{block_size}; leave --block_size out"
            )

    # ---- problems --------------------------------------------------------------------------

    def problems(self, n: torch.Tensor, *, held_out: bool):
        """Problem number n of the training or of the held-out ones.

        Args:
            n: (rows,) int64 below `held_out`, for training problems below 9 * `held_out`.
        Returns: which operation, a, b, each (rows,) int64.
        """
        n, pick = (n, 0) if held_out else (n // 9, n % 9 + 1)
        n, high = n // 10 ** (self.digits - 1), n % 10 ** (self.digits - 1)
        which, a = n // 10**self.digits, n % 10**self.digits
        word = philox4x32(a, high, which, torch.full_like(a, SITE_PROBLEM), 0, 0)[0]
        # Nothing is divided by zero: 0 is not what is held out, and a training draw passes it by.
        divided_by_few = (self._signs[which] == ord("/")) & (high == 0)
        out = torch.where(divided_by_few, 1 + word % 9, word % 10)
        last = (out + pick) % 10
        if not held_out:
            last = torch.where(divided_by_few & (last == 0), (out + pick % 9 + 1) % 10, last)
        return which, a, 10 * high + last

    def rows(self, which: torch.Tensor, a: torch.Tensor, b: torch.Tensor, length: int):
        """Problems as tokens.

        Args:
            which, a, b: (rows,) int64, `which` an index into `operations`.
            length: of a row, at least width - 1.
        Returns: idx, targets, each (rows, length) int64; the question's targets are ignored.
        """
        sign, equals = self._signs[which][:, None], torch.full_like(a, ord("="))[:, None]
        question = torch.cat((_written(a, self.digits), sign, _written(b, self.digits), equals), 1)
        answer = torch.full((len(a), length + 1 - self.question), _END, device=a.device)
        for op in self.operations:
            columns = self._answer(op, a, b)
            columns = F.pad(columns, (0, answer.shape[1] - columns.shape[1]), value=_END)
            answer = torch.where(sign == ord(op), columns, answer)
        tokens = self._ids[torch.cat((question, answer), 1)]
        after_end = (answer == _END).cumsum(1) > 1
        targets = torch.where(after_end, IGNORED, tokens[:, self.question :])
        ignored = targets.new_full((len(a), self.question - 1), IGNORED)
        return tokens[:, :-1], torch.cat((ignored, targets), 1)

    def _answer(self, op: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(rows, columns) character codes of what follows "="."""
        N = self.digits
        if op == "+":
            return _reversed(a + b, N + 1)
        if op == "-":
            sign = torch.where(a < b, ord("-"), _END)
            return torch.cat((_reversed((a - b).abs(), N), sign[:, None]), 1)
        if op == "*":
            digits_of_b = (b // 10**place % 10 for place in range(N))
            steps = [_reversed(a * digit, N + 1) for digit in digits_of_b]
            return self._with_steps(steps, _reversed(a * b, 2 * N))
        divisor, steps, left = b.clamp(min=1), [], torch.zeros_like(a)
        for place in reversed(range(N)):
            left = 10 * left + a // 10**place % 10
            steps.append(torch.cat((_written(left // divisor, 1), _written(left % divisor, N)), 1))
            left = left % divisor
        quotient = _written(a // divisor, N)
        separator = torch.full_like(a, ord("r"))[:, None]
        return self._with_steps(steps, torch.cat((quotient, separator, _written(left, N)), 1))

    def _with_steps(self, steps: list[torch.Tensor], result: torch.Tensor) -> torch.Tensor:
        """step;step;=result, or the result alone."""
        if not self.worked_steps:
            return result
        semicolon = torch.full_like(result[:, :1], ord(";"))
        parts = [part for step in steps for part in (step, semicolon)]
        return torch.cat((*parts, torch.full_like(semicolon, ord("=")), result), 1)

    # ---- in the place of a corpus ----------------------------------------------------------

    def batch(
        self, key: torch.Tensor, size: int, block_size: int, *, split="train", site=SITE_BATCH
    ):
        """Random problems: rows first .. first + size of the global batch of key's step.

        Args:
            key: (3,) int64 [seed, step, first] of `kernels.rng`.
            split: "train", or "val" for held-out problems.
        Returns: idx, targets, each (size, block_size) int64.
        """
        held_out = split != "train"
        count = self.held_out if held_out else 9 * self.held_out
        n = random_integers(key, site, range(size), count)
        return self.rows(*self.problems(n, held_out=held_out), block_size)

    def validation(self, size: int, block_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Held-out problems, each once, at most VALIDATION_PROBLEMS, spread evenly.

        Yields idx, targets (<= size, block_size).
        """
        count = min(self.held_out, VALIDATION_PROBLEMS)
        spread = torch.arange(count, device=self.device) * _PRIME % self.held_out  # all different
        for n in spread.split(size):
            yield self.rows(*self.problems(n, held_out=True), block_size)

    def training_sample(self, batches: int, size: int, block_size: int):
        """Yield `batches` batches of training problems, always the same."""
        for batch in range(batches):
            key = make_key(0, 0, batch * size, self.device)
            yield self.batch(key, size, block_size, site=SITE_EVALUATION)

    @property
    def sizes(self) -> dict[str, int]:
        """How many problems there are to train and to validate on."""
        validation = min(self.held_out, VALIDATION_PROBLEMS)
        return {"train_problems": 9 * self.held_out, "val_problems": validation}

    def extent(self, evaluation: Evaluation) -> tuple[int, int, str]:
        """How much was evaluated, of how much, and of what."""
        return evaluation.rows, self.held_out, "problems"

    def scores(self, evaluation: Evaluation) -> dict[str, float]:
        """The fraction of held-out problems that are solved."""
        return {"val_exact_match": evaluation.exact_match}

    @property
    def tokens_per_character(self) -> float:
        """Tokens are characters."""
        return 1.0

    # ---- for people ------------------------------------------------------------------------

    def prompt(self, question: str) -> str:
        """A question as the model knows it: "7 + 5" becomes "07+05=" with two digits.

        Raises: ConfigError if it is not one.
        """
        text = question.replace(" ", "").rstrip("=").strip()
        for op in self.operations:
            a, found, b = text.partition(op)
            if found and op == "/" and b.strip("0") == "":
                break
            if found and all(x.isascii() and x.isdigit() and len(x) <= self.digits for x in (a, b)):
                return f"{a.zfill(self.digits)}{op}{b.zfill(self.digits)}="
        raise ConfigError(
            f"a question must be two numbers of at most {self.digits} digits around one of "
            f"{self.operations}, not dividing by 0, such as {self.example()}; got {question!r}"
        )

    def answers(self, model, *, cuda_graph: bool = True) -> Iterator[str]:
        """Yield what `model` answers to five held-out questions, and what is right."""
        key = make_key(0, 0, 0, self.device)
        idx, targets = self.batch(key, 5, self.width - 1, split="val", site=SITE_EVALUATION)
        right = torch.cat((idx, targets[:, -1:].clamp(min=0)), 1)
        answered = self.solve(model, idx[:, : self.question], cuda_graph=cuda_graph)
        for row, expected in zip(answered, right, strict=True):
            row, expected = (
                self.readable(self.tokenizer.decode(tokens)) for tokens in (row, expected)
            )
            yield row if row == expected else f"{row}, wrong: {expected}"

    def answer(self, model, question: str) -> str:
        """What `model` answers, as people write it: "12+34" gives "12+34=46".

        Raises: ConfigError if it is not a question.
        """
        device = next(model.parameters()).device
        tokens = self.tokenizer.encode(self.prompt(question)).astype("int64")
        row = self.solve(model, torch.tensor(tokens, device=device)[None])[0]
        return self.readable(self.tokenizer.decode(row.tolist()))

    def solve(self, model, questions: torch.Tensor, *, cuda_graph: bool = True) -> torch.Tensor:
        """The likeliest answers: (rows, question) tokens -> (rows, width) tokens."""
        return generate(
            model,
            questions,
            max_new_tokens=self.width - self.question,
            temperature=0,
            vocab_size=self.tokenizer.vocab_size,  # the model's may be rounded up
            cuda_graph=cuda_graph,
        )

    def example(self) -> str:
        """A question."""
        number = "12345678"[: self.digits]
        return f"{number}{self.operations[0]}{number[::-1]}="

    def readable(self, row: str) -> str:
        """A finished row as people write it: "12+34=640" becomes "12+34=46"."""
        question, _, answer = row.partition("\n")[0].partition("=")
        steps, _, result = answer.rpartition("=")
        op = question[self.digits : self.digits + 1]
        if op == "/":
            quotient, _, remainder = result.partition("r")
            result = f"{_number(quotient)} remainder {_number(remainder)}"
        else:
            sign = "-" if op == "-" and result.endswith("-") else ""
            result = sign + _number(result.removesuffix("-")[::-1])
        left, right = question[: self.digits], question[self.digits + 1 :]
        return f"{_number(left)}{op}{_number(right)}={result}" + (f"   ({steps})" if steps else "")


def _number(digits: str) -> str:
    """Without leading zeros; what is no number stays as it is."""
    return str(int(digits)) if digits.isascii() and digits.isdigit() else digits


def _reversed(x: torch.Tensor, width: int) -> torch.Tensor:
    """(rows,) -> (rows, width) codes of the decimal digits, lowest first."""
    return torch.stack([x // 10**place % 10 for place in range(width)], 1) + ord("0")


def _written(x: torch.Tensor, width: int) -> torch.Tensor:
    """(rows,) -> (rows, width) codes of the decimal digits, highest first."""
    return _reversed(x, width).flip(1)


def task_of(config: TrainConfig, device="cpu") -> Arithmetic | None:
    """The task that `--data` names; None where it names a text.

    Raises: ConfigError on options that do not go with it.
    """
    if config.data not in TASKS:
        return None
    if config.tokenizer != "char":
        raise ConfigError(
            f"tokenizer must be char with --data {config.data}; got {config.tokenizer!r}; "
            "leave --tokenizer out"
        )
    operations = "+" if config.data == "add" else config.operations
    return Arithmetic(operations, config.digits, config.worked_steps, device)
