"""The laws of ttt for this backbone, and all else that a plugin owes."""

from ttt.testing import laws

TestExample = laws("example")
