"""The command line: thin commands over the library `ttt`."""

import signal
import sys

if sys.argv and (sys.argv[0] == "-m" or sys.argv[0].replace("\\", "/").rpartition("/")[2] in ("ttt", "ttt.exe")):
    # This is the program itself, and nothing can be lost yet: until `main` has its own handlers Ctrl-C ends it, where
    # Python's would raise an exception inside an import, to be swallowed there or told with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
