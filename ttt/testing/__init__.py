"""The laws of TTT layers and the checks of a plugin's other methods, as a pytest suite for any backbone plugin.

In a plugin's tests:

```python
from ttt.testing import laws

TestMyBackbone = laws("mybackbone")
```
"""

from ttt.laws import Bench, LawBrokenError, MethodBrokenError
from ttt.testing.suite import laws

__all__ = ["Bench", "LawBrokenError", "MethodBrokenError", "laws"]
