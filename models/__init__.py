"""Models and their training loops. Nothing here knows Apache Beam."""

import os

# How often a thread of OpenMP's looks for work before it sleeps. By default it looks for so long that another process
# on the same cores (a second worker, say) makes every operation ten times as long. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
