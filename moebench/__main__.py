"""The entry point: runs a command, and turns a user's mistake into one line and exit code 2."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(_run())


def _run() -> int:
    import click

    from moebench.cli import app
    from moebench.errors import UsageError

    try:
        return int(app(prog_name="moebench", standalone_mode=False) or 0)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
    except click.ClickException as error:  # an unknown option or command, a missing argument
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone (`moebench list routers | head -1`)
        return 0
    return 2


if __name__ == "__main__":
    main()
