"""No test reads, or writes, what was measured for the user: plans come from the cost model."""

import os

os.environ["SPARSETRAIN_PLANS"] = "off"
