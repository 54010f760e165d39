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

    use_replacements()
    try:
        return int(app(prog_name="moebench", standalone_mode=False) or 0)
    except typer.Abort as error:
        if isinstance(error.__cause__, EOFError):  # typer takes the end of any pipe or file for Ctrl-D
            raise error.__cause__ from None
        return 130
    except (Exception, SystemExit) as error:  # `sys.exit()` in a plug-in too
        mistake = _describe_mistake(error)
        if not mistake:
            raise
        _print_error(mistake)
        return 2


def _describe_mistake(error: BaseException) -> str:
    """Return a user's mistake in one line; empty: the error is one of this program."""
    from moebench.errors import UsageError
    from moebench.plugin_errors import describe_plugin_error

    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        # A file that cannot be read or written, where no command says more about it.
        return f"{error.filename or 'output'}: {error.strerror}"
    # An unknown command or option, a missing argument: the command-line library exports no class for them.
    if hasattr(error, "format_message"):
        return f"{' '.join(error.format_message().split())} (moebench --help)"
    return describe_plugin_error(error)


def _print_error(text: str) -> None:
    from moebench.printable import print_error

    try:
        print_error(text)
    except OSError:  # nobody reads it; the exit code still says it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    main()
