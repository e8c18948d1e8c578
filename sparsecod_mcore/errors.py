"""What a user did wrong, told in one sentence."""

import functools
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import NoReturn

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """A mistake of the user's, whose message is one sentence: what was given, and what is accepted."""


def nearest(given: str, accepted: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the accepted name closest to `given`, or an empty string."""
    matches = get_close_matches(given, list(accepted), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def exit_with(error: BaseException) -> NoReturn:
    """Print the error's sentence on stderr and leave with the exit code for a user's mistake."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def command_line[**P](main: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command's ``main``: a `UserError` becomes one sentence and exit code 2, an interrupt exit code 130.

    The message of an interrupt, if it has one, says what becomes of the work.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            exit_with(error)
        except KeyboardInterrupt as interrupt:
            print(f"interrupted; {interrupt or 'the same command goes on from here'}", file=sys.stderr, flush=True)
            sys.exit(130)

    return run
