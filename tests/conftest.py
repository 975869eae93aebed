"""What every test needs: a token cache of its own, so that no test writes into the user's home."""

import os
import tempfile

# set before anything of mezzotint reads it, and inherited by the commands that tests start
os.environ.setdefault("MEZZOTINT_CACHE", os.path.join(tempfile.gettempdir(), "mezzotint-test-cache"))  # noqa: PTH118
