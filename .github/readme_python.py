"""Print the Python of a page: `python .github/readme_python.py README.md | python -`."""

import pathlib
import re
import sys

print(
    "\n".join(re.findall(r"```python\n(.*?)```", pathlib.Path(sys.argv[1]).read_text(), re.DOTALL))
)
