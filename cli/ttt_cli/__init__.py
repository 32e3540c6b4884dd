"""The command line: thin commands over the library `ttt`."""

import sys

if sys.argv and (sys.argv[0] == "-m" or sys.argv[0].replace("\\", "/").rpartition("/")[2] in ("ttt", "ttt.exe")):
    # This is the program itself, and nothing can be lost yet: until `main` has its own handlers Ctrl-C ends it, where
    # Python's would raise an exception inside an import, to be swallowed there or told with a traceback. The module
    # under `signal`, which is built in: importing `signal` itself is long enough for one.
    import _signal  # type: ignore[import-not-found]

    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
