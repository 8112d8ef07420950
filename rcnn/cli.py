"""``rcnn``: the commands under one name."""

import sys
from collections.abc import Sequence

from rcnn import __version__, env, evaluate, predict, summary, train

_COMMANDS = {"train": train, "evaluate": evaluate, "predict": predict, "summary": summary, "env": env}


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``rcnn COMMAND ...``; ``argv`` defaults to the process's own arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in _COMMANDS:
        _COMMANDS[words[0]].main(words[1:])
        return
    usage = f"rcnn {__version__}\nusage: rcnn COMMAND [options]; rcnn COMMAND --help lists them\n" + "".join(
        f"  {name:9} {module.__doc__.splitlines()[0].split(': ', 1)[1]}\n"  # type: ignore[union-attr]
        for name, module in _COMMANDS.items()
    )
    if words and words[0] in ("-h", "--help"):
        print(usage, end="")
    elif words and words[0] == "--version":
        print(__version__)
    else:
        got = f"rcnn: unknown command {words[0]!r}\n" if words else ""
        sys.stderr.write(got + usage)
        sys.exit(2)


if __name__ == "__main__":
    main()
