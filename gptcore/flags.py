"""How settings are given: flags, a TOML file, a preset.

Every field of GPTConfig and TrainConfig is a flag and a TOML key. A run's settings are found so:

    defaults  <  --preset  <  --config FILE.toml  <  flags

Nothing here imports torch, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import dataclasses
import errno
import os
import re
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptcore.config import (
    ConfigError,
    GPTConfig,
    RunError,
    TrainConfig,
    check_field,
    check_model,
    kind_name,
    kinds_of,
    suggestion,
)
from gptcore.presets import PRESETS

UNUSABLE = (errno.EACCES, errno.ENAMETOOLONG)  # a path that was given; else something broke
OWN_ERROR_S = 5.0  # a rank above 0 waits so long before it takes an error for its own
TOML_CHARACTERS = 1 << 20  # of a settings file at most: a device has no end


def _model_fields() -> tuple[dataclasses.Field, ...]:
    """GPTConfig's fields that are settings; vocab_size follows from the tokenizer."""
    return tuple(f for f in dataclasses.fields(GPTConfig) if f.name != "vocab_size")


FIELDS: dict[str, dataclasses.Field] = {
    field.name: field for field in (*dataclasses.fields(TrainConfig), *_model_fields())
}


@dataclass(frozen=True)
class Settings:
    """What the user asked for: a preset's name and the fields given on top of it."""

    preset: str
    given: dict[str, Any]

    def check(self) -> None:
        """Raises: ConfigError on an unknown preset or field, or a bad value."""
        if self.preset not in ("auto", *PRESETS):
            known = f"; presets: auto, {', '.join(PRESETS)}"
            raise ConfigError(
                f"unknown preset {self.preset!r}"
                + (suggestion(str(self.preset), list(PRESETS)) or known)
            )
        for name, value in self.given.items():
            if name not in FIELDS:
                raise ConfigError(f"unknown setting {name!r}" + suggestion(name, list(FIELDS)))
            check_field(FIELDS[name], value)

    def merged(self, device_type: str = "cpu") -> tuple[TrainConfig, dict[str, Any]]:
        """TrainConfig, and the fields of GPTConfig that are not its defaults.

        Raises: ConfigError.
        """
        self.check()
        values = {**PRESETS[self.resolved_preset(device_type)], **self.given}
        train, model = split_fields(values)
        config = TrainConfig(**train)
        # Refuse an impossible model before any data is read.
        check_model(config.model, GPTConfig(**model), self.given)
        return config, model

    def resolved_preset(self, device_type: str) -> str:
        """The preset's name, "auto" replaced by what it means on this kind of device."""
        if self.preset != "auto":
            return self.preset
        return "notebook" if device_type == "cuda" else "cpu"


def split_fields(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One dictionary of fields -> (those of TrainConfig, those of GPTConfig)."""
    train = {field.name for field in dataclasses.fields(TrainConfig)}
    return (
        {name: value for name, value in values.items() if name in train},
        {name: value for name, value in values.items() if name not in train},
    )


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, - and _ alike in flags, and the nearest flag suggested."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse_args(self, args=None, namespace=None):
        """As argparse's, but `--max-iters` is `--max_iters`.

        Raises: ConfigError on bad arguments.
        """
        args = [_underscored(arg) for arg in (sys.argv[1:] if args is None else args)]
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            kind = "flag" if word.startswith("-") else "argument"
            near = suggestion(word, list(_flags(self, namespace))) if kind == "flag" else ""
            raise ConfigError(f"unknown {kind} {word}" + (near or f"; see {self.prog} --help"))
        for name, value in vars(namespace).items():
            if value == "" and not (name in FIELDS and FIELDS[name].default == ""):
                raise ConfigError(f"{name} must not be empty; is a shell variable unset?")
        return namespace


def _flags(parser: argparse.ArgumentParser, namespace: argparse.Namespace):
    """Every flag of `parser` and of the command that was given."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            yield from _flags(action.choices[getattr(namespace, action.dest)], namespace)


def _underscored(arg: str) -> str:
    """A flag's name with _ for -; what is no flag, such as a text to continue, as it is."""
    name, equals, value = arg.partition("=")
    if not re.fullmatch("--[A-Za-z0-9_-]+", name):
        return arg
    return "--" + name[2:].replace("-", "_") + equals + value


def from_text(field: dataclasses.Field) -> Callable[[str], Any]:
    """Reads a flag's text as a value of the type of `field`."""
    kinds = kinds_of(field)

    def read(text: str):
        if text.lower() == "none" and types.NoneType in kinds:
            return None
        if bool in kinds and text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        for kind in kinds:
            if kind in (int, float):
                try:
                    return kind(text)
                except ValueError:
                    break
            if kind is str:
                return text
        # argparse swallows ValueErrors but shows the text of this one.
        raise argparse.ArgumentTypeError(f"must be {kind_name(kinds)}; got {text!r}")

    return read


def parse_settings(argv: Sequence[str] | None = None) -> Settings:
    """Read the flags of training and the TOML file they may name.

    Raises: ConfigError on unknown flags, keys, presets or values of the wrong type.
    """
    parser = Parser(prog="train.py", description="Train a GPT on a text.")
    add_training_flags(parser)
    return take_settings(vars(parser.parse_args(argv)))


def add_training_flags(
    parser: argparse.ArgumentParser, helps: Mapping[str, str] = types.MappingProxyType({})
) -> None:
    """Give `parser` the flags of training; those not given leave no trace in the namespace.

    Args:
        helps: texts of settings that mean something else here; argparse.SUPPRESS hides a flag.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s [--FLAG VALUE ...]"
    parser.epilog = (
        "[...] are the defaults where a preset sets nothing; what each sets: gptcore/presets.py\n"
        f"presets: {', '.join(PRESETS)}; auto: notebook on a GPU, cpu without"
    )
    parser.add_argument("--preset", default=None, help="where the settings start; default auto")
    parser.add_argument("--config", default=None, metavar="FILE.toml", help="settings, one a line")
    groups = (
        ("run", dataclasses.fields(TrainConfig)),
        ("model", _model_fields()),
    )
    for title, fields in groups:
        group = parser.add_argument_group(title)
        for field in fields:
            optional = {"nargs": "?", "const": True} if bool in kinds_of(field) else {}
            default = "" if field.default in (None, "") else f" [{field.default}]"
            text = (field.metadata["help"] + default).replace("%", "%%")
            group.add_argument(
                f"--{field.name}",
                type=from_text(field),
                default=argparse.SUPPRESS,
                metavar="X",
                help=helps.get(field.name, text),
                **optional,
            )


def take_settings(arguments: dict[str, Any]) -> Settings:
    """The settings in parsed arguments that `add_training_flags` described; others are ignored.

    Raises: ConfigError on an unknown preset, an unknown key in the TOML file, or a bad value.
    """
    given = {name: value for name, value in arguments.items() if name in FIELDS}
    file = arguments["config"]
    from_file = read_toml(file) if file is not None else {}
    file_preset = from_file.pop("preset", "auto")
    settings = Settings(arguments["preset"] or file_preset, {**from_file, **given})
    settings.check()
    return settings


def read_toml(path: str) -> dict[str, Any]:
    """The settings in a TOML file: flat, keys as the flags, and optionally `preset`.

    Raises: ConfigError if it is missing, not TOML, or has unknown keys.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, encoding="utf-8") as file:
            raw = tomllib.loads(file.read(TOML_CHARACTERS))
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise ConfigError(f"--config {path} is not TOML: {error}") from error
    values = {key.replace("-", "_"): value for key, value in raw.items()}
    if len(values) < len(raw):
        twice = next(key for key in raw if "-" in key and key.replace("-", "_") in raw)
        raise ConfigError(f"{path} has {twice} twice, once with _; leave one out")
    for key in values:
        if key == "preset":
            continue
        if key not in FIELDS:
            raise ConfigError(
                f"unknown key {key!r} in {path}"
                + (suggestion(key, list(FIELDS)) or "; its keys are train.py's flags")
            )
    return values


def _report(error: Exception) -> None:
    """One line on stderr; of what all processes of torchrun met, from the first one alone."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(OWN_ERROR_S)  # if rank 0 has the same to say, torchrun ends this process now
    print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)


def _drop_output() -> None:
    """Lead a stdout that takes no more nowhere: at its end Python would try again, and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(command: Callable[[], int]) -> int:
    """The exit code of a command line; what a user can mend is one line on stderr.

    Characters that the terminal or pipe cannot show are written as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        print(end="", flush=True)  # what a full disk refuses of it, it refuses here
        return code
    except ConfigError as error:
        _report(error)
        return 2
    except (KeyboardInterrupt, BrokenPipeError):
        return 1
    except RunError as error:
        _report(error)
    except OSError as error:  # where nobody expected one
        path, words = error.filename, error.strerror or str(error)
        if path is not None and error.errno in UNUSABLE:
            _report(ConfigError(f"cannot use {path}: {words}; give another path"))
            return 2
        _report(RunError(words if path is None else f"{path}: {words}"))
    _drop_output()
    return 1
