"""The sections of `moebench probe`: one module each, with `build_report(request)`, imported when it is asked for."""
