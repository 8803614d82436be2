"""The ``lossguard`` command, and ``python -m lossguard`` where it is not on the path."""

import sys

from .extras import needed


def main() -> None:
    """What ``cli`` does; a package that isn't installed is named in one sentence."""
    try:
        with needed("the command lossguard"):
            from .cli.main import main

            main()
    except KeyboardInterrupt:  # while modules load
        print("lossguard: stopped", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if "pip install" not in str(error):
            raise
        print(f"lossguard: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
