"""Networks as pure functions of pytrees, and the checkpoints they come from."""

import os

# It would tell at every start that PyTorch is missing, of which nothing here has need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
