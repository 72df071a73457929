"""Train a GPT on a text: flags -> settings -> gptcore.trainer."""

import sys

from gptcore.flags import parse_settings, run_command


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 trained, 1 the run broke or was stopped, 2 bad input."""

    def command() -> int:
        settings = parse_settings(argv)
        from gptcore.trainer import train  # torch only when it is needed

        train(settings)
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
