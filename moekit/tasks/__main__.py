"""lm-evaluation-harness's command line, with moekit's model and tasks.

python -m moekit.tasks --model moekit --model_args checkpoint=/data/en_moe_lm_15b,world_size=4 --tasks fair_zero_shot

The arguments are those of ``lm_eval``, which finds the model by itself where a task is the path of one of moekit's files.
"""

import sys

from lm_eval.__main__ import cli_evaluate

from moekit.headlines import first_line
from moekit.tasks import FILES


def main() -> None:
    """Run ``lm_eval``; moekit's task files are its ``--include_path`` where none is given.

    A wrong argument is one sentence, and the exit code 2.
    """
    runs = len(sys.argv) > 2 and sys.argv[1] not in ("ls", "validate")
    if runs and not any(argument.startswith("--include_path") for argument in sys.argv):
        sys.argv += ["--include_path", str(FILES)]
    try:
        cli_evaluate()
    except ValueError as error:
        print(f"python -m moekit.tasks: error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
