"""The entry point: runs a command, and prints a user's mistake as one line, with exit code 2."""

import atexit
import errno
import os
import sys

from moebench import interrupts
from moebench.process_setup import end_process, prepare_process, refuse_silent_exit

FILE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
"""Errors of files and folders of the user, not of the code."""


def main() -> None:
    """Run the command line and exit with its code."""
    codes: list[int] = []
    atexit.register(end_process, codes)  # first, so that it is called last
    prepare_process()
    interrupts.record_interrupts()
    try:
        with refuse_silent_exit():
            code = _run()
        codes.append(130 if interrupts.received and code == 0 else code)
    except KeyboardInterrupt:
        codes.append(130)
    sys.exit(codes[0])


def _run() -> int:
    import typer

    from moebench.cli import app
    from moebench.cli.encoding import use_replacements
    from moebench.errors import UsageError

    use_replacements()
    try:
        return int(app(prog_name="moebench", standalone_mode=False) or 0)
    except UsageError as error:
        _print_error(str(error))
        return 2
    except OSError as error:
        # A file that cannot be read or written, where no command says more about it.
        if error.errno not in FILE_ERRORS:
            raise
        _print_error(f"{error.filename or 'output'}: {error.strerror}")
        return 2
    except typer.Abort as error:
        if isinstance(error.__cause__, EOFError):  # typer takes the end of any pipe or file for Ctrl-D
            raise error.__cause__ from None
        return 130
    except Exception as error:
        # An unknown command or option, a missing argument: the command-line library exports no class for them.
        if not hasattr(error, "format_message"):
            raise
        _print_error(f"{' '.join(error.format_message().split())} (moebench --help)")
        return 2


def _print_error(text: str) -> None:
    from moebench.printable import print_error

    try:
        print_error(text)
    except OSError:  # nobody reads it; the exit code still says it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    main()
